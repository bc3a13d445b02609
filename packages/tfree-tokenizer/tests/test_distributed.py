"""Two processes that train on halves of a batch get the loss and the gradients of one process with all of it.

This file is also the program that `accelerate launch` starts.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.processes import ROOT
from tests.support.tfree import tiny_tfree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS = ["the house is small.", "das Donaudampfschiff ist klein, the", "Zwetschge ist das Haus", "House, house"]
NOTHING_TO_LEARN = [*TEXTS[:2], "the", "Zwetschge"]


def batch_of(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Ids, mask and labels, which are -100 on padding."""
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="right"))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def shard(model: nn.Module, world: int, tables: bool) -> None:
    """Split the parameters over the processes: layer by layer, and each table by itself if asked for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    parts = [*model.model.layers, *([model.model.embed_tokens, model.lm_head] if tables else [])]
    for module in [*parts, model]:
        fully_shard(module, mesh=mesh)


def gradients_in_one_of_several_processes(mode: str, objective: str, target: str) -> None:
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor

    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    model, tokenizer = tiny_tfree(objective=objective)
    batch = batch_of(tokenizer, NOTHING_TO_LEARN if mode == "idle" else TEXTS)
    count = (batch["labels"][:, 1:] != -100).sum()
    share = len(TEXTS) // world
    mine = {name: values[rank * share : (rank + 1) * share] for name, values in batch.items()}
    if mode.startswith("fsdp"):
        shard(model, world, tables=mode == "fsdp-tables")
    else:
        model = accelerator.prepare(model)
    loss = model(**mine, num_items_in_batch=count).loss * world  # the gradients are averaged
    accelerator.backward(loss)
    found = {
        name.removeprefix("module."): parameter.grad.full_tensor()
        if isinstance(parameter.grad, DTensor)
        else parameter.grad
        for name, parameter in model.named_parameters()
    }
    mean = accelerator.reduce(loss.detach(), "mean")
    if accelerator.is_main_process:
        torch.save({"loss": mean, "found": found, "world": world}, target)


def train(objective: str, batch_size: int, folder: str) -> dict[str, Tensor]:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, tokenizer = tiny_tfree(objective=objective)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        max_steps=3,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [dict(tokenizer(text)) for text in TEXTS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def launch(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run this file in two processes and load what the first one saved."""
    target = folder / "found.pt"
    # `--cpu` would start one process unless MPI is there; `--multi_gpu` starts two, which then take the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    command += [__file__, *arguments, str(target)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return torch.load(target, weights_only=True)


@pytest.mark.parametrize("objective", ["bce", "dictionary_ce"])
@pytest.mark.parametrize("mode", ["ddp", "idle", "fsdp", "fsdp-tables"])
def test_two_processes_get_the_gradients_of_one(tmp_path, mode, objective):
    answer = launch(tmp_path, mode, objective)
    model, tokenizer = tiny_tfree(objective=objective)
    batch = batch_of(tokenizer, NOTHING_TO_LEARN if mode == "idle" else TEXTS)
    loss = model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss
    loss.backward()
    assert answer["world"] == 2
    torch.testing.assert_close(answer["loss"], loss.detach())
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert answer["found"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(answer["found"][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["bce", "dictionary_ce"])
def test_the_trainer_in_two_processes_learns_what_it_learns_in_one(tmp_path, objective):
    answer = launch(tmp_path, "trainer", objective)
    expected = train(objective, 4, str(tmp_path))
    start = dict(tiny_tfree(objective=objective)[0].named_parameters())
    for name, parameter in expected.items():
        torch.testing.assert_close(answer["found"][name], parameter, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected["lm_head.weight"], start["lm_head.weight"])


if __name__ == "__main__":
    mode, objective, target = sys.argv[1:]
    torch.set_num_threads(1)
    if mode == "trainer":
        found = train(objective, 2, str(Path(target).parent))
        if os.environ["RANK"] == "0":
            torch.save({"found": found}, target)
    else:
        gradients_in_one_of_several_processes(mode, objective, target)
