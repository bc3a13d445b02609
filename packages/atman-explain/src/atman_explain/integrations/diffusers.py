"""Weighting the words of an image prompt: a factor per text token in the cross-attention of diffusion models."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from ..remote.errors_atman import UnsupportedModelError
from ..remote.kernels_atman import atman_attention
from ..remote.ops_atman_atman_attention import Mode

_PLAIN = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
_HIDDEN = -1000.0  # in a mask's bias: UNets write -10000 at tokens that may not be seen


class AtManAttnProcessor:
    """Computes cross-attention with a factor for every text token; self-attention stays as it is.

    To give factors per call, set it on every attention module, because diffusers hands `cross_attention_kwargs` to
    all of them:

    - `unet.set_attn_processor(AtManAttnProcessor())`
    - `pipeline(prompt, cross_attention_kwargs={"atman_factors": factors})`

    Args:
        factors: [L] or [R, L], for all calls: one per text token, not negative; 0 suppresses as far as `mode` can, 1
            changes nothing, above 1 strengthens. Tokens after L have factor 1. R rows stand for a batch of k R rows,
            each for k that follow each other, as pipelines lay out several images of a prompt.
        mode: how scores are changed. "log_additive" multiplies attention weights by the factor.
        is_guided: says, at every call, whether the first half of the batch is the unconditional one of classifier-free
            guidance. That half keeps its attention, and rows of factors are counted in the other.

    Source: Deiseroth et al. 2023, "AtMan"; weighting of text in image generation after Bellagente et al. 2023,
    "MultiFusion".
    """

    def __init__(
        self,
        factors: Tensor | None = None,
        *,
        mode: Mode = "shift_min",
        is_guided: Callable[[], bool] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
        self.factors = None if factors is None else _checked(factors, "factors")
        self.mode = mode
        self.is_guided = is_guided
        self._plain = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        atman_factors: Tensor | None = None,
    ) -> Tensor:
        """Attend; `atman_factors` multiply the processor's own."""
        factors = self.factors
        if atman_factors is not None:
            given = _checked(atman_factors, "atman_factors")
            factors = given if factors is None else given * factors.to(given.device)
        if encoder_hidden_states is None or factors is None:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return self._attend(attn, hidden_states, encoder_hidden_states, attention_mask, factors)

    def _attend(
        self, attn: Attention, hidden_states: Tensor, text: Tensor, mask: Tensor | None, factors: Tensor
    ) -> Tensor:
        (B, L), H = text.shape[:2], attn.heads
        text = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
        query, key, value = (
            states.unflatten(-1, (H, -1)).transpose(1, 2)  # [B, H, T or L, D]
            for states in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        visible = bias = None
        if mask is not None:
            bias = attn.prepare_attention_mask(mask, L, B).unflatten(0, (B, H))  # [B, H, 1, L]
            visible = bias > _HIDDEN
            bias = bias.masked_fill(~visible, 0.0)
        rows = self._rows(factors.to(key.device), B, L)
        out = atman_attention(
            query, key, value, rows, mode=self.mode, scale=attn.scale, visible=visible, bias=bias
        )  # [B, H, T, D]
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor

    def _rows(self, factors: Tensor, batch: int, length: int) -> Tensor:
        """Factors [B, L] of a batch."""
        factors = factors if factors.ndim == 2 else factors[None]
        is_guided = self.is_guided is not None and self.is_guided()
        conditional = batch // 2 if is_guided else batch
        if conditional % len(factors) or factors.shape[1] > length:
            half = ", half of them unconditional" if is_guided else ""
            raise ValueError(
                f"factors have {len(factors)} rows of {factors.shape[1]}, but the model runs {batch} rows{half}, of "
                f"{length} text tokens; give one factor per token, or one row per prompt."
            )
        rows = factors.repeat_interleave(conditional // len(factors), dim=0)
        rows = nn.functional.pad(rows, (0, length - rows.shape[1]), value=1.0)
        return torch.cat([rows.new_ones(batch - conditional, length), rows])


@contextlib.contextmanager
def suppress_text(
    model: Any, factors: Tensor, *, mode: Mode = "shift_min", is_guided: bool | None = None
) -> Iterator[None]:
    """Weaken or strengthen text tokens for everything that a diffusion model makes in this context.

    Args:
        model: a pipeline, or its UNet or transformer with cross-attention.
        factors: [L] or [R, L], see `AtManAttnProcessor`.
        mode: how scores are changed.
        is_guided: whether the first half of a batch is the unconditional one of classifier-free guidance, which keeps
            its attention. None: a pipeline is asked at every call, and a bare model counts as not guided.

    Raises:
        ValueError: a factor is negative or not finite, or `is_guided` has to be said.
        UnsupportedModelError: the model has no cross-attention of its own, or one that is changed already.

    Example:
        >>> with suppress_text(pipeline, torch.tensor([1.0, 1.0, 0.1]), mode="log_additive"):
        ...     image = pipeline("a cat").images[0]
    """
    processor = AtManAttnProcessor(factors, mode=mode, is_guided=_guidance(model, is_guided))
    with contextlib.ExitStack() as undo:
        for module in _cross_attention(model):
            undo.callback(module.set_processor, module.processor)
            module.set_processor(processor)
        yield


def _cross_attention(model: Any) -> list[Attention]:
    network = getattr(model, "unet", None) or getattr(model, "transformer", None) or model
    modules = [each for each in network.modules() if isinstance(each, Attention) and each.is_cross_attention]
    if not modules:
        raise UnsupportedModelError(
            f"{type(network).__name__} has no cross-attention to text; models that join text and image in one "
            "attention are not supported."
        )
    for module in modules:
        if type(module.processor) not in _PLAIN:
            raise UnsupportedModelError(
                f"{type(network).__name__} computes cross-attention by {type(module.processor).__name__}, which cannot "
                "be weighted; put set_attn_processor(AttnProcessor2_0()) before."
            )
    return modules


def _guidance(model: Any, is_guided: bool | None) -> Callable[[], bool]:
    if is_guided is not None:
        return lambda: is_guided
    if isinstance(model, nn.Module):
        return lambda: False
    if not hasattr(type(model), "do_classifier_free_guidance"):
        raise ValueError(f"is_guided must be said for {type(model).__name__}, which does not tell; pass True or False.")
    return lambda: bool(model.do_classifier_free_guidance)


def _checked(factors: Tensor, name: str) -> Tensor:
    factors = torch.as_tensor(factors, dtype=torch.float32)
    if factors.ndim not in (1, 2) or not factors.numel():
        raise ValueError(f"{name} must be [tokens] or [rows, tokens], got the shape {list(factors.shape)}.")
    is_wrong = ~factors.isfinite() | (factors < 0)
    if is_wrong.any():
        raise ValueError(f"{name} must be finite and not negative, got {factors[is_wrong][0]:g}.")
    return factors
