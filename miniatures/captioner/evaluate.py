"""How well maps of the answer tokens fit the objects they are about: `python -m miniatures.captioner.evaluate`.

Measures are those of the AtMan paper's OpenImages table: with x the map (squared scores, summed over the target's
tokens) and y the part of every patch that the object covers, precision is sum(x y) / sum(x) and recall is
sum(x / max(x) y) / sum(y). Only questions that the model answers right are explained. Writes `results.json` and
`maps.png`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from atman_explain import AtMan
from atman_explain.remote.metrics_atman import average_precision, interquartile_mean, soft_precision, soft_recall
from miniatures.captioner.answering import held_out_questions
from miniatures.captioner.figure import draw_maps
from miniatures.captioner.items import EXPLAINED, Item, Material, right_items
from miniatures.captioner.questions import ask
from miniatures.captioner.saliency import (
    attention_relevance,
    grad_cam,
    input_x_gradient,
    integrated_gradients,
    random_map,
)
from miniatures.captioner.scenes import GRID, MASK_SHARE, Composer, emoji_composer

HERE = Path(__file__).parent
OFF, DEFAULT_KAPPA = 1.0, 0.7
KAPPAS = (OFF, 0.9, 0.8, DEFAULT_KAPPA, 0.6, 0.5)
"""At 1.0 no other patch is suppressed along."""
TUNING_SEED = 1
"""Pictures of the second stage's first steps: seen in training, used to choose kappa."""
UNDRAWN = ("random", "the object's patches")
POWERS = {"absolute": 1, "squared": 2}

Method = Callable[[Item], Tensor]
"""Item -> scores [tokens, 144] of its target tokens."""
Summary = dict[str, float]
"""Measure -> mean over items."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    compose = emoji_composer()
    atman = AtMan(model, processor, units="image", show_progress=False)

    tuning = right_items(model, processor, tuning_material(compose, options.tuning_pictures))["what"]
    sweep = {kappa: summarize(partial(atman_scores, atman, kappa), tuning)["squared"] for kappa in KAPPAS}
    chosen = max(KAPPAS, key=lambda kappa: _harmonic_mean(sweep[kappa]["precision"], sweep[kappa]["recall"]))
    print(*(f"kappa {kappa}: {_line(summary)}" for kappa, summary in sweep.items()), sep="\n", flush=True)

    methods = all_methods(atman, chosen)
    items = right_items(model, processor, list(held_out_questions(compose, options.pictures)))
    drawn = {name: method for name, method in methods.items() if name not in UNDRAWN}
    draw_maps([items[kind][number] for kind in EXPLAINED for number in range(3)], drawn, options.out / "maps.png")
    tuned = {"pictures": len(tuning), "chosen": chosen, "summaries": {str(kappa): sweep[kappa] for kappa in KAPPAS}}
    results: dict[str, Any] = {"pictures": options.pictures, "kappa": tuned, "kinds": {}}
    for kind in EXPLAINED:
        print(f"{kind}: {len(items[kind])} of {options.pictures} pictures", flush=True)
        table = {}
        for name, method in methods.items():
            for power, summary in summarize(method, items[kind]).items():
                table[f"{name}, {power}"] = summary
                print(f"  {name}, {power}: {_line(summary)}", flush=True)
        results["kinds"][kind] = {"explained": len(items[kind]), "methods": table}
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def all_methods(atman: AtMan, tuned_kappa: float) -> dict[str, Method]:
    """Every method by the name it has in the table; the last one shows what a map of whole patches can reach."""
    kappas = {OFF: "AtMan, off", tuned_kappa: "AtMan, tuned", DEFAULT_KAPPA: "AtMan, default"}
    named: dict[str, Method] = {
        f"{name} kappa ({kappa})": partial(atman_scores, atman, kappa) for kappa, name in kappas.items()
    }
    named["Input x Gradient, embeddings"] = partial(_call, input_x_gradient, on_pixels=False)
    named["Input x Gradient, pixels"] = partial(_call, input_x_gradient, on_pixels=True)
    named["Integrated Gradients, embeddings"] = partial(_call, integrated_gradients, on_pixels=False)
    named["Grad-CAM"] = partial(_call, grad_cam)
    named["attention relevance"] = partial(_call, attention_relevance)
    named["random"] = lambda item: random_map(item.case, item.tokens, seed=item.number)
    named["the object's patches"] = lambda item: (item.shares >= MASK_SHARE)[None].double()
    return named


def atman_scores(atman: AtMan, kappa: float, item: Item) -> Tensor:
    """AtMan's scores in nats."""
    images = [Image.fromarray(item.picture.pixels)]
    explanation = atman.explain(item.question.prompt, target=item.question.answer, images=images, kappa=kappa)
    return torch.stack([explanation.image_map(0, target=token).flatten() for token in item.tokens])


def summarize(method: Method, items: Sequence[Item]) -> dict[str, Summary]:
    """Measures of a method's maps by power ("absolute", "squared"), and its seconds for one item."""
    begin = time.process_time()
    scores = [method(item).detach().double() for item in items]
    seconds = (time.process_time() - begin) / len(items)
    return {
        name: _measures([one.abs().pow(power).sum(0) for one in scores], items) | {"seconds": seconds}
        for name, power in POWERS.items()
    }


def tuning_material(compose: Composer, pictures: int) -> Material:
    """Pictures that the model was trained on, with every question about them."""
    shown = [compose(TUNING_SEED, step, 0) for step in range(pictures)]
    return [(picture, ask(picture, np.random.default_rng(number))) for number, picture in enumerate(shown)]


def _call(function: Callable[..., Tensor], item: Item, **options: bool) -> Tensor:
    return function(item.case, item.tokens, **options)


def _measures(maps: Sequence[Tensor], items: Sequence[Item]) -> Summary:
    grids = [(x.view(GRID, GRID), item.shares.view(GRID, GRID)) for x, item in zip(maps, items, strict=True)]
    precision = [float(soft_precision(x, y)) for x, y in grids]
    recall = [float(soft_recall(x, y)) for x, y in grids]
    ranking = [float(average_precision(x.flatten(), y.flatten() >= MASK_SHARE)) for x, y in grids]
    return {
        "precision": float(np.mean(precision)),
        "precision_iq": float(interquartile_mean(precision)),
        "recall": float(np.mean(recall)),
        "recall_iq": float(interquartile_mean(recall)),
        "average_precision": float(np.mean(ranking)),
    }


def _harmonic_mean(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall)


def _line(summary: Summary) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in summary.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniatures.captioner.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--pictures", type=int, default=225, help="held-out pictures, one item of each kind from each")
    parser.add_argument("--tuning-pictures", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and maps.png")
    return parser


if __name__ == "__main__":
    main()
