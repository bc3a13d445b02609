"""Training of SCAR adapters: labels, activations of the frozen model, and the loop."""

from .arguments import ScarTrainingArguments
from .harvest import harvest
from .labels import LabelReader
from .store import ActivationStore
from .trainer import ScarTrainer, TrainingResult

__all__ = ["ActivationStore", "LabelReader", "ScarTrainer", "ScarTrainingArguments", "TrainingResult", "harvest"]
