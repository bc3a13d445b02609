"""Tiny diffusion components with weights drawn per parameter name, and independent references for LEDITS++."""

import zlib
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

LENGTH = 16
WIDTH = 32


def draw_weights(module: nn.Module, *, gain: float = 1.0) -> nn.Module:
    """Fill every parameter from a generator seeded by its name: the order of construction does not matter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim < 2:
                start = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(start + 0.1 * values)
            else:
                parameter.copy_(gain * values / parameter[0].numel() ** 0.5)
    return module.eval()


def tokenizer() -> CLIPTokenizer:
    """Letters as tokens."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", *letters, *(f"{c}</w>" for c in letters), "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=LENGTH)


def text_config(**fields: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **({
            "vocab_size": 54,
            "hidden_size": WIDTH,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "max_position_embeddings": LENGTH,
            "bos_token_id": 0,
            "eos_token_id": 53,
            "pad_token_id": 53,
            "projection_dim": WIDTH,
        } | fields)
    )  # fmt: skip


def vae(**fields: Any) -> AutoencoderKL:
    model = AutoencoderKL(
        **({
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 64,
        } | fields)
    )  # fmt: skip
    return draw_weights(model)


def unet(**fields: Any) -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        **({
            "block_out_channels": (8, 16, 16),
            "layers_per_block": 1,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        } | fields)
    )  # fmt: skip
    return draw_weights(model)


def scheduler(**fields: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**({"algorithm_type": "sde-dpmsolver++", "solver_order": 2} | fields))


def sd_components(*, dtype: torch.dtype = torch.float32, **unet_fields: Any) -> dict[str, Any]:
    """Components of StableDiffusionPipeline."""
    return {
        "vae": vae().to(dtype),
        "text_encoder": draw_weights(CLIPTextModel(text_config())).to(dtype),
        "tokenizer": tokenizer(),
        "unet": unet(**unet_fields).to(dtype),
        "scheduler": scheduler(steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }


def sdxl_components(*, dtype: torch.dtype = torch.float32, **unet_fields: Any) -> dict[str, Any]:
    """Components of StableDiffusionXLPipeline."""
    fields = {
        "cross_attention_dim": 2 * WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        "transformer_layers_per_block": (1, 2, 1),
    }
    return {
        "vae": vae().to(dtype),
        "text_encoder": draw_weights(CLIPTextModel(text_config(hidden_act="gelu"))).to(dtype),
        "text_encoder_2": draw_weights(CLIPTextModelWithProjection(text_config(hidden_act="gelu"))).to(dtype),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet(**(fields | unet_fields)).to(dtype),
        "scheduler": scheduler(),
    }


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=54, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=53, eos_token_id=53
    )
    return draw_weights(T5EncoderModel(config))


def sd3_components(*, dtype: torch.dtype = torch.float32, with_t5: bool = True, **fields: Any) -> dict[str, Any]:
    """Components of StableDiffusion3Pipeline."""
    transformer = SD3Transformer2DModel(
        **({
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 2 * WIDTH,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 2 * WIDTH,
            "pos_embed_max_size": 32,
        } | fields)
    )  # fmt: skip
    clip = CLIPTextModelWithProjection(text_config())
    return {
        "vae": vae(shift_factor=0.06, scaling_factor=1.3).to(dtype),
        "text_encoder": draw_weights(clip).to(dtype),
        "text_encoder_2": draw_weights(CLIPTextModelWithProjection(text_config(hidden_act="gelu"))).to(dtype),
        "text_encoder_3": t5(2 * WIDTH).to(dtype) if with_t5 else None,
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "tokenizer_3": tokenizer() if with_t5 else None,
        "transformer": draw_weights(transformer).to(dtype),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def flux_components(*, dtype: torch.dtype = torch.float32, **fields: Any) -> dict[str, Any]:
    """Components of FluxPipeline."""
    transformer = FluxTransformer2DModel(
        **({
            "in_channels": 16,
            "num_layers": 3,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        } | fields)
    )  # fmt: skip
    return {
        "vae": vae(shift_factor=0.06, scaling_factor=1.3).to(dtype),
        "text_encoder": draw_weights(CLIPTextModel(text_config())).to(dtype),
        "text_encoder_2": t5(WIDTH).to(dtype),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "transformer": draw_weights(transformer).to(dtype),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def picture(height: int = 32, width: int = 32, *, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean_latents(pipe: Any, image: Image.Image) -> Tensor:
    """What the autoencoder makes of a picture, at the pipeline's dtype."""
    pixels = pipe.image_processor.preprocess(image).to(pipe.vae.dtype)
    return pipe.vae.config.scaling_factor * pipe.vae.encode(pixels).latent_dist.mode()
