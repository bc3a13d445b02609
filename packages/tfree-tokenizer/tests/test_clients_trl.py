"""TRL's SFTTrainer, whose loss multiplies hidden states by `get_output_embeddings().weight` itself."""

import pytest
import torch

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl")

TEXTS = ["the house is small.", "das Haus ist klein, the house", "House is house.", "das Donaudampfschiff ist klein"]
CHATS = [
    [{"role": "user", "content": "the house"}, {"role": "assistant", "content": "is small."}],
    [{"role": "user", "content": "das Zwetschge"}, {"role": "assistant", "content": "ist klein."}],
]


def sft(tiny, rows, folder, **options):
    """A trainer that is ready to run on plain texts or on chats."""
    from datasets import Dataset

    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,  # every step sees all rows
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return trl.SFTTrainer(
        tiny.model,
        args=trl.SFTConfig(str(folder), **(settings | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer,
    )


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"text": text} for text in TEXTS], {}),
        ([{"messages": chat} for chat in CHATS], {}),
        ([{"messages": chat} for chat in CHATS], {"assistant_only_loss": True}),
        ([{"text": text} for text in TEXTS[:3]], {"packing": True, "max_length": 16}),
        ([{"text": text} for text in TEXTS], {"gradient_checkpointing": True}),
    ],
    ids=["texts", "chats", "answers only", "packed", "checkpointed"],
)
def test_supervised_fine_tuning_lowers_the_loss(build, tmp_path, rows, options):
    losses = losses_of(sft(build(objective="dictionary_ce"), rows, tmp_path, **options))
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1


def test_its_loss_is_ours_for_texts_that_the_dictionary_holds(build, tmp_path):
    tiny = build(objective="dictionary_ce")
    batch = tiny.ids(*TEXTS[:3], side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours = tiny.model(**batch, labels=labels).loss
    sft(tiny, [{"text": text} for text in TEXTS], tmp_path)  # gives the model its fused head
    fused = tiny.model(**batch, labels=labels, fused_lm_head=True).loss
    byte_share = -torch.tensor(1 / (tiny.model.is_word_id().sum() + 1)).log1p()
    assert abs(fused - ours) < 2 * abs(byte_share), "the unknown byte takes the probability of about one word"


def test_its_loss_of_a_spelled_word_is_that_of_unknown_bytes(build, tmp_path):
    tiny = build(objective="dictionary_ce")
    batch = tiny.ids("das Zwetschge ist")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1:10] = batch["input_ids"][:, 1:10]
    sft(tiny, [{"text": text} for text in TEXTS], tmp_path)
    out = tiny.model(**batch, labels=labels, fused_lm_head=True)
    uniform = (512 * (tiny.model.is_word_id().sum() + 1)).log()
    assert out.label_mask.sum() == 9
    torch.testing.assert_close(out.loss, uniform, rtol=0.05, atol=0)


def test_gradients_through_its_head_reach_the_table(build, tmp_path):
    tiny = build(objective="dictionary_ce")
    sft(tiny, [{"text": text} for text in TEXTS], tmp_path)
    batch = tiny.ids(*TEXTS, side="right")
    tiny.model(**batch, labels=batch["input_ids"], fused_lm_head=True).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tiny.model.parameters())


def test_adapters_train(build, tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny = build(objective="dictionary_ce")
    tiny = type(tiny)(get_peft_model(tiny.model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])), tiny.tokenizer)
    losses = losses_of(sft(tiny, [{"text": text} for text in TEXTS], tmp_path, max_steps=16))
    assert losses[-1] < losses[0]


def test_the_multi_label_objective_is_refused_with_the_way_out(build, tmp_path):
    trainer = sft(build(objective="bce"), [{"text": text} for text in TEXTS], tmp_path)
    with pytest.raises(ValueError, match=r"objective 'bce' has no output vector per id.*dictionary_ce"):
        trainer.train()
