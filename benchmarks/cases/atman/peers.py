"""Beside what captum and inseq offer for the same question: other quantities, so times and memory only."""

from __future__ import annotations

from benchmarks.atman_peers import captum_method, inseq_occlusion
from benchmarks.cases.atman.explain import Scene
from benchmarks.cases.atman.inputs import columns_of, factors_of
from benchmarks.harness import Case, Options, register

ROWS = 8  # in one pass of captum


@register("atman.peers")
def captum(options: Options) -> Case:
    """Occlusion is as many passes as ours; gradients are few passes, and hold every activation."""
    scene = Scene.of("peers", options)
    model, ids, target = scene.model, scene.ids, scene.target
    token = {"sliding_window_shapes": (1, scene.shape.hidden)}
    return scene.case(
        "atman.peers",
        factors_of(scene.shape, columns_of(scene.shape, scene.shape.T)),
        scene.ours(),
        others={
            f"captum Occlusion, {ROWS} a pass": captum_method(
                "Occlusion", model, ids, target, perturbations_per_eval=ROWS, **token
            ),
            "captum IG, 50 steps": captum_method("IntegratedGradients", model, ids, target, n_steps=50),
            f"captum IG, 50 steps, {ROWS} a pass": captum_method(
                "IntegratedGradients", model, ids, target, n_steps=50, internal_batch_size=ROWS
            ),
            "captum InputXGradient": captum_method("InputXGradient", model, ids, target),
        },
    )


@register("atman.inseq", devices=("cpu",))
def inseq(options: Options) -> Case:
    """A case of its own: importing inseq takes a minute, and its occlusion is slow."""
    scene = Scene.of("peers", options)
    call = None if options.quick else inseq_occlusion(scene.model, scene.ids, scene.target)
    return Case(
        name="atman.inseq",
        ours=scene.ours(),
        peers={},
        others={"inseq occlusion": call},
        size=scene.shape.sizes(),
        dtype=scene.dtype,
        note="inseq replaces embeddings by zeros, which is another question",
    )
