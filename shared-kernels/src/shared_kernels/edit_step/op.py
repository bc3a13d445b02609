"""`edit_magnitude` and `edit_step`: check the arguments, pick an implementation."""

import torch
from torch import Tensor

from .._checks import check_no_gradient, check_one_device
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import PREDICTIONS, Prediction, edit_magnitude_eager, edit_step_eager

_STATE_DTYPES = (torch.float32, torch.float64)


def edit_magnitude(
    outputs: Tensor, scale: Tensor, *, user_mask: Tensor | None = None, impl: Implementation = "auto"
) -> Tensor:
    """Measure how strongly each edit pulls where: sum |d_e| over the channels, d_e = (o_e - o_0) scale_e user_mask_e.

    Its quantile per edit and picture, `row_quantile(magnitude.flatten(0, 1).flatten(1), q).view(E, B)`, is the
    threshold from which `edit_step` lets the edit act. Has no gradient.

    Args:
        outputs: `[(1 + E) * B, C, h, w]`, floating point: the model's outputs for B pictures, first those without an
            edit prompt (o_0), then those of each edit prompt.
        scale: `[E]`, float32 or float64, the edit guidance scales; negative removes a concept.
        user_mask: broadcastable to `[E, B, h, w]`, in the dtype of `scale`, not negative (not checked).
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[E, B, h, w]` in the dtype of `scale`, in which it is computed.

    Raises:
        ValueError: an argument does not fit the others, or requires a gradient; the message names it.

    Example:
        >>> outputs = torch.tensor([1.0, 1.0, 4.0, 2.0]).view(2, 1, 1, 2)  # one picture of two pixels, one edit
        >>> edit_magnitude(outputs, torch.tensor([-2.0])).view(-1)
        tensor([6., 2.])

    Source: Brack et al. 2023, "LEDITS++", section 3.
    """
    _check_outputs(outputs, scale)
    shape = (scale.shape[0], outputs.shape[0] // (1 + scale.shape[0]), *outputs.shape[2:])
    _check_user_mask(user_mask, shape, scale)
    check_no_gradient("edit_magnitude", outputs=outputs, scale=scale, user_mask=user_mask)
    check_one_device(outputs=outputs, scale=scale, user_mask=user_mask)
    if choose(impl, "edit_magnitude", outputs.device, scale.dtype) == "eager":
        return edit_magnitude_eager(outputs, scale, user_mask=user_mask)
    return _edit_magnitude(outputs, scale, user_mask)


def edit_step(
    x: Tensor,
    outputs: Tensor,
    scale: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: Prediction,
    residual: Tensor | None = None,
    previous: Tensor | None = None,
    magnitude: Tensor | None = None,
    magnitude_threshold: Tensor | None = None,
    mass: Tensor | None = None,
    mass_threshold: Tensor | None = None,
    user_mask: Tensor | None = None,
    active: Tensor | None = None,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one sampling step under any number of masked edits: guide, predict the data, step, in one pass.

    With o = o_0 + sum_e mask_e (o_e - o_0) scale_e user_mask_e, and m0 the data prediction of o,

        x_next = a x + b m0 + c previous + g residual.

    mask_e holds where `magnitude` and `mass` both reach their thresholds; one that is not given holds everywhere. An
    edit of scale 0, or with an empty mask, changes no number. Has no gradient.

    Args:
        x: `[B, C, h, w]`, float32 or float64, the noisy latents alpha x0 + sigma noise. Everything is computed in its
            dtype, and all other arguments have it but `outputs` and `active`.
        outputs: `[(1 + E) * B, C, h, w]`, as in `edit_magnitude`; of the dtype of `x` or a narrower one.
        scale: `[E]`, the edit guidance scales; negative removes a concept. E may be 0.
        coefficients: `[6]`: alpha, sigma, a, b, c, g. A row of a table of all steps, so that no number is read.
        prediction_type: `"epsilon"`: m0 = (x - sigma o) / alpha, `"v_prediction"`: alpha x - sigma o, `"sample"`: o,
            `"flow_prediction"`: x - sigma o.
        residual: `[B, C, h, w]`, noise or what an inversion stored.
        previous: `[B, C, h, w]`, the m0 of the step before.
        magnitude: `[E, B, h, w]`, from `edit_magnitude`.
        magnitude_threshold: `[E, B]`; neither or both are given.
        mass: `[E, B, gh, gw]`, attention to the edit's tokens by cells; pixel (y, x) is in cell (y gh // h, x gw // w).
        mass_threshold: `[E, B]`; neither or both are given.
        user_mask: broadcastable to `[E, B, h, w]`.
        active: bool `[E]`. An edit that is not active changes nothing, whatever its outputs hold; its mask is empty.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        x_next and m0, `[B, C, h, w]` in the dtype of `x`, and the masks `[E, B, h, w]`, bool.

    Raises:
        ValueError: an argument does not fit the others, or requires a gradient; the message names it.

    Example:
        >>> x, outputs = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 1.0, 4.0, 2.0]).view(2, 1, 1, 2)
        >>> scale, coefficients = torch.tensor([2.0]), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
        >>> magnitude, threshold = edit_magnitude(outputs, scale), torch.tensor([[3.0]])
        >>> x_next, m0, masks = edit_step(
        ...     x,
        ...     outputs,
        ...     scale,
        ...     coefficients,
        ...     prediction_type="flow_prediction",
        ...     magnitude=magnitude,
        ...     magnitude_threshold=threshold,
        ... )
        >>> m0.view(-1), masks.view(-1)
        (tensor([-7., -1.]), tensor([ True, False]))

    Source: Brack et al. 2023, "LEDITS++", section 3.
    """
    _check_outputs(outputs, scale)
    _check_state(x, outputs, scale, coefficients, prediction_type)
    shape = (scale.shape[0], x.shape[0], *x.shape[2:])
    for name, tensor in (("residual", residual), ("previous", previous)):
        _check_shape(name, tensor, x.shape, x)
    _check_shape("magnitude", magnitude, shape, x)
    if mass is not None:
        _check_grid(mass, shape, x)
    for name, tensor, of, measured in (
        ("magnitude_threshold", magnitude_threshold, "magnitude", magnitude),
        ("mass_threshold", mass_threshold, "mass", mass),
    ):
        if (tensor is None) != (measured is None):
            raise ValueError(f"{name} must be given with {of}, and only then, got one of the two.")
        _check_shape(name, tensor, shape[:2], x)
    _check_user_mask(user_mask, shape, x)
    if active is not None and (active.dtype != torch.bool or active.shape != scale.shape):
        raise ValueError(
            f"active must be torch.bool with the shape {tuple(scale.shape)}, one per edit, got {active.dtype} "
            f"{tuple(active.shape)}."
        )
    given = {
        "x": x,
        "outputs": outputs,
        "scale": scale,
        "coefficients": coefficients,
        "residual": residual,
        "previous": previous,
        "magnitude": magnitude,
        "magnitude_threshold": magnitude_threshold,
        "mass": mass,
        "mass_threshold": mass_threshold,
        "user_mask": user_mask,
        "active": active,
    }
    check_no_gradient("edit_step", **given)
    check_one_device(**given)
    if choose(impl, "edit_step", x.device, x.dtype) == "eager":
        return edit_step_eager(**given, prediction_type=prediction_type)  # type: ignore[arg-type]
    return _edit_step(**given, prediction_type=prediction_type)


def _check_outputs(outputs: Tensor, scale: Tensor) -> None:
    if scale.ndim != 1 or scale.dtype not in _STATE_DTYPES:
        raise ValueError(
            f"scale must be torch.float32 or torch.float64 with the shape [E], got {scale.dtype} {tuple(scale.shape)}."
        )
    rows = 1 + scale.shape[0]
    if outputs.ndim != 4 or outputs.shape[0] % rows or outputs.shape[1] < 1:
        raise ValueError(
            f"outputs must have the shape [{rows} * B, C, h, w] with C at least 1, B rows without an edit and B for "
            f"each of the {rows - 1} edits of scale, got {tuple(outputs.shape)}."
        )
    if not outputs.dtype.is_floating_point or torch.promote_types(outputs.dtype, scale.dtype) != scale.dtype:
        raise ValueError(f"outputs must be floating point, not wider than scale ({scale.dtype}), got {outputs.dtype}.")


def _check_state(x: Tensor, outputs: Tensor, scale: Tensor, coefficients: Tensor, prediction_type: str) -> None:
    wanted = (outputs.shape[0] // (1 + scale.shape[0]), *outputs.shape[1:])
    if x.shape != wanted or x.dtype not in _STATE_DTYPES:
        raise ValueError(
            f"x must be torch.float32 or torch.float64 with the shape {wanted}, that of the outputs of one edit, got "
            f"{x.dtype} {tuple(x.shape)}; half precision would lose what the steps add."
        )
    _check_dtype("scale", scale, x)
    if coefficients.shape != (6,):
        raise ValueError(
            f"coefficients must have the shape (6,): alpha, sigma, a, b, c, g, got {tuple(coefficients.shape)}."
        )
    _check_dtype("coefficients", coefficients, x)
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {PREDICTIONS}, got {prediction_type!r}.")


def _check_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} must have the dtype of x ({x.dtype}), got {tensor.dtype}.")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    _check_dtype(name, tensor, x)


def _check_grid(mass: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    E, B, h, w = shape
    is_grid = mass.ndim == 4 and mass.shape[:2] == (E, B) and 1 <= mass.shape[2] <= h and 1 <= mass.shape[3] <= w
    if not is_grid and x.numel():
        raise ValueError(
            f"mass must have the shape [{E}, {B}, gh, gw] with gh in [1, {h}] and gw in [1, {w}], got "
            f"{tuple(mass.shape)}."
        )
    _check_dtype("mass", mass, x)


def _check_user_mask(user_mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if user_mask is None:
        return
    own = user_mask.shape
    fits = len(own) <= 4 and all(n == 1 or n == m for n, m in zip(own, shape[4 - len(own) :], strict=True))
    if not fits or user_mask.dtype != like.dtype:
        raise ValueError(
            f"user_mask must be {like.dtype}, broadcastable to {tuple(shape)}, got {user_mask.dtype} {tuple(own)}."
        )


@torch.library.custom_op(f"{NAMESPACE}::edit_magnitude", mutates_args=())
def _edit_magnitude(outputs: Tensor, scale: Tensor, user_mask: Tensor | None) -> Tensor:
    from . import kernel

    out = _empty_magnitude(outputs, scale)
    mask = None if user_mask is None else user_mask.expand(out.shape)
    return kernel.magnitude(outputs.contiguous(), scale.contiguous(), mask, out)


def _empty_magnitude(outputs: Tensor, scale: Tensor) -> Tensor:
    E = scale.shape[0]
    return scale.new_empty(E, outputs.shape[0] // (1 + E), *outputs.shape[2:])


@_edit_magnitude.register_fake
def _(outputs: Tensor, scale: Tensor, _user_mask: Tensor | None) -> Tensor:
    return _empty_magnitude(outputs, scale)


@torch.library.custom_op(f"{NAMESPACE}::edit_step", mutates_args=())
def _edit_step(
    x: Tensor,
    outputs: Tensor,
    scale: Tensor,
    coefficients: Tensor,
    residual: Tensor | None,
    previous: Tensor | None,
    magnitude: Tensor | None,
    magnitude_threshold: Tensor | None,
    mass: Tensor | None,
    mass_threshold: Tensor | None,
    user_mask: Tensor | None,
    active: Tensor | None,
    prediction_type: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    x_next, m0, masks = _empty_step(x, scale)
    required = [each.contiguous() for each in (x, outputs, scale, coefficients)]
    measures = (residual, previous, magnitude, magnitude_threshold, mass, mass_threshold, active)
    optional = [None if each is None else each.contiguous() for each in measures]
    mask = None if user_mask is None else user_mask.expand(masks.shape)
    kernel.step(*required, *optional, user_mask=mask, prediction_type=prediction_type, out=(x_next, m0, masks))
    return x_next, m0, masks


def _empty_step(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, _, h, w = x.shape
    masks = torch.empty(scale.shape[0], B, h, w, dtype=torch.bool, device=x.device)
    return x.new_empty(x.shape), x.new_empty(x.shape), masks


@_edit_step.register_fake
def _(x: Tensor, _outputs: Tensor, scale: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_step(x, scale)
