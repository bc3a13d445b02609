"""The measures, on cases that can be worked out by hand."""

import math

import pytest

from miniatures.tfree.evaluate import (
    ScoredText,
    bits_per_byte,
    dictionary_word_spans,
    escape_share,
    escaped_bits,
    mean_and_sd,
    word_accuracy,
    word_hits,
)
from miniatures.tfree.spelling import SpellingModel


def scored(text, *units):
    """Units are (first character, end, bits, right)."""
    return ScoredText(text, [(a, b) for a, b, _, _ in units], [bits for *_, bits, _ in units], [r for *_, r in units])


def test_bits_per_byte_divides_by_utf8_bytes_over_all_texts():
    texts = [scored("é", (0, 1, 6.0, True)), scored("ab", (0, 1, 1.0, True), (1, 2, 1.0, True))]
    assert bits_per_byte(texts) == 8.0 / 4


def test_a_word_is_right_only_if_all_its_pieces_are():
    pieces = scored("go home now", (0, 2, 1, True), (2, 5, 1, True), (5, 7, 1, False), (7, 11, 1, True))
    assert word_hits(pieces) == [True, False, True]
    assert word_accuracy([pieces]) == 2 / 3


def test_a_piece_over_two_words_decides_both():
    assert word_hits(scored('a."', (0, 1, 1, True), (1, 3, 1, False))) == [True, False, False]


def test_spaces_and_empty_markers_count_for_the_word_that_follows():
    whole = scored("a1\n\nb", (0, 1, 1, True), (1, 1, 1, False), (1, 2, 1, True), (2, 4, 1, True), (4, 5, 1, True))
    assert word_hits(whole) == [True, False, True]
    line = scored("a1\n\nb", (0, 1, 1, True), (1, 1, 1, True), (1, 2, 1, True), (2, 4, 1, False), (4, 5, 1, True))
    assert word_hits(line) == [True, True, False]


def test_trailing_space_belongs_to_no_word():
    assert word_hits(scored("a ", (0, 1, 1, True), (1, 2, 1, False))) == [True]


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match=r"one entry per unit, got \(1, 2, 1\)"):
        ScoredText("a", [(0, 1)], [1.0, 2.0], [True])


def test_spans_follow_implied_spaces_markers_and_packs():
    text = "Hello you  1a\n"
    units = ["Hello", "you", "<|2<-ws->|>", "1", "<|no_ws|>", "a", "<|\n|>"]
    widths = [None, None, 2, None, 0, None, 1]
    spans = dictionary_word_spans(text, units, widths)
    assert spans == [(0, 5), (6, 9), (9, 11), (11, 12), (12, 12), (12, 13), (13, 14)]


@pytest.mark.parametrize("units", [["Hello"], ["Hello", "me"], ["Hello", "you", "all"]])
def test_words_that_do_not_spell_the_text_are_refused(units):
    with pytest.raises(ValueError, match="units must spell the text"):
        dictionary_word_spans("Hello you", units, [None] * len(units))


def test_an_escape_costs_its_probability_and_leaves_the_rest_to_the_dictionary():
    assert escaped_bits(3.0, in_dictionary=False, escape_probability=0.25) == 5.0
    assert escaped_bits(3.0, in_dictionary=True, escape_probability=0.5) == 4.0
    assert escape_share(["a", "b", "a", "c"], frozenset("ab")) == 1.5 / 5
    assert 0 < escape_share(["a"], frozenset("a")) < 0.5


def test_mean_and_sample_deviation():
    assert mean_and_sd([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_sd([4.0]) == (4.0, 0.0)


def test_spelling_is_a_distribution_over_every_continuation():
    model = SpellingModel(["the", "then", "ten", "é"])
    for context in ([256, 256], [256, ord("t")], [ord("t"), ord("h")], [1, 2]):
        assert math.isclose(sum(model._probability(context, symbol) for symbol in range(257)), 1.0)


def test_spelling_without_words_is_uniform_and_seen_words_are_cheaper():
    assert math.isclose(SpellingModel([]).bits("ab"), 3 * math.log2(257))
    model = SpellingModel(["house", "houses", "mouse"])
    assert model.bits("mouses") < model.bits("esuohm") < 7 * 16
