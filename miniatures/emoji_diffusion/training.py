"""One training loop for every stage: seeded batches, averaged weights, saved states, an end by steps or by time."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and optimizer of one stage."""

    steps: int
    """The stage ends after so many steps ..."""
    minutes: float
    """... or after so many minutes, whichever comes first. The learning rate is zero at either end."""
    learning_rate: float
    """Peak of the schedule."""
    batch_pictures: int
    warmup_steps: int = 100
    decay_share: float = 0.3
    """Last part of the stage, in which the learning rate falls."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average: float = 0.995
    """Decay of the moving average of the weights; the average is what is kept."""
    checkpoint_seconds: float = 120.0
    """Time between two saved states. Changes only the cost."""
    log_every: int = 50

    def done(self, step: int, seconds: float) -> float:
        """Part of the stage that is over, 1 at its end."""
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))

    def rate(self, step: int, done: float) -> float:
        """Learning rate of a step: a rise, a plateau, and a straight fall to zero.

        On the plateau nothing depends on the length of the stage: a slow machine, or a late change of length, costs
        steps but spoils none.
        """
        rise = (step + 1) / self.warmup_steps
        return self.learning_rate * min(1.0, rise, (1 - done) / self.decay_share)


class Average:
    """Moving average of a model's weights; the first steps count less and less, so that it starts at no bias."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin at the current weights."""
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)


def train_stage(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    state_file: Path,
    *,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train to the end of a schedule, going on from the saved state if there is one.

    Args:
        model: what to train, in place; in the end it holds the averaged weights.
        loss_of: the loss of a step; its randomness must depend on the step alone.
        schedule: length and optimizer.
        state_file: written aside and moved into place every few minutes, and at the end.
        log: receives one line every `log_every` steps.

    Returns:
        Totals over all parts of the stage: steps, pictures, minutes by the clock, minutes of CPU time, last mean loss.

    Raises:
        ValueError: the stored state belongs to another schedule or model.
        FloatingPointError: the loss is not finite.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    average = Average(model, schedule.average)
    progress = _load(state_file, model, optimizer, average, schedule)
    clocks = Clocks(progress)
    losses: list[float] = []
    saved_at = time.monotonic()
    while (done := schedule.done(int(progress["steps"]), progress["seconds"])) < 1:
        step = int(progress["steps"])
        losses.append(_step(model, loss_of, optimizer, schedule, step, done))
        average.update(model, step)
        progress["steps"] += 1
        progress["pictures"] += schedule.batch_pictures
        clocks.read()
        if len(losses) == schedule.log_every:
            progress["loss"] = sum(losses) / len(losses)
            log(f"{state_file.stem} step {step + 1}, {100 * done:.1f} % over, loss {progress['loss']:.5f}")
            losses = []
        if time.monotonic() - saved_at > schedule.checkpoint_seconds:
            _save(state_file, model, optimizer, average, schedule, progress)
            saved_at = time.monotonic()
    _save(state_file, model, optimizer, average, schedule, progress)
    model.load_state_dict(average.weights)
    model.eval()
    return progress


class Clocks:
    """Adds the time that passes, by the clock and on the CPU, to a stage's totals."""

    def __init__(self, totals: dict[str, float]) -> None:
        """Begin now."""
        self.totals = totals
        self.last = (time.monotonic(), time.process_time())

    def read(self) -> None:
        """Add what has passed since the last reading."""
        now = (time.monotonic(), time.process_time())
        self.totals["seconds"] += now[0] - self.last[0]
        self.totals["cpu_seconds"] += now[1] - self.last[1]
        self.last = now


def averaged_weights(state_file: Path, map_location: str = "cpu") -> dict[str, Tensor]:
    """Read the averaged weights out of a saved state, finished or not."""
    state: dict[str, Any] = torch.load(state_file, map_location=map_location, weights_only=True)
    return dict(state["average"])


def _step(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    step: int,
    done: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step, done)
    loss = loss_of(step)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss of step {step} is {loss.item()}; lower the learning rate.")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    schedule: Schedule,
    progress: dict[str, float],
) -> None:
    state = {
        "run": _identity(model, schedule),
        "progress": progress,
        "model": model.state_dict(),
        "average": average.weights,
        "optimizer": optimizer.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average, schedule: Schedule
) -> dict[str, float]:
    if not path.is_file():
        return {"steps": 0, "pictures": 0, "seconds": 0.0, "cpu_seconds": 0.0, "loss": math.nan}
    device = next(model.parameters()).device
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state["run"] != _identity(model, schedule):
        raise ValueError(f"{path} holds the state of another run ({state['run']}). Delete it or choose another folder.")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.weights = state["average"]
    return dict(state["progress"])


def _identity(model: nn.Module, schedule: Schedule) -> str:
    """What must be equal for a stored state to be continued; how long to train may be changed on the way."""
    values = asdict(schedule)
    for free in ("checkpoint_seconds", "log_every", "steps", "minutes"):
        del values[free]
    return json.dumps([values, [list(parameter.shape) for parameter in model.parameters()]])
