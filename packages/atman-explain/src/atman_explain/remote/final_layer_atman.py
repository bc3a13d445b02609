"""The last layer of a decoder, run on those rows only that somebody reads.

Attention in it needs every row's key and value. What follows, the output projection and the MLP, works row by row, and
most rows of the last layer's output are never looked at. So the layer runs twice: on all rows until its attention is
known, then on the rows that are read, which are given the attention that was found. Nothing needs to be known about the
layer but that rows meet in its attention only.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .hook_atman import AttentionCall, Intervention, active, in_this_thread


class RowsRefused(Exception):  # noqa: N818 (nobody sees it: the layer is run on all rows instead)
    """A layer failed when it was given some of its rows only."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _AttentionKnown(Exception):  # noqa: N818 (no error)
    """Ends a layer early, once its attention is known."""


class _FinalAttention(Intervention):
    """Hands out, to some rows, the attention of the run before, which it had ended there."""

    needs_mask = False

    def __init__(self, module: nn.Module, inner: Intervention, rows: Tensor) -> None:
        self.modules = {id(module)}
        self._inner = inner
        self._rows = rows
        self._out: Tensor | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        if self._out is None:
            out = self._inner.attend(call)
            self._out = out.index_select(2, self._rows.to(out.device))
            raise _AttentionKnown
        return self._out


def find_final_layer(model: nn.Module, module: nn.Module) -> nn.Module | None:
    """The layer that an attention module belongs to, if it is the last of a list of layers; else None."""
    path = next(name for name, each in model.named_modules() if each is module).split(".")
    for end in range(len(path) - 1, 0, -1):
        layers = model.get_submodule(".".join(path[:end]))
        if isinstance(layers, nn.ModuleList):
            return layers[-1] if path[end] == str(len(layers) - 1) else None
    return None


@contextlib.contextmanager
def final_layer_on(layer: nn.Module, module: nn.Module, attention: Intervention, rows: Tensor) -> Iterator[None]:
    """Let a layer compute some rows only, once, within this context; others are zero.

    Args:
        layer: the last layer.
        module: its attention module.
        attention: answers for the module on all rows.
        rows: [n], int64.

    Raises:
        RowsRefused: the layer failed when it was given these rows only.
    """
    final = _FinalAttention(module, attention, rows)
    count, is_inside = 0, False

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal count, is_inside
        hidden = args[0] if args else kwargs["hidden_states"]
        count = hidden.shape[1]
        with contextlib.suppress(_AttentionKnown):
            layer.forward(*args, **kwargs)  # without hooks, of which this is one
        is_inside = True
        return _of_rows(args, count, rows), _of_rows(kwargs, count, rows)

    def after(_: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
        nonlocal is_inside
        is_inside = False
        if isinstance(out, tuple):
            return _put_back(out[0], count, rows), *out[1:]
        return _put_back(out, count, rows)

    with contextlib.ExitStack() as undo:
        undo.enter_context(active(final))
        undo.callback(layer.register_forward_pre_hook(in_this_thread(before), with_kwargs=True).remove)
        undo.callback(layer.register_forward_hook(in_this_thread(after)).remove)
        try:
            yield
        except Exception as error:
            if is_inside:
                raise RowsRefused(error) from error
            raise


def _of_rows(value: Any, count: int, rows: Tensor) -> Any:
    """What a layer is given, for some of its `count` rows: states and rotary angles [.., n, D], positions [.., n]."""
    if isinstance(value, dict):
        return {name: _of_rows(each, count, rows) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_of_rows(each, count, rows) for each in value)
    if not isinstance(value, Tensor):
        return value
    axes = (-2, -1) if value.is_floating_point() or value.is_complex() else (-1,)
    for axis in axes:
        if value.ndim >= -axis and value.shape[axis] == count:
            return value.index_select(axis, rows.to(value.device))
    return value


def _put_back(states: Tensor, count: int, rows: Tensor) -> Tensor:
    out = states.new_zeros(states.shape[0], count, *states.shape[2:])
    return out.index_copy_(1, rows.to(states.device), states)
