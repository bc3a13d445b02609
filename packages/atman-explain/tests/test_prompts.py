"""Prompts and targets as people pass them: text, ids, tensors, encoded batches, text with images."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
)

from atman_explain.remote import prompts_atman
from atman_explain.remote.prompts_atman import (
    EncodedPrompt,
    encode_prompts,
    encode_targets,
    image_token_ids,
    token_texts,
)
from tests.support.atman_tokenizers import SlowTokenizer, byte_level, sentence_piece, word_level, word_piece

TEXT = "Oslo is the  capitol of Nörway. 👍🏽 It eats!"
TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level-trimmed": byte_level(trim_offsets=True),
    "sentence-piece": sentence_piece(),
    "word-piece": word_piece(),
}
FAITHFUL = ("byte-level", "byte-level-trimmed", "sentence-piece")  # their ids give the text back
PICTURE = Image.new("RGB", (56, 28))


def one(processor, prompt, **options) -> EncodedPrompt:
    prompts, is_single = encode_prompts(processor, prompt, **options)
    assert is_single and len(prompts) == 1
    return prompts[0]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def fresh_seam(monkeypatch):
    monkeypatch.setattr(prompts_atman, "_seam_was_reported", False)


def test_a_text_has_the_ids_of_a_plain_call(tokenizer):
    prompt = one(tokenizer, TEXT)
    assert prompt.text == TEXT
    assert list(prompt.input_ids) == tokenizer(TEXT)["input_ids"]
    assert prompt.images == () and prompt.model_inputs == {}
    assert len(prompt.tokens) == len(prompt.spans) == len(prompt.word_ids) == len(prompt.special)


@pytest.mark.parametrize("name", FAITHFUL)
def test_spans_follow_one_another_and_hold_the_whole_text(name):
    spans = one(TOKENIZERS[name], TEXT).spans
    assert spans == tuple(sorted(spans))
    covered = {character for start, end in spans for character in range(start, end)}
    assert all(TEXT[character] == " " for character in set(range(len(TEXT))) - covered)


def test_tokens_show_the_text_without_marks_of_the_tokenizer(tokenizer):
    tokens = one(tokenizer, TEXT).tokens
    assert not any(mark in token for token in tokens for mark in "Ġ▁Ã\ufffd")
    assert not any(token.startswith("##") for token in tokens)
    assert [token.strip() for token in tokens if token.strip() in ("Oslo", "is", "of")] == ["Oslo", "is", "of"]


def test_bytes_of_one_character_all_show_it():
    prompt = one(byte_level(), "ö 👍")
    assert prompt.tokens == ("ö", "ö", " ", "👍", "👍", "👍", "👍")
    assert prompt.spans == ((0, 1), (0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3))


def test_tokens_of_nothing_but_space_keep_their_place_under_trimmed_offsets():
    prompt = one(byte_level(trim_offsets=True), "Oslo \n is")
    assert [prompt.text[slice(*span)] for span in prompt.spans] == ["Oslo", " ", "\n", "is"]
    assert [span[0] for span in prompt.spans] == [0, 4, 5, 7]


def test_special_tokens_are_the_controls_but_not_the_unknown_word():
    prompt = one(word_piece(), "Oslo ☃ is")
    assert prompt.tokens == ("[CLS]", "Oslo", "☃", "is", "[SEP]")
    assert prompt.special == (True, False, False, False, True)
    assert prompt.spans == ((0, 0), (0, 4), (5, 6), (7, 9), (9, 9))
    assert prompt.input_ids[2] == word_piece().unk_token_id


def test_an_unknown_token_with_another_role_is_special():
    tokenizer = word_level("Oslo", "<end>", eos_token="<end>")
    tokenizer.unk_token = "<end>"
    assert one(tokenizer, "Oslo <end>").special == (False, True)


def test_control_tokens_of_a_chat_are_special_wherever_they_stand():
    tokenizer = byte_level(control=("<|im_start|>", "<|im_end|>"))
    prompt = one(tokenizer, "<|im_start|>the panda<|im_end|>")
    assert [token for token, is_special in zip(prompt.tokens, prompt.special, strict=True) if is_special] == [
        "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAITHFUL)
def test_ids_of_a_text_give_the_same_prompt(name):
    tokenizer = TOKENIZERS[name]
    expected = one(tokenizer, TEXT)
    ids = tokenizer(TEXT)["input_ids"]
    for given_ids in (ids, tuple(ids), np.array(ids), np.array(ids, dtype=np.int32), torch.tensor(ids)):
        assert one(tokenizer, given_ids) == expected
    assert one(tokenizer, [torch.tensor(index) for index in ids]) == expected
    assert one(tokenizer, list(np.array(ids))) == expected
    assert one(tokenizer, tokenizer(TEXT)) == expected


def test_ids_of_a_lossy_tokenizer_have_the_text_they_decode_to():
    tokenizer = word_piece()
    prompt = one(tokenizer, tokenizer("Oslo IS the")["input_ids"])
    assert (prompt.text, prompt.tokens) == ("oslo is the", ("[CLS]", "oslo", "is", "the", "[SEP]"))


@pytest.mark.parametrize("name", FAITHFUL)
def test_ids_that_no_text_gives_are_located_by_decoding_them_step_by_step(name):
    tokenizer = TOKENIZERS[name]
    plain = tokenizer("Oslo is", add_special_tokens=False)["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(name) for name in ("c", "a", "p")]
    prompt = one(tokenizer, [*plain, *letters])
    assert prompt.word_ids is None
    assert "".join(prompt.text[slice(*span)] for span in prompt.spans) == prompt.text
    assert prompt.tokens[0] == "Oslo" and prompt.tokens[-1] == "p"


def test_stray_bytes_end_up_in_few_steps():
    tokenizer = byte_level()
    (stray,) = tokenizer.convert_tokens_to_ids(["Ã"])  # the first byte of a character of two
    letter = tokenizer("x")["input_ids"]
    prompt = one(tokenizer, [stray] * 9 + letter)
    assert len(prompt.spans) == 10 and prompt.text.endswith("x")
    assert "".join(prompt.text[slice(*span)] for span in dict.fromkeys(prompt.spans)) == prompt.text


def test_without_a_tokenizer_ids_are_all_there_is():
    prompt = one(None, [3, 1, 4])
    assert (prompt.text, prompt.spans, prompt.word_ids) == (None, None, None)
    assert (prompt.tokens, prompt.special) == (("<3>", "<1>", "<4>"), (False, False, False))


def test_a_slow_tokenizer_tells_no_places():
    tokenizer = SlowTokenizer()
    prompt = one(tokenizer, "a cab")
    assert (prompt.text, prompt.spans, prompt.word_ids) == ("a cab", None, None)
    assert prompt.tokens == ("a", " ", "c", "a", "b")
    assert one(tokenizer, prompt.input_ids) == prompt


@pytest.mark.parametrize(
    ("prompt", "count", "is_single"),
    [
        ("Oslo", 1, True),
        ([1, 2, 3], 1, True),
        (torch.tensor([1, 2]), 1, True),
        (["Oslo", "is"], 2, False),
        (["Oslo"], 1, False),
        ([[1, 2], [3]], 2, False),
        ([torch.tensor([1, 2]), np.array([3])], 2, False),
        (["Oslo", [1, 2]], 2, False),
        (torch.tensor([[1, 2], [3, 4]]), 2, False),
        (torch.tensor([[1, 2]]), 1, False),
        ({"input_ids": [1, 2]}, 1, True),
        ({"input_ids": torch.tensor([[1, 2]])}, 1, True),
        ({"input_ids": [[1, 2], [3]]}, 2, False),
    ],
)
def test_one_prompt_is_told_from_a_batch(prompt, count, is_single):
    prompts, was_single = encode_prompts(byte_level(), prompt)
    assert (len(prompts), was_single) == (count, is_single)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_off_on_either_side(side):
    tokenizer = word_piece()
    texts = ["Oslo", "the panda eats"]
    batch = tokenizer(texts, padding=True, padding_side=side, return_token_type_ids=True, return_tensors="pt")
    prompts, is_single = encode_prompts(tokenizer, batch)
    assert not is_single
    assert [list(prompt.input_ids) for prompt in prompts] == tokenizer(texts)["input_ids"]
    assert [prompt.model_inputs["token_type_ids"].shape for prompt in prompts] == [
        (1, len(prompt.input_ids)) for prompt in prompts
    ]


def test_lists_with_padding_lose_it_too():
    prompts, _ = encode_prompts(None, {"input_ids": [[0, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 1]]})
    assert [prompt.input_ids for prompt in prompts] == [(5, 6), (7, 8, 9)]


def test_other_tensors_of_a_batch_are_cut_into_rows():
    pixels = torch.arange(24.0).reshape(2, 3, 2, 2)
    batch = {"input_ids": [[1, 2], [3, 4]], "pixel_values": pixels, "labels": [[1, 2], [3, 4]], "nothing": None}
    first, second = encode_prompts(None, batch)[0]
    assert first.model_inputs.keys() == {"pixel_values"}
    assert torch.equal(second.model_inputs["pixel_values"], pixels[1:])


def test_other_tensors_of_one_row_are_kept_whole():
    patches = torch.ones(7, 4)
    inputs = one(None, {"input_ids": [[1, 2]], "patches": patches, "token_type_ids": np.array([[0, 1]])}).model_inputs
    assert inputs["patches"] is patches
    assert inputs["token_type_ids"].tolist() == [[0, 1]]
    inputs = one(None, {"input_ids": [1, 2], "token_type_ids": [0, 1]}).model_inputs
    assert inputs["token_type_ids"].tolist() == [[0, 1]]


def test_targets_have_no_special_tokens():
    tokenizer = word_piece()
    prompts, is_single = encode_prompts(tokenizer, "Oslo is the capital of")
    expected = tuple(tokenizer("norway", add_special_tokens=False)["input_ids"])
    assert encode_targets(tokenizer, "norway", prompts, is_single) == [expected]
    assert encode_targets(tokenizer, ["norway"], prompts, is_single) == [expected]
    assert encode_targets(None, list(expected), prompts, is_single) == [expected]
    assert encode_targets(None, torch.tensor([expected]), prompts, is_single) == [expected]
    assert encode_targets(None, {"input_ids": [expected]}, prompts, is_single) == [expected]


def test_batches_of_targets_go_with_batches_of_prompts():
    tokenizer = byte_level()
    prompts, is_single = encode_prompts(tokenizer, ["Oslo", "The capital"])
    targets = encode_targets(tokenizer, [" is", [5, 6, 7]], prompts, is_single)
    assert targets == [tuple(tokenizer(" is")["input_ids"]), (5, 6, 7)]
    padded = {"input_ids": [[0, 5], [6, 7]], "attention_mask": [[0, 1], [1, 1]]}
    assert encode_targets(None, padded, prompts, is_single) == [(5,), (6, 7)]


def test_a_seam_is_reported_once_with_the_remedy(fresh_seam):
    tokenizer = sentence_piece()
    prompts, is_single = encode_prompts(tokenizer, "Oslo is the capital of")
    with pytest.warns(UserWarning, match="cuts it differently .* pass target='Norway.', whose ids follow the prompt"):
        targets = encode_targets(tokenizer, " Norway.", prompts, is_single)
    assert targets == [tuple(tokenizer(" Norway.", add_special_tokens=False)["input_ids"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode_targets(tokenizer, " Norway.", prompts, is_single) == targets


def test_a_seam_that_no_spelling_mends_gives_the_ids_of_the_joined_text(fresh_seam):
    tokenizer = sentence_piece()
    prompts, is_single = encode_prompts(tokenizer, "Oslo\n")
    first, second = tokenizer.convert_tokens_to_ids(["No", "r"])
    with pytest.warns(UserWarning, match=rf"pass target=\[{first}, {second}\] to explain the ids of the joined text"):
        encode_targets(tokenizer, "Nor", prompts, is_single)


def test_a_seam_inside_a_word_asks_to_move_the_border(fresh_seam):
    tokenizer = byte_level()
    prompts, is_single = encode_prompts(tokenizer, "Oslo is the cap")
    with pytest.warns(UserWarning, match="move the border"):
        encode_targets(tokenizer, "ital", prompts, is_single)


def test_a_target_that_fits_or_is_not_to_be_checked_gives_no_warning(fresh_seam):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tokenizer, target in ((byte_level(), " Norway"), (word_piece(), "norway"), (sentence_piece(), "Norway.")):
            prompts, is_single = encode_prompts(tokenizer, "Oslo is the capital of")
            encode_targets(tokenizer, target, prompts, is_single)
        prompts, is_single = encode_prompts(byte_level(), "Oslo is the cap")
        encode_targets(byte_level(), "ital", prompts, is_single, check_seam=False)
        encode_targets(byte_level(), [5, 6], prompts, is_single)


def test_token_texts_are_those_of_single_tokens():
    tokenizer = byte_level()
    assert token_texts(tokenizer, tokenizer("Oslo is")["input_ids"]) == ("Oslo", " is")
    assert token_texts(None, [3, 4]) == ("<3>", "<4>")
    assert token_texts(tokenizer, [len(tokenizer) + 3, 2**40]) == (f"<{len(tokenizer) + 3}>", f"<{2**40}>")
    assert token_texts(sentence_piece(), sentence_piece().convert_tokens_to_ids(["▁"])) == ("▁",)


def llava(tokenizer):
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(pictures, tokenizer, patch_size=14, num_additional_image_tokens=1,
                          vision_feature_select_strategy="default")  # fmt: skip


def test_a_text_with_images_keeps_its_places_and_the_patches_have_none_of_their_own():
    processor = llava(byte_level(control=("<image>",)))
    text = "the panda <image>\neats <image> it"
    prompt = one(processor, text, images=[PICTURE, PICTURE])
    assert prompt.text == text
    assert prompt.tokens.count("<image>") == 8 and image_token_ids(processor) == {processor.image_token_id}
    assert not any(prompt.special)
    assert {key: tuple(value.shape) for key, value in prompt.model_inputs.items()} == {"pixel_values": (2, 3, 28, 28)}
    words = [text[slice(*span)] for token, span in zip(prompt.tokens, prompt.spans, strict=True) if token != "<image>"]
    assert "".join(words) == text.replace("<image>", "")
    assert prompt.spans == tuple(sorted(prompt.spans))


def test_a_batch_takes_a_list_of_images_per_prompt():
    processor = llava(byte_level(control=("<image>",)))
    prompts, is_single = encode_prompts(processor, ["<image> eats", "the panda"], images=[PICTURE, None])
    assert not is_single
    assert [set(prompt.model_inputs) for prompt in prompts] == [{"pixel_values"}, set()]


def test_what_a_processor_puts_around_an_image_is_special():
    names = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    rows = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    pictures = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(pictures, byte_level(control=names + rows), image_seq_len=4)
    prompt = one(processor, "the panda:<image>\neats?", images=PICTURE)
    text_tokens = [
        token for token, is_special in zip(prompt.tokens, prompt.special, strict=True)
        if not is_special and token != "<image>"
    ]  # fmt: skip
    assert "".join(text_tokens) == "the panda:\neats?"
    assert prompt.tokens.count("<image>") % 4 == 0 and prompt.tokens.count("<image>") > 4


def test_a_start_of_image_token_is_special_though_the_processor_calls_it_the_image_token():
    tokenizer = byte_level(control=("<boi>", "<eoi>", "<patch>"))
    for role, name in (("boi", "<boi>"), ("eoi", "<eoi>"), ("image", "<patch>")):
        setattr(tokenizer, f"{role}_token", name)
        setattr(tokenizer, f"{role}_token_id", tokenizer.convert_tokens_to_ids(name))
    pictures = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    prompt = one(Gemma3Processor(pictures, tokenizer, image_seq_length=4), "the\n<boi>\neats", images=PICTURE)
    shown = dict(zip(prompt.tokens, prompt.special, strict=True))
    assert (shown["<boi>"], shown["<eoi>"], shown["<patch>"], shown["the"]) == (True, True, False, False)
    assert prompt.tokens.count("<patch>") == 4


BAD_PROMPTS = [
    ("", "prompt must not be empty, got ''"),
    ([], r"prompt must not be empty, got \[\]"),
    (["Oslo", ""], r"prompt\[1\] must not be empty, and be text or a row of token ids, got ''"),
    ([[]], r"prompt\[0\] must not be empty, and be text or a row of token ids, got \[\]"),
    ([1, True], r"prompt\[1\] must be a token id, an integer of at least 0, got True"),
    ([1, -1], r"prompt\[1\] must be a token id, an integer of at least 0, got -1"),
    ([1, 2.0], r"prompt\[1\] must be a token id, an integer of at least 0, got 2.0"),
    ([1, "a"], r"prompt\[1\] must be a token id, an integer of at least 0, got 'a'"),
    (torch.tensor([0.5]), r"prompt\[0\] must be a token id, an integer of at least 0, got 0.5"),
    (torch.tensor([True]), r"prompt\[0\] must be a token id, an integer of at least 0, got True"),
    (np.array([[3, -2]]), r"prompt\[0\]\[1\] must be a token id, an integer of at least 0, got -2"),
    (torch.ones(1, 1, 1), r"prompt must be a 1-D or 2-D tensor of token ids, got shape \(1, 1, 1\)"),
    ([[[1]]], r"prompt\[0\]\[0\] must be a token id, an integer of at least 0, got \[1\]"),
    (7, "prompt must be text, token ids, or a list of those, got int"),
    (None, "prompt must be text, token ids, or a list of those, got NoneType"),
    ([{"role": "user"}], r"prompt\[0\] must be text or token ids, got a mapping; apply the chat template"),
    ({"attention_mask": [1]}, r"prompt must have the key 'input_ids' if it is a mapping, got \['attention_mask'\]"),
    ({"input_ids": ["a"]}, r"prompt\['input_ids'\] must be token ids, got text"),
    ({"input_ids": [[1]], "attention_mask": [[0]]}, r"\['attention_mask'\]\[0\] must keep at least one token"),
    ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "must be 0 at the start or the end only"),
    ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"must have the shape of prompt\['input_ids'\]"),
    ({"input_ids": [[1]], "attention_mask": torch.ones(1, 1, 1)}, r"must have the shape of prompt\['input_ids'\]"),
    (
        {"input_ids": [[1], [2]], "grid": torch.ones(3, 2)},
        r"prompt\['grid'\] must have a first dimension of 2 .* \(3, 2\)",
    ),
    ({"input_ids": [[1]], "extra": "text"}, r"prompt\['extra'\] must be a tensor, got str"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_refused_by_name(prompt, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(byte_level(), prompt)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="prompt is text, which needs a tokenizer, got processor=None"):
        encode_prompts(None, ["Oslo"])
    with pytest.raises(ValueError, match="target is text, which needs a tokenizer, got processor=None"):
        encode_targets(None, "Oslo", [one(None, [1])], True)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt must not be empty, got ' ', which has no tokens"):
        encode_prompts(word_level("Oslo"), " ")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "target must not be empty, got ''"),
        ([], r"target must not be empty, got \[\]"),
        ("  ", "target must not be empty, got '  ', which has no tokens"),
        ([1, False], r"target\[1\] must be a token id, an integer of at least 0, got False"),
        (["a", "b"], "target has 2 entries but prompt has 1; give one target per prompt"),
    ],
)
def test_a_bad_target_is_refused_by_name(target, message):
    with pytest.raises(ValueError, match=message):
        encode_targets(word_level("Oslo", "a"), target, [one(word_level("Oslo"), "Oslo")], True)


def test_targets_must_be_as_many_as_prompts():
    prompts, is_single = encode_prompts(byte_level(), ["Oslo", "the"])
    with pytest.raises(ValueError, match="target has 3 entries but prompt has 2"):
        encode_targets(byte_level(), ["a", "b", "c"], prompts, is_single)
    with pytest.raises(ValueError, match="target is a single one but prompt is a batch of 2; give a list of targets"):
        encode_targets(byte_level(), "a", prompts, is_single)


def test_images_must_fit_their_prompts():
    processor = llava(byte_level(control=("<image>",)))
    with pytest.raises(ValueError, match="images must be a list with an entry for each of the 2 prompts, got 1"):
        encode_prompts(processor, ["<image>", "a"], images=[PICTURE])
    with pytest.raises(ValueError, match="images must be a list with an entry for each of the 2 prompts, got Image"):
        encode_prompts(processor, ["<image>", "a"], images=PICTURE)
    with pytest.raises(ValueError, match="images need a prompt that is text, got token ids"):
        encode_prompts(processor, [1, 2], images=PICTURE)
    with pytest.raises(ValueError, match="images must be None if prompt is a mapping"):
        encode_prompts(processor, {"input_ids": [1]}, images=PICTURE)
    with pytest.raises(ValueError, match="images need a processor that takes them, got the tokenizer"):
        encode_prompts(processor.tokenizer, "<image>", images=PICTURE)


def test_ids_of_another_tokenizer_are_refused_if_they_cannot_be_decoded():
    with pytest.raises(ValueError, match=r"ids must be the tokenizer's own, but it cannot decode \[999\]"):
        encode_prompts(SlowTokenizer(), [999])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.text(min_size=1, max_size=40), name=st.sampled_from(FAITHFUL))
def test_any_text_and_its_ids_are_located(text, name):
    prompt = one(TOKENIZERS[name], text)
    again = one(TOKENIZERS[name], prompt.input_ids)
    for each in (prompt, again):
        assert all(0 <= start <= end <= len(each.text) for start, end in each.spans)
        assert [start for start, _ in each.spans] == sorted(start for start, _ in each.spans)
    assert again.input_ids == prompt.input_ids
