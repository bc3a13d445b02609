"""Pictures that a UNet is shown beside the edited one: IP-Adapter images and ControlNet images."""

from collections.abc import Sequence
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import ImageProjection
from torch import Tensor

from .adapters import PromptRows

_EMBEDDING = "image_embeds_"


def image_embeddings(pipe: Any, images: Any, embeds: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """What the loaded IP-Adapters read of `images` (one per adapter), `[1, n, ...]` each; or the given embeddings."""
    if images is None and embeds is None:
        return {}
    if images is not None and embeds is not None:
        raise ValueError("ip_adapter_image and ip_adapter_image_embeds describe the same; pass one of them.")
    projection = getattr(pipe.unet, "encoder_hid_proj", None)
    layers = list(getattr(projection, "image_projection_layers", ()))
    if not layers:
        raise ValueError("ip_adapter_image needs an IP-Adapter; call pipe.load_ip_adapter(...) first.")
    device, dtype = pipe._execution_device, pipe.unet.dtype
    if embeds is None:
        given = images if isinstance(images, (list, tuple)) else [images]
        if len(given) != len(layers):
            raise ValueError(f"ip_adapter_image has {len(given)} entries for {len(layers)} loaded IP-Adapters.")
        embeds = [_embed(pipe, image, layer) for image, layer in zip(given, layers, strict=True)]
    return {f"{_EMBEDDING}{i}": value.to(device, dtype) for i, value in enumerate(embeds)}


def _embed(pipe: Any, image: Any, layer: Any) -> Tensor:
    """`[1, n, ...]`."""
    encoder = pipe.image_encoder
    pixels = image
    if not isinstance(image, Tensor):
        pixels = pipe.feature_extractor(image, return_tensors="pt").pixel_values
    pixels = pixels.to(pipe._execution_device, next(encoder.parameters()).dtype)
    if isinstance(layer, ImageProjection):
        return encoder(pixels).image_embeds[None]
    return encoder(pixels, output_hidden_states=True).hidden_states[-2][None]


def image_conditions(prompts: PromptRows) -> dict[str, Any]:
    """The IP-Adapters' part of the UNet's `added_cond_kwargs`."""
    names = sorted(name for name in prompts.extras if name.startswith(_EMBEDDING))
    return {"image_embeds": [prompts.extras[name] for name in names]} if names else {}


def control_pixels(pipe: Any, image: Any, size: tuple[int, int], batch: int) -> Tensor:
    """A control image as the ControlNet takes it, `[1 or B, 3, H, W]` in [0, 1]."""
    if pipe.controlnet is None:
        raise ValueError("control_image needs a ControlNet; pass controlnet= when making the pipeline.")
    processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True, do_normalize=False)
    pixels = processor.preprocess(image, height=size[0], width=size[1])
    if pixels.shape[0] not in (1, batch):
        raise ValueError(
            f"control_image has {pixels.shape[0]} pictures for {batch} edited ones; give one each, or one."
        )
    return pixels.to(pipe._execution_device, pipe.controlnet.dtype)
