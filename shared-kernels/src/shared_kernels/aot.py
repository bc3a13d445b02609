"""Compile every kernel ahead of time, without a GPU: `python -m shared_kernels.aot --targets sm_80,sm_90,gfx942`.

Prints seconds, shared memory, registers and spills of each kernel, case and target. Exits with 1 if a kernel has no
case, does not compile, spills registers, or needs more shared memory than the target has.
"""

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ._launch import LAUNCH_OPTIONS, AotCase


class Target(NamedTuple):
    """A GPU to compile for, and the bytes of shared memory that one of its programs may use."""

    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_90": Target("cuda", 90, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}


class Result(NamedTuple):
    """What a compilation cost and what the compiled kernel needs; None where the tools do not tell."""

    seconds: float
    shared_memory: int
    registers: int | None
    spills: int | None


def kernel_modules() -> Iterator[ModuleType]:
    """The `kernel` module of every operator in this package."""
    package = importlib.import_module(__package__ or "shared_kernels")
    for found in pkgutil.iter_modules(package.__path__):
        if found.ispkg:
            yield importlib.import_module(f"{package.__name__}.{found.name}.kernel")


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """The kernels that `module` defines, by name. Names with an underscore are device functions, not kernels."""
    from triton.runtime.jit import JITFunction

    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__ and not name.startswith("_")
    }


def collect(fast: bool) -> tuple[list[AotCase], list[str]]:
    """All cases, or one per kernel if `fast`, and the names of the kernels that have none."""
    cases: list[AotCase] = []
    uncovered = []
    for module in kernel_modules():
        for name, kernel in kernels_of(module).items():
            own = [case for case in module.AOT_CASES if case.kernel is kernel]
            cases += own[:1] if fast else own
            if not own:
                uncovered.append(f"{module.__name__}.{name}")
    return cases, uncovered


def compile_case(case: AotCase, target: Target) -> Result:
    """Compile one specialization for one target. Pointers are taken as aligned, as those of torch are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned: Any = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in case.aligned
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constexprs, attrs=aligned)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    start = time.perf_counter()
    compiled = triton.compile(source, target=gpu, options={"num_warps": case.num_warps, **LAUNCH_OPTIONS})
    seconds = time.perf_counter() - start
    usage = _cuda_usage if target.backend == "cuda" else _hip_usage
    return Result(seconds, compiled.metadata.shared, *usage(compiled.asm))


def problems_of(result: Result, target: Target) -> list[str]:
    """Why the compiled kernel is not acceptable on the target; empty if it is."""
    found = []
    if result.shared_memory > target.shared_memory:
        found.append(f"shared memory {result.shared_memory} > {target.shared_memory}")
    if result.spills:
        found.append(f"{result.spills} bytes or registers spilled")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is returned."""
    parser = argparse.ArgumentParser(prog="python -m shared_kernels.aot", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of: " + ", ".join(TARGETS))
    parser.add_argument("--fast", action="store_true", help="one case per kernel and target")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := sorted(set(targets) - TARGETS.keys()):
        parser.error(f"--targets: {unknown} not among {sorted(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    with tempfile.TemporaryDirectory() as cache:  # else a second run would only read the first one's results
        os.environ["TRITON_CACHE_DIR"] = cache
        return _report(targets, options.fast)


def _report(targets: list[str], fast: bool) -> int:
    cases, uncovered = collect(fast)
    failures = [f"{name} has no case in AOT_CASES" for name in uncovered]
    print(f"{'kernel':36} {'case':44} {'target':7} {'s':>5} {'shared':>7} {'regs':>5} {'spills':>6}")
    started = time.perf_counter()
    for case in cases:
        for name in targets:
            label = f"{case.kernel.fn.__name__:36} {_describe(case):44} {name:7}"
            try:
                result = compile_case(case, TARGETS[name])
            except Exception as error:  # noqa: BLE001 (a compiler raises anything; the run reports it and goes on)
                failures.append(f"{label}: {type(error).__name__}: {error}")
                continue
            registers, spills = ("-" if value is None else value for value in result[2:])
            print(f"{label} {result.seconds:5.2f} {result.shared_memory:7} {registers:>5} {spills:>6}", flush=True)
            failures += [f"{label}: {problem}" for problem in problems_of(result, TARGETS[name])]
    print(f"{len(cases)} cases for {len(targets)} targets in {time.perf_counter() - started:.0f} s")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _describe(case: AotCase) -> str:
    types = sorted({kind.lstrip("*") for kind in case.signature.values() if kind.startswith("*")})
    numbers = [f"{name}={value}" for name, value in case.constexprs.items()]
    return " ".join(["/".join(types), *numbers, f"warps={case.num_warps}"])


def _cuda_usage(asm: dict[str, Any]) -> tuple[int | None, int | None]:
    """Registers per thread and bytes of local memory, which holds what did not fit, as cuobjdump states them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [str(tool), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"\b{name}:(\d+)", text) for name in ("REG", "STACK", "LOCAL"))
    if registers is None or stack is None or local is None:
        return None, None
    return int(registers[1]), int(stack[1]) + int(local[1])


def _hip_usage(asm: dict[str, Any]) -> tuple[int | None, int | None]:
    """Vector registers per thread and how many were spilled, from the metadata in the assembly."""
    registers, spills = (re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"]) for name in ("vgpr_count", "vgpr_spill_count"))
    return (int(registers[1]) if registers else None), (int(spills[1]) if spills else None)


if __name__ == "__main__":
    sys.exit(main())
