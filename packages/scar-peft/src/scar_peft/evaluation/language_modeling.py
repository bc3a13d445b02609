"""What it costs the language model to see reconstructions in place of activations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..contexts import input_device
from .subject import Subject, base_model, right_padded

Change = Callable[[Tensor], Tensor]


class CrossEntropies(NamedTuple):
    """Cross-entropy of the next token, in nats per token."""

    clean: float
    """The model as it is."""
    inserted: dict[int, float]
    """By layer, with the coder's reconstruction in place of its activations."""
    ablated: dict[int, float]
    """By layer, with the mean activation in their place."""


def predicts_text(model: nn.Module) -> bool:
    """Whether the model predicts the next token of the text that it reads."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return bool(base.can_generate()) and not base.config.is_encoder_decoder


def cross_entropies(
    subject: Subject,
    texts: Sequence[Sequence[int]],
    means: Mapping[int, Tensor],
    *,
    skip_first_token: bool,
    batch_size: int,
    progress_bar: bool,
) -> CrossEntropies:
    """Measure the model's cross-entropy: as it is, with each coder inserted, and with each layer's output ablated.

    Args:
        subject: adapter and model.
        texts: token ids; texts of one token do not count.
        means: layer -> mean activation [d].
        skip_first_token: leave the activation of each text's first token as it is.
        batch_size: texts per forward pass.
        progress_bar: show progress.

    Raises:
        ValueError: no text has two tokens.
    """
    texts = sorted((text for text in texts if len(text) > 1), key=len)
    if not texts:
        raise ValueError("dataset must hold a text of at least two tokens to measure cross-entropy.")
    batches = [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]
    cases: list[tuple[str, int, Change | None]] = [("clean", -1, None)]
    for index, mean in means.items():
        cases += [("inserted", index, _insertion(subject, index)), ("ablated", index, _ablation(mean))]
    totals: dict[tuple[str, int], float] = {}
    tokens = sum(len(text) - 1 for text in texts)
    with base_model(subject.model), tqdm(total=len(cases) * len(batches), desc="loss", disable=not progress_bar) as bar:
        for name, index, change in cases:
            target = subject.targets[index] if change else None
            for batch in batches:
                nll = sum(each.sum().item() for each in _losses(subject.model, batch, target, change, skip_first_token))
                totals[name, index] = totals.get((name, index), 0.0) + nll / tokens
                bar.update()
    inserted, ablated = ({i: totals[name, i] for i in means} for name in ("inserted", "ablated"))
    return CrossEntropies(totals["clean", -1], inserted, ablated)


def token_losses(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Negative log-likelihood of every token but the first, in nats, a tensor per row; call it inside `base_model`."""
    return _losses(model, rows, None, None, False)


def _losses(
    model: nn.Module, rows: Sequence[Sequence[int]], target: nn.Module | None, change: Change | None, skip_first: bool
) -> list[Tensor]:
    batch = right_padded(rows, input_device(model))
    with _replaced(target, change, skip_first) if target is not None and change is not None else nullcontext():
        logits = model(**batch).logits  # [B, L, V]; without a cache, T-FREE would not score the bytes of spelled words
    # Row by row: float32 log-probabilities of a whole batch can be larger than the model.
    return [
        F.cross_entropy(logits[i, : len(row) - 1].float(), batch["input_ids"][i, 1 : len(row)], reduction="none")
        for i, row in enumerate(rows)
    ]


@contextmanager
def _replaced(target: nn.Module, change: Change, skip_first_token: bool) -> Iterator[None]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = change(hidden).to(hidden)
        if skip_first_token:
            new = torch.cat([hidden[:, :1], new[:, 1:]], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = target.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _insertion(subject: Subject, layer: int) -> Change:
    return lambda hidden: subject.layers[layer].reconstruction(subject.adapter, hidden)


def _ablation(mean: Tensor) -> Change:
    return lambda hidden: mean.to(hidden).expand_as(hidden)
