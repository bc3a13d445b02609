import math

import pytest
import torch

from shared_kernels import edit_magnitude, edit_step, row_quantile
from shared_kernels.edit_step import op
from shared_kernels.edit_step.eager import PREDICTIONS
from shared_kernels.edit_step.reference import edit_magnitude_reference, edit_step_reference

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def case(E=2, B=2, C=4, h=6, w=5, dtype=torch.float32, outputs_dtype=None, seed=0):
    """The arguments that every step has; x and outputs of magnitude one, alpha^2 + sigma^2 = 1."""
    torch.manual_seed(seed)
    return {
        "x": numbers(B, C, h, w, dtype=dtype),
        "outputs": numbers((1 + E) * B, C, h, w, dtype=outputs_dtype or dtype),
        "scale": torch.linspace(-3.0, 5.0, E, dtype=dtype),
        "coefficients": torch.tensor([0.8, 0.6, 0.9, 0.2, -0.05, 0.7], dtype=dtype),
        "prediction_type": "epsilon",
    }


def masking(arguments, q=0.6, grid=(3, 5)):
    """Everything a mask is made of, thresholds being quantiles."""
    E, (B, _, h, w) = arguments["scale"].shape[0], arguments["x"].shape
    dtype = arguments["x"].dtype
    user_mask = torch.rand(E, 1, h, w, dtype=dtype)
    magnitude = edit_magnitude(arguments["outputs"], arguments["scale"], user_mask=user_mask, impl="eager")
    mass = torch.rand(E, B, *grid, dtype=dtype)

    def thresholds(S):
        return row_quantile(S.flatten(0, 1).flatten(1), q, impl="eager").view(E, B)

    return {
        "magnitude": magnitude,
        "magnitude_threshold": thresholds(magnitude),
        "mass": mass,
        "mass_threshold": thresholds(mass),
        "user_mask": user_mask,
        "active": torch.arange(E) % 3 != 1,
    }


def history(arguments):
    x = arguments["x"]
    return {"residual": numbers(*x.shape, dtype=x.dtype), "previous": numbers(*x.shape, dtype=x.dtype)}


def compare(run, arguments, close=CLOSE):
    x_next, m0, masks = run(edit_step, **arguments)
    expected_next, expected_m0, expected_masks = edit_step_reference(**arguments)
    assert x_next.dtype == m0.dtype == arguments["x"].dtype
    assert torch.equal(masks, expected_masks)
    torch.testing.assert_close(m0.double(), expected_m0, **close)
    torch.testing.assert_close(x_next.double(), expected_next, **close)


@pytest.mark.parametrize("E", range(9))
def test_any_number_of_edits_equals_the_definition(run, E):
    arguments = case(E=E)
    arguments |= masking(arguments) | history(arguments)
    compare(run, arguments)
    magnitude = run(edit_magnitude, arguments["outputs"], arguments["scale"], user_mask=arguments["user_mask"])
    expected = edit_magnitude_reference(arguments["outputs"], arguments["scale"], user_mask=arguments["user_mask"])
    torch.testing.assert_close(magnitude.double(), expected, **CLOSE)


@pytest.mark.parametrize(
    ("B", "C", "h", "w", "grid"),
    [
        pytest.param(1, 1, 1, 1, (1, 1), id="smallest"),
        pytest.param(1, 3, 13, 11, (5, 4), id="a-grid-that-does-not-divide"),
        pytest.param(3, 16, 4, 9, (4, 9), id="sixteen-channels-and-a-cell-per-pixel"),
        pytest.param(1, 70, 3, 7, (1, 7), id="more-channels-than-usual"),
        pytest.param(0, 4, 3, 3, (1, 1), id="no-pictures"),
        pytest.param(1, 4, 0, 3, (1, 1), id="no-pixels"),
    ],
)
def test_any_shape_equals_the_definition(run, B, C, h, w, grid):
    arguments = case(2, B, C, h, w)
    if B * h:
        arguments |= masking(arguments, grid=grid)
    compare(run, arguments | history(arguments))
    magnitude = run(edit_magnitude, arguments["outputs"], arguments["scale"])
    torch.testing.assert_close(
        magnitude.double(), edit_magnitude_reference(arguments["outputs"], arguments["scale"]), **CLOSE
    )


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_every_prediction_type_equals_the_definition(run, prediction_type):
    compare(run, case() | {"prediction_type": prediction_type})


@pytest.mark.parametrize("left_out", ["magnitude", "mass", "user_mask", "active", "residual", "previous"])
def test_everything_optional_may_be_left_out(run, left_out):
    arguments = case()
    arguments |= masking(arguments) | history(arguments)
    compare(run, {name: value for name, value in arguments.items() if not name.startswith(left_out)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_the_dtype_of_the_state(run, dtype):
    arguments = case(outputs_dtype=dtype)
    arguments |= masking(arguments)
    compare(run, arguments)  # to float32: the outputs are exact, as they are
    magnitude = run(edit_magnitude, arguments["outputs"], arguments["scale"])
    assert magnitude.dtype == torch.float32
    torch.testing.assert_close(
        magnitude.double(), edit_magnitude_reference(arguments["outputs"], arguments["scale"]), **CLOSE
    )


def test_float64_stays_float64():
    arguments = case(dtype=torch.float64)
    arguments |= masking(arguments) | history(arguments)
    x_next, m0, masks = edit_step(**arguments, impl="eager")
    expected = edit_step_reference(**arguments)
    for actual, wanted in zip((x_next, m0, masks), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-13, atol=1e-13)


def test_a_hand_computed_case(run):
    outputs = torch.tensor([1.0, 1.0, 4.0, 2.0]).view(2, 1, 1, 2)
    scale = torch.tensor([-2.0])
    magnitude = run(edit_magnitude, outputs, scale)
    assert magnitude.flatten().tolist() == [6.0, 2.0]
    x_next, m0, masks = run(
        edit_step,
        torch.tensor([10.0, 20.0]).view(1, 1, 1, 2),
        outputs,
        scale,
        torch.tensor([1.0, 0.5, 2.0, 3.0, 100.0, 1.0]),
        prediction_type="flow_prediction",
        magnitude=magnitude,
        magnitude_threshold=torch.tensor([[6.0]]),
        residual=torch.tensor([0.25, 0.5]).view(1, 1, 1, 2),
    )
    assert masks.flatten().tolist() == [True, False]
    assert m0.flatten().tolist() == [12.5, 19.5]  # o is 1 - 2 * 3 and 1
    assert x_next.flatten().tolist() == [57.75, 99.0]


def test_a_number_level_with_the_threshold_is_in_the_mask(run):
    arguments = case(E=1, B=1, h=1, w=11)
    magnitude = run(edit_magnitude, arguments["outputs"], arguments["scale"])
    threshold = run(row_quantile, magnitude.view(1, -1), 0.9).view(1, 1)
    masks = run(edit_step, **arguments, magnitude=magnitude, magnitude_threshold=threshold)[2]
    assert masks.flatten().tolist() == (magnitude >= magnitude.flatten().sort().values[9]).flatten().tolist()
    assert masks.sum() == 2


@pytest.mark.parametrize("nothing", ["scale", "threshold", "active", "user_mask"])
def test_an_edit_that_does_nothing_changes_no_number(run, nothing):
    arguments = case(E=1)
    plain = run(
        edit_step,
        **(case(E=0) | {name: arguments[name] for name in ("x", "coefficients")})
        | {"outputs": arguments["outputs"][:2]},
    )
    arguments |= {
        "scale": {"scale": torch.zeros(1)},
        "threshold": {"mass": torch.rand(1, 2, 3, 5), "mass_threshold": torch.full((1, 2), 2.0)},
        "active": {"active": torch.tensor([False])},
        "user_mask": {"user_mask": torch.zeros(1)},
    }[nothing]
    edited = run(edit_step, **arguments)
    for actual, expected in zip(edited[:2], plain[:2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_what_an_inactive_edit_holds_does_not_matter_and_a_nan_of_another_shows(run):
    arguments = case(E=2, B=1)
    arguments["outputs"][1] = math.nan
    hidden = run(edit_step, **arguments, active=torch.tensor([False, True]))
    shown = run(edit_step, **arguments, active=torch.tensor([True, True]))
    assert hidden[0].isfinite().all()
    assert not hidden[2][0].any()
    assert shown[0].isnan().all()


def test_the_order_of_edits_does_not_matter(run):
    arguments = case(E=3, B=1)
    swapped = arguments | {
        "outputs": arguments["outputs"][[0, 3, 1, 2]],
        "scale": arguments["scale"][[2, 0, 1]],
    }
    for actual, expected in zip(run(edit_step, **swapped)[:2], run(edit_step, **arguments)[:2], strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_a_batch_equals_its_pictures_one_by_one(run):
    arguments = case(E=2, B=3)
    arguments |= masking(arguments)
    together = run(edit_step, **arguments)
    own = arguments | {name: value[:, 1:2] for name, value in arguments.items() if name.startswith(("mag", "mass"))}
    own |= {"x": arguments["x"][1:2], "outputs": arguments["outputs"][1::3]}
    for actual, expected in zip(run(edit_step, **own), together, strict=True):
        expected = expected[:, 1:2] if expected.dtype == torch.bool else expected[1:2]
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_rows_apart_in_memory(run):
    arguments = case()
    apart = arguments | {
        name: arguments[name].permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1) for name in ("x", "outputs")
    }
    for actual, expected in zip(run(edit_step, **apart), run(edit_step, **arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.triton
def test_the_kernels_are_valid_custom_ops():
    arguments = case(E=1, B=1, h=2, w=3)
    torch.library.opcheck(op._edit_magnitude, (arguments["outputs"], arguments["scale"], torch.rand(2, 3)))
    everything = arguments | masking(arguments, grid=(1, 3)) | history(arguments)
    torch.library.opcheck(op._edit_step, (), everything)


def test_a_compiled_graph_has_no_breaks_and_the_same_result(impl):
    arguments = case()
    arguments |= masking(arguments) | history(arguments)

    def sample(arguments):
        magnitude = edit_magnitude(arguments["outputs"], arguments["scale"], impl=impl)
        return magnitude, *edit_step(**arguments, impl=impl)

    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(arguments), sample(arguments), strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": torch.zeros(5, 4, 6, 5)}, r"outputs must have the shape \[3 \* B, C, h, w\] with C at least 1"),
        ({"outputs": torch.zeros(6, 4, 6, 5).double()}, r"outputs must be floating point, not wider than scale"),
        ({"scale": torch.zeros(2).half()}, r"scale must be torch.float32 or torch.float64 with the shape \[E\], got"),
        ({"scale": torch.zeros(2).double()}, r"scale must have the dtype of x \(torch.float32\), got torch.float64"),
        ({"x": torch.zeros(2, 4, 6, 5).half()}, r"x must be torch.float32 or torch.float64 with the shape \(2, 4, 6"),
        ({"x": torch.zeros(1, 4, 6, 5)}, r"x must be .* with the shape \(2, 4, 6, 5\), that of the outputs of one"),
        ({"x": torch.zeros(2, 4, 6, 5).requires_grad_()}, "x must not require a gradient, got requires_grad=True"),
        ({"coefficients": torch.zeros(4)}, r"coefficients must have the shape \(6,\): alpha, sigma, a, b, c, g, got"),
        ({"prediction_type": "v"}, r"prediction_type must be one of \('epsilon', 'v_prediction', .* got 'v'"),
        ({"residual": torch.zeros(2, 4)}, r"residual must have the shape \(2, 4, 6, 5\), got \(2, 4\)"),
        ({"mass": torch.zeros(2, 2, 3, 5)}, "mass_threshold must be given with mass, and only then, got one of the"),
        ({"mass": torch.zeros(2, 2, 7, 5)}, r"mass must have the shape \[2, 2, gh, gw\] with gh in \[1, 6\] and gw"),
        ({"magnitude_threshold": torch.zeros(2, 2)}, "magnitude_threshold must be given with magnitude, and only then"),
        ({"user_mask": torch.zeros(3, 1, 6, 5)}, r"user_mask must be torch.float32, broadcastable to \(2, 2, 6, 5\)"),
        ({"user_mask": torch.ones(6, 5).bool()}, r"user_mask must be torch.float32, .* got torch.bool \(6, 5\)"),
        ({"active": torch.zeros(2)}, r"active must be torch.bool with the shape \(2,\), one per edit, got torch.flo"),
        ({"x": torch.zeros(2, 4, 6, 5, device="meta")}, r"outputs must be on the device of x \(meta\), got cpu"),
    ],
)
def test_an_error_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        edit_step(**(case() | change))
