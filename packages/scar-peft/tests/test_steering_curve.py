"""Steering curves against generations and perplexities computed one prompt at a time."""

import math
import sys

import pytest
import torch
from peft import get_peft_model

from scar_peft import ScarConfig, set_steering, steering
from scar_peft.evaluation import plot_curve, steering_curve
from tests.support.scar_texts import ARCHAIC, tiny_llama, word_tokenizer

TOKENIZER = word_tokenizer()
PROMPTS = ["the king of", "thou art", "you send the ship a letter ."]
QUIET = {"processing_class": TOKENIZER, "progress_bar": False, "max_new_tokens": 7}


def adapted(concepts=("archaic",), **settings):
    config = ScarConfig(layers=[0], site="block", concepts=list(concepts), task_type="CAUSAL_LM", **settings)
    return get_peft_model(tiny_llama(seed=3), config).eval()


def archaic_words(texts):
    return [sum(word in ARCHAIC for word in text.split()) for text in texts]


def curve_of(model, strengths=(-1.5, 0.0, 1.5), **settings):
    return steering_curve(
        model, PROMPTS, "archaic", strengths, **{"rule": "add", "measure": archaic_words, **QUIET, **settings}
    )


@torch.no_grad()
def one_by_one(model, strength):
    """New tokens of every prompt, and their perplexity without the adapter."""
    rows, total = [], 0.0
    for prompt in PROMPTS:
        batch = TOKENIZER(prompt, return_tensors="pt")
        with steering(model, archaic=strength, rule="add"):
            out = model.generate(**batch, max_new_tokens=7, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        with model.disable_adapter():
            logits = model(out).logits
        nll = -logits[0, :-1].log_softmax(-1).gather(-1, out[0, 1:, None])[-new.shape[1] :]
        rows.append(new[0].tolist())
        total += nll.sum().item()
    return rows, math.exp(total / sum(map(len, rows)))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_points_are_those_of_single_generations(batch_size):
    model = adapted()
    curve = curve_of(model, batch_size=batch_size)
    plain, _ = one_by_one(model, None)
    for point in curve.points:
        rows, perplexity = one_by_one(model, point.strength)
        texts = TOKENIZER.batch_decode(rows, skip_special_tokens=True)
        assert curve.continuations[point.strength] == texts
        assert point.measure == pytest.approx(sum(archaic_words(texts)) / len(texts))
        assert point.perplexity == pytest.approx(perplexity, rel=1e-4)
        first = [next((i for i in range(7) if a[i] != b[i]), 7) for a, b in zip(rows, plain, strict=True)]
        assert point.first_diverging_token == pytest.approx(sum(first) / len(first))
        assert point.changed_share == pytest.approx(sum(a != b for a, b in zip(rows, plain, strict=True)) / 3)


def test_neutral_strength_is_the_unsteered_model():
    curve = curve_of(adapted())
    assert curve.points[1] == curve.unsteered
    assert (curve.unsteered.first_diverging_token, curve.unsteered.changed_share) == (7.0, 0.0)
    assert any(point.changed_share > 0 for point in curve.points)


def test_texts_may_end_early():
    model = adapted()
    rows, _ = one_by_one(model, None)
    curve = curve_of(model, strengths=[0.0], generation={"eos_token_id": rows[0][2]})
    assert curve.points[0] == curve.unsteered
    assert curve.unsteered.first_diverging_token < 7
    assert math.isfinite(curve.unsteered.perplexity)


def test_sampling_starts_from_the_same_random_state_and_leaves_no_trace():
    model, settings = adapted(), {"generation": {"do_sample": True, "temperature": 0.7}, "seed": 5}
    state = torch.random.get_rng_state()
    first = curve_of(model, **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.points[1] == first.unsteered
    assert curve_of(model, **settings) == first
    assert curve_of(model, **{**settings, "seed": 6}) != first


def test_other_concepts_are_neutral_meanwhile_and_steered_again_behind():
    model = adapted(("archaic", "other"))
    plain = curve_of(model)
    set_steering(model, {"other": 2.0, "archaic": 1.0}, rule="add")
    ids = TOKENIZER(PROMPTS[0], return_tensors="pt")["input_ids"]
    before = model(ids).logits
    assert curve_of(model) == plain
    assert torch.equal(model(ids).logits, before)


def test_a_failing_measure_leaves_the_model_as_it_was():
    model = adapted().train()
    ids = TOKENIZER(PROMPTS[0], return_tensors="pt")["input_ids"]
    before = model(ids).logits
    with pytest.raises(ZeroDivisionError):
        curve_of(model, measure=lambda texts: 1 / 0)
    assert model.training
    assert all(p.requires_grad == ("scar_" in name) for name, p in model.named_parameters())
    assert torch.equal(model(ids).logits, before)


def test_rule_and_mode_default_to_the_adapters_own():
    curve = curve_of(adapted(steering_rule="scale"), rule=None)
    assert (curve.rule, curve.mode, curve.prompts, curve.max_new_tokens) == ("scale", "residual", 3, 7)
    inserted = curve_of(adapted(), mode="reconstruct", strengths=[0.0])
    assert inserted.mode == "reconstruct"


def test_results_are_plain_values():
    curve = curve_of(adapted())
    assert curve.to_rows()[0]["strength"] == -1.5
    assert set(curve.to_rows()[0]) >= {"concept", "rule", "strength", "measure", "perplexity"}
    assert "continuations" not in curve.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": []}, r"strengths must hold at least one number, all of them finite, got \[\]"),
        ({"strengths": [math.nan]}, r"strengths must hold .* got \[nan\]"),
        ({"concept": "tone"}, r"concept must be one of \['archaic'\], got 'tone'"),
        ({"prompts": []}, r"prompts must be a list of at least one text"),
        ({"prompts": "the king"}, r"prompts must be a list of at least one text"),
        ({"rule": "multiply"}, r"rule must be one of"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"measure": lambda texts: [1.0]}, r"measure must give one number per text, got 1 for 3 texts\."),
        ({"measure": lambda texts: [math.nan] * 3}, r"measure must give .* got 3 for 3 texts, some of them nan"),
    ],
)
def test_refusals_name_the_argument(change, message):
    arguments = {
        "prompts": PROMPTS,
        "concept": "archaic",
        "strengths": [1.0],
        "measure": archaic_words,
        **QUIET,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        steering_curve(adapted(), **arguments)


def test_a_prompt_without_tokens_is_refused():
    settings = {**QUIET, "processing_class": word_tokenizer(begins=False), "measure": archaic_words}
    model = adapted()
    with pytest.raises(
        ValueError, match=r"prompts must have at least one token each, those of indices \[1\] have none"
    ):
        steering_curve(model, ["the king", ""], "archaic", [1.0], **settings)


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    curve = curve_of(adapted())
    figure = plot_curve([curve, curve], quantity="archaic words")
    left, right = figure.axes
    assert left.get_title(loc="left") == "archaic words of continuations"
    assert list(left.lines[0].get_xdata()) == [-1.5, 0.0, 1.5]
    assert list(right.lines[0].get_ydata()) == [point.perplexity for point in curve.points]
    figure.savefig(tmp_path / "curve.png")
    assert plot_curve(curve)._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="curves must hold at least one curve"):
        plot_curve([])


def test_without_matplotlib_the_message_names_the_extra(monkeypatch):
    curve = curve_of(adapted(), strengths=[0.0])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Plots need matplotlib: pip install scar-peft\[plot\]"):
        plot_curve(curve)
