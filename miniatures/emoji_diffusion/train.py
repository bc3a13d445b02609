"""Train emoji diffusion: `python -m miniatures.emoji_diffusion.train --out FOLDER`. Again after a kill, it goes on."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from miniatures.emoji_diffusion.card import write_card
from miniatures.emoji_diffusion.model import (
    Sizes,
    build_autoencoder,
    build_denoiser,
    build_pipeline,
    build_text_encoder,
    build_tokenizer,
)
from miniatures.emoji_diffusion.scenes import Composer, emoji_composer
from miniatures.emoji_diffusion.stages import (
    AutoencoderStage,
    DecoderStage,
    DenoiserStage,
    held_out_pictures,
    measure_scaling,
    reconstruction_psnr,
    training_pictures,
)
from miniatures.emoji_diffusion.training import Schedule, train_stage
from miniatures.outputs import written_aside
from miniatures.tfree.training import keep_freed_memory

RUNS = Path(__file__).with_name("runs")
MEASURED = 128
"""Pictures from which the scaling of the latents and the held-out errors are computed."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    stages = {
        "autoencoder": Schedule(
            steps=options.autoencoder_steps, minutes=options.minutes, learning_rate=3e-3, batch_pictures=8
        ),
        "decoder": Schedule(steps=options.decoder_steps, minutes=options.minutes, learning_rate=2e-3, batch_pictures=8),
        "denoiser": Schedule(
            steps=options.steps,
            minutes=options.minutes,
            learning_rate=options.learning_rate,
            batch_pictures=options.batch_pictures,
        ),
    }
    pipeline, metrics = train_pipeline(
        emoji_composer(),
        Sizes(),
        stages,
        RUNS / options.run,
        seed=options.seed,
        device=options.device,
        log=lambda line: print(time.strftime("%H:%M:%S"), line, flush=True),
    )
    print(json.dumps(metrics, indent=2))
    if options.out is not None:
        save_checkpoint(pipeline, metrics, options.out)


def train_pipeline(
    compose: Composer,
    sizes: Sizes,
    stages: dict[str, Schedule],
    folder: Path,
    *,
    seed: int,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Train the autoencoder, its decoder a little more, then text encoder and denoiser on its latents.

    Args:
        compose: where pictures come from.
        sizes: of the model.
        stages: the schedules of `autoencoder`, `decoder` and `denoiser`.
        folder: holds the state of each stage; one that is complete is not trained again.
        seed: decides weights, pictures and noise.
        device: where to train.
        log: receives lines of progress.

    Returns:
        The pipeline, and what was measured on held-out pictures.
    """
    autoencoder, totals, psnr = _train_autoencoder(compose, sizes, stages, folder, seed, device, log)
    torch.manual_seed(seed + 1)
    tokenizer = build_tokenizer()
    text_encoder, denoiser = build_text_encoder(sizes, tokenizer).to(device), build_denoiser(sizes).to(device)
    learner = DenoiserStage(
        denoiser, text_encoder, autoencoder, tokenizer, compose,
        batch_pictures=stages["denoiser"].batch_pictures, seed=len(stages) * seed + 2,
    )  # fmt: skip
    totals["denoiser"] = train_stage(learner, learner.loss, stages["denoiser"], folder / "denoiser.pt", log=log)
    parts = {"autoencoder": autoencoder, "text_encoder": text_encoder, "denoiser": denoiser}
    metrics = {
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "training": totals,
        "seed": seed,
        "device": device,
        "reconstruction_psnr": psnr,
    }
    return build_pipeline(autoencoder, tokenizer, text_encoder, denoiser), metrics


def _train_autoencoder(
    compose: Composer,
    sizes: Sizes,
    stages: dict[str, Schedule],
    folder: Path,
    seed: int,
    device: str,
    log: Callable[[str], None],
) -> tuple[AutoencoderKL, dict[str, dict[str, float]], float]:
    torch.manual_seed(seed)
    autoencoder = build_autoencoder(sizes).to(device)
    totals = {}
    for number, (name, stage_class) in enumerate({"autoencoder": AutoencoderStage, "decoder": DecoderStage}.items()):
        stage = stage_class(
            autoencoder, compose, batch_pictures=stages[name].batch_pictures, seed=len(stages) * seed + number
        )
        totals[name] = train_stage(stage, stage.loss, stages[name], folder / f"{name}.pt", log=log)
    shown = training_pictures(compose, MEASURED, len(stages) * seed, 0)
    autoencoder.register_to_config(scaling_factor=round(measure_scaling(autoencoder, shown), 4))
    psnr = reconstruction_psnr(autoencoder, held_out_pictures(compose, MEASURED, seed))
    log(f"autoencoder: {psnr:.1f} dB on held-out pictures, scaling factor {autoencoder.config.scaling_factor}")
    return autoencoder, totals, psnr


def save_checkpoint(pipeline: StableDiffusionPipeline, metrics: dict[str, Any], out: Path) -> None:
    """Write pipeline (float16), metrics and card aside, then put them in the place of `out`."""
    pipeline.to("cpu")
    for part in (pipeline.vae, pipeline.unet):  # not the text encoder: transformers would load it in half precision
        part.half()
    with written_aside(out) as folder:
        pipeline.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        write_card(folder, metrics)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniatures.emoji_diffusion.train", description=__doc__)
    parser.add_argument("--autoencoder-steps", type=int, default=1000)
    parser.add_argument("--decoder-steps", type=int, default=1000, help="further steps of the decoder alone")
    parser.add_argument("--steps", type=int, default=4000, help="steps of denoiser and text encoder")
    parser.add_argument("--minutes", type=float, default=600.0, help="each stage ends earlier after so much time")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--batch-pictures", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", default="default", help="name of the folder in runs/ that holds the state")
    parser.add_argument("--out", type=Path, help="checkpoint folder to write")
    return parser


if __name__ == "__main__":
    main()
