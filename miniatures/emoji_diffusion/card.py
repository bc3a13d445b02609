"""Metrics of a training run -> the model card of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miniatures.emoji_diffusion.scenes import COLORS, GROUNDS, KINDS, RELATIONS

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
language: [en]
license: apache-2.0
tags: [stable-diffusion, emoji]
---

# Emoji diffusion miniature

A text-to-image model of the Stable Diffusion layout with {denoiser:,} parameters in the UNet, {text_encoder:,} in the
text encoder and {autoencoder:,} in the autoencoder. It draws one or two tinted emoji on a plain or striped ground,
64 x 64 pixels. It exists so that examples and tests of image editing run offline, on pictures whose objects are known.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("miniatures/emoji_diffusion/checkpoint")
pipeline("blue house on striped sand", num_inference_steps=30, guidance_scale=4.0).images[0]
```

- **Captions**: `COLOR KIND on [striped] GROUND`, or `COLOR KIND RELATION COLOR KIND on [striped] GROUND`. Other words
  fall into pieces that were never trained.
- **Latents**: 4 x 32 x 32, half the resolution of the pixels; decode(encode(picture)) has {psnr:.1f} dB on held-out
  pictures.
- **Denoiser**: 32 x 32, 16 x 16 and 8 x 8 latents, cross-attention at the last two; predicts noise.
- **Training**: {steps:,} steps on {pictures:,} composed pictures, {minutes:.0f} minutes of {device} time, and
  {more:.0f} for the autoencoder; seed {seed}; a tenth of the captions empty. Of every kind, one color was held out.
- **Samples and their accuracy**: in the folder above.
- **Pictures**: Noto Color Emoji (OFL-1.1).
- **Not good for**: anything else.

Kinds: {kinds}.
Colors: {colors}.
Grounds: {grounds}.
Relations: {relations}.
"""


def write_card(folder: Path, metrics: dict[str, Any]) -> None:
    """Write `README.md` into a checkpoint folder."""
    training = metrics["training"]
    text = CARD.format(
        **metrics["parameters"],
        psnr=metrics["reconstruction_psnr"],
        steps=training["denoiser"]["steps"],
        pictures=training["denoiser"]["pictures"],
        minutes=training["denoiser"]["cpu_seconds"] / 60,
        more=(training["autoencoder"]["cpu_seconds"] + training["decoder"]["cpu_seconds"]) / 60,
        device={"cpu": "CPU", "cuda": "host CPU (training on a GPU)"}[metrics["device"]],
        seed=metrics["seed"],
        kinds=", ".join(KINDS),
        colors=", ".join(COLORS),
        grounds=", ".join(GROUNDS),
        relations=", ".join(RELATIONS),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
