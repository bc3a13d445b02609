"""Training through the model's own loss: stock Trainer and collators, accumulation, packing, padding, precision."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.support.tfree import WORDS
from tfree_tokenizer.remote.spelling_tfree import final_positions

TEXTS = [
    "the house is small.",
    "das Donaudampfschiff ist klein, the Zwetschge is",
    "Zwetschge ist das Haus",
    "the",
    "House, house, Haus Zwetschgen. das",
    "Kuckuck",
]


def labels_of(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def train(tiny, texts, folder, collator=None, **options):
    """A trainer that has finished."""
    settings = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
    }
    arguments = TrainingArguments(
        str(folder),
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **(settings | options),
    )
    trainer = Trainer(
        tiny.model,
        arguments,
        train_dataset=[dict(tiny.tokenizer(text)) for text in texts],
        data_collator=collator or DataCollatorForLanguageModeling(tiny.tokenizer, mlm=False),
    )
    trainer.train()
    return trainer


def test_the_stock_trainer_and_collator_lower_the_loss(tiny, tmp_path):
    trainer = train(tiny, TEXTS[:3], tmp_path, max_steps=20)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    before = trainer.evaluate([dict(tiny.tokenizer(text)) for text in TEXTS[:3]])["eval_loss"]
    assert before < losses[0]


def test_the_trainer_accumulates_gradients_to_those_of_the_big_batch(build, objective, tmp_path):
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        tiny = build(objective=objective)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        train(tiny, TEXTS[:4], tmp_path, optim="sgd", max_grad_norm=0, learning_rate=0.1, **options)
        weights.append(dict(tiny.model.named_parameters()))
    assert not torch.equal(weights[0]["lm_head.weight"], build(objective=objective).model.lm_head.weight)
    assert_equal_gradients(*weights, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_equal_those_of_the_big_batch(tiny):
    batch = tiny.ids(*TEXTS, side="right")
    labels = labels_of(batch)
    count = (labels[:, 1:] != -100).sum()
    _, expected = loss_and_gradients(tiny.model, **batch, labels=labels, num_items_in_batch=count)
    tiny.model.zero_grad()
    for start in range(0, len(TEXTS), 2):
        part = {name: values[start : start + 2] for name, values in (batch | {"labels": labels}).items()}
        tiny.model(**part, num_items_in_batch=count).loss.backward()
    found = {name: parameter.grad for name, parameter in tiny.model.named_parameters()}
    assert_equal_gradients(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_number(tiny, use_reentrant):
    batch = tiny.ids(*TEXTS, side="right")
    batch["labels"] = labels_of(batch)
    tiny.model.train()
    loss, gradients = loss_and_gradients(tiny.model, **batch)
    tiny.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again, found = loss_and_gradients(tiny.model, **batch)
    torch.testing.assert_close(again, loss)
    assert_equal_gradients(found, gradients)


def test_checkpointed_adapters_get_gradients_although_the_embedding_is_frozen(tiny):
    batch = tiny.ids(*TEXTS, side="right")
    tiny.model.train().requires_grad_(False)
    tiny.model.model.layers[0].mlp.up_proj.requires_grad_(True)
    tiny.model.enable_input_require_grads()
    tiny.model.gradient_checkpointing_enable({"use_reentrant": True})
    tiny.model(**batch, labels=labels_of(batch)).loss.backward()
    assert tiny.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("normalization", ["active", "sum"])
@pytest.mark.parametrize("order", [(0, 1, 2), (3, 2, 3, 0), (5, 5, 4)], ids=str)
def test_packed_documents_train_as_separate_rows_do(build, objective, normalization, order):
    tiny = build(objective=objective, loss_normalization=normalization)
    texts = [TEXTS[i] for i in order]
    rows = tiny.ids(*texts, side="right")
    separate = loss_and_gradients(tiny.model, **rows, labels=labels_of(rows))
    packed = DataCollatorWithFlattening()([dict(tiny.tokenizer(text)) for text in texts])
    assert packed["input_ids"].shape[0] == 1
    joined = loss_and_gradients(tiny.model, **packed)
    torch.testing.assert_close(joined[0], separate[0])
    assert_equal_gradients(joined[1], separate[1], rtol=1e-3, atol=1e-5)


def test_packed_documents_that_cannot_be_kept_apart_are_refused(tiny):
    packed = DataCollatorWithFlattening()([dict(tiny.tokenizer(text)) for text in TEXTS[:2]])
    with pytest.raises(ValueError, match=r"position_ids restart.*use_cache=False"):
        tiny.model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_gradients(tiny, side):
    texts = TEXTS[:3]
    batch = tiny.ids(*texts, side=side)
    loss, gradients = loss_and_gradients(tiny.model, **batch, labels=labels_of(batch))
    singles = [tiny.ids(text) for text in texts]
    words = [int(final_positions(row["input_ids"], tiny.tokenizer.first_byte_id).sum()) - 1 for row in singles]
    tiny.model.zero_grad()
    total = torch.zeros(())
    for row, count in zip(singles, words, strict=True):
        part = tiny.model(**row, labels=row["input_ids"]).loss * count / sum(words)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss, total)
    found = {name: parameter.grad for name, parameter in tiny.model.named_parameters()}
    assert_equal_gradients(found, gradients, rtol=1e-4, atol=1e-6)


def test_a_label_counts_at_the_last_id_of_its_word_only(tiny):
    ids = tiny.ids("das Zwetschge ist klein")["input_ids"]
    finals = final_positions(ids, tiny.tokenizer.first_byte_id)
    loss = tiny.model(ids, labels=ids).loss
    torch.testing.assert_close(tiny.model(ids, labels=ids.masked_fill(~finals, -100)).loss, loss)
    last = int(finals[0].nonzero()[1])
    without = ids.clone()
    without[0, last] = -100
    only = torch.full_like(ids, -100)
    only[0, last] = ids[0, last]
    parts = [tiny.model(ids, labels=labels).loss for labels in (without, only)]
    torch.testing.assert_close((2 * parts[0] + parts[1]) / 3, loss)


def test_loss_weights_scale_each_word(tiny):
    ids = tiny.ids("das Zwetschge ist klein")["input_ids"]
    weights = torch.ones(ids.shape)
    weights[0, -1] = 0.0
    masked = ids.clone()
    masked[0, -1] = -100
    torch.testing.assert_close(
        tiny.model(ids, labels=ids, loss_weights=weights).loss, tiny.model(ids, labels=masked).loss
    )


@pytest.mark.parametrize("text", ["the house is", "Zwetschge", "the"])
def test_a_batch_without_any_counted_word_gives_zero_loss_and_zero_gradients(tiny, text):
    ids = tiny.ids(text)["input_ids"]
    labels = ids if len(text.split()) == 1 else torch.full_like(ids, -100)
    loss, gradients = loss_and_gradients(tiny.model, input_ids=ids, labels=labels)
    assert loss == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients.values())


def test_an_ignored_row_changes_nothing(tiny):
    batch = tiny.ids(*TEXTS[:2], side="right")
    labels = labels_of(batch)
    labels[1] = -100
    alone = tiny.ids(TEXTS[0])
    torch.testing.assert_close(
        tiny.model(**batch, labels=labels).loss, tiny.model(**alone, labels=alone["input_ids"]).loss
    )


def test_labels_of_another_shape_are_refused(tiny):
    ids = tiny.ids("the house is")["input_ids"]
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids \(1, 3\), got \(1, 2\)"):
        tiny.model(ids, labels=ids[:, :2])


def test_the_loss_over_the_dictionary_is_the_cross_entropy_of_the_word_logits(build):
    tiny = build(objective="dictionary_ce")
    batch = tiny.ids("the house is small", "das Haus, klein.", side="right")
    labels = labels_of(batch)
    loss, gradients = loss_and_gradients(tiny.model, **batch, labels=labels)
    tiny.model.zero_grad()
    logits = tiny.model(**batch).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    found = {name: parameter.grad for name, parameter in tiny.model.named_parameters()}
    assert_equal_gradients(found, gradients, rtol=1e-4, atol=1e-6)


def test_word_logits_can_be_differentiated_also_at_copied_words(tiny):
    ids = tiny.ids("das Zwetschge ist das Zwetschge")["input_ids"]
    loss = -log_probability_of_last_word(tiny, ids)
    loss.backward()
    assert bool(torch.isfinite(loss))
    for name, parameter in tiny.model.named_parameters():
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert tiny.model.lm_head.weight.grad.abs().sum() > 0


def log_probability_of_last_word(tiny, ids):
    """Sum over the ids of the last word, which may be spelled, of what `logits` give them."""
    ends = final_positions(ids, tiny.tokenizer.first_byte_id)[0].nonzero().squeeze(1)
    log_probs = tiny.model(ids).logits[:, ends[-2] : -1].log_softmax(2)
    return log_probs.gather(2, ids[:, ends[-2] + 1 :, None]).sum()


def test_the_loss_of_a_copied_word_is_its_probability_in_generation(build):
    tiny = build(objective="dictionary_ce")
    ids = tiny.ids("das Zwetschge ist Kuckuck das Zwetschge")["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]
    torch.testing.assert_close(tiny.model(ids, labels=labels).loss, -log_probability_of_last_word(tiny, ids))


def test_training_in_bfloat16_lowers_the_loss(tiny):
    model = tiny.model.bfloat16().train()
    batch = tiny.ids(*TEXTS[:3], side="right")
    batch["labels"] = labels_of(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.model.embed_tokens.dictionary.word_ptr.dtype == torch.int32


def test_autocast_to_bfloat16_stays_close_to_float32(tiny):
    batch = tiny.ids(*TEXTS[:3], side="right")
    batch["labels"] = labels_of(batch)
    loss, gradients = loss_and_gradients(tiny.model, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny.model(**batch).loss
    tiny.model.zero_grad()
    rounded.backward()
    torch.testing.assert_close(rounded, loss, rtol=0.02, atol=0.02, check_dtype=False)
    head = tiny.model.lm_head.weight.grad
    assert torch.cosine_similarity(head.flatten(), gradients["lm_head.weight"].flatten(), dim=0) > 0.99


def test_sampled_words_estimate_the_full_softmax(build):
    tiny = build(objective="dictionary_ce", sampled_words=4)
    batch = tiny.ids(*TEXTS[:3], side="right")
    batch["labels"] = labels_of(batch)
    exact = tiny.model.eval()(**batch).loss
    tiny.model.train()
    samples = torch.stack([tiny.model(**batch).loss.detach() for _ in range(40)])
    assert samples.std() > 0
    assert abs(samples.mean() - exact) < 0.05 * exact


@pytest.mark.slow
def test_layers_can_be_compiled(tiny):
    batch = tiny.ids(*TEXTS[:3], side="right")
    batch["labels"] = labels_of(batch)
    loss, gradients = loss_and_gradients(tiny.model, **batch)
    for layer in tiny.model.model.layers:
        layer.compile(backend="aot_eager")
    again, found = loss_and_gradients(tiny.model, **batch)
    torch.testing.assert_close(again, loss)
    assert_equal_gradients(found, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_classifier_pools_the_last_word_of_each_row(build, side, use_cache):
    from tfree_tokenizer import TFreeForSequenceClassification

    tiny = build()
    config = copy.deepcopy(tiny.model.config)
    config.num_labels = 3
    classifier = TFreeForSequenceClassification(config).eval()
    classifier.set_dictionary(tiny.tokenizer)
    texts = ["das Zwetschge ist Zwetschge", "the house", "Zwetschge"]
    with torch.no_grad():
        batch = classifier(**tiny.ids(*texts, side=side), use_cache=use_cache).logits
        alone = torch.cat([classifier(**tiny.ids(text), use_cache=use_cache).logits for text in texts])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)
    loss = classifier(**tiny.ids(*texts, side=side), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in classifier.parameters())


def test_the_tiny_dictionary_lacks_the_words_that_these_tests_spell():
    assert not {"Zwetschge", "Zwetschgen", "Donaudampfschiff", "Kuckuck"} & set(WORDS)
