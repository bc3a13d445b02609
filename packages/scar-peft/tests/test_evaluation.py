"""What `evaluate` reports, recomputed text by text from the functions that define it."""

import copy
import json
import math
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from scar_peft import ScarConfig, compact, metrics, record_scores, scar_layers, set_steering
from scar_peft.card import model_card
from scar_peft.coder import encode, reconstruct
from scar_peft.evaluation import evaluate
from scar_peft.training.sampler import is_held_out
from tests.support.scar_texts import WORDS, register_texts, tiny_llama, word_tokenizer

TOKENIZER = word_tokenizer()
TEXTS = [{**row, "text": " ".join(row["text"].split()[: 8 + i % 5])} for i, row in enumerate(register_texts(24))]
QUIET = {"processing_class": TOKENIZER, "progress_bar": False, "batch_size": 5}


def adapted(layers=(0,), concepts=("archaic",), seed=0, **settings):
    base = tiny_llama(seed=seed)
    sizes = {"n_latents": 48, "k": 6, "site": "block", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed + 1)
    model = get_peft_model(base, ScarConfig(layers=list(layers), concepts=list(concepts), **{**sizes, **settings}))
    for layer in scar_layers(model):
        torch.nn.init.normal_(layer.weights().latent_bias, std=0.3)
    return model.eval()


def token_ids(row):
    return torch.tensor([TOKENIZER(row["text"])["input_ids"]])


@torch.no_grad()
def activations(model, layer, row):
    """[L, d] of one text without padding, unsteered."""
    found = []
    handle = layer.get_base_layer().register_forward_hook(lambda m, a, out: found.append(out), prepend=True)
    model(token_ids(row))
    handle.remove()
    return found[0][0]


def settings_of(config):
    return {"k": config.k, "activation": config.activation, "always": config.always_kept}


@pytest.mark.parametrize("activation", ["topk", "topk-sigmoid"])
@pytest.mark.parametrize("concept_gate", ["relu", "topk"])
def test_reconstruction_is_that_of_the_definition(activation, concept_gate):
    model = adapted(activation=activation, concept_gate=concept_gate)
    found = evaluate(model, TEXTS, **QUIET).layers[0]
    layer = scar_layers(model)[0]
    weights, settings = layer.weights(), settings_of(layer.config())
    x = torch.cat([activations(model, layer, row)[1:] for row in TEXTS])
    with torch.no_grad():
        rows, latents = reconstruct(x, weights, **settings), encode(x, weights, **settings)
    assert found.nmse == pytest.approx(metrics.nmse(rows, x), rel=1e-4)
    assert found.explained_variance == pytest.approx(metrics.explained_variance(rows, x), rel=1e-4)
    assert found.l0 == pytest.approx(metrics.l0(latents))
    assert found.dead_fraction == pytest.approx(metrics.dead_share(latents))


def test_detection_is_that_of_recorded_scores():
    model = adapted(layers=(0, 1))
    found = evaluate(model, TEXTS, **QUIET)
    pooled, tokens, pre = [], [], []
    with torch.no_grad():
        for row in TEXTS:
            with record_scores(model) as latents, record_scores(model, "pre") as raw:
                model(token_ids(row))
            pooled.append([latents.pooled(how)["archaic"].item() for how in ("mean", "max", "last")])
            tokens.append(latents.scores["archaic"][0, 1:])
            pre.append(raw.scores["archaic"][0, 1:])
    labels = [row["archaic"] for row in TEXTS]
    token_labels = torch.cat([torch.full((len(each),), y) for each, y in zip(tokens, labels, strict=True)])
    concept = found.concepts["archaic"]
    mean, largest, last = zip(*pooled, strict=True)
    assert concept.sequence_auroc == pytest.approx(metrics.auroc(mean, labels), abs=0.01)
    assert concept.sequence_auroc_max == pytest.approx(metrics.auroc(largest, labels), abs=0.01)
    assert concept.sequence_auroc_last == pytest.approx(metrics.auroc(last, labels), abs=0.01)
    assert concept.token_auroc == pytest.approx(metrics.auroc(torch.cat(tokens), token_labels), abs=0.003)
    assert concept.token_auroc_pre == pytest.approx(metrics.auroc(torch.cat(pre), token_labels), abs=0.003)
    assert (concept.positive_texts, concept.negative_texts, found.texts) == (12, 12, 24)
    assert found.tokens == sum(len(token_ids(row)[0]) for row in TEXTS)
    assert set(found.layers) == {0, 1}


def test_without_calibration_one_half_of_the_texts_chooses_the_threshold():
    model = adapted()
    concept = evaluate(model, TEXTS, **QUIET).concepts["archaic"]
    scores, labels, chooses = [], [], []
    with torch.no_grad():
        for i, row in enumerate(TEXTS):
            with record_scores(model) as record:
                model(token_ids(row))
            scores.append(record.pooled()["archaic"].item())
            labels.append(row["archaic"])
            chooses.append(is_held_out(i, 0.5))
    scores, labels, chooses = torch.tensor(scores), torch.tensor(labels), torch.tensor(chooses)
    threshold, _ = metrics.best_f1_threshold(scores[chooses], labels[chooses])
    assert concept.sequence_threshold == pytest.approx(threshold, abs=1e-5)
    assert concept.sequence_f1 == pytest.approx(metrics.f1_score(scores[~chooses], labels[~chooses], threshold))


def test_a_calibrated_threshold_is_used_on_all_texts():
    model = adapted()
    model.peft_config["default"].calibration = {"archaic": {"threshold": -1.0, "token_threshold": 1e9}}
    concept = evaluate(model, TEXTS, **QUIET).concepts["archaic"]
    assert (concept.sequence_threshold, concept.token_threshold) == (-1.0, 1e9)
    assert concept.sequence_f1 == pytest.approx(2 / 3)
    assert concept.token_f1 == 0.0


@torch.no_grad()
def test_cross_entropy_is_that_of_a_hook_put_in_by_hand():
    model = adapted()
    found = evaluate(model, TEXTS, **QUIET)
    layer = scar_layers(model)[0]
    mean = torch.cat([activations(model, layer, row)[1:] for row in TEXTS]).mean(0)
    changes = {
        "clean": lambda hidden: hidden,
        "inserted": lambda hidden: reconstruct(hidden, layer.weights(), **settings_of(layer.config())),
        "ablated": mean.expand_as,
    }
    losses = {}
    for name, change in changes.items():

        def hook(module, args, out, change=change):
            return torch.cat([out[:, :1], change(out[:, 1:])], 1)

        handle = layer.get_base_layer().register_forward_hook(hook)
        total = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in map(token_ids, TEXTS)]
        losses[name] = sum(total).item() / sum(len(token_ids(row)[0]) - 1 for row in TEXTS)
        handle.remove()
    assert found.ce_clean == pytest.approx(losses["clean"], rel=1e-5)
    assert found.layers[0].ce_inserted == pytest.approx(losses["inserted"], rel=1e-5)
    assert found.layers[0].ce_ablated == pytest.approx(losses["ablated"], rel=1e-5)
    assert found.layers[0].ce_recovered == pytest.approx(metrics.ce_recovered(**losses), rel=1e-2)


@pytest.mark.parametrize("of", ["texts", "tokens"])
def test_monosemanticity_is_that_of_the_latents(of):
    model = adapted()
    layer = scar_layers(model)[0]
    with torch.no_grad():
        latents = [
            encode(activations(model, layer, row)[1:], layer.weights(), **settings_of(layer.config())) for row in TEXTS
        ]
    parts = [each.mean(0, keepdim=True) if of == "texts" else each for each in latents]
    texts = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    labels, latents = torch.tensor([row["archaic"] for row in TEXTS])[texts], torch.cat(parts)
    fits = torch.tensor([is_held_out(int(i), 0.5) for i in texts])
    expected = metrics.fms(latents[fits], labels[fits], latents[~fits], labels[~fits]).fms[1]
    found = evaluate(model, TEXTS, monosemanticity_of=of, **QUIET).layers[0].concepts["archaic"].fms
    assert found == pytest.approx(expected, abs=0.05 if of == "tokens" else 1e-6)  # equal splits, another order of rows


def test_batches_and_padding_change_nothing():
    model = adapted(layers=(0, 1))
    one, many = (evaluate(model, TEXTS, **{**QUIET, "batch_size": size}).to_metrics() for size in (1, 24))
    assert json.loads(json.dumps(one)) == one
    for name in ("nmse", "explained_variance", "l0", "ce_recovered"):
        assert one[name] == pytest.approx(many[name], rel=1e-3)
    assert one["concepts"]["archaic"] == pytest.approx(many["concepts"]["archaic"], abs=0.02)


def test_the_model_is_left_as_it_was():
    model = adapted().train()
    set_steering(model, {"archaic": 3.0}, rule="add")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = model(token_ids(TEXTS[0])).logits
    evaluate(model, TEXTS, **QUIET)
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(token_ids(TEXTS[0])).logits, before)


def test_steering_that_is_on_does_not_count():
    model = adapted(layers=(0, 1))
    plain = evaluate(model, TEXTS, **QUIET)
    set_steering(model, {"archaic": 3.0}, rule="add")
    assert evaluate(model, TEXTS, **QUIET) == plain


def test_of_a_compact_adapter_there_is_detection_only():
    model = adapted()
    whole = evaluate(model, TEXTS, **QUIET)
    compact(model)
    found = evaluate(model, TEXTS, **QUIET)
    assert found.concepts == whole.concepts
    layer = found.layers[0]
    assert (layer.nmse, layer.l0, layer.ce_recovered, found.ce_clean) == (None, None, None, None)
    assert layer.concepts["archaic"].fms is None
    assert set(found.to_metrics()) == {"concepts"}


def test_models_that_write_no_text_have_no_cross_entropy():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes))
    model = get_peft_model(base, ScarConfig(layers=[1], site="block", concepts=["archaic"], task_type="SEQ_CLS"))
    found = evaluate(model, TEXTS, **QUIET)
    assert found.ce_clean is None
    assert found.layers[1].ce_recovered is None
    assert found.layers[1].nmse > 0


def test_parts_can_be_left_out():
    found = evaluate(adapted(), TEXTS, cross_entropy_texts=0, monosemanticity_rows=0, **QUIET)
    assert found.ce_clean is None
    assert found.layers[0].concepts["archaic"].fms is None


def test_unlabelled_texts_are_not_judged():
    model = adapted()
    extra = [{"text": "the king has a sword .", "archaic": label} for label in (-1, None)]
    found = evaluate(model, [*TEXTS, *extra], **QUIET)
    plain = evaluate(model, TEXTS, **QUIET)
    assert found.concepts["archaic"].token_auroc == pytest.approx(plain.concepts["archaic"].token_auroc)
    assert found.concepts["archaic"].positive_texts + found.concepts["archaic"].negative_texts == 24
    assert found.texts == 26


def test_several_concepts_are_told_apart():
    rows = [{**row, "long": len(row["text"].split()) > 10} for row in TEXTS]
    found = evaluate(adapted(concepts=("archaic", "long")), rows, **QUIET)
    assert found.concepts["archaic"].positive_texts == 12
    assert found.concepts["long"].positive_texts == sum(row["long"] for row in rows)
    assert list(found.to_metrics()["concepts"]) == ["archaic", "long"]


@pytest.mark.parametrize("rows", [20, 2000], ids=["a-sample", "all"])
def test_labels_of_tokens(rows):
    nouns = ("king", "queen", "sword")
    data = [{"text": row["text"], "noun": [word in nouns for word in row["text"].split()]} for row in TEXTS]
    found = evaluate(
        adapted(concepts=("noun",)), data, label_level="token", monosemanticity_rows=rows, **QUIET
    ).concepts["noun"]
    assert found.positive_texts == sum(any(row["noun"]) for row in data)
    assert 0 <= found.token_auroc <= 1


def test_one_class_is_warned_of_and_left_out_of_the_metrics():
    rows = [{**row, "archaic": 1} for row in TEXTS]
    with pytest.warns(UserWarning, match="labels of 'archaic' hold one class only: its AUROC and F1 are nan"):
        found = evaluate(adapted(), rows, **QUIET)
    assert math.isnan(found.concepts["archaic"].sequence_auroc)
    assert "nan" not in json.dumps(found.to_metrics()).lower()


def test_the_model_card_takes_the_metrics():
    model = adapted()
    config = copy.deepcopy(model.peft_config["default"])
    config.metrics = evaluate(model, TEXTS, **QUIET).to_metrics()
    text = str(model_card(config))
    assert "AUROC" in text
    assert "cross-entropy recovered" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_columns": ["tone"]}, r"label_columns names 'tone', which the dataset lacks"),
        ({"text_column": "body"}, r"text_column names 'body', which the dataset lacks"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"max_length": 0}, r"max_length must be at least 1, got 0"),
        ({"monosemanticity_of": "words"}, r'monosemanticity_of must be "texts", "tokens" or None, got .words.'),
        ({"adapter_name": "other"}, r'model must hold SCAR layers of the adapter "other"'),
        ({"processing_class": None}, r"processing_class must be given: the model does not say where it came from"),
    ],
)
def test_refusals_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(adapted(), TEXTS, **{**QUIET, **change})


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="dataset must hold at least one text with tokens, got none"):
        evaluate(adapted(), [], **QUIET)


def test_without_scikit_learn_the_message_names_extra_and_option(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install scar-peft\[evaluation\], or pass monosemanticity_rows=0"):
        evaluate(adapted(), TEXTS, **QUIET)
    assert evaluate(adapted(), TEXTS, monosemanticity_rows=0, **QUIET).layers[0].nmse > 0
