"""What entered a decoder enters it again, as often as needed: whole rows of prompts with images, the tower run once."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .hook_atman import in_this_thread

_OF_THIS_RUN = ("cache_position", "past_key_values", "use_cache")


@contextlib.contextmanager
def replayed(decoder: nn.Module, entered: Mapping[str, Any], times: int) -> Iterator[None]:
    """Give a decoder what entered it before, as a batch of equal rows, whatever the model around it now hands it.

    Args:
        decoder: a part of the model that is run in this context.
        entered: its keyword arguments in a run of one row.
        times: rows of the batch.
    """
    again = {name: repeat(value, times) for name, value in entered.items() if name not in _OF_THIS_RUN}
    again |= {name: entered[name] for name in ("position_ids",) if name in entered}  # broadcast; may have axes in front

    def hand_over(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | again

    handle = decoder.register_forward_pre_hook(in_this_thread(hand_over), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def repeat(value: Any, times: int) -> Any:
    """Repeat the rows of a tensor, or of those in a list; all else, as masks by kind of layer, is shared."""
    if isinstance(value, Tensor):
        return value.repeat(times, *(1,) * (value.ndim - 1))
    return [repeat(each, times) for each in value] if isinstance(value, list) else value
