"""The training loop: AdamW, warm-up and cosine decay, deterministic batches, exact resumption after a kill."""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniatures.tfree.contenders import Contender
from miniatures.tfree.windows import Window

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and optimizer of a training run."""

    steps: int
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    warmup_steps: int = 50
    final_share: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checkpoint_seconds: float = 180.0
    """Time between two saved states. Changes only the cost."""
    log_every: int = 20

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_share + (1.0 - self.final_share) * cosine)


def train(
    contender: Contender,
    windows_of: Callable[[int], list[Window]],
    schedule: Schedule,
    folder: Path,
    *,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train to the end of the schedule, going on from the state in `folder` if there is one.

    Args:
        contender: what to train, in place.
        windows_of: the windows of a step; must depend on the step alone.
        schedule: steps and optimizer.
        folder: holds `state.pt`, written aside and moved into place every few minutes.
        device: where to train.
        log: receives one line every `log_every` steps.

    Returns:
        Totals over all parts of the run: steps, bytes of text, seconds (of CPU time where `device` is "cpu"), bytes
        per second.

    Raises:
        ValueError: the stored state belongs to another schedule or model.
        FloatingPointError: the loss is not finite.
    """
    model = contender.model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=schedule.weight_decay
    )
    folder.mkdir(parents=True, exist_ok=True)
    progress = _load(folder / "state.pt", contender, optimizer, schedule)
    clock = time.process_time if device == "cpu" else time.perf_counter  # a shared machine must not blur the rates
    saved_at = time.monotonic()
    window_losses: list[float] = []
    for step in range(int(progress["steps"]), schedule.steps):
        begin = clock()
        windows = windows_of(step)
        window_losses.append(_step(contender, windows, optimizer, schedule, step, device))
        progress["steps"] = step + 1
        progress["bytes"] += sum(len(window.text.encode()) for window in windows)
        progress["seconds"] += clock() - begin
        if not math.isfinite(window_losses[-1]):
            raise FloatingPointError(f"the loss of step {step} is {window_losses[-1]}; lower the learning rate.")
        if (step + 1) % schedule.log_every == 0:
            loss = sum(window_losses) / len(window_losses)
            rate = progress["bytes"] / progress["seconds"]
            log(f"{contender.name} step {step + 1}/{schedule.steps} loss {loss:.4f} {rate / 1000:.2f} kB/s")
            window_losses = []
        if time.monotonic() - saved_at > schedule.checkpoint_seconds or step + 1 == schedule.steps:
            _save(folder / "state.pt", contender, optimizer, schedule, progress)
            saved_at = time.monotonic()
    model.eval()
    return {**progress, "bytes_per_second": progress["bytes"] / max(progress["seconds"], 1e-9)}


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks for the next step instead of returning them: a third less time on a CPU.

    Changes only the cost. Returns whether the C library knows the setting (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def _step(
    contender: Contender,
    windows: list[Window],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    step: int,
    device: str,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    batch = {name: values.to(device) for name, values in contender.batch(windows).items()}
    loss: Tensor = contender.model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(contender.model.parameters(), schedule.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _save(
    path: Path, contender: Contender, optimizer: torch.optim.Optimizer, schedule: Schedule, progress: dict[str, float]
) -> None:
    state = {
        "run": _identity(contender, schedule),
        "progress": progress,
        "model": contender.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load(path: Path, contender: Contender, optimizer: torch.optim.Optimizer, schedule: Schedule) -> dict[str, float]:
    if not path.is_file():
        return {"steps": 0, "bytes": 0, "seconds": 0.0}
    state = torch.load(path, map_location=contender.model.device, weights_only=True)
    if state["run"] != _identity(contender, schedule):
        raise ValueError(f"{path} holds the state of another run ({state['run']}). Delete it or choose another folder.")
    contender.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    return dict(state["progress"])


def _identity(contender: Contender, schedule: Schedule) -> str:
    """What must be equal for a stored state to be continued."""
    values = asdict(schedule)
    for cost_only in ("checkpoint_seconds", "log_every"):
        del values[cost_only]
    sizes = [list(parameter.shape) for parameter in contender.model.parameters()]
    return json.dumps([contender.name, values, sizes])
