"""The public call beside the plain method, by length of the prompt, mode, kind of unit and similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from atman_explain import AtMan
from benchmarks.atman_peers import captum_method, one_by_one, whole_rows
from benchmarks.cases.atman.inputs import (
    FACTOR,
    SHAPES,
    Shape,
    columns_of,
    factors_of,
    floor_flops,
    model_of,
    naive_flops,
    prompt_of,
    shape_of,
    similar_factors,
)
from benchmarks.cases.tfree.inputs import default_dtype
from benchmarks.harness import Call, Case, Options, register

BATCH = 16
KAPPA = 0.1  # of random embeddings: about one token in twenty
SENTENCES = 8
RTOL = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest score, which is a difference of two read-outs


@dataclass(frozen=True)
class Scene:
    """A model, a prompt, and its target."""

    shape: Shape
    model: LlamaForCausalLM
    ids: list[int]
    target: int
    dtype: str

    @classmethod
    def of(cls, name: str, options: Options) -> Scene:
        """The scene of a shape's name."""
        shape, dtype = shape_of(name, options), default_dtype(options)
        return cls(shape, model_of(shape, options.device, dtype), *prompt_of(shape), dtype)

    def ours(self, **settings: Any) -> Call:
        """The public call."""
        atman = AtMan(self.model, None, factor=FACTOR, show_progress=False, **settings)
        return lambda: atman.explain(self.ids, target=[self.target]).scores[0]

    def case(self, name: str, factors: Tensor, ours: Call, mode: str = "shift_min", **settings: Any) -> Case:
        """A case whose peers run the same factors."""
        model, ids, target = self.model, self.ids, self.target
        peers = {"one by one": lambda: one_by_one(model, ids, target, factors, mode), **settings.pop("peers", {})}
        floor = floor_flops(self.shape, factors)
        possible = naive_flops(self.shape, len(factors)) / floor
        return Case(
            name=name,
            ours=ours,
            peers=peers,
            rtol=RTOL[self.dtype],
            flops=floor,
            size=self.shape.sizes() | {"U": len(factors)},
            dtype=self.dtype,
            note=f"one by one does {possible:.3g} times the arithmetic that cannot be avoided",
            **settings,
        )


def _register_length(kind: str) -> None:
    name = f"atman.explain.{kind}"

    @register(name, devices=tuple(device for device, shapes in SHAPES.items() if kind in shapes))
    def build(options: Options) -> Case:
        scene = Scene.of(kind, options)
        factors = factors_of(scene.shape, columns_of(scene.shape, scene.shape.T))
        batches = {
            f"whole rows, {BATCH} a pass": lambda: whole_rows(
                scene.model, scene.ids, scene.target, factors, batch=BATCH
            )
        }
        others = {}
        if kind == "t256" and not options.quick:  # about where the two cost the same
            others["captum IG, 50 steps"] = captum_method(
                "IntegratedGradients", scene.model, scene.ids, scene.target, n_steps=50
            )
        return scene.case(name, factors, scene.ours(), peers=batches, others=others)


def _register_mode(mode: str) -> None:
    name = f"atman.mode.{mode}"

    @register(name)
    def build(options: Options) -> Case:
        scene = Scene.of("peers", options)
        factors = factors_of(scene.shape, columns_of(scene.shape, scene.shape.T))
        return scene.case(name, factors, scene.ours(mode=mode), mode)


@register("atman.sentences")
def sentences(options: Options) -> Case:
    """A few units of many tokens each."""
    scene = Scene.of("peers", options)
    units = columns_of(scene.shape, min(SENTENCES, scene.shape.T // 2))
    atman = AtMan(scene.model, None, factor=FACTOR, show_progress=False)
    return scene.case(
        "atman.sentences",
        factors_of(scene.shape, units),
        lambda: atman.explain(scene.ids, target=[scene.target], chunks=units).scores[0],
        others={"ours, every token": scene.ours()},
    )


@register("atman.kappa")
def kappa(options: Options) -> Case:
    """Similar tokens are suppressed along with a unit, so runs start earlier."""
    scene = Scene.of("peers", options)
    embeds = scene.model.get_input_embeddings()(torch.tensor(scene.ids, device=scene.model.device))
    return scene.case(
        "atman.kappa",
        similar_factors(embeds, KAPPA),
        scene.ours(kappa=KAPPA),
        others={"ours, no similarity": scene.ours()},
    )


for _kind in ("t48", "t128", "t256", "t512"):
    _register_length(_kind)
for _mode in ("log_additive", "multiply"):
    _register_mode(_mode)
