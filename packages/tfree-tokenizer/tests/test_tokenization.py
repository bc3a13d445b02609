"""TFreeTokenizer as transformers and its users call it: ids and back, batches, pairs, truncation, added tokens."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizer

from tests.support.word_rules import random_texts
from tfree_tokenizer import TFreeTokenizer, fingerprint_words, structural_words
from tfree_tokenizer.remote import encoding_tfree, tokenization_tfree

WORDS = ["the", "house", "is", "small", "Hello", "World", "!", ".", "1", "a", "日本", "é", "|"]
WORDS_V2 = [*(word for word in WORDS if word != "日本"), "日", "हिन्दी"]
CHAT = [{"role": "user", "content": "Hi <|ws|>"}, {"role": "assistant", "content": " the house"}]


@pytest.fixture
def tokenizer():
    return TFreeTokenizer(WORDS)


@pytest.fixture(scope="module", params=["v1", "v2"])
def shared(request):
    """A tokenizer of each ruleset that tests leave as it is."""
    return TFreeTokenizer(WORDS if request.param == "v1" else WORDS_V2, ruleset=request.param)


@pytest.mark.parametrize("numpy_from", [0, 1 << 30], ids=["numpy", "regular expression"])
@pytest.mark.parametrize("syntax", ["registered", "any"])
@pytest.mark.parametrize("ruleset", ["v1", "v2"])
def test_every_string_comes_back(ruleset, syntax, numpy_from, monkeypatch):
    monkeypatch.setattr(encoding_tfree, "NUMPY_FROM", dict.fromkeys(encoding_tfree.NUMPY_FROM, numpy_from))
    tokenizer = TFreeTokenizer(WORDS if ruleset == "v1" else WORDS_V2, ruleset=ruleset, special_syntax=syntax)
    texts = list(random_texts(2_500, seed=21))
    for split_special_tokens in (False, True):
        ids = tokenizer(texts, split_special_tokens=split_special_tokens)["input_ids"]
        for text, row in zip(texts, ids, strict=True):
            assert tokenizer.decode(row) == text, repr(text)


def test_batches_and_single_texts_have_the_same_ids(shared):
    texts = list(random_texts(500, seed=22))
    assert shared(texts)["input_ids"] == [shared(text)["input_ids"] for text in texts]
    long = "".join(texts)
    assert shared.encode(long) == shared(["", long, "a"])["input_ids"][1]
    assert shared.decode(shared.encode(long)) == long


@settings(max_examples=150, derandomize=True, deadline=None)
@given(text=st.text(st.characters(codec=None, categories=None)))
def test_any_text_hypothesis_finds_comes_back(shared, text):
    assert shared.decode(shared.encode(text)) == text
    assert shared.decode(shared(text, split_special_tokens=True)["input_ids"]) == text


def test_ids_are_laid_out_as_specials_spacing_bytes_and_words(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(4)) == [
        "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(range(4, 11)) == list(structural_words("v1"))
    assert (tokenizer.first_byte_id, tokenizer.first_word_id) == (11, 523)
    assert tokenizer("the house")["input_ids"] == [523, 524]
    assert tokenizer("xé<|endoftext|>")["input_ids"] == [11 + 0x78, 11 + 0xC3, 11 + 256 + 0xA9, 0]
    assert len(tokenizer) == tokenizer.vocab_size == 523 + len(WORDS) == len(tokenizer.words_by_id())
    assert tokenizer.words_by_id()[11:523] == [None] * 512
    assert tokenizer.special_word_ids() == frozenset(range(11))
    assert tokenizer.dictionary_fingerprint == fingerprint_words(tokenizer.words_by_id())
    assert tokenizer.dictionary_words == WORDS
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 0, None)


def test_every_id_has_a_name_of_its_own(shared):
    names = shared.convert_ids_to_tokens(range(len(shared)))
    assert len(set(names)) == len(names) == len(shared.get_vocab())
    assert shared.convert_tokens_to_ids(names) == list(range(len(shared)))
    assert shared.convert_tokens_to_ids("unheard") is None


def test_names_in_a_text_are_text(shared):
    text = "".join(shared.convert_ids_to_tokens(range(4, len(shared))))
    ids = shared.encode(text)
    assert shared.decode(ids) == text
    assert shared.tokenize("<0x41|last>")[0] != "<0x41|last>"
    assert 5 not in shared.encode("<|ws|>")


def test_tokenize_names_the_ids_and_strings_come_back(shared):
    text = "the  house\nisxy <|endoftext|> a日\ud800"
    tokens = shared.tokenize(text)
    assert shared.convert_tokens_to_ids(tokens) == shared.encode(text)
    assert shared.convert_tokens_to_string(tokens) == text
    assert shared.convert_tokens_to_string(["Hello", "unheard", "!"]) == "Hello unheard!"


@pytest.mark.parametrize("text", ["", " ", "\n", " \n  ", "\0", "\ufeff", "\t"])
def test_texts_without_words_work(shared, text):
    ids = shared(text)["input_ids"]
    assert (ids == []) == (text == "")
    assert shared.decode(ids) == text
    assert shared(["the", text])["attention_mask"][1] == [1] * len(ids)
    assert shared.decode([]) == ""


def test_padding_fills_either_side_and_masks_it(tokenizer):
    right = tokenizer(["the house", "a", ""], padding=True)
    assert right["input_ids"] == [[523, 524], [532, 0], [0, 0]]
    assert right["attention_mask"] == [[1, 1], [1, 0], [0, 0]]
    left = tokenizer(["the house", "a"], padding=True, padding_side="left", return_tensors="pt")
    assert left["input_ids"].tolist() == [[523, 524], [0, 532]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    longer = tokenizer(
        ["the house", "a"], padding="max_length", max_length=3, pad_to_multiple_of=4, return_tensors="np"
    )
    assert longer["input_ids"].shape == (2, 4)
    assert tokenizer("the house", return_tensors="pt")["input_ids"].shape == (1, 2)
    assert tokenizer("a", padding="max_length", max_length=3)["input_ids"] == [532, 0, 0]


@pytest.mark.parametrize("tensors", ["pt", "np", None])
@pytest.mark.parametrize("padding", [True, "max_length", False])
def test_padding_is_that_of_transformers(tokenizer, padding, tensors, monkeypatch):
    options = {"padding": padding, "return_tensors": tensors, "truncation": False, "verbose": False}

    def padded():
        rows = []
        for length, multiple, side, texts in itertools.product(
            (None, 1, 5), (None, 4), (None, "left", "right"), ("the", ["the house", "x the the", ""], [""])
        ):
            lengths = {"max_length": length, "pad_to_multiple_of": multiple, "padding_side": side}
            try:
                encoded = tokenizer(texts, **lengths, **options)
                rows.append([(name, type(value), str(value)) for name, value in encoded.items()])
            except ValueError:
                rows.append(ValueError)
        return rows

    ours = padded()
    monkeypatch.setattr(tokenization_tfree, "is_plain_call", lambda *_: False)
    assert ours == padded()


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_other_side(tokenizer, side):
    tokenizer.truncation_side = side
    text, ids = "the house is small", [523, 524, 525, 526]
    kept = ids[:3] if side == "right" else ids[1:]
    cut = tokenizer(text, truncation=True, max_length=3, stride=1, return_overflowing_tokens=True)
    assert cut["input_ids"] == kept
    assert cut["overflowing_tokens"] == (ids[-2:] if side == "right" else ids[:2])
    assert cut["num_truncated_tokens"] == 1
    assert tokenizer([text, "a"], truncation=True, max_length=3)["input_ids"] == [kept, [532]]


def test_pairs_follow_one_another(tokenizer):
    assert tokenizer("the", "house")["input_ids"] == [523, 524]
    assert tokenizer([("the", "house"), ("a", "")])["input_ids"] == [[523, 524], [532]]
    assert tokenizer(["the", "a"], ["house", "is"])["input_ids"] == [[523, 524], [532, 525]]
    both = tokenizer("the", "house", return_token_type_ids=True, return_special_tokens_mask=True, return_length=True)
    assert (both["token_type_ids"], both["special_tokens_mask"], both["length"]) == ([0, 1], [0, 0], 2)
    with pytest.raises(ValueError, match="text_pair must be a batch as long as text"):
        tokenizer(["the", "a"], ["house"])


def test_ids_pass_through(tokenizer):
    assert tokenizer([523, 524])["input_ids"] == [523, 524]
    assert tokenizer([[523], "the house"], padding=True)["input_ids"] == [[523, 0], [523, 524]]
    with pytest.raises(ValueError, match="text must be a string, a list of strings or a list of ids"):
        tokenizer(3.5)


def test_split_input_keeps_track_of_its_words(tokenizer):
    single = tokenizer(["the", "unheard", "house"], is_split_into_words=True)
    assert single["input_ids"] == tokenizer("the unheard house")["input_ids"]
    assert single.word_ids() == [0, *[1] * 7, 2]
    batch = tokenizer([["the", "xy"], ["a"]], is_split_into_words=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 3)
    assert batch.word_ids(1) == [0, None, None]
    assert batch.word_to_tokens(0, 1) == (1, 3)


def test_offsets_tell_the_characters_of_every_id(tokenizer):
    text = "the  unhéard,\n\nhouse<|endoftext|>1a"
    encoded = tokenizer(text, return_offsets_mapping=True)
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    offsets = dict(zip(names, encoded["offset_mapping"], strict=True))
    assert encoded["input_ids"] == tokenizer(text)["input_ids"]
    assert offsets["the"] == (0, 3)
    assert offsets["<|2<-ws->|>"] == (3, 5)
    assert offsets["<0xC3|inside>"] == offsets["<0xA9|inside>"] == (8, 9)
    assert offsets["<|2<-\n->|>"] == (13, 15)
    assert offsets["<|endoftext|>"] == (20, 33)
    assert offsets["<|no_ws|>"] == (34, 34)
    assert offsets["a"] == (34, 35)


def test_offsets_survive_padding_truncation_and_pairs(tokenizer):
    options = {"truncation": True, "max_length": 3, "return_offsets_mapping": True}
    encoded = tokenizer(["the house is small", "a"], padding=True, **options)
    assert encoded["offset_mapping"] == [[(0, 3), (4, 9), (10, 12)], [(0, 1), (0, 0), (0, 0)]]
    single = tokenizer("the house is small", return_overflowing_tokens=True, **options)
    assert (single["input_ids"], single["overflowing_tokens"]) == ([523, 524, 525], [526])
    tokenizer.truncation_side = "left"
    encoded = tokenizer("the house is", "small a", truncation="only_first", max_length=4, return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(4, 9), (10, 12), (0, 5), (6, 7)]
    assert encoded.sequence_ids() == [0, 0, 1, 1]
    assert encoded.char_to_token(1) is None  # cut off
    assert [encoded.char_to_token(4), encoded.char_to_token(9), encoded.char_to_token(0, sequence_index=1)] == [0, 1, 2]
    assert encoded.token_to_chars(3) == (6, 7)
    tensors = tokenizer(["the house", "a a"], return_offsets_mapping=True, return_tensors="pt")
    assert tensors["offset_mapping"].shape == (2, 2, 2)


def test_offsets_need_text(tokenizer):
    with pytest.raises(ValueError, match="return_offsets_mapping needs text"):
        tokenizer([523], return_offsets_mapping=True)
    tokenizer.add_tokens(AddedToken("[x]", lstrip=True))
    with pytest.raises(ValueError, match="return_offsets_mapping needs text, and added tokens without lstrip"):
        tokenizer("a", return_offsets_mapping=True)


def test_skipping_specials_keeps_spacing(shared):
    ids = shared.encode("the\n\n  house<|endoftext|>a")
    assert shared.decode(ids, skip_special_tokens=True) == "the\n\n  housea"
    assert shared.batch_decode([ids, ids[:1]]) == ["the\n\n  house<|endoftext|>a", "the"]


def test_decoding_takes_what_models_return(shared):
    ids = shared.encode("Hello World!")
    expected = "Hello World!"
    assert shared.decode(torch.tensor(ids)) == shared.decode(np.array(ids)) == expected
    assert shared.batch_decode(torch.tensor([ids, ids])) == [expected, expected]
    assert shared.decode(ids[0]) == "Hello"


def test_decoding_refuses_what_is_no_id(shared):
    with pytest.raises(
        IndexError, match=rf"token_ids must lie in \[0, {len(shared)}\), got values from 0 to {len(shared)}"
    ):
        shared.decode([0, len(shared)])
    with pytest.raises(IndexError, match="got values from -100 to 3"):
        shared.decode([-100, 3])
    with pytest.raises(TypeError, match="token_ids must be integers"):
        shared.decode([1.0])
    with pytest.raises(IndexError, match=r"ids must lie in \[0, "):
        shared.convert_ids_to_tokens(len(shared))


def test_unfinished_and_orphaned_bytes_are_shown(tokenizer):
    spelled = tokenizer.encode("éü")
    assert tokenizer.decode(spelled[:1]) == "\ufffd"
    assert tokenizer.decode(spelled[:3]) == "é\ufffd"
    assert tokenizer.decode(spelled[1:]) == "\ufffdü"
    assert tokenizer.decode([523, spelled[0], 524]) == "the\ufffdhouse"
    assert tokenizer.decode([523, *spelled[:3]]) == "the é\ufffd"


def test_more_ids_never_change_what_was_written(shared):
    for text in random_texts(400, seed=23, longest=10):
        ids = shared.encode(text)
        written = ""
        for end in range(1, len(ids) + 1):
            shown = shared.decode(ids[:end])
            assert shown.startswith(written), repr(text)
            written = shown.rstrip("\ufffd")


def test_prev_id_brings_the_space_between(shared):
    ids = shared.encode("Hello World!")
    assert shared.decode(ids[1:]) == "World!"
    assert shared.decode(ids[1:], prev_id=ids[0]) == " World!"
    assert shared.decode(ids[2:], prev_id=ids[1]) == "!"
    unheard = shared.encode("unheard house")
    assert (
        shared.decode(unheard[-1:], prev_id=unheard[:-1])
        == shared.decode(unheard[-1:], prev_id=unheard[-2])
        == " house"
    )
    assert shared.decode(ids[1:], prev_id=0) == "World!"


def test_added_tokens_come_last_and_stay_whole(tokenizer):
    size = len(tokenizer)
    assert tokenizer.add_tokens(["new token", "<x>"]) == 2
    assert tokenizer.add_special_tokens({"cls_token": "[CLS]"}) == 1
    assert len(tokenizer) == size + 3
    assert tokenizer.vocab_size == size
    text = "a new token<x>the [CLS] anew token"
    ids = tokenizer.encode(text)
    assert [index for index in ids if index >= size] == [size, size + 1, size + 2, size]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a new token<x>the  anew token"
    assert tokenizer.words_by_id()[size:] == ["new token", "<x>", "[CLS]"]
    assert tokenizer.special_word_ids() == frozenset([*range(11), *range(size, size + 3)])
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_a_dictionary_word_that_is_added_keeps_its_id(tokenizer):
    size, fingerprint = len(tokenizer), tokenizer.dictionary_fingerprint
    assert tokenizer.add_tokens("house") == 0
    assert (len(tokenizer), tokenizer.dictionary_fingerprint) == (size, fingerprint)
    for text in ["the house is", "houses", "ahousea"]:
        assert 524 in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        plain = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert 524 not in plain
        assert tokenizer.decode(plain) == text


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_flags_of_added_tokens_mean_what_transformers_says(tokenizer, flags):
    tokenizer.add_tokens(AddedToken("[x]", **flags))
    for text in ["the [x] house", "a[x]b", "[x] a", "a [x]", "the  [x]\n a"]:
        tokens = PreTrainedTokenizer.tokenize(tokenizer, text)
        assert tokenizer.tokenize(text) == tokens
        assert tokenizer(text)["input_ids"] == tokenizer([text, "a"])["input_ids"][0]
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == tokens


def test_names_of_spacing_and_bytes_cannot_be_added(tokenizer):
    for name in ["<|ws|>", "<0x41|last>"]:
        with pytest.raises(ValueError, match="new_tokens must not be the names of spacing or bytes"):
            tokenizer.add_tokens([name])


def test_named_specials_come_first():
    tokenizer = TFreeTokenizer(
        WORDS, eos_token="</s>", pad_token="[PAD]", bos_token="<s>", extra_special_tokens=["<im>"]
    )
    names = tokenizer.convert_ids_to_tokens(range(7))
    assert sorted(names) == sorted(
        ["</s>", "[PAD]", "<s>", "<im>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    )
    assert set(tokenizer.all_special_tokens) == set(names)
    assert len(tokenizer) == tokenizer.vocab_size
    assert tokenizer.encode("<s>a[PAD]")[0] == tokenizer.bos_token_id


def test_chats_are_written_in_the_published_format(tokenizer):
    begin = "<|begin_of_text|><|start_header_id|>"
    expected = (
        f"{begin}user<|end_header_id|>\n\nHi <|ws|><|endoftext|>"
        f"{begin}assistant<|end_header_id|>\n\n the house<|endoftext|>"
    )
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|endoftext|><|start_header_id|>assistant<|end_header_id|>")
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode(ids) == expected
    assert ids[:3] == [1, 2, *tokenizer.encode("user")][:3]


def test_the_assistants_part_of_a_chat_is_masked(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    ids = [index for index, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(ids) == " the house<|endoftext|>"
    assert "offset_mapping" not in encoded


def test_control_tokens_of_users_can_be_kept_text(tokenizer):
    if not hasattr(tokenizer, "_mark_chat_inputs"):
        pytest.skip("this transformers has no sanitize_control_tokens")
    chat = [{"role": "user", "content": "the <|endoftext|>house"}]
    ids = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert "endoftext" in tokenizer.decode(ids[:-1])


def test_copies_are_equal_and_small(shared):
    shared.encode("the house " * 1000)
    for twin in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert twin.encode("the unheard house") == shared.encode("the unheard house")
        assert twin.dictionary_fingerprint == shared.dictionary_fingerprint
        assert pickle.dumps(twin) == pickle.dumps(shared)
    assert len(pickle.dumps(shared)) < 20_000


def test_long_texts_warn_once_as_transformers_does(tokenizer, caplog):
    tokenizer.model_max_length = 2
    for _ in range(2):
        tokenizer("the house is small")
    assert sum("longer than the specified maximum" in record.message for record in caplog.records) <= 1
    assert tokenizer.deprecation_warnings
