import math
from functools import partial

import pytest
import torch

from shared_kernels import atman_attention, atman_suffix_attention
from shared_kernels.atman_attention import eager
from shared_kernels.atman_attention.eager import MODES, suppress_scores
from shared_kernels.atman_attention.reference import atman_attention_reference, atman_suffix_attention_reference

FACTORS = [0.0, 0.1, 0.9, 1.0, 3.0]
OUR_MODES = MODES[:3]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def dense_case(B=2, H=4, Hk=2, Tq=5, Tk=7, D=8, Dv=None, dtype=torch.float32):
    query, key, value = (
        torch.randn(*shape, dtype=torch.float64).to(dtype)
        for shape in ((B, H, Tq, D), (B, Hk, Tk, D), (B, Hk, Tk, Dv or D))
    )
    return query, key, value, random_factors(B, Tk)


def random_factors(*shape):
    return torch.tensor(FACTORS)[torch.randint(0, len(FACTORS), shape)]


def left_padding(B, Tk):
    """Row b has b padding keys in front."""
    return (torch.arange(Tk) >= torch.arange(B)[:, None])[:, None, None, :]


def everything(B, H, Tq, Tk):
    return {
        "visible": left_padding(B, Tk),
        "bias": torch.randn(1, H, Tq, Tk),
        "is_causal": True,
        "window": 3,
        "softcap": 2.0,
        "sinks": torch.randn(H),
        "scale": 0.7,
    }


SEGMENTS = {
    "cu_seqlens": torch.tensor([0, 1, 5, 5, 11], dtype=torch.int32),
    "prefix_start": torch.tensor([0, 2, 3, 4], dtype=torch.int32),
    "prefix_length": torch.tensor([4, 0, 2, 5], dtype=torch.int32),
}
"""One row; no prefix; no rows; a prefix that overlaps another."""


def packed_case(S=11, H=4, Hk=2, D=8, N=9, Dv=None, dtype=torch.float32):
    shapes = ((S, H, D), (S, Hk, D), (S, Hk, Dv or D), (N, Hk, D), (N, Hk, Dv or D))
    return *(torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in shapes), random_factors(S)


def one_prompt(lengths, T, H=4, Hk=2, D=8):
    """Suffixes of one prompt of T tokens, of the given lengths, their first key suppressed."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    case = packed_case(S=int(cu_seqlens[-1]), H=H, Hk=Hk, D=D, N=T)
    case[-1].fill_(1.0)[cu_seqlens[:-1]] = 0.1
    lengths = torch.tensor(lengths)
    return case, {"cu_seqlens": cu_seqlens, "prefix_start": 0 * lengths, "prefix_length": T - lengths}


@pytest.mark.parametrize("mode", OUR_MODES)
@pytest.mark.parametrize("features", ["none", "causal", "all"])
def test_dense_attention_equals_the_definition(run, mode, features):
    query, key, value, factors = dense_case()
    settings = {"none": {}, "causal": {"is_causal": True}, "all": everything(2, 4, 5, 7)}[features]
    expected = atman_attention_reference(query, key, value, factors, mode=mode, **settings)
    actual = run(atman_attention, query, key, value, factors, mode=mode, **settings)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, **CLOSE)


@pytest.mark.parametrize(
    ("H", "Hk", "Tq", "Tk", "D"),
    [
        pytest.param(1, 1, 1, 1, 1, id="smallest"),
        pytest.param(7, 1, 11, 11, 80, id="seven-heads-per-key-head-and-d-80"),
        pytest.param(2, 2, 3, 70, 16, id="two-tiles-of-keys"),
        pytest.param(2, 2, 7, 3, 4, id="rows-before-the-first-key"),
        pytest.param(34, 1, 1, 5, 4, id="more-heads-than-a-tile-packs"),
    ],
)
def test_any_shape_equals_the_definition(run, H, Hk, Tq, Tk, D):
    case = dense_case(1, H, Hk, Tq, Tk, D)
    expected = atman_attention_reference(*case, is_causal=True)
    torch.testing.assert_close(run(atman_attention, *case, is_causal=True).double(), expected, **CLOSE)


@pytest.mark.parametrize("features", ["none", "all"])
def test_without_factors_it_is_plain_attention(run, features):
    query, key, value, _ = dense_case()
    settings = {"none": {}, "all": everything(2, 4, 5, 7)}[features]
    expected = atman_attention_reference(query, key, value, None, **settings)
    torch.testing.assert_close(run(atman_attention, query, key, value, None, **settings).double(), expected, **CLOSE)
    if features == "none":
        plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        torch.testing.assert_close(expected.float(), plain, **CLOSE)


@pytest.mark.parametrize("mode", OUR_MODES)
@pytest.mark.parametrize("features", ["none", "all"])
def test_suffixes_equal_the_definition(run, mode, features):
    case = packed_case()
    settings = {"none": {}, "all": {"window": 3, "softcap": 2.0, "sinks": torch.randn(4), "scale": 0.7}}[features]
    expected = atman_suffix_attention_reference(*case, **SEGMENTS, mode=mode, **settings)
    actual = run(atman_suffix_attention, *case, **SEGMENTS, mode=mode, **settings)
    torch.testing.assert_close(actual.double(), expected, **CLOSE)


@pytest.mark.parametrize("window", [None, 40])
def test_segments_of_several_blocks_after_prefixes_of_several_tiles(run, window):
    case = packed_case(S=42, H=2, Hk=1, D=4, N=75)
    segments = {
        "cu_seqlens": torch.tensor([0, 37, 42]),
        "prefix_start": torch.tensor([3, 0]),
        "prefix_length": torch.tensor([70, 1]),
    }
    expected = atman_suffix_attention_reference(*case, **segments, window=window)
    torch.testing.assert_close(
        run(atman_suffix_attention, *case, **segments, window=window).double(), expected, **CLOSE
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", ["none", "all"])
def test_float64_agrees_with_the_definition_to_the_last_digits(mode, features):
    case = dense_case(Dv=5, dtype=torch.float64)
    settings = {"none": {}, "all": everything(2, 4, 5, 7)}[features]
    expected = atman_attention_reference(*case, mode=mode, **settings)
    torch.testing.assert_close(atman_attention(*case, mode=mode, **settings), expected, rtol=1e-12, atol=1e-12)
    if mode in OUR_MODES:
        settings = {"none": {}, "all": {"window": 4, "softcap": 2.0, "sinks": torch.randn(4)}}[features]
        packed = packed_case(Dv=5, dtype=torch.float64)
        expected = atman_suffix_attention_reference(*packed, **SEGMENTS, mode=mode, **settings)
        actual = atman_suffix_attention(*packed, **SEGMENTS, mode=mode, **settings)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(run, dtype):
    dense, packed = dense_case(dtype=dtype), packed_case(dtype=dtype)
    actual = run(atman_attention, *dense), run(atman_suffix_attention, *packed, **SEGMENTS)
    expected = atman_attention_reference(*dense), atman_suffix_attention_reference(*packed, **SEGMENTS)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=2e-2)


def test_a_suffix_is_the_last_rows_of_dense_attention(run):
    T, lengths = 12, [12, 11, 10, 3, 1]
    case, segments = one_prompt(lengths, T)
    query, key, value, prefix_key, prefix_value, factors = case
    actual = run(atman_suffix_attention, *case, **segments, window=7)
    for start, length in zip(segments["cu_seqlens"].tolist(), lengths, strict=False):
        own = slice(start, start + length)
        keys, values = (
            torch.cat([shared[: T - length], rows[own]]).transpose(0, 1)[None]
            for shared, rows in ((prefix_key, key), (prefix_value, value))
        )
        f = torch.cat([torch.ones(T - length), factors[own]])[None]
        rows = query[own].transpose(0, 1)[None]
        dense = run(atman_attention, rows, keys, values, f, is_causal=True, window=7)[0].transpose(0, 1)
        torch.testing.assert_close(actual[own], dense, **CLOSE)


def test_a_negative_score_shows_what_the_modes_do(run):
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([-2.0, 0.0]).view(1, 1, 2, 1)
    value = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)  # the output is the weight of the first key
    factors = torch.tensor([[0.1, 1.0]])
    weights = {
        mode: run(atman_attention, query, key, value, factors, mode=mode, scale=1.0).item() for mode in OUR_MODES
    }
    plain = run(atman_attention, query, key, value, None, scale=1.0).item()
    assert plain == pytest.approx(0.119, abs=1e-3)
    expected = {"shift_min": 0.119, "log_additive": 0.013, "multiply": 0.450}
    assert weights == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("visible", [None, torch.tensor([[True, True, False, True]])])
def test_a_key_of_factor_1_keeps_the_bits_of_its_score(visible):
    scores, factors = torch.randn(50, 4), torch.tensor([1.0, 0.3, 0.5, 1.0])
    for mode in MODES:
        changed = suppress_scores(scores, factors, mode, visible)
        assert torch.equal(changed[:, [0, 3]], scores[:, [0, 3]])
        assert not torch.equal(changed[:, 1], scores[:, 1])


@pytest.mark.parametrize("mode", OUR_MODES)
def test_factors_of_1_give_the_bits_of_plain_attention(run, mode):
    query, key, value, _ = dense_case()
    for settings in (everything(2, 4, 5, 7), {"softcap": 3.0}):
        ones = run(atman_attention, query, key, value, torch.ones(2, 7), mode=mode, **settings)
        assert torch.equal(ones, run(atman_attention, query, key, value, None, **settings))
    *packed, _ = packed_case()
    settings = {**SEGMENTS, "softcap": 3.0}
    ones = run(atman_suffix_attention, *packed, torch.ones(11), mode=mode, **settings)
    assert torch.equal(ones, run(atman_suffix_attention, *packed, None, **settings))


def test_a_row_all_of_whose_keys_are_removed_keeps_its_attention(run):
    query, key, value, _ = dense_case(B=1, Tq=4, Tk=4)
    factors = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    for settings in ({}, {"softcap": 3.0}):
        removed = run(atman_attention, query, key, value, factors, mode="log_additive", is_causal=True, **settings)
        plain = run(atman_attention, query, key, value, None, is_causal=True, **settings)
        torch.testing.assert_close(removed[:, :, :2], plain[:, :, :2], **CLOSE)
        without = run(
            atman_attention, query[:, :, 2:], key[:, :, 2:], value[:, :, 2:], None, is_causal=True, **settings
        )
        torch.testing.assert_close(removed[:, :, 2:], without, **CLOSE)


@pytest.mark.parametrize("mode", OUR_MODES)
def test_a_row_that_sees_no_key_is_zero(run, mode):
    query, key, value, factors = dense_case()
    visible = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    visible[0, :, 2], visible[1, :, :, 3:] = False, False
    for settings in ({}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}):
        out = run(atman_attention, query, key, value, factors, mode=mode, visible=visible, **settings)
        assert torch.equal(out[0, :, 2], torch.zeros(4, 8))
        assert out.isfinite().all()
        assert out[1].abs().gt(0).all()


def test_arguments_need_not_be_contiguous(run):
    query, key, value, factors = dense_case()
    strided = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key, value))
    every_other = torch.stack([factors, factors], 1)[:, 0]
    torch.testing.assert_close(
        run(atman_attention, *strided, every_other), run(atman_attention, query, key, value, factors), **CLOSE
    )
    packed = packed_case()
    columns = (each.mT.contiguous().mT for each in packed[:5])
    torch.testing.assert_close(
        run(atman_suffix_attention, *columns, packed[5], **SEGMENTS),
        run(atman_suffix_attention, *packed, **SEGMENTS),
        **CLOSE,
    )


def test_there_may_be_nothing_to_do(run):
    query, key, value, factors = dense_case(Tq=0)
    assert run(atman_attention, query, key, value, factors, is_causal=True).shape == (2, 4, 0, 8)
    none = torch.zeros(0, dtype=torch.int32)
    segments = {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "prefix_start": none, "prefix_length": none}
    assert run(atman_suffix_attention, *packed_case(S=0), **segments).shape == (0, 4, 8)
    no_prefix = {**SEGMENTS, "prefix_start": torch.zeros(4).int(), "prefix_length": torch.zeros(4).int()}
    case = packed_case(N=0)
    expected = atman_suffix_attention_reference(*case, **no_prefix)
    torch.testing.assert_close(run(atman_suffix_attention, *case, **no_prefix).double(), expected, **CLOSE)


@pytest.mark.parametrize("mode", OUR_MODES)
def test_explicit_scores_stay_within_the_budget_and_their_chunks_do_not_show(monkeypatch, mode):
    case, settings = dense_case(Tq=7), everything(2, 4, 7, 7)
    whole = atman_attention(*case, mode=mode, **settings)
    held, attend = [], eager._attend

    def spy(q, k, *rest):
        held.append(q.shape[:4].numel() * k.shape[2])
        return attend(q, k, *rest)

    monkeypatch.setattr(eager, "_attend", spy)
    monkeypatch.setattr(eager, "_CHUNK_SCORES", 120)
    chunked = atman_attention(*case, mode=mode, **settings)
    assert len(held) == 4  # of 2 rows, 2 batches, 4 heads and 7 keys
    assert max(held) <= 120
    torch.testing.assert_close(chunked, whole, **CLOSE)


@pytest.mark.parametrize("mode", OUR_MODES)
def test_short_suffixes_of_one_prompt_are_computed_together(monkeypatch, mode):
    case, segments = one_prompt(list(range(12, 0, -1)), 12)
    groups, find = [], eager._groups
    monkeypatch.setattr(eager, "_groups", lambda *arguments: groups.append(find(*arguments)) or groups[-1])
    together = atman_suffix_attention(*case, **segments, mode=mode)
    monkeypatch.setattr(eager, "_GROUP_SCORES", 0)
    alone = atman_suffix_attention(*case, **segments, mode=mode)
    assert [len(each) for each in groups] == [6, 12]
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize("mode", OUR_MODES)
def test_the_gradient_agrees_with_finite_differences(mode):
    query, key, value, _ = dense_case(1, 2, 1, 3, 3, 2, dtype=torch.float64)
    factors = torch.tensor([[0.3, 1.0, 2.0]], dtype=torch.float64)
    tensors = tuple(each.requires_grad_() for each in (query, key, value, factors))
    for settings in ({"is_causal": True}, {"is_causal": True, "softcap": 2.0}):
        assert torch.autograd.gradcheck(partial(atman_attention, mode=mode, **settings), tensors)
    packed = [each.detach()[0].transpose(0, 1).clone().requires_grad_() for each in (query, key, value)]
    segments = {
        "cu_seqlens": torch.tensor([0, 3]),
        "prefix_start": torch.tensor([1]),
        "prefix_length": torch.tensor([1]),
    }
    function = partial(atman_suffix_attention, mode=mode, **segments)
    assert torch.autograd.gradcheck(function, (*packed, packed[1], packed[2], factors[0].detach().requires_grad_()))


def test_a_gradient_through_rows_that_see_nothing_is_finite():
    query, key, value, factors = dense_case()
    visible = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    visible[0, :, 1:] = True
    query.requires_grad_()
    (grad,) = torch.autograd.grad(atman_attention(query, key, value, factors, visible=visible).sum(), query)
    assert grad.isfinite().all()
    assert grad[1].eq(0).all()


@pytest.mark.triton
def test_the_operators_are_well_registered():
    from shared_kernels.atman_attention.op import _attention, _suffix_attention

    query, key, value, factors = dense_case(B=1, Tq=3, Tk=3)
    bias, sinks = torch.randn(3, 3), torch.randn(4)
    rule = ("shift_min", 0.5, 2.0, 2)
    torch.library.opcheck(_attention, (query, key, value, factors, None, bias, sinks, *rule, True))
    torch.library.opcheck(_suffix_attention, (*packed_case(), *SEGMENTS.values(), None, *rule))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_graph_has_no_breaks(impl, dynamic):
    dense, packed = dense_case(), packed_case()
    for op, case, settings in (
        (atman_attention, dense, {"is_causal": True}),
        (atman_attention, dense, {"mode": "log_additive", "visible": left_padding(2, 7)}),
        (atman_suffix_attention, packed, {**SEGMENTS, "window": 4}),
    ):
        function = partial(op, impl=impl, **settings)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(*case), function(*case), **CLOSE)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(2, 2, 7, 5)}, "needs as many columns in value as in query, 256 at most, got 5 and 8"),
        ({"mode": "shift_min_all"}, 'computes visible keys only, got mode="shift_min_all"; pass impl="eager"'),
        ({"query": torch.zeros(2, 4, 5, 8, requires_grad=True)}, "has no backward pass, got an argument that requires"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_by_name_and_runs_in_pytorch_otherwise(monkeypatch, change, message):
    arguments = dict(zip(("query", "key", "value", "factors"), dense_case(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        atman_attention(**arguments, impl="triton")
    from shared_kernels import _dispatch

    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    expected = atman_attention_reference(**arguments)
    torch.testing.assert_close(atman_attention(**arguments).double(), expected, **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 5, 8)}, r"query must have 4 axes, as \[B, H, T, D\], got \(4, 5, 8\)"),
        ({"key": torch.zeros(2, 2, 7, 8).double()}, r"key must have the dtype of query \(torch.float32\), got"),
        ({"key": torch.zeros(2, 2, 7, 6)}, r"key must have as many columns as query \(8\), got 6"),
        ({"key": torch.zeros(2, 3, 7, 8), "value": torch.zeros(2, 3, 7, 8)}, r"divides that of query \(4\), got 3"),
        ({"key": torch.zeros(1, 2, 7, 8), "value": torch.zeros(1, 2, 7, 8)}, r"have the batch of query \(2\), got 1"),
        ({"value": torch.zeros(2, 2, 6, 8)}, r"value must have the shape \(2, 2, 7, 'Dv'\), as key, got"),
        ({"factors": torch.ones(7)}, r"factors must have the shape \(2, 7\), one number per key, got \(7,\)"),
        ({"factors": torch.ones(2, 7).half()}, "factors must be float32 or float64, got torch.float16"),
        ({"visible": torch.ones(7)}, "visible must be torch.bool, got torch.float32; additive masks go into bias"),
        ({"visible": torch.ones(2, 7).bool()}, r"visible must be broadcastable to \(2, 4, 5, 7\), got \(2, 7\)"),
        ({"bias": torch.ones(6)}, r"bias must be broadcastable to \(2, 4, 5, 7\), got \(6,\)"),
        ({"bias": torch.ones(7).int()}, "bias must be floating point, got torch.int32"),
        ({"sinks": torch.ones(2)}, r"sinks must be floating point with the shape \(4,\), one number per head"),
        ({"mode": "divide"}, r"mode must be one of \('shift_min', .*\), got 'divide'"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"softcap": 0.0}, "softcap must be finite and above 0, got 0.0"),
        ({"window": 0, "is_causal": True}, "window must be at least 1, got 0"),
        ({"window": 3}, "window must be None unless is_causal, got 3; put another window into visible"),
        ({"query": torch.zeros(2, 4, 5, 8, device="meta")}, r"key must be on the device of query \(meta\), got cpu"),
    ],
)
def test_an_error_names_the_argument(change, message):
    arguments = dict(zip(("query", "key", "value", "factors"), dense_case(), strict=True))
    with pytest.raises(ValueError, match=message):
        atman_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(11, 8)}, r"query must have 3 axes, as \[S, H, D\], got \(11, 8\)"),
        (
            {"key": torch.zeros(9, 2, 8), "value": torch.zeros(9, 2, 8)},
            r"key must have the rows of query \(11\), got 9",
        ),
        ({"prefix_key": torch.zeros(9, 2, 7)}, r"prefix_key must have the shape \('N', 2, 8\), got \(9, 2, 7\)"),
        ({"prefix_value": torch.zeros(9, 2, 8).half()}, "prefix_value must have the dtype of query"),
        ({"prefix_value": torch.zeros(8, 2, 8)}, r"prefix_value must have the rows of prefix_key \(9\), got 8"),
        ({"factors": torch.ones(9)}, r"factors must have the shape \(11,\), one number per row of query, got \(9,\)"),
        ({"cu_seqlens": torch.zeros(5)}, "cu_seqlens must be int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 1, 5, 5, 10])}, "cu_seqlens must end with 11, the number of rows .*, got 10"),
        ({"prefix_start": torch.zeros(3).int()}, r"prefix_start must have the shape \(4,\), one number per segment"),
        ({"prefix_length": torch.zeros(4)}, "prefix_length must be torch.int32 or torch.int64, got torch.float32"),
        ({"mode": "shift_min_all"}, 'mode must not be "shift_min_all" here: .* use "shift_min", or atman_attention'),
    ],
)
def test_an_error_of_suffixes_names_the_argument(change, message):
    names = ("query", "key", "value", "prefix_key", "prefix_value", "factors")
    arguments = dict(zip(names, packed_case(), strict=True)) | SEGMENTS
    with pytest.raises(ValueError, match=message):
        atman_suffix_attention(**(arguments | change))
