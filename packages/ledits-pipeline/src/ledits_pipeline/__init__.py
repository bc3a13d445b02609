"""LEDITS++ for Hugging Face diffusers: exact inversion and several masked edits at once, for every diffusion family.

Importing this package is cheap: every name below is loaded on first use. diffusers knows `LEditsPipeline` by name as
soon as it is loaded after, or was loaded before, this import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import auto_registration
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters import CallContext as CallContext
    from .adapters import FamilyAdapter as FamilyAdapter
    from .adapters import FamilyDefaults as FamilyDefaults
    from .adapters import PromptRequest as PromptRequest
    from .adapters import PromptRows as PromptRows
    from .adapters import register_adapter as register_adapter
    from .inversion import LEditsInversion as LEditsInversion
    from .output import LEditsOutput as LEditsOutput
    from .pipeline import LEditsPipeline as LEditsPipeline
    from .registration import register as register
    from .solver import Schedule as Schedule
    from .solver import affine_coefficients as affine_coefficients
    from .subclasses import LEditsPipelineFlux as LEditsPipelineFlux
    from .subclasses import LEditsPipelineSD as LEditsPipelineSD
    from .subclasses import LEditsPipelineSD3 as LEditsPipelineSD3
    from .subclasses import LEditsPipelineSDXL as LEditsPipelineSDXL

_NAMES = {
    "adapters": ("CallContext", "FamilyAdapter", "FamilyDefaults", "PromptRequest", "PromptRows", "register_adapter"),
    "inversion": ("LEditsInversion",),
    "output": ("LEditsOutput",),
    "pipeline": ("LEditsPipeline",),
    "registration": ("register",),
    "solver": ("Schedule", "affine_coefficients"),
    "subclasses": ("LEditsPipelineFlux", "LEditsPipelineSD", "LEditsPipelineSD3", "LEditsPipelineSDXL"),
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
