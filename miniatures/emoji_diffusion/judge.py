"""Train a judge that tells from a picture what its caption should say: `python -m miniatures.emoji_diffusion.judge`.

It has seen composed pictures of all combinations and knows nothing of the model that it judges.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from miniatures.emoji_diffusion.scenes import (
    COLORS,
    GROUNDS,
    KINDS,
    Composer,
    Description,
    emoji_composer,
)
from miniatures.emoji_diffusion.stages import pixel_values
from miniatures.emoji_diffusion.training import Schedule, train_stage

FILE = Path(__file__).with_name("judge.safetensors")
STATE = Path(__file__).with_name("runs") / "judge.pt"
LAYOUTS = ("single", "side by side", "stacked")
ABSENT = -100
"""Label of what a picture of one object does not have; no loss."""
QUESTIONS = {
    "layout": LAYOUTS,
    "first kind": tuple(KINDS), "first color": tuple(COLORS),
    "second kind": tuple(KINDS), "second color": tuple(COLORS),
    "ground": tuple(GROUNDS), "stripes": ("plain", "striped"),
}  # fmt: skip
"""What is asked and how it may be answered; the first object is the left or the upper one."""


class Judge(nn.Module):
    """Four convolutions with strides, then one linear answer to each of `QUESTIONS`."""

    def __init__(self, channels: Sequence[int] = (24, 48, 96, 128)) -> None:
        """Make an untrained judge."""
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(256), nn.SiLU(), nn.Dropout(0.1))
        self.answers = nn.ModuleDict({name: nn.Linear(256, len(options)) for name, options in QUESTIONS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Scores of all answers to every question; pixels as in `pixel_values`."""
        hidden = self.body(pixels)
        return {name: answer(hidden) for name, answer in self.answers.items()}

    @torch.no_grad()
    def read(self, pixels: Tensor) -> dict[str, Tensor]:
        """The best answer to every question, as indices: int64 [B]."""
        return {name: scores.argmax(-1) for name, scores in self(pixels).items()}


def labels(description: Description) -> dict[str, int]:
    """The right answers about a description, as indices; `ABSENT` for the second object when there is none."""
    things = list(description.things)
    if description.relation in ("right of", "below"):
        things.reverse()
    layout = {None: 0, "left of": 1, "right of": 1, "above": 2, "below": 2}[description.relation]
    found = {
        "layout": layout,
        "ground": list(GROUNDS).index(description.ground.name),
        "stripes": int(description.ground.is_striped),
        "second kind": ABSENT,
        "second color": ABSENT,
    }
    for place, thing in zip(("first", "second"), things, strict=False):
        found[f"{place} kind"] = list(KINDS).index(thing.kind)
        found[f"{place} color"] = list(COLORS).index(thing.color)
    return found


def right_answers(told: dict[str, Tensor], descriptions: Sequence[Description]) -> dict[str, np.ndarray]:
    """Which questions are answered as the descriptions say: float [B] each, NaN where nothing was to be told.

    `caption` says whether everything was right.
    """
    asked = [labels(description) for description in descriptions]
    found = {}
    for name, answers in told.items():
        wanted = np.array([one[name] for one in asked])
        found[name] = np.where(wanted == ABSENT, np.nan, answers.numpy() == wanted)
    found["caption"] = np.nanmin(np.stack(list(found.values())), axis=0)
    return found


def load_judge(path: Path = FILE) -> Judge:
    """Load the trained judge."""
    judge = Judge()
    judge(torch.zeros(1, 3, 64, 64))
    load_model(judge, path)
    return judge.eval()


def judge_loss(judge: Judge, compose: Composer, count: int, seed: int, step: int) -> Tensor:
    """Cross-entropy over all questions, on pictures that are noisy and blurred to various degrees."""
    pictures = [compose(seed, step, i, side="all") for i in range(count)]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    pixels = pixel_values(pictures)
    blur, noise = (torch.rand(count, 1, 1, 1, generator=generator) for _ in range(2))
    smooth = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = pixels + blur * (smooth - pixels) + 0.1 * noise * torch.randn(pixels.shape, generator=generator)
    asked = [labels(picture.description) for picture in pictures]
    losses = [
        F.cross_entropy(scores, torch.tensor([one[name] for one in asked]), ignore_index=ABSENT)
        for name, scores in judge(pixels).items()
    ]
    return torch.stack(losses).sum()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m miniatures.emoji_diffusion.judge", description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=600.0, help="end earlier after so much time")
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    judge, compose = Judge(), emoji_composer()
    judge(torch.zeros(1, 3, 64, 64))
    schedule = Schedule(steps=options.steps, minutes=options.minutes, learning_rate=1e-3, batch_pictures=32)
    totals = train_stage(
        judge,
        lambda step: judge_loss(judge, compose, schedule.batch_pictures, options.seed, step),
        schedule,
        STATE,
        log=lambda line: print(time.strftime("%H:%M:%S"), line, flush=True),
    )
    save_model(judge, FILE)
    pictures = [compose(options.seed + 1, i, side="all") for i in range(1000)]
    right = right_answers(judge.read(pixel_values(pictures)), [one.description for one in pictures])
    print(json.dumps(totals | {name: float(np.nanmean(values)) for name, values in right.items()}, indent=2))


if __name__ == "__main__":
    main()
