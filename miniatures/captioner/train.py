"""Train the captioner: `python -m miniatures.captioner.train --out FOLDER`. Run it again to go on after a kill."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor

from miniatures.captioner.answering import answer_accuracy
from miniatures.captioner.card import write_card
from miniatures.captioner.model import Sizes, build_model, build_processor
from miniatures.captioner.questions import words
from miniatures.captioner.scenes import Composer, emoji_composer
from miniatures.captioner.training import Learner, Schedule, make_batch, train_stage
from miniatures.outputs import written_aside
from miniatures.tfree.training import keep_freed_memory

RUNS = Path(__file__).with_name("runs")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    processor, compose = build_processor(), emoji_composer()
    stages = {
        "patches": Schedule(steps=options.patch_steps, learning_rate=options.learning_rate),
        "answers": Schedule(
            steps=options.answer_steps, learning_rate=options.learning_rate, patch_loss_weight=0.2, answers=True
        ),
    }
    torch.manual_seed(options.seed)
    learner = Learner(build_model(Sizes())).to(options.device)
    print(f"captioner: {learner.model.num_parameters():,} parameters")
    totals = train_stages(
        learner,
        stages,
        compose,
        processor,
        RUNS / (options.run or f"{options.patch_steps}-{options.answer_steps}-{options.seed}"),
        seed=options.seed,
        log=lambda line: print(time.strftime("%H:%M:%S"), line, flush=True),
    )
    metrics = {
        "parameters": learner.model.num_parameters(),
        "words": len(words()),
        "training": totals,
        "options": {name: value for name, value in vars(options).items() if name not in {"out", "run"}},
        "held_out": answer_accuracy(learner.model, processor, compose, pictures=options.held_out_pictures),
    }
    print(json.dumps(metrics, indent=2))
    if options.out is not None:
        save_checkpoint(learner, processor, metrics, options.out)


def train_stages(
    learner: Learner,
    stages: dict[str, Schedule],
    compose: Composer,
    processor: LlavaProcessor,
    folder: Path,
    *,
    seed: int,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, float]]:
    """Train one stage after the other, each on pictures of its own; returns their totals."""
    device = learner.model.device.type
    totals = {}
    for number, (name, schedule) in enumerate(stages.items()):
        numbered = 2 * seed + number
        batches = partial(make_batch, compose, processor, schedule, seed=numbered, device=device)
        totals[name] = train_stage(learner, batches, schedule, folder / f"{name}.pt", log=log)
    return totals


def save_checkpoint(learner: Learner, processor: LlavaProcessor, metrics: dict[str, Any], out: Path) -> None:
    """Write model (float16), processor, metrics and card aside, then put them in the place of `out`."""
    with written_aside(out) as folder:
        learner.model.to("cpu").half().save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        write_card(folder, metrics)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniatures.captioner.train", description=__doc__)
    parser.add_argument("--patch-steps", type=int, default=3000, help="steps of the first stage")
    parser.add_argument("--answer-steps", type=int, default=1100, help="steps of the second stage")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-pictures", type=int, default=500, help="new pictures to answer questions about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", help="name of the folder in runs/ that holds the state")
    parser.add_argument("--out", type=Path, help="checkpoint folder to write, e.g. miniatures/captioner/checkpoint")
    return parser


if __name__ == "__main__":
    main()
