"""A word list as factored sparse tensors: words -> trigram units -> table rows.

A million words of ten trigrams and m rows each would be `10 m` million row numbers. Words share their trigrams, so the
list is kept in two levels (words to units, units to rows), and every sum over a word's rows becomes two short sums.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .patterns_tfree import HashSpec, is_edge_trigram, special_rows, trigram_rows, word_bytes

MAX_WORDS = 4_000_000  # bounds the memory that a configuration file can ask for
_WORDS_PER_CHUNK = 1 << 16
INNER_REPEAT, EDGE_REPEAT, IN_BOTH = 0, 1, 2  # values of correction_kinds


@dataclass(frozen=True)
class FactoredDictionary:
    """W words, their U distinct trigram units, and what must be subtracted to turn repeated rows into sets."""

    word_ptr: Tensor
    """int32 [W + 1]: the units of word w are `word_units[word_ptr[w]:word_ptr[w + 1]]`."""

    word_units: Tensor
    """int32 [nnz]: unit numbers; within a word, inner units first, then edge units."""

    word_edges: Tensor
    """uint8 [W]: how many of a word's last units are edge units (hold a border space)."""

    unit_rows: Tensor
    """int32 [U, m]: table rows of a unit."""

    correction_ptr: Tensor
    """int32 [W + 1]: CSR pointer into the corrections."""

    correction_rows: Tensor
    """int32 [C]: rows that the word's units list once too often."""

    correction_kinds: Tensor
    """uint8 [C]: 0 repeated among inner rows, 1 repeated among edge rows, 2 in both (only the union counts it once)."""

    def __len__(self) -> int:
        return self.word_edges.shape[0]

    @property
    def num_trigrams(self) -> Tensor:
        """N of every word: int32 [W], 0 for an entry that is no word."""
        return self.word_ptr.diff()

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order in which the kernels take them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def select(self, words: Tensor) -> "FactoredDictionary":
        """Keep only the given words (int64 [N], repeats allowed) and the units that they use."""
        word_ptr, word_units = select_csr(self.word_ptr, words, self.word_units)
        used, word_units = torch.unique(word_units, return_inverse=True)
        correction_ptr, correction_rows, correction_kinds = select_csr(
            self.correction_ptr, words, self.correction_rows, self.correction_kinds
        )
        return FactoredDictionary(
            word_ptr,
            word_units.to(torch.int32),
            self.word_edges[words],
            self.unit_rows[used],
            correction_ptr,
            correction_rows,
            correction_kinds,
        )

    def join(self, other: "FactoredDictionary") -> "FactoredDictionary":
        """Append another list; its word w becomes word `len(self) + w`."""
        return FactoredDictionary(
            torch.cat([self.word_ptr, other.word_ptr[1:] + self.word_ptr[-1]]),
            torch.cat([self.word_units, other.word_units + self.unit_rows.shape[0]]),
            torch.cat([self.word_edges, other.word_edges]),
            torch.cat([self.unit_rows, other.unit_rows]),
            torch.cat([self.correction_ptr, other.correction_ptr[1:] + self.correction_ptr[-1]]),
            torch.cat([self.correction_rows, other.correction_rows]),
            torch.cat([self.correction_kinds, other.correction_kinds]),
        )

    def active_rows(self) -> tuple[Tensor, Tensor]:
        """List every word's set of rows (inner and edge together, each row once).

        Returns:
            int64 [W + 1] pointer and int64 [P] rows, ascending within a word: the ones of the multi-hot targets.
        """
        num_rows = int(self.unit_rows.max()) + 1 if self.unit_rows.numel() else 1
        word = torch.repeat_interleave(self.num_trigrams.long())  # [nnz]
        rows = self.unit_rows[self.word_units].long()  # [nnz, m]
        keys = torch.unique((word[:, None] * num_rows + rows).reshape(-1), sorted=True)
        counts = torch.bincount(torch.div(keys, num_rows, rounding_mode="floor"), minlength=len(self))
        return _pointer(counts), keys % num_rows

    def check(self, table_size: int) -> None:
        """Refuse tensors that do not describe a dictionary over a table of `table_size` rows.

        Raises:
            ValueError: names the tensor that is inconsistent.
        """
        for name, values in (("word", self.word_units), ("correction", self.correction_rows)):
            pointer = getattr(self, f"{name}_ptr")
            if int(pointer[0]) != 0 or int(pointer[-1]) != values.shape[0] or bool((pointer.diff() < 0).any()):
                raise ValueError(f"{name}_ptr does not run from 0 to {values.shape[0]} without decreasing.")
        bounds = {
            "word_units": self.unit_rows.shape[0],
            "unit_rows": table_size,
            "correction_rows": table_size,
            "correction_kinds": 3,
            "word_edges": 3,
        }
        for name, bound in bounds.items():
            values = getattr(self, name)
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < bound:
                raise ValueError(f"{name} must lie in [0, {bound}), got {int(values.min())} to {int(values.max())}.")
        if bool((self.word_edges > self.num_trigrams).any()):
            raise ValueError("word_edges exceeds a word's number of trigrams.")

    def to(self, device: torch.device | str) -> "FactoredDictionary":
        """Move every tensor to a device."""
        return FactoredDictionary(*(tensor.to(device) for tensor in self.tensors()))


def build_factored_dictionary(
    words: Sequence[str | bytes | None], spec: HashSpec, special: Collection[int] = ()
) -> FactoredDictionary:
    """Hash a word list into its factored form, vectorised over the list.

    Args:
        words: entry i is the word with number i; bytes for a piece that is no valid UTF-8; None for an entry without a
            pattern (an id that is no word by itself).
        spec: the hash.
        special: numbers of the entries that are hashed from their whole string.

    Raises:
        ValueError: more than `MAX_WORDS` entries, or an empty word.
    """
    if len(words) > MAX_WORDS:
        raise ValueError(f"words must have at most {MAX_WORDS} entries, got {len(words)}.")
    special = set(special)
    data = [b"" if word is None or i in special else _as_bytes(word) for i, word in enumerate(words)]
    for i, (word, encoded) in enumerate(zip(words, data, strict=True)):
        if (word is not None and not encoded and i not in special) or word == "":
            raise ValueError(f"words[{i}] must not be empty.")

    word_of_unit, trigrams, is_edge = _distinct_trigrams(data)
    distinct, units = np.unique(trigrams, return_inverse=True)
    rows = trigram_rows(distinct, spec)
    whole = sorted(special & set(range(len(words))))
    if whole:
        special_table = np.stack([special_rows(_as_text(words[i]), spec) for i in whole])
        rows = np.concatenate([rows, special_table])
        units = np.concatenate([units, len(distinct) + np.arange(len(whole))])
        word_of_unit = np.concatenate([word_of_unit, np.array(whole, np.int64)])
        is_edge = np.concatenate([is_edge, np.zeros(len(whole), bool)])
        order = np.argsort(word_of_unit, kind="stable")
        units, word_of_unit, is_edge = units[order], word_of_unit[order], is_edge[order]

    counts = np.bincount(word_of_unit, minlength=len(words))
    pointer = np.concatenate([[0], np.cumsum(counts)])
    correction_word, correction_row, correction_kind = _corrections(pointer, units, is_edge, rows, spec)
    correction_counts = np.bincount(correction_word, minlength=len(words))
    return FactoredDictionary(
        torch.from_numpy(pointer.astype(np.int32)),
        torch.from_numpy(units.astype(np.int32)),
        torch.from_numpy(np.bincount(word_of_unit[is_edge], minlength=len(words)).astype(np.uint8)),
        torch.from_numpy(rows.astype(np.int32)),
        torch.from_numpy(np.concatenate([[0], np.cumsum(correction_counts)]).astype(np.int32)),
        torch.from_numpy(correction_row.astype(np.int32)),
        torch.from_numpy(correction_kind),
    )


def empty_dictionary(
    num_words: int, num_units: int, nnz: int, num_corrections: int, num_hashes: int
) -> FactoredDictionary:
    """Allocate the tensors of a dictionary of known sizes, to be overwritten by a checkpoint's."""
    return FactoredDictionary(
        torch.zeros(num_words + 1, dtype=torch.int32),
        torch.zeros(nnz, dtype=torch.int32),
        torch.zeros(num_words, dtype=torch.uint8),
        torch.zeros(num_units, num_hashes, dtype=torch.int32),
        torch.zeros(num_words + 1, dtype=torch.int32),
        torch.zeros(num_corrections, dtype=torch.int32),
        torch.zeros(num_corrections, dtype=torch.uint8),
    )


def select_csr(pointer: Tensor, words: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Take entries of CSR lists.

    Args:
        pointer: int [W + 1].
        words: int64 [N], which entries, repeats allowed.
        *values: [nnz] each.

    Returns:
        int32 [N + 1] pointer, then the values of the taken entries.
    """
    counts = pointer.diff()[words].long()
    new_pointer = _pointer(counts)
    offset = torch.repeat_interleave(pointer[words].long() - new_pointer[:-1], counts)
    index = offset + torch.arange(offset.shape[0], device=offset.device)
    return new_pointer.to(torch.int32), *(value[index] for value in values)


def _distinct_trigrams(data: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(word, trigram, is_edge) of every distinct trigram of every word; by word, inner before edge, then by number."""
    buffer = np.frombuffer(b" " + b"  ".join(data) + b" ", np.uint8).astype(np.int64)
    lengths = np.fromiter(map(len, data), np.int64, len(data))
    word = np.repeat(np.arange(len(data)), lengths)
    first = np.cumsum(lengths + 2) - lengths - 2  # where " word " starts
    position = np.arange(len(word)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(first, lengths)
    trigram = buffer[position] | buffer[position + 1] << 8 | buffer[position + 2] << 16
    key = np.sort(word << 25 | is_edge_trigram(trigram).astype(np.int64) << 24 | trigram)
    key = key[np.diff(key, prepend=-1) != 0]  # np.unique hashes since numpy 2.3, fifty times slower on such keys
    return key >> 25, key & 0xFFFFFF, (key >> 24 & 1).astype(bool)


def _corrections(
    pointer: np.ndarray, units: np.ndarray, is_edge: np.ndarray, rows: np.ndarray, spec: HashSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the rows that a word's units list more than once: (word, row, kind), sorted by word."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(pointer) - 1, _WORDS_PER_CHUNK):
        stop = min(start + _WORDS_PER_CHUNK, len(pointer) - 1)
        here = slice(pointer[start], pointer[stop])
        word = np.repeat(np.arange(start, stop), np.diff(pointer[start : stop + 1]))
        key = word[:, None] * spec.hash_vocab_size + rows[units[here]]  # [nnz, m]
        key = np.sort((key << 1 | is_edge[here][:, None]).reshape(-1))
        again = np.flatnonzero(key[1:] >> 1 == key[:-1] >> 1) + 1  # a row of the same word as the entry before
        same_set = key[again] == key[again - 1]
        word_row, edge = key[again] >> 1, key[again] & 1
        kind = np.where(same_set, np.where(edge, EDGE_REPEAT, INNER_REPEAT), IN_BOTH)
        found.append((word_row // spec.hash_vocab_size, word_row % spec.hash_vocab_size, kind.astype(np.uint8)))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8)
    word_column, row_column, kind_column = zip(*found, strict=True)
    return np.concatenate(word_column), np.concatenate(row_column), np.concatenate(kind_column)


def _pointer(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _as_bytes(word: str | bytes) -> bytes:
    return word if isinstance(word, bytes) else word_bytes(word)


def _as_text(word: str | bytes | None) -> str:
    if isinstance(word, str):
        return word
    raise ValueError(f"A word that is hashed from its whole string must be text, got {word!r}.")
