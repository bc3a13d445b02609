"""Tiny models with random weights for the adapters' tests, and small steps that many of them share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 64
HIDDEN = 32
_BODY: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(_BODY | fields)))


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**_BODY, head_dim=16, num_key_value_heads=1))


def gemma2() -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(Gemma2Config(**_BODY, head_dim=16, num_key_value_heads=1, sliding_window=4))


def mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**_BODY, num_key_value_heads=1, sliding_window=4))


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": HIDDEN, "n_layer": 3, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # so that two passes in train mode agree
    return GPT2LMHeadModel(GPT2Config(**sizes, **special, **quiet, initializer_range=0.2))


def opt() -> OPTForCausalLM:
    sizes = {"hidden_size": HIDDEN, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**sizes, **special, word_embed_proj_dim=HIDDEN, init_std=0.2))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**_BODY, num_labels=2))


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2, "vocab_size": VOCABULARY}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **special))


def tfree() -> nn.Module:
    from tests.support.tfree import tiny_tfree

    return tiny_tfree(hidden_size=HIDDEN, num_hidden_layers=3)[0]


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "mistral": mistral,
    "opt": opt,
    "tfree": tfree,
}


def built(make: Callable[[], nn.Module] = llama, seed: int = 0) -> nn.Module:
    """A model in eval mode; the same for the same seed."""
    torch.manual_seed(seed)
    return make().eval()


def some_ids(rows: int = 3, length: int = 9, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Tokens without special ones [rows, length]."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def settings(**fields: Any) -> Any:
    """A configuration of two concepts, "a" and "b", on two layers."""
    import scar_peft

    defaults = {
        "layers": [1, 2],
        "site": "block",
        "concepts": ["a", "b"],
        "n_latents": 96,
        "k": 8,
        "task_type": "CAUSAL_LM",
    }
    return scar_peft.ScarConfig(**(defaults | fields))


def adapted(base: nn.Module | None = None, adapter_name: str = "default", seed: int = 1, **fields: Any) -> Any:
    """A PEFT model whose coders have random weights and biases."""
    import peft

    base = built() if base is None else base
    config = settings(**fields)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, config, adapter_name=adapter_name).eval()
    give_biases(model, adapter_name)
    return model


@torch.no_grad()
def give_biases(model: nn.Module, adapter_name: str = "default") -> None:
    """Replace the zeros that new coders have as biases, so that tests see them."""
    import scar_peft

    for layer in scar_peft.scar_layers(model, adapter_name):
        weights = layer.weights(adapter_name)
        weights.pre_bias.normal_(std=0.2)
        weights.latent_bias.normal_(std=0.3)[:2] += 0.5  # so that top-k keeps the concepts on some tokens
        weights.decoder.mul_(torch.empty_like(weights.decoder).uniform_(0.5, 1.5))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    """Logits of one pass without gradients."""
    ids = some_ids() if ids is None else ids
    return model(input_ids=ids, **inputs).logits


def inputs_for(model: nn.Module) -> dict[str, Tensor]:
    """Inputs that suit a model of any family above."""
    ids = some_ids(vocabulary=min(VOCABULARY, getattr(model.config, "vocab_size", VOCABULARY)))
    return (
        {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {"input_ids": ids}
    )


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of a module, as the rest of the model gets them."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def before_and_after(model: Any, layer: Any, ids: Tensor | None = None, **request: Any) -> tuple[Tensor, Tensor]:
    """Outputs of a layer's target, unsteered and steered [B, L, d]; only the first adapted layer has the same input."""
    with outputs_of(layer.get_base_layer()) as seen:
        logits(model, ids)
        logits(model, ids, **request)
    return seen[0], seen[1]
