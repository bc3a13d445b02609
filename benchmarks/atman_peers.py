"""What AtMan is compared with: the plain method, whole rows in batches, and what captum and inseq offer.

Everything here is our own few lines around the libraries. The plain method shares no code with the package: whole rows,
every attention score formed, all logits, one pass per unit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.masking_utils import sdpa_mask

from atman_explain.remote.batches_atman import BatchPasses
from atman_explain.remote.observing_atman import observe_decoder
from atman_explain.remote.passages_atman import Passage, Readout, RunSettings, Suppression
from atman_explain.remote.switching_atman import atman_implementation, evaluation_mode

PLAIN = "plain_atman"


@dataclass
class _Plain:
    """What the plain attention function does to the pass that runs now."""

    factors: Tensor | None = None  # [T]
    mode: str = "shift_min"


_PLAIN = _Plain()


def _plain_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    groups, T = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    visible = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * scaling
    if _PLAIN.factors is not None:
        factors = _PLAIN.factors.to(scores)
        if _PLAIN.mode == "shift_min":
            lowest = scores.masked_fill(~visible, torch.inf).amin(-1, keepdim=True)
            scores = lowest + (scores - lowest) * factors
        else:
            scores = scores * factors if _PLAIN.mode == "multiply" else scores + factors.log()
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAIN, _plain_attention)
AttentionMaskInterface.register(PLAIN, sdpa_mask)


@contextlib.contextmanager
def _implementation(model: LlamaForCausalLM, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def one_by_one(
    model: LlamaForCausalLM, ids: Sequence[int], target: int, factors: Tensor, mode: str = "shift_min"
) -> Tensor:
    """Scores [U] under factors [U, T], by one pass over the whole row for each of them."""

    def log_probability() -> float:
        logits = model(input_ids=row, use_cache=False).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[-1, target].item()

    row = torch.tensor([ids], device=model.device)
    scores = []
    _PLAIN.mode = mode
    with _implementation(model, PLAIN):
        try:
            baseline = log_probability()
            for each in factors.to(model.device):
                _PLAIN.factors = each
                scores.append(baseline - log_probability())
        finally:
            _PLAIN.factors = None
    return torch.tensor(scores, dtype=torch.float64)


def whole_rows(
    model: LlamaForCausalLM,
    ids: Sequence[int],
    target: int,
    factors: Tensor,
    *,
    batch: int,
    mode: str = "shift_min",
) -> Tensor:
    """Scores [U] by our passes for models whose rows see later ones: whole rows, some in a batch, nothing shared."""
    passage = Passage(prompt_ids=tuple(ids), target_ids=(target,))
    items = [Suppression(0, row.double, 0) for row in factors]
    settings = RunSettings(mode=mode, heads=None, readout=Readout(), tokens=batch * len(ids), most=batch)
    scores = torch.zeros(len(factors), dtype=torch.float64)
    with atman_implementation(model), evaluation_mode(model):
        seen = observe_decoder(model, passage, settings.readout)
        passes = BatchPasses(model, [passage], [seen], chosen=seen.modules, settings=settings)
        for index, readouts in passes.run(items):
            scores[index] = (passes.baseline[0] - readouts).cpu()
    return scores


def captum_method(
    name: str, model: LlamaForCausalLM, ids: Sequence[int], target: int, **settings: Any
) -> Callable[[], Tensor] | None:
    """A call of one of captum's methods on the input embeddings, summed to [T]; None if captum is not installed."""
    if importlib.util.find_spec("captum") is None:
        return None
    import captum.attr

    def log_probability(embeds: Tensor) -> Tensor:
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1)[:, target]

    def call() -> Tensor:
        embeds = model.get_input_embeddings()(torch.tensor([ids], device=model.device)).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it makes the embeddings require gradients
            found = getattr(captum.attr, name)(log_probability).attribute(embeds, **settings)
        return found.detach().sum(-1)[0]

    return call


def inseq_occlusion(model: LlamaForCausalLM, ids: Sequence[int], target: int) -> Callable[[], Tensor] | None:
    """A call of inseq's occlusion for this target, [T]; None if inseq is not installed. Importing it takes long."""
    if importlib.util.find_spec("inseq") is None:
        return None
    import inseq

    wrapped = inseq.load_model(model, "occlusion", tokenizer=_word_tokenizer(model.config.vocab_size))
    prompt = " ".join(f"w{token}" for token in ids)

    def call() -> Tensor:
        found = wrapped.attribute(
            prompt, f"{prompt} w{target}", show_progress=False, pretty_progress=False, step_scores=[]
        )
        return found.sequence_attributions[0].target_attributions[:, 0]

    return call


def _word_tokenizer(V: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word "wi"."""
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(V)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w0"
    )
