"""The terminal view, and the texts and colours that all views share."""

import math
import re

import pytest
import torch

from atman_explain.remote import terminal_atman
from atman_explain.remote.display_atman import (
    Piece,
    display_width,
    format_probability,
    prompt_pieces,
    shorten,
    text_color,
    visible,
)
from atman_explain.remote.explanation_atman import Explanation, Target
from atman_explain.remote.units_atman import Unit


def example(tokens=("Oslo", " is", " the"), scores=((3.2, -0.8, math.nan),), **fields):
    scores = torch.tensor(scores)
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    defaults = {
        "scores": scores,
        "units": tuple(
            Unit(text=token, columns=(i,), span=(ends[i] - len(token), ends[i])) for i, token in enumerate(tokens)
        ),
        "targets": tuple(Target(text=f" t{i}", id=i) for i in range(len(scores))),
        "baseline_logprobs": torch.full((len(scores),), math.log(0.5)),
        "prompt": "".join(tokens),
        "prompt_ids": tuple(range(len(tokens))),
        "tokens": tuple(tokens),
    }
    return Explanation(**defaults | fields)


def test_table_of_one_target():
    assert str(example(is_coarse=(False, True, False))).splitlines() == [
        '3 units, target " t0", p = 50.0 %',
        "      nats  token  unit",
        '   +3.2000      0  "Oslo"                          ████████████████████████',
        '   -0.8000      1 ~" is"                           ██████ opposes',
        "                   1 not computed",
    ]


def test_several_targets_list_what_supports_each():
    lines = str(example(scores=((1.0, 0.0, 2.0), (-1.0, -2.0, -3.0)))).splitlines()
    assert lines[0] == '3 units, all targets " t0 t1", p = 25.0 %'
    assert lines[-2] == '  " t0"                  p = 50.0 %  " the" +2, "Oslo" +1'
    assert lines[-1] == '  " t1"                  p = 50.0 %  nothing'


def test_long_lists_are_cut_with_a_note():
    tokens = tuple(f" w{i}" for i in range(30))
    lines = str(example(tokens, torch.ones(25, 30).tolist())).splitlines()
    assert sum("█" in line for line in lines) == terminal_atman.MAX_UNITS
    assert "                   … 20 more" in lines and lines[-1] == "… 5 more"


def test_wide_characters_keep_the_columns():
    lines = str(example(("東京", " is", "é"), ((1.0, 1.0, 1.0),))).splitlines()
    bars = [display_width(line[: line.index("█")]) for line in lines if "█" in line]
    assert len(bars) == 3 and len(set(bars)) == 1


def test_table_holds_no_control_characters():
    text = str(example(("\x1b[31m", "\r", "\x07"), ((1.0, 2.0, 3.0),), targets=(Target(text="\x1b]0;x\x07", id=0),)))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_colored_prompt(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    heading, text = example().to_ansi().split("\n")
    assert re.sub(r"\x1b\[[\d;]*m", "", heading) == 'target " t0", p = 50.0 %;  -3.2  opposes,  +3.2  supports (nats)'
    assert text == "\x1b[38;5;231;48;5;160mOslo\x1b[0m \x1b[38;5;16;48;5;189mis\x1b[0m \x1b[2mthe\x1b[0m"


def test_colored_prompt_underlines_coarse_scores(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = example(is_coarse=(True, False, True)).to_ansi().split("\n")[1]
    assert text == "\x1b[4;38;5;231;48;5;160mOslo\x1b[0m \x1b[38;5;16;48;5;189mis\x1b[0m \x1b[4;2mthe\x1b[0m"


def test_logits_are_not_called_probabilities():
    explanation = example(config={"delta": "logit"}, baseline_logprobs=torch.tensor([7.3125]))
    assert str(explanation).splitlines()[:2] == ['3 units, target " t0", logit 7.312', "    logits  token  unit"]


def test_no_color_is_honored(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert example().to_ansi() == str(example())
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[" in example().to_ansi()


def test_escape_sequences_of_a_prompt_do_not_reach_the_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = example(("\x1b[2J", "a\nb", "\x9b1m"), ((1.0, 1.0, 0.0),)).to_ansi()
    assert set(re.findall(r"\x1b\[[\d;]*(.)", text)) == {"m"}
    assert "\\u001b[2J" in text and "\x9b" not in text
    assert "a↵\x1b[0m\n\x1b[" in text  # colours end before the line does


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Oslo", "Oslo"),
        ("  ", "··"),
        (" a ", " a "),
        ("a\nb\tc", "a↵b→c"),
        ("\x00\x7f\u200b\u202e\u2028", "\\u0000\\u007f\\u200b\\u202e\\u2028"),
        ("\ud800", "\\ud800"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_invisible_characters_are_shown(text, expected):
    assert visible(text) == expected


def test_pieces_end_with_the_words_and_cover_the_prompt():
    explanation = example(("A", " b. ", "\n", "\t"), ((1.0, 1.0, 1.0, 1.0),), prompt="A b. \n\t c")
    assert prompt_pieces(explanation) == [
        Piece("A", 0), Piece(" ", None), Piece("b.", 1), Piece(" ", None), Piece("↵\n", 2), Piece("→", 3),
        Piece(" c", None),
    ]  # fmt: skip


def test_pieces_without_text_come_from_the_tokens():
    units = (Unit(text="ab", columns=(1, 2)), Unit(text="y", columns=(9,), kind="target"))
    explanation = example(("<s>", "a", "b", "<img>", "<img>", "c"), ((1.0, 1.0),), units=units, prompt=None)
    assert prompt_pieces(explanation) == [
        Piece("<s>", None), Piece("ab", 0), Piece("<img>×2", None), Piece("c", None), Piece("y", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("logprob", "expected"),
    [
        (0.0, "p = 100 %"),
        (-1e-5, "p > 99.9 %"),
        (math.log(0.123), "p = 12.3 %"),
        (-20.0, "p = 2.1e-07 %"),
        (math.nan, "p unknown"),
    ],
)
def test_probabilities_are_percentages(logprob, expected):
    assert format_probability(logprob) == expected


def test_short_helpers():
    assert shorten("abcdef", 4) == "abc…" and shorten("abcd", 4) == "abcd"
    assert text_color((255, 255, 255)) == (0, 0, 0) and text_color((0, 0, 90)) == (255, 255, 255)
