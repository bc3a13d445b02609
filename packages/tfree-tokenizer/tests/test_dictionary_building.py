"""Dictionaries are the most frequent words, whatever the number of processes."""

from collections import Counter

import pytest

from tfree_tokenizer import TFreeTokenizer, build_dictionary
from tfree_tokenizer.dictionary_building import count_words

TEXTS = ["The house, the tree.\nThe house 2", "  house\ttree <|end|>", "Haus"] * 3


def test_words_come_by_count_and_then_by_code_point():
    words = build_dictionary(TEXTS, show_progress=False)
    assert words[:3] == ["house", "The", "tree"]
    counts = count_words(TEXTS, show_progress=False)
    assert words == sorted(counts, key=lambda word: (-counts[word], word))


def test_white_space_marks_and_special_tokens_are_no_words():
    words = build_dictionary(TEXTS, special_tokens=["<|end|>"], show_progress=False)
    assert not any(word.startswith("<|") or word.isspace() for word in words if word != "\t")
    assert "end" in build_dictionary(TEXTS, show_progress=False)


def test_limits_leave_words_out():
    assert build_dictionary(TEXTS, max_words=2, show_progress=False) == ["house", "The"]
    assert "Haus" not in build_dictionary(TEXTS, min_count=4, show_progress=False)
    assert build_dictionary(["ab " + "x" * 9], max_word_bytes=8, show_progress=False) == ["ab"]


def test_the_result_is_a_dictionary_that_a_tokenizer_accepts_in_either_ruleset():
    for ruleset in ("v1", "v2"):
        texts = ["Grüße 👩‍👩‍👧, naïve\u00a0café 東京 हिन्दी", "a\tb\r\n"]
        tokenizer = TFreeTokenizer(words=build_dictionary(texts, ruleset=ruleset, show_progress=False), ruleset=ruleset)
        ids = tokenizer.encode(texts[0])
        assert tokenizer.decode(ids) == texts[0]
        assert all(i >= tokenizer.first_word_id or i < tokenizer.first_byte_id for i in ids)


@pytest.mark.slow
def test_processes_do_not_change_the_result():
    texts = [f"word{i} shared common " * 3 for i in range(500)]
    assert build_dictionary(texts, num_proc=2, show_progress=False) == build_dictionary(texts, show_progress=False)
    assert isinstance(count_words(iter(texts), num_proc=2, show_progress=False), Counter)


def test_a_progress_bar_is_shown_on_request(capsys):
    build_dictionary(TEXTS, show_progress=True)
    assert "Counting words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_words": 0}, ValueError, "max_words must be at least 1, got 0"),
        ({"num_proc": 0}, ValueError, "num_proc must be at least 1, got 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        build_dictionary(TEXTS, show_progress=False, **arguments)


def test_a_single_string_is_refused():
    with pytest.raises(TypeError, match="texts must be an iterable of strings, got one string"):
        build_dictionary("text", show_progress=False)
