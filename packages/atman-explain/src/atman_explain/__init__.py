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
    from .remote.adapters_atman import register_adapter as register_adapter
    from .remote.classifier_atman import explain_classifier as explain_classifier
    from .remote.configuration_atman import AtManConfig as AtManConfig
    from .remote.errors_atman import ExplanationInterrupted as ExplanationInterrupted
    from .remote.errors_atman import UnsupportedModelError as UnsupportedModelError
    from .remote.explain_atman import AtMan as AtMan
    from .remote.explain_atman import explain as explain
    from .remote.explanation_atman import Explanation as Explanation
    from .remote.explanation_atman import Target as Target
    from .remote.factors_atman import conceptual_factors as conceptual_factors
    from .remote.factors_atman import cosine_similarities as cosine_similarities
    from .remote.metrics_atman import area_under_curve as area_under_curve
    from .remote.metrics_atman import average_precision as average_precision
    from .remote.metrics_atman import deletion_curve as deletion_curve
    from .remote.metrics_atman import insertion_curve as insertion_curve
    from .remote.metrics_atman import interquartile_mean as interquartile_mean
    from .remote.metrics_atman import soft_precision as soft_precision
    from .remote.metrics_atman import soft_recall as soft_recall
    from .remote.ops_atman_atman_attention import suppress_scores as suppress_scores
    from .remote.pipeline_atman import ExplainPipeline as ExplainPipeline
    from .remote.plotting_atman import plot_curves as plot_curves
    from .remote.plotting_atman import plot_overlay as plot_overlay
    from .remote.plotting_atman import plot_top as plot_top
    from .remote.prompts_atman import EncodedPrompt as EncodedPrompt
    from .remote.prompts_atman import encode_prompts as encode_prompts
    from .remote.steering_atman import steer as steer
    from .remote.units_atman import Unit as Unit
    from .remote.units_atman import split_units as split_units

_NAMES = {
    "registration": ("register",),
    "remote.adapters_atman": ("register_adapter",),
    "remote.classifier_atman": ("explain_classifier",),
    "remote.configuration_atman": ("AtManConfig",),
    "remote.errors_atman": (
        "ExplanationInterrupted",
        "UnsupportedModelError",
    ),
    "remote.explain_atman": (
        "AtMan",
        "explain",
    ),
    "remote.explanation_atman": (
        "Explanation",
        "Target",
    ),
    "remote.factors_atman": (
        "conceptual_factors",
        "cosine_similarities",
    ),
    "remote.metrics_atman": (
        "area_under_curve",
        "average_precision",
        "deletion_curve",
        "insertion_curve",
        "interquartile_mean",
        "soft_precision",
        "soft_recall",
    ),
    "remote.ops_atman_atman_attention": ("suppress_scores",),
    "remote.pipeline_atman": ("ExplainPipeline",),
    "remote.plotting_atman": (
        "plot_curves",
        "plot_overlay",
        "plot_top",
    ),
    "remote.prompts_atman": (
        "EncodedPrompt",
        "encode_prompts",
    ),
    "remote.steering_atman": ("steer",),
    "remote.units_atman": (
        "Unit",
        "split_units",
    ),
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
