"""SCAR for PEFT: sparse coders that detect and steer concepts in a language model.

Importing this package is cheap: every name below is loaded on first use. peft knows the method "SCAR" as soon as it is
loaded after, or was loaded before, this import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import auto_registration
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .card import model_card as model_card
    from .card import write_card as write_card
    from .coder import CoderWeights as CoderWeights
    from .coder import FoldedConcepts as FoldedConcepts
    from .coder import Standardized as Standardized
    from .coder import activate as activate
    from .coder import concept_pre_activations as concept_pre_activations
    from .coder import decode as decode
    from .coder import encode as encode
    from .coder import fold_concepts as fold_concepts
    from .coder import kept_latents as kept_latents
    from .coder import latents_of as latents_of
    from .coder import pre_activations as pre_activations
    from .coder import reconstruct as reconstruct
    from .coder import standardize as standardize
    from .config import ScarConfig as ScarConfig
    from .convert import from_scar_checkpoint as from_scar_checkpoint
    from .evaluation import ConceptEvaluation as ConceptEvaluation
    from .evaluation import LayerEvaluation as LayerEvaluation
    from .evaluation import ScarEvaluation as ScarEvaluation
    from .evaluation import SteeringCurve as SteeringCurve
    from .evaluation import SteeringPoint as SteeringPoint
    from .evaluation import calibrate as calibrate
    from .evaluation import evaluate as evaluate
    from .evaluation import plot_curve as plot_curve
    from .evaluation import steering_curve as steering_curve
    from .export import export_remote_code as export_remote_code
    from .hub import push_to_hub as push_to_hub
    from .layer import ScarLayer as ScarLayer
    from .layer import scar_layers as scar_layers
    from .lm_eval import export_lm_eval as export_lm_eval
    from .lm_eval import token_norms as token_norms
    from .losses import ScarLoss as ScarLoss
    from .losses import concept_loss as concept_loss
    from .losses import reconstruction_loss as reconstruction_loss
    from .losses import scar_loss as scar_loss
    from .metrics import auroc as auroc
    from .metrics import balanced_accuracy as balanced_accuracy
    from .metrics import best_balanced_threshold as best_balanced_threshold
    from .metrics import best_f1_threshold as best_f1_threshold
    from .metrics import ce_recovered as ce_recovered
    from .metrics import dead_share as dead_share
    from .metrics import explained_variance as explained_variance
    from .metrics import f1_score as f1_score
    from .metrics import graded_correlation as graded_correlation
    from .metrics import l0 as l0
    from .metrics import nmse as nmse
    from .metrics import pool as pool
    from .model import ScarModel as ScarModel
    from .monosemanticity import Monosemanticity as Monosemanticity
    from .monosemanticity import Stumps as Stumps
    from .monosemanticity import TreeLevel as TreeLevel
    from .monosemanticity import best_stumps as best_stumps
    from .monosemanticity import fms as fms
    from .monosemanticity import fms_from_accuracies as fms_from_accuracies
    from .monosemanticity import smallest_tree as smallest_tree
    from .monosemanticity import tree_levels as tree_levels
    from .registration import register as register
    from .remote.recording_scar import ConceptScores as ConceptScores
    from .remote.recording_scar import record_scores as record_scores
    from .remote.steering_scar import set_steering as set_steering
    from .remote.steering_scar import steering as steering
    from .rules import concept_coefficients as concept_coefficients
    from .rules import open_gates as open_gates
    from .rules import steer_reconstruct as steer_reconstruct
    from .rules import steer_residual as steer_residual
    from .training import ActivationStore as ActivationStore
    from .training import ScarTrainer as ScarTrainer
    from .training import ScarTrainingArguments as ScarTrainingArguments
    from .training import TrainingResult as TrainingResult
    from .training import harvest as harvest
    from .weights import compact as compact
    from .weights import swap_weights as swap_weights

_NAMES = {
    "card": (
        "model_card",
        "write_card",
    ),
    "coder": (
        "CoderWeights",
        "FoldedConcepts",
        "Standardized",
        "activate",
        "concept_pre_activations",
        "decode",
        "encode",
        "fold_concepts",
        "kept_latents",
        "latents_of",
        "pre_activations",
        "reconstruct",
        "standardize",
    ),
    "config": ("ScarConfig",),
    "convert": ("from_scar_checkpoint",),
    "evaluation": (
        "ConceptEvaluation",
        "LayerEvaluation",
        "ScarEvaluation",
        "SteeringCurve",
        "SteeringPoint",
        "calibrate",
        "evaluate",
        "plot_curve",
        "steering_curve",
    ),
    "export": ("export_remote_code",),
    "hub": ("push_to_hub",),
    "layer": (
        "ScarLayer",
        "scar_layers",
    ),
    "lm_eval": (
        "export_lm_eval",
        "token_norms",
    ),
    "losses": (
        "ScarLoss",
        "concept_loss",
        "reconstruction_loss",
        "scar_loss",
    ),
    "metrics": (
        "auroc",
        "balanced_accuracy",
        "best_balanced_threshold",
        "best_f1_threshold",
        "ce_recovered",
        "dead_share",
        "explained_variance",
        "f1_score",
        "graded_correlation",
        "l0",
        "nmse",
        "pool",
    ),
    "model": ("ScarModel",),
    "monosemanticity": (
        "Monosemanticity",
        "Stumps",
        "TreeLevel",
        "best_stumps",
        "fms",
        "fms_from_accuracies",
        "smallest_tree",
        "tree_levels",
    ),
    "registration": ("register",),
    "remote.recording_scar": (
        "ConceptScores",
        "record_scores",
    ),
    "remote.steering_scar": (
        "set_steering",
        "steering",
    ),
    "rules": (
        "concept_coefficients",
        "open_gates",
        "steer_reconstruct",
        "steer_residual",
    ),
    "training": (
        "ActivationStore",
        "ScarTrainer",
        "ScarTrainingArguments",
        "TrainingResult",
        "harvest",
    ),
    "weights": (
        "compact",
        "swap_weights",
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
