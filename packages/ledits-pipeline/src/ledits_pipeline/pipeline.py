"""LEDITS++ as a diffusers pipeline: invert a picture once, edit it as often as wanted, or do both in one call."""

import copy
import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    FluxTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import HfApi
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5Tokenizer,
    T5TokenizerFast,
)

from .adapter_flux import FluxAdapter as FluxAdapter  # registers itself, as the next ones do
from .adapter_sd import StableDiffusionAdapter as StableDiffusionAdapter
from .adapter_sd3 import StableDiffusion3Adapter as StableDiffusion3Adapter
from .adapter_sdxl import StableDiffusionXLAdapter as StableDiffusionXLAdapter
from .adapters import FamilyAdapter, choose_adapter
from .calls import EditCall, InvertCall
from .hub import is_packaged, keeps_card, pipeline_card, write_code
from .inversion import LEditsInversion, Mode
from .output import LEditsOutput
from .solver import SolverName

_UPLOADING = ("commit_message", "private", "create_pr", "token", "repo_id", "license")
"""Keywords of `save_pretrained` that are about the upload."""


class LEditsPipeline(DiffusionPipeline):
    """Edits real pictures by text with any diffusion model: Stable Diffusion 1.x, 2.x, XL and 3, Flux, registered ones.

    The family is recognized by the components. `from_pipe` shares the modules of a loaded pipeline at their dtype.

    Example:
        >>> pipe = LEditsPipeline.from_pretrained(repository)
        >>> pipe.invert(picture, num_inversion_steps=50, generator=torch.Generator().manual_seed(0))
        >>> pipe(editing_prompt=["sunglasses", "cat"], reverse_editing_direction=[False, True]).images[0]

    Source: Brack et al. 2023, "LEDITS++", arXiv 2311.16711.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->unet->transformer->vae"
    _exclude_from_cpu_offload = ["safety_checker"]
    # what the class of a family does not have reads as None
    unet = transformer = controlnet = image_encoder = safety_checker = feature_extractor = None
    text_encoder = text_encoder_2 = text_encoder_3 = tokenizer = tokenizer_2 = tokenizer_3 = None
    _optional_components = [
        "text_encoder",
        "tokenizer",
        "unet",
        "transformer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "controlnet",
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        unet: UNet2DConditionModel | None = None,
        transformer: SD3Transformer2DModel | FluxTransformer2DModel | None = None,
        text_encoder_2: CLIPTextModelWithProjection | T5EncoderModel | None = None,
        tokenizer_2: CLIPTokenizer | T5Tokenizer | T5TokenizerFast | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5Tokenizer | T5TokenizerFast | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: Any = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        controlnet: ControlNetModel | None = None,
        requires_safety_checker: bool = True,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__()
        self._assemble(
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            transformer=transformer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            controlnet=controlnet,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )

    def _assemble(self, **components: Any) -> None:
        """Register the components, recognize their family, and start without an inversion."""
        self.register_modules(**components)
        self.adapter: FamilyAdapter = choose_adapter(self)(self)
        self.vae_scale_factor = self.adapter.vae_scale_factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.inversion: LEditsInversion | None = None
        self.sem_guidance: Tensor | None = None
        self._last_masks: Tensor | None = None
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "LEditsPipeline":
        """An editing pipeline over the modules of a loaded one.

        The modules are shared and keep their dtype and device; the scheduler is a copy.

        Args:
            pipeline: a pipeline of a supported family.
            **kwargs: `torch_dtype`, and components or options to use instead of the pipeline's own.

        Raises:
            TypeError: a keyword is neither.
        """
        dtype = kwargs.pop("torch_dtype", None)
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(f"from_pipe got unexpected keyword arguments {unknown}; it takes {sorted(known)}.")
        own = {name: part for name, part in pipeline.components.items() if name in known}
        own |= {name: value for name, value in pipeline.config.items() if name in known and name not in own}
        own["scheduler"] = copy.deepcopy(own.get("scheduler"))
        made = cls(**(own | kwargs))
        if (origin := pipeline.config.get("_name_or_path")) is not None:
            made.register_to_config(_name_or_path=origin)
        return made.to(dtype=dtype) if dtype is not None else made

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        push_to_hub: bool = False,
        push_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the pipeline into a folder.

        Args:
            save_directory: made if it does not exist.
            *args: see `DiffusionPipeline.save_pretrained`.
            push_to_hub: upload it, too; `repo_id` and further keywords go to `push_to_hub`.
            push_code: add `pipeline.py`, so that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` works
                without this package, and nothing else does. None: only when this is such a copy itself.
            **kwargs: see `DiffusionPipeline.save_pretrained`.
        """
        uploading = {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
        super().save_pretrained(str(save_directory), *args, **kwargs)
        if push_code if push_code is not None else not is_packaged():
            write_code(save_directory)
        if push_to_hub:
            options = {name: value for name, value in kwargs.items() if name in ("safe_serialization", "variant")}
            self.push_to_hub(uploading.pop("repo_id", Path(save_directory).name), **uploading, **options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        push_code: bool = True,
        license: str | None = None,  # noqa: A002
    ) -> str:
        """Upload the pipeline in one commit, with a card whose code runs; a card that somebody wrote stays.

        Args:
            repo_id: `"user/name"`; made if it does not exist.
            commit_message: first line of the commit.
            private: whether a new repository is hidden from others.
            token: of the Hub; None: the one that is logged in.
            create_pr: propose the commit instead of making it.
            safe_serialization: keep it True.
            variant: see `DiffusionPipeline.save_pretrained`.
            push_code: see `save_pretrained`; False uploads what readers need this package for.
            license: of the weights, for the card.

        Returns:
            The commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant, push_code=push_code)
            if not keeps_card(repo_id, token=token):
                steps = self.adapter.defaults.num_inversion_steps
                card = pipeline_card(repo_id, family=self.adapter.name, steps=steps, license=license)
                card.save(f"{folder}/README.md")
            message = commit_message or "Upload LEDITS++ pipeline"
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, create_pr=create_pr)

    def __getattr__(self, name: str) -> Any:
        """Loader methods of the family (LoRA, textual inversion, IP-Adapter) are the pipeline's, too."""
        adapter = self.__dict__.get("adapter")
        for mixin in adapter.loaders if adapter is not None else ():
            if hasattr(mixin, name):
                found = inspect.getattr_static(mixin, name)
                if isinstance(found, classmethod) or not hasattr(found, "__get__"):
                    return getattr(mixin, name)
                return found.__get__(self, type(self))
        return super().__getattr__(name)

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return ["latents", *self.adapter.callback_tensors]

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the step."""
        return self._interrupt

    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        source_prompt: str | Sequence[str] = "",
        source_guidance_scale: float = 3.5,
        num_inversion_steps: int | None = None,
        skip: float = 0.15,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        num_zero_noise_steps: int | None = None,
        *,
        inversion: Mode = "exact",
        solver: SolverName | None = None,
        eta: float = 1.0,
        inversion_batch_size: int = 1,
        pad: bool = False,
        guidance_scale: float | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
    ) -> LEditsInversion:
        """Turn pictures into the noise that gives them back, for any number of edits.

        Args:
            image: one picture or several of one size: PIL, arrays or tensors as diffusers takes them.
            source_prompt: what the picture shows, one for all or one each; `""`: nothing is said. Editing keeps it.
            source_guidance_scale: 0 ignores the source prompt, 1 conditions on it, more guides towards it.
            num_inversion_steps: N; None: diffusers' default for the family (30, SDXL 50).
            skip: share of additional, noisiest steps that are left out, in [0, 1). More stays closer to the picture.
            generator: one for all pictures, or one each; then a batch gives what the single pictures give.
            cross_attention_kwargs: passed to the attention processors; `scale` is the strength of LoRA weights.
            clip_skip: layers left out at the end of the text encoder.
            height: pixels to resize to; None: the picture's own, rounded down to what the autoencoder takes.
            width: likewise.
            resize_mode: `"default"`, `"fill"` or `"crop"`, as in diffusers' image processor.
            crops_coords: box to cut out first, as in diffusers' image processor.
            negative_prompt: prompt of the unconditional prediction; editing keeps it unless it is given another.
            negative_prompt_2: likewise for the second text encoder.
            crops_coords_top_left: SDXL's micro-conditioning.
            num_zero_noise_steps: last noise maps set to zero, which gives up exact reconstruction; None: none, but
                diffusers' default in `"diffusers"` mode.
            inversion: `"exact"` reconstructs to float32 rounding while the model repeats its own bits; `"paired"` runs
                no model now but the base rows twice at every edited step, with an error of exactly 0 where nothing is
                edited; `"diffusers"` repeats diffusers' pipelines.
            solver: `"2m"` or `"first_order"`; None: the scheduler's.
            eta: share of fresh noise in first-order steps, in [0, 1].
            inversion_batch_size: timesteps per model call. Above 1 inversion is faster, but no longer exact: a replay
                with other batch sizes drifts by what the model's kernels differ between them (1e-3 in small models).
            pad: reflect pictures of illegal size to the next legal one and cut results back.
            guidance_scale: the guidance that guidance-distilled models (Flux dev) take as an input; editing keeps it.
            ip_adapter_image: what loaded IP-Adapters look at, one per adapter; editing keeps it.
            ip_adapter_image_embeds: `[1 or B, n, ...]` per adapter instead.
            control_image: what a ControlNet looks at, one for all pictures or one each; editing keeps it.
            controlnet_conditioning_scale: its strength.

        Returns:
            The inversion, also kept as `pipe.inversion`.

        Raises:
            ValueError: an argument is out of range; the message names it.
        """
        call = InvertCall(
            pipe=self,
            mode=inversion,
            source_prompt=source_prompt,
            source_guidance_scale=source_guidance_scale,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            steps=num_inversion_steps,
            skip=skip,
            solver=solver,
            eta=eta,
            zero_steps=num_zero_noise_steps,
            clip_skip=clip_skip,
            crops_coords_top_left=crops_coords_top_left,
            attention_kwargs=cross_attention_kwargs,
            guidance_scale=guidance_scale,
            control_scale=controlnet_conditioning_scale,
            images={
                "ip_adapter_image": ip_adapter_image,
                "ip_adapter_image_embeds": ip_adapter_image_embeds,
                "control_image": control_image,
            },
            batch_size=inversion_batch_size,
        )
        preparation = {"height": height, "width": width, "resize_mode": resize_mode, "crops_coords": crops_coords}
        self.inversion = call.run(image, generator, pad=pad, **preparation)
        self.maybe_free_model_hooks()
        return self.inversion

    @torch.no_grad()
    def __call__(
        self,
        negative_prompt: str | Sequence[str] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        editing_prompt: str | Sequence[str] | None = None,
        editing_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        reverse_editing_direction: bool | Sequence[bool] = False,
        edit_guidance_scale: float | Sequence[float] = 5,
        edit_warmup_steps: int | Sequence[int] = 0,
        edit_cooldown_steps: int | Sequence[int | None] | None = None,
        edit_threshold: float | Sequence[float] = 0.9,
        user_mask: Any = None,
        sem_guidance: Sequence[Tensor] | None = None,
        use_cross_attn_mask: bool = False,
        use_intersect_mask: bool | None = None,
        attn_store_steps: Sequence[int] | None = (),
        store_averaged_over_steps: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        editing_prompt_embeddings: Tensor | None = None,
        editing_pooled_prompt_embeds: Tensor | None = None,
        editing_token_spans: Sequence[Sequence[int]] | None = None,
        denoising_end: float | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        ip_adapter_image: Any = None,
        *,
        inversion: LEditsInversion | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | None = None,
        mask_ema: float = 0.0,
        mask_dilate: int = 0,
        apply_residual: Literal["all", "background"] = "all",
    ) -> LEditsOutput | tuple[Any, Any]:
        """Edit the inverted pictures; without an editing prompt, reconstruct them.

        Arguments that describe edits take one value for all or a sequence with one entry per editing prompt.

        Args:
            negative_prompt: prompt of the unconditional prediction; None: as at inversion.
            generator: unused, editing draws nothing; taken for compatibility.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: False returns `(images, nsfw_content_detected)`.
            editing_prompt: what to add (or remove), one text per edit.
            editing_prompt_embeds: `[E, L, D]` instead of texts.
            negative_prompt_embeds: `[1 or B, L, D]` instead of texts.
            reverse_editing_direction: remove instead of add.
            edit_guidance_scale: s_e, any real number.
            edit_warmup_steps: first step on which the edit acts, counted over the kept steps.
            edit_cooldown_steps: first step on which it no longer acts; None: it acts to the end.
            edit_threshold: lambda in [0, 1]: share of positions that each implicit mask leaves out.
            user_mask: where edits may act: a tensor, array or picture of any size with values in [0, 1], or a list with
                one per edit.
            sem_guidance: changes of the model's output to use instead of the edits on the first steps.
            use_cross_attn_mask: M1, attention to the edit's tokens.
            use_intersect_mask: M1 * M2; None: yes, but diffusers' default for the family in `"diffusers"` mode. Without
                either mask argument M2 alone is used.
            attn_store_steps: steps whose attention maps are returned.
            store_averaged_over_steps: return their mean instead of each.
            cross_attention_kwargs: as at inversion.
            guidance_rescale: phi in [0, 1]; pulls the spread of the guided output to that of the edit predictions.
            clip_skip: layers left out at the end of the text encoder, for the editing prompts.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)`; what it returns is used.
            callback_on_step_end_tensor_inputs: names of `tensors`.
            negative_prompt_2: for the second text encoder.
            negative_pooled_prompt_embeds: goes with `negative_prompt_embeds`, where the family needs it.
            editing_prompt_embeddings: the name of `editing_prompt_embeds` in diffusers' SDXL pipeline.
            editing_pooled_prompt_embeds: goes with `editing_prompt_embeds`, where the family needs it.
            editing_token_spans: text columns that M1 looks at, per edit; needed for exact masks with embeddings.
            denoising_end: share of the training timesteps after which to stop, leaving noise.
            crops_coords_top_left: SDXL's micro-conditioning; None: as at inversion.
            ip_adapter_image: None: as at inversion, like the next three.
            ip_adapter_image_embeds: see `invert`.
            control_image: see `invert`.
            controlnet_conditioning_scale: see `invert`.
            inversion: which inversion to edit; None: the last one of this pipeline.
            mask_ema: share in [0, 1) that earlier steps have in the attention M1 is made of; steadier masks.
            mask_dilate: latent positions by which masks grow; for edits that need more room than the object had.
            apply_residual: `"background"` leaves the picture's finest remains, which no noise covers, out where edits
                acted, so that removed things do not shine through.

        Returns:
            LEditsOutput with `images` and `masks`.

        Raises:
            ValueError: there is no inversion, or an argument does not fit; the message names it.
        """
        if editing_prompt_embeds is None:
            editing_prompt_embeds = editing_prompt_embeddings
        call = EditCall(
            pipe=self,
            inversion=self._required(inversion),
            editing_prompt=editing_prompt,
            embeds=editing_prompt_embeds,
            pooled=editing_pooled_prompt_embeds,
            token_spans=editing_token_spans,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_embeds=negative_prompt_embeds,
            negative_pooled=negative_pooled_prompt_embeds,
            clip_skip=clip_skip,
            settings={
                "reverse_editing_direction": reverse_editing_direction,
                "edit_guidance_scale": edit_guidance_scale,
                "edit_warmup_steps": edit_warmup_steps,
                "edit_cooldown_steps": edit_cooldown_steps,
                "edit_threshold": edit_threshold,
            },
            user_mask=user_mask,
            sem_guidance=sem_guidance,
            use_cross_attn_mask=use_cross_attn_mask,
            use_intersect_mask=use_intersect_mask,
            attn_store_steps=tuple(attn_store_steps or ()),
            store_averaged_over_steps=store_averaged_over_steps,
            attention_kwargs=cross_attention_kwargs,
            control_scale=controlnet_conditioning_scale,
            images={
                "ip_adapter_image": ip_adapter_image,
                "ip_adapter_image_embeds": ip_adapter_image_embeds,
                "control_image": control_image,
            },
            guidance_rescale=guidance_rescale,
            mask_ema=mask_ema,
            mask_dilate=mask_dilate,
            apply_residual=apply_residual,
            crops_coords_top_left=crops_coords_top_left,
            denoising_end=denoising_end,
            callback=callback_on_step_end,
            callback_names=tuple(callback_on_step_end_tensor_inputs or ()),
        )
        output = call.run(output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, output.nsfw_content_detected)

    def edit(
        self,
        image: PipelineImageInput,
        editing_prompt: str | Sequence[str] | None = None,
        *,
        inversion: Mode = "paired",
        **kwargs: Any,
    ) -> LEditsOutput | tuple[Any, Any]:
        """Invert and edit in one call; keywords are those of `invert` and of calling the pipeline.

        With the default `"paired"` nothing is run before editing, nothing but the noisy path is kept, and what is not
        edited comes back exactly.

        Args:
            image: the picture or pictures.
            editing_prompt: what to add or remove.
            inversion: see `invert`.
            **kwargs: `negative_prompt`, `clip_skip` and the like go to both.
        """
        inverting, calling = (set(inspect.signature(f).parameters) for f in (self.invert, self.__call__))
        if unknown := sorted(kwargs.keys() - inverting - calling):
            raise TypeError(f"edit got unexpected keyword arguments {unknown}.")
        made = self.invert(image, inversion=inversion, **{k: v for k, v in kwargs.items() if k in inverting})
        options = {k: v for k, v in kwargs.items() if k in calling}
        return self(editing_prompt=editing_prompt, inversion=made, **options)

    def _required(self, inversion: LEditsInversion | None) -> LEditsInversion:
        if inversion is not None and not isinstance(inversion, LEditsInversion):
            raise TypeError(
                f"inversion must be a LEditsInversion, got {inversion!r}; the mode is chosen in invert or edit."
            )
        found = inversion if inversion is not None else self.inversion
        if found is None:
            raise ValueError("no inversion is stored. Call pipe.invert(image=...) before pipe(editing_prompt=...).")
        return found

    @property
    def init_latents(self) -> Tensor:
        """The noisiest state of the last inversion, `[B, C, h, w]`."""
        return self._required(None).init_latents

    @property
    def zs(self) -> Tensor:
        """What the last inversion stored for every step, `[N, B, C, h, w]`: noise maps only in `"diffusers"` mode."""
        return self._required(None).maps

    @property
    def inversion_steps(self) -> Tensor | None:
        """Timesteps of the last inversion; None before the first."""
        return None if self.inversion is None else self.inversion.schedule.timesteps

    @property
    def batch_size(self) -> int:
        """Pictures of the last inversion."""
        return len(self._required(None))

    @property
    def activation_mask(self) -> Tensor | None:
        """The masks of the last edit as diffusers keeps them: `[N, E, B, C, h, w]`, 0 or 1."""
        if self._last_masks is None:
            return None
        channels = self._required(None).init_latents.shape[1]
        return self._last_masks[:, :, :, None].expand(-1, -1, -1, channels, -1, -1).float()
