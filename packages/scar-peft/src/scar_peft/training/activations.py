"""Texts -> activations of a frozen language model at some of its modules, one row per token."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..contexts import adapters_off, evaluation_mode, input_device
from .labels import LabelReader, TokenizedText, rows_of

_WINDOW_BATCHES = 8
"""Texts are sorted by length among this many batches: little padding, and a resume point after every window."""


class ActivationRows(NamedTuple):
    """Activations of N tokens."""

    acts: dict[int, Tensor]
    """Layer -> `[N, d]`, in the model's dtype."""
    labels: Tensor
    """`[N, C]`: int8 with -1 = unlabelled, or float32 if labels are soft."""
    seq_id: Tensor
    """`[N]` int32: number of the text in the dataset."""
    pos: Tensor
    """`[N]` int32: position of the token in its text, special tokens counted."""

    def take(self, rows: Tensor | slice) -> "ActivationRows":
        """The chosen rows, in their order."""
        acts = {layer: values[rows] for layer, values in self.acts.items()}
        return ActivationRows(acts, self.labels[rows], self.seq_id[rows], self.pos[rows])

    def room_for(self, count: int) -> "ActivationRows":
        """Memory for so many rows of this kind."""
        acts = {layer: values.new_empty(count, *values.shape[1:]) for layer, values in self.acts.items()}
        labels = self.labels.new_empty(count, *self.labels.shape[1:])
        return ActivationRows(acts, labels, self.seq_id.new_empty(count), self.pos.new_empty(count))

    def put(self, places: Tensor, rows: "ActivationRows") -> None:
        """Write rows to the given places of this one."""
        for layer, values in rows.acts.items():
            self.acts[layer][places] = values
        self.labels[places], self.seq_id[places], self.pos[places] = rows.labels, rows.seq_id, rows.pos

    @staticmethod
    def cat(parts: Sequence["ActivationRows"]) -> "ActivationRows":
        """All rows of the parts, one after the other."""
        acts = {layer: torch.cat([part.acts[layer] for part in parts]) for layer in parts[0].acts}
        return ActivationRows(
            acts,
            torch.cat([part.labels for part in parts]),
            torch.cat([part.seq_id for part in parts]),
            torch.cat([part.pos for part in parts]),
        )


class _AllCaptured(Exception):  # noqa: N818 - a signal: it ends the forward pass and never leaves this module
    pass


def capture_activations(
    model: nn.Module, targets: Mapping[int, nn.Module], inputs: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Run the model only as far as its last target and return the targets' outputs.

    Args:
        model: any transformers model. Steering by SCAR adapters in it is off during the pass.
        targets: layer -> module. Tuples count by their first item.
        inputs: arguments of the forward pass.

    Returns:
        Layer -> `[B, L, d]`, detached.

    Raises:
        ValueError: a target did not run, or puts out something else than a row per token.
    """
    shape = inputs["input_ids"].shape
    captured = _captured(model, targets, inputs, _without_cache(model))
    if any(values.numel() != shape.numel() * values.shape[-1] for values in captured.values()):
        # T-FREE reads a word that it has to spell as one position, unless a cache has to hold its bytes.
        captured = _captured(model, targets, inputs, {})
    for layer, values in captured.items():
        if values.numel() != shape.numel() * values.shape[-1]:
            raise ValueError(
                f"targets must put out one row per token, got {tuple(values.shape)} of layer {layer} for "
                f"{shape.numel()} tokens."
            )
    return {layer: values.view(*shape, -1) for layer, values in captured.items()}


def _captured(
    model: nn.Module, targets: Mapping[int, nn.Module], inputs: Mapping[str, Tensor], options: Mapping[str, bool]
) -> dict[int, Tensor]:
    captured: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            captured[layer] = (output[0] if isinstance(output, tuple) else output).detach()
            if len(captured) == len(targets):
                raise _AllCaptured

        return hook

    # In front of all hooks, because a SCAR adapter's own would replace the output.
    handles = [module.register_forward_hook(keep(layer), prepend=True) for layer, module in targets.items()]
    try:
        with torch.inference_mode(), evaluation_mode(model), adapters_off(model):
            model(**inputs, **options)
    except _AllCaptured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(targets.keys() - captured.keys()):
        raise ValueError(f"targets must run in the forward pass of the model; layers {missing} did not.")
    return captured


def activation_windows(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    reader: LabelReader,
    targets: Mapping[int, nn.Module],
    *,
    batch_size: int = 16,
    max_length: int = 512,
    drop_sink_tokens: bool = True,
    start: int = 0,
    rank: int = 0,
    processes: int = 1,
    is_wanted: Callable[[int], bool] = lambda _: True,
) -> Iterator[tuple[int, ActivationRows]]:
    """Yield the activations of a dataset, some texts at a time.

    Args:
        model: frozen language model.
        tokenizer: its tokenizer.
        dataset: rows with the columns that `reader` reads.
        reader: how texts and labels are read.
        targets: layer -> module.
        batch_size: texts per forward pass. Changes memory and speed; the result only by rounding.
        max_length: longer texts are cut here.
        drop_sink_tokens: leave out the tokens that the tokenizer adds and the first token of each text. The first
            position collects attention, with a norm many times that of others, and is the same in all classes.
        start: number of this process's texts to skip.
        rank: which process this is; it reads every `processes`-th row, beginning with this one.
        processes: number of processes that share the dataset.
        is_wanted: tells by its number whether a text is used.

    Yields:
        Number of this process's texts done so far, and their rows on the CPU. Padding is left out.
    """
    own: Iterator[tuple[int, Mapping[str, Any]]] = islice(
        enumerate(rows_of(dataset)), rank + start * processes, None, processes
    )
    own = filter(lambda numbered: is_wanted(numbered[0]), own)
    while window := list(islice(own, batch_size * _WINDOW_BATCHES)):
        texts = reader.tokenize([row for _, row in window], tokenizer, max_length)
        order = sorted((i for i, text in enumerate(texts) if text.input_ids), key=lambda i: len(texts[i].input_ids))
        parts = [
            _rows_of_batch(model, targets, [(window[i][0], texts[i]) for i in batch], drop_sink_tokens, reader.soft)
            for batch in (order[first : first + batch_size] for first in range(0, len(order), batch_size))
        ]
        if any(len(part.seq_id) for part in parts):
            yield (window[-1][0] - rank) // processes + 1, ActivationRows.cat(parts)


def _rows_of_batch(
    model: nn.Module,
    targets: Mapping[int, nn.Module],
    texts: Sequence[tuple[int, TokenizedText]],
    drop_sink_tokens: bool,
    soft: bool,
) -> ActivationRows:
    length = max(len(text.input_ids) for _, text in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.long)  # any id may stand on padding: the mask hides it
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    kept = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (_, text) in enumerate(texts):
        size = len(text.input_ids)
        ids[row, :size], mask[row, :size] = torch.tensor(text.input_ids), 1
        kept[row, :size] = ~torch.tensor(text.is_special, dtype=torch.bool) if drop_sink_tokens else True
    if drop_sink_tokens:
        kept[:, 0] = False
    device = input_device(model)
    captured = capture_activations(model, targets, {"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    acts = {layer: values[kept.to(values.device)].cpu() for layer, values in captured.items()}  # [N, d]
    labels = torch.cat([text.labels for _, text in texts])[kept[mask.bool()]]
    index, pos = kept.nonzero().unbind(1)
    seq_id = torch.tensor([number for number, _ in texts])[index]
    return ActivationRows(acts, labels if soft else labels.to(torch.int8), seq_id.int(), pos.int())


def _without_cache(model: nn.Module) -> dict[str, bool]:
    get_base_model: Any = getattr(model, "get_base_model", None)
    inner = get_base_model() if get_base_model else model
    return {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
