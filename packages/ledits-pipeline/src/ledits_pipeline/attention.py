"""How much attention image positions pay to some text columns, read while the model runs, without attention maps.

A second attention call on indicator values gives the summed probabilities of the chosen columns exactly; the model's
own call, whatever its backend, stays as it is. Processors are wrapped around a call and put back afterwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDED_COLUMNS = 8
"""Width of the indicator values: the narrowest that every attention backend takes."""


def column_mass(query: Tensor, key: Tensor, weights: Tensor, *, scale: float | None = None) -> Tensor:
    """The attention probability of weighted key columns, averaged over heads.

    Args:
        query: `[R, H, Q, d]`.
        key: `[R, H, K, d]`.
        weights: `[R, K]`, 1 for a column that counts.
        scale: factor of the scores; None: 1 / sqrt(d).

    Returns:
        `[R, Q]`, float32 or wider: half-precision sums of probabilities would be full of ties.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    values = F.pad(weights.to(wide)[:, None, :, None], (0, PADDED_COLUMNS - 1))
    values = values.expand(-1, query.shape[1], -1, -1)
    return F.scaled_dot_product_attention(query.to(wide), key.to(wide), values, scale=scale)[..., 0].mean(dim=1)


class MassRecorder:
    """Sums column masses of the edit rows over the layers of one model call, in memory it owns.

    Nothing here depends on values, so that a compiled model can write into it.
    """

    def __init__(self, grid: tuple[int, int], layers: int, dtype: torch.dtype = torch.float32) -> None:
        self.grid = grid
        self.dtype = dtype
        self.layers = layers
        self._weights: Tensor | None = None
        self._total: Tensor | None = None
        self._first_row = 0

    def begin(self, weights: Tensor | None, first_row: int = 0) -> None:
        """Before a model call: `weights` `[R, K]` of the text columns of rows `first_row ...`; None records nothing."""
        self._weights, self._first_row = weights, first_row
        if weights is not None:
            self._total = weights.new_zeros(weights.shape[0], self.grid[0] * self.grid[1], dtype=self.dtype)

    @property
    def is_recording(self) -> bool:
        return self._weights is not None

    def rows(self, tensor: Tensor) -> Tensor:
        """The recorded rows of a tensor whose first axis are the model's rows."""
        return tensor[self._first_row :]

    def weights(self, before: int, after: int) -> Tensor:
        """The column weights of the joint sequence: `before` and `after` columns around the text never count."""
        assert self._weights is not None
        return F.pad(self._weights, (before, after))

    def add(self, mass: Tensor) -> None:
        """`mass` `[R, Q]` of one layer."""
        assert self._total is not None
        self._total.add_(mass)

    def maps(self) -> Tensor:
        """The mean over layers, `[R, gh, gw]` on the layers' own grid."""
        assert self._total is not None
        return (self._total / self.layers).reshape(-1, *self.grid)


class CrossAttentionRecording:
    """Wraps any cross-attention processor of a UNet: records the column mass, then lets the inner one do its work."""

    def __init__(self, inner: Any, recorder: MassRecorder) -> None:
        self.inner = inner
        self.recorder = recorder

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,  # named, because attention layers only pass on what they find in the signature
        **kwargs: Any,
    ) -> Any:
        if self.recorder.is_recording:
            text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
            self._record(attn, self.recorder.rows(hidden_states), self.recorder.rows(text))
        if ip_adapter_masks is not None:
            kwargs["ip_adapter_masks"] = ip_adapter_masks
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)

    def _record(self, attn: Any, image: Tensor, text: Tensor) -> None:
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query = split_heads(attn.to_q(image), attn.heads)
        key = split_heads(attn.to_k(text), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        self.recorder.add(column_mass(query, key, self.recorder.weights(0, 0), scale=attn.scale))


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """`[R, L, H * d]` -> `[R, H, L, d]`."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def recording(modules: Sequence[Any], wrapper: type, recorder: MassRecorder) -> Iterator[None]:
    """Wrap the attention processors of `modules`; the same objects are back afterwards, whatever happens inside."""
    before = [module.processor for module in modules]
    try:
        for module, processor in zip(modules, before, strict=True):
            module.set_processor(wrapper(processor, recorder))
        yield
    finally:
        for module, processor in zip(modules, before, strict=True):
            module.set_processor(processor)
