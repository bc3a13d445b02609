import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared_kernels import sae_encode_topk, topk_select, topk_sparse_decode
from shared_kernels.sparse_coder import eager
from shared_kernels.sparse_coder.eager import most_gathered, sae_encode_topk_eager, topk_sparse_decode_eager
from shared_kernels.sparse_coder.reference import (
    sae_encode_topk_reference,
    topk_select_reference,
    topk_sparse_decode_reference,
)
from shared_kernels.testing import tolerances

HALF = [torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
SELECTIONS = [
    pytest.param(1, 1, 1, 0, id="smallest"),
    pytest.param(3, 31, 5, 0, id="no-power-of-two"),
    pytest.param(3, 31, 5, 2, id="two-always"),
    pytest.param(3, 31, 31, 0, id="all"),
    pytest.param(3, 31, 31, 1, id="all-but-the-first-is-all"),
    pytest.param(3, 31, 1, 31, id="always-all"),
    pytest.param(2, 1100, 60, 3, id="two-blocks-or-thinned"),
    pytest.param(0, 9, 2, 1, id="no-rows"),
]
DECODINGS = [  # N, n, K, d
    pytest.param(1, 1, 1, 1, id="smallest"),
    pytest.param(5, 40, 3, 33, id="no-power-of-two"),
    pytest.param(6, 40, 30, 33, id="dense"),
    pytest.param(3, 90, 5, 100, id="two-blocks-of-columns"),
    pytest.param(1, 300, 140, 530, id="one-row-split"),
    pytest.param(0, 9, 2, 4, id="no-rows"),
    pytest.param(3, 9, 0, 4, id="no-entries"),
    pytest.param(3, 9, 2, 0, id="no-columns"),
]
ENCODINGS = [  # N, n, k, d, always
    pytest.param(1, 1, 1, 1, 0, id="smallest"),
    pytest.param(5, 40, 3, 33, 0, id="no-power-of-two"),
    pytest.param(5, 40, 3, 33, 3, id="three-always"),
    pytest.param(6, 40, 30, 9, 1, id="dense"),
    pytest.param(3, 12, 12, 64, 12, id="all"),
    pytest.param(0, 9, 2, 4, 1, id="no-rows"),
]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoding(N, n, K, d, dtype=torch.float32):
    """Indices without repeats, and everything that a gradient goes to."""
    indices = torch.stack([torch.randperm(n)[:K] for _ in range(N)]) if N else torch.zeros(0, K)
    shapes = {"values": (N, K), "rows": (n, d), "scale": (N,), "shift": (N,), "bias": (d,)}
    return indices.int(), {
        name: numbers(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    }


def encoding(N, n, d, dtype=torch.float32):
    shapes = {"x": (N, d), "encoder": (n, d), "latent_bias": (n,), "pre_bias": (d,)}
    return {
        name: numbers(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    }


def assert_equal_with_gradients(actual, expected, inputs, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerance)
    grad = numbers(*expected.shape, seed=9)
    ours, theirs = (
        torch.autograd.grad(out, list(inputs.values()), grad.to(out.dtype), allow_unused=True)
        for out in (actual, expected)
    )
    for name, got, want in zip(inputs, ours, theirs, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            largest = want.abs().max().clamp_min(1).item() if want.numel() else 1.0
            torch.testing.assert_close(
                got / largest, want / largest, **tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


class Calls(TorchDispatchMode):
    """Names of the operators that run, and the size of the largest dense tensor that comes out of one."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        dense = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and not each.is_sparse_csr]
        sizes = [each.numel() for each in dense]
        self.largest = max([self.largest, *sizes])
        return out


# selection


@pytest.mark.parametrize(("N", "n", "k", "always"), SELECTIONS)
def test_the_selection_equals_the_definition(run, N, n, k, always):
    pre = numbers(N, n)
    values, indices = run(topk_select, pre, k, always=always)
    want_values, want_indices = topk_select_reference(pre, k, always=always)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, want_indices)
    assert torch.equal(values, want_values)


@pytest.mark.parametrize(("n", "k"), [(20, 6), (600, 50)])
def test_the_lower_index_wins_a_tie(run, n, k):
    pre = torch.randint(0, 4, (3, n), generator=torch.Generator().manual_seed(0)).float()
    pre[0] = 1.0
    pre[1, ::2] = -0.0  # equal to the other zero
    assert torch.equal(run(topk_select, pre, k, always=1)[1], topk_select_reference(pre, k, always=1)[1])
    assert run(topk_select, pre, k)[1][0].tolist() == list(range(k))


@pytest.mark.parametrize(("n", "k"), [(20, 6), (600, 50)])
def test_nan_is_kept_and_infinities_are_numbers(run, n, k):
    pre = numbers(5, n)
    pre[0, 7] = NAN
    pre[1, n // 2 :] = NAN  # more than k
    pre[2] = -INF
    pre[3, 3:9], pre[3, 9:] = INF, -INF
    pre[4, 3], pre[4, 4], pre[4, 5] = INF, NAN, -NAN
    values, indices = run(topk_select, pre, k)
    want_values, want_indices = topk_select_reference(pre, k)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(values, want_values, rtol=0, atol=0, equal_nan=True)
    assert 7 in indices[0]


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_values_are_those_of_torch_topk(run, k):
    pre = numbers(4, 40).round(decimals=1)
    values, _ = run(topk_select, pre, k)
    assert torch.equal(values.sort(descending=True).values, pre.topk(k).values)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_selected_from_as_it_is(run, dtype):
    pre = numbers(3, 50, dtype=dtype)
    values, indices = run(topk_select, pre, 7, always=1)
    want_values, want_indices = topk_select_reference(pre, 7, always=1)
    assert values.dtype == dtype
    assert torch.equal(indices, want_indices) and torch.equal(values, want_values)


@pytest.mark.parametrize("largest", [0, 3], ids=["sampled-columns", "other-columns"])
def test_a_sample_that_misleads_changes_nothing(largest):
    pre = numbers(3, 1024)
    pre[1, largest::8] += 100.0
    assert torch.equal(topk_select(pre, 100)[1], topk_select_reference(pre, 100)[1])


def test_the_gradient_of_a_selection_goes_where_it_was_taken(run):
    pre = torch.tensor([[0.1, 5.0, 3.0, 5.0, 4.0]], requires_grad=True)
    values, indices = run(topk_select, pre, 2, always=1)
    assert indices.tolist() == [[0, 1, 3]]
    values.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    assert pre.grad.tolist() == [[1.0, 2.0, 0.0, 3.0, 0.0]]


# decoding


@pytest.mark.parametrize(("N", "n", "K", "d"), DECODINGS)
def test_decoding_and_its_gradients_equal_the_definition(run, N, n, K, d):
    indices, inputs = decoding(N, n, K, d)
    actual = run(topk_sparse_decode, indices, **inputs)
    expected = topk_sparse_decode_reference(indices, **inputs)
    assert_equal_with_gradients(actual, expected, inputs, tolerances(torch.float32, 4 * max(K, d, N)))


def test_decoding_by_hand(run):
    table = torch.tensor([[1.0, 2.0], [10.0, 20.0], [0.5, 0.0]])
    arguments = (torch.tensor([[0, 2]]), torch.tensor([[3.0, 2.0]]), table)
    assert run(topk_sparse_decode, *arguments).tolist() == [[4.0, 6.0]]
    ends = {"bias": torch.tensor([1.0, -1.0]), "scale": torch.tensor([2.0]), "shift": torch.tensor([0.5])}
    assert run(topk_sparse_decode, *arguments, **ends).tolist() == [[10.5, 10.5]]
    assert run(topk_sparse_decode, *arguments, scale=ends["scale"]).tolist() == [[8.0, 12.0]]
    assert run(topk_sparse_decode, *arguments, shift=ends["shift"]).tolist() == [[4.5, 6.5]]


@pytest.mark.parametrize("K", [3, 30], ids=["gathered", "dense"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_decoded_in_float32(run, dtype, K):
    indices, inputs = decoding(5, 40, K, 33, dtype)
    actual, expected = run(topk_sparse_decode, indices, **inputs), topk_sparse_decode_reference(indices, **inputs)
    assert actual.dtype == dtype
    assert_equal_with_gradients(actual, expected, inputs, tolerances(dtype, 4 * K + 33))


def test_values_may_be_wider_than_the_table(run):
    indices, inputs = decoding(5, 40, 3, 33)
    table = inputs["rows"].detach().bfloat16()
    values = inputs["values"].detach()
    actual = run(topk_sparse_decode, indices, values, table)
    assert actual.dtype == torch.bfloat16
    expected = topk_sparse_decode_reference(indices, values, table)
    torch.testing.assert_close(actual, expected.bfloat16(), **tolerances(torch.bfloat16, 3))


@pytest.mark.parametrize(("N", "n", "K", "d"), [(3, 40, 2, 9), (5, 40, 30, 9)])
def test_strides_of_the_arguments_do_not_matter(run, N, n, K, d):
    indices, inputs = decoding(N, n, K, d)
    inputs["rows"] = inputs["rows"].detach().T.contiguous().T.requires_grad_()  # a [d, n] decoder
    inputs["values"] = inputs["values"].detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    inputs["scale"] = inputs["scale"].detach().repeat_interleave(2)[::2].requires_grad_()
    actual = run(topk_sparse_decode, indices.long().T.contiguous().T, **inputs)
    expected = topk_sparse_decode_reference(indices, **inputs)
    assert_equal_with_gradients(actual, expected, inputs, tolerances(torch.float32, 4 * max(K, d, N)))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_entries_that_are_used_often_are_gathered_in_slices(is_transposed):
    """130 rows of 8 of 40 latents: sums in slices of 32 columns, and the same bits every time."""
    indices, inputs = decoding(130, 40, 8, 70)
    if is_transposed:
        inputs["rows"] = inputs["rows"].detach().T.contiguous().T.requires_grad_()
    with Calls() as calls:
        actual = topk_sparse_decode(indices, **inputs)
    assert calls.names.count("_embedding_bag") + calls.names.count("_embedding_bag_forward_only") == 3
    expected = topk_sparse_decode_reference(indices, **inputs)
    assert_equal_with_gradients(actual, expected, inputs, tolerances(torch.float32, 4 * 130))
    runs = [
        torch.autograd.grad(topk_sparse_decode(indices, **inputs), list(inputs.values()), numbers(130, 70))
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_products_with_a_large_table_are_formed_in_pieces(monkeypatch):
    indices, inputs = decoding(50, 30, 3, 40)
    arguments = encoding(50, 40, 33)
    want = eager._row_products(indices, numbers(50, 40), inputs["rows"].detach()), sae_encode_topk(k=4, **arguments)
    monkeypatch.setattr(eager, "_CACHED_ELEMENTS", 30 * 7)
    got = eager._row_products(indices, numbers(50, 40), inputs["rows"].detach()), sae_encode_topk(k=4, **arguments)
    torch.testing.assert_close(got, want)


# the two plans


@pytest.mark.parametrize("work", ["sum", "product", "columns"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("N", [1, 2, 4, 5, 8, 16, 64, 65, 4096])
def test_the_plan_switches_where_the_table_says(device, work, N):
    n = 24576
    shares = eager._GATHER_SHARES[device, work]
    crossing = next(share for rows, share in shares if rows >= N) * n
    assert most_gathered(work, N, n, torch.device(device)) == crossing
    rows = torch.empty(n, 2, device="meta" if device == "cuda" else "cpu")  # a kind that is not "cpu"
    assert eager.is_gathered(work, N, int(crossing), rows)
    assert not eager.is_gathered(work, N, int(crossing) + 1, rows)


def test_tables_of_crossings_cover_every_number_of_rows():
    for shares in eager._GATHER_SHARES.values():
        rows = [limit for limit, _ in shares]
        assert rows == sorted(rows) and rows[-1] >= 2**31
        assert all(0 < share <= 1 for _, share in shares)


@pytest.mark.parametrize(("K", "products"), [(4, 0), (5, 1), (10, 1), (11, 3)])
def test_a_plan_runs_on_either_side_of_the_crossing(K, products):
    """Of 40 latents and 200 rows products are gathered up to 0.12 * 40 entries, sums up to 0.25 * 40."""
    indices, inputs = decoding(200, 40, K, 8)
    with Calls() as calls:
        topk_sparse_decode(indices, inputs["values"], inputs["rows"]).sum().backward()
    assert calls.names.count("mm") == products


def test_few_rows_do_not_turn_a_transposed_table_around():
    table = torch.zeros(8, 40).T
    assert not eager.is_gathered("sum", 63, 1, table)
    assert eager.is_gathered("sum", 64, 1, table)
    assert eager.is_gathered("sum", 1, 1, table.contiguous())


def test_both_plans_agree(run, monkeypatch):
    from shared_kernels.sparse_coder import kernel, op  # noqa: F401

    indices, inputs = decoding(2, 40, 5, 33)
    arguments = encoding(2, 40, 33)
    results = []
    for most in (0, 40):
        for module in (eager, kernel):
            monkeypatch.setattr(module, "most_gathered", lambda *_, most=most: most)
        out = run(topk_sparse_decode, indices, **inputs)
        values = run(sae_encode_topk, k=5, **arguments)[0]
        results.append(
            [
                out,
                *torch.autograd.grad(out, list(inputs.values()), numbers(2, 33)),
                *torch.autograd.grad(values, list(arguments.values()), numbers(2, 5)),
            ]
        )
    for dense, gathered in zip(*results, strict=True):
        torch.testing.assert_close(gathered, dense, rtol=1e-4, atol=1e-4)


def test_no_gradient_is_as_large_as_all_latents_of_all_rows():
    N, n, k, d = 40, 400, 8, 6
    inputs = encoding(N, n, d)
    inputs["x"].requires_grad_(False)
    decoder = numbers(n, d).requires_grad_()
    values, indices, mean, std = sae_encode_topk(k=k, always=1, **inputs)
    out = topk_sparse_decode(indices, values.relu(), decoder, scale=std, shift=mean, bias=inputs["pre_bias"])
    with Calls() as calls:
        out.square().sum().backward()
    assert calls.largest < N * n
    assert decoder.grad is not None and inputs["pre_bias"].grad is not None


# encoding


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("N", "n", "k", "d", "always"), ENCODINGS)
def test_encoding_and_its_gradients_equal_the_definition(run, N, n, k, d, always, normalize):
    inputs = encoding(N, n, d)
    settings = {"k": k, "always": always, "normalize": normalize, "eps": 1e-3}
    values, indices, *moments = run(sae_encode_topk, **inputs, **settings)
    want_values, want_indices, *want_moments = sae_encode_topk_reference(**inputs, **settings)
    assert torch.equal(indices, want_indices)
    tolerance = tolerances(torch.float32, 16 * max(d, N))
    torch.testing.assert_close(moments, [each.float() for each in want_moments], **tolerance)
    assert_equal_with_gradients(values, want_values, inputs, tolerance)


def test_encoding_without_a_gradient_to_x(run):
    inputs = encoding(5, 40, 33)
    want = sae_encode_topk_reference(k=4, **inputs)
    inputs["x"].requires_grad_(False)
    values, indices, mean, std = run(sae_encode_topk, k=4, **inputs)
    assert torch.equal(indices, want[1])
    tolerance = tolerances(torch.float32, 16 * 33)
    torch.testing.assert_close((mean, std), (want[2].float(), want[3].float()), **tolerance)
    weights = {name: each for name, each in inputs.items() if name != "x"}
    assert_equal_with_gradients(values, want[0], weights, tolerance)


def test_mean_and_deviation_have_gradients(run):
    x = numbers(4, 6).requires_grad_()
    weights = (torch.eye(6), torch.zeros(6), torch.zeros(6), 2)
    ours, want = run(sae_encode_topk, x, *weights)[2:], sae_encode_topk_reference(x, *weights)[2:]
    for got, expected in zip(ours, want, strict=True):
        (ours_x,), (want_x,) = (torch.autograd.grad(each.sum(), x, retain_graph=True) for each in (got, expected))
        torch.testing.assert_close(ours_x, want_x)


def test_the_golden_row(run):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    values, indices, mean, std = run(sae_encode_topk, x, torch.eye(4), torch.zeros(4), torch.zeros(4), 4)
    z = torch.tensor([[-1.1618860, -0.3872953, 0.3872953, 1.1618860]]) * (1.2909944487 / (1.2909944487 + 1e-5))
    torch.testing.assert_close(values, z)
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert (mean.item(), round(std.item(), 5)) == (2.5, 1.29099)


def test_a_constant_row_is_zero_and_so_is_its_gradient(run):
    x = torch.full((2, 5), 3.0, requires_grad=True)
    bias = torch.tensor([0.5, -1.0, 2.0])
    values, indices, mean, std = run(sae_encode_topk, x, numbers(3, 5), bias, torch.zeros(5), 2)
    assert values.tolist() == [[0.5, 2.0]] * 2
    assert (indices.tolist(), mean.tolist(), std.tolist()) == ([[0, 2]] * 2, [3.0, 3.0], [0.0, 0.0])
    (values.sum() + mean.sum() + std.sum()).backward()
    assert x.grad.isfinite().all()


def test_a_large_offset_does_not_hide_the_row(run):
    x = numbers(4, 33) + 100.0
    weights = (numbers(20, 33, seed=1), numbers(20, seed=2), numbers(33, seed=3), 3)
    values, *_ = run(sae_encode_topk, x, *weights)
    torch.testing.assert_close(values, sae_encode_topk_reference(x, *weights)[0].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_encoded_in_float32(run, dtype):
    inputs = encoding(5, 40, 33, dtype)
    values, indices, mean, std = run(sae_encode_topk, k=6, **inputs)
    assert values.dtype == mean.dtype == std.dtype == torch.float32
    pre, everything, *_ = sae_encode_topk_reference(k=40, **inputs)
    assert torch.equal(everything, torch.arange(40).int().expand(5, 40))
    tolerance = tolerances(dtype, 16 * 33)  # a GPU rounds the standardized rows to the dtype of the encoder
    assert_equal_with_gradients(values, pre.gather(1, indices.long()), inputs, tolerance)
    torch.testing.assert_close(values.amin(1), pre.topk(6).values[:, -1].float(), **tolerance)


def test_a_row_gives_the_same_alone_and_in_any_place(run):
    inputs = {name: each.detach() for name, each in encoding(4, 40, 33).items()}
    values, indices, *_ = run(sae_encode_topk, k=4, **inputs)
    for rows in (torch.tensor([2, 0, 3, 1]), torch.tensor([3])):
        some, which, *_ = run(sae_encode_topk, k=4, **{**inputs, "x": inputs["x"][rows]})
        assert torch.equal(which, indices[rows])
        torch.testing.assert_close(some, values[rows])


# gradients, registration, compilation


def test_gradients_agree_with_finite_differences():
    inputs = [each.detach().requires_grad_() for each in encoding(3, 10, 4, torch.float64).values()]
    rows = numbers(10, 4, dtype=torch.float64, seed=7).requires_grad_()

    def reconstruct(x, encoder, latent_bias, pre_bias, rows):
        values, indices, mean, std = sae_encode_topk_eager(x, encoder, latent_bias, pre_bias, 2, always=1)
        out = topk_sparse_decode_eager(indices, values.sigmoid(), rows, scale=std, shift=mean, bias=pre_bias)
        return out, values, mean, std

    assert torch.autograd.gradcheck(reconstruct, (*inputs, rows))


def test_gradients_have_the_same_bits_every_time(run):
    indices, inputs = decoding(3, 12, 2, 9)
    arguments = encoding(3, 12, 9)

    def gradients():
        out = run(topk_sparse_decode, indices, **inputs)
        values = run(sae_encode_topk, k=1, always=1, **arguments)[0]
        return [
            *torch.autograd.grad(out, list(inputs.values()), numbers(3, 9)),
            *torch.autograd.grad(values, list(arguments.values()), numbers(3, 2)),
        ]

    assert all(torch.equal(*pair) for pair in zip(gradients(), gradients(), strict=True))


def test_only_the_gradients_that_are_needed_are_formed(run):
    indices, inputs = decoding(2, 40, 3, 8)
    for name in inputs:
        others = {each: value.detach() for each, value in inputs.items()}
        run(topk_sparse_decode, indices, **{**others, name: inputs[name]}).sum().backward()
        assert inputs[name].grad is not None
    arguments = encoding(2, 40, 8)
    for name in arguments:
        others = {each: value.detach() for each, value in arguments.items()}
        run(sae_encode_topk, k=3, **{**others, name: arguments[name]})[0].sum().backward()
        assert arguments[name].grad is not None


@pytest.mark.triton
def test_the_operators_are_well_registered():
    from shared_kernels.sparse_coder import op

    indices, inputs = decoding(1, 20, 2, 5)
    arguments = encoding(1, 20, 5)
    arguments["x"].requires_grad_(False)
    torch.library.opcheck(op._topk_select, (numbers(1, 20).requires_grad_(), 2, 1))
    torch.library.opcheck(op._standardize, (arguments["x"], 1e-5))
    torch.library.opcheck(op._encode, (*arguments.values(), 2, 1))
    torch.library.opcheck(op._decode, (indices, *inputs.values()))
    torch.library.opcheck(op._decode, (indices, inputs["values"], inputs["rows"], None, None, None))
    grad = numbers(1, 5)
    torch.library.opcheck(op._row_products, (indices, grad, inputs["rows"].detach()))
    torch.library.opcheck(op._column_sums, (indices, inputs["values"].detach(), grad, 20))


def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(impl):
    inputs = encoding(2, 40, 12)
    rows = numbers(40, 12, seed=5).requires_grad_()

    def loss(x, encoder, latent_bias, pre_bias, rows):
        values, indices, mean, std = sae_encode_topk(x, encoder, latent_bias, pre_bias, 4, always=1, impl=impl)
        out = topk_sparse_decode(indices, values.relu(), rows, scale=std, shift=mean, bias=pre_bias, impl=impl)
        return (out - x).square().sum() + topk_select(out, 3, impl=impl)[0].sum()

    tensors = (*inputs.values(), rows)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_sums_in_float32(run):
    indices, inputs = decoding(2, 40, 30, 33)
    arguments = encoding(2, 40, 33)
    plain = run(topk_sparse_decode, indices, **inputs), run(sae_encode_topk, k=30, **arguments)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(topk_sparse_decode, indices, **inputs), run(sae_encode_topk, k=30, **arguments)[0]
        gradients = torch.autograd.grad([each.sum() for each in cast], [inputs["rows"], arguments["encoder"]])
    want = torch.autograd.grad([each.sum() for each in plain], [inputs["rows"], arguments["encoder"]])
    torch.testing.assert_close(cast, plain)
    torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": torch.zeros(4)}, r"pre must have the shape \[N, n\], got \(4,\)"),
        ({"pre": torch.zeros(2, 4).int()}, "pre must be floating point, got torch.int32"),
        ({"k": 0}, r"k must lie in \[1, 4\] \(the number of latents\), got 0"),
        ({"k": 5}, r"k must lie in \[1, 4\] \(the number of latents\), got 5"),
        ({"always": -1}, r"always must lie in \[0, 4\] \(the number of latents\), got -1"),
        ({"always": 5}, r"always must lie in \[0, 4\] \(the number of latents\), got 5"),
    ],
)
def test_an_error_of_a_selection_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        topk_select(**({"pre": torch.zeros(2, 4), "k": 2} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(2, 3)}, "indices must be int32 or int64, got torch.float32"),
        ({"indices": torch.zeros(2, 2).int()}, r"indices must have the shape of values \(2, 3\), got \(2, 2\)"),
        ({"values": torch.zeros(2, 3).int()}, "values must be floating point, got torch.int32"),
        ({"rows": torch.zeros(4)}, r"rows must have the shape \[n, d\], got \(4,\)"),
        ({"rows": torch.zeros(2, 5)}, "indices must name distinct rows, so 2 per row at most, got 3 columns"),
        (
            {"scale": torch.zeros(3)},
            r"scale must be floating point with the shape \(2,\), one number per row of values, got torch.float32",
        ),
        (
            {"shift": torch.zeros(2).int()},
            r"shift must be floating point with the shape \(2,\), one number per row of values, got torch.int32 \(2,\)",
        ),
        (
            {"bias": torch.zeros(4)},
            r"bias must be floating point with the shape \(5,\), one number per column of rows, got torch.float32",
        ),
        ({"rows": torch.zeros(4, 5, device="meta")}, r"indices must be on the device of rows \(meta\), got cpu"),
    ],
)
def test_an_error_of_a_decoding_names_the_argument(change, message):
    arguments = {"indices": torch.zeros(2, 3).int(), "values": torch.zeros(2, 3), "rows": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=message):
        topk_sparse_decode(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 5)}, r"x must have the shape \[N, d\], got \(2, 3, 5\)"),
        ({"encoder": torch.zeros(4, 6)}, "encoder must have the 5 columns of x, got 6"),
        (
            {"latent_bias": torch.zeros(5)},
            r"latent_bias must be floating point with the shape \(4,\), one number per row of encoder, got",
        ),
        (
            {"pre_bias": torch.zeros(4)},
            r"pre_bias must be floating point with the shape \(5,\), one number per column of x, got",
        ),
        ({"k": 9}, r"k must lie in \[1, 4\] \(the number of latents\), got 9"),
        ({"always": 9}, r"always must lie in \[0, 4\] \(the number of latents\), got 9"),
        ({"eps": -1.0}, "eps must be finite and not negative, got -1.0"),
        ({"encoder": torch.zeros(4, 5, device="meta")}, r"encoder must be on the device of x \(cpu\), got meta"),
    ],
)
def test_an_error_of_an_encoding_names_the_argument(change, message):
    arguments = {
        "x": torch.zeros(2, 5),
        "encoder": torch.zeros(4, 5),
        "latent_bias": torch.zeros(4),
        "pre_bias": torch.zeros(5),
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        sae_encode_topk(**(arguments | change))
