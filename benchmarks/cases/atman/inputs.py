"""Models and prompts of the AtMan cases, and the work that nobody can leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cases.tfree.inputs import DTYPES
from benchmarks.harness import Options

FACTOR = 0.1


@dataclass(frozen=True)
class Shape:
    """A Llama with two query heads per key head, and the length of its prompt."""

    T: int
    layers: int
    hidden: int
    inner: int
    heads: int
    V: int

    def sizes(self) -> dict[str, int]:
        """For the table."""
        return {"T": self.T, "layers": self.layers, "D": self.hidden, "V": self.V}


_LARGE = Shape(T=512, layers=16, hidden=2048, inner=8192, heads=32, V=32000)
SHAPES = {
    "cpu": {
        "t48": Shape(T=48, layers=6, hidden=192, inner=512, heads=6, V=16000),
        "t128": Shape(T=128, layers=6, hidden=256, inner=704, heads=8, V=16000),
        "t256": Shape(T=256, layers=3, hidden=256, inner=704, heads=8, V=2000),
        "peers": Shape(T=128, layers=6, hidden=256, inner=704, heads=8, V=2000),
        "curve": Shape(T=0, layers=2, hidden=256, inner=704, heads=8, V=2000),
    },
    "cuda": {"t128": replace(_LARGE, T=128), "t512": _LARGE, "peers": replace(_LARGE, T=256), "curve": _LARGE},
}
QUICK = Shape(T=12, layers=2, hidden=16, inner=32, heads=4, V=64)


def shape_of(name: str, options: Options) -> Shape:
    """The shape of a case, or the one that shows that it runs."""
    return QUICK if options.quick else SHAPES[options.device][name]


@lru_cache(maxsize=2)
def model_of(shape: Shape, device: str = "cpu", dtype: str = "float32") -> LlamaForCausalLM:
    """A Llama of that shape with random weights, large enough that tokens attend unevenly."""
    config = LlamaConfig(
        vocab_size=shape.V,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        max_position_embeddings=4096,
        initializer_range=2.0 * shape.hidden**-0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(DTYPES[dtype]).eval()
    return model.requires_grad_(False)  # gradients of weights would cost the gradient methods memory


def prompt_of(shape: Shape) -> tuple[list[int], int]:
    """Random ids [T], and the token that they are to predict."""
    ids = torch.randint(3, shape.V, (shape.T + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    return ids[:-1], ids[-1]


def columns_of(shape: Shape, count: int) -> list[list[int]]:
    """The prompt, cut into as many equal runs of tokens."""
    return [run.tolist() for run in torch.arange(shape.T).tensor_split(count)]


def factors_of(shape: Shape, units: Sequence[Sequence[int]]) -> Tensor:
    """Factors [U, T] that suppress each unit's columns."""
    factors = torch.ones(len(units), shape.T, dtype=torch.float64)
    for row, columns in zip(factors, units, strict=True):
        row[list(columns)] = FACTOR
    return factors


def similar_factors(embeds: Tensor, kappa: float) -> Tensor:
    """Factors [T, T] that suppress each token and those whose embedding has a cosine of at least kappa to its own."""
    unit = embeds.detach().float().cpu()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    similar = (unit @ unit.T).clamp(-1, 1).fill_diagonal_(1)
    return torch.where(similar >= kappa, FACTOR + (1 - FACTOR) * (1 - similar.clamp(min=0)), 1.0).double()


def floor_flops(shape: Shape, factors: Tensor) -> float:
    """Work of one plain pass and, per unit, of the rows from its first suppressed column on.

    In the last layer rows meet as keys and values only, and one of them predicts the target: its query, its MLP, and
    the head. What else a layer could share, all units' keys and values of the first one, is counted.
    """
    rows = [shape.T, *(shape.T - int((row != 1).nonzero()[0]) for row in factors)]
    return sum(_suffix_flops(shape, each) for each in rows)


def naive_flops(shape: Shape, count: int) -> float:
    """Work of `count` whole rows and a plain one, with every score of the T x T and all logits."""
    scores = 4.0 * shape.T * shape.T * shape.hidden * shape.layers
    head = 2.0 * shape.T * shape.hidden * shape.V
    return (count + 1) * (2.0 * shape.T * _layer_weights(shape) * shape.layers + scores + head)


def _suffix_flops(shape: Shape, rows: int) -> float:
    keys = rows * (shape.T - rows) + rows * (rows + 1) / 2  # that the last `rows` of T rows see
    inner_layer = 2.0 * rows * _layer_weights(shape) + 4.0 * keys * shape.hidden
    kv = shape.hidden * shape.hidden
    last_layer = 2.0 * (rows * kv + _layer_weights(shape) - kv) + 4.0 * shape.T * shape.hidden
    return (shape.layers - 1) * inner_layer + last_layer + 2.0 * shape.hidden * shape.V


def _layer_weights(shape: Shape) -> int:
    return 3 * shape.hidden * shape.hidden + 3 * shape.hidden * shape.inner  # q, o, half of each of k and v; the MLP
