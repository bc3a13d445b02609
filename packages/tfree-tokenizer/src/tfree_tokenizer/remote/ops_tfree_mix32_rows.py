"""`mix32_rows` in PyTorch: 32-bit hashing in int64 arithmetic, vectorized over trigrams and hashes.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


def mix32_rows_eager(
    trigrams: Tensor, *, table_size: int, num_hashes: int, num_lowercase: int = 0, seed: int = 0
) -> Tensor:
    """Hash trigrams to table rows, one row in each of `num_hashes` equal strata, so a trigram's rows are distinct.

    Args:
        trigrams: `[U]` int64 numbers `b0 + 256 b1 + 65536 b2`, or `2**24 + h` with 31-bit h for special words.
        table_size: v, rows of the table; a multiple of `num_hashes`.
        num_hashes: m, rows per trigram.
        num_lowercase: k, how many of the last columns belong to the lower-cased trigram (ASCII; special words have
            no case).
        seed: added before mixing, taken modulo 2**32.

    Returns:
        `[U, m]` int32, each in `[0, table_size)`.
    """
    stratum = table_size // num_hashes
    column = torch.arange(num_hashes, dtype=torch.int64, device=trigrams.device)
    t = trigrams.long()[:, None].expand(-1, num_hashes)
    if num_lowercase > 0:
        t = torch.where(column >= num_hashes - num_lowercase, _lower(trigrams.long())[:, None], t)
    # int64 products wrap modulo 2**64, which leaves their low 32 bits right
    x = (t * 0x9E3779B1 + (column + 1) * 0x85EBCA77 + seed % (1 << 32)) & _LOW_32
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _LOW_32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _LOW_32
    x = x ^ (x >> 16)
    return (column * stratum + ((x * stratum) >> 32)).int()


def _lower(trigrams: Tensor) -> Tensor:
    shifts = torch.tensor([0, 8, 16], device=trigrams.device)
    letters = (trigrams[:, None] >> shifts) & 0xFF  # [U, 3]
    is_upper = (letters >= ord("A")) & (letters <= ord("Z")) & (trigrams[:, None] < 1 << 24)
    return trigrams + ((is_upper * 32) << shifts).sum(1)
