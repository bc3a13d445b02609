"""`mix32_rows`: check the arguments, pick an implementation."""

import torch
from torch import Tensor

from .._checks import check_indices
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import mix32_rows_eager

_LARGEST_TABLE = 2**31


def mix32_rows(
    trigrams: Tensor,
    *,
    table_size: int,
    num_hashes: int,
    num_lowercase: int = 0,
    seed: int = 0,
    impl: Implementation = "auto",
) -> Tensor:
    """Hash trigrams to table rows without a table, on whatever device the trigrams are.

    Column i falls into the i-th of `num_hashes` equal strata of the table, so the rows of a trigram are distinct.

    Args:
        trigrams: `[U]` int64: `b0 + 256 b1 + 65536 b2` of three bytes, or `2**24 + h` with a 31-bit h for a word
            that is hashed whole.
        table_size: rows of the table, a multiple of `num_hashes`, at most 2**31.
        num_hashes: rows per trigram.
        num_lowercase: how many of the last columns belong to the lower-cased trigram (ASCII letters only).
        seed: another hash function for every value modulo 2**32.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[U, num_hashes]` int32, each in `[0, table_size)`, ascending along a row.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> he = int.from_bytes(b" He", "little")
        >>> mix32_rows(torch.tensor([he]), table_size=8000, num_hashes=10)[0, :4].tolist()
        [374, 1189, 2203, 2430]
    """
    check_indices("trigrams", trigrams, "[U]")
    if trigrams.dtype != torch.int64:
        raise ValueError(f"trigrams must be int64, got {trigrams.dtype}.")
    if num_hashes < 1:
        raise ValueError(f"num_hashes must be at least 1, got {num_hashes}.")
    if not (num_hashes <= table_size <= _LARGEST_TABLE and table_size % num_hashes == 0):
        raise ValueError(
            f"table_size must be a multiple of num_hashes ({num_hashes}) in [num_hashes, 2**31], got {table_size}."
        )
    if not 0 <= num_lowercase <= num_hashes:
        raise ValueError(f"num_lowercase must lie in [0, {num_hashes}] (num_hashes), got {num_lowercase}.")
    if choose(impl, "mix32_rows", trigrams.device) == "eager":
        return mix32_rows_eager(
            trigrams, table_size=table_size, num_hashes=num_hashes, num_lowercase=num_lowercase, seed=seed
        )
    return _mix32_rows(trigrams, table_size, num_hashes, num_lowercase, seed % 2**32)


@torch.library.custom_op(f"{NAMESPACE}::mix32_rows", mutates_args=())
def _mix32_rows(trigrams: Tensor, table_size: int, num_hashes: int, num_lowercase: int, seed: int) -> Tensor:
    from . import kernel

    out = torch.empty(trigrams.shape[0], num_hashes, dtype=torch.int32, device=trigrams.device)
    return kernel.launch(trigrams.contiguous(), out, table_size // num_hashes, num_lowercase, seed)


@_mix32_rows.register_fake
def _(trigrams: Tensor, _table_size: int, num_hashes: int, _num_lowercase: int, _seed: int) -> Tensor:
    return torch.empty(trigrams.shape[0], num_hashes, dtype=torch.int32, device=trigrams.device)
