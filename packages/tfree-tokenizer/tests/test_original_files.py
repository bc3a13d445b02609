"""Word lists of original checkpoints: what is accepted, and what an error names."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture
def read_dictionary() -> Callable[[Path], list[str]]:
    from tfree_tokenizer import original_files

    return original_files.read_dictionary


DICTIONARIES = {
    "pairs.json": '[["b", 2], ["a", 5], ["\\ud800", 2], ["c", 9]]',
    "object.json": '{"b": 2, "a": 5, "\\ud800": 2, "c": 9}',
    "list.json": '["c", "a", "b", "\\ud800"]',
    "counts.tsv": "b\t2\na\t5\n\ud800\t2\nc\t9\n",
}


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_dictionary_file_gives_its_most_frequent_words_first(read_dictionary, tmp_path, name):
    (tmp_path / name).write_bytes(DICTIONARIES[name].encode("utf-8", "surrogatepass"))
    assert read_dictionary(tmp_path / name) == ["c", "a", "b", "\ud800"]


def test_tabs_and_carriage_returns_are_words_of_a_counts_file(read_dictionary, tmp_path):
    (tmp_path / "counts.tsv").write_bytes("\t\t3\n\r\t2\n\x85\t1".encode())
    assert read_dictionary(tmp_path / "counts.tsv") == ["\t", "\r", "\x85"]


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("d.json", "[]", "at least one word"),
        ("d.json", "{}", "at least one word"),
        ("d.json", "3", "list or object"),
        ("d.json", '[["a", 1], ["b"]]', "entry 1"),
        ("d.json", '[["a", 1], "b"]', "entry 1"),
        ("d.json", '[["a", -1]]', "entry 0"),
        ("d.json", '{"a": true}', "entry 0"),
        ("d.json", '{"a": 1.5}', "entry 0"),
        ("d.json", '{"a": NaN}', "NaN"),
        ("d.json", '{"a": 1, "a": 2}', "'a' must not occur twice"),
        ("d.json", '["a"', "line 1, column"),
        ("d.tsv", "a\t1\nb", "line 2"),
        ("d.tsv", "a\tmany\n", "line 1"),
        ("d.tsv", "a\t99999999999999999999\n", "line 1"),
        ("d.tsv", "", "at least one word"),
    ],
)
def test_a_damaged_dictionary_names_file_and_entry(read_dictionary, tmp_path, name, text, where):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"d\.\w+: .*{where}"):
        read_dictionary(tmp_path / name)


@settings(
    max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    data=st.binary(max_size=60) | st.text('[]{},:"ab1-\t\n', max_size=60).map(str.encode),
    suffix=st.sampled_from(["json", "tsv"]),
)
def test_any_file_is_a_word_list_or_refused_by_name(read_dictionary, tmp_path, data, suffix):
    path = tmp_path / f"words.{suffix}"
    path.write_bytes(data)
    problem, words = "", ["refused"]
    try:
        words = read_dictionary(path)
    except ValueError as error:
        problem = str(error)
    assert not problem or problem.startswith(f"{path}: ")
    assert words
    assert all(isinstance(word, str) for word in words)
