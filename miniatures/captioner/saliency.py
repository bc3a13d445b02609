"""Maps by gradients and attention, for comparison: which patches a teacher-forced answer token depends on.

Every function returns float [tokens, 144]: one row for each asked answer token, one column for each patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast

from miniatures.captioner.scenes import GRID, PATCH_SIZE, Picture

IG_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture, a prompt and an answer, as the model reads them."""

    model: LlavaForConditionalGeneration
    pixel_values: Tensor
    """float [1, 3, 96, 96]."""
    input_ids: Tensor
    """int64 [1, T]: the prompt and all of the answer but its last token."""
    answer_ids: Tensor
    """int64 [M]; the last M rows of the model predict them."""

    @property
    def image_columns(self) -> Tensor:
        """Indices of the 144 columns that hold the picture."""
        return (self.input_ids[0] == self.model.config.image_token_id).nonzero()[:, 0]

    def features(self, pixel_values: Tensor) -> Tensor:
        """Patch embeddings as they enter the decoder: [B, 144, D]."""
        return torch.stack(list(self.model.model.get_image_features(pixel_values).pooler_output))

    def logprobs(self, features: Tensor) -> Tensor:
        """Log-probability of every answer token given patch embeddings [B, 144, D]: [B, M]."""
        return self._logprobs(self._decode(features).last_hidden_state)

    def attended(self, features: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same, and the attention weights of every layer [B, H, T, T]."""
        output = self._decode(features, output_attentions=True)
        return self._logprobs(output.last_hidden_state), output.attentions

    def _decode(self, features: Tensor, **options: bool) -> BaseModelOutputWithPast:
        columns = self.model.get_input_embeddings()(self.input_ids).repeat(len(features), 1, 1)
        columns = columns.index_copy(1, self.image_columns, features)
        return self.model.model.language_model(inputs_embeds=columns, use_cache=False, **options)

    def _logprobs(self, hidden: Tensor) -> Tensor:
        scores = self.model.lm_head(hidden[:, -len(self.answer_ids) :]).float().log_softmax(-1)  # [B, M, V]
        return scores.gather(-1, self.answer_ids.expand(len(hidden), -1)[..., None])[..., 0]


def make_case(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, picture: Picture, prompt: str, answer: str
) -> Case:
    """Encode as `atman_explain` does: the answer on its own, put behind the prompt."""
    inputs = processor(text=prompt, images=[Image.fromarray(picture.pixels)], return_tensors="pt").to(model.device)
    answer_ids = torch.tensor(processor.tokenizer.encode(answer, add_special_tokens=False), device=model.device)
    return Case(
        model=model,
        pixel_values=inputs["pixel_values"].to(model.dtype),
        input_ids=torch.cat([inputs["input_ids"], answer_ids[None, :-1]], 1),
        answer_ids=answer_ids,
    )


def input_x_gradient(case: Case, tokens: range, *, on_pixels: bool) -> Tensor:
    """Input times gradient, summed over a patch's embedding or pixels."""
    point = _point(case, on_pixels).requires_grad_()
    gradients = _gradients(case, point, tokens, on_pixels)
    return torch.stack([_pooled(point.detach() * gradient, on_pixels)[0] for gradient in gradients])


def integrated_gradients(case: Case, tokens: range, *, on_pixels: bool) -> Tensor:
    """Integrated gradients from the zero embedding, or from mid-gray, in 50 steps (midpoint rule)."""
    point = _point(case, on_pixels)
    shares = (torch.arange(IG_STEPS, device=point.device) + 0.5) / IG_STEPS
    path = (shares.view(-1, *[1] * (point.ndim - 1)) * point).requires_grad_()
    gradients = _gradients(case, path, tokens, on_pixels)
    return torch.stack([_pooled(point * gradient.mean(0, keepdim=True), on_pixels)[0] for gradient in gradients])


def grad_cam(case: Case, tokens: range) -> Tensor:
    """Grad-CAM on the patch embeddings: channels weighted by their mean gradient, negative sums cut off."""
    point = _point(case, on_pixels=False).requires_grad_()
    gradients = _gradients(case, point, tokens, on_pixels=False)
    return torch.stack([(point.detach() * one.mean(1, keepdim=True)).sum(-1)[0].clamp(min=0) for one in gradients])


def attention_relevance(case: Case, tokens: range) -> Tensor:
    """Gradient-weighted attention, multiplied through the decoder's layers (Chefer et al. 2021)."""
    with _eager_attention(case.model):
        logprobs, attentions = case.attended(_point(case, on_pixels=False).requires_grad_())
        rows = []
        for token in tokens:
            gradients = torch.autograd.grad(logprobs[0, token], attentions, retain_graph=True)
            relevance = torch.eye(attentions[0].shape[-1], device=logprobs.device)
            for weights, gradient in zip(attentions, gradients, strict=True):
                relevance = relevance + (weights * gradient)[0].clamp(min=0).mean(0).detach() @ relevance
            rows.append(relevance[token - len(case.answer_ids), case.image_columns])
    return torch.stack(rows)


def random_map(case: Case, tokens: range, *, seed: int) -> Tensor:
    """Uniform noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(tokens), len(case.image_columns), generator=generator)


def _point(case: Case, on_pixels: bool) -> Tensor:
    return case.pixel_values.clone() if on_pixels else case.features(case.pixel_values).detach()


def _gradients(case: Case, point: Tensor, tokens: range, on_pixels: bool) -> Iterator[Tensor]:
    read: Callable[[Tensor], Tensor] = case.features if on_pixels else lambda features: features
    logprobs = case.logprobs(read(point))
    for token in tokens:
        yield torch.autograd.grad(logprobs[:, token].sum(), point, retain_graph=True)[0]


def _pooled(values: Tensor, on_pixels: bool) -> Tensor:
    """Sum over each patch: [B, 144]."""
    if not on_pixels:
        return values.sum(-1)
    return values.sum(1).unflatten(1, (GRID, PATCH_SIZE)).unflatten(3, (GRID, PATCH_SIZE)).sum((2, 4)).flatten(1)


@contextmanager
def _eager_attention(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """The only implementation that returns its weights."""
    previous = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": previous})
