"""AtMan as an attribution method of inseq: importing this module makes `inseq.load_model(model, "atman")` work."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from inseq.attr.feat.attribution_utils import check_attribute_positions
from inseq.attr.feat.perturbation_attribution import PerturbationAttributionRegistry
from inseq.data import CoarseFeatureAttributionStepOutput

from ..remote.configuration_atman import AtManConfig
from ..remote.explain_atman import AtMan

_SETTINGS = frozenset(field.name for field in fields(AtManConfig))


class AtManAttribution(PerturbationAttributionRegistry):
    """Scores tokens by the log-probability, in nats, that the next one loses when attention to them is suppressed.

    All tokens of a continuation are explained at once, with packed passes, before inseq asks for them one by one. As
    always with inseq, decoder-only models have scores for the continuation's own earlier tokens, too, and special
    tokens of the prompt have 0 unless `include_special=True`. Of encoder-decoders, source tokens have scores.

    Args:
        attribution_model: inseq's model.
        **settings: of `AtManConfig`, as further arguments of `inseq.load_model` or of its model's `attribute`, where
            they hold for one call. `batch_size` means inseq's there; pass
            `attribution_args={"batch_size": 8}` for AtMan's. Units larger than a token give each of their tokens the
            unit's score.

    Raises:
        ValueError: a setting is out of range or unknown.
        UnsupportedModelError: the model's attention cannot be reached.

    Example:
        >>> model = inseq.load_model(model, "atman", tokenizer=tokenizer, kappa=0.8)
        >>> model.attribute("Oslo is the capital of", "Oslo is the capital of Norway").show()
    """

    method_name = "atman"

    def __init__(self, attribution_model: Any, **settings: Any) -> None:
        super().__init__(attribution_model)
        self._atman = AtMan(attribution_model.model, attribution_model.tokenizer, **settings)

    def get_attribution_args(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tell settings of `AtManConfig` from arguments that are not for this method."""
        mine = {name: value for name, value in kwargs.items() if name in _SETTINGS}
        return mine, {name: value for name, value in kwargs.items() if name not in _SETTINGS}

    def prepare_and_attribute(
        self, sources: Any, targets: Any, *, batch_size: int | None = None, **options: Any
    ) -> Any:
        """Attribute one sequence at a time: units fill the passes, and no sequence starts at another one's position.

        `batch_size` has no influence here; inseq generates in batches of that size.
        """
        return super().prepare_and_attribute(sources, targets, batch_size=1, **options)

    def attribute(
        self,
        batch: Any,
        attributed_fn: Callable[..., Any],
        attr_pos_start: int | None = None,
        attr_pos_end: int | None = None,
        *,
        attribute_target: bool = False,
        show_progress: bool = True,
        attribution_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Explain a sequence; called by inseq.

        Raises:
            ValueError: AtMan has no such output to explain, or no such tokens to score.
        """
        if attributed_fn is not self.attribution_model.get_attributed_fn("probability"):
            raise ValueError(
                f"attributed_fn must be left out for AtMan, whose scores are losses of log-probability, got "
                f'{getattr(attributed_fn, "__name__", attributed_fn)}; pass delta="logit" for losses of logits.'
            )
        if attribute_target:
            raise ValueError(
                "attribute_target must be False for AtMan with an encoder-decoder, got True: suppression acts on the "
                "source."
            )
        start, end = check_attribute_positions(batch.max_generation_length, attr_pos_start, attr_pos_end)
        settings = {} if show_progress else {"show_progress": False}
        steps = self._explain(batch, start, end, settings | (attribution_args or {}))
        return super().attribute(
            batch, attributed_fn, start, end, show_progress=show_progress, attribution_args={"steps": steps}, **options
        )

    def attribute_step(
        self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
    ) -> CoarseFeatureAttributionStepOutput:
        """Answer for the token after a prefix with what `attribute` found out."""
        assert attribution_args is not None
        if self.attribution_model.is_encoder_decoder:
            prefix = attribute_fn_main_args["additional_forward_args"][0]  # [1, t, D]
            return CoarseFeatureAttributionStepOutput(source_attributions=attribution_args["steps"][prefix.shape[1]])
        (prefix,) = attribute_fn_main_args["inputs"]  # [1, t, D]
        return CoarseFeatureAttributionStepOutput(target_attributions=attribution_args["steps"][prefix.shape[1]])

    def _explain(self, batch: Any, start: int, end: int, settings: dict[str, Any]) -> dict[int, Any]:
        """Scores [1, columns] of the columns that inseq shows, for every position of the continuation."""
        (ids,) = batch.target_ids.tolist()
        if self.attribution_model.is_encoder_decoder:
            (source_ids,) = batch.source_ids.tolist()
            found = self._atman.explain(source_ids, target=ids[1 : end + 1], **settings)  # after the start token
            scores = found.to_inseq().target_attributions[: len(source_ids)]
            return {1 + t: column[None] for t, column in enumerate(scores.T)}
        found = self._atman.explain(ids[:start], target=ids[start:end], **{"attribute_target": True} | settings)
        scores = found.to_inseq().target_attributions  # [end, end - start]
        return {start + t: column[None, : start + t] for t, column in enumerate(scores.T)}
