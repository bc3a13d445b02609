"""The denoising loops: one step is one model call on rows [base | edits], then masks, guidance and the solver's step.

Rows are concept-major: all pictures of the unconditional prompt, all pictures of the source prompt if there is one, all
pictures of the first active edit, and so on. Edits that do not act on a step are not evaluated. Nothing waits for the
device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adapters import CallContext, FamilyAdapter, PromptRows, concat_prompts
from .attention import MassRecorder
from .edits import EditPlan
from .guidance import MaskRule, guide, rescale
from .inversion import LEditsInversion, SourceCondition, Stepper
from .solver import PairedStepper


class PromptTable:
    """The prompts of a call in groups of B rows: unconditional, source (if any), then the edits."""

    def __init__(self, unconditional: PromptRows, source: PromptRows | None, edits: list[PromptRows]) -> None:
        self.groups = [unconditional, *([] if source is None else [source]), *edits]
        self.first_edit = 1 if source is None else 2
        self._joined: dict[tuple[int, ...], PromptRows] = {}

    def join(self, groups: tuple[int, ...]) -> PromptRows:
        """The rows of some groups, in order; joined once."""
        if groups not in self._joined:
            self._joined[groups] = concat_prompts([self.groups[g] for g in groups])
        return self._joined[groups]

    def value(self, which: str, name: str) -> Tensor:
        """`"embeds"` or an extra of the `"unconditional"` rows, of the `"edits"`, or of `"all"`."""
        rows = concat_prompts([self.groups[g] for g in self._range(which)])
        return rows.embeds if name == "embeds" else rows.extras[name]

    def replace(self, which: str, name: str, value: Tensor) -> None:
        """Put other values there."""
        groups = self._range(which)
        for g, part in zip(groups, value.chunk(len(groups)), strict=True):
            self.groups[g] = self.groups[g].with_value(name, part)
        self._joined.clear()

    def _range(self, which: str) -> range:
        if which == "unconditional":
            return range(1)
        return range(self.first_edit if which == "edits" else 0, len(self.groups))


def base_groups(condition: SourceCondition, *, for_edits: bool = False) -> tuple[int, ...]:
    """The groups that a step without edits evaluates; edits need the unconditional one in any case."""
    source = (1,) if condition.has_source else ()
    return ((0,) if condition.has_unconditional or for_edits else ()) + source


def base_output(parts: dict[int, Tensor], condition: SourceCondition) -> Tensor:
    """What the model says without edits: unconditional, or guided by the source prompt as at inversion."""
    if not condition.has_source:
        return parts[0]
    if condition.source_guidance_scale == 1.0:
        return parts[1]
    return parts[0] + condition.source_guidance_scale * (parts[1] - parts[0])


@dataclass
class Denoising:
    """The model as the loops see it: states in, raw outputs per group out."""

    adapter: FamilyAdapter
    prompts: PromptTable
    context: CallContext
    timesteps: Tensor
    """`[N]` on the device."""
    recorder: MassRecorder | None = None

    def evaluate(self, k: int, states: list[Tensor], groups: tuple[int, ...]) -> list[Tensor]:
        """One call: `states[i]` `[B, C, h, w]` under the prompts of `groups[i]`; outputs in the states' dtype."""
        rows = self.prompts.join(groups)
        if self.recorder is not None:
            edits = sum(g >= self.prompts.first_edit for g in groups)
            first = (len(groups) - edits) * states[0].shape[0]
            self.recorder.begin(rows.token_weights[first:] if edits and rows.token_weights is not None else None, first)
        latents = torch.cat(states)
        output = self.adapter.denoise(latents, self.timesteps[k], rows, self.context)
        return list(output.to(latents.dtype).chunk(len(groups)))

    def predict_base(self, k: int, state: Tensor, condition: SourceCondition) -> Tensor:
        """The output without edits."""
        groups = base_groups(condition)
        parts = self.evaluate(k, [state] * len(groups), groups)
        return base_output(dict(zip(groups, parts, strict=True)), condition)

    def predict_steps(self, steps: range, path: Tensor, condition: SourceCondition) -> list[Tensor]:
        """The outputs without edits at several points of the path, in one call."""
        groups = base_groups(condition)
        batch, count = path.shape[1], len(steps)
        rows = concat_prompts([self.prompts.groups[g] for g in groups for _ in steps])
        states = path[steps.start : steps.stop].flatten(0, 1)
        times = self.timesteps[steps.start : steps.stop].repeat_interleave(batch)
        latents = torch.cat([states] * len(groups))
        output = self.adapter.denoise(latents, times.repeat(len(groups)), rows, self.context)
        parts = output.to(path.dtype).chunk(len(groups))
        return list(base_output(dict(zip(groups, parts, strict=True)), condition).chunk(count))

    def attention(self, latent_size: tuple[int, int], edits: int) -> Tensor | None:
        """M1's maps of the last call, `[E, B, gh, gw]`."""
        if self.recorder is None or not self.recorder.is_recording:
            return None
        maps = self.adapter.attention_maps(self.recorder, latent_size)
        return maps.reshape(edits, -1, *maps.shape[1:])


@dataclass
class EditRun:
    """Everything a loop needs, and what it leaves behind."""

    inversion: LEditsInversion
    denoising: Denoising
    plan: EditPlan
    rules: list[MaskRule]
    """One per step."""
    steps: int
    """How many steps are taken."""
    user_masks: Tensor | None = None
    """`[E or 1, B or 1, 1, h, w]`."""
    given_guidance: list[Tensor] = field(default_factory=list)
    """Used instead of the edits on the first steps."""
    guidance_rescale: float = 0.0
    mask_ema: float = 0.0
    """Share of the earlier steps in the attention that M1 is made of."""
    drops_residual: bool = False
    """Leave out the last, noise-free residual where edits acted."""
    on_step_end: Callable[[int, Tensor], Tensor] | None = None
    """Called with (step, state); returns the state to go on with."""
    is_interrupted: Callable[[], bool] = lambda: False
    masks: Tensor | None = None
    """`[N, E, B, h, w]` bool, filled in."""
    guidance: Tensor | None = None
    """`[N, B, C, h, w]`, filled in."""
    kept_attention: dict[int, Tensor] = field(default_factory=dict)
    """Steps whose attention maps are wanted, filled in."""

    def __post_init__(self) -> None:
        x = self.inversion.init_latents
        steps, edits = len(self.inversion.schedule), len(self.plan)
        self.masks = torch.zeros((steps, edits, x.shape[0], *x.shape[-2:]), dtype=torch.bool, device=x.device)
        self.guidance = torch.zeros((steps, *x.shape), dtype=x.dtype, device=x.device) if edits else None
        scales = torch.tensor(self.plan.scales, dtype=x.dtype)
        self._scales = list(scales.to(x.device))
        self._attention: list[Tensor | None] = [None] * edits
        self._last_masks: list[Tensor | None] = [None] * edits

    def active(self, k: int) -> tuple[int, ...]:
        return () if k < len(self.given_guidance) else self.plan.active(k)

    def guided(self, k: int, base: Tensor, parts: dict[int, Tensor], active: tuple[int, ...]) -> Tensor:
        """The model's output at step `k` with its edits."""
        if k < len(self.given_guidance):
            return base + self.given_guidance[k].to(base)
        if not active:
            return base
        first = self.denoising.prompts.first_edit
        edits = torch.stack([parts[first + e] for e in active])
        attention = self._averaged(active, self.denoising.attention((base.shape[-2], base.shape[-1]), len(active)))
        change, masks = guide(
            parts[0],
            edits,
            scales=torch.stack([self._scales[e] for e in active]),
            thresholds=[self.plan.thresholds[e] for e in active],
            rule=self.rules[k],
            attention=attention,
            user_masks=self._user_masks(active),
        )
        self._keep(k, active, masks, change, attention)
        output = base + change
        return rescale(output, edits, self.guidance_rescale) if self.guidance_rescale > 0 else output

    def _averaged(self, active: tuple[int, ...], attention: Tensor | None) -> Tensor | None:
        """Attention averaged over the steps so far, recent ones counting more."""
        if attention is None or self.mask_ema == 0.0:
            return attention
        for i, e in enumerate(active):
            known = self._attention[e]
            self._attention[e] = attention[i] if known is None else torch.lerp(attention[i], known, self.mask_ema)
        return torch.stack([kept for e in active if (kept := self._attention[e]) is not None])

    def dropped(self, k: int) -> Tensor | None:
        """Where the residual of step `k` is left out, `[B, 1, h, w]` bool."""
        masks = [mask for mask in self._last_masks if mask is not None]
        if not self.drops_residual or not masks or self.inversion.schedule.sigmas[k + 1] > 0.0:
            return None
        return torch.stack(masks).any(dim=0)[:, None]

    def _user_masks(self, active: tuple[int, ...]) -> Tensor | None:
        if self.user_masks is None or self.user_masks.shape[0] == 1:
            return self.user_masks
        return torch.stack([self.user_masks[e] for e in active])

    def _keep(self, k: int, active: tuple[int, ...], masks: Tensor, change: Tensor, attention: Tensor | None) -> None:
        assert self.masks is not None and self.guidance is not None
        for i, e in enumerate(active):
            self.masks[k, e].copy_(masks[i])
            self._last_masks[e] = masks[i]
        self.guidance[k].copy_(change)
        if attention is not None and k in self.kept_attention:
            for i, e in enumerate(active):
                self.kept_attention[k][e].copy_(attention[i])

    def end_step(self, k: int, state: Tensor) -> Tensor:
        return state if self.on_step_end is None else self.on_step_end(k, state)


def replay_stored(run: EditRun, stepper: Stepper) -> Tensor:
    """Walk back from the noisiest state with what inversion stored for every step; the final latents."""
    condition, state = run.inversion.condition, run.inversion.init_latents
    for k in range(run.steps):
        if run.is_interrupted():
            break
        active = run.active(k)
        first = run.denoising.prompts.first_edit
        groups = base_groups(condition, for_edits=bool(active)) + tuple(first + e for e in active)
        outputs = run.denoising.evaluate(k, [state] * len(groups), groups)
        parts = dict(zip(groups, outputs, strict=True))
        output = run.guided(k, base_output(parts, condition), parts, active)
        stored, dropped = run.inversion.maps[k], run.dropped(k)
        state = stepper.advance(k, state, output, stored if dropped is None else stored * ~dropped)
        state = run.end_step(k, state)
    return state


def replay_paired(run: EditRun, stepper: PairedStepper) -> Tensor:
    """Walk beside the noisy path: both states in one model call, only their difference integrated; the final latents.

    Until an edit acts the two states are the same, and the model is not asked.
    """
    condition, path, state = run.inversion.condition, run.inversion.init_latents, run.inversion.init_latents
    for k in range(run.steps):
        if run.is_interrupted():
            break
        active, after = run.active(k), run.inversion.maps[k]
        if state is path and not active and k >= len(run.given_guidance):
            ended = run.end_step(k, after)
            path = after
            state = path if ended is after else ended
            continue
        first = run.denoising.prompts.first_edit
        still = base_groups(condition)
        moving = base_groups(condition, for_edits=bool(active)) + tuple(first + e for e in active)
        outputs = run.denoising.evaluate(k, [path] * len(still) + [state] * len(moving), still + moving)
        before = base_output(dict(zip(still, outputs[: len(still)], strict=True)), condition)
        parts = dict(zip(moving, outputs[len(still) :], strict=True))
        output = run.guided(k, base_output(parts, condition), parts, active)
        moved = stepper.advance(k, path, state, (before, output), after, dropped=run.dropped(k))
        state = run.end_step(k, moved)
        path = after
    return state


@contextmanager
def attention_recorded(denoising: Denoising, latent_size: tuple[int, int], wanted: bool) -> Iterator[None]:
    """Give the denoising a recorder for the time of the block, if masks need one."""
    context: Any = denoising.adapter.recording(latent_size) if wanted else nullcontext()
    with context as recorder:
        denoising.recorder = recorder
        try:
            yield
        finally:
            denoising.recorder = None
