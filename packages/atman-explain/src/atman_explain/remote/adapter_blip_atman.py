"""BLIP, as in the paper: patches lose attention in the vision encoder, while both text models stay as they are."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .adapters_atman import patched_forward
from .configuration_atman import AtManConfig
from .errors_atman import UnsupportedModelError
from .hook_atman import AttentionCall, dispatch
from .images_atman import patch_grids
from .observing_atman import further_inputs
from .passages_atman import Passage, forward_rows
from .prompts_atman import EncodedPrompt, ImageColumns
from .vision_atman import VisionPasses

MODEL_TYPE = "blip"


@contextlib.contextmanager
def adapt_blip(model: PreTrainedModel) -> Iterator[None]:
    """Send the attention of a BLIP model's vision encoder through AtMan's within this context."""
    from transformers.models.blip.modeling_blip import BlipAttention

    modules = [module for module in model.modules() if isinstance(module, BlipAttention)]
    with patched_forward(modules, _forward):
        yield


def _forward(module: Any, hidden_states: Tensor, **_unused: Any) -> tuple[Tensor, None]:
    if module.dropout.p and module.training:
        raise ValueError(
            f"Attention dropout must be 0 where AtMan computes attention, got {module.dropout.p} in "
            f"{type(module).__name__}: call model.eval() first."
        )
    parts = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1))  # [B, T, 3, H, D]
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    out = dispatch(AttentionCall(module=module, query=query, key=key, value=value, scale=module.scale))
    return module.projection(out.transpose(1, 2).flatten(2)), None


class BlipPasses(VisionPasses):
    """A few passages of one BLIP model that writes captions or answers.

    A caption continues the prompt. An answer follows the start token, and the prompt is what the question encoder
    reads. Prompts are as the processor makes them: a first token, for which the model's own start token is taken, the
    text, and an end token, which a caption's prompt loses.
    """

    def _logits(self, passage: Passage, inputs: Mapping[str, Any]) -> Tensor:
        model, pixels = self._model, inputs["pixel_values"]
        source = model.vision_model(pixel_values=pixels).last_hidden_state  # [R, 1 + patches, D]
        ids = list(passage.target_ids[:-1])
        if _answers(model):
            question = torch.tensor([passage.prompt_ids] * len(pixels), device=pixels.device)
            source = model.text_encoder(
                input_ids=question,
                attention_mask=torch.ones_like(question),
                encoder_hidden_states=source,
                encoder_attention_mask=_all_seen(source),
            ).last_hidden_state
        else:
            ids = [*passage.prompt_ids[1:-1], *ids]
        ids = [model.config.text_config.bos_token_id, *ids]
        last = len(ids)
        return forward_rows(
            model.text_decoder,
            torch.arange(last - len(passage.target_ids), last, device=pixels.device),
            input_ids=torch.tensor([ids] * len(pixels), device=pixels.device),
            encoder_hidden_states=source,
            encoder_attention_mask=_all_seen(source),
            use_cache=False,
        )


def is_blip(model: PreTrainedModel) -> bool:
    """Whether a model is one of BLIP's."""
    return bool(model.config.model_type == MODEL_TYPE)


def at_patches(model: PreTrainedModel, config: AtManConfig) -> AtManConfig:
    """Settings for a BLIP model, whose one site is the vision encoder.

    Raises:
        UnsupportedModelError: it writes no text.
        ValueError: another site is asked for.
    """
    if not hasattr(model, "text_decoder"):
        raise UnsupportedModelError(
            f"{type(model).__name__} writes no text that could be explained; use BlipForConditionalGeneration or "
            "BlipForQuestionAnswering."
        )
    if config.sites not in (None, ("vision",)):
        raise ValueError(f'sites must be None or ("vision",) for {type(model).__name__}, got {config.sites}.')
    return replace(config, sites=("vision",))


def locate_blip_patches(model: PreTrainedModel, prompt: EncodedPrompt) -> EncodedPrompt:
    """Number the patches of a prompt's image, row by row.

    Raises:
        ValueError: there is no image, or several.
    """
    pixels = prompt.model_inputs.get("pixel_values")
    count = 0 if pixels is None else len(pixels)
    if count != 1:
        raise ValueError(f"images must be one image per prompt for {type(model).__name__}, got {count}.")
    (grid,) = patch_grids(model.config, prompt.model_inputs) or [(1, 1)]
    return replace(prompt, images=(ImageColumns(columns=tuple(range(grid[0] * grid[1])), grid=grid),))


def generate_blip(model: PreTrainedModel, prompt: EncodedPrompt, max_new_tokens: int) -> tuple[int, ...]:
    """Caption an image or answer a question greedily; without the end token, unless it is all there is."""
    ids = torch.tensor([prompt.input_ids], device=model.device)
    extra = further_inputs(prompt.model_inputs, model)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        **extra,
    )
    new = out[0, 1 if _answers(model) else len(prompt.input_ids) - 1 :].tolist()
    return tuple(new[:-1] if len(new) > 1 and new[-1] == model.config.text_config.sep_token_id else new)


def _answers(model: PreTrainedModel) -> bool:
    """Whether the prompt is a question, for an encoder of its own."""
    return hasattr(model, "text_encoder")


def _all_seen(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
