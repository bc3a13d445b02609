"""Registers with diffusers once it is in use, without importing it: that would cost seconds."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Watcher(MetaPathFinder):
    """Waits for diffusers to be imported, acts when that is done, and leaves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "diffusers":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_extend(module: ModuleType) -> None:
            load(module)
            _extend()
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = load_and_extend  # type: ignore[method-assign]
        return spec


def _extend() -> None:
    from .registration import extend

    extend(sys.modules["diffusers"])


def install() -> None:
    """Act now if diffusers is loaded, else when it is."""
    if "diffusers" in sys.modules:
        _extend()
    else:
        sys.meta_path.insert(0, _Watcher())
