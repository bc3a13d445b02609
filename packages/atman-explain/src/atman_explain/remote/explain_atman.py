"""`AtMan` and `explain`: from a prompt and a target to the relevance of every unit of the prompt."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .configuration_atman import AtManConfig, with_settings
from .explanation_atman import Explanation
from .hook_atman import active_interventions
from .passages_atman import Passage, Readout, pack
from .prompts_atman import encode_prompts, encode_targets, token_texts
from .routes_atman import Router
from .scoring_atman import Work, progress, score, split_prompt
from .switching_atman import atman_implementation, base_model, evaluation_mode
from .units_atman import target_units


class AtMan:
    """Explains one model, as often as you like.

    A unit's relevance is the loss of the target's log-probability, in nats, when attention to the unit is suppressed:
    positive supports the target, negative speaks against it. Forward passes only; weights and state of the model are
    left as they were.

    Args:
        model: a transformers model with attention; PEFT and `torch.compile` wrappers are looked through.
        processor: its tokenizer, or its processor if it takes images. None: prompts and targets are lists of ids.
        config: settings; see `AtManConfig`.
        **settings: single settings, over those of `config`.

    Raises:
        ValueError: a setting is out of range or unknown.
        UnsupportedModelError: the model's attention cannot be reached.

    Example:
        >>> atman = AtMan(model, tokenizer, granularity="word")
        >>> atman.explain("Oslo is the capital of", target=" Norway").top(1)

    Source: Deiseroth et al. 2023, "AtMan: Understanding Transformer Predictions Through Memory Efficient Attention
    Manipulation", section 3.
    """

    def __init__(
        self, model: nn.Module, processor: Any = None, config: AtManConfig | None = None, **settings: Any
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = with_settings(config, settings)
        self._router = Router(base_model(model))

    def explain(
        self,
        prompt: Any,
        *,
        target: Any = None,
        images: Any = None,
        spans: Sequence[tuple[int, int]] | None = None,
        chunks: Sequence[Sequence[int]] | None = None,
        **settings: Any,
    ) -> Any:
        """Score how much every unit of a prompt supports a target.

        Args:
            prompt: a text, a list of token ids, or what the processor returned; a list of these, a 2-D tensor or a
                padded encoding for several prompts.
            target: text or ids that continue the prompt, or answer it for an encoder-decoder; for several prompts a
                list. None: what the model generates greedily, at most `max_new_tokens`.
            images: the prompt's image or images; for several prompts a list of those.
            spans: units as character ranges (start, end) of the prompt.
            chunks: units as lists of token positions of the prompt.
            **settings: single settings for this call.

        Returns:
            An `Explanation`; for several prompts a list of them.

        Raises:
            ValueError: bad input; the message names the argument.
            UnsupportedModelError: this model, or this way of explaining it, is not supported.
            ExplanationInterrupted: interrupted from the keyboard; `partial` holds what was computed.
        """
        config = self._router.with_site(with_settings(self.config, settings))
        model = self._router.model
        self._router.check_settings(config)
        prompts, is_single = encode_prompts(self.processor, prompt, images=images)
        if any(each.answers_for(model.get_decoder()) for each in active_interventions()):
            raise ValueError("explain cannot run inside a steer context of the same model; leave the context first.")
        with atman_implementation(model), evaluation_mode(model):
            prompts = self._router.locate_images(prompts, config)
            if target is None:
                targets = [self._router.generate(each, config.max_new_tokens) for each in prompts]
            else:
                targets = encode_targets(
                    self.processor, target, prompts, is_single, check_seam=not self._router.is_encoder_decoder
                )
            passages = [
                Passage(prompt_ids=each.input_ids, target_ids=ids, model_inputs=each.model_inputs)
                for each, ids in zip(prompts, targets, strict=True)
            ]
            units = [split_prompt(each, config, self.processor, spans=spans, chunks=chunks) for each in prompts]
            texts = [token_texts(self.processor, ids) for ids in targets]
            work = [Work(*each) for each in zip(prompts, passages, units, texts, strict=True)]
            explanations = self._run(work, config)
        return explanations[0] if is_single else explanations

    def _run(self, work: Sequence[Work], config: AtManConfig) -> list[Explanation]:
        for each in work:
            self._router.check_passage(each.passage)
            if config.attribute_target:
                each.units += target_units(
                    each.passage.target_ids, each.target_texts, first_column=len(each.passage.prompt_ids)
                )
        tokens = self._router.token_budget(config)
        readout = Readout(config.delta, config.temperature)
        with progress(work, config) as bar:
            for indices in pack([each.passage.length for each in work], tokens=tokens):
                group = [work[index] for index in indices]
                passes = self._router.open([each.passage for each in group], config, readout, tokens)
                score(group, passes, config, self.processor, bar)
        return [each.explanation(config) for each in work]


def explain(
    model: nn.Module,
    processor: Any,
    prompt: Any,
    *,
    target: Any = None,
    images: Any = None,
    config: AtManConfig | None = None,
    **settings: Any,
) -> Any:
    """Score how much every unit of a prompt supports a target; see `AtMan` and `AtMan.explain` for the arguments.

    Example:
        >>> explain(model, tokenizer, "Oslo is the capital of", target=" Norway").top(3)
    """
    own = {name: settings.pop(name) for name in ("spans", "chunks") if name in settings}
    return AtMan(model, processor, config, **settings).explain(prompt, target=target, images=images, **own)
