"""Compare T-FREE with a byte-level BPE: `python -m miniatures.tfree.compare`.

Finished runs are kept, so it can be killed and started again. For a seed, every contender sees the same windows in the
same order, with the same body and number of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from miniatures.tfree.contenders import Body, Hashing
from miniatures.tfree.experiment import (
    NAMES,
    PROMPTS,
    Material,
    continuations,
    load_material,
    make_contender,
    runs_folder,
    score_groups,
)
from miniatures.tfree.report import write_report
from miniatures.tfree.training import Schedule, keep_freed_memory, train
from miniatures.tfree.windows import step_windows

RESULTS = Path(__file__).with_name("results.json")
LEARNING_RATES = {"tfree-dictionary_ce": 4e-3, "tfree-bce": 4e-3, "bpe": 4e-3}
"""Best in bits per byte on seed 100 and 250 steps, of 2e-3, 4e-3 and 8e-3 ("tfree-bce": of the first two)."""
IRRELEVANT = {
    "tfree-dictionary_ce": (("bpe_words",), ("loss_pos_weight",)),
    "tfree-bce": (("bpe_words",), ("sampled_words",)),
    "bpe": (("dictionary_words", "hashing"), ()),
}
"""Settings, and settings of the hashing, that a contender's result does not depend on."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that the runs of one comparison share."""

    steps: int = 1000
    batch_windows: int = 5
    window_bytes: int = 600
    held_out_bytes: int = 20_000
    body: Body = field(default_factory=lambda: Body(hidden_size=128, num_hidden_layers=2, intermediate_size=344))
    hashing: Hashing = field(default_factory=lambda: Hashing(sampled_words=4000))
    dictionary_words: int = 40_000
    bpe_words: int = 16_000
    threads: int = 1


def run_one(
    name: str, seed: int, setting: Setting, material: Material, folder: Path, *, learning_rate: float
) -> dict[str, Any]:
    """Train and score one contender, or give the stored result of the same run."""
    identity = {"name": name, "seed": seed, "rate": learning_rate, "setting": relevant(setting, name)}
    stored = folder / "result.json"
    if stored.is_file() and (result := json.loads(stored.read_text(encoding="utf-8")))["identity"] == identity:
        return result
    contender = make_contender(
        name,
        material,
        body=setting.body,
        hashing=setting.hashing,
        dictionary_words=setting.dictionary_words,
        bpe_words=setting.bpe_words,
        seed=seed,
    )
    totals = train(
        contender,
        lambda step: step_windows(material.train, step=step, batch_windows=setting.batch_windows, seed=seed),
        Schedule(steps=setting.steps, learning_rate=learning_rate, checkpoint_seconds=60.0, log_every=50),
        folder,
        log=lambda line: print(time.strftime("%H:%M:%S"), f"seed {seed}", line, flush=True),
    )
    result = {
        "identity": identity,
        "model": name,
        "seed": seed,
        "parameters": contender.model.num_parameters(),
        "vocabulary_parameters": contender.vocabulary_parameters(),
        "training": totals,
        "scoring": contender.prepare_scoring(material.train[:256]),
        "held_out": score_groups(contender, material.held_out),
        "samples": continuations(contender, PROMPTS, seed=seed),
    }
    write_json(stored, result)
    (folder / "state.pt").unlink(missing_ok=True)
    return result


def relevant(setting: Setting, name: str) -> dict[str, Any]:
    """What a contender's result depends on."""
    values = asdict(setting)
    outer, inner = IRRELEVANT[name]
    values["hashing"] = {key: value for key, value in values["hashing"].items() if key not in inner}
    return {key: value for key, value in values.items() if key not in outer}


def write_json(path: Path, value: Any) -> None:
    """Write aside, then move into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m miniatures.tfree.compare", description=__doc__)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--learning-rate", type=float, help="for all models; default: one for each")
    parser.add_argument("--folder", default="compare", help="folder in runs/ for states and single results")
    parser.add_argument("--no-report", action="store_true", help="leave results.json and README.md as they are")
    options = parser.parse_args(arguments)
    setting = Setting(steps=options.steps)
    torch.set_num_threads(setting.threads)
    keep_freed_memory()
    material = load_material(window_bytes=setting.window_bytes, held_out_bytes=setting.held_out_bytes)
    results = []
    for seed in options.seeds:
        for name in options.models:
            rate = options.learning_rate or LEARNING_RATES[name]
            folder = runs_folder() / options.folder / f"{name}-{seed}"
            results.append(run_one(name, seed, setting, material, folder, learning_rate=rate))
            held_out = results[-1]["held_out"]
            print(name, seed, {group: round(row["bits_per_byte"], 3) for group, row in held_out.items()}, flush=True)
    if not options.no_report:
        write_json(RESULTS, results)
        write_report(results, RESULTS.parent)


if __name__ == "__main__":
    main()
