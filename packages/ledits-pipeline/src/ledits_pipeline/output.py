"""What an edit returns."""

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class LEditsOutput(BaseOutput):
    """Edited pictures, and where each edit acted."""

    images: Any
    """B pictures: PIL, or an array or tensor as `output_type` asks."""

    nsfw_content_detected: list[bool] | None = None
    """Per picture, where the pipeline has a safety checker."""

    masks: Tensor | None = None
    """`[N, E, B, h, w]` bool at latent size: where edit e acted on step n; all False where it did not act."""

    attention_maps: Tensor | None = None
    """`[E, B, gh, gw]` averaged over the asked steps, or `[S, E, B, gh, gw]`; None unless `attn_store_steps` asks."""
