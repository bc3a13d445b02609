"""From a diffusers scheduler to a `Schedule`. The scheduler given is never written to: a private copy is asked."""

import copy
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from .solver import Prediction, Schedule, SolverName


def check_steps(num_inversion_steps: int, skip: float, num_train_timesteps: int) -> None:
    if isinstance(num_inversion_steps, bool) or not isinstance(num_inversion_steps, int) or num_inversion_steps < 1:
        raise ValueError(f"num_inversion_steps must be an integer of at least 1, got {num_inversion_steps!r}.")
    if not 0.0 <= skip < 1.0:
        raise ValueError(f"skip must lie in [0, 1), got {skip}.")
    if total_steps(num_inversion_steps, skip) > num_train_timesteps:
        raise ValueError(
            f"num_inversion_steps must leave distinct timesteps: {num_inversion_steps} steps with skip {skip} need "
            f"{total_steps(num_inversion_steps, skip)} of the scheduler's {num_train_timesteps}."
        )


def total_steps(num_inversion_steps: int, skip: float) -> int:
    """Steps of the whole schedule, of which the last `num_inversion_steps` are kept."""
    return int(num_inversion_steps * (1 + skip))


def editing_scheduler(scheduler: Any, **settings: Any) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """A private scheduler with the noise levels of the given one, that steps as LEDITS++ does.

    DDIM stays DDIM; everything else becomes second-order SDE-DPM-Solver++, as in diffusers' pipelines. `settings`
    override fields of its configuration.
    """
    overrides: dict[str, Any] = settings | {"timestep_spacing": "leading"}
    if isinstance(scheduler, DDIMScheduler):
        copied = copy.deepcopy(scheduler)
        copied.register_to_config(**overrides)
        return copied
    overrides.pop("clip_sample", None)
    multistep = isinstance(scheduler, DPMSolverMultistepScheduler)
    if not multistep or scheduler.config.algorithm_type != "sde-dpmsolver++":
        overrides |= {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    return DPMSolverMultistepScheduler.from_config(scheduler.config, **overrides)


def gaussian_schedule(
    private: DDIMScheduler | DPMSolverMultistepScheduler,
    num_inversion_steps: int,
    skip: float,
    *,
    solver: SolverName | None = None,
    eta: float = 1.0,
) -> Schedule:
    """The kept steps of a variance-preserving model.

    Timesteps are diffusers' for this method: "leading" spacing of `int(N * (1 + skip))` steps, of which the last N are
    kept. `solver=None` follows the scheduler: DDIM first order, everything else "2m".

    Args:
        private: what `editing_scheduler` returned; its timesteps are set here.
        num_inversion_steps: N, the steps that are kept.
        skip: share by which the whole schedule is longer than the kept part.
        solver: overrides the scheduler's own order.
        eta: share of fresh noise; anything but 1 means first order.
    """
    check_steps(num_inversion_steps, skip, private.config.num_train_timesteps)
    private.set_timesteps(total_steps(num_inversion_steps, skip))
    timesteps = private.timesteps[-num_inversion_steps:]
    if len(set(timesteps.tolist())) < num_inversion_steps:
        raise ValueError(
            f"num_inversion_steps must leave distinct timesteps, but the scheduler repeats some of the "
            f"{num_inversion_steps}; use fewer."
        )
    if isinstance(private, DDIMScheduler):
        alphas, sigmas = _ddim_path(private, timesteps)
    else:
        alphas, sigmas = _multistep_path(private, num_inversion_steps)
    if solver is None:
        first_order = isinstance(private, DDIMScheduler) or private.config.solver_order == 1 or eta != 1.0
        solver = "first_order" if first_order else "2m"
    return Schedule(timesteps, alphas, sigmas, _prediction(private), solver, eta)


def _prediction(scheduler: Any) -> Prediction:
    name = scheduler.config.prediction_type
    return "flow" if name == "flow_prediction" else name


def _ddim_path(scheduler: DDIMScheduler, timesteps: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = int(timesteps[-1]) - stride
    kept = scheduler.alphas_cumprod[timesteps].double().tolist()
    kept.append(float(scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod))
    return tuple(p**0.5 for p in kept), tuple((1.0 - p) ** 0.5 for p in kept)


def _multistep_path(scheduler: DPMSolverMultistepScheduler, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    ratios = scheduler.sigmas[-(steps + 1) :].double()
    if scheduler.config.use_flow_sigmas:
        return tuple((1.0 - ratios).tolist()), tuple(ratios.tolist())
    alphas = 1.0 / torch.sqrt(1.0 + ratios**2)
    return tuple(alphas.tolist()), tuple((ratios * alphas).tolist())
