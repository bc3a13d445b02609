"""One affine step for every solver: x_s = a x_t + b m0 + c m1 + noise.

The path is Gaussian, x_t = alpha_t x0 + sigma_t eps; m0 is the data prediction of this step and m1 that of the step
before. Variance-preserving models have alpha^2 + sigma^2 = 1, flow models alpha = 1 - sigma; nothing below needs to
know which.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
SolverName = Literal["2m", "first_order"]
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
SOLVERS = ("2m", "first_order")


def affine_coefficients(
    alphas: Sequence[float], sigmas: Sequence[float], *, solver: SolverName = "2m", eta: float = 1.0
) -> Tensor:
    """The coefficients (a, b, c, g) of every step along a path.

    g scales the fresh noise of the step. `"first_order"` with eta 1 is DDPM and first-order SDE-DPM-Solver++, with
    eta 0 it is DDIM and the Euler step of flow models. `"2m"` is second-order multistep SDE-DPM-Solver++ (eta 1 only).

    Args:
        alphas: N + 1 values, noisiest first.
        sigmas: N + 1 values; the last may be 0.
        solver: `"2m"` or `"first_order"`.
        eta: share of the fresh noise, in [0, 1].

    Returns:
        `[N, 4]` float64.
    """
    check_solver(solver, eta)
    rows, before = [], None
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in _steps(alphas, sigmas):
        multistep = solver == "2m" and before is not None and before[0] > 0 and sigma_s > 0
        if multistep and before is not None:
            rows.append(_second_order(before, (alpha_t, sigma_t), (alpha_s, sigma_s)))
        else:
            rows.append(_first_order((alpha_t, sigma_t), (alpha_s, sigma_s), eta))
        before = (alpha_t, sigma_t)
    return torch.tensor(rows, dtype=torch.float64)


def check_solver(solver: str, eta: float) -> None:
    if solver not in SOLVERS:
        raise ValueError(f'solver must be "2m" or "first_order", got {solver!r}.')
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    if solver == "2m" and eta != 1.0:
        raise ValueError(f'eta must be 1 with solver="2m", got {eta}; use solver="first_order" for other values.')


def _steps(alphas: Sequence[float], sigmas: Sequence[float]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    points = list(zip(alphas, sigmas, strict=True))
    for before, (alpha, sigma) in itertools.pairwise([(0.0, 1.0), *points]):
        less_noise = alpha * before[1] > before[0] * sigma or (alpha, before[0]) == (0.0, 0.0)
        if not (alpha >= 0.0 and sigma >= 0.0 and before[1] > 0.0 and less_noise):
            raise ValueError(
                f"alphas and sigmas must lead from noise to picture, alpha / sigma rising, got ({alpha:g}, {sigma:g}) "
                f"after ({before[0]:g}, {before[1]:g})."
            )
    return list(itertools.pairwise(points))


def _first_order(t: tuple[float, float], s: tuple[float, float], eta: float) -> tuple[float, float, float, float]:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = t, s
    r = alpha_t * sigma_s / (sigma_t * alpha_s)  # exp(-h), without a logarithm of zero
    g = eta * sigma_s * math.sqrt(max(0.0, 1.0 - r * r))
    q = math.sqrt(max(0.0, sigma_s * sigma_s - g * g))
    return q / sigma_t, alpha_s - q * alpha_t / sigma_t, 0.0, g


def _second_order(
    p: tuple[float, float], t: tuple[float, float], s: tuple[float, float]
) -> tuple[float, float, float, float]:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = t, s
    r = alpha_t * sigma_s / (sigma_t * alpha_s)
    h = -math.log(r)
    h_before = math.log(alpha_t / sigma_t) - math.log(p[0] / p[1])
    base = alpha_s * (1.0 - r * r)
    q = base * h / (2.0 * h_before)
    return sigma_s / sigma_t * r, base + q, -q, sigma_s * math.sqrt(max(0.0, 1.0 - r * r))


def data_prediction(x: Tensor, output: Tensor, alpha: float, sigma: float, prediction: Prediction) -> Tensor:
    """The clean latents that a model's raw output stands for at state `x`."""
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    if prediction == "flow":
        return x - sigma * output
    return output


@dataclass(frozen=True)
class Schedule:
    """The steps of one inversion: where the path is, and how to go from each point to the next."""

    timesteps: Tensor
    """`[N]` on the CPU, noisiest first: what the denoiser is told at each step."""

    alphas: tuple[float, ...]
    """N + 1 signal scales along the path, noisiest first."""

    sigmas: tuple[float, ...]
    """N + 1 noise scales along the path; the last may be 0."""

    prediction: Prediction
    """What the denoiser's output means."""

    solver: SolverName = "2m"
    """`"2m"` or `"first_order"`."""

    eta: float = 1.0
    """Share of fresh noise in a first-order step."""

    coefficients: Tensor = field(init=False, repr=False, compare=False)
    """`[N, 4]` float64 on the CPU: a, b, c, g of each step, see `affine_coefficients`."""

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction_type of the scheduler must be one of {list(PREDICTIONS)}, got {self.prediction!r}."
            )
        table = affine_coefficients(self.alphas, self.sigmas, solver=self.solver, eta=self.eta)
        object.__setattr__(self, "coefficients", table)

    def __len__(self) -> int:
        return len(self.alphas) - 1


class AffineStepper:
    """Walks a schedule; remembers the data prediction of the step before. Holds no device and never synchronizes."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._rows: list[list[float]] = schedule.coefficients.tolist()
        self._before: Tensor | None = None

    def mean(self, k: int, x: Tensor, output: Tensor) -> Tensor:
        """Where step `k` leads from `x` without noise; call it once per step, in order."""
        s = self.schedule
        clean = data_prediction(x, output, s.alphas[k], s.sigmas[k], s.prediction)
        a, b, c, _ = self._rows[k]
        mean = b * clean if a == 0.0 else a * x + b * clean
        if c != 0.0 and self._before is not None:
            mean = mean + c * self._before
        self._before = clean
        return mean

    def advance(self, k: int, x: Tensor, output: Tensor, residual: Tensor) -> Tensor:
        """The next state: the mean plus what inversion stored for this step."""
        return self.mean(k, x, output) + residual

    def extract(self, k: int, x: Tensor, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(what to store so that step `k` leads from `x` to `target`, the state it then leads to up to rounding)."""
        mean = self.mean(k, x, output)
        residual = target - mean
        return residual, mean + residual


class PairedStepper:
    """Moves an edited state beside the noisy path: only the difference of the two passes through the solver.

    Where both rows of the model agree the difference stays exactly zero, whatever the model's arithmetic.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._rows: list[list[float]] = schedule.coefficients.tolist()
        self._before: Tensor | None = None

    def advance(
        self,
        k: int,
        path: Tensor,
        state: Tensor,
        outputs: tuple[Tensor, Tensor],
        after: Tensor,
        *,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """The edited state after step `k`.

        Args:
            k: the step; steps before the first edit may be left out.
            path: the noisy path at this step.
            state: the edited state at this step.
            outputs: the model's (edited) outputs at `path` and at `state`.
            after: the noisy path after this step.
            dropped: 1 where a noise-free step shall not repeat what the model does not know of the picture.
        """
        s = self.schedule
        a, b, c, _ = self._rows[k]
        clean = [
            data_prediction(x, o, s.alphas[k], s.sigmas[k], s.prediction)
            for x, o in zip((path, state), outputs, strict=True)
        ]
        change = clean[1] - clean[0]
        moved = a * (state - path) + b * change
        if c != 0.0 and self._before is not None:
            moved = moved + c * self._before
        self._before = change
        if dropped is not None:
            after = torch.where(dropped, a * path + b * clean[0], after)
        return after + moved
