"""Results of the SCAR miniature: means over seeds, bars, tables; and the committed adapter and its results."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import scar_peft
from miniatures.outputs import END, START, insert
from miniatures.scar.base import load_base
from miniatures.scar.report import MEASURES, tables
from miniatures.scar.steered import AWAY, OFF, ON, TOWARDS, plans
from miniatures.scar.summary import bars, mean_curve, turn_back
from miniatures.scar.writing import Writer

HERE = Path(__file__).parents[1] / "scar"
GERMAN = {"der", "die", "das", "und", "Sie", "im", "in", "den", "von", "auf", "ein", "eine", "oder", "mit", "wird"}
SCRIPTURE = {"unto", "LORD", "shall", "thou", "thy", "ye", "and", "that", "the", "of", "his", "him", "hath", "Israel"}
LINES = {
    "scripture": "And the children of Israel went up, and they did eat bread before the LORD.",
    "en": "To insert a new table, choose Insert - Table and enter the number of rows.",
    "german": "Wählen Sie das Dokument aus und klicken Sie auf die Schaltfläche Speichern.",
}


@pytest.fixture(scope="module")
def committed():
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def adapted():
    model, tokenizer = load_base()
    return PeftModel.from_pretrained(model, str(HERE / "checkpoint")).eval(), tokenizer


def run(seed, conditioned, last):
    """One run whose curves end at `last`."""
    concepts = {concept: dict.fromkeys([*MEASURES, "token_auroc"], 0.99) for concept in ON}
    for measures in concepts.values():
        measures["second_best"] = 0.7
        measures["best_latent"] = 0.99 if conditioned else 0.7
    curves = []
    for plan in plans():
        rises = plan.group == OFF
        ends = (0.0, last) if rises else (1.0, 1.0 - last)
        shares = [ends[0]] * (len(plan.strengths) - 1) + [ends[1]]
        pairs = zip(plan.strengths, shares, strict=True)
        points = [{"strength": s, "share": share, "perplexity": 10.0} for s, share in pairs]
        keys = {"concept": plan.concept, "group": plan.group, "rule": plan.rule}
        modes = ("residual", "reconstruct") if conditioned and seed == 0 else ("residual",)
        curves += [{**keys, "mode": mode, "points": points} for mode in modes]
    coder = {"nmse": 0.05, "explained_variance": 0.95, "l0": 34.0, "dead_fraction": 0.1, "ce_recovered": 0.99}
    return {
        "seed": seed,
        "conditioned": conditioned,
        "detection": {**coder, "concepts": concepts},
        "curves": curves,
    }


@pytest.fixture
def results():
    groups = ("scripture", "en", "de")
    base = {g: {"strength": None, "shares": {h: float(g == h) for h in groups}, "perplexity": 10.0} for g in groups}
    runs = [run(seed, conditioned, last) for seed, last in ((0, 1.0), (1, 0.96)) for conditioned in (True, False)]
    crossed = {"en": {"scripture": 20.0, "de": 20.0}, "scripture": {"en": 20.0}, "de": {"en": 20.0}}
    return {"crossed": crossed, "judge": dict.fromkeys(groups, 1.0), "base": base, "prompts": 48, "runs": runs}


def test_a_curve_is_the_mean_over_seeds_with_neutral_in_front(results):
    curve = mean_curve(results, "german", OFF, "add", conditioned=True)
    assert len(curve) == 1 + len(TOWARDS["add"])
    assert curve[0][:2] == (0.0, 0.0)
    assert curve[-1] == pytest.approx((0.98, 0.0283, 10.0), abs=1e-4)


def test_bars_hold_only_if_they_hold_with_every_seed(results):
    assert all(bar.holds for found in bars(results).values() for bar in found)
    broken = copy.deepcopy(results)
    (curve,) = (
        c for c in broken["runs"][2]["curves"] if (c["concept"], c["group"], c["rule"]) == ("german", OFF, "add")
    )
    curve["points"][-1]["share"] = 0.5
    assert [bar.holds for bar in bars(broken)["german"]] == [True, True, True, False, True]


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.5, 1.0], 0.0), ([0.0, 0.9, 0.7, 1.0], 0.2)])
def test_turning_back_is_the_largest_fall(values, expected):
    assert turn_back(values) == pytest.approx(expected)


def test_tables_stand_between_the_marks(results):
    text = insert(f"before\n{START}\nstale\n{END}\nafter", tables(results))
    assert text.startswith(f"before\n{START}\n|") and text.endswith(f"{END}\nafter") and "stale" not in text
    assert "| german, conditioned | 0 / 10 | 0 / 10 | 0 / 10 | 0 / 10 | 0 / 10 | 98 ± 3 / 10 |" in text
    with pytest.raises(ValueError, match="must contain"):
        insert("no marks", tables(results))


def test_the_page_shows_the_committed_results(committed):
    assert tables(committed) in (HERE / "README.md").read_text(encoding="utf-8")


def test_every_curve_was_measured(committed):
    assert len(committed["runs"]) == 6
    for measured in committed["runs"]:
        curves = [c for c in measured["curves"] if c["mode"] == "residual"]
        assert len(curves) == len(ON) * (len(TOWARDS) + len(AWAY))


def test_the_committed_results_meet_the_bars(committed):
    assert [bar for found in bars(committed).values() for bar in found if not bar.holds] == []


def test_the_committed_adapter_is_small_and_compact(adapted):
    model, _ = adapted
    assert sum(path.stat().st_size for path in (HERE / "checkpoint").iterdir()) < 1_000_000
    config = model.peft_config["default"]
    assert config.compact and config.base_model_name_or_path == "miniatures/tfree/checkpoint"
    assert set(config.calibration) == set(ON)


def test_the_card_s_code_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (HERE / "checkpoint/README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_scores_tell_the_three_kinds_of_text(adapted):
    model, tokenizer = adapted
    found = {}
    for name, line in LINES.items():
        with torch.no_grad(), scar_peft.record_scores(model) as record:
            model(**tokenizer(line, return_tensors="pt"))
        found[name] = {concept: float(score[0]) for concept, score in record.pooled("mean").items()}
    for concept in ON:
        threshold = model.peft_config["default"].calibration[concept]["threshold"]
        assert {name for name in LINES if found[name][concept] > threshold} == {concept}


@pytest.mark.parametrize(("concept", "words"), [("german", GERMAN), ("scripture", SCRIPTURE)])
def test_steering_brings_the_concept_into_a_manual(adapted, concept, words):
    model, tokenizer = adapted
    writer = Writer(model.get_base_model(), tokenizer)
    prompts = writer.prompt_ids(["In this window you can see", "The dialog shows the name of"], 5)
    strengths = {concept: torch.tensor([0.0, 1.0])}
    written = writer.write(prompts.repeat(4, 1), copies=2, new_words=12, steered=scar_peft.steering(model, strengths))
    counts = [sum(word in words for word in text.split()) for text in written.texts]
    assert sum(counts[8:]) >= sum(counts[:8]) + 8
