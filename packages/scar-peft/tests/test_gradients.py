"""Gradients: through steering, checkpointing, autocast, quantized bases, and several processes."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from scar_peft import record_scores, scar_layers, steering
from tests.support import scar_models as tiny
from tests.support.processes import run_python


def gradients(model, **options):
    model.zero_grad()
    ids = tiny.some_ids()
    model(input_ids=ids, labels=ids, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    """Equal but for the last bits, which depend on where tensors lie in memory."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def adapted(base=None, **fields):
    return tiny.adapted(base, layers=[0, 1], **fields).train()


@pytest.mark.parametrize("mode", ["residual", "reconstruct"])
def test_training_reaches_the_adapter_and_nothing_else(mode):
    model = adapted(mode=mode)
    model.set_steering({"a": 1.0, "b": -1.0}, rule="set")
    found = gradients(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trainable
    assert all(".scar.scar_" in name for name in found)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    rows = found["base_model.model.model.layers.0.scar.scar_encoder.default"].abs().sum(1)
    assert (rows[2:].any().item()) == (mode == "reconstruct")  # residual steering knows the concepts only


def test_only_adapters_of_chosen_layers_are_trained():
    model = tiny.adapted(layers=[1]).train()
    model.set_steering("a", 1.0, rule="set")
    assert {name.split(".")[4] for name in gradients(model)} == {"1"}


@pytest.mark.parametrize("rule", ["scale", "set", "add", "add_gated"])
@pytest.mark.parametrize("mode", ["residual", "reconstruct"])
@pytest.mark.parametrize(("family", "site"), [("llama", "block"), ("llama", "mlp"), ("gpt2", "attn")])
def test_gradient_checkpointing_changes_no_gradient(family, site, mode, rule):
    base = tiny.built(tiny.CAUSAL[family])
    model = adapted(base, mode=mode, site=site)
    model.set_steering({"a": [1.0, -1.0, 0.5], "b": 0.5}, rule=rule)
    expected = gradients(model)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    assert expected
    assert_same(found, expected)


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_reentrant_checkpointing_works_too(site):
    base = tiny.built()
    model = adapted(base, site=site)
    model.set_steering("a", 1.0)
    expected = gradients(model)
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    assert_same(gradients(model), expected)


def test_checkpointing_with_padding_leaves_the_same_tokens_alone():
    base = tiny.built()
    model = adapted(base)
    model.set_steering("a", 1.0, rule="add")
    mask = torch.ones_like(tiny.some_ids())
    mask[0, :4] = 0
    expected = gradients(model, attention_mask=mask)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, attention_mask=mask)
    assert_same(found, expected)


def test_gradients_are_those_of_the_formula():
    model = tiny.adapted(tiny.built().double(), layers=[2])
    (layer,) = scar_layers(model)
    weights = layer.weights()
    x = torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True)
    target = layer.get_base_layer()
    inner = target.forward
    target.forward = lambda hidden, **_: hidden
    try:
        for rule, mode in (("scale", "residual"), ("set", "reconstruct"), ("add_gated", "residual")):
            with steering(model, {"a": 0.7, "b": -0.4}, rule=rule, mode=mode):
                assert torch.autograd.gradcheck(target, (x,), atol=1e-6)
                target(x).square().sum().backward()
                assert weights.decoder.grad.any()
                weights.decoder.grad = None
    finally:
        target.forward = inner


def test_a_frozen_adapter_lets_gradients_through():
    model = tiny.adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embeddings = model.get_input_embeddings()(tiny.some_ids()).requires_grad_()
    for mode in ("residual", "reconstruct"):
        embeddings.grad = None
        model(inputs_embeds=embeddings, steering={"a": 1.0}, mode=mode).logits.sum().backward()
        assert embeddings.grad.isfinite().all()
        assert embeddings.grad.any()


def test_steering_works_inside_autocast():
    with torch.no_grad():
        model = tiny.adapted()
        request = {"steering": {"a": 1.0, "b": -0.5}}
        for mode in ("residual", "reconstruct"):
            expected = tiny.logits(model, **request, mode=mode)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = tiny.logits(model, **request, mode=mode)
                with record_scores(model) as record:
                    tiny.logits(model)
            assert (found.float() - expected).abs().mean() < 0.05
            assert record.scores["a"].dtype == torch.float32
    trained = adapted()
    trained.set_steering("a", 1.0, rule="set")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(gradient.dtype == torch.float32 for gradient in gradients(trained).values())


@pytest.mark.parametrize("site", ["block", "mlp", "attn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_bases_are_steered_and_trained_through(site):
    with torch.no_grad():
        expected = tiny.logits(tiny.adapted(site=site), steering={"a": 1.0})
    base = torch.ao.quantization.quantize_dynamic(tiny.built(), {torch.nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in repr(base)
    neutral = tiny.logits(base)
    quantized = tiny.adapted(base, site=site)
    assert torch.equal(tiny.logits(quantized), neutral)
    found = tiny.logits(quantized, steering={"a": 1.0})
    assert {each.dtype for layer in scar_layers(quantized) for each in layer.weights()} == {torch.float32}
    assert (found - expected).abs().mean() < 0.2
    layer = scar_layers(quantized)[0]
    activations = torch.randn(2, 3, 32)
    with steering(quantized, a=1.0, rule="set"):
        layer._steer(layer.get_base_layer(), (), activations).sum().backward()
    assert layer.weights().decoder.grad.any()


def test_quantized_linears_do_not_set_the_dtype_of_adapters():
    """Packed integers say nothing about activations."""
    base = tiny.built()
    for block in base.model.layers:
        packed = torch.zeros(4, dtype=torch.uint8)
        block.mlp.down_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    model = tiny.adapted(base, site="mlp")
    assert {each.dtype for layer in scar_layers(model) for each in layer.weights()} == {torch.float32}


def test_torchao_bases_are_steered():
    torchao = pytest.importorskip("torchao.quantization")
    base = tiny.built()
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    neutral = tiny.logits(base)
    model = tiny.adapted(base)
    assert torch.equal(tiny.logits(model), neutral)
    assert not torch.equal(tiny.logits(model, steering={"a": 1.0}), neutral)


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_an_adapter(tmp_path):
    model = adapted()
    model.set_steering("a", 1.0, rule="set")
    before = [each.clone() for each in scar_layers(model)[0].weights()]
    rows = [{"input_ids": row, "labels": row} for row in tiny.some_ids(8)]
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], learning_rate=1e-2, use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    after = scar_layers(model)[0].weights()
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


PROCESSES = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from scar_peft import record_scores, scar_layers
from tests.support import scar_models as tiny

def gradients(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()
    layer = scar_layers(model)[0]
    found = [each.grad for each in layer.weights()]
    return [each.full_tensor() if hasattr(each, "full_tensor") else each for each in found]

def build():
    model = tiny.adapted(layers=[0, 1])
    model.set_steering({"a": 1.0, "b": -0.5}, rule="set")
    return model

def work(rank, kind, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ids = tiny.some_ids(4)
    alone = build()
    expected, logits = gradients(alone, ids), tiny.logits(alone, ids)
    model = build()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        mesh = init_device_mesh("cpu", (2,))
        for parameter in model.parameters():  # it cannot take decoders, which lie in memory column by column
            parameter.data = parameter.data.contiguous()
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    own = ids[rank * 2 : rank * 2 + 2]
    wrapped(input_ids=own, labels=own).loss.backward()
    layer = scar_layers(model)[0]
    found = [each.grad for each in layer.weights()]
    found = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in found]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    with torch.no_grad(), record_scores(model) as record:
        torch.testing.assert_close(wrapped(input_ids=own).logits, logits[rank * 2 : rank * 2 + 2], rtol=1e-4, atol=1e-4)
    assert record.scores["a"].shape == own.shape
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], sys.argv[2]), nprocs=2)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_gradients_of_one(kind, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    code = f"import runpy, sys; sys.argv = ['program.py', '{kind}', '{port}']; "
    run_python(code + f"runpy.run_path({str(program)!r}, run_name='__main__')", timeout=280)
