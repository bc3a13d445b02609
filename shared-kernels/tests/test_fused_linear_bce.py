import subprocess
import sys

import pytest
import torch

from shared_kernels import fused_linear_bce
from shared_kernels.fused_linear_bce import eager
from shared_kernels.fused_linear_bce.eager import fused_linear_bce_eager
from shared_kernels.fused_linear_bce.reference import fused_linear_bce_reference
from shared_kernels.testing import random_sets, tolerances

SHAPES = [
    pytest.param(1, 1, 1, None, id="smallest"),
    pytest.param(7, 31, 5, None, id="one-chunk"),
    pytest.param(7, 30, 5, 3, id="three-chunks"),
    pytest.param(9, 5, 3, 1, id="a-row-at-a-time"),
    pytest.param(3, 2100, 4, 2, id="two-blocks-of-columns"),
    pytest.param(0, 3, 4, None, id="no-rows"),
]
POSITIVES = [pytest.param(0, id="no-positives"), pytest.param(200, id="positives")]


def case(N, V, D, longest=4, dtype=torch.float32, index=torch.int32):
    x, weight = torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    row_weight = torch.rand(N, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    return x, weight, *random_sets(N, V, longest, index), row_weight


def assert_equal_with_gradients(actual, expected, inputs, tolerance):
    torch.testing.assert_close(actual.double(), expected, **tolerance)
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs) for loss in (actual, expected)), strict=True):
        size = float(theirs.abs().max()) if theirs.any() else 1.0
        torch.testing.assert_close(ours / size, theirs / size, **tolerance)


@pytest.mark.parametrize("longest", POSITIVES)
@pytest.mark.parametrize(("N", "V", "D", "chunk_rows"), SHAPES)
def test_loss_and_gradients_equal_the_definition(run, N, V, D, chunk_rows, longest):
    x, weight, *positives, row_weight = case(N, V, D, longest)
    scale = torch.tensor(0.37, requires_grad=True)
    keywords = {"pos_weight": 30.0, "scale": scale, "row_weight": row_weight}
    expected = fused_linear_bce_reference(x, weight, *positives, **keywords)
    actual = run(fused_linear_bce, x, weight, *positives, **keywords, chunk_rows=chunk_rows)
    inputs = [x, weight, row_weight, scale]
    assert_equal_with_gradients(actual, expected, inputs, tolerances(torch.float32, N + V))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(run, dtype):
    x, weight, *positives, _ = case(9, 40, 6, 10, dtype)
    expected = fused_linear_bce_reference(x, weight, *positives, pos_weight=3.0)
    actual = run(fused_linear_bce, x, weight, *positives, pos_weight=3.0, chunk_rows=2)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6 if run.impl == "eager" else 1e-2, atol=0.0)
    assert_equal_with_gradients(actual, expected, [x, weight], tolerances(dtype, 40))


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_float64_equals_dense_targets_to_ten_digits(chunk_rows):
    x, weight, *positives, row_weight = case(8, 50, 6, 9, torch.float64)
    x = (10 * x).detach().requires_grad_()  # logits far out, where softplus and sigmoid saturate
    keywords = {"pos_weight": 300.0, "row_weight": row_weight, "scale": 0.01}
    expected = fused_linear_bce_reference(x, weight, *positives, **keywords)
    actual = fused_linear_bce(x, weight, *positives, **keywords, chunk_rows=chunk_rows)
    assert_equal_with_gradients(actual, expected, [x, weight, row_weight], {"rtol": 1e-10, "atol": 1e-10})


def test_one_negative_and_one_positive_at_zero_logits_cost_the_logarithm_of_two_each(run):
    x, weight = torch.zeros(1, 3), torch.zeros(2, 3)
    loss = run(fused_linear_bce, x, weight, torch.tensor([0, 1]), torch.tensor([1]), pos_weight=5.0, scale=2.0)
    assert loss.item() == pytest.approx(2.0 * (1 + 5.0) * 0.6931472, rel=1e-6)


def test_logits_that_saturate_give_finite_losses_and_gradients(run):
    x, weight = torch.tensor([[1.0], [-1.0]], requires_grad=True), torch.tensor([[200.0], [-200.0], [0.0]])
    ptr, rows = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1])
    loss = run(fused_linear_bce, x, weight, ptr, rows, pos_weight=1.0)
    expected = fused_linear_bce_reference(x, weight, ptr, rows, pos_weight=1.0)
    assert_equal_with_gradients(loss, expected, [x], {"rtol": 1e-6, "atol": 1e-6})


def test_tiny_losses_keep_their_relative_precision(run):
    x, weight = torch.full((2, 1), -30.0), torch.ones(1000, 1)
    loss = run(fused_linear_bce, x, weight, torch.zeros(3).int(), torch.zeros(0).int(), pos_weight=1.0)
    assert loss.item() == pytest.approx(2000 * 9.357622968839299e-14, rel=1e-4)


def test_rows_of_weight_zero_do_not_count(run):
    x, weight, *positives, _ = case(4, 9, 3)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    loss = run(fused_linear_bce, x, weight, *positives, pos_weight=2.0, row_weight=keep)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[1::2].eq(0).all()
    assert grad[::2].ne(0).any(1).all()


def test_all_rows_of_weight_zero_give_zero_with_zero_gradients(run):
    x, weight, *positives, _ = case(4, 9, 3)
    loss = run(fused_linear_bce, x, weight, *positives, pos_weight=2.0, row_weight=torch.zeros(4))
    assert loss.item() == 0.0
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, [x, weight]))


def test_the_chunk_changes_nothing_but_rounding(run):
    x, weight, *positives, _ = case(10, 33, 6)
    losses = [run(fused_linear_bce, x, weight, *positives, pos_weight=7.0, chunk_rows=n) for n in (1, 4, 10, 99)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], **tolerances(torch.float32, 330))


def test_no_gradient_is_formed_under_no_grad(run):
    x, weight, *positives, _ = case(5, 9, 3)
    with torch.no_grad():
        loss = run(fused_linear_bce, x, weight, *positives, pos_weight=2.0)
    assert not loss.requires_grad
    expected = fused_linear_bce_reference(x, weight, *positives, pos_weight=2.0).detach()
    torch.testing.assert_close(loss.double(), expected, **tolerances(torch.float32, 45))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_argument_gets_no_gradient_and_the_other_one_does(run, frozen):
    x, weight, *positives, _ = case(5, 9, 3)
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    run(fused_linear_bce, x, weight, *positives, pos_weight=2.0).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


def test_gradients_have_the_same_bits_every_time(run):
    x, weight, *positives, _ = case(20, 30, 8, 10)
    runs = [
        torch.autograd.grad(run(fused_linear_bce, x, weight, *positives, pos_weight=2.0, chunk_rows=7), [x, weight])
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_strides_of_the_arguments_do_not_matter(run):
    x, weight, *positives, row_weight = (each.detach() for each in case(6, 9, 4))
    expected = fused_linear_bce_reference(x, weight, *positives, pos_weight=2.0, row_weight=row_weight)
    strided = [each.repeat_interleave(2)[::2] for each in (*positives, row_weight)]
    actual = run(
        fused_linear_bce,
        x.T.contiguous().T,
        weight.T.contiguous().T,
        *strided[:2],
        pos_weight=2.0,
        row_weight=strided[2],
    )
    torch.testing.assert_close(actual.double(), expected, **tolerances(torch.float32, 54))


def test_gradients_agree_with_finite_differences():
    x, weight, *positives, row_weight = case(3, 5, 2, 3, torch.float64)

    def function(x, weight, row_weight):
        return fused_linear_bce_eager(
            x, weight, *positives, pos_weight=2.0, row_weight=row_weight, scale=0.5, chunk_rows=2
        )

    assert torch.autograd.gradcheck(function, (x, weight, row_weight))


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_that_of_the_arguments(run):
    x, weight, *positives, _ = case(6, 9, 4)
    expected = run(fused_linear_bce, x.bfloat16(), weight.bfloat16(), *positives, pos_weight=2.0)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()),
    ):
        loss = run(fused_linear_bce, x, weight, *positives, pos_weight=2.0)
    torch.testing.assert_close(loss, expected)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, [x, weight]))


@pytest.mark.triton
@pytest.mark.parametrize("needs", [True, False])
def test_the_operator_is_well_registered(needs):
    from shared_kernels.fused_linear_bce.op import _fused_linear_bce

    x, weight, *positives, row_weight = case(3, 9, 4)
    x, weight = (each.detach().requires_grad_(needs) for each in (x, weight))
    torch.library.opcheck(_fused_linear_bce, (x, weight, row_weight.detach(), *positives, 2.0, 2, needs, needs))


def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(impl):
    x, weight, *positives, row_weight = case(6, 9, 4)

    def function(x, weight, row_weight):
        return fused_linear_bce(x, weight, *positives, pos_weight=2.0, row_weight=row_weight, chunk_rows=4, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [x, weight, row_weight]
    actual, expected = (torch.autograd.grad(each(*inputs), inputs) for each in (compiled, function))
    torch.testing.assert_close(actual, expected)


def test_products_of_another_dtype_are_added_slice_by_slice(monkeypatch):
    monkeypatch.setattr(eager, "_CHUNK_BYTES", 4 * 6 * 2)  # two rows of six columns
    total, a, b = torch.ones(5, 6), torch.randn(5, 3).bfloat16(), torch.randn(3, 6).bfloat16()
    expected = 1.0 + a.double() @ b.double()
    eager._add_product(total, a, b)
    torch.testing.assert_close(total.double(), expected, **tolerances(torch.bfloat16, 3))


MEMORY = """
import torch
from shared_kernels import fused_linear_bce

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
N, V, D, chunk_rows = 2048, 4000, 256, 512
x, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
ptr, rows = torch.arange(N + 1) * 40, torch.arange(N * 40) % V
def loss(n):
    return fused_linear_bce(x[:n], weight, ptr[: n + 1], rows[: 40 * n], pos_weight=2.0, chunk_rows=chunk_rows)
loss(8).backward()  # libraries allocate their buffers with their first call
x.grad = weight.grad = None
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # reset the peak; ru_maxrss would keep that of the parent process
before = peak()
loss(N).backward()
print(peak() - before, 4 * (2 * V * D + 2 * N * D), 4 * chunk_rows * V)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_gradients_and_about_one_chunk():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=100)
    growth, gradients, chunk = map(int, done.stdout.split())
    assert growth < gradients + 1.6 * chunk  # all logits would be four chunks, and twice that for autograd


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have the shape \[N, D\], got \(2, 3, 4\)"),
        ({"weight": torch.zeros(5, 7)}, "weight must have the 4 columns of x, got 7"),
        ({"positive_ptr": torch.zeros(2).int()}, "positive_ptr must hold 4 numbers, one more than x has rows, got 2"),
        ({"positive_rows": torch.zeros(0)}, "positive_rows must be int32 or int64, got torch.float32"),
        ({"pos_weight": -1.0}, "pos_weight must be finite and at least 0, got -1.0"),
        ({"pos_weight": float("nan")}, "pos_weight must be finite and at least 0, got nan"),
        (
            {"row_weight": torch.zeros(2)},
            r"row_weight must be floating point with the shape \(3,\), one number per row",
        ),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1 or None, got 0"),
    ],
)
def test_an_error_names_the_argument(change, message):
    arguments = {
        "x": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "positive_ptr": torch.zeros(4).int(),
        "positive_rows": torch.zeros(0).int(),
        "pos_weight": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_bce(**(arguments | change))
