"""The affine step against diffusers' schedulers, in float64."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("ledits_pipeline")

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ledits_pipeline.schedules import editing_scheduler, gaussian_schedule
from ledits_pipeline.solver import AffineStepper, PairedStepper, Schedule, affine_coefficients

SHAPE = (2, 3, 4)


def numbers(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A first state, the model's outputs and the noise of every step, all float64."""
    draw = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, *SHAPE, generator=draw, dtype=torch.float64) for n in (1, steps, steps)]
    return parts[0][0], parts[1], parts[2]


def walk(schedule: Schedule, x: Tensor, outputs: Tensor, noise: Tensor) -> list[Tensor]:
    stepper, states = AffineStepper(schedule), []
    for k in range(len(schedule)):
        x = stepper.mean(k, x, outputs[k]) + schedule.coefficients[k, 3] * noise[k]
        states.append(x)
    return states


def assert_walks_agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("steps", [4, 10, 28])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_second_order_agrees_with_sde_dpm_solver(steps: int, prediction: str) -> None:
    given = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", prediction_type=prediction, lower_order_final=False
    )
    private = editing_scheduler(given)
    schedule = gaussian_schedule(private, steps, 0.2)
    x, outputs, noise = numbers(steps)
    expected, state = [], x
    for k, t in enumerate(schedule.timesteps):
        state = private.step(outputs[k], t, state, variance_noise=noise[k]).prev_sample
        expected.append(state)
    assert schedule.solver == "2m"
    assert_walks_agree(walk(schedule, x, outputs, noise), expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_first_order_agrees_with_ddim(eta: float, prediction: str) -> None:
    private = editing_scheduler(DDIMScheduler(prediction_type=prediction, clip_sample=False))
    schedule = gaussian_schedule(private, 10, 0.2, eta=eta)
    x, outputs, noise = numbers(10)
    expected, state = [], x
    for k, t in enumerate(schedule.timesteps.tolist()):
        state = private.step(outputs[k], t, state, eta=eta, variance_noise=noise[k]).prev_sample
        expected.append(state)
    assert schedule.solver == "first_order"
    assert_walks_agree(walk(schedule, x, outputs, noise), expected)


def test_first_order_without_noise_agrees_with_flow_euler() -> None:
    given = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given.set_timesteps(10)
    sigmas = given.sigmas.double()
    schedule = Schedule(
        given.timesteps, tuple((1 - sigmas).tolist()), tuple(sigmas.tolist()), "flow", "first_order", eta=0.0
    )
    state, outputs, _ = numbers(10)
    stepper = AffineStepper(schedule)
    for k, t in enumerate(given.timesteps):
        expected = given.step(outputs[k], t, state).prev_sample.double()
        state = stepper.mean(k, state, outputs[k])
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-6)


def test_eta_one_is_first_order_sde_dpm_solver() -> None:
    given = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1)
    private = editing_scheduler(given)
    schedule = gaussian_schedule(private, 6, 0.0)
    x, outputs, noise = numbers(6)
    expected, state = [], x
    for k, t in enumerate(schedule.timesteps):
        state = private.step(outputs[k], t, state, variance_noise=noise[k]).prev_sample
        expected.append(state)
    assert schedule.solver == "first_order"
    assert_walks_agree(walk(schedule, x, outputs, noise), expected)


def test_last_step_to_no_noise_is_the_data_prediction() -> None:
    table = affine_coefficients((0.5, 0.8, 1.0), (0.8, 0.6, 0.0))
    assert table[-1].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_pure_noise_is_a_legal_start() -> None:
    table = affine_coefficients((0.0, 0.5, 1.0), (1.0, 0.5, 0.0))
    assert torch.isfinite(table).all()
    assert table[1, 2] == 0.0  # the step after it has no second order: its predecessor says nothing about the picture


def test_marginal_variance_is_kept_by_first_order_steps() -> None:
    alphas, sigmas = (0.3, 0.6, 0.9), (0.95, 0.8, 0.4)
    for eta in (0.0, 0.4, 1.0):
        table = affine_coefficients(alphas, sigmas, solver="first_order", eta=eta)
        for k, (a, b, _, g) in enumerate(table.tolist()):
            assert a * alphas[k] + b == pytest.approx(alphas[k + 1])
            assert (a * sigmas[k]) ** 2 + g**2 == pytest.approx(sigmas[k + 1] ** 2)


def test_paired_steps_carry_a_difference_like_two_walks() -> None:
    schedule = gaussian_schedule(editing_scheduler(DPMSolverMultistepScheduler()), 5, 0.0)
    x, outputs, noise = numbers(5)
    others = outputs + 0.1 * noise
    first, second = AffineStepper(schedule), AffineStepper(schedule)
    paired, path, state, edited = PairedStepper(schedule), x, x, x
    for k in range(5):
        mean, moved = first.mean(k, path, outputs[k]), second.mean(k, state, others[k])
        edited = paired.advance(k, path, edited, (outputs[k], others[k]), mean)
        path, state = mean, moved
        torch.testing.assert_close(edited, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "heun"}, r'solver must be "2m" or "first_order", got \'heun\'\.'),
        ({"eta": 1.5, "solver": "first_order"}, r"eta must lie in \[0, 1\], got 1.5\."),
        ({"eta": 0.5}, r'eta must be 1 with solver="2m", got 0.5; use solver="first_order"'),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        affine_coefficients((0.5, 1.0), (0.8, 0.0), **arguments)


@pytest.mark.parametrize(
    ("steps", "skip", "message"),
    [
        (0, 0.1, r"num_inversion_steps must be an integer of at least 1, got 0\."),
        (4, 1.0, r"skip must lie in \[0, 1\), got 1.0\."),
        (4, -0.5, r"skip must lie in \[0, 1\), got -0.5\."),
        (2000, 0.0, r"num_inversion_steps must leave distinct timesteps: 2000 steps .* of the scheduler's 1000\."),
    ],
)
def test_schedules_refuse_what_cannot_be_walked(steps: int, skip: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_schedule(editing_scheduler(DDIMScheduler()), steps, skip)
