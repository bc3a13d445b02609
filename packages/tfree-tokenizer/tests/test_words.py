"""Words and back: golden splits, the rules read slowly, losslessness, linear time."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.word_rules import random_texts, space_expected, words_by_rule
from tfree_tokenizer import expects_space, join_words, split_words, structural_words
from tfree_tokenizer.remote.characters_tfree import KIND_BITS, MARK, character_table
from tfree_tokenizer.remote.words_tfree import cut_word, is_one_word, is_spaceless

RULESETS = ["v1", "v2"]
LINE = "<|\n|>"
texts = st.text(st.characters(codec=None, categories=None))  # surrogates included


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("Hello World!", ["Hello", "World", "!"]),
        ("1a a1 1 a", ["1", "<|no_ws|>", "a", "a", "1", "<|ws|>", "1", "a"]),
        ("\n" * 9, ["<|4<-\n->|>", "<|4<-\n->|>", LINE]),
        ("a\tb", ["a", "<|no_ws|>", "\t", "<|no_ws|>", "b"]),
        (" a  b ", ["<|ws|>", "a", "<|2<-ws->|>", "b", "<|ws|>"]),
        (" " * 7, ["<|4<-ws->|>", "<|2<-ws->|>", "<|ws|>"]),
        ("a\n\nb \n", ["a", "<|2<-\n->|>", "b", "<|ws|>", LINE]),
        ("don't", ["don", "'", "t"]),
        ("f(x)=2", ["f", "<|no_ws|>", "(", "x", ")", "=", "2"]),
        ("e\u0301te", ["e", "<|no_ws|>", "\u0301", "<|no_ws|>", "te"]),
        ("x² ª", ["x²", "ª"]),
        ("<|ws|>", ["<", "|", "<|no_ws|>", "ws", "<|no_ws|>", "|", ">"]),
        ("日本 日", ["日本", "日"]),
    ],
)
def test_v1_splits_as_published(text, words):
    assert split_words(text) == words


def test_any_syntax_keeps_what_looks_special_whole():
    assert split_words("Hello<|startoftext|> World!", special_syntax="any") == [
        "Hello", "<|startoftext|>", "<|ws|>", "World", "!",
    ]  # fmt: skip
    assert split_words("<|>", special_syntax="any") == ["<|>"]
    assert split_words("<|a|>x<|>", special_syntax="any") == ["<|a|>", "x", "<|no_ws|>", "<", "|", ">"]
    assert split_words("<|a\nb|>", special_syntax="any") == ["<|a\nb|>"]
    assert split_words("x <|a\nb|>", special_syntax="any")[:4] == ["x", "<", "|", "<|no_ws|>"]
    assert split_words("<|a|><|b|>|>", special_syntax="any") == ["<|a|>", "<|b|>", "|", ">"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("e\u0301te\u0301 1\u0301a", ["e\u0301te\u0301", "<|ws|>", "1\u0301", "<|no_ws|>", "a"]),
        ("\u0301a", ["\u0301", "<|no_ws|>", "a"]),
        ("a \u0301", ["a", "\u0301"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("👨‍👩‍👧 x", ["👨‍👩‍👧", "x"]),
        ("👍🏽!", ["👍🏽", "!"]),
        ("1️⃣", ["1️⃣"]),
        ("🇩🇪🇫🇷🇮", ["🇩🇪", "<|no_ws|>", "🇫🇷", "<|no_ws|>", "🇮"]),
        ("🏴\U000e0067\U000e0062\U000e007f.", ["🏴\U000e0067\U000e0062\U000e007f", "."]),
        ("日本。か\u3099", ["日", "本", "。", "か\u3099"]),
        ("日 本", ["日", "<|ws|>", "本"]),
        ("กำลัง", ["ก", "ำ", "ลั", "ง"]),
        ("ｶﾞ", ["ｶ", "ﾞ"]),
        ("a日", ["a", "<|no_ws|>", "日"]),
        ("a\tb\r\n\u00a0c\u3000d", ["a", "\t", "b", "\r", LINE, "\u00a0", "c", "\u3000", "d"]),
        (" " * 31, ["<|16<-ws->|>", "<|8<-ws->|>", "<|4<-ws->|>", "<|2<-ws->|>", "<|ws|>"]),
        ("\n" * 9, ["<|4<-\n->|>", "<|4<-\n->|>", LINE]),
    ],
)
def test_v2_keeps_clusters_whole(text, words):
    assert split_words(text, "v2") == words
    assert join_words(words, "v2") == text


@pytest.mark.parametrize("ruleset", RULESETS)
def test_splitting_follows_the_rules_step_by_step(ruleset):
    for text in random_texts(6_000, seed=1, any_code_points=ruleset == "v1"):
        assert split_words(text, ruleset) == words_by_rule(text, ruleset), repr(text)


@pytest.mark.parametrize("ruleset", RULESETS)
def test_every_string_comes_back(ruleset):
    specials = ("<|endoftext|>", "<|", "a", "<|endoftext|>!")
    for text in random_texts(5_000, seed=2):
        for options in ({}, {"special_tokens": specials}):
            words = split_words(text, ruleset, **options)
            assert join_words(words, ruleset, **options) == text, repr(text)
            short = split_words(text, ruleset, max_word_bytes=5, **options)
            assert join_words(short, ruleset, **options) == text, repr(text)
    for text in random_texts(2_000, seed=3):
        if not any(marker in text for marker in structural_words(ruleset)):
            assert join_words(split_words(text, ruleset, special_syntax="any"), ruleset, special_syntax="any") == text


@settings(max_examples=200, derandomize=True, deadline=None)
@given(text=texts, ruleset=st.sampled_from(RULESETS), limit=st.sampled_from([None, 4, 9]))
def test_any_text_hypothesis_finds_comes_back(text, ruleset, limit):
    assert join_words(split_words(text, ruleset, max_word_bytes=limit), ruleset) == text


@pytest.mark.parametrize("ruleset", RULESETS)
def test_a_space_is_expected_by_the_rule(ruleset):
    words = ["a", "1", ".", ",", "(", ")", "_", "日", "か\u3099", "\t", "ก", "\u0301", "😀", "|", "<", ">", "{", "é-"]
    for left in words:
        for right in words:
            assert expects_space(left, right, ruleset) == space_expected(left, right, ruleset), (left, right)
    assert not expects_space("", "a", ruleset)
    assert not expects_space("a", "", ruleset)


def test_scripts_without_spaces_are_told_by_their_names():
    names = "CJK UNIFIED,HIRAGANA LETTER,KATAKANA LETTER,HALFWIDTH KATAKANA,BOPOMOFO LETTER,THAI CHARACTER,LAO LETTER"
    others = "LATIN,GREEK,CYRILLIC,ARABIC LETTER,HEBREW,DEVANAGARI,HANGUL SYLLABLE,TAMIL,ETHIOPIC,FULLWIDTH LATIN"
    for code in [*range(0x30, 0x3400), *range(0x9F00, 0x20010)]:
        name = unicodedata.name(chr(code), "")
        if name.startswith((*names.split(","), "KHMER LETTER", "MYANMAR LETTER")):
            assert is_spaceless(chr(code)), name
        elif name.startswith(tuple(others.split(","))):
            assert not is_spaceless(chr(code)), name


def test_every_combining_mark_is_known():
    marks = {c for c in range(0x110000) if unicodedata.category(chr(c))[0] == "M"}
    found = {int(c) for c in ((character_table("v2") & KIND_BITS) == MARK).nonzero()[0]}
    assert found == marks | {0x200C}


def test_registered_tokens_are_taken_from_the_left_and_the_longest_first():
    assert split_words("<a><a>b", special_tokens=["<a>", "<a>b"]) == ["<a>", "<a>b"]
    assert split_words("a.c abc", special_tokens=["a.c"]) == ["a.c", "<|ws|>", "abc"]  # not a pattern
    assert split_words("xx|yy", special_tokens=["x|y"]) == ["x", "x|y", "y"]
    assert split_words("a PAD b", special_tokens=["PAD"]) == ["a", "<|ws|>", "PAD", "<|ws|>", "b"]


def test_long_words_are_cut_between_characters():
    assert split_words("abcdefghij", max_word_bytes=4) == ["abcd", "<|no_ws|>", "efgh", "<|no_ws|>", "ij"]
    assert split_words("ééé", max_word_bytes=5) == ["éé", "<|no_ws|>", "é"]
    assert cut_word("a日本", 4) == ["a日", "本"]
    assert split_words("か\u3099\u3099", "v2", max_word_bytes=6) == ["か\u3099", "\u3099"]


def test_one_word_is_one_word():
    assert is_one_word("Haus")
    assert is_one_word("日本")
    assert not is_one_word("日本", "v2")
    assert not any(is_one_word(text) for text in ["", " ", "\n", "a b", "a1", "11"])


@pytest.mark.parametrize("ruleset", RULESETS)
@pytest.mark.parametrize("syntax", ["registered", "any"])
@pytest.mark.parametrize(
    "unit",
    ["a", "a ", "<|", "<|\n", "|>", " ", "\n", ".", "日", "日 ", "ก", "\u0301", "👨\u200d", "🇩", "1", "<<|", "\ud800"],
)
def test_splitting_takes_linear_time(unit, syntax, ruleset):
    text = unit * (100_000 // len(unit))
    options = {"special_tokens": ["<|endoftext|>", "<<<|"], "special_syntax": syntax}
    start = time.process_time()
    words = split_words(text, ruleset, max_word_bytes=256, **options)
    assert time.process_time() - start < 1
    assert join_words(words, ruleset, **options) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ruleset": "v3"}, 'ruleset must be "v1" or "v2", got \'v3\''),
        ({"special_syntax": "all"}, 'special_syntax must be "registered" or "any", got \'all\''),
        ({"special_tokens": [""]}, "special_tokens must be a collection of strings that are not empty"),
        ({"special_tokens": "abc"}, "special_tokens must be a collection of strings"),
        ({"max_word_bytes": 3}, "max_word_bytes must be None or an integer of at least 4, got 3"),
        ({"max_word_bytes": True}, "max_word_bytes must be None or an integer of at least 4, got True"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        split_words("a", **options)
