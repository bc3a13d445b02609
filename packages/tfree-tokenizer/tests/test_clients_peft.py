"""LoRA adapters on the body and on the head: train, generate, save, load, merge."""

import pytest
import torch
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")

TEXTS = ["the house is small.", "das Donaudampfschiff ist klein, the Zwetschge"]
TARGETS = {
    "body": {"target_modules": ["q_proj", "v_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def adapted(tiny, target):
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **TARGETS[target])
    return peft.get_peft_model(tiny.model, config)


def train(model, tiny, steps=8):
    batch = tiny.ids(*TEXTS, side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def logits_of(model, tiny):
    with torch.no_grad():
        return model(**tiny.ids(*TEXTS, side="right")).logits


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_learns_and_leaves_the_base_as_it_is(tiny, target):
    before = logits_of(tiny.model, tiny)
    base = {name: values.clone() for name, values in tiny.model.state_dict().items()}
    model = adapted(tiny, target)
    torch.testing.assert_close(logits_of(model, tiny), before)
    losses = train(model, tiny)
    assert losses[-1] < losses[0]
    assert not torch.allclose(logits_of(model, tiny), before)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, tiny), before)
    kept = {name: values for name, values in model.get_base_model().state_dict().items() if "lora" not in name}
    found = {name.replace("base_layer.", "").replace("original_module.", ""): values for name, values in kept.items()}
    assert all(torch.equal(found[name], values) for name, values in base.items())


@pytest.mark.parametrize("target", TARGETS)
def test_a_saved_adapter_loads_onto_a_saved_base(tiny, target, tmp_path):
    tiny.model.save_pretrained(tmp_path / "base")
    model = adapted(tiny, target)
    train(model, tiny, steps=2)
    expected = logits_of(model, tiny)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded, tiny), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_merged_adapter_gives_the_same_model_without_peft(tiny, target, tmp_path):
    model = adapted(tiny, target)
    train(model, tiny, steps=2)
    expected = logits_of(model, tiny)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, tiny), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded, tiny), logits_of(merged, tiny))


def test_an_adapted_model_generates_from_ids_of_spelled_words(tiny):
    model = adapted(tiny, "head")
    train(model, tiny, steps=2)
    inputs = tiny.ids("the Zwetschge is")
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4


def test_the_loss_sees_an_adapter_on_the_head(tiny):
    model = adapted(tiny, "head")
    batch = tiny.ids(*TEXTS, side="right")
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].weight.fill_(0.1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    plain = model.merge_and_unload()(**batch, labels=labels).loss
    torch.testing.assert_close(expected, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_adapters_train_under_gradient_checkpointing(tiny, use_reentrant):
    model = adapted(tiny, "body")
    batch = tiny.ids(*TEXTS, side="right")
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert any(bool(gradient.any()) for gradient in gradients[0])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
