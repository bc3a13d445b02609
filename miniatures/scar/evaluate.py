"""Measure the trained adapters: `python -m miniatures.scar.evaluate`. Run it again to go on after a kill.

Writes `results.json` and, of the first seed, the committed adapter with its card.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import scar_peft
from miniatures.data.text import load_split
from miniatures.scar.base import load_base, with_words_of
from miniatures.scar.data import CONCEPTS, GROUPS, LabelledText, Material, as_rows, load_material
from miniatures.scar.detection import best_latents, detection, encode_rows, read_activations, with_first_latents
from miniatures.scar.figure import draw_scores
from miniatures.scar.judge import Judge
from miniatures.scar.steered import ON, Point, measure_base, measure_crossed, measure_curve, plans, steady_prompts
from miniatures.scar.train import SEEDS, SIZES, run_folder
from miniatures.scar.writing import Writer
from miniatures.tfree.training import keep_freed_memory
from scar_peft.card import model_card
from scar_peft.evaluation import calibrate

HERE = Path(__file__).parent
COMMITTED = "miniatures/scar/checkpoint"
SCORED = ("scripture", "en", "de", "en", "scripture", "de")
"""Groups of the lines in the picture."""
SNIPPET_WORDS = 20
"""White-space words of the texts that the judge is tested on: about as long as a continuation."""


class Bench:
    """What every adapter is measured with."""

    def __init__(self, prompts: int, layer: int) -> None:
        """Read text, train the judge, choose prompts, harvest activations."""
        split = load_split()
        self.material: Material = load_material(split, **SIZES)
        random.Random(0).shuffle(self.material.test)
        self.judge = Judge(self.material.judge)
        model, tokenizer = load_base()
        writer = Writer(model, tokenizer)
        self.prompts = {group: steady_prompts(writer, self.judge, split.held_out, group, prompts) for group in GROUPS}
        self.base = measure_base(writer, self.judge, self.prompts)
        self.crossed = measure_crossed(writer, self.prompts)
        parts = (self.material.train, self.material.test)
        extended = with_words_of(model, tokenizer, self.words())
        self.train, self.test = (read_activations(model, extended, part, layer) for part in parts)

    def words(self) -> Iterator[str]:
        """All labelled texts."""
        return (one.text for part in (self.material.train, self.material.test) for one in part)

    def judge_accuracy(self) -> dict[str, float]:
        """Share of held-out snippets of each group that the judge gets right."""
        return {
            group: self.judge.shares(snippets(texts, SNIPPET_WORDS))[group]
            for group, texts in self.material.judge_test.items()
        }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    training = json.loads(
        (run_folder(options.seeds[0], conditioned=True) / "training.json").read_text(encoding="utf-8")
    )
    bench = Bench(options.prompts, training["coder"]["layer"])
    results: dict[str, Any] = {
        "coder": training["coder"],
        "prompts": options.prompts,
        "words": {"train": len(bench.train.seq_id), "test": len(bench.test.seq_id)},
        "judge": bench.judge_accuracy(),
        "base": bench.base,
        "crossed": bench.crossed,
        "runs": [],
    }
    print(json.dumps({name: results[name] for name in ("words", "judge", "base", "crossed")}), flush=True)
    for seed in options.seeds:
        for conditioned in (True, False):
            modes = ("residual", "reconstruct") if conditioned and seed == SEEDS[0] else ("residual",)
            measured = measure_run(bench, run_folder(seed, conditioned=conditioned), conditioned, modes)
            results["runs"].append({"seed": seed, "conditioned": conditioned, **measured})
            (options.out / "results.json").write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    commit(bench, results["runs"][0], run_folder(options.seeds[0], conditioned=True), options.out / "checkpoint")


def measure_run(bench: Bench, folder: Path, conditioned: bool, modes: Sequence[str]) -> dict[str, Any]:
    """Detection and all curves of one adapter; what an earlier call measured is kept."""
    path = folder / "measured.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"curves": []}
    model, tokenizer = load_base()
    adapted = load_adapter(model, folder)
    if not conditioned:
        choose_latents(adapted, bench)
    if "detection" not in found:
        extended = with_words_of(model, tokenizer, bench.words())
        found["detection"] = detection(adapted, extended, bench.material.test, bench.train, bench.test)
        model.set_dictionary(tokenizer)
        print(folder.name, json.dumps(found["detection"]), flush=True)
    writer = Writer(model, tokenizer)
    done = {(curve["concept"], curve["group"], curve["rule"], curve["mode"]) for curve in found["curves"]}
    for mode in modes:
        for plan in plans():
            if (plan.concept, plan.group, plan.rule, mode) in done:
                continue
            begin = time.process_time()
            points = measure_curve(writer, bench.judge, model, bench.prompts, plan, mode=mode)
            curve = {"concept": plan.concept, "group": plan.group, "rule": plan.rule, "mode": mode, "points": points}
            found["curves"].append(curve)
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")
            print(f"{folder.name} {_line(curve)} ({time.process_time() - begin:.0f} s)", flush=True)
    return found


def load_adapter(model: Any, folder: Path) -> Any:
    """A run's full adapter on a freshly loaded base."""
    return PeftModel.from_pretrained(model, str(folder / "adapter")).eval()


def choose_latents(adapted: Any, bench: Bench) -> None:
    """Put the latents that tell the concepts best on training text in the concepts' places."""
    layer = scar_peft.scar_layers(adapted)[0]
    coded = encode_rows(layer.weights(), layer.config(), bench.train)
    layer.set_weights("default", with_first_latents(layer.weights(), best_latents(coded)))


def snippets(texts: Sequence[str], words: int) -> list[str]:
    """Runs of so many white-space words."""
    parts = [text.split() for text in texts]
    return [" ".join(part[i : i + words]) for part in parts for i in range(0, len(part) - words + 1, words)]


def commit(bench: Bench, measured: dict[str, Any], folder: Path, out: Path) -> None:
    """Write an adapter in compact form, with thresholds, measures and a card."""
    model, tokenizer = load_base()
    adapted = load_adapter(model, folder)
    config = scar_peft.scar_layers(adapted)[0].config()
    extended = with_words_of(model, tokenizer, bench.words())
    calibrate(adapted, as_rows(bench.material.train), processing_class=extended, progress_bar=False)
    config.gate_threshold = None  # of a gate that needs no full encoding here
    config.metrics = card_metrics(bench, measured)
    scar_peft.compact(adapted)
    shutil.rmtree(out, ignore_errors=True)
    adapted.save_pretrained(out, save_embedding_layers=False)
    card = str(model_card(config, trust_remote_code=True))
    (out / "README.md").write_text(card.replace('base, "."', f'base, "{COMMITTED}"'), encoding="utf-8")
    draw_scored_text(adapted, extended, bench.material.test, out.parent / "scores.png")


def draw_scored_text(adapted: Any, tokenizer: Any, texts: Sequence[LabelledText], path: Path) -> None:
    """A picture of a few held-out lines in one text, colored by score."""
    shown = {group: [one.text.split("\n")[0] for one in texts if one.group == group] for group in GROUPS}
    lines = {
        group: iter(line for line in found if 80 < len(line) < 140 and line[0].isupper() and line[-1] in ".;:")
        for group, found in shown.items()
    }
    text = "\n".join(next(lines[group]) for group in SCORED)
    batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    spans = batch.pop("offset_mapping")[0].tolist()
    with torch.no_grad(), scar_peft.record_scores(adapted) as record:
        adapted(**batch)
    draw_scores(text, spans, {concept: record.scores[concept][0].tolist() for concept in CONCEPTS}, path)


def card_metrics(bench: Bench, measured: dict[str, Any]) -> dict[str, Any]:
    """What the card shows: detection, and the curves of the adapter's own rule."""
    found = measured["detection"]
    columns = {"token_auroc": "token_auroc", "sequence_auroc": "sequence_auroc", "fms": "fms_tokens"}
    rows = []
    for curve in measured["curves"]:
        if curve["rule"] != "add_gated" or curve["mode"] != "residual":
            continue
        neutral: Point = {**bench.base[curve["group"]], "strength": 0.0}
        neutral["share"] = neutral["shares"][ON[curve["concept"]]]
        prompts = "with the concept" if curve["group"] == ON[curve["concept"]] else "without the concept"
        rows += [
            {
                "concept": curve["concept"],
                "prompts": prompts,
                "strength": point["strength"],
                "continuations judged to have it": f"{100 * point['share']:.0f} %",
                "perplexity per word": round(point["perplexity"], 1),
            }
            for point in (neutral, *curve["points"])
        ]
    return {
        "nmse": round(found["nmse"], 4),
        "explained_variance": round(found["explained_variance"], 4),
        "l0": round(found["l0"], 2),
        "dead_fraction": round(found["dead_fraction"], 4),
        "concepts": {
            concept: {name: round(values[key], 4) for name, key in columns.items()}
            for concept, values in found["concepts"].items()
        },
        "steering": rows,
        "data": "held-out pages of the King James Bible and of manuals",
    }


def _line(curve: dict[str, Any]) -> str:
    points = " ".join(f"{p['strength']}:{p['share']:.2f}/{p['perplexity']:.0f}" for p in curve["points"])
    return f"{curve['concept']} on {curve['group']} {curve['rule']} {curve['mode']} {points}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniatures.scar.evaluate", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--prompts", type=int, default=48, help="prompts of each group")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and the committed adapter")
    return parser


if __name__ == "__main__":
    main()
