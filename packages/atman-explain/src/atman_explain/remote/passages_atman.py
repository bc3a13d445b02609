"""What is run through a model: prompts with their targets, suppressions of them, and what is read off the logits."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .hook_atman import in_this_thread

LOGITS_BUDGET = 1 << 26
"""Logits formed in one pass: 256 MiB in float32."""

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of read-outs, between two ways of computing the same
_TOLERANCE_OF_HALF = 0.25
_HEAD_CHUNK = 1 << 24  # elements of the output matrix that are cast to float32 at once: 64 MiB


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A prompt and the target that is explained. Symbols: P prompt tokens, M target tokens, T = P + M - 1 columns."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs of this one row, such as pixel values; batch first."""

    @property
    def ids(self) -> tuple[int, ...]:
        """What a causal model reads: the last target token is never an input."""
        return self.prompt_ids + self.target_ids[:-1]

    @property
    def length(self) -> int:
        """T."""
        return len(self.prompt_ids) + len(self.target_ids) - 1

    @property
    def first_row(self) -> int:
        """The row of a causal model that predicts the first target token."""
        return len(self.prompt_ids) - 1


@dataclass(frozen=True)
class Suppression:
    """One forward pass: a passage with a factor for each of its columns."""

    passage: int
    factors: Callable[[], Tensor]
    """Makes the factors [T], on the CPU, float64. Made late, so that memory does not grow with the number of units."""
    start: int
    """No column before this one has a factor other than 1."""


@dataclass(frozen=True)
class Readout:
    """What an explanation looks at: the target's log-probability (nats) or its raw logit."""

    delta: Literal["logprob", "logit"] = "logprob"
    temperature: float = 1.0

    def __call__(self, logits: Tensor, target_ids: Tensor) -> Tensor:
        """Read targets off logits.

        Args:
            logits: [..., V].
            target_ids: [...], int64.

        Returns:
            [...], float32 (float64 for float64 logits).
        """
        wide = (logits if logits.dtype == torch.float64 else logits.float()) / self.temperature
        chosen = wide.gather(-1, target_ids[..., None]).squeeze(-1)
        return chosen if self.delta == "logit" else chosen - wide.logsumexp(-1)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How passes are run: the same for every model."""

    mode: str
    """How scores are changed."""
    heads: tuple[int, ...] | None
    """Query heads that are changed; None: all."""
    readout: Readout
    tokens: int
    """Positions computed in one pass."""
    most: int | None
    """Suppressions in one pass."""

    def most_items(self, passages: Sequence[Passage], vocab_size: int) -> int:
        """Suppressions in one pass, so that its logits stay within bounds."""
        longest = max(len(passage.target_ids) for passage in passages)
        by_logits = max(1, LOGITS_BUDGET // (longest * vocab_size))
        return by_logits if self.most is None else min(by_logits, self.most)


def forward_rows(model: PreTrainedModel, rows: Tensor, **inputs: Any) -> Tensor:
    """Run a model and return the logits of some rows only, whatever its head does to them.

    Args:
        model: a model with a language modeling head.
        rows: [n], int64, positions of the sequence.
        **inputs: for the model's forward.

    Returns:
        [B, n, V], formed in float32 where the head is a linear layer of lower precision.
    """
    head = model.get_output_embeddings()
    with contextlib.ExitStack() as hooks:
        if isinstance(head, nn.Linear) and head.weight.dtype in (torch.bfloat16, torch.float16):
            hooks.callback(head.register_forward_hook(in_this_thread(float32_product)).remove)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            return model(**inputs, logits_to_keep=rows).logits
        if head is not None:
            cut = in_this_thread(lambda _, args: (args[0][:, rows], *args[1:]))
            hooks.callback(head.register_forward_pre_hook(cut).remove)
            return model(**inputs).logits
        return model(**inputs).logits[:, rows]


def float32_product(head: nn.Linear, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    """Form logits in float32: differences of log-probabilities below 0.01 drown in bfloat16."""
    hidden, weight, bias = args[0].float(), head.weight, head.bias
    rows = max(1, _HEAD_CHUNK // weight.shape[1])
    parts = [
        F.linear(hidden, weight[i : i + rows].float(), None if bias is None else bias[i : i + rows].float())
        for i in range(0, weight.shape[0], rows)
    ]
    return torch.cat(parts, dim=-1)


def agree(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of computing the same read-outs give the same, up to rounding in a dtype."""
    one, other = one.cpu(), other.cpu()
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_OF_HALF)
    is_near = (one - other).abs() <= tolerance * other.abs().clamp(min=1.0)
    return bool((is_near | (one == other) | (one.isnan() & other.isnan())).all())  # infinities are equal, not near


def pack(lengths: Sequence[int], *, tokens: int, most: int | None = None) -> Iterator[list[int]]:
    """Group consecutive items so that no group is longer than a budget, unless a single item is.

    Args:
        lengths: positions that each item computes.
        tokens: budget of positions.
        most: budget of items.

    Yields:
        Indices of the items of a group.
    """
    group: list[int] = []
    used = 0
    for index, length in enumerate(lengths):
        if group and (used + length > tokens or (most is not None and len(group) >= most)):
            yield group
            group, used = [], 0
        group.append(index)
        used += length
    if group:
        yield group
