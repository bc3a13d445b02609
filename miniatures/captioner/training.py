"""Two stages: the vision tower learns to tell what each patch shows, then the whole model learns to answer.

Several questions of one picture share its columns: each sees the picture and itself, at the positions it would have
alone, so that one pass trains on eight answers. What is learned is exactly the stock model's forward pass.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from miniatures.captioner.questions import Question, sample_questions
from miniatures.captioner.scenes import GRID, NAMES, Composer, Picture

COLUMNS = 1 + GRID * GRID
"""What all questions of a picture share: the begin-of-sequence token and the patches."""
GROUND_WEIGHT = 0.1
"""Weight of patches without an object in the patch loss: they are five sixths of all."""
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and optimizer of one stage."""

    steps: int
    learning_rate: float
    """Peak of the schedule."""
    batch_pictures: int = 32
    patch_loss_weight: float = 1.0
    """Share of the patch loss in the sum; 0 leaves it out."""
    answers: bool = False
    """Whether the language half takes part."""
    warmup_steps: int = 100
    final_share: float = 0.02
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    checkpoint_seconds: float = 120.0
    """Time between two saved states. Changes only the cost."""
    log_every: int = 50

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_share + (1.0 - self.final_share) * cosine)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures with their questions, ready for one step."""

    pixel_values: Tensor
    """float [B, 3, 96, 96], values in [-1, 1]."""
    patch_things: Tensor
    """int64 [B, 144], see `Picture.patch_things`."""
    input_ids: Tensor
    """int64 [B, L]: questions and answers one after the other, without the shared columns."""
    question_of: Tensor
    """int64 [B, L]: number of the question a token belongs to; -1 for padding."""
    position_ids: Tensor
    """int64 [B, L]: position the token would have were its question alone."""
    labels: Tensor
    """int64 [B, L]: the token to predict at each place, `IGNORED` outside answers."""


class Learner(nn.Module):
    """The model, and the linear map that reads the emoji off each image column (dropped after training)."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        """Wrap the model; its parameters are shared, not copied."""
        super().__init__()
        self.model = model
        self.patch_head = nn.Linear(model.config.text_config.hidden_size, 1 + len(NAMES))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Columns of the pictures as they enter the decoder: [B, 144, D]."""
        return torch.stack(list(self.model.model.get_image_features(pixel_values).pooler_output))

    def losses(self, batch: Batch, *, answers: bool) -> dict[str, Tensor]:
        """Patch loss, its share of object patches told right, and, if asked, the same two of the answer tokens."""
        features = self.image_features(batch.pixel_values)  # [B, 144, D]
        scores = self.patch_head(features)  # [B, 144, 1 + things]
        is_object = batch.patch_things > 0
        weights = torch.ones(scores.shape[-1], device=scores.device)
        weights[0] = GROUND_WEIGHT
        found = {
            "patch_loss": F.cross_entropy(scores.flatten(0, 1), batch.patch_things.flatten(), weights),
            "patches_right": (scores.argmax(-1) == batch.patch_things)[is_object].float().mean(),
        }
        if answers:
            logits, labels = self._answer_logits(batch, features)
            found["answer_loss"] = F.cross_entropy(logits, labels)
            found["tokens_right"] = (logits.argmax(-1) == labels).float().mean()
        return found

    def _answer_logits(self, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
        core = self.model.model
        embed = core.get_input_embeddings()
        first = embed.weight[self.model.config.text_config.bos_token_id].expand(len(features), 1, -1)
        columns = torch.cat([first, features, embed(batch.input_ids)], 1)  # [B, 145 + L, D]
        shared = torch.arange(COLUMNS, device=columns.device).expand(len(features), -1)
        hidden = core.language_model(
            inputs_embeds=columns,
            attention_mask=visible(batch.question_of),
            position_ids=torch.cat([shared, batch.position_ids], 1),
            use_cache=False,
        ).last_hidden_state[:, COLUMNS:]
        is_answer = batch.labels != IGNORED
        return self.model.lm_head(hidden[is_answer]), batch.labels[is_answer]


def visible(question_of: Tensor) -> Tensor:
    """What each column sees: bool [B, 1, T, T] with T = 145 + L; the picture, and its own question up to itself."""
    padded = F.pad(question_of, (COLUMNS, 0), value=-2)  # [B, T]
    same = padded[:, :, None] == padded[:, None, :]
    same = same | (padded == -2)[:, None, :]
    return same.tril()[:, None]


def make_batch(
    compose: Composer, processor: LlavaProcessor, schedule: Schedule, step: int, *, seed: int, device: str = "cpu"
) -> Batch:
    """The batch of a step: the same numbers give the same batch."""
    pictures = [compose(seed, step, i) for i in range(schedule.batch_pictures)]
    generator = np.random.default_rng([seed, step])
    asked = (
        [sample_questions(picture, generator) for picture in pictures] if schedule.answers else [[] for _ in pictures]
    )
    return collate(pictures, asked, processor, device=device)


def collate(
    pictures: list[Picture], asked: list[list[Question]], processor: LlavaProcessor, *, device: str = "cpu"
) -> Batch:
    """Tensors of pictures and of the questions asked about each."""
    rows = [_question_columns(questions, processor) for questions in asked]
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "question_of": -1, "position_ids": 0, "labels": IGNORED}
    columns = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows], dtype=torch.int64)
        for name, value in fill.items()
    }
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)
    batch = {
        "pixel_values": pixels.float() / 127.5 - 1.0,
        "patch_things": torch.from_numpy(np.stack([picture.patch_things() for picture in pictures])),
        **columns,
    }
    return Batch(**{name: values.to(device) for name, values in batch.items()})


def _question_columns(questions: list[Question], processor: LlavaProcessor) -> dict[str, list[int]]:
    tokenizer = processor.tokenizer
    row: dict[str, list[int]] = {"input_ids": [], "question_of": [], "position_ids": [], "labels": []}
    for number, question in enumerate(questions):
        prompt = tokenizer.encode(question.prompt.removeprefix("<image>"), add_special_tokens=False)
        answer = [*tokenizer.encode(question.answer, add_special_tokens=False), tokenizer.eos_token_id]
        row["input_ids"] += prompt + answer[:-1]
        row["question_of"] += [number] * (len(prompt) + len(answer) - 1)
        row["position_ids"] += range(COLUMNS, COLUMNS + len(prompt) + len(answer) - 1)
        row["labels"] += [IGNORED] * (len(prompt) - 1) + answer
    return row


def train_stage(
    learner: Learner,
    batch_of: Callable[[int], Batch],
    schedule: Schedule,
    state_file: Path,
    *,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train one stage to the end of its schedule, going on from its saved state if there is one.

    Args:
        learner: what to train, in place.
        batch_of: the batch of a step; must depend on the step alone.
        schedule: steps and optimizer.
        state_file: written aside and moved into place every few minutes, and at the end.
        log: receives one line every `log_every` steps.

    Returns:
        Totals over all parts of the stage: steps, pictures, seconds (of CPU time on a CPU).

    Raises:
        ValueError: the stored state belongs to another schedule or model.
        FloatingPointError: the loss is not finite.
    """
    learner.train()
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    progress = _load(state_file, learner, optimizer, schedule)
    clock = time.process_time if learner.model.device.type == "cpu" else time.perf_counter
    saved_at = begun_at = time.monotonic()
    first = int(progress["steps"])
    sums: dict[str, float] = {}
    for step in range(first, schedule.steps):
        begin = clock()
        values = _step(learner, batch_of(step), optimizer, schedule, step)
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        progress["steps"] = step + 1
        progress["pictures"] += schedule.batch_pictures
        progress["seconds"] += clock() - begin
        if (step + 1) % schedule.log_every == 0:
            means = " ".join(f"{name} {value / schedule.log_every:.4f}" for name, value in sums.items())
            left = (schedule.steps - step - 1) * (time.monotonic() - begun_at) / (step + 1 - first)
            log(f"{state_file.stem} step {step + 1}/{schedule.steps} {means}, {left / 60:.0f} min left")
            sums = {}
        if time.monotonic() - saved_at > schedule.checkpoint_seconds or step + 1 == schedule.steps:
            _save(state_file, learner, optimizer, schedule, progress)
            saved_at = time.monotonic()
    learner.eval()
    return progress


def _step(
    learner: Learner, batch: Batch, optimizer: torch.optim.Optimizer, schedule: Schedule, step: int
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    found = learner.losses(batch, answers=schedule.answers)
    loss = schedule.patch_loss_weight * found["patch_loss"]
    if schedule.answers:
        loss = loss + found["answer_loss"]
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss of step {step} is {loss.item()}; lower the learning rate.")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), schedule.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: value.item() for name, value in found.items()}


def _save(
    path: Path, learner: Learner, optimizer: torch.optim.Optimizer, schedule: Schedule, progress: dict[str, float]
) -> None:
    state = {
        "run": _identity(learner, schedule),
        "progress": progress,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, schedule: Schedule) -> dict[str, float]:
    if not path.is_file():
        return {"steps": 0, "pictures": 0, "seconds": 0.0}
    state: dict[str, Any] = torch.load(path, map_location=learner.model.device, weights_only=True)
    if state["run"] != _identity(learner, schedule):
        raise ValueError(f"{path} holds the state of another run ({state['run']}). Delete it or choose another folder.")
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    return dict(state["progress"])


def _identity(learner: Learner, schedule: Schedule) -> str:
    """What must be equal for a stored state to be continued."""
    values = asdict(schedule)
    for cost_only in ("checkpoint_seconds", "log_every"):
        del values[cost_only]
    return json.dumps([values, [list(parameter.shape) for parameter in learner.parameters()]])
