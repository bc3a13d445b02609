"""Dictionaries in files and arguments: what is accepted, what is refused and how, what a save keeps."""

import json
import os
import subprocess
import sys
import time

import pytest
from transformers import AddedToken, AutoTokenizer

from tfree_tokenizer import TFreeTokenizer
from tfree_tokenizer.remote import wordlist_tfree
from tfree_tokenizer.remote.wordlist_tfree import WORDS_FILE, check_word_types, check_words, read_words, write_words
from tfree_tokenizer.remote.words_tfree import is_one_word

WORDS = ["the", "house", "é", "日本", "!"]
ODD_WORDS = ["\ud800", "\0", "\u2028", '"', "\\", "𝒳"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_tokenizer_comes_back(tmp_path):
    tokenizer = TFreeTokenizer([*WORDS, *ODD_WORDS], model_max_length=77, padding_side="left")
    tokenizer.add_tokens(["new one", AddedToken("[x]", rstrip=True, normalized=False)])
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    saved = tokenizer.save_pretrained(tmp_path / "a")
    assert {os.path.basename(file) for file in saved} >= {WORDS_FILE, "tokenizer_config.json", "chat_template.jinja"}
    for loaded in (TFreeTokenizer.from_pretrained(tmp_path / "a"), AutoTokenizer.from_pretrained(tmp_path / "a")):
        assert loaded.dictionary_fingerprint == tokenizer.dictionary_fingerprint
        assert loaded.get_vocab() == tokenizer.get_vocab()
        text = "the new one [x]  unheard\ud800\n<|endoftext|>[CLS]"
        assert loaded.encode(text) == tokenizer.encode(text)
        assert (loaded.model_max_length, loaded.padding_side, loaded.cls_token_id) == (77, "left", len(tokenizer) - 1)
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.special_word_ids() == tokenizer.special_word_ids()
    loaded.save_pretrained(tmp_path / "b")
    code = {name for name in contents(tmp_path / "a") if name.endswith(".py")}
    assert {name for name in contents(tmp_path / "b") if name.endswith(".py")} == code >= {"tokenization_tfree.py"}
    assert contents(tmp_path / "a")[WORDS_FILE] == contents(tmp_path / "b")[WORDS_FILE]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"ruleset": "v2"}, 256),
        ({"ruleset": "v2", "max_word_bytes": None, "special_syntax": "any"}, None),
        ({"max_word_bytes": 9}, 9),
    ],
)
def test_settings_are_saved(options, limit, tmp_path):
    TFreeTokenizer(["the"], **options).save_pretrained(tmp_path)
    loaded = TFreeTokenizer.from_pretrained(tmp_path)
    assert loaded.max_word_bytes == limit
    assert loaded.ruleset == options.get("ruleset", "v1")
    assert loaded.special_syntax == options.get("special_syntax", "registered")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["max_word_bytes"] == limit
    assert config["auto_map"]["AutoTokenizer"][0] == "tokenization_tfree.TFreeTokenizer"


def test_the_words_file_is_plain_ascii_json(tmp_path):
    TFreeTokenizer(ODD_WORDS).save_pretrained(tmp_path)
    data = (tmp_path / WORDS_FILE).read_bytes()
    assert data.isascii()
    assert json.loads(data) == ODD_WORDS


def test_a_failed_save_changes_nothing(tmp_path, monkeypatch):
    TFreeTokenizer(WORDS).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(wordlist_tfree.os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            TFreeTokenizer(["other"]).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(wordlist_tfree.os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write_words(["other"], str(tmp_path / WORDS_FILE))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'["the", "hou', "must be a JSON list of words, but it cannot be read"),
        (b'["\xff"]', "must be a JSON list of words, but it cannot be read"),
        (b"[" * 100_000, "must be a JSON list of words, but it cannot be read"),
        (b'{"the": 1}', "must be a list of words, got dict"),
        (b'["the", NaN]', "must hold strings only, but entry 1 is nan"),
        (b'["the", ["a"]]', "must hold strings only, but entry 1 is"),
        (b"[]", "must hold between 1 and 4000000 words, got 0"),
        (b'["the", "' + b"a" * 5000 + b'"]', "must hold words of at most 4096 characters, but entry 1 has 5000"),
        (b'["the", "the"]', "must not repeat words, but these occur again: 'the'"),
        (b'["a b"]', "must hold single words"),
    ],
)
def test_a_damaged_words_file_is_refused_by_name(content, message, tmp_path):
    TFreeTokenizer(WORDS).save_pretrained(tmp_path)
    (tmp_path / WORDS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        TFreeTokenizer.from_pretrained(tmp_path)
    assert WORDS_FILE in str(caught.value)


def test_a_missing_or_huge_words_file_is_refused(tmp_path, monkeypatch):
    TFreeTokenizer(WORDS).save_pretrained(tmp_path)
    monkeypatch.setattr(wordlist_tfree, "MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match=f"{WORDS_FILE} must be at most 10 bytes"):
        TFreeTokenizer.from_pretrained(tmp_path)
    (tmp_path / WORDS_FILE).unlink()
    with pytest.raises(ValueError, match=f"words or vocab_file must be given; .* has no {WORDS_FILE}"):
        TFreeTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_words(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ruleset": "v9"}, "ruleset must be"),
        ({"max_word_bytes": 1}, "max_word_bytes must be"),
        ({"special_syntax": "none"}, "special_syntax must be"),
        ({"base_special_tokens": ["a", "a"]}, "base_special_tokens must be distinct"),
        ({"base_special_tokens": ["<|ws|>"]}, "base_special_tokens must not be structural words"),
        ({"base_special_tokens": [3]}, "base_special_tokens must be a list of strings"),
        ({"added_tokens_decoder": {"7": {"content": "x"}}}, "added_tokens_decoder gives id 7 to 'x'"),
        ({"added_tokens_decoder": {"999": {"content": "x"}}}, "added_tokens_decoder must continue with id 528"),
        ({"added_tokens_decoder": {"-1": {"content": "x"}}}, "added_tokens_decoder gives id -1 to 'x'"),
    ],
)
def test_a_damaged_config_is_refused_by_field(change, message, tmp_path):
    TFreeTokenizer(WORDS).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        TFreeTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "words must hold between 1 and 4000000 words, got 0"),
        ("the", "words must be a list of words, got str"),
        ([b"the"], "words must hold strings only, but entry 0 is b'the'"),
        ([""], "words must hold single words"),
        (["a", " ", "\n", "b c", "11", "x1", "a-b"], "' ', '\\\\n', 'b c', '11', 'x1' and 1 more"),
        (["<|ws|>"], "words must not hold special or structural tokens, got '<|ws|>'"),
        (["<|endoftext|>", "a"], "words must not hold special or structural tokens"),
        (["a", "b", "a"], "words must not repeat words, but these occur again: 'a'"),
    ],
)
def test_unusable_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        TFreeTokenizer(words)


def test_words_over_the_byte_limit_are_refused():
    with pytest.raises(ValueError, match="words must hold words of at most max_word_bytes = 4 bytes: 'house'"):
        TFreeTokenizer(["the", "house"], max_word_bytes=4)
    with pytest.raises(ValueError, match="words or vocab_file must be given; got neither"):
        TFreeTokenizer()


@pytest.mark.parametrize("ruleset", ["v1", "v2"])
def test_words_are_checked_as_they_are_split(ruleset):
    candidates = [
        "a",
        "a\u0301",
        "\u0301",
        "\u0301a",
        "日本",
        "日",
        "か\u3099",
        "👨\u200d👩",
        "👍🏽",
        "🇩🇪",
        "🇩🇪🇫",
        "1",
        "12",
        "_",
        "\t",
    ]
    for word in candidates:
        is_single = is_one_word(word, ruleset)
        try:
            check_words([word], "words", ruleset, None, ())
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == is_single, word


def test_checking_words_is_fast():
    words = [format(index, "b").translate({48: "x", 49: "y"}) + "q" * (index % 5) for index in range(100_000)]
    words = list(dict.fromkeys(words))
    start = time.process_time()
    check_word_types(words, "words")
    check_words(words, "words", "v2", 256, ["<|endoftext|>"])
    assert time.process_time() - start < 0.3 * len(words) / 100_000 + 0.2  # the character table is built once


def test_ids_do_not_depend_on_the_process():
    code = (
        "from tfree_tokenizer.remote.lookup_tfree import WordLookup\n"
        "words = [chr(97 + i) + chr(97 + j) for i in range(26) for j in range(26)]\n"
        "lookup = WordLookup(words, first_structural_id=4, ruleset='v2', max_word_bytes=None)\n"
        "text = 'ab cd zz unheard  ab'\n"
        "print(lookup.encode([text])[0].ids.tolist() + lookup.encode_short(text))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
