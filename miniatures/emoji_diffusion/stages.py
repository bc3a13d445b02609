"""What each stage learns: the autoencoder to reproduce pictures, then denoiser and text encoder to draw captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from miniatures.emoji_diffusion.model import build_scheduler
from miniatures.emoji_diffusion.scenes import Composer, Picture

DIVERGENCE_WEIGHT = 3e-4
"""Of the Kullback-Leibler term beside the mean squared error: latents stay near a unit normal, and smooth."""
EMPTY_SHARE = 0.1
"""Share of captions that are left empty, so that guidance has something to compare with."""


class AutoencoderStage(nn.Module):
    """Reproduces pictures."""

    def __init__(self, autoencoder: AutoencoderKL, compose: Composer, *, batch_pictures: int, seed: int) -> None:
        """Take the model (shared, not copied) and where pictures come from."""
        super().__init__()
        self.autoencoder = autoencoder
        self.compose, self.batch_pictures, self.seed = compose, batch_pictures, seed

    def loss(self, step: int) -> Tensor:
        """Mean squared error in [-1, 1] and a little divergence."""
        pixels = pixel_values(training_pictures(self.compose, self.batch_pictures, self.seed, step))
        pixels = pixels.to(self.autoencoder.device)
        posterior = self.autoencoder.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=_generator(self.seed, step)).to(pixels.device)
        restored = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(restored, pixels) + DIVERGENCE_WEIGHT * divergence


class DecoderStage(nn.Module):
    """Reproduces pictures better from the same latents: the encoder stays as it is."""

    def __init__(self, autoencoder: AutoencoderKL, compose: Composer, *, batch_pictures: int, seed: int) -> None:
        """Take the model (shared, not copied) and where pictures come from."""
        super().__init__()
        self.decoder = nn.ModuleList([autoencoder.post_quant_conv, autoencoder.decoder])
        self._whole = (autoencoder,)  # in a tuple, so that the encoder is no part of what is trained
        self.compose, self.batch_pictures, self.seed = compose, batch_pictures, seed

    def loss(self, step: int) -> Tensor:
        """Mean squared error in [-1, 1]."""
        autoencoder = self._whole[0]
        pixels = pixel_values(training_pictures(self.compose, self.batch_pictures, self.seed, step))
        pixels = pixels.to(autoencoder.device)
        with torch.no_grad():
            latents = autoencoder.encode(pixels).latent_dist.mode()
        return F.mse_loss(autoencoder.decode(latents).sample, pixels)


class DenoiserStage(nn.Module):
    """Tells the noise in latents from their caption; the autoencoder stays as it is."""

    def __init__(
        self,
        denoiser: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        autoencoder: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        compose: Composer,
        *,
        batch_pictures: int,
        seed: int,
    ) -> None:
        """Take the models (shared, not copied) and where pictures come from."""
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder
        self._frozen = (autoencoder.requires_grad_(False),)  # in a tuple, so that it is no part of what is trained
        self.tokenizer, self.compose, self.batch_pictures, self.seed = tokenizer, compose, batch_pictures, seed
        self.shares_kept = build_scheduler().alphas_cumprod

    def loss(self, step: int) -> Tensor:
        """Mean squared error of the noise told."""
        pictures = training_pictures(self.compose, self.batch_pictures, self.seed, step)
        device, generator = self.denoiser.device, _generator(self.seed, step)
        with torch.no_grad():
            latents = encode_pictures(self._frozen[0], pictures)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        steps = spread_timesteps(len(pictures), len(self.shares_kept), generator)
        kept = self.shares_kept[steps].view(-1, 1, 1, 1).to(device)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        is_empty = torch.rand(len(pictures), generator=generator) < EMPTY_SHARE
        captions = ["" if empty else one.description.caption for one, empty in zip(pictures, is_empty, strict=True)]
        told = self.denoiser(noisy, steps.to(device), self.encode_captions(captions)).sample
        return F.mse_loss(told, noise)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Hidden states of the text encoder, as the pipeline computes them: [B, 16, D]."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.denoiser.device)).last_hidden_state


def training_pictures(compose: Composer, count: int, seed: int, step: int) -> list[Picture]:
    """The pictures of a step: the same numbers give the same pictures."""
    return [compose(seed, step, i) for i in range(count)]


def held_out_pictures(compose: Composer, count: int, seed: int) -> list[Picture]:
    """Pictures whose combinations of kind and color no step shows."""
    return [compose(seed, i, side="held-out") for i in range(count)]


def pixel_values(pictures: Sequence[Picture]) -> Tensor:
    """Pictures as the autoencoder takes them: float [B, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack([one.pixels for one in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_pictures(autoencoder: AutoencoderKL, pictures: Sequence[Picture]) -> Tensor:
    """Latents of pictures, scaled to unit variance: [B, 4, 32, 32]."""
    posterior = autoencoder.encode(pixel_values(pictures).to(autoencoder.device)).latent_dist
    return posterior.mode() * autoencoder.config.scaling_factor


def spread_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """One random timestep from each of `count` equal parts of the schedule: less varied from batch to batch."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) * total / count).long()


@torch.no_grad()
def measure_scaling(autoencoder: AutoencoderKL, pictures: Sequence[Picture]) -> float:
    """The factor that brings latents to unit variance."""
    posterior = autoencoder.encode(pixel_values(pictures).to(autoencoder.device)).latent_dist
    return 1 / posterior.mode().std().item()


@torch.no_grad()
def reconstruction_psnr(autoencoder: AutoencoderKL, pictures: Sequence[Picture]) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of decode(encode(picture)), in dB."""
    pixels = pixel_values(pictures).to(autoencoder.device)
    restored = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((restored - pixels) / 2).square().flatten(1).mean(1)
    return (-10 * errors.log10()).mean().item()


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
