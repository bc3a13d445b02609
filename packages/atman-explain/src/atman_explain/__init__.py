"""AtMan for Hugging Face transformers: what an output rests on, found by suppressing attention; forward passes only.

Importing this package is cheap: every name below is loaded on first use. transformers knows the attention function
"atman" and the pipeline task "explain" as soon as it is loaded after, or was loaded before, this import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import auto_registration
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .registration import register as register
    from .remote.classifier_atman import explain_classifier as explain_classifier
    from .remote.configuration_atman import AtManConfig as AtManConfig
    from .remote.errors_atman import ExplanationInterrupted as ExplanationInterrupted
    from .remote.errors_atman import UnsupportedModelError as UnsupportedModelError
    from .remote.explain_atman import AtMan as AtMan
    from .remote.explain_atman import explain as explain
    from .remote.explanation_atman import Explanation as Explanation
    from .remote.factors_atman import conceptual_factors as conceptual_factors
    from .remote.factors_atman import cosine_similarities as cosine_similarities
    from .remote.ops_atman_atman_attention import suppress_scores as suppress_scores
    from .remote.steering_atman import steer as steer

_NAMES = {
    "registration": ("register",),
    "remote.classifier_atman": ("explain_classifier",),
    "remote.configuration_atman": ("AtManConfig",),
    "remote.errors_atman": ("ExplanationInterrupted", "UnsupportedModelError"),
    "remote.explain_atman": ("AtMan", "explain"),
    "remote.explanation_atman": ("Explanation",),
    "remote.factors_atman": ("conceptual_factors", "cosine_similarities"),
    "remote.ops_atman_atman_attention": ("suppress_scores",),
    "remote.pipeline_atman": ("ExplainPipeline",),
    "remote.steering_atman": ("steer",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605 (computed, so that a name has one home)


def __getattr__(name: str) -> Any:
    """Load the module that defines `name`, and keep the value for the next access."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


auto_registration.install()
