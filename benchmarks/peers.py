"""What T-FREE is compared with: the plain definitions over flat rows, the original's method, and other libraries.

Everything here is our own few lines. "original" means the method of the published T-FREE code as its description gives
it: index tables of one entry per active row, gathered and added with `index_add`, and dense 0/1 targets.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class FlatPatterns:
    """Every active row of every word, listed one by one: what remains when nothing is shared."""

    word_of_row: Tensor
    """int64 [nnz * m]: the word that each entry of `rows` belongs to, ascending."""

    rows: Tensor
    """int64 [nnz * m]: table rows of each word's trigrams, repeats kept."""

    trigrams: Tensor
    """int64 [W]: n, the number of distinct trigrams of each word."""

    inner: tuple[Tensor, Tensor]
    """(word, row) int64 pairs, each once per word: rows of trigrams without a border space."""

    edge: tuple[Tensor, Tensor]
    """The same for trigrams with a border space."""

    union: tuple[Tensor, Tensor]
    """The same for all trigrams: the ones of the multi-hot targets."""

    V: int
    m: int

    @property
    def offsets(self) -> Tensor:
        """int64 [W]: where each word's rows start, as `embedding_bag` wants it."""
        return (self.trigrams.cumsum(0) - self.trigrams) * self.m


def flat_patterns(words: Sequence[str], V: int, m: int, device: str = "cpu") -> FlatPatterns:
    """Hash words with "mix32" (k = 0, seed 0) into flat lists, from the definition and without our package's code."""
    encoded = [b" " + word.encode() + b" " for word in words]
    data = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int64)
    word = np.repeat(np.arange(len(words)), [len(e) for e in encoded])
    inside = np.flatnonzero(word[2:] == word[:-2])  # a trigram must not reach into the next word
    number = data[inside] | data[inside + 1] << 8 | data[inside + 2] << 16
    key = np.unique(word[inside] << 24 | number)
    word, number = key >> 24, key & 0xFFFFFF
    is_edge = torch.from_numpy(np.repeat((number & 255 == 32) | (number >> 16 == 32), m)).to(device)
    rows = torch.from_numpy(mix32(number, V, m).reshape(-1)).to(device)
    word_of_row = torch.from_numpy(np.repeat(word, m)).to(device)
    keys = word_of_row * V + rows

    def pairs(chosen: Tensor) -> tuple[Tensor, Tensor]:
        distinct = torch.unique(chosen)
        return distinct // V, distinct % V

    trigrams = torch.from_numpy(np.bincount(word, minlength=len(words))).to(device)
    return FlatPatterns(
        word_of_row, rows, trigrams, inner=pairs(keys[~is_edge]), edge=pairs(keys[is_edge]), union=pairs(keys), V=V, m=m
    )


def mix32(trigrams: np.ndarray, V: int, m: int) -> np.ndarray:
    """Rows int64 [U, m] of trigram numbers under "mix32" with k = 0 and seed 0, from its definition."""
    i = np.arange(m, dtype=np.uint32)
    x = trigrams.astype(np.uint32)[:, None] * np.uint32(0x9E3779B1) + (i + np.uint32(1)) * np.uint32(0x85EBCA77)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return i.astype(np.int64) * (V // m) + (x.astype(np.uint64) * np.uint64(V // m) >> np.uint64(32)).astype(np.int64)


def md5_rows(trigrams: Sequence[int], V: int, m: int) -> Tensor:
    """Rows int64 [U, m] under the released checkpoints' "md5" rule, k = 0: m distinct rows, ascending."""
    table = []
    for t in trigrams:
        rows: set[int] = set()
        for i in range(m):
            j = 0
            while (row := int(hashlib.md5(f"{t}_{i}_{j}".encode("ascii")).hexdigest(), 16) % V) in rows:
                j += 1
            rows.add(row)
        table.append(sorted(rows))
    return torch.tensor(table, dtype=torch.int64).reshape(-1, m)


def original_embedding(patterns: FlatPatterns, table: Tensor) -> Tensor:
    """[W, D]: gather every row of every trigram, sum over m, then add the trigrams into their words."""
    per_trigram = table[patterns.rows].view(-1, patterns.m, table.shape[1]).sum(1)  # [nnz, D]
    out = table.new_zeros(patterns.trigrams.shape[0], table.shape[1])
    return out.index_add_(0, patterns.word_of_row[:: patterns.m], per_trigram)


def bag_embedding(patterns: FlatPatterns, table: Tensor) -> Tensor:
    """[W, D] by `torch.nn.functional.embedding_bag` over flat rows."""
    return F.embedding_bag(patterns.rows, table, patterns.offsets, mode="sum")


def multi_hot(patterns: FlatPatterns, dtype: torch.dtype) -> Tensor:
    """[W, V] with the multiplicity of every row."""
    dense = torch.zeros(patterns.trigrams.shape[0], patterns.V, dtype=dtype, device=patterns.rows.device)
    return dense.index_put_((patterns.word_of_row, patterns.rows), dense.new_ones(()), accumulate=True)


def dense_targets(patterns: FlatPatterns, dtype: torch.dtype) -> Tensor:
    """[W, V] of zeros and ones: the target of the multi-label loss, written out."""
    dense = torch.zeros(patterns.trigrams.shape[0], patterns.V, dtype=dtype, device=patterns.rows.device)
    dense[patterns.union] = 1
    return dense


def dense_bce(
    x: Tensor, weight: Tensor, targets: Tensor, pos_weight: float, row_weight: Tensor, scale: float
) -> Tensor:
    """The multi-label loss from dense targets: `binary_cross_entropy_with_logits` on all logits at once."""
    z = x @ weight.T
    weights = torch.tensor(pos_weight, dtype=z.dtype, device=z.device)
    losses = F.binary_cross_entropy_with_logits(z.float(), targets.float(), pos_weight=weights, reduction="none")
    return scale * (losses.sum(1) * row_weight).sum()


def original_scores(z: Tensor, patterns: FlatPatterns, edge_weight: float) -> Tensor:
    """[B, W] "contrast" scores, T = 1: gather one probability per active row, `index_add` into the words.

    As in the original, a batch repeats both index lists per row of logits. (Its lists lack the offsets that make the
    rows differ, which gives every row the scores of the first; here they are added.)
    """
    p = z.sigmoid()
    (B, V), W = p.shape, patterns.trigrams.shape[0]
    row_of_batch = torch.arange(B, device=z.device)[:, None]
    total = p.new_zeros(B * W)
    for (word, row), weight in ((patterns.inner, 1.0), (patterns.edge, edge_weight)):
        gathered = p.view(-1)[(row_of_batch * V + row).view(-1)]
        total.index_add_(0, (row_of_batch * W + word).view(-1), gathered, alpha=weight)
    return contrast(total.view(B, W), p.sum(1, keepdim=True), patterns)


def csr_scores(z: Tensor, matrix: Tensor, patterns: FlatPatterns) -> Tensor:
    """[B, W] "contrast" scores, T = 1: one product with a flat torch CSR matrix [W, V]."""
    p = z.sigmoid()
    total = matrix.mv(p[0])[None] if p.shape[0] == 1 else (matrix @ p.T).T
    return contrast(total, p.sum(1, keepdim=True), patterns)


def dense_scores(z: Tensor, matrix: Tensor, patterns: FlatPatterns) -> Tensor:
    """[B, W] "contrast" scores, T = 1: one product with the dense matrix [W, V]."""
    p = z.sigmoid()
    return contrast(p @ matrix.T, p.sum(1, keepdim=True), patterns)


def score_matrix(
    patterns: FlatPatterns, edge_weight: float, dtype: torch.dtype, index: torch.dtype = torch.int64
) -> Tensor:
    """CSR [W, V]: 1 for an inner row plus `edge_weight` for an edge row; its indices are of type `index`."""
    W, V = patterns.trigrams.shape[0], patterns.V
    keys = torch.cat([word * V + row for word, row in (patterns.inner, patterns.edge)])
    values = torch.ones(keys.shape[0], dtype=dtype, device=keys.device)
    values[patterns.inner[0].shape[0] :] = edge_weight
    keys, position = torch.unique(keys, return_inverse=True)
    summed = values.new_zeros(keys.shape[0]).index_add_(0, position, values)
    bounds = torch.searchsorted(keys, torch.arange(W + 1, device=keys.device) * V).to(index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR support a beta
        return torch.sparse_csr_tensor(bounds, (keys % V).to(index), summed, (W, V), check_invariants=False)


def contrast(total: Tensor, mass: Tensor, patterns: FlatPatterns) -> Tensor:
    """s_w / (n_w m) + (s_w - sum_c p_c) / (V - n_w m)."""
    active = patterns.trigrams * patterns.m
    return total / active + (total - mass) / (patterns.V - active).clamp_min(1)


class OriginalEncoder:
    """Text to rows one word at a time: split, list the trigrams, look each up in a table, collect its rows.

    The published program fills its table of all 2**24 trigrams in advance; this one hashes a trigram when it is first
    seen and keeps it, which costs the same per word afterwards.
    """

    SPLIT = re.compile(r"[^\W\d_]+| +|\n+|[\W\d_]")

    def __init__(self, V: int, m: int) -> None:
        self.V, self.m = V, m
        self.table: dict[int, list[int]] = {}

    def __call__(self, text: str) -> list[list[int]]:
        return [self.rows_of(word) for word in self.SPLIT.findall(text)]

    def rows_of(self, word: str) -> list[int]:
        data = b" " + word.encode("utf-8", "surrogatepass") + b" "
        rows: list[int] = []
        for i in range(len(data) - 2):
            number = data[i] + 256 * data[i + 1] + 65536 * data[i + 2]
            if number not in self.table:
                self.table[number] = mix32(np.array([number]), self.V, self.m)[0].tolist()
            rows.extend(self.table[number])
        return rows
