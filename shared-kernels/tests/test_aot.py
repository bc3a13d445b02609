import os
import types

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from shared_kernels import aot
from shared_kernels.csr_gather_sum import kernel as gather_kernel
from shared_kernels.mix32_rows import kernel as mix32_kernel

SM_90 = aot.TARGETS["sm_90"]


def test_every_kernel_has_a_case_and_every_case_names_all_arguments():
    cases, uncovered = aot.collect(fast=False)
    assert uncovered == []
    for case in cases:
        assert sorted([*case.signature, *case.constexprs]) == sorted(case.kernel.arg_names)
        assert all(case.signature[name].startswith("i") for name in case.aligned)


def test_the_kernels_of_every_operator_are_found():
    found = {module.__name__.split(".")[1]: list(aot.kernels_of(module)) for module in aot.kernel_modules()}
    assert found["csr_gather_sum"] == ["csr_gather_sum_fwd_kernel", "csr_gather_sum_bwd_weights_kernel"]
    assert all(found[name] for name in ("decode_scores", "fused_linear_bce", "hash_embedding_bag", "mix32_rows"))


def test_every_row_of_a_config_table_has_a_case():
    warps = {case.num_warps for case in gather_kernel.AOT_CASES}
    tiles = {(case.constexprs["BLOCK_E"], case.constexprs["BLOCK_D"]) for case in gather_kernel.AOT_CASES}
    assert tiles == {(config.BLOCK_E, config.BLOCK_D) for config in gather_kernel.CONFIGS}
    assert warps == {config.num_warps for config in gather_kernel.CONFIGS}


def test_a_kernel_without_a_case_is_a_failure(monkeypatch, capsys):
    module = types.ModuleType(mix32_kernel.__name__)
    module.mix32_rows_kernel, module.AOT_CASES = mix32_kernel.mix32_rows_kernel, ()
    monkeypatch.setattr(aot, "kernel_modules", lambda: iter([module]))
    assert aot.main(["--targets", "sm_90"]) == 1
    assert "mix32_rows_kernel has no case in AOT_CASES" in capsys.readouterr().err


def test_a_kernel_compiles_for_a_gpu_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = aot.compile_case(mix32_kernel.AOT_CASES[0], SM_90)
    assert aot.problems_of(result, SM_90) == []
    assert result.registers is None or 0 < result.registers < 256


def test_spills_and_too_much_shared_memory_are_problems():
    result = aot.Result(seconds=1.0, shared_memory=232449, registers=255, spills=8)
    assert aot.problems_of(result, SM_90) == ["shared memory 232449 > 232448", "8 bytes or registers spilled"]


def test_a_case_that_does_not_compile_is_reported_and_the_others_go_on(monkeypatch, capsys):
    broken = mix32_kernel.AOT_CASES[0]._replace(constexprs={"BLOCK_U": 3, "BLOCK_M": 16})
    module = types.SimpleNamespace(AOT_CASES=(broken,), __name__="made_up")
    monkeypatch.setattr(aot, "kernel_modules", lambda: iter([module]))
    monkeypatch.setattr(aot, "kernels_of", lambda _: {"mix32_rows_kernel": broken.kernel})
    assert aot.main(["--targets", "sm_90"]) == 1
    printed = capsys.readouterr()
    assert "FAILED mix32_rows_kernel" in printed.err
    assert "1 cases for 1 targets" in printed.out


@pytest.mark.parametrize(
    ("arguments", "interprets", "message"),
    [
        (["--targets", "sm_10"], "0", "--targets: ['sm_10'] not among"),
        ([], "1", "unset TRITON_INTERPRET"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_do(monkeypatch, capsys, arguments, interprets, message):
    monkeypatch.setenv("TRITON_INTERPRET", interprets)
    with pytest.raises(SystemExit):
        aot.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_one_case_of_every_kernel_compiles_for_every_target(capsys):
    assert aot.main(["--fast"]) == 0
    assert "for 3 targets" in capsys.readouterr().out
