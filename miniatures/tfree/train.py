"""Train the committed T-FREE miniature: `python -m miniatures.tfree.train`. Run it again to go on after a kill."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from miniatures.outputs import written_aside
from miniatures.tfree.card import write_card
from miniatures.tfree.contenders import Body, Contender, Hashing
from miniatures.tfree.experiment import (
    NAMES,
    PROMPTS,
    continuations,
    load_material,
    make_contender,
    runs_folder,
    score_groups,
)
from miniatures.tfree.training import Schedule, keep_freed_memory, train
from miniatures.tfree.windows import step_windows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    body = Body(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.intermediate_size,
    )
    hashing = Hashing(sampled_words=options.sampled_words)
    material = load_material(window_bytes=options.window_bytes, held_out_bytes=options.held_out_bytes)
    contender = make_contender(
        options.model,
        material,
        body=body,
        hashing=hashing,
        dictionary_words=options.dictionary_words,
        bpe_words=options.bpe_words,
        seed=options.seed,
    )
    parameters = contender.model.num_parameters()
    print(f"{contender.name}: {parameters:,} parameters, {contender.vocabulary_parameters():,} of them in tables")
    schedule = Schedule(steps=options.steps, learning_rate=options.learning_rate)
    folder = runs_folder() / (options.run or f"{contender.name}-{options.hidden_size}-{options.steps}-{options.seed}")
    totals = train(
        contender,
        lambda step: step_windows(material.train, step=step, batch_windows=options.batch_windows, seed=options.seed),
        schedule,
        folder,
        device=options.device,
        log=lambda line: print(time.strftime("%H:%M:%S"), line, flush=True),
    )
    metrics = {
        "model": contender.name,
        "parameters": parameters,
        "vocabulary_parameters": contender.vocabulary_parameters(),
        "training": totals,
        "options": {name: value for name, value in vars(options).items() if name not in {"out", "run"}},
        "scoring": contender.prepare_scoring(material.train[:256]),
        "held_out": score_groups(contender, material.held_out),
        "samples": continuations(contender, PROMPTS),
    }
    print(json.dumps(metrics, indent=2, ensure_ascii=False))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.out is not None:
        save_checkpoint(contender, metrics, options.out)


def save_checkpoint(contender: Contender, metrics: dict[str, Any], out: Path) -> None:
    """Write model (float16), tokenizer, metrics and card aside, then put them in the place of `out`."""
    with written_aside(out) as folder:
        contender.model.to("cpu").half().save_pretrained(folder, max_shard_size="4MB")
        contender.tokenizer.save_pretrained(folder)
        text = json.dumps(metrics, indent=2, ensure_ascii=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
        write_card(folder, metrics)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniatures.tfree.train", description=__doc__)
    parser.add_argument("--model", choices=NAMES, default=NAMES[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-windows", type=int, default=8, help="text windows in a step")
    parser.add_argument("--window-bytes", type=int, default=1000)
    parser.add_argument("--held-out-bytes", type=int, default=40_000, help="text to score in each language")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=688)
    parser.add_argument("--dictionary-words", type=int, default=28_000)
    parser.add_argument("--bpe-words", type=int, default=16_000, help="vocabulary of the byte-level BPE")
    parser.add_argument("--sampled-words", type=int, default=0, help="words in the training softmax; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", help="name of the folder in runs/ that holds the state")
    parser.add_argument("--out", type=Path, help="checkpoint folder to write, e.g. miniatures/tfree/checkpoint")
    return parser


if __name__ == "__main__":
    main()
