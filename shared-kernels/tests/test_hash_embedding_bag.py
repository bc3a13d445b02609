import pytest
import torch
import torch.nn.functional as F

from shared_kernels import hash_embedding_bag
from shared_kernels.hash_embedding_bag.eager import hash_embedding_bag_eager
from shared_kernels.hash_embedding_bag.reference import hash_embedding_bag_reference
from shared_kernels.testing import random_csr, tolerances

SHAPES = [
    pytest.param(1, 1, 1, 1, 1, 1, id="smallest"),
    pytest.param(7, 31, 3, 20, 13, 6, id="no-power-of-two"),
    pytest.param(4, 5, 19, 40, 9, 5, id="more-than-a-block-of-rows"),
    pytest.param(5, 6, 4, 30, 520, 4, id="two-blocks-of-columns"),
    pytest.param(12, 3, 2, 8, 16, 9, id="few-units-often"),
    pytest.param(0, 4, 3, 5, 4, 3, id="no-words"),
    pytest.param(4, 6, 5, 9, 4, 0, id="words-without-units"),
    pytest.param(3, 4, 2, 6, 0, 3, id="no-columns"),
]


def case(W, U, m, V, D, longest, dtype=torch.float32, index=torch.int32):
    word_ptr, word_units = random_csr(W, U, longest, index)
    unit_rows = torch.randint(0, V, (U, m)).to(index)
    return word_ptr, word_units, unit_rows, torch.randn(V, D).to(dtype).requires_grad_()


def assert_equal_with_gradient(actual, expected, table, tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)
    if not expected.requires_grad:  # nothing was summed
        return
    grad = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, table, grad)[0] for out in (actual, expected))
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(("W", "U", "m", "V", "D", "longest"), SHAPES)
def test_sums_and_gradient_equal_the_definition(run, W, U, m, V, D, longest):
    *lists, table = case(W, U, m, V, D, longest)
    expected = hash_embedding_bag_reference(*lists, table)
    tolerance = tolerances(torch.float32, m * longest * 4)
    assert_equal_with_gradient(run(hash_embedding_bag, *lists, table), expected, table, tolerance)


def test_lists_may_be_int64(run):
    *lists, table = case(7, 31, 3, 20, 13, 6, index=torch.int64)
    expected = hash_embedding_bag_reference(*lists, table)
    assert_equal_with_gradient(run(hash_embedding_bag, *lists, table), expected, table, tolerances(torch.float32, 72))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32_over_both_levels(run, dtype):
    *lists, table = case(6, 9, 10, 30, 12, 8, dtype)
    expected = hash_embedding_bag_reference(*lists, table)
    assert_equal_with_gradient(run(hash_embedding_bag, *lists, table), expected, table, tolerances(dtype, 160))


def test_float64_is_summed_in_float64():
    *lists, table = case(7, 31, 3, 20, 13, 6, torch.float64)
    expected = hash_embedding_bag_reference(*lists, table)
    torch.testing.assert_close(hash_embedding_bag(*lists, table), expected, rtol=1e-13, atol=1e-13)


def test_rows_count_as_often_as_the_units_of_a_word_hold_them(run):
    table = torch.tensor([[1.0], [10.0], [100.0]])
    unit_rows = torch.tensor([[0, 1], [1, 1]])
    out = run(hash_embedding_bag, torch.tensor([0, 2, 5, 5]), torch.tensor([0, 1, 1, 1, 0]), unit_rows, table)
    assert out.tolist() == [[31.0], [51.0], [0.0]]


def test_the_factored_sum_equals_the_flat_one(run):
    word_ptr, word_units, unit_rows, table = case(9, 14, 4, 25, 8, 6)
    flat = F.embedding_bag(unit_rows[word_units].reshape(-1), table, word_ptr * 4, mode="sum", include_last_offset=True)
    factored = run(hash_embedding_bag, word_ptr, word_units, unit_rows, table)
    torch.testing.assert_close(factored, flat, **tolerances(torch.float32, 24))


@pytest.mark.triton
def test_a_small_buffer_only_cuts_the_columns_into_slices(run, monkeypatch):
    from shared_kernels.hash_embedding_bag import kernel

    *lists, table = case(5, 6, 3, 20, 300, 4)
    monkeypatch.setattr(kernel, "BUFFER_ELEMENTS", 1)
    expected = hash_embedding_bag_reference(*lists, table)
    assert_equal_with_gradient(run(hash_embedding_bag, *lists, table), expected, table, tolerances(torch.float32, 60))


def test_strides_of_the_arguments_do_not_matter(run):
    *lists, table = (each.detach() for each in case(7, 31, 3, 20, 13, 6))
    strided = [each.repeat_interleave(2, 0)[::2] for each in lists]
    actual = run(hash_embedding_bag, *strided, table.T.contiguous().T)
    torch.testing.assert_close(actual, hash_embedding_bag_reference(*lists, table), **tolerances(torch.float32, 18))


def test_the_gradient_has_the_same_bits_every_time(run):
    *lists, table = case(40, 5, 6, 12, 16, 20)
    grad = torch.randn(40, 16)
    first, second = (torch.autograd.grad(run(hash_embedding_bag, *lists, table), table, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_gradient_agrees_with_finite_differences():
    *lists, table = case(4, 6, 3, 7, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda t: hash_embedding_bag_eager(*lists, t), (table,))


@pytest.mark.triton
def test_the_operator_is_well_registered():
    from shared_kernels.hash_embedding_bag.op import _hash_embedding_bag

    torch.library.opcheck(_hash_embedding_bag, case(3, 6, 2, 9, 5, 3))


def test_a_compiled_graph_has_no_breaks_and_the_same_gradient(impl):
    *lists, table = case(5, 9, 3, 12, 10, 4)

    def function(t):
        return hash_embedding_bag(*lists, t, impl=impl).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(table), table), torch.autograd.grad(function(table), table))


def test_an_exported_program_takes_other_words():
    class Module(torch.nn.Module):
        def forward(self, word_ptr, word_units, unit_rows, table):
            return hash_embedding_bag(word_ptr, word_units, unit_rows, table)

    unit_rows, table = torch.randint(0, 7, (5, 3)), torch.randn(7, 9)
    arguments = (torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), unit_rows, table)
    shapes = ({}, {0: torch.export.Dim("nnz")}, {}, {})
    program = torch.export.export(Module(), arguments, dynamic_shapes=shapes)
    other = (torch.tensor([0, 1, 5]), torch.tensor([3, 2, 1, 4, 4]), unit_rows, table)
    torch.testing.assert_close(program.module()(*other), hash_embedding_bag_reference(*other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word_ptr": torch.zeros(2)}, "word_ptr must be int32 or int64, got torch.float32"),
        ({"word_units": torch.zeros(1, 1).int()}, r"word_units must have the shape \[nnz\], got \(1, 1\)"),
        ({"unit_rows": torch.zeros(4).int()}, r"unit_rows must have the shape \[U, m\], got \(4,\)"),
        ({"table": torch.zeros(4, 5, 6)}, r"table must have the shape \[V, D\], got \(4, 5, 6\)"),
        (
            {"unit_rows": torch.zeros(4, 2, dtype=torch.int32, device="meta")},
            "unit_rows must be on the device of table",
        ),
    ],
)
def test_an_error_names_the_argument(change, message):
    arguments = {
        "word_ptr": torch.tensor([0, 1]),
        "word_units": torch.tensor([0]),
        "unit_rows": torch.zeros(4, 2).int(),
        "table": torch.zeros(4, 5),
    }
    with pytest.raises(ValueError, match=message):
        hash_embedding_bag(**(arguments | change))
