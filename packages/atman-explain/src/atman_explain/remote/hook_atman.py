"""AtMan inside a model: the attention function that transformers calls, and who may act on it.

`atman_attention_forward` is registered with transformers under the name "atman". Outside the contexts of this package
it is the model's plain attention. Inside, an `Intervention` held by a context variable answers for the attention
modules it names, so that threads do not see each other's, and no model needs to pass anything along.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .kernels_atman import atman_attention

IMPLEMENTATION = "atman"
_FIRST_COLUMN = "atman_first_column"  # attribute of a mask: the position in the sequence of its first key


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function by an attention module. Queries come after rotary embedding and cache."""

    module: nn.Module
    query: Tensor
    """[B, H, Tq, D]"""
    key: Tensor
    """[B, Hk, Tk, D]"""
    value: Tensor
    """[B, Hk, Tk, Dv]"""
    visible: Tensor | None = None
    """bool [B or 1, H or 1, Tq, Tk]; None: all keys, or those up to the query if `is_causal`."""
    bias: Tensor | None = None
    """float, added to the scaled scores: position bias."""
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    """[H], logits that share every row's softmax."""
    window: int | None = None
    """Keys that a row sees at most; already part of `visible` where that is given."""
    first_column: int = 0
    """Position in the sequence of the first key; above 0 when a sliding cache has dropped earlier ones."""

    def attend(self, factors: Tensor | None = None, mode: str = "shift_min") -> Tensor:
        """Attention, with each key's column suppressed by its factor; [B, H, Tq, Dv]."""
        return atman_attention(
            self.query,
            self.key,
            self.value,
            factors,
            mode=mode,
            scale=self.scale,
            visible=self.visible,
            bias=self.bias,
            is_causal=self.is_causal,
            softcap=self.softcap,
            sinks=self.sinks,
        )


class Intervention(ABC):
    """Replaces the attention of some modules while it is active."""

    modules: Collection[int] | None
    """`id` of every module that it answers for; None: all."""

    needs_mask: bool = True
    """Whether the model has to say what a row may see."""

    def begin(self, attention_mask: Tensor | None) -> None:  # noqa: B027 (most have nothing to prepare)
        """Prepare for a forward pass whose keys have this mask, [B, Tk] with 0 for padding."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Return the attention output [B, H, Tq, Dv]."""

    def answers_for(self, module: nn.Module) -> bool:
        """Whether calls of this module come here."""
        return self.modules is None or id(module) in self.modules


def only_heads(changed: Tensor, plain: Tensor, heads: Sequence[int], dim: int) -> Tensor:
    """Take some heads of a changed attention output and the others of the plain one."""
    count = plain.shape[dim]
    if outside := [head for head in heads if not -count <= head < count]:
        raise ValueError(f"heads must lie in [0, {count}), got {outside[0]}.")
    out = plain.clone()
    index = torch.tensor([head % count for head in heads], device=out.device)
    return out.index_copy_(dim, index, changed.index_select(dim, index))


_ACTIVE: ContextVar[tuple[Intervention, ...]] = ContextVar("atman_interventions", default=())


@contextlib.contextmanager
def active(intervention: Intervention) -> Iterator[None]:
    """Let an intervention act on the models that this thread runs in this context; inner ones go first."""
    token = _ACTIVE.set((intervention, *_ACTIVE.get()))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_interventions() -> tuple[Intervention, ...]:
    """The interventions of this context, the innermost first."""
    return _ACTIVE.get()


def intervention_for(module: nn.Module) -> Intervention | None:
    """The innermost intervention that answers for a module."""
    return next((each for each in _ACTIVE.get() if each.answers_for(module)), None)


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A module's hook that leaves alone what other threads run through the module meanwhile."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


def dispatch(call: AttentionCall) -> Tensor:
    """Attention [B, H, Tq, Dv] as the intervention of this context wants it; plain, if there is none."""
    intervention = intervention_for(call.module)
    with torch.autocast(call.query.device.type, enabled=False):  # scores are wider than what autocast makes of them
        return call.attend() if intervention is None else intervention.attend(call)


def atman_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls under the name "atman"; arguments as for its "sdpa".

    Returns:
        Output [B, Tq, H, Dv], contiguous, and None for the weights.

    Raises:
        ValueError: attention dropout is on while an intervention acts.
    """
    if softcap is None and s_aux is None and intervention_for(module) is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    if dropout:
        raise ValueError(
            f"Attention dropout must be 0 where AtMan computes attention, got {dropout} in {type(module).__name__}: "
            "call model.eval() first."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # the empty end of a static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    key, value = key.to(query.dtype), value.to(query.dtype)  # autocast leaves values behind rotated keys
    visible, bias = _split_mask(attention_mask, position_bias)
    call = AttentionCall(
        module=module,
        query=query,
        key=key,
        value=value,
        visible=visible,
        bias=bias,
        is_causal=causal,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        window=sliding_window,
        first_column=getattr(attention_mask, _FIRST_COLUMN, 0),
    )
    return dispatch(call).transpose(1, 2).contiguous(), None


def _split_mask(mask: Tensor | None, position_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What may be seen, and what is added to the scores: additive masks mix the two."""
    if mask is None or mask.dtype == torch.bool:
        return mask, position_bias
    visible = mask > torch.finfo(mask.dtype).min / 2
    bias = mask.masked_fill(~visible, 0.0)
    return visible, bias if position_bias is None else bias + position_bias


def atman_mask(*args: Any, kv_offset: Any = 0, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The mask function that belongs to it: `sdpa_mask`, which also says where the first key stands.

    Under an intervention it always builds a mask, because a sliding cache may have dropped keys; or never, if the
    intervention knows what a row sees.
    """
    interventions = _ACTIVE.get()
    if not interventions:
        return sdpa_mask(*args, kv_offset=kv_offset, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
    interventions[0].begin(kwargs.get("attention_mask"))
    if not interventions[0].needs_mask:
        return None
    mask = sdpa_mask(*args, kv_offset=kv_offset, allow_is_causal_skip=False, **kwargs)
    if mask is not None:
        setattr(mask, _FIRST_COLUMN, int(kv_offset))
    return mask


def register_attention() -> None:
    """Make `attn_implementation="atman"` known to transformers; without the mask, padding would be ignored."""
    AttentionInterface.register(IMPLEMENTATION, atman_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, atman_mask)


register_attention()
