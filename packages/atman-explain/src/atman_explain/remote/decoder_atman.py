"""Exact fast passes for causal language models: shared prefixes, packed suffixes.

Suppressing column i cannot change rows before i. So one plain pass keeps every layer's keys and values, and a
suppressed pass runs the rows from i on only, against the kept keys of the rows before. Many such suffixes run side by
side in one packed forward pass of batch 1, and only rows that predict a target reach the head or the MLP of the last
layer. Memory is that of the kept keys and values and of one packed pass, however many units there are.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .final_layer_atman import RowsRefused, final_layer_on, find_final_layer
from .hook_atman import AttentionCall, Intervention, active, only_heads
from .kernels_atman import atman_suffix_attention
from .passages_atman import Passage, RunSettings, Suppression, forward_rows, pack


@dataclass(frozen=True)
class DecoderInput:
    """A passage as it enters the decoder: images already merged, positions known."""

    embeds: Tensor
    """[T, D]"""
    position_ids: Tensor
    """[1, T], or [3, 1, T] where positions have several axes."""


@dataclass(frozen=True)
class _Segment:
    passage: int
    start: int
    factors: Tensor | None  # [T - start]


class _PackedAttention(Intervention):
    """Attention of packed segments, each causal, behind the part of its passage that is known already."""

    needs_mask = False

    def __init__(
        self,
        modules: Collection[int],
        chosen: Collection[int],
        kept: dict[int, tuple[Tensor, Tensor]],
        settings: RunSettings,
        factors: Tensor | None,
        layout: dict[str, Tensor],
        keeps: bool,
    ) -> None:
        self.modules = modules
        self._chosen = chosen
        self._kept = kept
        self._settings = settings
        self._factors = factors
        self._layout = layout
        self._keeps = keeps
        self.num_calls = 0

    def attend(self, call: AttentionCall) -> Tensor:
        self.num_calls += 1
        name = id(call.module)
        query, key, value = (each[0].transpose(0, 1) for each in (call.query, call.key, call.value))  # [S, heads, D]
        if self._keeps:
            self._kept[name] = key.contiguous(), value.contiguous()
            prefix_key, prefix_value = key[:0], value[:0]
        else:
            prefix_key, prefix_value = self._kept[name]
        self._layout = {each: tensor.to(key.device) for each, tensor in self._layout.items()}  # once per device

        def attend(factors: Tensor | None) -> Tensor:
            return atman_suffix_attention(
                query,
                key,
                value,
                prefix_key,
                prefix_value,
                factors,
                mode=self._settings.mode,
                scale=call.scale,
                softcap=call.softcap,
                sinks=call.sinks,
                window=call.window,
                **self._layout,
            )

        if self._factors is None or name not in self._chosen:
            return attend(None).transpose(0, 1)[None]
        self._factors = self._factors.to(key.device)
        out = attend(self._factors)
        if self._settings.heads is not None:
            out = only_heads(out, attend(None), self._settings.heads, dim=1)
        return out.transpose(0, 1)[None]


def _packed_factors(segments: Sequence[_Segment], passages: Sequence[Passage], dtype: torch.dtype) -> Tensor | None:
    """Factors [S] of all segments' own columns; None if nothing is suppressed."""
    if all(each.factors is None for each in segments):
        return None
    parts = [
        torch.ones(passages[each.passage].length - each.start) if each.factors is None else each.factors
        for each in segments
    ]
    return torch.cat(parts).to(torch.float64 if dtype == torch.float64 else torch.float32)


class DecoderPasses:
    """A few passages of one model, ready to be run again with suppressed columns.

    Args:
        model: a causal language model in eval mode, switched to AtMan's attention.
        passages: what to run; together they should be about as long as the token budget.
        inputs: of each passage.
        modules: every attention module of the decoder, in order.
        chosen: those that are manipulated.
        settings: how to run them.
        trims: whether the last layer is run on the rows alone that predict targets.

    Raises:
        RowsRefused: the last layer failed on these rows.
    """

    is_causal = True

    def __init__(
        self,
        model: PreTrainedModel,
        passages: Sequence[Passage],
        inputs: Sequence[DecoderInput],
        modules: Sequence[nn.Module],
        *,
        chosen: Sequence[nn.Module],
        settings: RunSettings,
        trims: bool = True,
    ) -> None:
        self._model = model
        self._passages = passages
        self._modules = {id(module) for module in modules}
        self._chosen = {id(module) for module in chosen}
        self._settings = settings
        self._final_module = modules[-1]
        self._final_layer = find_final_layer(model, modules[-1]) if trims else None
        self._embeds = torch.cat([each.embeds for each in inputs])  # [sum T, D]
        self._position_ids = torch.cat([each.position_ids for each in inputs], dim=-1)
        ends = torch.tensor([each.length for each in passages]).cumsum(0)
        self._offsets = [0, *ends.tolist()]
        self._targets = [torch.tensor(each.target_ids, device=self._embeds.device) for each in passages]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_positions = 0
        """Positions computed so far: what the cost is made of."""
        segments = [_Segment(index, 0, None) for index in range(len(passages))]
        self.baseline = self._run(segments, keeps=True)
        """Read-outs [M] of every passage, nothing suppressed."""

    def embeds(self, passage: int) -> Tensor:
        """Input embeddings [T, D] of a passage."""
        return self._embeds[self._offsets[passage] : self._offsets[passage + 1]]

    def probe(self, number: int) -> Tensor:
        """Read-outs [M] of a passage, nothing suppressed, whose second half is run behind the kept first half.

        Raises:
            RowsRefused: the last layer failed on the rows that it was given.
        """
        passage = self._passages[number]
        (out,) = self._run([_Segment(number, min(passage.length // 2, passage.first_row), None)])
        return out

    def run(self, items: Sequence[Suppression]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of every item and its read-outs [M], in an order of its own choice."""
        order = sorted(range(len(items)), key=lambda index: (items[index].passage, items[index].start))
        starts = [min(items[i].start, self._passages[items[i].passage].first_row) for i in order]
        lengths = [self._passages[items[i].passage].length - start for i, start in zip(order, starts, strict=True)]
        most = self._settings.most_items(self._passages, self._model.config.get_text_config().vocab_size)
        for group in pack(lengths, tokens=self._settings.tokens, most=most):
            segments = [
                _Segment(items[order[n]].passage, starts[n], items[order[n]].factors()[starts[n] :]) for n in group
            ]
            try:
                readouts = self._run(segments)
            except RowsRefused as refused:  # after runs that went well, so rows are not the reason
                raise refused.error from None
            yield from zip((order[n] for n in group), readouts, strict=True)

    def _run(self, segments: Sequence[_Segment], keeps: bool = False) -> list[Tensor]:
        device = self._embeds.device
        columns = [
            torch.arange(self._offsets[each.passage] + each.start, self._offsets[each.passage + 1]) for each in segments
        ]
        ends = torch.tensor([0, *(len(each) for each in columns)]).cumsum(0)
        rows = [
            torch.arange(len(passage.target_ids)) + (end - each.start + passage.first_row)
            for each, end in zip(segments, ends[:-1].tolist(), strict=True)
            for passage in [self._passages[each.passage]]
        ]
        index = torch.cat(columns).to(device)
        self.num_positions += len(index)
        attention = _PackedAttention(
            self._modules,
            self._chosen,
            self._kept,
            self._settings,
            _packed_factors(segments, self._passages, self._embeds.dtype),
            {
                "cu_seqlens": ends,
                "prefix_start": torch.tensor([self._offsets[each.passage] for each in segments]),
                "prefix_length": torch.tensor([each.start for each in segments]),
            },
            keeps,
        )
        read = torch.cat(rows).to(device)
        with active(attention), self._trimmed(attention, read):
            logits = forward_rows(
                self._model,
                read,
                inputs_embeds=self._embeds[index][None],
                position_ids=self._position_ids[..., index],
                use_cache=False,
            )
        targets = [self._targets[each.passage] for each in segments]
        readouts = self._settings.readout(logits[0], torch.cat(targets)).cpu()  # at once: a wait for each would cost
        return list(readouts.split([len(each) for each in targets]))

    def _trimmed(self, attention: Intervention, rows: Tensor) -> contextlib.AbstractContextManager[None]:
        """The last layer, run on these rows only."""
        if self._final_layer is None:
            return contextlib.nullcontext()
        return final_layer_on(self._final_layer, self._final_module, attention, rows)
