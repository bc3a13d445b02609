"""AtMan by the book: a slow reference that shares no code with the package, and tiny models to hold both against.

The reference runs a whole row for every unit and forms every attention score in float64, as the method is defined.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

VOCAB = 48
PROMPT = (7, 31, 12, 40, 7, 3, 25, 18, 44, 9, 33, 12)  # two tokens come twice
TARGET = (5, 21, 14)
MODES = ("shift_min", "log_additive", "multiply", "shift_min_all")


@dataclass
class _State:
    """What the reference attention function does to the pass that runs now."""

    factors: Tensor | None = None  # [B, 1, 1, T]
    mode: str = "shift_min"
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    order: list[int] = field(default_factory=list)  # ids of attention modules, in the order of their calls


_STATE = _State()


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if id(module) not in _STATE.order:
        _STATE.order.append(id(module))
    H, Hk = query.shape[1], key.shape[1]
    q, k, v = query.double(), key.double(), value.double()
    k, v = k.repeat_interleave(H // Hk, 1), v.repeat_interleave(H // Hk, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias.double()
    visible = attention_mask.expand_as(scores)
    layer = _STATE.order.index(id(module))
    if _STATE.factors is not None and (_STATE.layers is None or layer in _STATE.layers):
        changed = manipulate(scores, _STATE.factors, _STATE.mode, visible)
        touched = range(H) if _STATE.heads is None else _STATE.heads
        scores = torch.stack([changed[:, h] if h in touched else scores[:, h] for h in range(H)], 1)
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:  # the sink takes part in the softmax and carries no value
        scores = torch.cat([scores, s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    out = torch.einsum("bhij,bhjd->bihd", weights, v)
    return out.to(query.dtype).contiguous(), None


def manipulate(scores: Tensor, factors: Tensor, mode: str, visible: Tensor) -> Tensor:
    """Scores [B, H, Tq, Tk] under factors [B, 1, 1, Tk], by definition."""
    if mode == "multiply":
        return scores * factors
    if mode == "log_additive":
        is_emptied = ~(visible & (factors > 0)).any(-1, keepdim=True)
        return torch.where(is_emptied, scores, scores + factors.log())
    counted = torch.ones_like(visible) if mode == "shift_min_all" else visible
    lowest = torch.where(counted, scores, torch.inf).amin(-1, keepdim=True)
    return lowest + (scores - lowest) * factors


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("atman_reference", _attention)
AttentionMaskInterface.register("atman_reference", _mask)


def reference_factors(
    embeds: Tensor,
    columns: Sequence[int],
    factor: float,
    kappa: float | None = None,
    scale_by_similarity: bool = True,
    max_similar: int | None = None,
) -> Tensor:
    """Factors [T] of one unit: of several candidates for a column, the one farthest from 1."""
    vectors = [row / max(float(row.norm()), 1e-8) for row in embeds.double()]
    factors = [1.0] * len(vectors)
    for i in columns if kappa is not None else ():
        similarities = [min(1.0, max(-1.0, float(vectors[i] @ other))) for other in vectors]
        nearest = sorted(range(len(vectors)), key=lambda j: -similarities[j])[:max_similar]
        for j in nearest:
            if similarities[j] >= kappa:
                share = max(similarities[j], 0.0) if scale_by_similarity else 1.0
                candidate = factor + (1 - factor) * (1 - share)
                factors[j] = max(factors[j], candidate, key=lambda f: abs(f - 1))
    return torch.tensor([factor if j in columns else f for j, f in enumerate(factors)], dtype=torch.float64)


def reference_scores(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    target_ids: Sequence[int],
    units: Sequence[Sequence[int]] | None = None,
    *,
    factor: float | None = None,
    kappa: float | None = None,
    scale_by_similarity: bool = True,
    max_similar: int | None = None,
    **settings: Any,
) -> Tensor:
    """Scores [M, U] by one full row per unit; `units` are lists of columns, every prompt token by default."""
    ids = torch.tensor([*prompt_ids, *target_ids[:-1]])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    units = [[column] for column in range(len(prompt_ids))] if units is None else units
    if factor is None:
        factor = 0.01 if settings.get("mode") == "log_additive" else 0.1
    rows = [reference_factors(embeds, each, factor, kappa, scale_by_similarity, max_similar) for each in units]
    readouts = reference_readouts(model, prompt_ids, target_ids, torch.stack([torch.ones(len(ids)), *rows]), **settings)
    return (readouts[0] - readouts[1:]).T


@torch.no_grad()
def reference_readouts(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    target_ids: Sequence[int],
    factors: Tensor,
    *,
    mode: str = "shift_min",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    delta: str = "logprob",
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities or logits [N, M] of the target under each row of factors [N, T]."""
    global _STATE
    ids = torch.tensor([[*prompt_ids, *target_ids[:-1]]] * len(factors))
    chosen = (None if each is None else tuple(each) for each in (layers, heads))
    before, _STATE = model.config._attn_implementation, _State(factors.double()[:, None, None], mode, *chosen)
    model.set_attn_implementation("atman_reference")
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        _STATE = _State()
        model.set_attn_implementation(before)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    read = logits if delta == "logit" else logits.log_softmax(-1)
    return torch.stack([read[:, len(prompt_ids) - 1 + t, target] for t, target in enumerate(target_ids)], 1)


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, prompt_ids: Sequence[int], target_ids: Sequence[int]) -> Tensor:
    """Log-probabilities [M] of the target, by the untouched model."""
    ids = torch.tensor([[*prompt_ids, *target_ids[:-1]]])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    logprobs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return torch.stack([logprobs[len(prompt_ids) - 1 + t, target] for t, target in enumerate(target_ids)])


_BODY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large weights: attention, and so its suppression, makes a difference
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED = _BODY | {"num_key_value_heads": 2}
_WIDE_HEADS = _GROUPED | {"head_dim": 16}


@dataclass(frozen=True)
class Family:
    """One architecture, small."""

    model_class: str
    config: dict[str, Any]
    tolerance: float = 1e-10
    """Of log-probabilities against the untouched model: eager attention rounds to float32 in its softmax."""

    def build(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**self.config | changes)).double().eval()
        if "num_local_experts" in self.config:
            model.set_experts_implementation("eager")  # the default one has no float64
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0, the weights of norms at 1
                parameter.data += torch.randn_like(parameter) / 5
        return model


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _GROUPED),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB, "initializer_range": 0.3}
        | {"bos_token_id": None, "eos_token_id": None},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", _WIDE_HEADS),
    "mistral-window": Family("MistralForCausalLM", _GROUPED | {"sliding_window": 5}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _WIDE_HEADS | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
        tolerance=1e-4,
    ),
    "gemma3": Family("Gemma3ForCausalLM", _WIDE_HEADS | {"sliding_window": 5, "query_pre_attn_scalar": 4}),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        _WIDE_HEADS | {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
        tolerance=1e-4,
    ),
    "opt": Family(
        "OPTForCausalLM",
        {key: value for key, value in _BODY.items() if key not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", _BODY),
    "phi3": Family("Phi3ForCausalLM", _GROUPED),
    "mixtral": Family("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tiny_model(name: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model in eval mode; `changes` go to its configuration."""
    return FAMILIES[name].build(seed, **changes)


def padded(*rows: Sequence[int], side: str, length: int | None = None) -> dict[str, Tensor]:
    """Encode rows of ids as a padded batch, at least `length` long."""
    width = max(length or 0, *(len(row) for row in rows))
    ids, mask = [], []
    for row in rows:
        filler = [0] * (width - len(row))
        ids.append([*filler, *row] if side == "left" else [*row, *filler])
        mask.append([0 * each for each in filler] + [1] * len(row) if side == "left" else [1] * len(row) + filler)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
