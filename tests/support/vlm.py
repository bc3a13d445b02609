"""Tiny vision-language models with random weights, and processors for them, made here and now."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerFast
from transformers.masking_utils import sdpa_mask

from tests.support.atman import manipulate

WORDS = ("what", "is", "it", "?", "a", "panda", "cat", "in", "this", "picture", "and", ":", "the")
MARKS = {
    "image_token": "<image>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "video_token": "<video>",
    "fake": "<fake_token_around_image>",
    "globe": "<global-img>",
    "end": "<end_of_utterance>",
    "break": "[IMG_BREAK]",
    "image_end": "[IMG_END]",
}
_PLACES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
_VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *MARKS.values(), *_PLACES, "\n", "\n\n", *WORDS]
VOCAB = len(_VOCABULARY)
IMAGE_ID = _VOCABULARY.index("<image>")
TOWERS = ("vision_tower", "visual", "vision_model")
TARGET = (_VOCABULARY.index("panda"), _VOCABULARY.index("cat"), _VOCABULARY.index("is"))

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Vlm:
    """A model in eval mode, its processor, and how a prompt with one picture looks."""

    model: PreTrainedModel
    processor: Any
    prompt: str = "<image> what is it ?"

    def encode(self, prompt: str, *images: Any) -> Any:
        """The processor's own output for one prompt."""
        return self.processor(text=prompt, images=list(images) or None, return_tensors="pt")


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    """Words at spaces; a start token before every text."""
    raw = Tokenizer(models.WordLevel({token: index for index, token in enumerate(_VOCABULARY)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=roles or {"image_token": "<image>"},
    )
    made.add_tokens([AddedToken(mark, special=True) for mark in (*MARKS.values(), *_PLACES)])
    return made


def _finished(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Move parameters that start at 0 or 1 away from there, so that each of them makes a difference."""
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
    return model.to(dtype).eval()


def llava(dtype: torch.dtype = torch.float64, *, strategy: str = "default", **_: Any) -> Vlm:
    """LLaVA: one token per patch of CLIP's tower, 4 x 4."""
    text = transformers.LlamaConfig(**_TEXT)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=16),
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy=strategy,
        image_seq_length=16,
    )
    pixels = transformers.CLIPImageProcessorPil(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        pixels,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )
    return Vlm(_finished(transformers.LlavaForConditionalGeneration(config), dtype), processor)


def llava_next(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """LLaVA-NeXT: the whole picture, then its parts with an extra token at the end of every row."""
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=16),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    pixels = transformers.LlavaNextImageProcessorPil(
        size={"height": 16, "width": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    processor = transformers.LlavaNextProcessor(
        pixels, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return Vlm(_finished(transformers.LlavaNextForConditionalGeneration(config), dtype), processor)


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
_QWEN_IDS = {"image_token_id": IMAGE_ID, "video_token_id": 9, "vision_start_token_id": 5, "vision_end_token_id": 6}


class _WithoutVideos(transformers.Qwen2VLProcessor):
    """Qwen's processor where torchvision, which its videos need, is not installed."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def _qwen(model_class: str, vision: dict[str, Any], dtype: torch.dtype) -> Vlm:
    model_type = getattr(transformers, model_class)
    common = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.3}
    text = _TEXT | {"rope_parameters": _MROPE, "head_dim": 8}
    config = model_type.config_class(vision_config=common | vision, text_config=text, **_QWEN_IDS)
    pixels = transformers.Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=4096, **_QWEN_PIXELS)
    processor = _WithoutVideos(pixels, tokenizer(image_token="<image>", video_token="<video>"), None)
    return Vlm(_finished(model_type(config), dtype), processor)


def qwen2_vl(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """Qwen2-VL: pictures of any size, four patches per token, positions with three axes."""
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    return _qwen("Qwen2VLForConditionalGeneration", vision, dtype)


def qwen2_5_vl(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """Qwen2.5-VL: some layers of its tower attend within windows, whose patches stand together."""
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
    }
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VLForConditionalGeneration", vision, dtype)


def qwen3_vl(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """Qwen3-VL: picture features enter several layers of the decoder."""
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
    }
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return _qwen("Qwen3VLForConditionalGeneration", vision, dtype)


def _split_pictures(model_class: str, dtype: torch.dtype) -> Vlm:
    model_type = getattr(transformers, model_class)
    config = model_type.config_class(
        vision_config=_VISION, text_config={"model_type": "llama", **_TEXT}, image_token_id=IMAGE_ID, scale_factor=2
    )
    pixels = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = transformers.Idefics3Processor(pixels, tokenizer(), image_seq_len=4)
    return Vlm(_finished(model_type(config), dtype), processor)


def idefics3(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """Idefics3: large pictures come in parts and once as a whole, four patches per token."""
    return _split_pictures("Idefics3ForConditionalGeneration", dtype)


def smolvlm(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """SmolVLM: as Idefics3."""
    return _split_pictures("SmolVLMForConditionalGeneration", dtype)


def gemma3(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """Gemma 3: the tokens of a picture see each other, so that columns change rows before them."""
    text = _TEXT | {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_ID,
        boi_token_index=_VOCABULARY.index("<boi>"),
        eoi_token_index=_VOCABULARY.index("<eoi>"),
    )
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    roles = {name: MARKS[name] for name in ("image_token", "boi_token", "eoi_token")}
    processor = transformers.Gemma3Processor(pixels, tokenizer(**roles), image_seq_length=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return Vlm(_finished(model, dtype), processor, prompt="<boi> what is it ?")


def pixtral(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """LLaVA with Pixtral's tower: pictures of any size, with an extra token at the end of every row."""
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**_VISION | {"image_size": 64, "head_dim": 8}),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return Vlm(_finished(transformers.LlavaForConditionalGeneration(config), dtype), None)


class _Reference:
    """One slow pass of a model, with attention written out and some keys suppressed."""

    def __init__(self, model: PreTrainedModel, decoder: Tensor | None, tower: Tensor | None, mode: str) -> None:
        self.inside = {id(module) for module in model.get_decoder().modules()}
        self.decoder = decoder
        """Factors [T] of the decoder's keys."""
        self.tower = tower
        """Factors [C] of the tower's keys, in the order in which a layer gets them."""
        self.mode = mode
        self.dealt: dict[int, int] = {}

    def factors(self, module: torch.nn.Module, key: Tensor) -> Tensor | None:
        """Factors [B, 1, 1, Tk] of a call's keys."""
        if id(module) in self.inside:
            return self.decoder
        if self.tower is None:
            return None
        start, count = self.dealt.get(id(module), 0), key.shape[0] * key.shape[2]
        self.dealt[id(module)] = start + count
        return self.tower[start : start + count].view(key.shape[0], 1, 1, key.shape[2])


_running: _Reference | None = None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert _running is not None
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        attention_mask = torch.ones_like(scores, dtype=torch.bool)
    elif attention_mask.is_floating_point():  # Pixtral's tower adds its mask
        attention_mask = attention_mask == 0
    visible = attention_mask.expand_as(scores)
    factors = _running.factors(module, key)
    if factors is not None:
        scores = manipulate(scores, factors, _running.mode, visible)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("vlm_reference", _attention)
AttentionMaskInterface.register(
    "vlm_reference",
    lambda *args, **kwargs: sdpa_mask(
        *args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    ),
)


def row_of(
    inputs: Mapping[str, Tensor], target_ids: Sequence[int], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """A processor's output for one prompt, with the target behind it."""
    row = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    target = torch.tensor([list(target_ids[:-1])], dtype=torch.long)
    fill = {"input_ids": target, "attention_mask": torch.ones_like(target)}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in row:
            row[name] = torch.cat([row[name], fill.get(name, torch.zeros_like(target)).to(row[name].dtype)], 1)
    return row


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    target_ids: Sequence[int],
    *,
    decoder: Tensor | None = None,
    tower: Tensor | None = None,
    mode: str = "shift_min",
) -> Tensor:
    """Log-probabilities [M] of a target behind a processor's output, some keys of decoder or tower suppressed."""
    global _running
    _running = _Reference(model, decoder, tower, mode)
    before = {name: module.config._attn_implementation for name, module in _parts(model)}
    model.set_attn_implementation("vlm_reference")
    try:
        logits = model(**row_of(inputs, target_ids, model.dtype), use_cache=False).logits[0]
    finally:
        for name, module in _parts(model):
            module.config._attn_implementation_internal = before[name]
        _running = None
    rows = logits[-len(target_ids) :].log_softmax(-1)
    return rows.gather(1, torch.tensor(target_ids)[:, None])[:, 0]


def _parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]


@torch.no_grad()
def decoder_embeds(model: PreTrainedModel, inputs: Mapping[str, Tensor], target_ids: Sequence[int]) -> Tensor:
    """What enters the decoder [T, D], images among it."""
    seen: list[Tensor] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**row_of(inputs, target_ids, model.dtype), use_cache=False)
    handle.remove()
    return seen[0][0]


@torch.no_grad()
def tower_inputs(model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: int = 0) -> Tensor:
    """What enters the attention of one layer of the tower, [C, D]."""
    inside = {id(module) for module in model.get_decoder().modules()}
    modules = [m for m in model.modules() if hasattr(m, "is_causal") and id(m) not in inside]
    seen: list[Tensor] = []

    def look(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _SeenEnoughError

    handle = modules[layer].register_forward_pre_hook(look, with_kwargs=True)
    with contextlib.suppress(_SeenEnoughError):
        model(**row_of(inputs, [0], model.dtype), use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


class _SeenEnoughError(Exception):
    """Ends a run."""
