import pytest
import torch
import torch.nn.functional as F

from shared_kernels import attn_column_mass
from shared_kernels.attn_column_mass import eager, op
from shared_kernels.attn_column_mass.reference import attn_column_mass_reference

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def case(rows=2, H=2, Q=5, K=7, D=8, Hk=None, dtype=torch.float32):
    """Scores far from equal; weights 0 and 1, but for one key."""
    q, k = (torch.randn(*shape).mul(1.5).to(dtype) for shape in ((rows, H, Q, D), (rows, Hk or H, K, D)))
    weight = (torch.rand(rows, K) < 0.4).to(torch.float32)
    weight[:, -1:] = -0.5
    return {"q": q, "k": k, "column_weight": weight}


def lse_of(arguments, scale=None):
    q, k = arguments["q"].double(), arguments["k"].double()
    return ((q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)).logsumexp(-1).float()


def compare(run, arguments, close=CLOSE):
    mass = run(attn_column_mass, **arguments)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), attn_column_mass_reference(**arguments), **close)


@pytest.mark.parametrize(
    ("rows", "H", "Q", "K", "D", "Hk"),
    [
        pytest.param(1, 1, 1, 1, 1, 1, id="smallest"),
        pytest.param(2, 3, 70, 77, 40, 3, id="several-tiles-and-a-head-of-40"),
        pytest.param(1, 6, 5, 9, 80, 2, id="shared-key-heads"),
        pytest.param(1, 1, 3, 5, 160, 1, id="wide-heads"),
        pytest.param(0, 2, 5, 7, 8, 2, id="no-rows"),
        pytest.param(2, 2, 0, 7, 8, 2, id="no-queries"),
        pytest.param(2, 2, 5, 0, 8, 2, id="no-keys"),
    ],
)
def test_any_shape_equals_the_definition(run, rows, H, Q, K, D, Hk):
    compare(run, case(rows, H, Q, K, D, Hk))


def test_a_hand_computed_case(run):
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    q[0, 1, 0, 0], k[0, 1, 2, 0] = 1e4, 1.0  # in the second head the first query sees the third key alone
    mass = run(attn_column_mass, q, k, torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(mass, torch.tensor([[0.7, 0.4, 0.4]]))


def test_it_is_what_attention_gives_the_indicator_of_the_keys(run):
    arguments = case(Q=6, K=11, D=16)
    value = arguments["column_weight"][:, None, :, None].expand(2, 2, 11, 16)
    attended = F.scaled_dot_product_attention(arguments["q"], arguments["k"], value)[..., 0].mean(1)
    torch.testing.assert_close(run(attn_column_mass, **arguments), attended, **CLOSE)


def test_all_keys_have_a_mass_of_one(run):
    arguments = case(K=33)
    arguments["column_weight"] = torch.ones(2, 33)
    torch.testing.assert_close(run(attn_column_mass, **arguments), torch.ones(2, 5))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale_equals_the_definition(run, scale):
    compare(run, case() | {"scale": scale})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(run, dtype):
    compare(run, case(Q=20, K=40, dtype=dtype))


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(lambda: torch.arange(7).view(1, 1, 1, 7) < torch.tensor([3, 6]).view(2, 1, 1, 1), id="padding"),
        pytest.param(lambda: torch.rand(5, 7) < 0.5, id="any"),
        pytest.param(lambda: torch.randn(2, 1, 5, 7), id="added"),
        pytest.param(lambda: torch.randn(2, 1).bfloat16().view(2, 1, 1, 1), id="added-to-all"),
        pytest.param(lambda: torch.zeros(7).masked_fill(torch.arange(7) > 2, -torch.inf), id="added-infinities"),
    ],
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_a_mask_acts_as_in_attention(run, mask, with_lse):
    arguments = case() | {"attn_mask": mask()}
    if with_lse:
        arguments["lse"] = torch.randn(2, 2, 5)  # of other keys, too
    compare(run, arguments)


def test_a_query_that_sees_no_key_has_no_mass(run):
    seen = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    seen[0, :, 3] = False
    arguments = case() | {"attn_mask": seen}
    mass = run(attn_column_mass, **arguments)
    assert mass[0, 3] == 0
    known = run(attn_column_mass, **arguments, lse=torch.zeros(2, 2, 5).masked_fill(~seen[..., 0], -torch.inf))
    assert known[0, 3] == 0
    assert mass.isfinite().all()
    assert known.isfinite().all()


def test_with_lse_the_keys_without_a_weight_are_not_needed(run):
    arguments = case(K=40, Q=9)
    arguments["column_weight"] = torch.zeros(2, 40).index_fill(1, torch.tensor([3, 4, 6]), 1.0)
    whole = run(attn_column_mass, **arguments)
    lse = lse_of(arguments)
    torch.testing.assert_close(run(attn_column_mass, **arguments, lse=lse), whole, **CLOSE)
    cut = {"q": arguments["q"], "k": arguments["k"][:, :, 3:7], "column_weight": arguments["column_weight"][:, 3:7]}
    torch.testing.assert_close(run(attn_column_mass, **cut, lse=lse), whole, **CLOSE)
    nothing = run(attn_column_mass, **arguments | {"column_weight": torch.zeros(2, 40)}, lse=lse)
    assert nothing.eq(0).all()


def test_a_batch_equals_its_rows_one_by_one(run):
    arguments = case(rows=3)
    alone = {name: value[1:2] for name, value in arguments.items()}
    torch.testing.assert_close(run(attn_column_mass, **alone)[0], run(attn_column_mass, **arguments)[1], **CLOSE)


def test_heads_side_by_side_in_memory_as_models_have_them(run):
    arguments = case()
    apart = {name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k")}
    columns_first = {name: arguments[name].transpose(2, 3).contiguous().transpose(2, 3) for name in ("q", "k")}
    expected = run(attn_column_mass, **arguments)
    torch.testing.assert_close(run(attn_column_mass, **arguments | apart), expected, **CLOSE)
    torch.testing.assert_close(run(attn_column_mass, **arguments | columns_first), expected, **CLOSE)


def test_float64_stays_float64():
    arguments = {name: value.double() for name, value in case().items()}
    mass = attn_column_mass(**arguments, impl="eager")
    torch.testing.assert_close(mass, attn_column_mass_reference(**arguments), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("budget", [1, 20, 90, 10_000])
def test_how_many_scores_exist_at_a_time_changes_nothing(monkeypatch, budget):
    arguments = case(H=3) | {"attn_mask": torch.rand(2, 3, 5, 7) < 0.7}
    monkeypatch.setattr(eager, "_CACHED_SCORES", budget)
    torch.testing.assert_close(
        attn_column_mass(**arguments, impl="eager").double(), attn_column_mass_reference(**arguments), **CLOSE
    )


@pytest.mark.triton
@pytest.mark.parametrize("busy", [1, 2, 100])
def test_heads_may_be_split_among_programs(monkeypatch, busy):
    from shared_kernels.attn_column_mass import kernel

    monkeypatch.setattr(kernel, "_BUSY_PROGRAMS", busy)
    arguments = case(rows=1, H=5)
    mass = attn_column_mass(**arguments, impl="triton")
    torch.testing.assert_close(mass.double(), attn_column_mass_reference(**arguments), **CLOSE)


def test_autocast_leaves_the_scores_in_float32(run):
    arguments = case()
    plain = run(attn_column_mass, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(attn_column_mass, **arguments), plain, **CLOSE)


@pytest.mark.triton
def test_the_kernel_is_a_valid_custom_op():
    q, k, weight = case(rows=1).values()
    torch.library.opcheck(op._attn_column_mass, (q, k, weight, None, None, 0.5))
    torch.library.opcheck(op._attn_column_mass, (q, k, weight, torch.randn(1, 2, 5), torch.rand(5, 7) < 0.5, 0.5))


def test_a_compiled_graph_has_no_breaks_and_the_same_result(impl):
    arguments = case() | {"attn_mask": torch.rand(5, 7) < 0.8}
    lse = lse_of(arguments)

    def masses(arguments, lse):
        return attn_column_mass(**arguments, impl=impl), attn_column_mass(**arguments, lse=lse, impl=impl)

    compiled = torch.compile(masses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments, lse), masses(arguments, lse), **CLOSE)


@pytest.mark.triton
def test_heads_that_are_too_wide_for_the_kernel_are_refused_by_name():
    with pytest.raises(ValueError, match='impl="triton" needs q with 256 columns at most, got 257; pass impl="eager"'):
        attn_column_mass(**case(D=257), impl="triton")
    assert attn_column_mass(**case(D=257)).shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, r"q must be floating point with the shape \[rows, H, Q, D\], got torch.float32"),
        (
            {"k": torch.zeros(2, 2, 7, 8).int()},
            r"k must be floating point with the shape \[rows, Hk, K, D\], got torch",
        ),
        ({"k": torch.zeros(2, 2, 7, 8).half()}, r"k must have the dtype of q \(torch.float32\), got torch.float16"),
        ({"k": torch.zeros(1, 2, 7, 8)}, r"k must have the 2 rows and the 8 columns of q, one at least, got \(1, 2, 7"),
        ({"k": torch.zeros(2, 3, 7, 8)}, r"k must have a number of heads that divides that of q \(2\), got 3"),
        ({"column_weight": torch.zeros(2, 5)}, r"column_weight must be floating point with the shape \(2, 7\), one"),
        ({"column_weight": torch.ones(2, 7).bool()}, r"column_weight must be .* got torch.bool \(2, 7\)"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"lse": torch.zeros(2, 5)}, r"lse must be torch.float32 or torch.float64 with the shape \(2, 2, 5\), got"),
        ({"attn_mask": torch.zeros(3, 7)}, r"attn_mask must be .* broadcastable to \(2, 2, 5, 7\), got torch.float32"),
        ({"attn_mask": torch.zeros(5, 7).int()}, "attn_mask must be torch.bool or floating point, .* got torch.int32"),
        ({"q": torch.zeros(2, 2, 5, 8).requires_grad_()}, "q must not require a gradient, got requires_grad=True"),
        ({"lse": torch.zeros(2, 2, 5, device="meta")}, r"lse must be on the device of q \(cpu\), got meta"),
    ],
)
def test_an_error_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        attn_column_mass(**(case() | change))
