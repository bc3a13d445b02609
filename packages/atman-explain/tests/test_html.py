"""The notebook view: nothing in it but the explanation, whatever the tokens are."""

import base64
import math
import re
import struct
import zlib
from html.parser import HTMLParser

import pytest
import torch

from atman_explain.remote import html_atman
from atman_explain.remote.display_atman import OPPOSES, SUPPORTS, blend, luminance
from atman_explain.remote.explanation_atman import Explanation, Target
from atman_explain.remote.units_atman import Unit

HOSTILE = [
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "'&amp;",
    "\n\n",
    "</div>",
    "\x1b[31m",
    "\u202eevil",
    " <!--",
]
HARMLESS_TAGS = {"div", "span", "b", "br", "img", "table", "tr", "th", "td"}


def explain_tokens(tokens, scores, *, target="t", **fields):
    scores = torch.tensor(scores)
    defaults = {
        "scores": scores,
        "units": tuple(Unit(text=token, columns=(i,)) for i, token in enumerate(tokens)),
        "targets": tuple(Target(text=f"{target}{i}", id=i) for i in range(len(scores))),
        "baseline_logprobs": torch.full((len(scores),), math.log(0.25)),
        "prompt_ids": tuple(range(len(tokens))),
        "tokens": tuple(tokens),
    }
    return Explanation(**defaults | fields)


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(data)


@pytest.mark.parametrize("targets", [1, 3, html_atman.MAX_ROWS + 1], ids=["one", "rows", "table"])
def test_hostile_tokens_stay_text(targets):
    explanation = explain_tokens(HOSTILE, [[1.0] * len(HOSTILE)] * targets, target="<img src=x onerror=y>")
    read = Reader(explanation._repr_html_())
    assert read.tags <= HARMLESS_TAGS
    assert {name for name, _ in read.attributes} <= {"class", "style", "title", "dir"}
    assert "<script>alert(1)</script>" in read.text and "<img src=x onerror=y>" in read.text
    assert "\x1b" not in read.text and "\\u001b[31m" in read.text
    assert "\u202e" not in read.text and "\\u202eevil" in read.text


def test_nothing_is_loaded_from_elsewhere():
    read = Reader(image_explanation()._repr_html_())
    assert [value[:22] for name, value in read.attributes if name in ("src", "href")] == ["data:image/png;base64,"]
    assert not re.search(
        r"url\(|@import|https?:", " ".join(value for name, value in read.attributes if name == "style")
    )


def test_tooltips_give_the_exact_score():
    explanation = explain_tokens(["Oslo", " is\n"], [[1.234567, -0.5]])
    titles = [value for name, value in Reader(explanation._repr_html_()).attributes if name == "title"]
    assert titles == ["Oslo: +1.23457 nats", " is↵: -0.5 nats"]


def test_line_breaks_are_marked_and_kept():
    assert "a↵\nb" in Reader(explain_tokens(["a", "\n", "b"], [[0.0, 1.0, 0.0]])._repr_html_()).text


def test_unscored_text_is_shown_without_a_tooltip():
    explanation = explain_tokens(["<s>", "Oslo"], [[1.0]], units=(Unit(text="Oslo", columns=(1,)),))
    read = Reader(explanation._repr_html_())
    assert "<s>Oslo" in read.text
    assert [value for name, value in read.attributes if name == "title"] == ["Oslo: +1 nats"]


def test_missing_and_coarse_scores_say_so():
    explanation = explain_tokens(["a", "b"], [[1.0, math.nan]], is_coarse=(True, False))
    titles = [value for name, value in Reader(explanation._repr_html_()).attributes if name == "title"]
    assert titles == ["a: +1 nats (of a larger unit)", "b: not computed"]


def test_few_targets_are_rows_and_many_a_table():
    few = explain_tokens(["a"], [[1.0]] * html_atman.MAX_ROWS)._repr_html_()
    many = explain_tokens(["a"], [[1.0]] * (html_atman.MAX_ROWS + 1))._repr_html_()
    assert "<table" not in few and few.count("p = 25.0 %") == html_atman.MAX_ROWS
    assert many.count("<td") == html_atman.MAX_ROWS + 1


def test_long_prompts_and_tables_are_cut_with_a_note(monkeypatch):
    monkeypatch.setattr(html_atman, "MAX_PIECES", 3)
    monkeypatch.setattr(html_atman, "MAX_TABLE_UNITS", 2)
    text = Reader(explain_tokens(["a", "b", "c", "d", "e"], [[1.0] * 5] * 9)._repr_html_()).text
    assert "abc … 2 more" in text
    assert "… 3 more units and 0 more targets in scores" in text


def test_scales_without_signs_begin_at_0():
    explanation = explain_tokens(["a", "b"], [[2.0, -1.0]])
    assert "opposes −2" in explanation._repr_html_()
    assert "opposes" not in explanation.squared()._repr_html_()


@pytest.mark.parametrize("page", [(255, 255, 255), (17, 17, 17)], ids=["light", "dark"])
@pytest.mark.parametrize("strength", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_text_contrasts_with_its_background(page, strength):
    ink = (31, 31, 31) if page[0] > 128 else (224, 224, 224)  # of notebooks
    low, high = sorted((luminance(ink), luminance(blend(strength, page, html_atman.OPACITY))))
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2, level AA


def image_explanation():
    units = tuple(Unit(text="", columns=(i,), kind="image", image=0, box=(i // 3, i % 3, 1, 1)) for i in range(5))
    return Explanation(
        scores=torch.tensor([[2.0, -2.0, 0.0, 1.0, math.nan]]),
        units=units,
        targets=(Target(text="cat", id=1),),
        baseline_logprobs=torch.zeros(1),
        grids=((2, 3),),
    )


def test_image_maps_are_png_files():
    (source,) = [value for name, value in Reader(image_explanation()._repr_html_()).attributes if name == "src"]
    data = base64.b64decode(source.partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (3, 2)
    start = data.index(b"IDAT")
    pixels = zlib.decompress(data[start + 4 : start + 4 + struct.unpack(">I", data[start - 4 : start])[0]])
    assert pixels[:1] == b"\0" and pixels[13:14] == b"\0"  # each line unfiltered
    assert tuple(pixels[1:4]) == SUPPORTS and tuple(pixels[5:8]) == OPPOSES
    assert pixels[4] == pixels[8] > pixels[17] > pixels[12] == 0  # opacity: strongest, weaker, none
    assert tuple(pixels[18:22]) == tuple(pixels[22:26]) == (128, 128, 128, 90)  # not computed, and no unit


def test_image_maps_open_in_pillow():
    image = pytest.importorskip("PIL.Image")
    import io

    picture = image.open(io.BytesIO(html_atman._png(image_explanation().image_map(0), 2.0)))
    assert picture.size == (3, 2) and picture.mode == "RGBA"
    picture.load()
