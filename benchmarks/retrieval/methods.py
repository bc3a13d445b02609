"""The contenders: each gives every prompt token a score. AtMan in its modes, gradients and occlusion by captum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from atman_explain import AtMan
from benchmarks.retrieval.task import Prompts

Method = Callable[[LlamaForCausalLM, Prompts], Tensor]
"""Model and prompts to scores [B, T]."""


def atman(**settings: Any) -> Method:
    """AtMan with these settings, one pass per token."""

    def score(model: LlamaForCausalLM, prompts: Prompts) -> Tensor:
        explainer = AtMan(model, None, include_special=True, show_progress=False, **settings)
        found = explainer.explain(prompts.ids.tolist(), target=[[answer] for answer in prompts.answers.tolist()])
        return torch.cat([each.scores for each in found])

    return score


def captum_method(name: str, reduce: Callable[[Tensor], Tensor], **settings: Any) -> Method:
    """A method of captum on the input embeddings, against zero embeddings; `reduce` turns [B, T, D] into [B, T]."""

    def score(model: LlamaForCausalLM, prompts: Prompts) -> Tensor:
        import captum.attr

        def log_probability(embeds: Tensor, answers: Tensor) -> Tensor:
            logits = model(inputs_embeds=embeds, logits_to_keep=1).logits[:, -1]
            return logits.log_softmax(-1).gather(1, answers[:, None]).squeeze(1)

        embeds = model.get_input_embeddings()(prompts.ids).detach().requires_grad_()
        method = getattr(captum.attr, name)(log_probability)
        found = method.attribute(embeds, additional_forward_args=(prompts.answers,), **settings)
        return reduce(found.detach())

    return score


def random_scores(_model: LlamaForCausalLM, prompts: Prompts) -> Tensor:
    """Scores that know nothing."""
    return torch.rand(prompts.ids.shape, generator=torch.Generator().manual_seed(0))


def summed(scores: Tensor) -> Tensor:
    """Sum over the hidden size."""
    return scores.sum(-1)


def magnitude(scores: Tensor) -> Tensor:
    """Sum of absolute values over the hidden size."""
    return scores.abs().sum(-1)


def occlusion(model: LlamaForCausalLM, prompts: Prompts) -> Tensor:
    """Occlusion of whole tokens: one embedding set to zero at a time."""
    width = model.config.hidden_size
    return captum_method("Occlusion", summed, sliding_window_shapes=(1, width))(model, prompts)


METHODS: dict[str, Method] = {
    "AtMan shift_min, f = 0.1": atman(),
    "AtMan shift_min, f = 0.1, squared": atman(postprocess="square"),
    "AtMan multiply, f = 0.1": atman(mode="multiply"),
    "AtMan log_additive, f = 0.01": atman(mode="log_additive"),
    "AtMan log_additive, f = 0": atman(mode="log_additive", factor=0.0),
    "AtMan log_additive, f = 0.1": atman(mode="log_additive", factor=0.1),
    "AtMan shift_min_all, f = 0.1": atman(mode="shift_min_all"),
    "AtMan shift_min, f = 0.9": atman(factor=0.9),
    "AtMan multiply, f = 0.9": atman(mode="multiply", factor=0.9),
    "AtMan log_additive, f = 0.9": atman(mode="log_additive", factor=0.9),
    "captum occlusion (zero embedding)": occlusion,
    "captum Integrated Gradients 50, sum": captum_method("IntegratedGradients", summed, n_steps=50),
    "captum Integrated Gradients 50, abs": captum_method("IntegratedGradients", magnitude, n_steps=50),
    "captum Input x Gradient, sum": captum_method("InputXGradient", summed),
    "captum Input x Gradient, abs": captum_method("InputXGradient", magnitude),
    "random": random_scores,
}
