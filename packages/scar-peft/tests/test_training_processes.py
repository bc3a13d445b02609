"""Two processes share the texts and the rows, and learn what one learns from the same batches.

This file is also the program that `accelerate launch` starts.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import scar_peft
from scar_peft.training import ActivationStore, ScarTrainer, ScarTrainingArguments
from tests.support.processes import ROOT
from tests.support.scar_texts import register_texts, tiny_llama, word_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = register_texts(40)


def train(folder: Path, resume: Any = None, **settings: Any) -> dict[str, torch.Tensor]:
    """Train a fresh adapter and return its weights."""
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(3 + rank)  # the first process decides on the start
    config = scar_peft.ScarConfig(layers=[0, 1], site="block", concepts=["archaic"], n_latents=24, k=4)
    model = get_peft_model(tiny_llama(seed=0), config)
    torch.manual_seed(3 + rank)
    for layer in scar_peft.scar_layers(model):
        scar_peft.layer.init_coder_(layer.weights("default"))
    defaults = {"log_steps": 2, "learning_rate": 3e-3, "progress_bar": False, "harvest_batch_size": 2}
    args = ScarTrainingArguments(folder, **(defaults | settings))
    trainer = ScarTrainer(model, ROWS, args=args, processing_class=word_tokenizer())
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = {f"metric.{name}": torch.tensor(value) for name, value in result.metrics.items()}
    weights = {name: value for name, value in model.state_dict().items() if "scar_" in name}
    return {name: value.clone().contiguous() for name, value in (weights | metrics).items()}


def whole_batches(folder: Path) -> dict[str, torch.Tensor]:
    """Each step takes every row of the store, so that it does not matter who takes which."""
    rows = sum(len(row["text"].split()) for row in ROWS)
    return train(folder, max_steps=4, batch_tokens=rows, buffer_tokens=rows, validation_share=0.0)


def everything(folder: Path) -> None:
    rank = os.environ["RANK"]
    save_file(whole_batches(folder / "whole"), folder / f"whole-{rank}.safetensors")
    small = {
        "max_steps": 8,
        "save_steps": 4,
        "batch_tokens": 64,
        "buffer_tokens": 128,
        "auxk": 2,
        "dead_after_tokens": 64,
    }
    save_file(train(folder / "run", **small), folder / f"run-{rank}.safetensors")
    resumed = train(folder / "run", resume=folder / "run" / "checkpoint-4", **small)
    save_file(resumed, folder / f"resumed-{rank}.safetensors")
    streamed = train(folder / "stream", store="stream", **(small | {"save_steps": None}))
    save_file(streamed, folder / f"stream-{rank}.safetensors")
    with pytest.raises(ValueError, match='grad_dtype="bfloat16" needs processes on GPUs, got processes on cpu'):
        train(folder / "half", grad_dtype="bfloat16", **small)


def launch(folder: Path) -> None:
    """Run this file in two processes."""
    # `--cpu` would start one process unless MPI is there; `--multi_gpu` starts two, which then take the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    command += [__file__, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("processes")
    launch(found)
    return found


def test_processes_end_with_the_same_weights(folder: Path) -> None:
    for name in ("whole", "run", "resumed", "stream"):
        one, other = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_they_learn_what_one_process_learns_from_the_same_rows(folder: Path, tmp_path: Path) -> None:
    expected = whole_batches(tmp_path)
    for name, weight in load_file(folder / "whole-0.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_they_harvest_what_one_process_harvests(folder: Path, tmp_path: Path) -> None:
    train(tmp_path, max_steps=1, batch_tokens=64, buffer_tokens=64)
    one, two = (ActivationStore(each / "activations" / "train") for each in (tmp_path, folder / "run"))
    assert (one.origin, one.tokens, one.texts) == (two.origin, two.tokens, two.texts)
    assert len(two.shard_rows) == 2


def test_resumed_run_ends_bit_equal(folder: Path) -> None:
    whole, resumed = load_file(folder / "run-0.safetensors"), load_file(folder / "resumed-0.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_other_numbers_of_processes_do_not_go_on(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^processes must be 2 to go on from .*, got 1"):
        train(folder / "run", resume=True, max_steps=8, batch_tokens=64, buffer_tokens=128)


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
