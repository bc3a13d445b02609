"""`explain_classifier`: which patches of an image, or which words of a text, a class rests on."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .batches_atman import tiled
from .classifying_atman import ClassifierPasses, SigmoidReadout, Task, find_class, head_facts, head_runner
from .configuration_atman import AtManConfig, with_settings
from .errors_atman import UnsupportedModelError
from .explanation_atman import Explanation
from .hook_atman import active
from .image_tasks_atman import (
    compares_texts,
    image_task,
    is_sigmoid,
    reads_images,
    text_image_task,
)
from .observing_atman import Observer, further_inputs
from .passages_atman import Passage, Readout, RunSettings
from .prompts_atman import encode_prompts
from .routes_atman import Router
from .scoring_atman import Work, progress, score, split_prompt
from .switching_atman import atman_implementation, base_model, evaluation_mode


def explain_classifier(
    model: nn.Module,
    processor: Any,
    inputs: Any,
    label: int | str | None = None,
    *,
    candidates: Sequence[str] | None = None,
    config: AtManConfig | None = None,
    **settings: Any,
) -> Explanation:
    """Score how much every patch of an image, or every word of a text, supports a class.

    A unit's relevance is the loss of the class's log-probability, in nats, when attention to the unit is suppressed.
    Where classes are no alternatives to each other (regression, several labels, a single text held against an image)
    it is the loss of the class's logit.

    Args:
        model: a vision transformer with a classification head; CLIP, SigLIP or another model that compares images and
            texts; or a text classifier with attention in both directions or in one.
        processor: its image processor, processor or tokenizer. None: `inputs` holds tensors or token ids.
        inputs: one image or one text in any form that the processor takes, or what the processor returned.
        label: index or name of the class; for models that compare images and texts a text. None: the predicted one.
        candidates: texts that are alternatives to each other, for models that compare images and texts.
        config: settings; see `AtManConfig`.
        **settings: single settings, over those of `config`; `spans` and `chunks` as for `AtMan.explain`.

    Returns:
        An `Explanation` with one target, the class. For images `image_map(0)` and `overlay(image)` show it; similarity
        for `kappa` is that of hidden states in the last layer.

    Raises:
        ValueError: bad input, or an unknown label; the message names the argument.
        UnsupportedModelError: no classifier, or its attention cannot be reached or has no key per patch.

    Example:
        >>> explain_classifier(model, image_processor, image, "tabby, tabby cat").overlay(image)
    """
    own: dict[str, Any] = {name: settings.pop(name) for name in ("spans", "chunks") if name in settings}
    base = base_model(model)
    chosen_settings = _checked(with_settings(config, settings), reads_images(base) or compares_texts(base))
    if candidates is not None and not compares_texts(base):
        raise ValueError(
            f"candidates must be None for {type(base).__name__}, whose classes are fixed; choose one with label."
        )
    with atman_implementation(base), evaluation_mode(base):
        task = _task(base, processor, inputs, label, candidates)
        chosen_settings = _with_delta(base, task, chosen_settings, settings.get("delta"))
        return _explain(base, processor, task, find_class(label, task), chosen_settings, own)


def _task(model: PreTrainedModel, processor: Any, inputs: Any, label: Any, candidates: Sequence[str] | None) -> Task:
    if compares_texts(model):
        return text_image_task(model, processor, inputs, label, candidates)
    if reads_images(model):
        return image_task(model, processor, inputs)
    return _text_task(model, processor, inputs)


def _text_task(model: PreTrainedModel, processor: Any, inputs: Any) -> Task:
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads the text twice, in its encoder and in its decoder; text classifiers must be "
            "of one part."
        )
    (prompt, *others), _ = encode_prompts(processor, inputs)
    if others:
        raise ValueError(f"inputs must be one text, got {1 + len(others)}; explain texts one by one.")
    P = len(prompt.input_ids)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit < P:
        raise ValueError(f"inputs needs {P} positions, but the model has {limit}; shorten it.")
    ids = torch.tensor([prompt.input_ids], device=model.device)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **further_inputs(prompt.model_inputs, model)}
    further = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    run = head_runner(model, lambda n: model(**tiled(row, n), **further))
    observer = Observer()
    with active(observer):
        logits = run(1)[0]
    modules = tuple(m for m, (_, keys) in zip(observer.called, observer.lengths, strict=True) if keys == P)
    if not modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} ran without attention that has one key per token, so nothing can be suppressed; a "
            "model without attention, or with its own, cannot be explained this way."
        )
    return Task(
        prompt=prompt,
        run=run,
        modules=modules,
        embeds=model.get_input_embeddings()(ids)[0],
        changeable=torch.ones(P, dtype=torch.bool),
        # without a padding token, causal models do not know the last token of several rows
        most_rows=None if model.config.get_text_config().pad_token_id is not None else 1,
        **head_facts(model, logits),
    )


def _explain(
    model: PreTrainedModel, processor: Any, task: Task, index: int, config: AtManConfig, own: dict[str, Any]
) -> Explanation:
    readout = (SigmoidReadout if is_sigmoid(model) else Readout)(config.delta, config.temperature)
    settings = RunSettings(
        mode=config.mode,
        heads=config.heads,
        readout=readout,
        tokens=Router(model).token_budget(config),
        most=task.most_rows or config.batch_size,
    )
    passes = ClassifierPasses(task, index, _layers(task.modules, config), settings)
    passage = Passage(prompt_ids=task.prompt.input_ids, target_ids=(index,))
    units = split_prompt(task.prompt, config, processor, **own)
    work = Work(task.prompt, passage, units, (task.names[index],))
    with progress([work], config) as bar:
        score([work], passes, config, processor, bar)
    return work.explanation(config)


def _layers(modules: Sequence[nn.Module], config: AtManConfig) -> list[nn.Module]:
    for layer in config.layers or ():
        if not -len(modules) <= layer < len(modules):
            raise ValueError(f"layers must lie in [0, {len(modules)}), got {layer}.")
    return [modules[layer] for layer in (range(len(modules)) if config.layers is None else config.layers)]


def _checked(config: AtManConfig, has_images: bool) -> AtManConfig:
    """Refuse settings that mean nothing for a classifier; units of images are patches only."""
    allowed = ("vision",) if has_images else ("encoder", "decoder")
    for site in config.sites or ():
        if site not in allowed:
            kind = "images" if has_images else "text"
            raise ValueError(f"sites must be among {allowed} for a classifier of {kind}, got {site!r}.")
    if config.attribute_target:
        raise ValueError("attribute_target must be False for a classifier, got True: a class is no token.")
    if not has_images:
        return config
    for name, is_text in (
        ("units", config.units == "text"),
        ("exclude", bool(config.exclude)),
        ("delimiter", config.delimiter is not None),
    ):
        if is_text:
            raise ValueError(f"{name}={getattr(config, name)!r} is about text, but all units of an image are patches.")
    return replace(config, sites=("vision",))


def _with_delta(model: PreTrainedModel, task: Task, config: AtManConfig, asked: str | None) -> AtManConfig:
    """Take logits where log-probabilities would say nothing, or something else than the model was trained for."""
    if task.has_alternatives:
        return config
    if asked == "logprob":
        raise ValueError(
            f"delta must be \"logit\" for {type(model).__name__} with {len(task.names)} output(s), got 'logprob': they "
            "are no alternatives to each other."
        )
    return replace(config, delta="logit")
