import pytest
import torch

from shared_kernels import csr_gather_sum
from shared_kernels.csr_gather_sum.eager import csr_gather_sum_eager
from shared_kernels.csr_gather_sum.reference import csr_gather_sum_reference
from shared_kernels.testing import random_csr, tolerances

SHAPES = [
    pytest.param(1, 1, 1, 1, id="smallest"),
    pytest.param(7, 31, 13, 5, id="no-power-of-two"),
    pytest.param(5, 9, 130, 40, id="more-than-a-block-of-entries"),
    pytest.param(2, 4, 1030, 3, id="two-blocks-of-columns"),
    pytest.param(6, 8, 1, 4, id="one-column"),
    pytest.param(0, 4, 3, 2, id="no-rows"),
    pytest.param(4, 4, 3, 0, id="no-entries"),
    pytest.param(3, 4, 0, 2, id="no-columns"),
]
HALF = [torch.bfloat16, torch.float16]


def case(R, C, D, longest, dtype=torch.float32):
    indptr, indices = random_csr(R, C, longest)
    table, weights = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((C, D), (indices.numel(),)))
    return indptr, indices, table, weights


def assert_equal_with_gradients(actual, expected, inputs, tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)
    if not expected.requires_grad:  # nothing was summed
        return
    grad = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, grad) for out in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(("R", "C", "D", "longest"), SHAPES)
def test_sums_and_gradients_equal_the_definition(run, R, C, D, longest):
    indptr, indices, table, weights = case(R, C, D, longest)
    tolerance = tolerances(torch.float32, longest * 4 + D)
    plain, weighted = (run(csr_gather_sum, indptr, indices, table, each) for each in (None, weights))
    assert_equal_with_gradients(plain, csr_gather_sum_reference(indptr, indices, table), [table], tolerance)
    expected = csr_gather_sum_reference(indptr, indices, table, weights)
    assert_equal_with_gradients(weighted, expected, [table, weights], tolerance)


@pytest.mark.parametrize("index", [(torch.int64, torch.int64), (torch.int32, torch.int64)], ids=["int64", "mixed"])
def test_lists_may_be_int64(run, index):
    indptr, indices, table, weights = case(7, 31, 13, 5)
    expected = csr_gather_sum_reference(indptr, indices, table, weights)
    actual = run(csr_gather_sum, indptr.to(index[0]), indices.to(index[1]), table, weights)
    assert_equal_with_gradients(actual, expected, [table, weights], tolerances(torch.float32, 13))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_summed_in_float32(run, dtype):
    indptr, indices, table, weights = case(4, 20, 9, 60, dtype)
    expected = csr_gather_sum_reference(indptr, indices, table, weights)
    actual = run(csr_gather_sum, indptr, indices, table, weights)
    assert_equal_with_gradients(actual, expected, [table, weights], tolerances(dtype, 60))


def test_float64_is_summed_in_float64():
    indptr, indices, table, weights = case(7, 31, 13, 5, torch.float64)
    expected = csr_gather_sum_reference(indptr, indices, table, weights)
    torch.testing.assert_close(csr_gather_sum(indptr, indices, table, weights), expected, rtol=1e-13, atol=1e-13)


def test_a_repeated_index_counts_every_time(run):
    table = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    out = run(csr_gather_sum, torch.tensor([0, 3, 3]), torch.tensor([1, 1, 0]), table)
    assert out.tolist() == [[21.0, 42.0], [0.0, 0.0]]


def test_strides_of_the_arguments_do_not_matter(run):
    indptr, indices, table, weights = (each.detach() for each in case(7, 31, 13, 5))
    expected = csr_gather_sum_reference(indptr, indices, table, weights)
    doubled = [each.repeat_interleave(2)[::2] for each in (indptr, indices)]
    strided = run(csr_gather_sum, *doubled, table.T.contiguous().T, weights.repeat_interleave(2)[::2])
    torch.testing.assert_close(strided, expected, **tolerances(torch.float32, 5))


def test_a_transposed_column_is_a_table_like_any_other(run):
    indptr, indices = random_csr(5, 20, 6)
    column = torch.randn(1, 20).T  # strides (1, 20), which .contiguous() would keep
    expected = csr_gather_sum_reference(indptr, indices, column)
    torch.testing.assert_close(run(csr_gather_sum, indptr, indices, column), expected, **tolerances(torch.float32, 6))


def test_gradients_have_the_same_bits_every_time(run):
    indptr, indices, table, weights = case(40, 5, 16, 30)
    grad = torch.randn(40, 16)
    runs = [
        torch.autograd.grad(run(csr_gather_sum, indptr, indices, table, weights), [table, weights], grad)
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_only_the_gradients_that_are_needed_are_formed(run):
    indptr, indices, table, weights = case(7, 31, 13, 5)
    run(csr_gather_sum, indptr, indices, table.detach(), weights).sum().backward()
    run(csr_gather_sum, indptr, indices, table, weights.detach()).sum().backward()
    assert table.grad is not None
    assert weights.grad is not None


def test_gradients_agree_with_finite_differences():
    indptr, indices, table, weights = case(4, 6, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda t, w: csr_gather_sum_eager(indptr, indices, t, w), (table, weights))


@pytest.mark.triton
@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_is_well_registered(weighted):
    from shared_kernels.csr_gather_sum.op import _csr_gather_sum

    indptr, indices, table, weights = case(3, 6, 5, 3)
    torch.library.opcheck(_csr_gather_sum, (indptr, indices, table, weights if weighted else None))


def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(impl):
    indptr, indices, table, weights = case(5, 9, 12, 4)

    def function(t, w):
        return csr_gather_sum(indptr, indices, t, w, impl=impl).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(table, weights), [table, weights])
    actual = torch.autograd.grad(compiled(table, weights), [table, weights])
    torch.testing.assert_close(actual, expected)


def test_an_exported_program_takes_another_number_of_entries():
    class Module(torch.nn.Module):
        def forward(self, indptr, indices, table):
            return csr_gather_sum(indptr, indices, table)

    nnz = torch.export.Dim("nnz")
    arguments = (torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.randn(4, 9))
    program = torch.export.export(Module(), arguments, dynamic_shapes=({}, {0: nnz}, {}))
    other = (torch.tensor([0, 1, 5]), torch.tensor([3, 2, 1, 0, 0]), torch.randn(4, 9))
    torch.testing.assert_close(program.module()(*other), csr_gather_sum_reference(*other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"indptr": torch.zeros(0, dtype=torch.int32)},
            "indptr must hold one more number than there are rows, got none",
        ),
        ({"indptr": torch.zeros(2, 2, dtype=torch.int32)}, r"indptr must have the shape \[rows \+ 1\], got \(2, 2\)"),
        ({"indices": torch.zeros(3)}, "indices must be int32 or int64, got torch.float32"),
        ({"table": torch.zeros(4, 5, dtype=torch.int32)}, "table must be floating point, got torch.int32"),
        ({"table": torch.zeros(4)}, r"table must have the shape \[C, D\], got \(4,\)"),
        (
            {"weights": torch.ones(2)},
            r"weights must have the shape \(3,\), one number per entry of indices, got \(2,\)",
        ),
        ({"weights": torch.ones(3).double()}, "weights must be torch.float32, got torch.float64"),
        ({"table": torch.zeros(4, 5, device="meta")}, r"indptr must be on the device of table \(meta\), got cpu; move"),
    ],
)
def test_an_error_names_the_argument(change, message):
    arguments = {"indptr": torch.tensor([0, 1, 3]), "indices": torch.tensor([0, 1, 2]), "table": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=message):
        csr_gather_sum(**(arguments | change))
