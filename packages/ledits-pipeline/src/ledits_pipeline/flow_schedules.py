"""From a flow-matching scheduler to a `Schedule`: alpha = 1 - sigma on the scheduler's own, shifted noise levels."""

import copy
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from .schedules import check_steps
from .solver import Schedule, SolverName


def flow_scheduler(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """A private scheduler with the noise levels of the given one; other flow schedulers lend their configuration."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return copy.deepcopy(scheduler)
    if "shift" not in scheduler.config:
        raise ValueError(
            f"scheduler must be a flow-matching one for this family, got {type(scheduler).__name__}; "
            "use FlowMatchEulerDiscreteScheduler."
        )
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


def dynamic_shift(scheduler: Any, tokens: int) -> float | None:
    """Mu of schedulers that shift by the picture's size: linear in the number of image tokens; None for the others."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    start, end = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return start + (tokens - low) * (end - start) / (high - low)


def flow_schedule(
    private: FlowMatchEulerDiscreteScheduler,
    num_inversion_steps: int,
    skip: float,
    tokens: int,
    *,
    is_even: bool = False,
    solver: SolverName | None = None,
    eta: float = 1.0,
) -> Schedule:
    """The kept steps of a flow model: the last N of `int(N / (1 - skip))`, by default first-order with fresh noise.

    Args:
        private: what `flow_scheduler` returned; its timesteps are set here.
        num_inversion_steps: N, the steps that are kept.
        skip: share of the whole schedule that is left out at its noisy end.
        tokens: image tokens of the model, for schedulers that shift by them.
        is_even: noise levels are 1, 1 - 1/n, ... before shifting, as Flux takes them.
        solver: None: `"first_order"`.
        eta: share of fresh noise.
    """
    check_steps(num_inversion_steps, skip, private.config.num_train_timesteps)
    total = int(num_inversion_steps / (1.0 - skip))
    if total > private.config.num_train_timesteps:
        raise ValueError(
            f"num_inversion_steps must leave distinct timesteps: {num_inversion_steps} steps with skip {skip} need "
            f"{total} of the scheduler's {private.config.num_train_timesteps}."
        )
    levels = [1.0 - k / total for k in range(total)] if is_even else None
    private.set_timesteps(None if is_even else total, sigmas=levels, mu=dynamic_shift(private, tokens))
    sigmas = private.sigmas[-(num_inversion_steps + 1) :].double()
    timesteps = private.timesteps[-num_inversion_steps:].float()
    alphas = tuple((1.0 - sigmas).tolist())
    return Schedule(timesteps, alphas, tuple(sigmas.tolist()), "flow", solver or "first_order", eta)
