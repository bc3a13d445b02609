"""The parts of a Stable Diffusion pipeline, small: autoencoder, tokenizer, text encoder, denoiser, noise schedule."""

from __future__ import annotations

import json
from dataclasses import dataclass

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniatures.emoji_diffusion.scenes import COLORS, GROUNDS, IMAGE_SIZE, KINDS, RELATIONS

LATENT_SIZE = IMAGE_SIZE // 2
CAPTION_LENGTH = 16
"""Tokens of a caption with its start and end; the longest has eleven."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides how much the model costs; the committed one by default."""

    autoencoder: tuple[int, int] = (16, 32)
    """Channels at full and at half resolution."""
    latent_channels: int = 4
    denoiser: tuple[int, int, int] = (32, 64, 96)
    """Channels at full, half and quarter latent resolution; the last two have cross-attention."""
    text_width: int = 128
    text_layers: int = 2
    heads: int = 4
    norm_groups: int = 8


def words() -> list[str]:
    """All words of the captions."""
    grammar = ["on", "striped", *" ".join(RELATIONS).split()]
    return sorted({*grammar, *KINDS, *COLORS, *GROUNDS})


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that keeps every word of the captions whole.

    Its byte pairs are merged until no word is in two pieces; other words fall into pieces that were never trained.
    """
    special = ["<|startoftext|>", "<|endoftext|>"]
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pairs.pre_tokenizer = pre_tokenizers.Whitespace()
    enough = 1000
    pairs.train_from_iterator(
        words(),
        trainers.BpeTrainer(
            vocab_size=enough, min_frequency=1, end_of_word_suffix="</w>", special_tokens=special, show_progress=False
        ),
    )
    parts = json.loads(pairs.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    return CLIPTokenizer(vocab=parts["vocab"], merges=merges, model_max_length=CAPTION_LENGTH)


def build_autoencoder(sizes: Sizes) -> AutoencoderKL:
    """64 x 64 pixels to 32 x 32 latents and back; starts out nearly linear, which shortens its training."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=sizes.autoencoder,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.norm_groups,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    for name, module in model.named_modules():
        if name.endswith(".conv2") and isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    return model


def build_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text half of CLIP, untrained."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=CAPTION_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_denoiser(sizes: Sizes) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion with three resolutions and cross-attention at the lower two."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.denoiser,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,  # in this class of models the name means the number of heads
        norm_num_groups=sizes.norm_groups,
        use_linear_projection=True,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The noise schedule, with more noise at its end than usual.

    Otherwise the colors of plain grounds would show through the last noise, and pure noise would ask for gray.
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_pipeline(
    autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, denoiser: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Put the parts together as `StableDiffusionPipeline.from_pretrained` would."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
