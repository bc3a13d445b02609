"""SCAR for PEFT: sparse coders that detect and steer concepts in a language model.

Importing this package is cheap: every name below is loaded on first use. peft knows the method "SCAR" as soon as it is
loaded after, or was loaded before, this import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import auto_registration
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .config import ScarConfig as ScarConfig
    from .layer import ScarLayer as ScarLayer
    from .layer import scar_layers as scar_layers
    from .model import ScarModel as ScarModel
    from .registration import register as register
    from .remote.recording_scar import ConceptScores as ConceptScores
    from .remote.recording_scar import record_scores as record_scores
    from .remote.steering_scar import set_steering as set_steering
    from .remote.steering_scar import steering as steering
    from .weights import compact as compact
    from .weights import swap_weights as swap_weights

_NAMES = {
    "config": ("ScarConfig",),
    "layer": ("ScarLayer", "scar_layers"),
    "model": ("ScarModel",),
    "registration": ("register",),
    "remote.recording_scar": ("ConceptScores", "record_scores"),
    "remote.steering_scar": ("set_steering", "steering"),
    "weights": ("compact", "swap_weights"),
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
