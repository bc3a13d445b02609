"""The factored dictionary against one `word_pattern` per word."""

import random
from collections import Counter

import pytest
import torch

from tfree_tokenizer import FactoredDictionary, HashSpec, build_factored_dictionary, word_pattern

WORDS = ["<|ws|>", "<|endoftext|>", None, b"\xc3", "aaaa", "House", "é", "a", "\ud800", "strengths"] + [
    "".join(random.Random(i).choices("abcdeABC", k=1 + i % 14)) for i in range(200)
]
SPECIAL = {0, 1}
SPECS = [
    HashSpec(hash_vocab_size=v, num_hashes=m, num_lowercase=k, hash_scheme=scheme)
    for scheme in ("md5", "mix32")
    for v, m, k in ((64, 8, 3), (8000, 10, 0), (500, 4, 2))
]


def units_of(dictionary: FactoredDictionary, word: int) -> tuple[torch.Tensor, int]:
    units = dictionary.word_units[dictionary.word_ptr[word] : dictionary.word_ptr[word + 1]].long()
    return dictionary.unit_rows[units], len(units) - int(dictionary.word_edges[word])


def corrections_of(dictionary: FactoredDictionary, word: int) -> list[tuple[int, int]]:
    here = slice(dictionary.correction_ptr[word], dictionary.correction_ptr[word + 1])
    return list(zip(dictionary.correction_rows[here].tolist(), dictionary.correction_kinds[here].tolist(), strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.hash_scheme}-{s.hash_vocab_size}")
def test_factored_words_equal_their_patterns(spec):
    dictionary = build_factored_dictionary(WORDS, spec, SPECIAL)
    pointer, rows = dictionary.active_rows()
    for i, word in enumerate(WORDS):
        if word is None:
            assert dictionary.num_trigrams[i] == 0
            continue
        pattern, (unit_rows, first_edge) = word_pattern(word, spec), units_of(dictionary, i)
        assert Counter(unit_rows.ravel().tolist()) == Counter(pattern.rows.tolist())
        inner, edge = (Counter(part.ravel().tolist()) for part in (unit_rows[:first_edge], unit_rows[first_edge:]))
        kinds = [Counter(row for row, kind in corrections_of(dictionary, i) if kind == wanted) for wanted in range(3)]
        assert inner - kinds[0] == Counter(pattern.inner)
        assert edge - kinds[1] == Counter(pattern.edge)
        assert kinds[2] == Counter(pattern.inner & pattern.edge)
        assert set(rows[pointer[i] : pointer[i + 1]].tolist()) == pattern.active


def test_select_and_join_keep_words_as_they_are():
    dictionary = build_factored_dictionary(WORDS, SPECS[0], SPECIAL)
    chosen = [5, 5, 9, 2, 40, 0]
    joined = dictionary.select(torch.tensor(chosen)).join(dictionary)
    joined.check(SPECS[0].hash_vocab_size)
    for new, old in enumerate(chosen + list(range(len(WORDS)))):
        assert torch.equal(units_of(joined, new)[0], units_of(dictionary, old)[0])
        assert units_of(joined, new)[1] == units_of(dictionary, old)[1]
        assert corrections_of(joined, new) == corrections_of(dictionary, old)


def test_memory_is_two_levels_not_one():
    words = ["".join(random.Random(i).choices("etaoinshrdlu", k=8)) for i in range(2000)]
    dictionary = build_factored_dictionary(words, HashSpec(hash_vocab_size=8000, num_hashes=10))
    flat = sum(len(word_pattern(word, HashSpec(hash_vocab_size=8000, num_hashes=10)).rows) for word in words) * 4
    assert dictionary.word_units.numel() * 4 < flat / 8


def test_an_empty_word_and_an_oversized_list_are_refused():
    with pytest.raises(ValueError, match=r"words\[1\] must not be empty"):
        build_factored_dictionary(["a", ""], SPECS[0])
    with pytest.raises(ValueError, match="at most 4000000 entries, got 4000001"):
        build_factored_dictionary([None] * 4_000_001, SPECS[0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("word_units", 10**6, r"word_units must lie in \[0, "),
        ("unit_rows", -1, r"unit_rows must lie in \[0, 64\)"),
        ("correction_kinds", 7, r"correction_kinds must lie in \[0, 3\)"),
        ("word_ptr", 5, "word_ptr does not run from 0"),
        ("word_edges", 2, "word_edges exceeds"),
    ],
)
def test_inconsistent_tensors_are_named(name, value, message):
    dictionary = build_factored_dictionary(WORDS, SPECS[0], SPECIAL)
    dictionary.check(64)
    getattr(dictionary, name).view(-1)[0] = value
    with pytest.raises(ValueError, match=message):
        dictionary.check(64)
