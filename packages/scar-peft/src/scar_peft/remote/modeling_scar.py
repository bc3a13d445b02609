"""Language models that carry the concepts of an adapter: transformers' own classes, detecting and steering.

`AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)` finds here, under the name of the plain
class, a subclass of it. The weights have the plain class's names, and the concepts' rows come on top, so the same
repository is an ordinary model for whoever does not trust its code.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache, partial, wraps
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .generation_scar import steered_forward, steered_generate
from .hook_scar import SteeringHook
from .recording_scar import Kind, Recorder, record_scores
from .rows_scar import FoldedConcepts
from .section_scar import ScarSection
from .settings_scar import ConceptSettings
from .sites_scar import hidden_size, owner_of, target_names
from .steering_scar import set_steering, start_steering, steering
from .strengths_scar import Strength

ROWS = "concepts"
"""Name of the concepts' rows below the module that they steer."""

_ADAPTER = "default"


class ConceptLayer(SteeringHook, nn.Module):
    """The rows of all concepts at one module, in float32, and the hook that uses them."""

    def __init__(self, layer_index: int, settings: ConceptSettings, width: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self._settings = settings
        C = len(settings.concepts)
        for name, shape in zip(FoldedConcepts._fields, ((C, width), (C,), (C,), (C, width)), strict=True):
            rows = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
            self.register_parameter(name, rows)

    def concept_rows(self, adapter: str) -> FoldedConcepts:
        """The rows; in float32 even if the whole model was cast to less."""
        dtype = self.place(adapter)[1]
        return FoldedConcepts(*(self.get_parameter(name).to(dtype) for name in FoldedConcepts._fields))

    def concept_settings(self, adapter: str) -> ConceptSettings:
        """How concepts are read and steered here."""
        return self._settings

    def place(self, adapter: str) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of strengths."""
        rows = self.get_parameter("encoder")
        return rows.device, torch.promote_types(rows.dtype, torch.float32)

    def adapters_here(self) -> list[str]:
        """One, for all concepts."""
        return [_ADAPTER]

    def adapters_in_use(self) -> list[str]:
        """That one."""
        return [_ADAPTER]


class _Steered:
    """What a language model gains: `generate(steering=...)`, and the package's functions as methods."""

    _auto_class = "AutoModelForCausalLM"  # so that saving writes this code, too

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if (values := getattr(config, "scar", None)) is None:
            return
        section, width = ScarSection.from_dict(values), hidden_size(self)  # type: ignore[arg-type]
        for index, name in target_names(self, section.layers, section.site).items():  # type: ignore[arg-type]
            target = self.get_submodule(name)  # type: ignore[attr-defined]
            layer = ConceptLayer(index, section.settings_at(index), width)
            layer.attach(target, owner_of(self, name))  # type: ignore[arg-type]
            target.add_module(ROWS, layer)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load the model; strengths in its configuration hold from the start."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        defaults = (getattr(model.config, "scar", None) or {}).get("default_steering")
        if defaults:
            for layer in [module for module in model.modules() if isinstance(module, ConceptLayer)]:
                start_steering(layer, _ADAPTER, _with_layers(defaults))
        return loaded

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; `steering={"toxicity": -1.0}`, `rule`, `positions`, `return_concept_scores` hold for this call.

        Example:
            >>> model.generate(**batch, steering={"toxicity": torch.tensor([-1.0, 0.0, 2.0])})
        """
        return steered_generate(self, super().generate, args, kwargs)  # type: ignore[misc, arg-type]

    def set_steering(
        self, concept: str | Mapping[str, Strength] | None = None, strength: Strength = None, **options: Any
    ) -> None:
        """Steer from now on: `model.set_steering("toxicity", -1.0)`. None makes every concept neutral again."""
        set_steering(self, concept, strength, **options)  # type: ignore[arg-type]

    def steering(self, strengths: Mapping[str, Strength] | None = None, **options: Any) -> AbstractContextManager[None]:
        """Steer inside a block: `with model.steering(toxicity=-1.0, rule="add"): ...`."""
        return steering(self, strengths, **options)  # type: ignore[arg-type]

    def record_scores(self, kind: Kind = "latent") -> AbstractContextManager[Recorder]:
        """Keep every token's scores inside a block: `with model.record_scores() as record: model(**batch)`."""
        return record_scores(self, kind)  # type: ignore[arg-type]


def _with_layers(steering: Mapping[str, Any]) -> dict[str, Strength]:
    """Strengths by layer with the integers that JSON has made strings of."""
    return {
        concept: {int(layer): amount for layer, amount in strength.items()}
        if isinstance(strength, Mapping)
        else strength
        for concept, strength in steering.items()
    }


@cache
def steered_class(name: str) -> type:
    """The steered subclass of transformers' class `name`, and of the same name."""
    plain = getattr(transformers, name)

    @wraps(plain.forward)  # transformers reads the names of the arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return steered_forward(self, partial(plain.forward, self), args, kwargs)

    body = {
        "forward": forward,
        "_keep_in_fp32_modules_strict": {ROWS, *(plain._keep_in_fp32_modules_strict or ())},
        "__module__": __name__,
        "__doc__": f"`{name}` that detects and steers concepts.",
    }
    return type(name, (_Steered, plain, GenerationMixin), body)


def __getattr__(name: str) -> type:
    """Steered classes by the names of transformers' language models, made on demand."""
    if name not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return steered_class(name)
