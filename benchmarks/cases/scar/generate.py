"""What steering adds to a decoding step, on the largest random model that fits."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Fact, Options, register
from scar_peft import ScarConfig, scar_layers, set_steering


class Shape(NamedTuple):
    """A Llama."""

    name: str
    d: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = (  # those of Llama 3 and 3.2
    Shape("8B", 4096, 14336, 32, 32, 8, 128_256),
    Shape("3B", 3072, 8192, 28, 24, 8, 128_256),
    Shape("1B", 2048, 8192, 16, 32, 8, 128_256),
    Shape("0.2B", 1024, 2816, 12, 16, 8, 32_000),
)
QUICK = Shape("tiny", 32, 64, 2, 4, 2, 64)
BATCHES = (1, 8, 32)
PROMPT = 8
BYTES = 2  # bfloat16
ROUNDS = 3  # a step of a large model on a CPU takes seconds
SPARE = 0.7  # of the free memory that a model may take


@dataclass
class Decoder:
    """A steered model in the middle of generating."""

    model: Any
    shape: Shape
    device: str

    def step(self, batch: int) -> Callable[[], Tensor]:
        """A decoding step of so many sequences, always at the same position."""
        ids = torch.arange(PROMPT).expand(batch, -1).to(self.device)
        cache = DynamicCache()
        with torch.inference_mode():
            self.model(ids, past_key_values=cache)

        def step() -> Tensor:
            with torch.inference_mode():
                logits = self.model(ids[:, :1], past_key_values=cache).logits
                cache.crop(-1)
            return logits

        return step

    def hook(self, batch: int) -> Callable[[], Any]:
        """What steering runs in such a step, and nothing else."""
        (layer,) = scar_layers(self.model)
        hidden = torch.randn(batch, 1, self.shape.d, device=self.device, dtype=torch.bfloat16)
        module = layer.get_base_layer()

        def hook() -> Any:
            with torch.inference_mode():
                return layer._steer(module, (), hidden)

        return hook


@register("scar.generate")
def build(options: Options) -> list[Fact]:
    """Seconds of a step and of what steering runs in it."""
    shape = QUICK if options.quick else next(each for each in SHAPES if _bytes(each) < SPARE * _free(options.device))
    decoder = Decoder(_steerable(shape, options.device), shape, options.device)
    facts = []
    for batch in BATCHES:
        size = {"model": shape.name, "B": batch}
        step, hook = decoder.step(batch), decoder.hook(batch)
        set_steering(decoder.model, "concept", -1.0, rule="scale")
        steps, hooks = _alternate(options.device, step, hook)
        set_steering(decoder.model, None)
        (neutral,) = _alternate(options.device, hook)
        facts += [
            Fact(name="scar.generate.step", value=1e3 * steps, unit="ms", size=size),
            Fact(name="scar.generate.steering", value=1e6 * hooks, unit="us", size=size),
            Fact(name="scar.generate.neutral", value=1e6 * neutral, unit="us", size=size, note="no strength set"),
            Fact(name="scar.generate.share", value=100 * hooks / steps, unit="% of a step", size=size),
        ]
    del decoder
    gc.collect()
    return facts


def _steerable(shape: Shape, device: str) -> Any:
    config = ScarConfig(layers=[3 * shape.layers // 4], concepts=["concept"], compact=True, n_latents=6 * shape.d, k=1)
    return get_peft_model(_random_llama(shape, device), config).eval().requires_grad_(False)


def _random_llama(shape: Shape, device: str) -> nn.Module:
    """Random weights without a draw for each: one block of normal numbers, over and over."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=64,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffer is computed, not stored
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).to(device, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            for part in parameter.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    return model.eval()


def _alternate(device: str, *calls: Callable[[], Any]) -> list[float]:
    """Median wall seconds of each call, turn by turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, own in zip(calls, times, strict=True):
            own.append(_seconds(call, device))
    return [median(own) for own in times]


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Short calls are repeated; the first one of a turn, after the other call has emptied the caches, counts alike."""
    repeats, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.01:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        repeats += 1
    return (time.perf_counter() - start) / repeats


def _bytes(shape: Shape) -> int:
    d, kv = shape.d, shape.d * shape.kv_heads // shape.heads
    block = 2 * d * d + 2 * d * kv + 3 * d * shape.intermediate
    return BYTES * (shape.layers * block + 2 * shape.vocabulary * d)


def _free(device: str) -> int:
    """Bytes that a model can take: available memory, as Linux counts it, or free memory of the GPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
