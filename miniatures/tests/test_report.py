"""The report: numbers reach the page, text around the markers stays."""

import pytest

from miniatures.outputs import END, START
from miniatures.tfree import report as report_module
from miniatures.tfree.report import draw, report, write_report


def result(model, seed, bits):
    measures = {"bits_per_byte": bits, "word_accuracy": 0.25, "tokens_per_word": 1.5}
    return {
        "model": model,
        "seed": seed,
        "parameters": 1000,
        "vocabulary_parameters": 600,
        "training": {"bytes_per_second": 2000.0},
        "held_out": {"de": measures, "en": measures},
        "samples": {"To open": f"To open\nwith seed {seed}"},
    }


RESULTS = [result("tfree-bce", 0, 2.0), result("tfree-bce", 1, 2.2), result("bpe", 0, 1.0)]


def test_a_cell_shows_mean_and_deviation_over_seeds():
    lines = report(RESULTS).splitlines()
    assert "| de | 2.100 ± 0.141 | 1.000 |" in lines
    assert "| of these in embedding and head | 600 | 600 |" in lines


def test_samples_are_those_of_the_first_seed_on_one_line():
    text = report(RESULTS)
    assert "  - To open / with seed 0" in text
    assert "with seed 1" not in text


def test_only_the_text_between_the_markers_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "draw", lambda results, path: None)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write_report(RESULTS, tmp_path)
    text = page.read_text()
    assert text.startswith(f"before\n{START}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text


@pytest.mark.slow  # the first use of matplotlib on a machine builds its font list
def test_the_picture_has_a_panel_for_each_of_two_measures(tmp_path):
    from PIL import Image

    draw(RESULTS, tmp_path / "comparison.png")
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 2 * picture.height


def test_a_page_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(ValueError, match="text must contain <!-- results --> and <!-- /results -->"):
        write_report(RESULTS, tmp_path)
