"""Training of an adapter: it learns, it can be stopped anywhere, and it refuses what cannot be."""

import ast
import inspect
import math
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import scar_peft
from scar_peft.coder import CoderWeights
from scar_peft.losses import scar_loss
from scar_peft.training import ActivationStore, ScarTrainer, ScarTrainingArguments, TrainingResult
from scar_peft.training.objective import CoderSettings, SparseCoder, coder_loss
from tests.support.scar_texts import register_texts, tiny_llama, word_tokenizer

ROWS = register_texts(60)


def adapted(layers: tuple[int, ...] = (0,), base: Any = None, seed: int = 3, **config: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"layers": list(layers), "site": "block", "concepts": ["archaic"], "n_latents": 24, "k": 4} | config
    return get_peft_model(base or tiny_llama(), scar_peft.ScarConfig(**settings))


def trainer(folder: Path, model: Any = None, rows: Any = None, **settings: Any) -> ScarTrainer:
    own = {name: settings.pop(name) for name in ("label_columns", "eval_dataset", "on_log") if name in settings}
    defaults = {"batch_tokens": 64, "buffer_tokens": 256, "learning_rate": 3e-3, "log_steps": 3, "progress_bar": False}
    args = ScarTrainingArguments(folder, **(defaults | settings))
    return ScarTrainer(model or adapted(), rows or ROWS, args=args, processing_class=word_tokenizer(), **own)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "scar_" in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(result: TrainingResult, name: str = "nmse/0") -> list[float]:
    return [entry[name] for entry in result.log_history if name in entry]


def test_training_lowers_both_losses_and_leaves_the_base_alone(tmp_path: Path) -> None:
    model = adapted(layers=(0, 1))
    base = {name: value.clone() for name, value in model.state_dict().items() if "scar_" not in name}
    result = trainer(tmp_path, model, max_steps=60, batch_tokens=256).train()
    assert result.steps == 60
    for layer in (0, 1):
        assert losses(result, f"nmse/{layer}")[-1] < 0.5 * losses(result, f"nmse/{layer}")[0]
        assert losses(result, f"concept_loss/{layer}")[-1] < losses(result, f"concept_loss/{layer}")[0]
        assert 0.0 <= result.metrics[f"eval_auroc_archaic/{layer}"] <= 1.0
        assert result.metrics[f"eval_nmse/{layer}"] < 1.0
    assert same(base, {name: value for name, value in model.state_dict().items() if "scar_" not in name})


def test_layers_are_trained_as_each_would_be_alone(tmp_path: Path) -> None:
    alone, both = adapted(layers=(1,)), adapted(layers=(0, 1))
    target = scar_peft.scar_layers(both)[1].weights("default")
    with torch.no_grad():
        for mine, other in zip(target, scar_peft.scar_layers(alone)[0].weights("default"), strict=True):
            mine.copy_(other)
    for name, model in (("alone", alone), ("both", both)):
        trainer(tmp_path / name, model, max_steps=5, max_grad_norm=0.1).train()
    for mine, other in zip(target, scar_peft.scar_layers(alone)[0].weights("default"), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("store", ["disk", "stream"])
@pytest.mark.parametrize("step", [4, 7])
def test_resumed_run_ends_bit_equal(tmp_path: Path, store: str, step: int, no_unpickling: None) -> None:
    settings = {
        "store": store,
        "max_steps": 11,
        "save_steps": step,
        "auxk": 2,
        "dead_after_tokens": 64,
        "warmup_steps": 3,
    }
    whole = adapted(layers=(0, 1))
    expected = trainer(tmp_path / "whole", whole, lr_decay="cosine", **settings).train()
    stopped = adapted(layers=(0, 1))

    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "stopped", stopped, lr_decay="cosine", on_log=stop, **settings).train()
    resumed = adapted(layers=(0, 1), seed=99)  # its own start does not matter
    found = trainer(tmp_path / "stopped", resumed, lr_decay="cosine", **settings).train(resume_from_checkpoint=True)
    assert same(weights_of(resumed), weights_of(whole))
    assert found.log_history == expected.log_history
    assert found.metrics == expected.metrics


def test_killed_run_loses_only_the_last_interval(tmp_path: Path) -> None:
    def stop(entry: dict[str, float]) -> None:
        if entry["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, max_steps=20, save_steps=2, on_log=stop).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_checkpoints_hold_no_pickle_and_only_the_latest_stay(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=9, save_steps=2, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["activations", "checkpoint-8", "checkpoint-9"]
    assert sorted(path.name for path in (tmp_path / "checkpoint-9").iterdir()) == [
        "coders.safetensors",
        "optimizer.safetensors",
        "process-00000.safetensors",
        "state.json",
    ]


def test_resuming_from_a_folder_and_what_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, save_steps=2).train()
    finished = trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert finished.metrics["eval_nmse/0"] > 0  # of the run before: nothing was left to do
    with pytest.raises(ValueError, match=r"^learning_rate must be 0.003 to go on from .*checkpoint-4, got 0.1"):
        trainer(tmp_path, max_steps=4, learning_rate=0.1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"^k must be 4 to go on from .*, got 5"):
        trainer(tmp_path, adapted(k=5), max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"^dataset must be '\w+' to go on"):
        trainer(tmp_path, rows=ROWS[:50], max_steps=4, store_dir=tmp_path / "other").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"^total_steps must be 4 to go on"):
        trainer(tmp_path, max_steps=5).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint must be the folder of a checkpoint, got "):
        trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=tmp_path)
    with pytest.raises(ValueError, match="resume_from_checkpoint=True needs a checkpoint in output_dir"):
        trainer(tmp_path / "new", max_steps=4).train(resume_from_checkpoint=True)


def test_second_run_does_not_harvest_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = adapted()
    trainer(tmp_path, first, max_steps=2).train()
    monkeypatch.setattr("scar_peft.training.activations.capture_activations", lambda *_: pytest.fail("harvested again"))
    second = adapted()
    trainer(tmp_path, second, max_steps=2).train()
    assert same(weights_of(first), weights_of(second))


def test_trained_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    base = tiny_llama()
    run = trainer(tmp_path / "run", model := adapted(base=base), max_steps=2)
    run.train()
    run.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert same(weights_of(model), weights_of(loaded))


@pytest.mark.parametrize("store", ["disk", "stream"])
def test_evaluation_set_of_its_own(tmp_path: Path, store: str) -> None:
    result = trainer(tmp_path, max_steps=4, eval_steps=2, store=store, eval_dataset=register_texts(6, seed=9)).train()
    assert [entry["step"] for entry in result.log_history if "eval_nmse/0" in entry] == [2, 4]
    assert (tmp_path / "activations" / "eval" / "index.json").exists() == (store == "disk")


def test_without_validation(tmp_path: Path) -> None:
    result = trainer(tmp_path, max_steps=2, validation_share=0.0, save_steps=None).train()
    assert result.metrics == {}
    assert not list(tmp_path.glob("checkpoint-*"))


def test_epochs_count_passes_over_the_training_rows(tmp_path: Path) -> None:
    result = trainer(tmp_path, num_epochs=1.5, log_steps=1).train()
    assert result.log_history[-1]["epoch"] == pytest.approx(1.5, abs=0.1)
    assert [entry["step"] for entry in result.log_history if "loss/0" in entry] == list(range(1, result.steps + 1))


def test_unsupervised_baseline_does_not_see_the_labels(tmp_path: Path) -> None:
    one, other = adapted(), adapted()
    flipped = [row | {"archaic": 1 - row["archaic"]} for row in ROWS]
    trainer(tmp_path / "one", one, max_steps=4, concept_weight=0.0).train()
    trainer(tmp_path / "other", other, flipped, max_steps=4, concept_weight=0.0).train()
    assert same(weights_of(one), weights_of(other))


def test_quantized_base_is_trained_on(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear}, dtype=torch.qint8)
    result = trainer(tmp_path, adapted(base=base), max_steps=20).train()
    assert losses(result)[-1] < losses(result)[0]


def test_activations_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    base = tiny_llama()
    with torch.no_grad():
        base.model.embed_tokens.weight[5] = math.inf
    with pytest.warns(UserWarning, match=r"the loss of layer 0 is nan after step 1; the activations hold"):
        trainer(tmp_path, adapted(base=base), max_steps=1, save_steps=None, validation_share=0.0).train()


def test_decoder_of_unit_norm(tmp_path: Path) -> None:
    model = adapted()
    trainer(tmp_path, model, max_steps=3, unit_norm_decoder=True).train()
    decoder = scar_peft.scar_layers(model)[0].weights("default").decoder
    torch.testing.assert_close(decoder.norm(dim=0), torch.ones(24))


def test_single_class_warns(tmp_path: Path) -> None:
    rows = [row | {"archaic": 0} for row in ROWS]
    with pytest.warns(UserWarning, match="one class for the concept 'archaic'"):
        result = trainer(tmp_path, rows=rows, max_steps=2).train()
    assert math.isnan(result.metrics["eval_auroc_archaic/0"])


def test_balanced_classes_weigh_positives_by_their_rarity(tmp_path: Path) -> None:
    rows = [row | {"archaic": int(i % 4 == 0)} for i, row in enumerate(ROWS)]
    run = trainer(tmp_path, rows=rows, max_steps=1, balance_classes=True, pos_weight=2.0)
    run.train()
    store = run._harvest(rows, "train")
    assert run._settings(store).pos_weight == (2.0 * store.negatives[0] / store.positives[0],)


def case(C: int = 2, n: int = 12, d: int = 8, N: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, d), (d, n), (d,), (n,))
    weights = CoderWeights(*(nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes))
    x = torch.randn(N, d, generator=generator, dtype=dtype) * 3 + 1
    return x, torch.randint(-1, 2, (N, C), generator=generator), weights


@pytest.mark.parametrize("activation", ["topk", "topk-sigmoid", "topk-tanh", "relu"])
@pytest.mark.parametrize("always", [0, 2])
@pytest.mark.parametrize("N", [1, 20])
def test_loss_and_gradients_are_those_of_the_definition(activation: str, always: int, N: int) -> None:
    x, labels, weights = case(N=N)
    always = 0 if activation == "relu" else always
    settings = CoderSettings(
        k=12 if activation == "relu" else 3,
        concepts=2,
        activation=activation,
        always=always,
        concept_weight=0.7,
        pos_weight=(3.0, 0.5),
    )
    mine = coder_loss(x, labels, weights, settings)
    theirs = scar_loss(
        x,
        labels,
        weights,
        k=settings.k,
        activation=activation,
        always=always,
        concept_weight=0.7,
        pos_weight=torch.tensor([3.0, 0.5]),
    )
    for name in ("loss", "reconstruction", "concept", "l1"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
    found = torch.autograd.grad(mine.loss, weights)
    for gradient, expected in zip(found, torch.autograd.grad(theirs.loss, weights), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=2e-6)


def test_loss_of_half_precision_activations_is_computed_in_float32() -> None:
    x, labels, weights = case()
    settings = CoderSettings(k=3, concepts=2)
    half = coder_loss(x.bfloat16(), labels, weights, settings)
    assert torch.equal(half.loss, coder_loss(x.bfloat16().float(), labels, weights, settings).loss)


def test_unlabelled_rows_train_only_the_reconstruction_unless_they_count_as_negative() -> None:
    x, labels, weights = case()
    nothing = torch.full_like(labels, -1)
    settings = CoderSettings(k=3, concepts=2)
    assert coder_loss(x, nothing, weights, settings).concept == 0
    as_negative = CoderSettings(k=3, concepts=2, unlabelled_as_negative=True)
    both = [coder_loss(x, nothing, weights, as_negative), coder_loss(x, torch.zeros_like(labels), weights, settings)]
    torch.testing.assert_close(both[0].concept, both[1].concept)


def test_dead_latents_learn_what_the_others_leave_over() -> None:
    x, labels, weights = case()
    with torch.no_grad():
        weights.latent_bias[7:] = -100.0
    settings = CoderSettings(k=3, concepts=2, concept_weight=0.0, auxk=2)
    is_dead = torch.arange(12) >= 7
    without = torch.autograd.grad(coder_loss(x, labels, weights, settings).loss, weights)[1]
    with torch.no_grad():
        weights.latent_bias[7:] = -1.0
    loss = coder_loss(x, labels, weights, settings, is_dead)
    gradient = torch.autograd.grad(loss.loss, weights)[1]
    assert not without[:, 7:].any() and gradient[:, 7:].any()
    nobody = coder_loss(x, labels, weights, settings, torch.zeros(12, dtype=torch.bool))
    assert torch.equal(nobody.loss, coder_loss(x, labels, weights, settings).loss)


def test_latents_are_dead_after_so_many_rows_without_use() -> None:
    x, labels, weights = case()
    coder = SparseCoder(weights, CoderSettings(k=3, concepts=2))
    with torch.no_grad():
        weights.latent_bias[7:] = -100.0
    for _ in range(3):
        coder.count_fired(coder(x, labels).fired, 20)
    assert (coder.rows_since_fired >= 60).tolist()[7:] == [True] * 5
    assert int(coder.rows_since_fired.min()) == 0


@pytest.mark.parametrize(
    ("step", "settings", "expected"),
    [
        (0, {}, 1.0),
        (99, {}, 1.0),
        (0, {"warmup_steps": 10}, 0.1),
        (9, {"warmup_steps": 10}, 1.0),
        (55, {"warmup_steps": 10, "lr_decay": "linear"}, 0.5),
        (55, {"warmup_steps": 10, "lr_decay": "cosine"}, 0.5),
        (50, {"lr_decay": "cosine"}, 0.5),
        (99, {"lr_decay": "linear"}, 0.01),
    ],
)
def test_learning_rate(step: int, settings: dict[str, Any], expected: float) -> None:
    args = ScarTrainingArguments("out", learning_rate=1.0, **settings)
    assert args.learning_rate_at(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"store": "tape"}, "store must be one of disk, stream, got 'tape'"),
        ({"store": "stream"}, 'store="stream" needs max_steps'),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be None or at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"num_epochs": math.inf}, "num_epochs must be positive and finite, got inf"),
        ({"pos_weight": -1.0}, "pos_weight must be at least 0 and finite, got -1.0"),
        ({"concept_weight": math.nan}, "concept_weight must be at least 0 and finite, got nan"),
        ({"validation_share": 1.0}, r"validation_share must lie in \[0, 1\), got 1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be None or positive, got 0.0"),
        ({"buffer_tokens": 10}, r"buffer_tokens must be at least batch_tokens \(2048\), got 10"),
        ({"lr_decay": "step"}, "lr_decay must be one of none, linear, cosine, got 'step'"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"label_level": "word"}, "label_level must be one of sequence, token, span, got 'word'"),
        ({"grad_dtype": "int8"}, "grad_dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScarTrainingArguments("out", **settings)


def test_every_argument_is_documented() -> None:
    body = ast.parse(inspect.getsource(ScarTrainingArguments)).body[0].body  # type: ignore[attr-defined]
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and field.target.id != "_":  # type: ignore[union-attr]
            assert isinstance(after, ast.Expr), field.target.id  # type: ignore[union-attr]


def test_models_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must hold SCAR layers"):
        trainer(tmp_path, tiny_llama())
    frozen = adapted()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="the adapter 'default' must be trainable, got frozen weights; load it with"):
        trainer(tmp_path, frozen)
    with pytest.raises(ValueError, match="model must hold a full adapter to be trained, got a compact one"):
        trainer(tmp_path, adapted(compact=True, n_latents=None, k=None))
    config = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="model must be decoder-only or encoder-only to be trained on texts"):
        trainer(tmp_path, adapted(base=T5ForConditionalGeneration(config)))
    two = adapted()
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"adapter_name must be given, because several are active"):
        trainer(tmp_path, two)
    with pytest.raises(ValueError, match="processing_class must be given"):
        ScarTrainer(adapted(), ROWS, args=ScarTrainingArguments(tmp_path))
    half = adapted()
    for tensor in scar_peft.scar_layers(half)[0].weights("default"):
        tensor.data = tensor.data.bfloat16()
    with pytest.raises(ValueError, match="encoder of the adapter must be a float32 parameter"):
        trainer(tmp_path, half, max_steps=1).train()


def test_spans_of_two_concepts_train_token_by_token(tmp_path: Path) -> None:
    rows = []
    for row in ROWS:
        found = re.finditer(r"\bthe\b|\bking\b", row["text"])
        spans = [{"start": each.start(), "end": each.end(), "label": each.group()} for each in found]
        rows.append({"text": row["text"], "spans": spans})
    model = adapted(concepts=["the", "king"])
    run = trainer(
        tmp_path,
        model,
        datasets.Dataset.from_list(rows),
        label_columns="spans",
        label_level="span",
        max_steps=120,
        batch_tokens=128,
        learning_rate=3e-2,
    )
    result = run.train()
    assert result.metrics["eval_auroc_the/0"] > 0.95  # the word itself tells
    assert result.metrics["eval_auroc_king/0"] > 0.95
    store = ActivationStore(tmp_path / "activations" / "train")
    words = [word for row in rows for word in row["text"].split()]
    assert store.positives == [words.count("the"), words.count("king")]


def test_soft_labels_reach_the_loss(tmp_path: Path) -> None:
    rows = [row | {"archaic": 0.2 + 0.6 * row["archaic"]} for row in ROWS]
    result = trainer(tmp_path, rows=rows, max_steps=3, log_steps=1, soft_labels=True).train()
    assert ActivationStore(tmp_path / "activations" / "train").read(0).labels.dtype == torch.float32
    assert losses(result, "concept_loss/0")[-1] > 0.4  # the entropy of the labels is 0.5


def test_label_columns_of_another_name_and_missing_ones(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "old": row["archaic"]} for row in ROWS]
    with pytest.raises(
        ValueError, match=r"label_columns names 'archaic', which the dataset lacks; it has \['old', 'text'\]"
    ):
        trainer(tmp_path, rows=rows, max_steps=1).train()
    trainer(tmp_path, rows=rows, max_steps=1, label_columns=["old"]).train()
    trainer(tmp_path, rows=rows, max_steps=1, label_columns="old").train()
