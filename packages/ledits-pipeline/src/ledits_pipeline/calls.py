"""One `invert` and one edit from arguments to result: check, encode, run a loop, decode."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .adapters import CallContext, PromptRequest, PromptRows
from .edits import EditPlan, plan_edits
from .guidance import MaskRule
from .inversion import MODES, LEditsInversion, Mode, SourceCondition, Stepper, extract_maps, noisy_path
from .output import LEditsOutput
from .pictures import latent_user_masks, legal_pixels, spread_texts
from .replay import Denoising, EditRun, PromptTable, attention_recorded, replay_paired, replay_stored
from .solver import AffineStepper, PairedStepper, Schedule, SolverName


@dataclass(frozen=True, kw_only=True)
class InvertCall:
    """The arguments of `LEditsPipeline.invert`."""

    pipe: Any
    mode: Mode
    source_prompt: Any
    source_guidance_scale: float
    negative_prompt: Any
    negative_prompt_2: Any
    steps: int | None
    skip: float
    solver: SolverName | None
    eta: float
    zero_steps: int | None
    clip_skip: int | None
    crops_coords_top_left: tuple[int, int]
    attention_kwargs: dict[str, Any] | None
    guidance_scale: float | None
    control_scale: float
    images: dict[str, Any]
    """`ip_adapter_image`, `ip_adapter_image_embeds`, `control_image`."""
    batch_size: int

    def run(self, image: Any, generator: Any, *, pad: bool, **preparation: Any) -> LEditsInversion:
        adapter = self.pipe.adapter
        self._check()
        pixels, crop = self._pixels(image, pad, preparation)
        size = (pixels.shape[-2], pixels.shape[-1])
        scheduler = adapter.editing_scheduler(*size)
        steps = adapter.defaults.num_inversion_steps if self.steps is None else self.steps
        schedule = adapter.schedule(scheduler, steps, self.skip, solver=self.solver, eta=self.eta)
        clean = adapter.encode_image(pixels).to(adapter.state_dtype)
        condition = self._condition(clean.shape[0])
        path = noisy_path(clean, schedule, generator)
        extras = adapter.row_extras(size, clean.shape[0], **self.images)
        context = call_context(condition, size, extras, self.attention_kwargs, self.mode)
        maps = path[1:]
        if self.mode != "paired":
            stepper = adapter.scheduler_stepper(scheduler, schedule) if self.mode == "diffusers" else None
            maps = self._maps(path, schedule, stepper or AffineStepper(schedule), condition, context)
        processor = self.pipe.image_processor
        return LEditsInversion(
            mode=self.mode,
            skip=self.skip,
            family=adapter.name,
            schedule=schedule,
            init_latents=path[0],
            maps=maps,
            size=size,
            crop=crop,
            condition=condition,
            row_extras=extras,
            model_hash=model_hash(adapter.denoiser),
            images=processor.postprocess(pixels, output_type="pil"),
            decode=lambda: processor.postprocess(_decode(adapter, clean), output_type="pil"),
        )

    def _check(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"inversion must be one of {list(MODES)}, got {self.mode!r}.")
        if self.batch_size < 1:
            raise ValueError(f"inversion_batch_size must be at least 1, got {self.batch_size}.")
        if self.zero_steps is not None and self.zero_steps < 0:
            raise ValueError(f"num_zero_noise_steps must be at least 0, got {self.zero_steps}.")

    def _pixels(self, image: Any, pad: bool, preparation: dict[str, Any]) -> tuple[Tensor, tuple[int, int] | None]:
        adapter = self.pipe.adapter
        pixels = self.pipe.image_processor.preprocess(image=image, **preparation)
        return legal_pixels(pixels, self.pipe.vae_scale_factor * adapter.size_multiple, pad=pad)

    def _condition(self, batch: int) -> SourceCondition:
        sources = spread_texts("source_prompt", self.source_prompt, batch) or ()
        is_ignored = self.mode == "diffusers" and self.source_guidance_scale <= 1.0
        return SourceCondition(
            source_prompt=sources if any(sources) and not is_ignored else (),
            source_guidance_scale=float(self.source_guidance_scale),
            negative_prompt=spread_texts("negative_prompt", self.negative_prompt, batch),
            negative_prompt_2=spread_texts("negative_prompt_2", self.negative_prompt_2, batch),
            clip_skip=self.clip_skip,
            crops_coords_top_left=self.crops_coords_top_left,
            control_scale=float(self.control_scale),
            guidance_scale=self.guidance_scale,
        )

    def _maps(
        self, path: Tensor, schedule: Schedule, stepper: Stepper, condition: SourceCondition, context: CallContext
    ) -> Tensor:
        adapter = self.pipe.adapter
        batch = path.shape[1]
        prompts = PromptTable(*base_prompts(adapter, condition, context, batch), [])
        denoising = Denoising(adapter, prompts, context, schedule.timesteps.to(path.device))
        with self.pipe.progress_bar(total=len(schedule)) as bar:
            maps = extract_maps(path, stepper, self._predictor(denoising, condition, path, bar))
        zeros = self.zero_steps
        if zeros is None:
            zeros = adapter.defaults.num_zero_noise_steps if self.mode == "diffusers" else 0
        if zeros:
            maps[-zeros:] = 0.0
        return maps

    def _predictor(
        self, denoising: Denoising, condition: SourceCondition, path: Tensor, bar: Any
    ) -> Callable[[int, Tensor], Tensor]:
        """(step, state) to output; several steps per model call where asked, from the path as it was drawn."""
        ready: dict[int, Tensor] = {}

        def predict(k: int, state: Tensor) -> Tensor:
            bar.update()
            if self.batch_size == 1:
                return denoising.predict_base(k, state, condition)
            if k not in ready:
                several = range(k, min(k + self.batch_size, path.shape[0] - 1))
                ready.update(zip(several, denoising.predict_steps(several, path, condition), strict=True))
            return ready.pop(k)

        return predict


def call_context(
    condition: SourceCondition,
    size: tuple[int, int],
    extras: dict[str, Tensor],
    attention_kwargs: dict[str, Any] | None,
    mode: Mode,
) -> CallContext:
    """What the denoiser is told beside latents and prompts, at inversion and edit alike."""
    return CallContext(
        size=size,
        attention_kwargs=attention_kwargs,
        crops_coords_top_left=condition.crops_coords_top_left,
        row_extras=extras,
        control_scale=condition.control_scale,
        guidance=condition.guidance_scale,
        as_diffusers=mode == "diffusers",
    )


def base_prompts(
    adapter: Any, condition: SourceCondition, context: CallContext, batch: int, **negative: Any
) -> tuple[PromptRows, PromptRows | None]:
    """The unconditional and the source rows, B each."""
    request = PromptRequest(
        prompts=condition.negative_prompt,
        prompts_2=condition.negative_prompt_2,
        clip_skip=condition.clip_skip,
        is_negative=True,
        rows=batch,
        lora_scale=context.lora_scale,
        **negative,
    )
    unconditional = adapter.with_context(adapter.encode_prompts(request), context)
    if not condition.has_source:
        return unconditional, None
    request = PromptRequest(
        prompts=condition.source_prompt, clip_skip=condition.clip_skip, rows=batch, lora_scale=context.lora_scale
    )
    return unconditional, adapter.with_context(adapter.encode_prompts(request), context)


@dataclass(frozen=True, kw_only=True)
class EditCall:
    """The arguments of calling a `LEditsPipeline`."""

    pipe: Any
    inversion: LEditsInversion
    editing_prompt: Any
    embeds: Tensor | None
    pooled: Tensor | None
    token_spans: Sequence[Sequence[int]] | None
    negative_prompt: Any
    negative_prompt_2: Any
    negative_embeds: Tensor | None
    negative_pooled: Tensor | None
    clip_skip: int | None
    settings: dict[str, Any]
    user_mask: Any
    sem_guidance: Sequence[Tensor] | None
    use_cross_attn_mask: bool
    use_intersect_mask: bool | None
    attn_store_steps: tuple[int, ...]
    store_averaged_over_steps: bool
    attention_kwargs: dict[str, Any] | None
    control_scale: float | None
    images: dict[str, Any]
    """`ip_adapter_image`, `ip_adapter_image_embeds`, `control_image`."""
    guidance_rescale: float
    mask_ema: float
    mask_dilate: int
    apply_residual: str
    crops_coords_top_left: tuple[int, int] | None
    denoising_end: float | None
    callback: Callable[..., Any] | None
    callback_names: tuple[str, ...]

    def run(self, output_type: str) -> LEditsOutput:
        pipe, inversion = self.pipe, self.inversion
        texts = self._texts()
        count = len(texts) if self.embeds is None else self.embeds.shape[0]
        plan = plan_edits(count, **self.settings)
        rules = self._rules(count)
        run = self._prepare(texts, count, plan, rules)
        latent_size = (inversion.init_latents.shape[-2], inversion.init_latents.shape[-1])
        pipe._interrupt = False
        with (
            attention_recorded(run.denoising, latent_size, count > 0 and any(rule.attention for rule in rules)),
            pipe.progress_bar(total=len(rules)) as bar,
        ):
            run.on_step_end = self._step_end(run, bar)
            latents = self._walk(run)
        pipe.sem_guidance, pipe._last_masks = run.guidance, run.masks
        return self._output(run, latents, output_type)

    def _texts(self) -> list[str]:
        prompt = self.editing_prompt
        if prompt is None:
            return []
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if texts and self.embeds is not None:
            raise ValueError("editing_prompt and editing_prompt_embeds describe the same edits; pass one of them.")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"editing_prompt must hold texts that are not empty, got {text!r}; "
                    "without an edit leave it out, for an empty text pass editing_prompt_embeds."
                )
        return texts

    def _rules(self, count: int) -> list[MaskRule]:
        """One per step."""
        defaults, as_diffusers = self.pipe.adapter.defaults, self.inversion.mode == "diffusers"
        intersect = self.use_intersect_mask
        if intersect and count and self.embeds is not None and self.token_spans is None:
            raise ValueError(
                "use_intersect_mask=True with editing_prompt_embeds needs editing_token_spans: "
                "embeddings do not say which text columns are the edit's own words."
            )
        if intersect is None:
            intersect = defaults.use_intersect_mask if as_diffusers else True
        rule = MaskRule(
            attention=intersect or self.use_cross_attn_mask,
            noise=intersect or not self.use_cross_attn_mask,
            dilate=self.mask_dilate,
            quantile_dtype=torch.float32 if as_diffusers else None,
        )
        early = defaults.attention_only_above if as_diffusers and intersect else None
        return [
            replace(rule, noise=False) if early is not None and t > early else rule
            for t in self.inversion.schedule.timesteps.tolist()
        ]

    def _prepare(self, texts: list[str], count: int, plan: EditPlan, rules: list[MaskRule]) -> EditRun:
        adapter, inversion = self.pipe.adapter, self.inversion
        self._check(adapter)
        batch = len(inversion)
        condition = self._condition(batch)
        extras = {k: v.to(self.pipe._execution_device) for k, v in inversion.row_extras.items()}
        extras |= adapter.row_extras(inversion.size, batch, **self.images)
        context = call_context(condition, inversion.size, extras, self.attention_kwargs, inversion.mode)
        negative = {"embeds": self.negative_embeds, "pooled": self.negative_pooled}
        unconditional, source = base_prompts(adapter, condition, context, batch, **negative)
        edits = self._edit_prompts(texts, count, any(rule.attention for rule in rules), context)
        device = self.pipe._execution_device
        x = inversion.init_latents.to(device)
        moved = replace(inversion, init_latents=x, maps=inversion.maps.to(device), condition=condition)
        prompts = PromptTable(unconditional, source, edits)
        return EditRun(
            inversion=moved,
            denoising=Denoising(adapter, prompts, context, inversion.schedule.timesteps.to(device)),
            plan=plan,
            rules=rules,
            steps=self._steps(),
            user_masks=latent_user_masks(self.user_mask, count, batch, (x.shape[-2], x.shape[-1]), device, x.dtype)
            if count
            else None,
            given_guidance=list(self.sem_guidance) if self.sem_guidance is not None else [],
            guidance_rescale=self.guidance_rescale,
            mask_ema=self.mask_ema,
            drops_residual=self.apply_residual == "background",
            is_interrupted=lambda: self.pipe.interrupt,
            kept_attention=self._attention_memory(adapter, count, x),
        )

    def _check(self, adapter: Any) -> None:
        inversion = self.inversion
        if inversion.family != adapter.name:
            raise ValueError(
                f"inversion was made for the family {inversion.family!r}, but this pipeline is {adapter.name!r}; "
                "invert the picture again."
            )
        if inversion.model_hash and inversion.model_hash != model_hash(adapter.denoiser):
            warnings.warn(
                "inversion was made with another denoiser than this pipeline's; results will not fit the picture. "
                "Invert again, or load the model it was made with.",
                stacklevel=5,
            )
        if unknown := [name for name in self.callback_names if name not in self.pipe._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has unknown names {unknown}; "
                f"it takes {self.pipe._callback_tensor_inputs}."
            )
        if self.negative_prompt is not None and self.negative_embeds is not None:
            raise ValueError("negative_prompt and negative_prompt_embeds describe the same; pass one of them.")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale must lie in [0, 1], got {self.guidance_rescale}.")
        if not 0.0 <= self.mask_ema < 1.0:
            raise ValueError(f"mask_ema must lie in [0, 1), got {self.mask_ema}.")
        if type(self.mask_dilate) is not int or self.mask_dilate < 0:
            raise ValueError(f"mask_dilate must be a whole number of positions, at least 0, got {self.mask_dilate!r}.")
        if self.apply_residual not in ("all", "background"):
            raise ValueError(f'apply_residual must be "all" or "background", got {self.apply_residual!r}.')

    def _condition(self, batch: int) -> SourceCondition:
        """As at inversion, but for what this call says itself."""
        changes: dict[str, Any] = {}
        kept = self.inversion.condition
        if self.inversion.mode == "diffusers":  # whose edits know nothing of what inversion was told
            kept = SourceCondition()
        for name in ("negative_prompt", "negative_prompt_2"):
            if getattr(self, name) is not None:
                changes[name] = spread_texts(name, getattr(self, name), batch)
        if self.crops_coords_top_left is not None:
            changes["crops_coords_top_left"] = self.crops_coords_top_left
        if self.control_scale is not None:
            changes["control_scale"] = float(self.control_scale)
        return replace(kept, **changes)

    def _edit_prompts(self, texts: list[str], count: int, wants_tokens: bool, context: CallContext) -> list[PromptRows]:
        """E groups of B rows."""
        if not count:
            return []
        adapter, batch = self.pipe.adapter, len(self.inversion)
        request = PromptRequest(
            prompts=texts or None,
            embeds=self.embeds,
            pooled=self.pooled,
            token_spans=self._spans(count),
            clip_skip=self.clip_skip,
            wants_tokens=wants_tokens,
            as_diffusers=context.as_diffusers,
            rows=count,
            lora_scale=context.lora_scale,
        )
        rows = adapter.encode_prompts(request).repeat_interleave(batch)
        return adapter.with_context(rows, context).split(batch)

    def _spans(self, count: int) -> Sequence[Sequence[int]] | None:
        spans = self.token_spans
        if spans is not None and len(spans) != count:
            raise ValueError(f"editing_token_spans has {len(spans)} entries for {count} edits; give one each.")
        return spans

    def _walk(self, run: EditRun) -> Tensor:
        if run.inversion.mode == "paired":
            return replay_paired(run, PairedStepper(run.inversion.schedule))
        if run.inversion.mode == "exact":
            return replay_stored(run, AffineStepper(run.inversion.schedule))
        return replay_stored(run, self._scheduler_stepper(self.pipe.adapter))

    def _scheduler_stepper(self, adapter: Any) -> Stepper:
        inversion = self.inversion
        scheduler = adapter.editing_scheduler(*inversion.size)
        again = adapter.schedule(scheduler, len(inversion.schedule), inversion.skip, solver=None, eta=1.0)
        if again.timesteps.tolist() != inversion.schedule.timesteps.tolist():
            raise ValueError(
                'the scheduler changed since the inversion, which "diffusers" mode cannot replay; invert again.'
            )
        return adapter.scheduler_stepper(scheduler, again)

    def _steps(self) -> int:
        """How many of the steps are taken."""
        steps = len(self.inversion.schedule)
        if self.denoising_end is None:
            return steps
        if not 0.0 < self.denoising_end < 1.0:
            raise ValueError(f"denoising_end must lie in (0, 1), got {self.denoising_end}.")
        trained = self.pipe.scheduler.config.num_train_timesteps
        cutoff = round(trained - self.denoising_end * trained)
        return sum(t >= cutoff for t in self.inversion.schedule.timesteps.tolist())

    def _attention_memory(self, adapter: Any, count: int, x: Tensor) -> dict[int, Tensor]:
        grid = adapter.mask_grid((x.shape[-2], x.shape[-1]))
        return {k: x.new_zeros((count, x.shape[0], *grid)) for k in self.attn_store_steps}

    def _step_end(self, run: EditRun, bar: Any) -> Callable[[int, Tensor], Tensor]:
        timesteps = self.inversion.schedule.timesteps

        def end(k: int, state: Tensor) -> Tensor:
            bar.update()
            if self.callback is None:
                return state
            table, tensors = run.denoising.prompts, self.pipe.adapter.callback_tensors
            given = {name: state if name == "latents" else table.value(*tensors[name]) for name in self.callback_names}
            answer = self.callback(self.pipe, k, timesteps[k], dict(given)) or {}
            for name in self.callback_names:
                if name != "latents" and answer.get(name, given[name]) is not given[name]:
                    which, field = tensors[name]
                    table.replace(which, field, answer[name])
            changed = answer.get("latents", state)
            return state if changed is state else changed.to(state)

        return end

    def _output(self, run: EditRun, latents: Tensor, output_type: str) -> LEditsOutput:
        pipe, flagged = self.pipe, None
        if output_type == "latent":
            images: Any = latents
        else:
            pixels = _decode(pipe.adapter, latents)
            if self.inversion.crop is not None:
                pixels = pixels[..., : self.inversion.crop[0], : self.inversion.crop[1]]
            pixels, flagged = pipe.adapter.check_safety(pixels)
            clean = [not f for f in flagged] if flagged is not None else [True] * pixels.shape[0]
            images = pipe.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=clean)
        maps = list(run.kept_attention.values()) if len(run.plan) else []
        attention = None
        if maps:
            attention = torch.stack(maps).mean(dim=0) if self.store_averaged_over_steps else torch.stack(maps)
        return LEditsOutput(images, flagged, run.masks, attention)


def model_hash(denoiser: Any) -> str:
    """A fingerprint of a denoiser's configuration (not of its weights)."""
    fields = {k: v for k, v in dict(denoiser.config).items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _decode(adapter: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return adapter.decode(latents)
