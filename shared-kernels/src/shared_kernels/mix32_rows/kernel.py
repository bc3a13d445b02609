"""Triton kernel of `mix32_rows`. No validation: op.py has done it."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, next_power_of_2, on_device_of

BLOCK_ELEMENTS = 1024
NUM_WARPS = 4


@triton.jit
def _lower_byte(letter):
    is_upper = (letter >= 0x41) & (letter <= 0x5A)
    return tl.where(is_upper, letter + 0x20, letter)


@triton.jit
def mix32_rows_kernel(
    trigrams_ptr,  # [U] int64
    out_ptr,  # [U, m] int32
    U,
    m,
    first_lower,  # columns from here on belong to the lower-cased trigram
    stratum,
    seed,
    BLOCK_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program hashes BLOCK_U trigrams to all their rows."""
    u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    column = tl.arange(0, BLOCK_M)
    t = tl.load(trigrams_ptr + u, mask=u < U, other=0)
    lower = _lower_byte(t & 255) | (_lower_byte((t >> 8) & 255) << 8) | (_lower_byte((t >> 16) & 255) << 16)
    lower = tl.where(t < 0x1000000, lower, t)  # special words have no bytes
    t = tl.where(column[None, :] >= first_lower, lower[:, None], t[:, None])  # [BLOCK_U, BLOCK_M]

    # int64 products wrap modulo 2**64, which leaves their low 32 bits right
    i = column.to(tl.int64)[None, :]
    x = (t * 0x9E3779B1 + (i + 1) * 0x85EBCA77 + seed) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    rows = i * stratum + ((x * stratum) >> 32)
    places = u[:, None] * m + column[None, :]
    tl.store(out_ptr + places, rows.to(tl.int32), mask=(u < U)[:, None] & (column < m)[None, :])


def launch(trigrams: Tensor, out: Tensor, stratum: int, num_lowercase: int, seed: int) -> Tensor:
    """Fill `out` `[U, m]` with the rows of the `[U]` trigrams."""
    U, m = out.shape
    if out.numel():
        block_m = next_power_of_2(m)
        block_u = max(1, BLOCK_ELEMENTS // block_m)
        with on_device_of(trigrams):
            mix32_rows_kernel[(triton.cdiv(U, block_u),)](
                trigrams,
                out,
                U,
                m,
                m - num_lowercase,
                stratum,
                seed,
                BLOCK_U=block_u,
                BLOCK_M=block_m,
                num_warps=NUM_WARPS,
                **LAUNCH_OPTIONS,
            )
    return out


def _case(block_m: int, seed_type: str) -> AotCase:
    numbers = {"U": "i32", "m": "i32", "first_lower": "i32", "stratum": "i32", "seed": seed_type}
    signature = {"trigrams_ptr": "*i64", "out_ptr": "*i32", **numbers}
    tile = {"BLOCK_U": max(1, BLOCK_ELEMENTS // block_m), "BLOCK_M": block_m}
    return AotCase(mix32_rows_kernel, signature, tile, NUM_WARPS)


AOT_CASES = (_case(16, "i32"), _case(8, "i32"), _case(64, "i64"))
