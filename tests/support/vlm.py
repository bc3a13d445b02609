"""Tiny vision-language models with random weights, and processors for them, made here and now."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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
    from tokenizers import processors

    raw = Tokenizer(models.WordLevel({token: index for index, token in enumerate(_VOCABULARY)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_next")
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=roles or {"image_token": "<image>"},
        additional_special_tokens=[*MARKS.values(), *_PLACES],
    )


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
    pixels = transformers.CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}
    )
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


class _WithoutVideos(transformers.Qwen2VLProcessor):  # type: ignore[misc]
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
    vision = {"depth": 3, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VLForConditionalGeneration", vision, dtype)


def qwen3_vl(dtype: torch.dtype = torch.float64, **_: Any) -> Vlm:
    """Qwen3-VL: picture features enter several layers of the decoder."""
    vision = {"depth": 3, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
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
