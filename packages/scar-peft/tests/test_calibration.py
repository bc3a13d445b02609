"""Thresholds, class statistics and tau, and that they travel with the adapter."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from scar_peft import ScarConfig, compact, metrics, record_scores, scar_layers
from scar_peft.coder import pre_activations
from scar_peft.evaluation import calibrate
from tests.support.scar_texts import register_texts, tiny_llama, word_tokenizer

TOKENIZER = word_tokenizer()
TEXTS = register_texts(20, sentences=2)
QUIET = {"processing_class": TOKENIZER, "progress_bar": False, "batch_size": 6}


def adapted(layers=(0, 1), **settings):
    sizes = {"n_latents": 40, "k": 5, "site": "block", "concepts": ["archaic"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_llama(), ScarConfig(layers=list(layers), **{**sizes, **settings}))
    return model.eval()


def block_output(model, layer, ids):
    found = []
    handle = layer.get_base_layer().register_forward_hook(lambda m, a, out: found.append(out), prepend=True)
    model(ids)
    handle.remove()
    return found[0]


@torch.no_grad()
def scores_by_text(model):
    pooled, tokens = [], []
    for row in TEXTS:
        with record_scores(model) as record:
            model(**TOKENIZER(row["text"], return_tensors="pt"))
        pooled.append(record.pooled()["archaic"].item())
        tokens.append(record.scores["archaic"][0, 1:])
    labels = torch.tensor([row["archaic"] for row in TEXTS])
    token_labels = torch.cat([torch.full((len(each),), y) for each, y in zip(tokens, labels, strict=True)])
    return torch.tensor(pooled), labels, torch.cat(tokens), token_labels


@pytest.mark.parametrize(
    ("criterion", "best"),
    [("f1", metrics.best_f1_threshold), ("balanced_accuracy", metrics.best_balanced_threshold)],
)
def test_thresholds_are_those_of_recorded_scores(criterion, best):
    model = adapted()
    found = calibrate(model, TEXTS, criterion=criterion, **QUIET)["archaic"]
    pooled, labels, tokens, token_labels = scores_by_text(model)
    assert found["threshold"] == pytest.approx(best(pooled, labels).threshold, abs=1e-5)
    assert found["token_threshold"] == pytest.approx(best(tokens, token_labels).threshold, abs=1e-5)
    for name, y in (("positive", 1), ("negative", 0)):
        assert found[f"mean_{name}"] == pytest.approx(pooled[labels == y].mean().item(), abs=1e-5)
        assert found[f"std_{name}"] == pytest.approx(pooled[labels == y].std().item(), abs=1e-5)


@pytest.mark.parametrize("concept_gate", ["relu", "topk"])
@torch.no_grad()
def test_tau_is_the_mean_kth_largest_pre_activation(concept_gate):
    model = adapted(concept_gate=concept_gate)
    calibrate(model, TEXTS, **QUIET)
    taus = model.peft_config["default"].gate_threshold
    assert set(taus) == {0, 1}
    for layer in scar_layers(model):
        kth = []
        for row in TEXTS:
            ids = TOKENIZER(row["text"], return_tensors="pt")["input_ids"]
            pre = pre_activations(block_output(model, layer, ids)[0, 1:], layer.weights())
            pre = pre[:, layer.config().always_kept :]
            kth.append(pre.topk(5).values[:, -1])
        assert taus[layer.layer_index] == pytest.approx(torch.cat(kth).mean().item(), abs=1e-5)


def test_calibration_travels_with_the_adapter(tmp_path):
    model = adapted()
    found = calibrate(model, TEXTS, **QUIET)
    model.save_pretrained(tmp_path)
    config = PeftModel.from_pretrained(tiny_llama(), tmp_path).peft_config["default"]
    assert config.calibration == found
    assert config.gate_threshold == model.peft_config["default"].gate_threshold


def test_the_gate_threshold_can_be_used_right_away():
    model = adapted()
    calibrate(model, TEXTS, **QUIET)
    model.peft_config["default"].gate = "threshold"
    layer = scar_layers(model)[0]
    assert layer.concept_settings("default").open_above == model.peft_config["default"].gate_threshold[0]


@pytest.mark.parametrize("settings", [{"activation": "relu"}, {}], ids=["relu", "compact"])
def test_adapters_that_select_nothing_have_no_tau(settings):
    model = adapted(**settings)
    if not settings:
        compact(model)
    assert calibrate(model, TEXTS, **QUIET)["archaic"].keys() >= {"threshold", "mean_positive"}
    assert model.peft_config["default"].gate_threshold is None


def test_one_class_cannot_be_calibrated():
    rows = [{**row, "archaic": 0} for row in TEXTS]
    with pytest.raises(ValueError, match="labels of 'archaic' must hold texts of both classes to calibrate its scores"):
        calibrate(adapted(), rows, **QUIET)


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match=r"criterion must be one of \['f1', 'balanced_accuracy'\], got 'accuracy'"):
        calibrate(adapted(), TEXTS, criterion="accuracy", **QUIET)
