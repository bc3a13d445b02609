"""What `mix32_rows` means, in Python integers; every implementation is judged against this file."""

import torch
from torch import Tensor

_WORD = 2**32


def mix32_rows_reference(
    trigrams: Tensor, *, table_size: int, num_hashes: int, num_lowercase: int = 0, seed: int = 0
) -> Tensor:
    """Row i of trigram t: the i-th stratum of table_size / num_hashes rows, hashed into; `[U, m]` int32."""
    rows = [
        [
            _row(_lower(t) if i >= num_hashes - num_lowercase else t, i, table_size // num_hashes, seed)
            for i in range(num_hashes)
        ]
        for t in trigrams.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(trigrams.numel(), num_hashes)


def _row(t: int, i: int, stratum: int, seed: int) -> int:
    x = (t * 0x9E3779B1 + seed + (i + 1) * 0x85EBCA77) % _WORD
    x ^= x >> 16
    x = (x * 0x85EBCA6B) % _WORD
    x ^= x >> 13
    x = (x * 0xC2B2AE35) % _WORD
    x ^= x >> 16
    return i * stratum + ((x * stratum) >> 32)


def _lower(t: int) -> int:
    """ASCII case folding of the three bytes; numbers from 2**24 on stand for special words and have no bytes."""
    if t >= 2**24:
        return t
    return int.from_bytes(t.to_bytes(3, "little").lower(), "little")
