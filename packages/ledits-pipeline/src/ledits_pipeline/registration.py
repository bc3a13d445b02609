"""Lets diffusers find our pipeline classes by the names that saved pipelines carry."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
PIPELINES = ("LEditsPipeline", "LEditsPipelineFlux", "LEditsPipelineSD", "LEditsPipelineSD3", "LEditsPipelineSDXL")


def register() -> None:
    """Make `diffusers.LEditsPipeline` and its siblings known, so that saved pipelines load without remote code.

    `import ledits_pipeline` does this by itself as soon as diffusers is in use. Names that diffusers has itself are
    left alone; calling it again changes nothing.

    Example:
        >>> import ledits_pipeline
        >>> ledits_pipeline.register()
    """
    import_module("diffusers")
    extend(sys.modules["diffusers"])


def extend(module: ModuleType) -> None:
    """Give a loaded diffusers our names; the classes are imported when they are asked for."""
    kind = type(module)
    if getattr(kind, "answers_to_ledits", False):
        return
    missing = [name for name in PIPELINES if name not in dir(module)]

    class WithEditing(kind):  # type: ignore[misc, valid-type]
        """diffusers, with our pipelines."""

        answers_to_ledits = True

        def __getattr__(self, name: str) -> Any:
            if name in missing:
                return getattr(import_module(PACKAGE), name)
            found = getattr(super(), "__getattr__", None)
            if found is None:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            return found(name)

    module.__class__ = WithEditing
