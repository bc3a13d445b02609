"""Words to rows: golden values, the hash rules written out once more, and their statistics."""

import hashlib
import random
import string

import numpy as np
import pytest
import torch

from tfree_tokenizer import HashSpec, fingerprint_words, special_rows, trigram_rows, word_pattern, word_trigrams
from tfree_tokenizer.remote.patterns_tfree import is_edge_trigram


def md5_number(text: str) -> int:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)


def literal_md5_rows(trigram: int, v: int, m: int, k: int) -> list[int]:
    """The rule of the released checkpoints, step by step."""

    def plain(t: int) -> list[int]:
        rows: list[int] = []
        for i in range(m):
            j = 0
            while md5_number(f"{t}_{i}_{j}") % v in rows:
                j += 1
            rows.append(md5_number(f"{t}_{i}_{j}") % v)
        return sorted(rows)

    rows, data = plain(trigram), trigram.to_bytes(3, "little")
    letters = set((string.ascii_letters + " ").encode())
    if k and set(data) <= letters and data.lower() != data:
        rows[m - k :] = plain(int.from_bytes(data.lower(), "little"))[m - k :]
    return rows


def jaccard(a: str, b: str, spec: HashSpec) -> float:
    x, y = word_pattern(a, spec).active, word_pattern(b, spec).active
    return len(x & y) / len(x | y)


def test_trigrams_are_the_distinct_byte_triples_of_the_padded_word():
    assert word_trigrams("aaaa") == [int.from_bytes(t, "little") for t in (b" aa", b"aaa", b"aa ")]
    assert word_trigrams("é") == [int.from_bytes(t, "little") for t in (b" \xc3\xa9", b"\xc3\xa9 ")]
    assert word_trigrams("\ud800") == word_trigrams("\ud800".encode("utf-8", "surrogatepass"))


def test_whole_string_rows_are_golden():
    spec = HashSpec(hash_vocab_size=64, num_hashes=8, hash_scheme="md5")
    assert special_rows("<|ws|>", spec).tolist() == [8, 10, 17, 50, 48, 43, 20, 18]


@pytest.mark.parametrize(
    ("text", "seed", "rows"),
    [
        (b" He", 0, [374, 1189, 2203, 2430, 3717, 4503, 5367, 5876, 6807, 7224]),
        (b"llo", 7, [376, 1300, 2039, 2403, 3375, 4645, 5299, 5653, 7171, 7548]),
    ],
)
def test_mix32_rows_are_golden(text, seed, rows):
    spec = HashSpec(hash_vocab_size=8000, num_hashes=10, hash_seed=seed)
    assert trigram_rows([int.from_bytes(text, "little")], spec).tolist() == [rows]


@pytest.mark.parametrize(("v", "m", "k"), [(64, 8, 0), (64, 8, 3), (8000, 10, 10), (11, 11, 2)])
def test_md5_rows_follow_the_written_rule(v, m, k):
    spec = HashSpec(hash_vocab_size=v, num_hashes=m, num_lowercase=k, hash_scheme="md5")
    trigrams = [int.from_bytes(t, "little") for t in (b" He", b"ello"[:3], b"A1b", b"XyZ", b"\xc3\x84b", b" a ")]
    assert trigram_rows(trigrams, spec).tolist() == [literal_md5_rows(t, v, m, k) for t in trigrams]


def test_whole_string_rows_share_the_lower_cased_columns():
    spec = HashSpec(hash_vocab_size=500, num_hashes=6, num_lowercase=2, hash_scheme="md5")
    expected = [md5_number(f"<|End|>_{i}") % 500 for i in range(4)] + [
        md5_number(f"<|end|>_lower_{i}") % 500 for i in (0, 1)
    ]
    assert special_rows("<|End|>", spec).tolist() == expected


@pytest.mark.parametrize("scheme", ["md5", "mix32"])
def test_rows_of_a_pattern_keep_multiplicity_and_sets_do_not(scheme):
    spec = HashSpec(hash_vocab_size=16, num_hashes=4, hash_scheme=scheme)
    pattern = word_pattern("strength", spec)
    trigrams = np.array(word_trigrams("strength"))
    rows = trigram_rows(trigrams, spec)
    assert pattern.num_trigrams == 8
    assert sorted(pattern.rows.tolist()) == sorted(rows.ravel().tolist())
    assert pattern.edge == frozenset(rows[[0, 7]].ravel().tolist())
    assert pattern.inner == frozenset(rows[1:7].ravel().tolist())
    assert is_edge_trigram(trigrams).tolist() == [True] + [False] * 6 + [True]


def test_a_word_that_looks_like_a_control_token_is_hashed_whole():
    spec = HashSpec(hash_vocab_size=64, num_hashes=8, hash_scheme="md5")
    pattern = word_pattern("<|no_ws|>", spec)
    assert pattern.num_trigrams == 1
    assert pattern.edge == frozenset()
    assert word_pattern("<|no_ws|>", spec, special=False).num_trigrams == 9


def test_related_words_share_rows_and_case_sharing_raises_the_overlap():
    for scheme in ("md5", "mix32"):
        spec = HashSpec(hash_vocab_size=8000, num_hashes=10, hash_scheme=scheme)
        assert jaccard("house", "houses", spec) > 0.5 > 0.1 > jaccard("house", "tree", spec)
        shared = HashSpec(hash_vocab_size=8000, num_hashes=10, num_lowercase=5, hash_scheme=scheme)
        assert jaccard("house", "HOUSE", shared) > jaccard("house", "HOUSE", spec) + 0.2
        assert jaccard("house", "House", shared) > jaccard("house", "House", spec)


def test_mix32_spreads_trigrams_evenly_and_independently():
    spec = HashSpec(hash_vocab_size=8000, num_hashes=10)
    letters = string.ascii_lowercase.encode()
    trigrams = np.array([a | b << 8 | c << 16 for a in letters for b in letters for c in letters])
    rows = trigram_rows(trigrams, spec)
    counts = np.bincount(rows.ravel(), minlength=8000)
    expected = len(trigrams) * 10 / 8000
    assert 0.9 < ((counts - expected) ** 2 / expected).sum() / 7999 < 1.1
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert (np.diff(np.sort(rows, axis=1)) > 0).all()
    picks = random.Random(0).sample(range(len(rows)), 2000)
    shared = np.mean([len(np.intersect1d(rows[a], rows[b])) for a, b in zip(picks[::2], picks[1::2], strict=True)])
    assert 0.002 < shared < 0.03  # m**2 / v = 0.0125


@pytest.mark.parametrize(("k", "seed"), [(0, 0), (3, 5)])
def test_numpy_and_torch_hash_alike(k, seed):
    shared_kernels = pytest.importorskip("shared_kernels")
    spec = HashSpec(hash_vocab_size=800, num_hashes=8, num_lowercase=k, hash_seed=seed)
    trigrams = np.random.default_rng(0).integers(0, 1 << 24, 500)
    rows = shared_kernels.mix32_rows(
        torch.from_numpy(trigrams), table_size=800, num_hashes=8, num_lowercase=k, seed=seed
    )
    assert torch.equal(rows, torch.from_numpy(trigram_rows(trigrams, spec)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hash_vocab_size": 7}, r"hash_vocab_size must lie in \[num_hashes = 8"),
        ({"hash_vocab_size": 2**31}, "hash_vocab_size must lie in"),
        ({"hash_vocab_size": 65}, "divisible by num_hashes"),
        ({"num_lowercase": 9}, r"num_lowercase must lie in \[0, 8\]"),
        ({"hash_scheme": "sha1"}, "hash_scheme must be one of"),
        ({"hash_scheme": "md5", "hash_seed": 3}, "hash_seed must be 0"),
        ({"hash_seed": -1}, "hash_seed must lie in"),
        ({"num_hashes": True}, "num_hashes must be an int"),
    ],
)
def test_an_impossible_hash_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        HashSpec(**({"hash_vocab_size": 64, "num_hashes": 8} | values))


def test_an_empty_word_is_refused():
    with pytest.raises(ValueError, match="word must not be empty"):
        word_pattern("", HashSpec(hash_vocab_size=64, num_hashes=8))


def test_fingerprint_depends_on_every_boundary():
    assert fingerprint_words(["ab", "c"]) != fingerprint_words(["a", "bc"])
    assert fingerprint_words([None, ""]) != fingerprint_words(["", None])
    assert fingerprint_words(["\ud800"]) == fingerprint_words(["\ud800"])
