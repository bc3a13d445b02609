"""The command `atman-explain`."""

import io

import pytest

from atman_explain import Explanation
from atman_explain.cli import main
from tests.support.atman import tiny_model
from tests.support.atman_tokenizers import byte_level

TEXT = "Oslo is the capital of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer)).float().save_pretrained(folder)
    return str(folder)


def test_it_prints_a_table_and_writes_files(folder, tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main([folder, "--prompt", TEXT, "--target", " Norway", "--granularity", "word", *options]) == 0
    printed = capsys.readouterr().out
    assert '5 units, target " Norway"' in printed
    assert '" capital"' in printed
    assert [unit.text.strip() for unit in Explanation.load(files["json"]).units] == [
        "Oslo",
        "is",
        "the",
        "capital",
        "of",
    ]
    assert files["html"].read_text().startswith("<!doctype html>")


def test_it_draws_a_picture(folder, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([folder, "--prompt", TEXT, "--plot", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_prompt_may_come_from_standard_input(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert main([folder, "--prompt", "-", "--max-new-tokens", "2", "--mode", "log_additive"]) == 0
    assert "units" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt"),
        (["--prompt", TEXT, "--mode", "divide"], "mode must be one of"),
        (["--prompt", TEXT, "--factor", "-1"], "factor must be finite and not negative"),
        (["--prompt", TEXT, "--image", "absent.png"], "absent.png"),
    ],
)
def test_errors_are_one_line(folder, arguments, message, capsys):
    assert main([folder, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("atman-explain: error: ")
    assert message in error


def test_an_absent_model_is_an_error(capsys, tmp_path):
    assert main([str(tmp_path / "absent"), "--prompt", TEXT]) == 2
    assert "absent" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out
