"""AtMan by the book for models with more than one kind of attention: one unit per run, one query row at a time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

_STATE: dict[str, Any] = {}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    B, H, Tq, D = query.shape
    Tk, groups = key.shape[2], H // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    factors = _STATE["factors"] if id(module) in _STATE["modules"] else None
    touched = torch.tensor([[_STATE["heads"] is None or h in _STATE["heads"]] for h in range(H)])
    out = torch.empty(B, Tq, H, value.shape[3], dtype=query.dtype)
    for b, i in torch.cartesian_prod(torch.arange(B), torch.arange(Tq)).tolist():
        scores = torch.einsum("hd,hjd->hj", query[b, :, i], key[b]) * (D**-0.5 if scaling is None else scaling)
        if position_bias is not None:
            scores = scores + position_bias[0, :, i]
        seen = torch.ones(Tk, dtype=torch.bool)
        if attention_mask is not None and attention_mask.dtype != torch.bool:  # bias that is called a mask
            scores = scores + attention_mask[0, :, i]
        elif attention_mask is not None:
            seen = attention_mask[min(b, len(attention_mask) - 1), 0, i]
        elif getattr(module, "is_causal", False):
            seen = torch.arange(Tk) <= i
        scores = scores[:, seen]
        if factors is not None:
            scores = torch.where(touched, _manipulate(scores, factors[seen], _STATE["mode"]), scores)
        out[b, i] = torch.einsum("hj,hjd->hd", scores.softmax(-1), value[b][:, seen])
    return out, None


def _manipulate(scores: Tensor, factors: Tensor, mode: str) -> Tensor:
    if mode == "multiply":
        return scores * factors
    if mode == "log_additive":
        return scores + factors.log() if (factors > 0).any() else scores
    lowest = scores.min(-1, keepdim=True).values
    return lowest + (scores - lowest) * factors


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("atman_columns", _attention)
AttentionMaskInterface.register("atman_columns", _mask)


@contextlib.contextmanager
def suppressed(
    model: PreTrainedModel,
    chosen: Callable[[str], bool],
    factors: Tensor | None,
    mode: str = "shift_min",
    heads: Sequence[int] | None = None,
) -> Iterator[None]:
    """Suppress columns by `factors` in the modules whose dotted names are chosen."""
    modules = {id(module) for name, module in model.named_modules() if chosen(name)}
    _STATE.update(factors=factors, mode=mode, modules=modules, heads=heads)
    before = {part: part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}
    model.set_attn_implementation("atman_columns")
    try:
        with torch.no_grad():
            yield
    finally:
        for part, implementation in before.items():
            part.set_attn_implementation(implementation)
        _STATE.clear()


def unit_factors(columns: Sequence[int], total: int, factor: float) -> Tensor:
    """Factors [T] of one unit."""
    return torch.tensor([factor if column in columns else 1.0 for column in range(total)], dtype=torch.float64)


def similar_factors(embeds: Tensor, columns: Sequence[int], factor: float, kappa: float) -> Tensor:
    """Factors [T] of one unit and what is similar to it; the factor farthest from 1 wins."""
    factors = [1.0] * len(embeds)
    for column in columns:
        for other in range(len(embeds)):
            norms = embeds[column].norm() * embeds[other].norm()
            cosine = float(embeds[column] @ embeds[other] / norms) if norms > 0 else 0.0
            if cosine >= kappa:
                mixed = factor + (1 - factor) * (1 - max(cosine, 0.0))
                factors[other] = max(factors[other], mixed, key=lambda f: abs(f - 1))
    return torch.tensor([factor if j in columns else f for j, f in enumerate(factors)], dtype=torch.float64)


def spread(model: PreTrainedModel, seed: int = 0, scale: float = 0.6) -> PreTrainedModel:
    """Draw all weights of a model anew, large enough that attention makes a difference; float64, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        is_gain = parameter.ndim == 1 and name.endswith("weight")  # of a norm
        parameter.data = 1.0 + drawn / 4 if is_gain else drawn
    return model.double().eval()
