"""The untrained model and its processor: LLaVA with a CLIP vision tower, a Llama decoder and a word-level tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from miniatures.captioner.questions import words
from miniatures.captioner.scenes import GRID, IMAGE_SIZE, PATCH_SIZE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and depths; the defaults are those of the committed checkpoint."""

    hidden_size: int = 128
    """Of both halves."""
    num_attention_heads: int = 4
    vision_layers: int = 4
    vision_intermediate_size: int = 384
    text_layers: int = 4
    text_intermediate_size: int = 320


def build_model(sizes: Sizes) -> LlavaForConditionalGeneration:
    """A randomly initialized model for `build_processor`'s inputs."""
    shared = {"hidden_size": sizes.hidden_size, "num_attention_heads": sizes.num_attention_heads}
    vision = CLIPVisionConfig(
        **shared,
        num_hidden_layers=sizes.vision_layers,
        intermediate_size=sizes.vision_intermediate_size,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=sizes.hidden_size,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        **shared,
        num_hidden_layers=sizes.text_layers,
        intermediate_size=sizes.text_intermediate_size,
        vocab_size=len(SPECIAL) + len(words()),
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def build_processor() -> LlavaProcessor:
    """Pictures of 96 x 96 pixels as 144 columns, and the words of the questions and answers as one token each."""
    table = {word: number for number, word in enumerate([*SPECIAL, *words()])}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", table["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
