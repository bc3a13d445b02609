"""Steps taken by a diffusers scheduler itself: the arithmetic, and therefore the bits, of diffusers' own pipelines."""

import copy

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from .solver import Schedule


class SchedulerStepper:
    """Stands where `AffineStepper` stands, in `"diffusers"` mode: stores noise maps z instead of residuals.

    The states between steps and the coefficients are rounded where the scheduler rounds them, and the last noise map is
    zero when the last noise level is: this mode reconstructs as well as diffusers does, not better.
    """

    def __init__(self, scheduler: DDIMScheduler | DPMSolverMultistepScheduler, schedule: Schedule) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(len(scheduler.timesteps))
        self._timesteps = schedule.timesteps

    def advance(self, k: int, x: Tensor, output: Tensor, noise: Tensor) -> Tensor:
        extra = {"eta": 1.0} if isinstance(self._scheduler, DDIMScheduler) else {}
        t = self._timesteps[k]
        return self._scheduler.step(output, t, x, variance_noise=noise, return_dict=False, **extra)[0]

    def extract(self, k: int, x: Tensor, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self._scheduler, DDIMScheduler):
            mean, scale = self._ddim_mean(k, x, output)
        else:
            mean, scale = self._multistep_mean(k, x, output)
        if scale == 0:
            return torch.zeros_like(target), target
        noise = (target - mean) / scale
        return noise, mean + scale * noise

    def _ddim_mean(self, k: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        scheduler, t = self._scheduler, int(self._timesteps[k])
        before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        mean = scheduler.step(output, t, x, eta=1.0, variance_noise=torch.zeros_like(x), return_dict=False)[0]
        return mean, scheduler._get_variance(t, before) ** 0.5

    def _multistep_mean(self, k: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        # scheduler.step would round x to float32 and take first order at the end: diffusers' inversion does neither.
        scheduler = self._scheduler
        if scheduler.step_index is None:
            scheduler._init_step_index(self._timesteps[k])
        clean = scheduler.convert_model_output(output, sample=x)
        scheduler.model_outputs = [*scheduler.model_outputs[1:], clean]
        still = torch.zeros_like(x)
        if scheduler.lower_order_nums < 1:
            mean = scheduler.dpm_solver_first_order_update(clean, sample=x, noise=still)
        else:
            mean = scheduler.multistep_dpm_solver_second_order_update(scheduler.model_outputs, sample=x, noise=still)
        scale = self._noise_scale(scheduler.step_index)
        scheduler.lower_order_nums = min(scheduler.lower_order_nums + 1, scheduler.config.solver_order)
        scheduler._step_index += 1
        return mean, scale

    def _noise_scale(self, index: int) -> Tensor:
        scheduler = self._scheduler
        alpha_s, sigma_s = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index + 1])
        alpha_t, sigma_t = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        h = (torch.log(alpha_s) - torch.log(sigma_s)) - (torch.log(alpha_t) - torch.log(sigma_t))
        return sigma_s * torch.sqrt(1.0 - torch.exp(-2 * h))
