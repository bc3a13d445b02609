"""The command `tfree`."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.original_tfree import OriginalModel
from tests.support.tfree import tiny_tfree

TEXT = "The house is small,\nthe  Zwetschge is not.\n"


@pytest.fixture
def tfree(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`tfree("stats", path)` runs a command that succeeds and returns what it printed."""
    from tfree_tokenizer.cli import main

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails("stats", path)` runs a command that fails and returns its one line of complaint."""
    from tfree_tokenizer.cli import main

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tfree {arguments[0]}: error: ")
        return line

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = tiny_tfree()
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("command", ["convert", "build-dictionary", "tokenize", "stats"])
def test_every_command_explains_itself_with_examples(command, capsys):
    from tfree_tokenizer.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"\n  tfree {command} " in shown.partition("examples:")[2]


def test_the_list_of_commands_fits_on_a_screen(capsys):
    from tfree_tokenizer.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24
    assert all(any(f"    {command} " in line for line in lines) for command in ("convert", "stats", "tokenize"))


@pytest.mark.parametrize("arguments", [[], ["translate"], ["stats"], ["tokenize", "--ruleset", "v3", "a"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    from tfree_tokenizer.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: tfree" in capsys.readouterr().err


def test_a_text_is_shown_as_words_and_spacing(tfree):
    shown = tfree("tokenize", "1a a\n\tb")
    assert shown.splitlines() == ["word", "1", "<|no_ws|>", "a", "a", r"<|\n|>", r"\t", "<|no_ws|>", "b"]


def test_a_tokenizer_adds_ids(tfree, checkpoint):
    tokenizer = tiny_tfree()[1]
    first, words = tokenizer.first_byte_id, tokenizer.words_by_id()
    rows = [line.split(maxsplit=1) for line in tfree("tokenize", "--tokenizer", checkpoint, "house é").splitlines()]
    assert rows == [
        ["word", "ids"],
        ["house", str(words.index("house"))],
        ["é", f"{first + 0xC3} {first + 256 + 0xA9}"],
    ]


def test_rows_are_those_of_the_model_beside_the_tokenizer(tfree, checkpoint):
    from tfree_tokenizer import HashSpec, special_rows, word_pattern

    spec = HashSpec(hash_vocab_size=64, num_hashes=4)
    text = "house Zwetschge\n<|endoftext|>"
    printed = tfree("tokenize", "--tokenizer", checkpoint, "--rows", "--json", text)
    tokens = {token["word"]: token for token in map(json.loads, printed.splitlines())}
    assert {word: token["kind"] for word, token in tokens.items()} == {
        "house": "word", "Zwetschge": "spelled", "<|\n|>": "marker", "<|endoftext|>": "special"
    }  # fmt: skip
    for word in ("house", "Zwetschge"):
        assert tokens[word]["rows"] == word_pattern(word, spec).rows.tolist()
    for word in ("<|\n|>", "<|endoftext|>"):
        assert tokens[word]["rows"] == special_rows(word, spec).tolist()


def test_rows_can_be_asked_for_another_table(tfree):
    from tfree_tokenizer import HashSpec, word_pattern

    printed = tfree("tokenize", "--rows", "--hash-vocab-size", 50, "--num-hashes", 5, "tree")
    expected = word_pattern("tree", HashSpec(hash_vocab_size=50, num_hashes=5)).rows
    assert printed.splitlines()[1].split() == ["tree", *map(str, expected)]


def test_text_is_read_from_standard_input(tfree, page, monkeypatch):
    with page.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert tfree("tokenize").split()[:4] == ["word", "The", "house", "is"]


def test_statistics_are_counts_that_can_be_checked_by_hand(tfree, checkpoint, page):
    head, row = tfree("stats", "--tokenizer", checkpoint, page).splitlines()
    assert " ".join(head.split()) == "file bytes words tokens tokens/word bytes/token ids/token spelled markers"
    # The house is small , LF the 2-ws Zwetschge is not . LF; "The", "Zwetschge" and "not" are spelled: 3 + 9 + 3 ids
    assert row.split()[1:] == ["43", "8", "13", "1.625", "3.308", f"{25 / 13:.3f}", "23.08%", "23.08%"]


def test_several_files_get_a_total_and_folders_are_searched(tfree, page, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("a b")
    (tmp_path / "more" / ".hidden").write_text("hidden")
    (tmp_path / "more" / "picture").write_bytes(b"\xff\xd8\xff")
    rows = [line.split() for line in tfree("stats", page, tmp_path / "more").splitlines()]
    assert [Path(row[0]).name for row in rows] == ["file", "page.txt", "b.txt", "total"]
    assert rows[3][1:4] == ["46", "10", "15"]
    assert rows[2][6:8] == ["-", "-"]


def test_a_dictionary_is_built_counted_and_used(tfree, page, tmp_path):
    words, counts = tmp_path / "words.json", tmp_path / "counts.tsv"
    shown = tfree("build-dictionary", page, "-o", words, "--counts", counts, "--max-words", 3, "--quiet")
    assert json.loads(words.read_text()) == ["is", ",", "."]
    assert counts.read_text() == "is\t2\n,\t1\n.\t1\n"
    assert "3 of 9 words, 40.0% of all occurrences" in shown
    row = tfree("stats", "--dictionary", words, page).splitlines()[1].split()
    assert row[7] == f"{6 / 13:.2%}"


def test_rare_words_can_be_left_out(tfree, page, tmp_path):
    tfree("build-dictionary", page, page, "-o", tmp_path / "words.json", "--min-count", 3, "--quiet")
    assert json.loads((tmp_path / "words.json").read_text()) == ["is"]


@pytest.mark.parametrize("length", [1, 5, 7])
def test_pieces_of_a_file_end_between_words(length, tmp_path, monkeypatch):
    from tfree_tokenizer import cli

    text = "one two\r\nthree\n\nfour-five-six seven"
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    monkeypatch.setattr(cli, "PIECE_CHARACTERS", length)
    pieces = list(cli._pieces(str(path), ()))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert all(piece[-1] in " \n" for piece in pieces[:-1])


def test_a_converted_checkpoint_loads(tfree, tmp_path):
    from tfree_tokenizer.loading import load_pretrained

    source = OriginalModel().save(tmp_path / "original", with_tokenizer=False)
    (tmp_path / "counts.tsv").write_text("the\t3\nhouse\t5\n")
    shown = tfree("convert", source, tmp_path / "out", "--dictionary", tmp_path / "counts.tsv", "--dtype", "bfloat16")
    assert "2 words" in shown
    assert load_pretrained(tmp_path / "out")[0].dictionary_words == ["house", "the"]


def test_errors_are_one_line_that_names_the_file(fails, tmp_path, page, checkpoint):
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "bad.json").write_text('["two words"]')
    assert "picture is not UTF-8 text" in fails("stats", tmp_path / "picture")
    assert "nowhere.txt" in fails("stats", tmp_path / "nowhere.txt")
    assert "bad.json" in fails("stats", "--dictionary", tmp_path / "bad.json", page)
    assert "has no tokenizer_config.json" in fails("tokenize", "--tokenizer", tmp_path, "a")
    assert "transformer_config.yaml" in fails("convert", tmp_path, tmp_path / "out")
    assert "is not empty" in fails("convert", tmp_path, checkpoint)
    assert "--output: the folder of" in fails("build-dictionary", page, "-o", tmp_path / "no" / "words.json")
    assert "hash_vocab_size" in fails("tokenize", "--rows", "--hash-vocab-size", 7, "a")


def test_the_installed_command_reads_standard_input():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["tfree"].partition(":")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"  # what an installer writes
    command = [sys.executable, "-c", script, "stats", "-"]
    done = subprocess.run(command, input=TEXT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[:4] == ["-", "43", "8", "13"]


def test_a_reader_that_stops_early_is_no_error(page):
    command = f"{sys.executable} -m tfree_tokenizer tokenize < {page} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")
