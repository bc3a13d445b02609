"""Evaluation of SCAR adapters: detection, reconstruction, calibration, and what steering does to texts."""

from .calibration import calibrate
from .curves import SteeringCurve, SteeringPoint, steering_curve
from .detection import ConceptEvaluation
from .evaluator import LayerEvaluation, ScarEvaluation, evaluate
from .plotting import plot_curve

__all__ = [
    "ConceptEvaluation",
    "LayerEvaluation",
    "ScarEvaluation",
    "SteeringCurve",
    "SteeringPoint",
    "calibrate",
    "evaluate",
    "plot_curve",
    "steering_curve",
]
