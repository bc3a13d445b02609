"""Draw captions and let the judge read them: `python -m miniatures.emoji_diffusion.evaluate`.

Writes `results.json` and `samples.png`. Captions are of four kinds: one or two objects, each of a combination of kind
and color that was trained or held out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miniatures.emoji_diffusion.judge import Judge, load_judge, right_answers
from miniatures.emoji_diffusion.sampling import (
    CHECKPOINT,
    GUIDANCE_SCALE,
    STEPS,
    contact_sheet,
    draw_captions,
    load_pipeline,
)
from miniatures.emoji_diffusion.scenes import Description, Side, describe, emoji_composer
from miniatures.emoji_diffusion.stages import held_out_pictures, pixel_values, reconstruction_psnr

HERE = Path(__file__).parent
SEED = 1000
SHOWN = 12
"""Pictures of each kind of caption on the contact sheet."""
CAPTIONS: dict[str, tuple[Side, float]] = {
    "one object": ("train", 0.0),
    "one object, held-out combination": ("held-out", 0.0),
    "two objects": ("train", 1.0),
    "two objects, held-out combinations": ("held-out", 1.0),
}
"""Kind of caption -> side of the split, share of pairs."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipeline, judge = load_pipeline(options.checkpoint), load_judge()
    results: dict[str, Any] = {
        "guidance_scale": options.guidance_scale,
        "steps": options.steps,
        "captions": options.captions,
        "reconstruction_psnr": reconstruction_psnr(pipeline.vae, held_out_pictures(emoji_composer(), 256, SEED)),
        "judge on composed pictures": judge_composed(judge, options.captions),
    }
    shown: list[Tensor] = []
    titles: list[str] = []
    wrong: list[bool] = []
    begin = time.process_time()
    for kind, (side, pair_share) in CAPTIONS.items():
        descriptions = some_descriptions(options.captions, side, pair_share)
        captions = [one.caption for one in descriptions]
        pixels = draw_captions(
            pipeline, captions, seed=SEED, guidance_scale=options.guidance_scale, steps=options.steps
        )
        right = right_answers(judge.read(pixels), descriptions)
        results[kind] = shares(right)
        print(kind, json.dumps(results[kind]), flush=True)
        shown.append(pixels[:SHOWN])
        titles += captions[:SHOWN]
        wrong += list(right["caption"][:SHOWN] < 1)
    results["cpu_seconds_per_picture"] = (time.process_time() - begin) / (len(CAPTIONS) * options.captions)
    contact_sheet(torch.cat(shown), titles, wrong, options.out / "samples.png", columns=SHOWN)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def some_descriptions(count: int, side: Side, pair_share: float) -> list[Description]:
    """The captions of an evaluation: the same every time."""
    generator = np.random.default_rng(SEED)
    return [describe(generator, side=side, pair_share=pair_share) for _ in range(count)]


def judge_composed(judge: Judge, count: int) -> dict[str, dict[str, float]]:
    """What the judge reads right on composed pictures: the best that drawn ones can reach."""
    compose = emoji_composer()
    found = {}
    for kind, (side, pair_share) in CAPTIONS.items():
        descriptions = some_descriptions(count, side, pair_share)
        pictures = [compose.draw(one, np.random.default_rng([SEED, i])) for i, one in enumerate(descriptions)]
        found[kind] = shares(right_answers(judge.read(pixel_values(pictures)), descriptions))
    return found


def shares(right: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of right answers to each question that had something to tell."""
    return {name: round(float(np.nanmean(values)), 4) for name, values in right.items() if not np.isnan(values).all()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniatures.emoji_diffusion.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--captions", type=int, default=96, help="captions of each kind")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and samples.png")
    return parser


if __name__ == "__main__":
    main()
