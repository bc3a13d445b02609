"""Calls `register()` once the auto classes of transformers are in use, without importing them itself.

Registering at import would cost seconds, and not registering would make `AutoTokenizer` refuse T-FREE folders although
this package is there. So an import hook watches the modules of transformers being loaded.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # every auto class needs this module


class _TransformersWatcher(MetaPathFinder):
    """Counts imports from transformers in progress, and registers when the outermost one is done.

    Earlier would be too early: the T-FREE modules need modules of transformers that may be half loaded.
    """

    def __init__(self) -> None:
        self._depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            self._depth += 1
            try:
                load(module)
            finally:
                self._depth -= 1
            self.register_if_ready()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec

    def register_if_ready(self) -> None:
        """Register, once, if the auto classes are loaded and neither transformers nor T-FREE is half loaded."""
        if self._depth or AUTO_CLASSES not in sys.modules or _is_half_loaded() or self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        try:
            import_module(f"{PACKAGE}.registration").register()
        except ImportError as error:  # an unsuitable torch or transformers must not break the import in progress
            warnings.warn(
                f"{PACKAGE} cannot register with transformers: {error}. {PACKAGE}.register() shows where.",
                RuntimeWarning,
                stacklevel=2,
            )


def _is_half_loaded() -> bool:
    ours = [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours if module is not None)


def install() -> None:
    """Start watching; if the auto classes are already in use, register now."""
    watcher = _TransformersWatcher()
    sys.meta_path.insert(0, watcher)
    watcher.register_if_ready()
