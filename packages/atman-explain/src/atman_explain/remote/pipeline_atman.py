"""`pipeline("explain")`: explanations behind transformers' pipeline call."""

import os
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Pipeline

from .explain_atman import AtMan
from .explanation_atman import Explanation


class ExplainPipeline(Pipeline):
    """Score how much every part of a prompt supports a continuation; made by `pipeline("explain", model=...)`.

    Example:
        >>> pipe = pipeline("explain", model=model, tokenizer=tokenizer)
        >>> pipe("Oslo is the capital of", target=" Norway", granularity="word")
    """

    _load_processor = None
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = None

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Explain one prompt, or several.

        Args:
            inputs: a prompt, or a list of prompts; also a dict with "prompt" and any of "target", "images", "spans" and
                "chunks", or a generator or data set of such dicts.
            **settings: `target` and the other arguments and settings of `AtMan.explain`.

        Returns:
            An `Explanation`, a list of them, or an iterator over them for generators and data sets.
        """
        if isinstance(inputs, str) or (isinstance(inputs, list) and not any(isinstance(i, dict) for i in inputs)):
            return self._atman().explain(inputs, **settings)
        own = {"batch_size": settings.pop("batch_size")} if "batch_size" in settings else {}
        return super().__call__(inputs, settings=settings | own)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save model, tokenizer or processor, and the code that `pipeline(model=..., trust_remote_code=True)` runs."""
        super().save_pretrained(save_directory, **kwargs)
        if self.processor is not None:  # transformers leaves it out
            self.processor.save_pretrained(save_directory, **kwargs)

    def _atman(self) -> AtMan:
        return AtMan(self.model, self.processor if self.processor is not None else self.tokenizer)

    def _sanitize_parameters(
        self, settings: dict[str, Any] | None = None, **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {"settings": (settings or {}) | more}, {}

    def preprocess(self, input_: dict[str, Any]) -> dict[str, Any]:
        """Check one entry of a data set."""
        if not isinstance(input_, dict) or "prompt" not in input_:
            raise ValueError(f'inputs must be prompts, or dicts with a "prompt", got {type(input_).__name__}.')
        return dict(input_)

    def _forward(self, input_tensors: dict[str, Any], settings: dict[str, Any]) -> Explanation:
        own = {name: value for name, value in input_tensors.items() if name != "prompt"}
        return self._atman().explain(input_tensors["prompt"], **settings | own)

    def postprocess(self, model_outputs: Explanation) -> Explanation:
        """Return the explanation."""
        return model_outputs


TASK = {"impl": ExplainPipeline, "pt": (AutoModelForCausalLM, AutoModelForImageTextToText), "type": "text"}
"""How transformers' registry describes the task."""

ExplainPipeline._registered_impl = {"explain": TASK}  # so that one loaded from the Hub can be saved with its code
