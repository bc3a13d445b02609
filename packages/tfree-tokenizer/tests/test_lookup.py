"""Ids by numpy, by regular expression and by the slow rules are the same; no text passes for a word it is not."""

import random
import time

import numpy as np
import pytest

from tests.support.word_rules import POOLS, random_texts, words_by_rule
from tfree_tokenizer.remote import lookup_tfree
from tfree_tokenizer.remote.lookup_tfree import Fixed, WordLookup
from tfree_tokenizer.remote.words_tfree import is_one_word, structural_words
from tfree_tokenizer.remote.wordtable_tfree import Keys, WordTable

RULESETS = ["v1", "v2"]
FIRST_STRUCTURAL = 4


def dictionary(ruleset):
    """Single words from the pools, some of them joined, so that texts meet known and unknown words."""
    rng = random.Random(5)
    pieces = [piece for pool in POOLS.values() for piece in pool]
    joined = ["".join(rng.choices(pieces, k=2)) for _ in range(3000)]
    return [word for word in dict.fromkeys([*pieces[::2], *joined]) if is_one_word(word, ruleset)]


def lookup(ruleset, max_word_bytes=None, **options):
    return WordLookup(
        dictionary(ruleset),
        first_structural_id=FIRST_STRUCTURAL,
        ruleset=ruleset,
        max_word_bytes=max_word_bytes,
        **options,
    )


def ids_by_rule(text, ruleset, known):
    ids = []
    markers = structural_words(ruleset)
    for word in words_by_rule(text, ruleset):
        if word in markers:
            ids.append(FIRST_STRUCTURAL + markers.index(word))
        elif word in known:
            ids.append(FIRST_STRUCTURAL + len(markers) + 512 + known[word])
        else:
            data = [FIRST_STRUCTURAL + len(markers) + byte for byte in word.encode("utf-8", "surrogatepass")]
            ids += [*data[:-1], data[-1] + 256]
    return ids


@pytest.mark.parametrize("ruleset", RULESETS)
def test_numpy_and_regular_expression_give_the_ids_of_the_slow_rules(ruleset):
    encoder = lookup(ruleset)
    known = {word: index for index, word in enumerate(dictionary(ruleset))}
    texts = list(random_texts(4_000, seed=11, any_code_points=ruleset == "v1"))
    for text, encoded in zip(texts, encoder.encode(texts), strict=True):
        expected = ids_by_rule(text, ruleset, known)
        assert encoded.ids.tolist() == expected, repr(text)
        assert encoder.encode_short(text) == expected, repr(text)


@pytest.mark.parametrize("limit", [None, 4, 7])
@pytest.mark.parametrize("ruleset", RULESETS)
def test_numpy_equals_regular_expression_for_any_code_points_and_cut_words(ruleset, limit):
    encoder = lookup(ruleset, limit)
    texts = list(random_texts(4_000, seed=12))
    for text, encoded in zip(texts, encoder.encode(texts), strict=True):
        assert encoded.ids.tolist() == encoder.encode_short(text), repr(text)


@pytest.mark.parametrize("ruleset", RULESETS)
def test_a_batch_gives_what_its_texts_give_alone(ruleset, monkeypatch):
    encoder = lookup(ruleset)
    texts = list(random_texts(300, seed=13))
    alone = [encoder.encode([text])[0].ids.tolist() for text in texts]
    assert [encoded.ids.tolist() for encoded in encoder.encode(texts)] == alone
    monkeypatch.setattr(lookup_tfree, "CHUNK_CHARACTERS", 50)
    assert [encoded.ids.tolist() for encoded in encoder.encode(texts)] == alone
    assert encoder.encode([]) == []
    assert [encoded.ids.tolist() for encoded in encoder.encode(["", "", ""])] == [[], [], []]


@pytest.mark.parametrize("ruleset", RULESETS)
def test_spans_cover_the_text_in_order(ruleset):
    encoder = lookup(ruleset, 7)
    texts = list(random_texts(2_000, seed=14))
    first = encoder.first_byte_id
    for text, encoded in zip(texts, encoder.encode(texts, with_spans=True), strict=True):
        position = 0
        for index, (start, end) in zip(encoded.ids.tolist(), encoded.spans.tolist(), strict=True):
            assert start <= end <= len(text)
            skipped = text[position:start]
            assert skipped in ("", " "), repr(text)  # nothing is left out but a space that goes without saying
            if index == FIRST_STRUCTURAL:
                assert start == end == position
            elif index < first:
                assert set(text[start:end]) in ({" "}, {"\n"})
            elif index < first + 512:
                byte = (index - first) % 256
                assert end == start + 1
                assert byte in text[start].encode("utf-8", "surrogatepass")
            else:
                assert text[start:end] == dictionary_word(encoder, index)
            position = end
        assert text[position:] == ""


def dictionary_word(encoder, index):
    return encoder._words[index - encoder.first_word_id]


def test_given_ids_stand_where_they_were_put():
    encoder = lookup("v1")
    text = "a <X> 1<Y>"
    [encoded] = encoder.encode([text], [[Fixed(2, 5, (0,)), Fixed(7, 10, (1, 2))]], with_spans=True)
    single = encoder.spell("a") if "a" not in encoder._words else (encoder.first_word_id + encoder._words.index("a"),)
    space = FIRST_STRUCTURAL + 1
    one = encoder.encode_short("1")
    assert encoded.ids.tolist() == [*single, space, 0, space, *one, 1, 2]
    assert encoded.spans.tolist()[-5:] == [[2, 5], [5, 6], [6, 7], [7, 10], [7, 10]]


def test_hidden_words_are_spelled():
    encoder = lookup("v1", hidden=[3])
    hidden, other = encoder._words[3], encoder._words[4]
    spelled = list(encoder.spell(hidden))
    assert encoder.encode_short(hidden) == spelled
    assert encoder.encode([hidden])[0].ids.tolist() == spelled
    assert encoder.encode([other])[0].ids.tolist() == encoder.encode_short(other) == [encoder.first_word_id + 4]


def keys_of(words):
    data = "".join(words).encode("utf-8", "surrogatepass")
    lengths = np.array([len(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.int64)
    return Keys(np.frombuffer(data, dtype=np.uint8), np.cumsum(lengths) - lengths, lengths)


def random_words(count, seed, longest=40):
    rng = random.Random(seed)
    letters = "abcdeäßжя日\ud800\0"
    return list(dict.fromkeys("".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(count)))


@pytest.mark.parametrize("hashes", ["as they are", "few", "one"])
def test_words_are_found_exactly_whatever_the_hash(hashes, monkeypatch):
    if hashes != "as they are":
        init = Keys.__init__

        def poor_hashes(self, *args):
            init(self, *args)
            self.hashes = self.hashes & np.uint64(0xF000000000000000 if hashes == "few" else 0)

        monkeypatch.setattr(Keys, "__init__", poor_hashes)
        # With equal hashes, equal lengths no longer prove one-lane words equal: let every word have a second lane.
        words = ["prefix--" + word for word in random_words(300, seed=1)]
    else:
        words = random_words(20_000, seed=1)
    queries = [*words[::3], *(word + "a" for word in words[::5]), *(word[:-1] + "b" for word in words[::7])]
    position = {word: index for index, word in enumerate(words)}
    found = WordTable(words).find(keys_of(queries))
    assert found.tolist() == [position.get(query, -1) for query in queries]


def test_words_of_one_lane_and_equal_length_never_share_a_hash():
    words = [word.replace("\0", "x") for word in random_words(50_000, seed=3, longest=3)]
    words = [word for word in dict.fromkeys(words) if len(word.encode("utf-8", "surrogatepass")) <= 8]
    assert len(words) > 1000
    assert len(np.unique(keys_of(words).hashes)) == len(words)


@pytest.mark.parametrize("ruleset", RULESETS)
@pytest.mark.parametrize("unit", ["a", "a ", " ", "\n", ".", "ab  ", "日", "\u0301", "👨\u200d", "🇩", "1\u0301"])
def test_encoding_takes_linear_time(unit, ruleset):
    text = unit * (100_000 // len(unit))
    encoder = lookup(ruleset, 256)
    encoder.encode(["warm up"])
    start = time.process_time()
    [encoded] = encoder.encode([text])
    assert time.process_time() - start < 1
    assert encoded.ids.tolist() == encoder.encode_short(text)


def test_building_a_table_is_fast():
    words = random_words(100_000, seed=4, longest=12)
    start = time.process_time()
    WordTable(words)
    assert time.process_time() - start < 1
