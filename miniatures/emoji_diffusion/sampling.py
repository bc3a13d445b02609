"""Captions -> pictures, each from a seed of its own, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

CHECKPOINT = Path(__file__).with_name("checkpoint")
GUIDANCE_SCALE = 4.0
STEPS = 30


def load_pipeline(folder: Path = CHECKPOINT) -> StableDiffusionPipeline:
    """Load a checkpoint, in float32, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_captions(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    seed: int = 0,
    guidance_scale: float = GUIDANCE_SCALE,
    steps: int = STEPS,
    batch: int = 8,
) -> Tensor:
    """Draw a picture of every caption.

    Returns:
        `[captions, 3, 64, 64]`, values in [-1, 1].
    """
    drawn = []
    for first in range(0, len(captions), batch):
        some = list(captions[first : first + batch])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(some))]
        found = pipeline(
            some,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="pt",
        ).images  # [B, 3, 64, 64] in [0, 1]
        drawn.append(2 * found.float() - 1)
    return torch.cat(drawn)


def contact_sheet(
    pixels: Tensor, captions: Sequence[str], wrong: Sequence[bool], path: Path, *, columns: int = 8
) -> None:
    """Write pictures with their captions; those of pictures that the judge reads differently are red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(captions) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.set_axis_off()
    for panel, image, caption, is_wrong in zip(panels, to_images(pixels), captions, wrong, strict=False):
        panel.imshow(image, interpolation="nearest")
        lines = caption.replace(" on ", "\non ").replace(" of ", " of\n").replace("above ", "above\n")
        panel.set_title(lines.replace("below ", "below\n"), fontsize=5.5, color="red" if is_wrong else "black")
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Tensors in [-1, 1] as pictures."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(one.numpy()) for one in values]
