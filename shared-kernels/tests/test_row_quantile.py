import math

import pytest
import torch

from shared_kernels import row_quantile
from shared_kernels.row_quantile import op
from shared_kernels.row_quantile.reference import row_quantile_reference

SHAPES = [
    pytest.param(1, 1, id="smallest"),
    pytest.param(2, 2, id="two-numbers"),
    pytest.param(2, 257, id="no-power-of-two"),
    pytest.param(1, 1024, id="a-whole-block"),
    pytest.param(1, 1025, id="the-next-block"),
    pytest.param(0, 9, id="no-rows"),
]


@pytest.fixture
def number_patterns():
    """Rows in which something is equal, signed or infinitesimal."""
    return torch.stack(
        [
            torch.zeros(12),
            torch.tensor([-0.0, 0.0] * 6),
            torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]),
            torch.arange(12.0) - 6,
            torch.tensor([1e-40, -1e-40, 3e38, -3e38, 1e-30, 0.0, 1.0, -1.0, 2e-45, 5.0, 5.0, 1.0]),
            torch.randn(12).exp(),
        ]
    )


@pytest.mark.parametrize(("R", "n"), SHAPES)
@pytest.mark.parametrize("q", [0.0, 0.25, 0.9])
def test_any_shape_equals_the_definition(run, R, n, q):
    S = torch.randn(R, n)
    out = run(row_quantile, S, q)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), row_quantile_reference(S, q), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("q", [1 / 11, 0.3, 0.75, 1.0])
def test_ties_signs_and_tiny_numbers(run, number_patterns, q):
    out = run(row_quantile, number_patterns, q)
    expected = row_quantile_reference(number_patterns, q)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-44)


def test_a_hand_computed_case(run):
    S = torch.tensor([[3.0, 1.0, 2.0, 4.0], [0.0, 0.0, 8.0, 0.0]])
    assert run(row_quantile, S, 0.75).tolist() == [3.25, 2.0]


def test_each_row_has_its_own_level(run):
    S, levels = torch.randn(6, 100), torch.tensor([0.9, 0.9, 0.1, 0.5, -1.0, 2.0])
    expected = row_quantile_reference(S, levels.clamp(0, 1))
    torch.testing.assert_close(run(row_quantile, S, levels).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [11, 101, 1001])
@pytest.mark.parametrize("q", [0.2, 0.9])
def test_a_number_at_the_rank_is_the_quantile_and_passes_the_comparison(run, n, q):
    S = torch.randn(2, n)
    quantile = run(row_quantile, S, q)
    rank = round(q * (n - 1))
    assert torch.equal(quantile, S.sort(1).values[:, rank])
    assert S.ge(quantile[:, None]).sum(1).tolist() == [n - rank] * 2


@pytest.mark.parametrize("q", [0.1, 0.95])
def test_a_row_with_a_nan_has_no_quantile_and_others_do(run, q):
    S = torch.randn(3, 50)
    S[1, 17] = math.nan
    out = run(row_quantile, S, q)
    assert out.isnan().tolist() == [False, True, False]


def test_infinite_numbers_beside_the_quantile_do_not_matter(run):
    S = torch.cat([torch.randn(2, 90), torch.full((2, 5), math.inf), torch.full((2, 5), -math.inf)], 1)
    torch.testing.assert_close(run(row_quantile, S, 0.5), S.quantile(0.5, dim=1))
    assert run(row_quantile, S, 1.0).tolist() == [math.inf] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 1000, 4096])
def test_the_pytorch_path_has_the_bits_of_torch_quantile(dtype, n):
    S = torch.randn(3, n, dtype=dtype).abs()
    for q in (0.0, 0.1, 1 / 3, 0.5, 0.8, 0.9, 0.999, 1.0):
        expected = torch.quantile(S, q, dim=1)
        assert torch.equal(row_quantile(S, q, impl="eager"), expected)
        assert torch.equal(row_quantile(S, torch.full((3,), q, dtype=dtype), impl="eager"), expected)


@pytest.mark.triton
def test_rows_longer_than_a_block(monkeypatch):
    from shared_kernels.row_quantile import kernel

    monkeypatch.setattr(kernel, "CONFIGS", ())
    monkeypatch.setattr(kernel, "LONG", kernel.Config(BLOCK=64, num_warps=1))
    S = torch.cat([torch.randn(1, 150), torch.ones(1, 50)], 1)
    for q in (0.4, 0.85):
        out = row_quantile(S, q, impl="triton")
        torch.testing.assert_close(out.double(), row_quantile_reference(S, q), rtol=1e-6, atol=1e-6)


@pytest.mark.triton
def test_the_kernel_is_a_valid_custom_op():
    torch.library.opcheck(op._row_quantile, (torch.randn(2, 20), None, 0.5))
    torch.library.opcheck(op._row_quantile, (torch.randn(2, 20), torch.rand(2), 0.0))


@pytest.mark.parametrize("per_row", [False, True], ids=["number", "tensor"])
def test_a_compiled_graph_has_no_breaks_and_the_same_result(impl, per_row):
    S = torch.randn(3, 40)
    q = torch.tensor([0.2, 0.9, 0.5]) if per_row else 0.9
    compiled = torch.compile(lambda S, q: row_quantile(S, q, impl=impl), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(S, q), row_quantile(S, q, impl=impl), rtol=0, atol=0)


def test_rows_apart_in_memory(run):
    wide = torch.randn(50, 2)
    torch.testing.assert_close(run(row_quantile, wide.T, 0.7), run(row_quantile, wide.T.contiguous(), 0.7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"S": torch.zeros(4)}, r"S must have the shape \[R, n\] with n in \[1, 16777216\], got \(4,\)"),
        ({"S": torch.zeros(2, 0)}, r"S must have the shape \[R, n\] with n in \[1, 16777216\], got \(2, 0\)"),
        ({"S": torch.zeros(2, 3).half()}, "S must be torch.float32 or torch.float64, got torch.float16; fewer bits"),
        ({"S": torch.zeros(2, 3).requires_grad_()}, "S must not require a gradient, got requires_grad=True: row_quant"),
        ({"q": 1.5}, r"q must lie in \[0, 1\], got 1.5"),
        ({"q": math.nan}, r"q must lie in \[0, 1\], got nan"),
        ({"q": torch.zeros(3)}, r"q must be a number, or floating point with the shape \(2,\), one per row of S, got"),
        ({"q": torch.zeros(2).int()}, r"q must be a number, or floating point .* got torch.int32 \(2,\)"),
        ({"q": torch.zeros(2, device="meta")}, r"q must be on the device of S \(cpu\), got meta"),
    ],
)
def test_an_error_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        row_quantile(**({"S": torch.zeros(2, 3), "q": 0.5} | change))
