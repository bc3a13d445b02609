"""Checkpoints of a training run: safetensors and JSON, complete or absent."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .store import read_json, save_tensors, tensors_of, write_json

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output_dir: Path,
    step: int,
    coders: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    own_tensors: Mapping[str, Tensor],
    *,
    rank: int,
    barrier: Callable[[], None],
    keep: int,
) -> Path:
    """Write the checkpoint of a step, then delete the oldest beyond `keep`.

    Args:
        output_dir: where checkpoints are.
        step: number of steps done.
        coders: what is trained.
        optimizer: of its parameters.
        state: the rest, as JSON.
        own_tensors: what belongs to this process: generators, buffers.
        rank: of this process; 0 writes what all share.
        barrier: waits for the other processes.
        keep: number of checkpoints that stay.
    """
    folder, unfinished = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.part"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_tensors(coders.state_dict(), unfinished / "coders.safetensors")
        save_tensors(_optimizer_tensors(coders, optimizer), unfinished / "optimizer.safetensors")
        write_json(dict(state), unfinished / "state.json")
    barrier()
    save_tensors({**own_tensors, **_generator_states()}, unfinished / f"process-{rank:05d}.safetensors")
    barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        for old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return folder


def load_checkpoint(
    folder: Path, coders: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put coders, optimizer and generators back to where they were; return the state and this process's tensors."""
    coders.load_state_dict(tensors_of(folder / "coders.safetensors"))
    _load_optimizer(coders, optimizer, tensors_of(folder / "optimizer.safetensors"))
    own = tensors_of(folder / f"process-{rank:05d}.safetensors")
    _restore_generators(own)
    return read_state(folder), own


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ValueError: the folder is no checkpoint.
    """
    if not (folder / "state.json").exists():
        raise ValueError(f"resume_from_checkpoint must be the folder of a checkpoint, got {folder}.")
    state: dict[str, Any] = read_json(folder / "state.json")
    return state


def latest_checkpoint(output_dir: Path) -> Path:
    """The checkpoint of the highest step.

    Raises:
        ValueError: there is none.
    """
    found = _checkpoints(output_dir)
    if not found:
        raise ValueError(f"resume_from_checkpoint=True needs a checkpoint in output_dir, got none in {output_dir}.")
    return found[-1]


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _optimizer_tensors(coders: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in coders.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(coders: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in coders.named_parameters():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        # Fused Adam walks through memory: moments must have the strides of their parameter, which files do not keep.
        optimizer.state[parameter] = {
            key: torch.empty_like(parameter).copy_(value)
            if value.shape == parameter.shape
            else value.to(parameter.device)
            for key, value in own.items()
        }


def _generator_states() -> dict[str, Tensor]:
    """Of torch only: training draws from nothing else."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"])
