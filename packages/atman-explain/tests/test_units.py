"""Units: every granularity, delimiters, spans, chunks and image tiles, on every kind of tokenizer."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atman_explain.remote.prompts_atman import EncodedPrompt, ImageColumns, encode_prompts
from atman_explain.remote.segments_atman import text_spans
from atman_explain.remote.units_atman import (
    Unit,
    columns_of_span,
    delimiter_chunks,
    find_spans,
    overlap_factor,
    split_units,
    target_units,
)
from tests.support.atman_tokenizers import SlowTokenizer, byte_level, sentence_piece, word_piece

TOKENIZERS = {
    "byte-level": byte_level(control=("<|im_start|>", "<|im_end|>")),
    "byte-level-trimmed": byte_level(trim_offsets=True),
    "sentence-piece": sentence_piece(),
    "word-piece": word_piece(),
}
TEXT = "Oslo is the capital. It eats!\n\nthe panda"
SPEC_IDS = (0, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 3, 4, 9, 9, 9, 2, 1, 3, 56, 2)


def encoded(tokenizer, text) -> EncodedPrompt:
    return encode_prompts(tokenizer, text)[0][0]


def of_ids(*ids, **fields) -> EncodedPrompt:
    prompt = encode_prompts(None, list(ids))[0][0]
    return EncodedPrompt(**{**vars(prompt), **fields})


def texts(prompt, **options) -> list[str]:
    return [unit.text for unit in split_units(prompt, **options)]


def pictured(rows=4, columns=6, before=2, after=1) -> EncodedPrompt:
    """Two text tokens, an image, and one text token; ids without a tokenizer."""
    patches = tuple(range(before, before + rows * columns))
    ids = [1, 2, *([9] * len(patches)), *([3] * after)]
    return of_ids(*ids, images=(ImageColumns(columns=patches, grid=(rows, columns)),))


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def test_tokens_are_units_with_their_place(tokenizer):
    prompt = encoded(tokenizer, TEXT)
    units = split_units(prompt)
    plain = [column for column, is_special in enumerate(prompt.special) if not is_special]
    assert [unit.columns for unit in units] == [(column,) for column in plain]
    assert all(unit.tokens == unit.columns and unit.kind == "text" and unit.shares is None for unit in units)
    assert [unit.span for unit in units] == [prompt.spans[column] for column in plain]
    assert [unit.text for unit in units] == [prompt.tokens[column] for column in plain]


def test_words_are_the_tokenizers_and_never_hold_a_space_inside(tokenizer):
    text = "Oslo is  capitols of Nörway."
    units = split_units(encoded(tokenizer, text), granularity="word")
    assert "".join(unit.text for unit in units).replace(" ", "") == text.replace(" ", "")
    words = [unit.text.strip() for unit in units if unit.text.strip()]
    assert words in (["Oslo", "is", "capitols", "of", "Nörway", "."], ["Oslo", "is", "capitols", "of", "Nörway."])


def test_words_without_the_tokenizers_account_are_what_stands_between_spaces():
    prompt = encoded(byte_level(), "Oslo's  panda (it)\neats")
    assert texts(EncodedPrompt(**{**vars(prompt), "word_ids": None}), granularity="word") == [
        "Oslo's", "  panda", " (it)", "\neats",
    ]  # fmt: skip


def test_a_tokenizer_that_takes_a_text_for_one_word_is_not_believed():
    prompt = encoded(sentence_piece(), "Oslo is the capital")
    assert set(prompt.word_ids) == {None, 0}
    assert texts(prompt, granularity="word") == ["Oslo", " is", " the", " capital"]


def test_sentences_and_paragraphs_hold_the_whole_text(tokenizer):
    prompt = encoded(tokenizer, TEXT)
    assert texts(prompt, granularity="sentence") == ["Oslo is the capital. ", "It eats!\n\n", "the panda"]
    assert texts(prompt, granularity="paragraph") == ["Oslo is the capital. It eats!\n\n", "the panda"]


def test_a_token_across_a_border_belongs_where_it_begins():
    prompt = encoded(byte_level(), "Oslo. It eats")
    merged = EncodedPrompt(
        input_ids=(1, 2, 3), text="Oslo. It eats", tokens=("Oslo. I", "t", " eats"),
        spans=((0, 7), (7, 8), (8, 13)), special=(False,) * 3,
    )  # fmt: skip
    assert [unit.columns for unit in split_units(merged, granularity="sentence")] == [(0,), (1, 2)]
    spaced = [unit.text for unit in split_units(prompt, granularity="sentence")]
    assert spaced == ["Oslo. ", "It eats"]  # the token " It" begins the second sentence, for its space does not count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ("one. two.", ["one. ", "two."]),
        ("Dr. A. Smith ate e.g. rice. Then 3.14 pies.", ["Dr. A. Smith ate e.g. rice. ", "Then 3.14 pies."]),
        ("1. First. 2. Second.", ["1. First. ", "2. Second."]),
        ("In 2023. Then", ["In 2023. ", "Then"]),
        ('"Why?" she asked. (So.) "Yes." He', ['"Why?" she asked. ', "(So.) ", '"Yes." ', "He"]),
        ("Wait... what?! No", ["Wait... ", "what?! ", "No"]),
        ("一。二！三", ["一。", "二！", "三"]),
        ("Title\n\nText line\nmore\n \n\nEnd", ["Title\n\n", "Text line\nmore\n \n\n", "End"]),
        ("  \n\n lead. two", ["  \n\n lead. ", "two"]),
        ("a\u2029b", ["a\u2029", "b"]),
        ("...", ["..."]),
        ("   ", ["   "]),
        ("x", ["x"]),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_would_end_them(text, expected):
    assert [text[slice(*span)] for span in text_spans(text, "sentence")] == expected


def test_words_and_paragraphs_of_a_text_tile_it():
    text = " One two\nthree\r\n\r\nfour "
    assert [text[slice(*span)] for span in text_spans(text, "word")] == [" One ", "two\n", "three\r\n\r\n", "four "]
    assert [text[slice(*span)] for span in text_spans(text, "paragraph")] == [" One two\nthree\r\n\r\n", "four "]


@pytest.mark.parametrize(
    "piece", [".", " ", "\n", "a", '."', ". ", "1. ", "a. ", ".\n", "\n\n", '")', "?!", "。", "a\n\n"]
)
@pytest.mark.parametrize("granularity", ["word", "sentence", "paragraph"])
def test_hostile_text_is_cut_in_linear_time(piece, granularity):
    text = (piece * 100_000)[:100_000] + "x"
    start = time.process_time()
    spans = text_spans(text, granularity)
    assert time.process_time() - start < 1.0
    assert spans[0][0] == 0 and spans[-1][1] == len(text)


def test_special_tokens_are_no_units_unless_asked_for():
    prompt = encoded(word_piece(), "Oslo is. It")
    assert texts(prompt) == ["Oslo", "is", ".", "It"]
    assert texts(prompt, include_special=True)[0] == "[CLS]" and texts(prompt, include_special=True)[-1] == "[SEP]"
    assert texts(prompt, granularity="word", include_special=True) == ["[CLS]", "Oslo", "is", ".", "It", "[SEP]"]
    assert texts(prompt, granularity="sentence", include_special=True) == ["[CLS]", "Oslo is. ", "It", "[SEP]"]


def test_control_tokens_end_words_sentences_and_paragraphs():
    prompt = encoded(TOKENIZERS["byte-level"], "<|im_start|>the panda<|im_end|>eats")
    assert texts(prompt, granularity="sentence") == ["the panda", "eats"]
    assert texts(prompt, granularity="paragraph") == ["the panda", "eats"]
    assert texts(prompt, granularity="word") == ["the", " panda", "eats"]
    assert texts(prompt, granularity="sentence", include_special=True) == [
        "<|im_start|>", "the panda", "<|im_end|>", "eats",
    ]  # fmt: skip


def test_excluded_columns_are_in_no_unit():
    prompt = of_ids(5, 6, 7, 8)
    assert [unit.columns for unit in split_units(prompt, exclude=(0, -1))] == [(1,), (2,)]
    assert [unit.columns for unit in split_units(prompt, chunks=[[0, 1], [3]], exclude=(0, 3))] == [(1,)]
    assert len(split_units(prompt, exclude=torch.tensor([0]))) == len(split_units(prompt, exclude=np.array([0]))) == 3
    with pytest.raises(ValueError, match=r"exclude must hold columns in \[-4, 3\], got 4"):
        split_units(prompt, exclude=(4,))


def test_chunks_of_ids_end_with_their_delimiter():
    assert [end for _, end in delimiter_chunks(SPEC_IDS, [(3, 4)])] == [6, 9, 15, 23]
    units = split_units(of_ids(*SPEC_IDS), delimiter=(3, 4))
    assert [unit.columns[-1] + 1 for unit in units] == [6, 9, 15, 23]
    assert [unit.columns[0] for unit in units] == [0, 6, 9, 15]
    assert units[1].text == "<5><3><4>"
    assert split_units(of_ids(*SPEC_IDS), granularity="delimiter", delimiter=[[3, 4]]) == units


def test_the_longest_delimiter_wins_and_delimiters_do_not_overlap():
    assert delimiter_chunks([1, 1, 1, 2, 1], [(1,), (1, 1)]) == [(0, 2), (2, 3), (3, 5)]
    assert delimiter_chunks([7, 8], [(9,)]) == [(0, 2)]
    assert delimiter_chunks([9, 9], [(9,)]) == [(0, 1), (1, 2)]


def test_a_delimiter_is_found_in_the_text_even_inside_a_token(tokenizer):
    prompt = encoded(tokenizer, "Oslo; is. the; it")
    assert texts(prompt, delimiter=";") == texts(prompt, delimiter=[";"])
    assert [text.strip() for text in texts(prompt, delimiter=";")] == ["Oslo;", "is. the;", "it"]
    assert [text.strip() for text in texts(prompt, delimiter=[";", "."])] == ["Oslo;", "is.", "the;", "it"]
    assert [text.strip() for text in texts(prompt, delimiter=". ")] == ["Oslo; is.", "the; it"]
    assert len(texts(prompt, delimiter="@")) == 1
    merged = EncodedPrompt(
        input_ids=(1, 2), text="a.\n\nb", tokens=("a.\n\n", "b"), spans=((0, 4), (4, 5)), special=(False, False)
    )
    assert texts(merged, delimiter="\n") == ["a.\n\n", "b"]


def test_a_delimiter_is_cut_into_tokens_where_places_are_unknown():
    tokenizer = SlowTokenizer()
    prompt = encoded(tokenizer, "ab. cd. e")
    assert texts(prompt, delimiter=". ", tokenizer=tokenizer) == ["ab. ", "cd. ", "e"]
    with pytest.raises(ValueError, match=r"delimiter='\. ' needs a tokenizer; give the delimiter as token ids"):
        split_units(prompt, delimiter=". ")


def test_a_control_token_can_be_a_delimiter():
    prompt = encoded(TOKENIZERS["byte-level"], "<|im_start|>the<|im_end|><|im_start|>panda<|im_end|>")
    assert texts(prompt, delimiter="<|im_end|>") == ["the", "panda"]
    index = TOKENIZERS["byte-level"].convert_tokens_to_ids("<|im_end|>")
    assert texts(prompt, delimiter=[index]) == ["the", "panda"]


@pytest.mark.parametrize("delimiter", ["", [], [""], [[]], [1, "a"], [[1], "a"], True, 3.5])
def test_a_bad_delimiter_is_refused(delimiter):
    with pytest.raises(ValueError, match="delimiter must be "):
        split_units(of_ids(1, 2), delimiter=delimiter)


def test_spans_take_every_token_they_touch():
    prompt = encoded(byte_level(), "Oslo is the capital")
    (unit,) = split_units(prompt, spans=[(2, 6)])
    assert (unit.text, unit.columns, unit.span, unit.shares) == ("lo i", (0, 1), (2, 6), None)


def test_partial_overlap_keeps_the_covered_fraction():
    prompt = encoded(byte_level(), "Oslo is the capital")
    (unit,) = split_units(prompt, spans=[(2, 6)], overlap="partial")
    assert unit.shares == (0.5, 0.5)  # "lo" of "Oslo", "i" of " is", whose space does not count
    assert overlap_factor(2.0, unit.shares[0]) == 1.5
    assert overlap_factor(0.1, 1.0) == pytest.approx(0.1) and overlap_factor(0.1, 0.0) == 1.0
    (whole,) = split_units(prompt, spans=[find_spans(prompt.text, "is the")[0]], overlap="partial")
    assert (whole.columns, whole.shares) == ((1, 2), None)


def test_a_span_of_space_takes_tokens_of_space_only():
    prompt = encoded(sentence_piece(), "Oslo  is")
    column = prompt.tokens.index(" ")
    assert columns_of_span(prompt, (4, 5)) == ((column,), None)
    with pytest.raises(ValueError, match=r"spans must touch a token, got \(4, 5\), which is ' ' in the prompt"):
        columns_of_span(encoded(word_piece(), "Oslo is"), (4, 5))


def test_bytes_of_a_character_are_all_touched():
    prompt = encoded(byte_level(), "a ö")
    assert columns_of_span(prompt, (2, 3), "partial") == ((2, 3), None)


@pytest.mark.parametrize("span", [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_a_span_outside_the_text_is_refused(span):
    with pytest.raises(ValueError, match="spans must satisfy 0 <= start < end <= 4, the length of the prompt, got"):
        split_units(encoded(byte_level(), "Oslo"), spans=[span])


def test_spans_of_excluded_columns_lose_their_shares_too():
    prompt = encoded(byte_level(), "Oslo is")
    (unit,) = split_units(prompt, spans=[(2, 6)], overlap="partial", exclude=[0])
    assert (unit.columns, unit.shares) == ((1,), (0.5,))


def test_chunks_are_units_in_the_given_order():
    units = split_units(encoded(byte_level(), "Oslo is the capital"), chunks=[[3], [1, 0]])
    assert [(unit.columns, unit.text) for unit in units] == [((3,), " capital"), ((0, 1), "Oslo is")]
    apart = split_units(of_ids(5, 6, 7), chunks=[(-1, 0)])
    assert [(unit.columns, unit.text, unit.span) for unit in apart] == [((0, 2), "<5><7>", None)]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([[0, 1], [2, 1]], r"chunks must not overlap, got the tokens \[1\] in chunks\[1\] and in one before it"),
        ([[0], []], r"chunks\[1\] must not be empty"),
        ([[0, 3]], r"chunks\[0\] must hold columns in \[-3, 2\], got 3"),
        ([[True]], r"chunks\[0\] must hold columns in \[-3, 2\], got True"),
        ([["a"]], r"chunks\[0\] must hold columns in \[-3, 2\], got 'a'"),
        ([], r"chunks must be lists of columns, such as .*got \(\)"),
    ],
)
def test_bad_chunks_are_refused(chunks, message):
    with pytest.raises(ValueError, match=message):
        split_units(of_ids(1, 2, 3), chunks=chunks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"granularity": "letter"},
            "granularity must be one of token, word, sentence, paragraph, delimiter, got 'letter'",
        ),
        ({"granularity": "auto"}, "granularity must be one of"),
        ({"granularity": "delimiter"}, 'granularity="delimiter" needs delimiter'),
        ({"overlap": "half"}, "overlap must be one of complete, partial, got 'half'"),
        ({"units": "images"}, "units must be one of all, text, image, got 'images'"),
        (
            {"spans": [(0, 1)], "chunks": [[0]]},
            "only one of delimiter, spans and chunks can be given, got spans and chunks",
        ),
        ({"tiles": (0, 2)}, r"tiles must be two numbers of at least 1, rows and columns, got \(0, 2\)"),
        ({"tiles": (2,)}, "tiles must be two numbers of at least 1"),
        ({"units": "image"}, "units='image' leaves no unit of the 2 tokens: .* there is no image"),
        ({"exclude": (0, 1)}, "leaves no unit"),
    ],
)
def test_bad_choices_are_refused_with_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        split_units(of_ids(1, 2), **options)


@pytest.mark.parametrize(
    "options", [{"granularity": g} for g in ("word", "sentence", "paragraph")] + [{"spans": [(0, 1)]}]
)
def test_a_slow_tokenizer_has_tokens_and_chunks_only(options):
    prompt = encoded(SlowTokenizer(), "a cab")
    assert texts(prompt) == ["a", " ", "c", "a", "b"]
    assert texts(prompt, chunks=[[2, 3, 4]]) == ["cab"]
    with pytest.raises(ValueError, match="does not tell; use a fast tokenizer, or pass chunks="):
        split_units(prompt, **options)


def test_one_token_is_one_unit():
    for granularity in ("token", "word", "sentence", "paragraph"):
        assert texts(encoded(byte_level(), "Oslo"), granularity=granularity) == ["Oslo"]


def test_target_tokens_but_the_last_are_units():
    units = target_units([7, 8, 9], ["a", "b", "c"], first_column=5)
    assert units == [Unit(text="a", columns=(5,), kind="target"), Unit(text="b", columns=(6,), kind="target")]
    assert target_units([7], ["a"], first_column=5) == []


def test_phrases_are_found_as_often_as_they_occur():
    assert find_spans("a cat, a cat", "cat") == [(2, 5), (9, 12)]
    assert find_spans("a cat, a cat", "cat", occurrence=1) == [(9, 12)]
    assert find_spans("aaa", "aa") == [(0, 2)]


@pytest.mark.parametrize(
    ("phrase", "occurrence", "message"),
    [
        ("dog", None, "'dog' was not found in the prompt"),
        ("Cat", None, "'Cat' was not found in the prompt; capitals and spaces must agree"),
        ("", None, "phrase must not be empty"),
        ("cat", 2, r"occurrence must lie in \[0, 1\] for 'cat', got 2"),
        ("cat", -1, r"occurrence must lie in \[0, 1\] for 'cat', got -1"),
    ],
)
def test_a_phrase_that_is_not_there_is_quoted(phrase, occurrence, message):
    with pytest.raises(ValueError, match=message):
        find_spans("a cat, a cat", phrase, occurrence)


def test_every_patch_is_a_unit_among_the_tokens():
    units = split_units(pictured(2, 3))
    assert [unit.columns for unit in units] == [(column,) for column in range(9)]
    assert [unit.kind for unit in units] == ["text"] * 2 + ["image"] * 6 + ["text"]
    assert (units[6].text, units[6].image, units[6].box) == ("image 0 [1,1]", 0, (1, 1, 1, 1))
    assert len(split_units(pictured(2, 3), units="image")) == 6
    assert [unit.columns for unit in split_units(pictured(2, 3), units="text")] == [(0,), (1,), (8,)]


def test_tiles_are_as_even_as_possible_and_cover_every_patch():
    units = split_units(pictured(5, 6), tiles=(2, 4), units="image")
    assert [unit.box for unit in units] == [
        (0, 0, 2, 1), (0, 1, 2, 2), (0, 3, 2, 1), (0, 4, 2, 2),
        (2, 0, 3, 1), (2, 1, 3, 2), (2, 3, 3, 1), (2, 4, 3, 2),
    ]  # fmt: skip
    assert units[1].columns == (3, 4, 9, 10) and units[1].text == "image 0 [0:2,1:3]"
    assert sorted(column for unit in units for column in unit.columns) == list(range(2, 32))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"granularity": "token"}, 8 * 7),
        ({"granularity": "delimiter", "delimiter": [1]}, 8 * 7),
        ({"granularity": "token", "tiles": (3, 3)}, 9),
        ({"granularity": "token", "tiles": (99, 2)}, 16),
    ],
)
def test_tiles_follow_the_granularity_and_never_outnumber_the_patches(options, count):
    assert len(split_units(pictured(8, 7), units="image", **options)) == count


@pytest.mark.parametrize(("granularity", "count"), [("word", 36), ("sentence", 9), ("paragraph", 1)])
def test_coarse_text_comes_with_coarse_tiles(granularity, count):
    prompt = pictured(8, 7)
    assert len(split_units(prompt, units="image", granularity=granularity)) == count
    small = pictured(2, 2)
    assert len(split_units(small, units="image", granularity=granularity)) == min(count, 4)


def test_a_prompt_with_an_image_has_text_units_around_it():
    tokenizer = byte_level(control=("<image>",))
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    text = "Oslo is <image><image><image><image>the panda. It eats"
    prompt = encoded(tokenizer, text)
    columns = tuple(column for column, token in enumerate(prompt.tokens) if token == "<image>")
    prompt = EncodedPrompt(**{**vars(prompt), "images": (ImageColumns(columns=columns[:2], grid=(1, 2)),)})
    units = split_units(prompt, granularity="sentence", tiles=(1, 1))
    assert [unit.text for unit in units] == ["Oslo is ", "image 0 [0:1,0:2]", "the panda. ", "It eats"]
    assert all(column not in unit.columns for unit in units for column in columns[2:])  # no patch, yet no text either
    assert texts(prompt, granularity="word", units="text") == ["Oslo", " is", " ", "the", " panda", ".", " It", " eats"]


def test_two_images_are_counted():
    images = (ImageColumns(columns=(1, 2), grid=(1, 2)), ImageColumns(columns=(3, 4), grid=(2, 1)))
    units = split_units(of_ids(5, 9, 9, 9, 9, images=images), tiles=(1, 1))
    assert [(unit.columns, unit.image, unit.box) for unit in units] == [
        ((0,), None, None), ((1, 2), 0, (0, 0, 1, 2)), ((3, 4), 1, (0, 0, 2, 1)),
    ]  # fmt: skip


def test_words_spelled_in_bytes_are_whole_units():
    """With our tokenizer of whole words, which spells those it does not know and leaves out expected spaces."""
    words = pytest.importorskip("tfree_tokenizer").TFreeTokenizer(["is", "the", "It", "."])
    prompt = encoded(words, "Oslo is the Zwetschgę. It is.\n\nSo")
    assert texts(prompt, granularity="word") == ["Oslo", "is", "the", "Zwetschgę", ".", "It", "is", ".", "\n\n", "So"]
    assert texts(prompt, granularity="sentence") == ["Oslo is the Zwetschgę. ", "It is.\n\n", "So"]
    assert texts(prompt)[:5] == ["O", "s", "l", "o", "is"]
    assert encoded(words, prompt.input_ids) == prompt


def columns_once(prompt, units):
    columns = [column for unit in units for column in unit.columns]
    expected = [column for column, is_special in enumerate(prompt.special) if not is_special]
    return sorted(columns) == expected


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    text=st.text(st.sampled_from("aB1.!?。 \n\u00a0\"')ö👍\u0301,"), min_size=1, max_size=60),
    name=st.sampled_from([*TOKENIZERS]),
    granularity=st.sampled_from(["token", "word", "sentence", "paragraph", "delimiter"]),
)
def test_every_column_is_in_exactly_one_unit(text, name, granularity):
    prompt = encoded(TOKENIZERS[name], text)
    if all(prompt.special):  # word-piece has no token for some texts
        return
    delimiter = [".", "\n", " a"] if granularity == "delimiter" else None
    assert columns_once(prompt, split_units(prompt, granularity=granularity, delimiter=delimiter))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.text(st.sampled_from("aB1.!?。 \n\r\u2029\u00a0\"'"), max_size=60))
def test_segments_tile_any_text(text):
    for granularity in ("word", "sentence", "paragraph"):
        spans = text_spans(text, granularity)
        assert "".join(text[start:end] for start, end in spans) == text
        assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
        assert all(text[start:end].strip() for start, end in spans) or not text.strip()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), tiles=st.tuples(st.integers(1, 14), st.integers(1, 14)))
def test_every_patch_is_in_exactly_one_tile(rows, columns, tiles):
    prompt = pictured(rows, columns)
    units = split_units(prompt, tiles=tiles)
    assert columns_once(prompt, units)
    heights = {unit.box[2] for unit in units if unit.box}
    assert max(heights) - min(heights) <= 1
    assert len([unit for unit in units if unit.box]) == min(rows, tiles[0]) * min(columns, tiles[1])
