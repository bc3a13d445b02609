import math
from functools import partial

import pytest
import torch

from shared_kernels import scar_scores, scar_steer
from shared_kernels.scar_steer import eager
from shared_kernels.scar_steer.eager import ACTIVATIONS, RULES
from shared_kernels.scar_steer.reference import scar_scores_reference, scar_steer_reference
from shared_kernels.testing import tolerances

SHAPES = [
    pytest.param(4, 33, 3, 2, id="odd"),
    pytest.param(3, 64, 1, 1, id="one-concept"),
    pytest.param(3, 100, 2, 3, id="a-strength-per-row"),
    pytest.param(2, 1100, 2, 2, id="padded-block"),
    pytest.param(2, 1, 2, 1, id="one-column"),
    pytest.param(0, 5, 2, 1, id="no-rows"),
    pytest.param(4, 5, 0, 2, id="no-concepts"),
]
NAMES = ("x", "encoder", "bias", "decoder", "strength")
INTERPRETED = {"rtol": 1e-5, "atol": 2e-6}


def case(N=6, d=33, C=3, S=2, dtype=torch.float32, weights=torch.float32):
    """x, encoder, bias, decoder, strength; activations around a mean that is not 0."""
    x = torch.randn(N, d, dtype=torch.float64) + 0.5
    encoder, decoder = (torch.randn(C, d, dtype=torch.float64) / d**0.5 for _ in range(2))
    bias, strength = torch.randn(C, dtype=torch.float64), torch.randn(S, C, dtype=torch.float64)
    return x.to(dtype), *(each.to(weights) for each in (encoder, bias, decoder, strength))


def steer(run, x, encoder, bias, decoder, strength, **settings):
    return run(scar_steer, x, encoder, encoder.sum(1), bias, decoder, strength, **settings)


def score(run, x, encoder, bias, **settings):
    return run(scar_scores, x, encoder, encoder.sum(1), bias, **settings)


def reference(x, encoder, bias, decoder, strength, **settings):
    x, encoder, bias, decoder, strength = (each.double() for each in (x, encoder, bias, decoder, strength))
    return scar_steer_reference(x, encoder, encoder.sum(1), bias, decoder, strength, **settings)


def no_impl(op, *args, **settings):
    return op(*args, **settings)


def assert_close_by_size(actual, expected, terms=64):
    """Equal up to the rounding of a sum, relative to the largest entry."""
    size = float(expected.detach().abs().max()) if expected.any() else 1.0
    torch.testing.assert_close(actual.double() / size, expected / size, **tolerances(torch.float32, terms))


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as-it-is"])
@pytest.mark.parametrize(("N", "d", "C", "S"), SHAPES)
def test_rows_and_scores_equal_the_definition(run, N, d, C, S, normalize):
    tensors = case(N, d, C, S)
    for rule in RULES:
        y, pre = steer(run, *tensors, rule=rule, normalize=normalize)
        expected_y, expected_pre = reference(*tensors, rule=rule, normalize=normalize)
        assert y.dtype == pre.dtype == torch.float32
        assert_close_by_size(y, expected_y, d)
        assert_close_by_size(pre, expected_pre, d)
    assert torch.equal(score(run, *tensors[:3], normalize=normalize), pre)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rule", ["scale", "set", "add_gated"])
def test_latents_are_open_above_the_threshold(run, rule, activation):
    tensors = case(N=4, C=2)
    for threshold in (0.0, 0.4, -0.4, -math.inf):
        settings = {"rule": rule, "activation": activation, "threshold": threshold}
        expected, pre = reference(*tensors, **settings)
        is_open = pre > threshold
        assert is_open.any()
        assert threshold == -math.inf or not is_open.all()
        assert_close_by_size(steer(run, *tensors, **settings)[0], expected)
    assert_close_by_size(steer(run, *tensors, **settings, is_open=is_open)[0], expected)


def test_a_mask_overrides_the_threshold(run):
    tensors = case()
    is_open = torch.rand(6, 3) < 0.5
    for rule, activation in (("scale", "relu"), ("set", "tanh"), ("add_gated", "relu")):
        settings = {"rule": rule, "activation": activation, "threshold": 1e9, "is_open": is_open}
        assert_close_by_size(steer(run, *tensors, **settings)[0], reference(*tensors, **settings)[0])


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as-it-is"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_those_of_the_definition(run, rule, normalize):
    tensors = [each.requires_grad_() for each in case(N=4, S=2)]
    weights = torch.randn(4, 33), torch.randn(4, 3)
    for activation in ACTIVATIONS:
        settings = {"rule": rule, "activation": activation, "threshold": -0.2, "normalize": normalize}
        expected = torch.autograd.grad(reference(*tensors, **settings), tensors, [each.double() for each in weights])
        actual = torch.autograd.grad(steer(run, *tensors, **settings), tensors, weights)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close_by_size(ours, theirs.double(), 200)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as-it-is"])
def test_gradients_of_scores_equal_those_of_the_definition(run, normalize):
    x, encoder, bias, *_ = tensors = [each.requires_grad_() for each in case()]
    weights = torch.randn(6, 3)
    double = [each.double() for each in (x, encoder, encoder.sum(1), bias)]
    expected = scar_scores_reference(*double, normalize=normalize)
    expected = torch.autograd.grad(expected, tensors[:3], weights.double())
    actual = torch.autograd.grad(score(run, *tensors[:3], normalize=normalize), tensors[:3], weights)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close_by_size(ours, theirs.double(), 200)


@pytest.mark.parametrize(
    ("rule", "activation"), [("scale", "relu"), ("set", "tanh"), ("add", "relu"), ("add_gated", "relu")]
)
def test_gradients_agree_with_finite_differences(rule, activation):
    tensors = tuple(each.requires_grad_() for each in case(2, 5, 2, 2, torch.float64, torch.float64))

    def function(x, encoder, *others):
        return scar_steer(x, encoder, encoder.sum(1), *others, rule=rule, activation=activation, threshold=-math.inf)

    assert torch.autograd.gradcheck(function, tensors)


def test_only_what_needs_a_gradient_gets_one(run):
    for needed in range(5):
        tensors = [each.requires_grad_(n == needed) for n, each in enumerate(case(N=2))]
        y, pre = steer(run, *tensors, rule="add_gated")
        (y.sum() + pre.sum()).backward()
        assert [each.grad is not None for each in tensors] == [n == needed for n in range(5)]


def test_gradients_have_the_same_bits_every_time(run):
    tensors = [each.requires_grad_() for each in case(N=5, S=1)]
    runs = [torch.autograd.grad(steer(run, *tensors, rule="add_gated")[0].sum(), tensors) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_computed_in_float32_and_rounded_once(run, rule, dtype):
    x, *weights = case(dtype=dtype)
    x *= 200  # a sum of squares does not fit into half precision
    y, pre = steer(run, x, *weights, rule=rule)
    expected_y, expected_pre = reference(x, *weights, rule=rule)
    assert (y.dtype, pre.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(pre.double(), expected_pre, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), expected_y.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    x.requires_grad_()
    assert steer(run, x, *weights, rule=rule)[0].sum().backward() is None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("rule", RULES)
def test_float64_is_computed_in_float64(rule):
    for weights in (torch.float64, torch.float32):
        tensors = case(dtype=torch.float64, weights=weights)
        y, pre = steer(no_impl, *tensors, rule=rule)
        expected_y, expected_pre = reference(*tensors, rule=rule)
        assert y.dtype == pre.dtype == torch.float64
        torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-6 if weights == torch.float32 else 1e-12)
        torch.testing.assert_close(pre, expected_pre, rtol=1e-12, atol=1e-6 if weights == torch.float32 else 1e-12)


def test_a_large_mean_does_not_spoil_the_scores(run):
    x, encoder, bias, *_ = case(N=8, d=1024, C=4)
    encoder = encoder + 0.05  # so that its sums are not small
    x = x + 100.0
    expected = scar_scores_reference(x, encoder, encoder.double().sum(1), bias)
    actual = score(run, x, encoder, bias)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().mean()))
    unfolded = x - x.double().mean(1, keepdim=True)
    unfolded = unfolded @ encoder.double().T / (unfolded.std(1, keepdim=True) + 1e-5) + bias
    torch.testing.assert_close(expected, unfolded, rtol=1e-9, atol=1e-9)


def test_a_row_of_length_5_moves_by_a_share_of_it(run):
    x, decoder, no = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    y, pre = steer(run, x, no, torch.zeros(1), decoder, torch.tensor([[0.4]]), rule="add")
    assert y.tolist() == [[3.0, 6.0]]
    assert pre.tolist() == [[0.0]]


def test_standardized_values_are_those_of_the_unbiased_deviation(run):
    x, encoder = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.eye(4)
    expected = torch.tensor([[-1.1618860, -0.3872953, 0.3872953, 1.1618860]])
    torch.testing.assert_close(score(run, x, encoder, torch.zeros(4)), expected, rtol=1e-6, atol=0.0)


def test_setting_a_latent_replaces_it_and_scaling_leaves_what_is_off(run):
    encoder = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # of x = 1, 3: latents 1 / sqrt(2) and, closed, -1 / sqrt(2)
    x, no, decoder = torch.tensor([[1.0, 3.0]]), torch.zeros(2), torch.eye(2)
    std = math.sqrt(2.0)
    y, _ = steer(run, x, encoder, no, decoder, torch.tensor([[0.25, 0.25]]), rule="set")
    torch.testing.assert_close(y, torch.tensor([[1.0 + std * 0.25 - 1.0, 3.0 + std * 0.25]]), rtol=0, atol=3e-5)
    y, _ = steer(run, x, encoder, no, decoder, torch.tensor([[-1.0, -1.0]]), rule="scale")
    torch.testing.assert_close(y, torch.tensor([[0.0, 3.0]]), rtol=0, atol=3e-5)


def test_scaling_leaves_a_negative_latent(run):
    x, encoder, nothing = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1)
    settings = {"rule": "scale", "activation": "tanh", "threshold": -math.inf, "normalize": False}
    y, pre = steer(run, x, encoder, nothing, torch.ones(1, 2), torch.tensor([[-1.0]]), **settings)
    assert pre[:, 0].tolist() == [1.0, -1.0]
    torch.testing.assert_close(y, torch.tensor([[1.0 - math.tanh(1), -1.0 - math.tanh(1)], [-1.0, 1.0]]))


def test_the_gate_takes_off_where_the_concept_is_and_adds_where_it_is_not(run):
    x, encoder, bias, decoder, _ = case(N=12, C=1)
    bias = 0.0 * bias
    pre = score(run, x, encoder, bias)
    s = torch.where(pre > 0, pre.sigmoid(), 0.0)
    assert (s == 0).any()
    assert (s > 0).any()
    pull = x.norm(dim=1, keepdim=True) * decoder / decoder.norm()
    for a, gate in ((-0.5, s), (0.5, 1 - s)):
        y, _ = steer(run, x, encoder, bias, decoder, torch.tensor([[a]]), rule="add_gated")
        torch.testing.assert_close(y, x + a * gate * pull, **INTERPRETED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["scale", "add", "add_gated"])
def test_a_row_to_which_nothing_is_added_keeps_its_bits(run, rule, dtype):
    x, encoder, bias, decoder, strength = case(N=8, S=8, dtype=dtype)
    strength[::2] = 0.0
    y, pre = steer(run, x, encoder, bias, decoder, strength, rule=rule)
    assert torch.equal(y[::2], x[::2])
    assert not torch.equal(y[1::2], x[1::2])
    closed = steer(run, x, encoder, bias, decoder, strength, rule="scale", threshold=math.inf)[0]
    assert torch.equal(closed, x)
    assert pre.isfinite().all()


def test_strengths_per_row_are_those_of_rows_alone(run):
    x, encoder, bias, decoder, strength = case(N=6, S=3)
    together, _ = steer(run, x, encoder, bias, decoder, strength, rule="add_gated")
    for row in range(6):
        own = x[row : row + 1], encoder, bias, decoder, strength[row // 2 : row // 2 + 1]
        torch.testing.assert_close(steer(run, *own, rule="add_gated")[0], together[row : row + 1], **INTERPRETED)


def test_concepts_add_up(run):
    x, encoder, bias, decoder, strength = case(S=1)
    together, _ = steer(run, x, encoder, bias, decoder, strength, rule="add_gated")
    parts = [
        steer(run, x, encoder[c : c + 1], bias[c : c + 1], decoder[c : c + 1], strength[:, c : c + 1], rule="add_gated")
        for c in range(3)
    ]
    torch.testing.assert_close(together - x, sum(y - x for y, _ in parts), **INTERPRETED)


@pytest.mark.parametrize("rule", RULES)
def test_rows_and_decoders_without_extent_stay_finite(run, rule):
    x, encoder, bias, decoder, strength = case(C=2)
    x[0], x[1], decoder[0] = 0.0, 0.25, 0.0
    tensors = [each.requires_grad_() for each in (x, encoder, bias, decoder, strength)]
    y, pre = steer(run, *tensors, rule=rule)
    grads = torch.autograd.grad([y, pre], tensors, [torch.ones_like(y), torch.ones_like(pre)])
    assert all(each.isfinite().all() for each in (y, pre, *grads))
    assert_close_by_size(y, reference(*tensors, rule=rule)[0])
    torch.testing.assert_close(pre[:2], bias.expand(2, 2), rtol=1e-5, atol=1e-5)  # constant rows score the bias
    alone, _ = steer(run, x, encoder[:1], bias[:1], decoder[:1], strength[:, :1], rule=rule)
    assert torch.equal(alone, x)  # the first decoder row has no direction


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_row(run, rule, bad):
    tensors = case(S=1)
    tensors[0][2, 5] = bad
    y, pre = steer(run, *tensors, rule=rule, threshold=0.3)
    assert not pre[2].isfinite().any()
    assert not y[2].isfinite().all()
    others = torch.tensor([0, 1, 3, 4, 5])
    expected = reference(tensors[0][others], *tensors[1:], rule=rule, threshold=0.3)
    assert_close_by_size(y[others], expected[0])


def test_axes_and_strides_of_the_arguments_do_not_matter(run):
    x, encoder, bias, decoder, strength = case(N=6)
    is_open = torch.rand(6, 3) < 0.5
    expected = steer(run, x, encoder, bias, decoder, strength, rule="set", is_open=is_open)
    strided = [each.mT.contiguous().mT for each in (x, encoder, decoder, strength, is_open)]
    actual = steer(run, *strided[:2], bias.repeat_interleave(2)[::2], *strided[2:4], rule="set", is_open=strided[4])
    torch.testing.assert_close(actual, expected, **INTERPRETED)
    y, pre = steer(run, x.view(2, 3, 33), encoder, bias, decoder, strength, rule="set", is_open=is_open.view(2, 3, 3))
    torch.testing.assert_close((y.view(6, 33), pre.view(6, 3)), expected, **INTERPRETED)
    y, pre = steer(run, x[0], encoder, bias, decoder, strength[:1], rule="set", is_open=is_open[0])
    assert (y.shape, pre.shape) == ((33,), (3,))
    assert score(run, x[0], encoder, bias).shape == (3,)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("S", [1, 2, 10])
def test_the_chunk_does_not_show(monkeypatch, rule, S):
    tensors = case(N=10, S=S)
    is_open = torch.rand(10, 3) < 0.5
    whole = steer(no_impl, *tensors, rule=rule, is_open=is_open)
    monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", 100)  # three rows
    torch.testing.assert_close(steer(no_impl, *tensors, rule=rule, is_open=is_open), whole)
    torch.testing.assert_close(score(no_impl, *tensors[:3]), whole[1])
    y, pre = steer(no_impl, tensors[0].bfloat16(), *tensors[1:], rule=rule, is_open=is_open)
    assert (y.dtype, pre.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_does_not_reach_the_scores(run):
    tensors = case(dtype=torch.bfloat16)
    expected = steer(run, *tensors, rule="scale")
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()),
    ):
        actual, pre = steer(run, *tensors, rule="scale"), score(run, *tensors[:3])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
    assert torch.equal(pre, expected[1])


@pytest.mark.triton
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("rule", ["add_gated", None])
def test_the_operator_is_well_registered(rule, needs):
    from shared_kernels.scar_steer.op import _scar_steer

    x, encoder, bias, decoder, strength = (each.requires_grad_(needs) for each in case(N=2))
    scoring, settings = (x, encoder, encoder.detach().sum(1), bias), (rule, "relu", 0.0, 1e-5, True)
    is_open = torch.rand(2, 3) < 0.5
    steering = (None, None, None) if rule is None else (decoder, strength, is_open)
    torch.library.opcheck(_scar_steer, (*scoring, *steering, *settings))


@pytest.mark.parametrize("rule", ["scale", "add_gated"])
def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(impl, rule):
    tensors = [each.requires_grad_() for each in case(N=2)]

    def function(x, encoder, *others):
        y, pre = scar_steer(x, encoder, encoder.sum(1), *others, rule=rule, impl=impl)
        return y.sin().sum() + pre.sum() + scar_scores(x, encoder, encoder.sum(1), others[0], impl=impl).cos().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(each(*tensors), tensors) for each in (compiled, function))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_new_strengths_compile_nothing(impl):
    tensors, graphs = case(N=2, S=1), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(partial(scar_steer, rule="add_gated", impl=impl), fullgraph=True, backend=backend)
    for a in (-1.0, 0.0, 0.5, 2.0):
        x, encoder, bias, decoder, _ = tensors
        arguments = (x, encoder, encoder.sum(1), bias, decoder, torch.full((1, 3), a))
        torch.testing.assert_close(
            compiled(*arguments), scar_steer(*arguments, rule="add_gated", impl=impl), **INTERPRETED
        )
    assert len(graphs) == 1


def test_a_compiled_graph_serves_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", 100)  # three rows
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    _, encoder, bias, decoder, strength = case(S=1)
    compiled = torch.compile(partial(scar_steer, rule="add_gated"), fullgraph=True, backend=backend)
    for rows in (2, 3, 7, 50):
        arguments = (torch.randn(rows, 33), encoder, encoder.sum(1), bias, decoder, strength)
        torch.testing.assert_close(compiled(*arguments), scar_steer(*arguments, rule="add_gated"), **INTERPRETED)
    assert len(graphs) == 2  # one for two rows, one for any number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 33).int()}, r"x must be floating point with the shape \[..., d\], got torch.int32"),
        ({"x": torch.zeros(())}, r"x must be floating point with the shape \[..., d\], got torch.float32 \(\)"),
        ({"x": torch.zeros(6, 0)}, r"x must have at least one column, got the shape \(6, 0\)"),
        ({"encoder": torch.zeros(3, 32)}, r"encoder must have the shape \[C, 33\], d as in x, got \(3, 32\)"),
        ({"encoder": torch.zeros(3, 33).half()}, r"encoder must be torch.float32 or torch.float64, got torch.float16"),
        ({"encoder_sum": torch.zeros(2)}, r"encoder_sum must have the shape \(3,\), one number per row of encoder"),
        ({"bias": torch.zeros(3, 1)}, r"bias must have the shape \(3,\), one number per row of encoder, got \(3, 1\)"),
        (
            {"bias": torch.zeros(3).double()},
            r"bias must have the dtype of encoder \(torch.float32\), got torch.float64",
        ),
        ({"decoder": torch.zeros(33, 3)}, r"decoder must have the shape \(3, 33\), .*; columns of a decoder are rows"),
        ({"decoder": torch.zeros(3, 33).half()}, "decoder must have the dtype of encoder"),
        ({"strength": torch.zeros(3)}, r"strength must have the shape \[S, 3\], .*, got \(3,\)"),
        ({"strength": torch.zeros(4, 3)}, r"with S a divisor of the 6 rows of x, got \(4, 3\)"),
        ({"strength": torch.zeros(0, 3)}, r"with S a divisor of the 6 rows of x, got \(0, 3\)"),
        ({"strength": torch.zeros(1, 3).double()}, "strength must have the dtype of encoder"),
        ({"is_open": torch.ones(6, 2).bool()}, r"is_open must be torch.bool with 6 x 3 entries, .*\(6, 2\)"),
        ({"is_open": torch.ones(6, 3)}, "is_open must be torch.bool with 6 x 3 entries, .* got torch.float32"),
        ({"rule": "multiply"}, r"rule must be one of \('scale', 'set', 'add', 'add_gated'\), got 'multiply'"),
        ({"activation": "topk"}, r"activation must be one of \('relu', 'sigmoid', 'tanh'\), got 'topk'"),
        ({"threshold": math.nan}, "threshold must be a number, got nan"),
        ({"eps": 0.0}, "eps must be finite and above 0, got 0.0"),
        ({"encoder": torch.zeros(3, 33, device="meta")}, "encoder must be on the device of x .cpu., got meta"),
        ({"strength": torch.zeros(1, 3, device="meta")}, "strength must be on the device of x .cpu., got meta"),
        ({"is_open": torch.zeros(6, 3, device="meta").bool()}, "is_open must be on the device of x .cpu., got meta"),
    ],
)
def test_an_error_names_the_argument(change, message):
    x, encoder, bias, decoder, strength = case()
    arguments = {"x": x, "encoder": encoder, "encoder_sum": encoder.sum(1), "bias": bias, "decoder": decoder}
    with pytest.raises(ValueError, match=message):
        scar_steer(**(arguments | {"strength": strength, "rule": "scale"} | change))
