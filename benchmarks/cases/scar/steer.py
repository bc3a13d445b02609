"""Steering and detection by one concept: a few dot products beside the coder with all its latents."""

from __future__ import annotations

import torch

from benchmarks.cases.scar.inputs import (
    RTOL,
    coder_of,
    original_encode,
    original_gated_add,
    original_steer,
    rows_of,
    shape_of,
)
from benchmarks.cases.tfree.inputs import default_dtype
from benchmarks.harness import Case, Options, register
from shared_kernels import scar_scores, scar_steer

ROWS = (1, 16, 256)
MULTIPLIER = -5.0
ALPHA = 0.4


def _case(name: str, N: int, options: Options, **contenders: object) -> Case:
    d, n, k = shape_of(options)
    dtype = default_dtype(options)
    itemsize = torch.finfo(torch.float32 if dtype == "float32" else torch.bfloat16).bits // 8
    passes = 1 if "detect" in name else 2
    return Case(
        name=name,
        rtol=RTOL[dtype],
        flops=(6.0 + 2.0 * passes) * N * d,
        bytes=float(passes * (N * d * itemsize + 4 * d)),
        size={"N": N, "D": d, "n": n, "k": k},
        dtype=dtype,
        memory=False,
        **contenders,  # type: ignore[arg-type]
    )


def _register(N: int) -> None:
    @register(f"scar.steer.scale.n{N}")
    def scale(options: Options) -> Case:
        """The original's output less what the coder does not reconstruct is ours."""
        dtype = default_dtype(options)
        coder = coder_of(shape_of(options), options.device, dtype)
        x = rows_of(N, shape_of(options).d, options, dtype)
        concept, strength = coder.concept(), torch.full((1, 1), MULTIPLIER - 1.0, device=options.device)
        error = original_steer(x, coder, 1.0) - x
        compiled = torch.compile(scar_steer, fullgraph=True)
        return _case(
            f"scar.steer.scale.n{N}",
            N,
            options,
            ours=torch.inference_mode()(lambda: scar_steer(x, *concept, strength, rule="scale")[0]),
            peers={
                "original": torch.inference_mode()(lambda: original_steer(x, coder, MULTIPLIER)),
                "ours, compiled": torch.inference_mode()(lambda: compiled(x, *concept, strength, rule="scale")[0]),
            },
            views={"original": lambda out: out - error},
        )

    @register(f"scar.steer.add_gated.n{N}")
    def add_gated(options: Options) -> Case:
        dtype = default_dtype(options)
        coder = coder_of(shape_of(options), options.device, dtype)
        x = rows_of(N, shape_of(options).d, options, dtype)
        concept, strength = coder.concept(), torch.full((1, 1), ALPHA, device=options.device)
        compiled = torch.compile(scar_steer, fullgraph=True)
        return _case(
            f"scar.steer.add_gated.n{N}",
            N,
            options,
            ours=torch.inference_mode()(lambda: scar_steer(x, *concept, strength, rule="add_gated")[0]),
            peers={
                "original": torch.inference_mode()(lambda: original_gated_add(x, coder, ALPHA)),
                "ours, compiled": torch.inference_mode()(lambda: compiled(x, *concept, strength, rule="add_gated")[0]),
            },
        )

    @register(f"scar.steer.detect.n{N}")
    def detect(options: Options) -> Case:
        dtype = default_dtype(options)
        coder = coder_of(shape_of(options), options.device, dtype)
        x = rows_of(N, shape_of(options).d, options, dtype)
        concept = coder.concept()[:3]
        return _case(
            f"scar.steer.detect.n{N}",
            N,
            options,
            ours=torch.inference_mode()(lambda: scar_scores(x, *concept)),
            peers={"full encode": torch.inference_mode()(lambda: original_encode(x, coder)[0])},
            views={"full encode": lambda latents: latents[:, :1]},
        )


for _N in ROWS:
    _register(_N)
