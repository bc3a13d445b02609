"""Registers with peft once it is in use, without importing it.

Importing peft here would cost seconds; waiting for a call of `register()` would make `PeftModel.from_pretrained` refuse
SCAR adapters although this package is there. So an import hook watches modules being loaded, and leaves when done.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
ACTIONS = {"peft.mapping": "register_method"}
"""What `registration` has to do once a module is loaded."""


class _Watcher(MetaPathFinder):
    """Acts when the outermost import in progress of a watched package is done: before, modules may be half loaded."""

    def __init__(self) -> None:
        self._open = dict(ACTIONS)
        self._packages = {name.partition(".")[0] for name in (*ACTIONS, PACKAGE)}
        self._depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap(spec)
        return spec

    def _wrap(self, spec: ModuleSpec) -> None:
        load = spec.loader.exec_module  # type: ignore[union-attr]

        def load_and_act(module: ModuleType) -> None:
            self._depth += 1
            try:
                load(module)
            finally:
                self._depth -= 1
            self.act(loaded=module.__name__)

        spec.loader.exec_module = load_and_act  # type: ignore[union-attr, method-assign]

    def act(self, loaded: str | None = None) -> None:
        """Do what is due. `loaded` is a module that has just run, which Python still takes for half loaded."""
        if self._depth or _is_half_loaded(loaded):
            return
        for name in [name for name in self._open if name in sys.modules]:
            action = self._open.pop(name, None)
            if action is not None:  # else the import below was here before
                _register(name.partition(".")[0], action)
        if not self._open and self in sys.meta_path:
            sys.meta_path.remove(self)


def _register(library: str, action: str) -> None:
    try:
        getattr(import_module(f"{PACKAGE}.registration"), action)()
    except ImportError as error:  # an unsuitable version must not break the import in progress
        warnings.warn(
            f"{PACKAGE} cannot register with {library}: {error}. {PACKAGE}.register() shows where.",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_half_loaded(loaded: str | None) -> bool:
    """Whether one of our modules, or one we wait for, is being imported; `loaded` is not."""
    names = {name for name in list(sys.modules) if name.startswith(f"{PACKAGE}.") or name in ACTIONS} - {loaded}
    return any(getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False) for name in names)


def install() -> None:
    """Start watching; act now if there is something in use already."""
    watcher = _Watcher()
    sys.meta_path.insert(0, watcher)
    watcher.act()
