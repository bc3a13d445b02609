"""Words to rows: byte trigrams of a word, hashed into a few rows of the embedding table each (T-FREE section 3.1)."""

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

HASH_SCHEMES = ("md5", "mix32")
SPECIAL_TRIGRAM = 1 << 24  # first number that no byte trigram has; whole-string words are hashed from here on
_UINT32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class HashSpec:
    """Everything that decides which rows of the table a word switches on."""

    hash_vocab_size: int
    """v: rows of the table. At most 2**31 - 1, at least m, and divisible by m for "mix32"."""

    num_hashes: int
    """m: rows per trigram."""

    num_lowercase: int = 0
    """k: how many of the m rows a trigram shares with its lower-cased form (ASCII letters)."""

    hash_scheme: str = "mix32"
    """"md5" (the released checkpoints) or "mix32" (vectorised integer arithmetic, for new models)."""

    hash_seed: int = 0
    """Shifts every row of "mix32". "md5" has no seed."""

    def __post_init__(self) -> None:
        for name in ("hash_vocab_size", "num_hashes", "num_lowercase", "hash_seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an int, got {value!r}.")
        if self.hash_scheme not in HASH_SCHEMES:
            raise ValueError(f"hash_scheme must be one of {HASH_SCHEMES}, got {self.hash_scheme!r}.")
        if not 1 <= self.num_hashes <= 1024:
            raise ValueError(f"num_hashes must lie in [1, 1024], got {self.num_hashes}.")
        if not self.num_hashes <= self.hash_vocab_size < 2**31:
            raise ValueError(
                f"hash_vocab_size must lie in [num_hashes = {self.num_hashes}, 2**31), got {self.hash_vocab_size}."
            )
        if self.hash_scheme == "mix32" and self.hash_vocab_size % self.num_hashes:
            raise ValueError(
                f"hash_vocab_size must be divisible by num_hashes for hash_scheme 'mix32', "
                f"got {self.hash_vocab_size} and {self.num_hashes}."
            )
        if not 0 <= self.num_lowercase <= self.num_hashes:
            raise ValueError(
                f"num_lowercase must lie in [0, {self.num_hashes}] (num_hashes), got {self.num_lowercase}."
            )
        if not 0 <= self.hash_seed < 2**32:
            raise ValueError(f"hash_seed must lie in [0, 2**32), got {self.hash_seed}.")
        if self.hash_scheme == "md5" and self.hash_seed:
            raise ValueError(f"hash_seed must be 0 for hash_scheme 'md5', which has no seed, got {self.hash_seed}.")


@dataclass(frozen=True)
class WordPattern:
    """The rows that one word switches on, in the three multiplicities that T-FREE uses."""

    rows: np.ndarray
    """int32 [n * m]: what the embedding sums, repeats included."""

    inner: frozenset[int]
    """Set of rows of the trigrams that hold no border space (all rows of a whole-string word)."""

    edge: frozenset[int]
    """Set of rows of the trigrams that hold a border space."""

    num_trigrams: int
    """n: distinct trigrams of the word; 1 for a whole-string word."""

    @property
    def active(self) -> frozenset[int]:
        """The ones of the multi-hot target: `inner | edge`."""
        return self.inner | self.edge


def is_special_word(word: str) -> bool:
    """Whether a word is hashed from its whole string because it is written like a control token (`<|...`)."""
    return "<|" in word


def word_bytes(word: str) -> bytes:
    """UTF-8 of a word; lone surrogates survive."""
    return word.encode("utf-8", "surrogatepass")


def word_trigrams(word: str | bytes) -> list[int]:
    """List the distinct byte trigrams of " word " as numbers `b0 + 256 b1 + 65536 b2`, in order of first appearance.

    Trigrams are triples of UTF-8 *bytes*; a word of b bytes has at most b of them.
    """
    padded = b" " + (word_bytes(word) if isinstance(word, str) else word) + b" "
    triples = (int.from_bytes(padded[i : i + 3], "little") for i in range(len(padded) - 2))
    return list(dict.fromkeys(triples))


def is_edge_trigram(trigrams: np.ndarray) -> np.ndarray:
    """Whether a trigram holds a border space: bool array of the shape of `trigrams`."""
    t = np.asarray(trigrams, dtype=np.int64)
    return ((t & 255) == 32) | (((t >> 8) & 255) == 32) | ((t >> 16) == 32)


def trigram_rows(trigrams: Iterable[int] | np.ndarray, spec: HashSpec) -> np.ndarray:
    """Hash trigrams to table rows.

    Args:
        trigrams: [U] numbers in [0, 2**24).
        spec: table size, rows per trigram, scheme.

    Returns:
        int32 [U, m]. "md5": each row list sorted ascending and distinct before lower-case sharing overwrites the last
        k columns. "mix32": column i lies in stratum `[i v/m, (i+1) v/m)`.
    """
    t = np.asarray(trigrams if isinstance(trigrams, np.ndarray) else list(trigrams), dtype=np.int64)
    if spec.hash_scheme == "mix32":
        return mix32_rows(t, _lower_trigrams(t), spec)
    if not t.size:
        return np.empty((0, spec.num_hashes), np.int32)
    return np.array([_md5_trigram_rows(int(number), spec) for number in t], dtype=np.int32)


def special_rows(word: str, spec: HashSpec) -> np.ndarray:
    """Hash a whole string (control token, white-space marker) to m rows: int32 [m], unsorted, repeats possible."""
    if spec.hash_scheme == "mix32":
        numbers = [np.array([_crc_number(text)], dtype=np.int64) for text in (word, word.lower())]
        return mix32_rows(numbers[0], numbers[1], spec)[0]
    m, k = spec.num_hashes, spec.num_lowercase
    texts = [f"{word}_{i}" for i in range(m - k)] + [f"{word.lower()}_lower_{i}" for i in range(k)]
    return np.array([_md5_number(word_bytes(text)) % spec.hash_vocab_size for text in texts], dtype=np.int32)


def mix32_rows(numbers: np.ndarray, lower_numbers: np.ndarray, spec: HashSpec) -> np.ndarray:
    """The "mix32" scheme: one multiply-xorshift round per column, scaled into that column's stratum.

    Args:
        numbers: int64 [U], trigram numbers or `SPECIAL_TRIGRAM` + checksum of a whole string, below 2**32.
        lower_numbers: int64 [U], the same after lower-casing; they decide the last k columns.
        spec: v divisible by m, so that the m rows of a number are distinct by construction.

    Returns:
        int32 [U, m].
    """
    m, stratum = spec.num_hashes, np.uint64(spec.hash_vocab_size // spec.num_hashes)
    column = np.arange(m, dtype=np.uint64)
    from_lower = np.arange(m) >= m - spec.num_lowercase
    number = np.where(from_lower, lower_numbers[:, None], numbers[:, None]).astype(np.uint64)  # [U, m]
    x = number * np.uint64(0x9E3779B1) + np.uint64(spec.hash_seed) + (column + np.uint64(1)) * np.uint64(0x85EBCA77)
    x &= _UINT32
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(0x85EBCA6B)) & _UINT32
    x ^= x >> np.uint64(13)
    x = (x * np.uint64(0xC2B2AE35)) & _UINT32
    x ^= x >> np.uint64(16)
    return (column * stratum + ((x * stratum) >> np.uint64(32))).astype(np.int32)


def word_pattern(word: str | bytes, spec: HashSpec, special: bool | None = None) -> WordPattern:
    """Find the rows that a word switches on.

    Args:
        word: the word; raw bytes for a piece that is no valid UTF-8.
        spec: the hash.
        special: hash the whole string instead of its trigrams. None: decided by `is_special_word`.

    Raises:
        ValueError: the word is empty.

    Example:
        >>> spec = HashSpec(hash_vocab_size=8000, num_hashes=10)
        >>> house, houses = word_pattern("house", spec), word_pattern("houses", spec)
        >>> len(house.active), len(house.active & houses.active)
        (50, 40)

    Source: Deiseroth et al. 2024, "T-FREE", section 3.1.
    """
    if not word:
        raise ValueError("word must not be empty.")
    if special is None:
        special = isinstance(word, str) and is_special_word(word)
    if special:
        rows = special_rows(word if isinstance(word, str) else word.decode("utf-8", "surrogatepass"), spec)
        return WordPattern(rows, frozenset(rows.tolist()), frozenset(), 1)
    trigrams = np.array(word_trigrams(word), dtype=np.int64)
    rows, edge = trigram_rows(trigrams, spec), is_edge_trigram(trigrams)
    return WordPattern(
        rows.reshape(-1), frozenset(rows[~edge].ravel().tolist()), frozenset(rows[edge].ravel().tolist()), len(trigrams)
    )


def fingerprint_words(words: Iterable[str | None]) -> str:
    """Name a word list: sha256 over its entries, each prefixed with its length (8 bytes; all ones for None)."""
    digest = hashlib.sha256()
    for word in words:
        data = b"" if word is None else word_bytes(word)
        digest.update((2**64 - 1 if word is None else len(data)).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@lru_cache(maxsize=1 << 18)  # natural text has tens of thousands of distinct trigrams; a table of all 2**24 is 1.3 GB
def _md5_trigram_rows(trigram: int, spec: HashSpec) -> tuple[int, ...]:
    rows = _md5_sorted_rows(trigram, spec.hash_vocab_size, spec.num_hashes)
    lower, k = _shared_lower_trigram(trigram), spec.num_lowercase
    if k and lower is not None:
        rows = rows[: spec.num_hashes - k] + _md5_sorted_rows(lower, spec.hash_vocab_size, spec.num_hashes)[-k:]
    return rows


def _md5_sorted_rows(trigram: int, table_size: int, num_hashes: int) -> tuple[int, ...]:
    rows: set[int] = set()
    for i in range(num_hashes):
        attempt = 0
        while (row := _md5_number(b"%d_%d_%d" % (trigram, i, attempt)) % table_size) in rows:
            attempt += 1
        rows.add(row)
    return tuple(sorted(rows))


def _md5_number(data: bytes) -> int:
    return int.from_bytes(hashlib.md5(data, usedforsecurity=False).digest(), "big")


def _shared_lower_trigram(trigram: int) -> int | None:
    """The lower-cased trigram if all three bytes are in [A-Za-z ] and one of them is upper-case."""
    data = trigram.to_bytes(3, "little")
    if not all(byte == 32 or 65 <= byte <= 90 or 97 <= byte <= 122 for byte in data) or data == data.lower():
        return None
    return int.from_bytes(data.lower(), "little")


def _lower_trigrams(trigrams: np.ndarray) -> np.ndarray:
    lowered = np.zeros_like(trigrams)
    for shift in (0, 8, 16):
        byte = (trigrams >> shift) & 255
        lowered |= np.where((byte >= 65) & (byte <= 90), byte + 32, byte) << shift
    return lowered


def _crc_number(text: str) -> int:
    return SPECIAL_TRIGRAM + (zlib.crc32(word_bytes(text)) & 0x7FFFFFFF)
