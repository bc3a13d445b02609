"""Passes of classifiers: whole rows, one output for each, whatever the input is."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .errors_atman import UnsupportedModelError
from .hook_atman import active, in_this_thread
from .passages_atman import Readout, RunSettings, Suppression, float32_product, pack
from .prompts_atman import EncodedPrompt
from .suppressing_atman import SuppressedColumns

_MOST_CHOICES = 10  # names of classes in a message


@dataclass(frozen=True, kw_only=True)
class Task:
    """An input of a classifier, ready to be run in any number of equal rows, and what its plain run showed."""

    prompt: EncodedPrompt
    """What units are made of: tokens of a text, or patches of an image."""

    run: Callable[[int], Tensor]
    """Runs n equal rows; logits [n, C]."""

    names: tuple[str, ...]
    """[C], what the classes are called."""

    logits: Tensor
    """[C], nothing suppressed."""

    modules: tuple[nn.Module, ...]
    """The attention modules that have a key for every column."""

    embeds: Tensor
    """[T, D], what similar columns are found by."""

    changeable: Tensor
    """bool [T], False for columns that are in no unit, ever: class tokens and registers."""

    has_alternatives: bool
    """Whether the classes, or a class and its absence, are alternatives, so that log-probabilities mean something."""

    aliases: Mapping[str, int] = field(default_factory=dict)
    """Further names of classes."""

    most_rows: int | None = None
    """Rows that the model takes at once. None: any number."""


@dataclass(frozen=True)
class SigmoidReadout(Readout):
    """Reads classes off logits that are judged each on its own."""

    def __call__(self, logits: Tensor, target_ids: Tensor) -> Tensor:
        """As `Readout`, with log-probabilities of the logistic function."""
        chosen = Readout("logit", self.temperature)(logits, target_ids)
        return chosen if self.delta == "logit" else F.logsigmoid(chosen)


class ClassifierPasses:
    """One input of a classifier and one class, ready to be run with suppressed columns.

    Args:
        task: the input.
        index: the class.
        chosen: attention modules that are manipulated.
        settings: how to run them.
    """

    is_causal = False

    def __init__(self, task: Task, index: int, chosen: Sequence[nn.Module], settings: RunSettings) -> None:
        self._task = task
        self._index = index
        self._chosen = {id(module) for module in chosen}
        self._settings = settings
        self.baseline = [self._read(task.logits[None])[0]]

    def embeds(self, passage: int) -> Tensor:
        """What similar columns are found by, [T, D]."""
        return self._task.embeds

    def run(self, items: Sequence[Suppression]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of every item and its read-out [1]."""
        lengths = [len(self._task.embeds)] * len(items)
        for group in pack(lengths, tokens=self._settings.tokens, most=self._settings.most):
            factors = torch.stack([items[index].factors() for index in group])  # [n, T]
            factors = factors.where(self._task.changeable, 1.0)
            with active(_Suppressed(self._chosen, factors, self._settings.mode, self._settings.heads)):
                logits = self._task.run(len(group))
            yield from zip(group, self._read(logits), strict=True)

    def _read(self, logits: Tensor) -> Tensor:
        """Read-outs [n, 1] of logits [n, C]."""
        index = torch.full((len(logits),), self._index, device=logits.device)
        return self._settings.readout(logits, index)[:, None]


class _Suppressed(SuppressedColumns):
    """Rows have no padding of their own: the masks that come by belong to the texts that an image is held against."""

    def begin(self, attention_mask: Tensor | None) -> None:
        """Prepare nothing."""


def find_class(label: int | str | None, task: Task) -> int:
    """Say which class is meant by an index or a name; None is the class with the greatest logit.

    Raises:
        ValueError: there is no such class.
    """
    if label is None:
        return int(task.logits.argmax())
    index = task.names.index(label) if label in task.names else label
    index = task.aliases.get(index, -1) if isinstance(index, str) else index
    if isinstance(index, Integral) and not isinstance(index, bool) and 0 <= index < len(task.names):
        return int(index)
    raise ValueError(f"label must be {_choices(label, task.names)}, got {label!r}.")


def head_runner(model: PreTrainedModel, forward: Callable[[int], Any]) -> Callable[[int], Tensor]:
    """Make a `Task.run` of a model with a classification head.

    Args:
        model: in eval mode.
        forward: runs n equal rows of an input; the model's output.

    Returns:
        A function that gives logits [n, C], formed in float32 where the head is a linear layer of lower precision.

    Raises:
        UnsupportedModelError: the output has no logits, or more than one row of them per input.
    """
    last = _last_linear(model, forward) if model.dtype in (torch.bfloat16, torch.float16) else None

    def run(n: int) -> Tensor:
        with contextlib.ExitStack() as hooks:
            if last is not None:
                hooks.callback(last.register_forward_hook(in_this_thread(float32_product)).remove)
            return _class_logits(model, forward(n))

    return run


def _class_logits(model: PreTrainedModel, output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 2:
        found = "none" if logits is None else f"shape {list(logits.shape)}"
        raise UnsupportedModelError(
            f"{type(model).__name__} is no classifier: its output must hold logits [batch, classes], got {found}; load "
            "the model with a classification head."
        )
    return logits


def _last_linear(model: PreTrainedModel, forward: Callable[[int], Any]) -> nn.Linear | None:
    """The linear layer that forms the logits, if one does."""
    called: list[nn.Linear] = []
    note = in_this_thread(lambda module, *_: called.append(module))
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_hook(note).remove)
        logits = _class_logits(model, forward(1))
    return called[-1] if called and called[-1].out_features == logits.shape[1] else None


def head_facts(model: PreTrainedModel, logits: Tensor) -> dict[str, Any]:
    """What a classification head says about its classes: fields of a `Task`.

    Args:
        model: with such a head.
        logits: [C].
    """
    config, C = model.config, len(logits)
    return {
        "logits": logits,
        "names": tuple(str(config.id2label.get(index, f"LABEL_{index}")) for index in range(C)),
        "aliases": {str(name): int(index) for name, index in config.label2id.items()},
        "has_alternatives": C > 1 and config.problem_type in (None, "single_label_classification"),
    }


def _choices(label: int | str, names: Sequence[str]) -> str:
    near = get_close_matches(label, names, n=_MOST_CHOICES) if isinstance(label, str) else []
    shown = list(dict.fromkeys([*near, *names]))[:_MOST_CHOICES]
    more = f" and {len(names) - len(shown)} others" if len(names) > len(shown) else ""
    return f"a class index in [0, {len(names)}), or one of {', '.join(map(repr, shown))}{more}"
