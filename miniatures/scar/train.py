"""Train the adapters: `python -m miniatures.scar.train`. Run it again to go on after a kill.

One adapter with both concepts for each seed, and beside it one without labels, for comparison. They are kept in
`runs/`; `python -m miniatures.scar.evaluate` measures them and writes the committed one.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model

from miniatures.data.text import load_split
from miniatures.scar.base import CHECKPOINT, load_base, with_words_of
from miniatures.scar.data import CONCEPTS, LabelledText, as_rows, load_material
from miniatures.tfree.training import keep_freed_memory
from scar_peft import ScarConfig
from scar_peft.training import ScarTrainer, ScarTrainingArguments

RUNS = Path(__file__).with_name("runs")
SEEDS = (0, 1, 2)
SIZES = {"train_bytes": 250_000, "test_bytes": 50_000, "judge_bytes": 400_000}
"""Text of each group: for the adapters, held out, and for the classifier."""
LABEL_SOURCE = "whole pages: King James Bible, or the language of a software manual"


@dataclass(frozen=True)
class Coder:
    """Where the coder sits and how it is trained."""

    layer: int = 2
    latents: int = 1536
    k: int = 32
    steps: int = 1500
    batch_tokens: int = 512
    learning_rate: float = 2e-3


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    coder = Coder(layer=options.layer, steps=options.steps)
    texts = load_material(load_split(), **SIZES).train
    for seed in options.seeds:
        for conditioned in (True, False):
            folder = train_one(coder, texts, seed=seed, conditioned=conditioned)
            print(f"{time.strftime('%H:%M:%S')} {folder}", flush=True)


def run_folder(seed: int, *, conditioned: bool) -> Path:
    """Where one run is kept."""
    return RUNS / f"{'conditioned' if conditioned else 'unconditioned'}-{seed}"


def train_one(coder: Coder, texts: list[LabelledText], *, seed: int, conditioned: bool, runs: Path = RUNS) -> Path:
    """Train one adapter, or go on with it; returns its folder. Does nothing where it is done."""
    folder = runs / run_folder(seed, conditioned=conditioned).name
    if (folder / "training.json").is_file():
        return folder
    model, tokenizer = load_base()
    tokenizer = with_words_of(model, tokenizer, (one.text for one in texts))
    torch.manual_seed(seed)
    adapted = get_peft_model(model, adapter_config(coder, conditioned=conditioned))
    settings = ScarTrainingArguments(
        folder,
        store_dir=runs / f"activations-{coder.layer}",
        max_steps=coder.steps,
        batch_tokens=coder.batch_tokens,
        learning_rate=coder.learning_rate,
        lr_decay="linear",
        concept_weight=float(conditioned),
        validation_share=0.0,
        save_steps=250,
        seed=seed,
        progress_bar=False,
    )
    trainer = ScarTrainer(adapted, as_rows(texts), args=settings, processing_class=tokenizer, on_log=_print)
    begin = time.process_time()
    result = trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    seconds = time.process_time() - begin
    # peft would add the embedding, because the dictionary has grown.
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    log = {"coder": vars(coder), "seconds": seconds, "steps": result.steps, "log": result.log_history}
    (folder / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return folder


def adapter_config(coder: Coder, *, conditioned: bool) -> ScarConfig:
    """Both concepts in one coder. Without labels nothing sets the first latents apart: they compete as all do."""
    return ScarConfig(
        layers=[coder.layer],
        site="block",
        concepts=list(CONCEPTS),
        n_latents=coder.latents,
        k=coder.k,
        activation="topk-sigmoid",
        concept_gate="relu" if conditioned else "topk",
        task_type="CAUSAL_LM",
        base_model_name_or_path=CHECKPOINT,
        label_source=LABEL_SOURCE,
        license="apache-2.0",
    )


def _print(entry: dict[str, float]) -> None:
    print(*(f"{name} {value:.4g}" for name, value in entry.items()), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniatures.scar.train", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=Coder.steps)
    parser.add_argument("--layer", type=int, default=Coder.layer)
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
