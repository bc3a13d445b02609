"""Figures and overlays: drawn without a display, without pyplot, whatever the tokens are."""

import io
import math
import sys

import numpy as np
import pytest
import torch

from atman_explain.remote.explanation_atman import Explanation, Target
from atman_explain.remote.flow_atman import set_lines
from atman_explain.remote.heatmap_atman import MAX_LINES, MAX_PANELS, plot_tokens
from atman_explain.remote.overlay_atman import RAMP, overlay_map, ramp_colors, upsample
from atman_explain.remote.plotting_atman import plot_curves, plot_overlay, plot_top
from atman_explain.remote.units_atman import Unit

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def example(tokens=("Oslo", " is", " the"), scores=((3.2, -0.8, math.nan),), **fields):
    scores = torch.tensor(scores)
    defaults = {
        "scores": scores,
        "units": tuple(Unit(text=token, columns=(i,)) for i, token in enumerate(tokens)),
        "targets": tuple(Target(text=f" t{i}", id=i) for i in range(len(scores))),
        "baseline_logprobs": torch.full((len(scores),), math.log(0.5)),
        "prompt_ids": tuple(range(len(tokens))),
        "tokens": tuple(tokens),
    }
    return Explanation(**defaults | fields)


def image_example():
    units = tuple(Unit(text="", columns=(i,), kind="image", image=0, box=(i // 2, i % 2, 1, 1)) for i in range(4))
    tokens = {"prompt_ids": (), "tokens": ()}
    return example(scores=((4.0, -4.0, 0.0, 2.0),), units=units, grids=((2, 2),), **tokens)


def pixels_of(figure):
    return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")).astype(int)


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_heat_map_shows_red_blue_and_the_baseline():
    figure = example().plot()
    pixels = pixels_of(figure)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 200) & (green < 90) & (blue < 90)).any()
    assert ((blue > 200) & (red < blue - 20) & (green < 240)).any()
    assert {'" t0"', "p = 50.0 %", "opposes −3.2", "+3.2 supports", "nats"} <= set(texts_of(figure))


def test_heat_map_has_a_panel_per_target_up_to_a_limit():
    many = example(scores=[[1.0, 2.0, 3.0]] * (MAX_PANELS + 2))
    assert sum(text.startswith('" t') for text in texts_of(many.plot())) == MAX_PANELS
    assert "… 2 more targets" in texts_of(many.plot())
    assert [text for text in texts_of(many.plot(target=7)) if text.startswith('" t')] == ['" t7"']


def test_coarse_scores_are_underlined():
    assert not plot_tokens(example()).axes[0].lines
    assert len(plot_tokens(example(is_coarse=(True, False, True))).axes[0].lines) == 2


def test_long_prompts_are_cut_with_a_note():
    figure = plot_tokens(example(["a\n"] * (MAX_LINES + 5), [[1.0] * (MAX_LINES + 5)]))
    assert "… 6 more lines" in texts_of(figure)  # the last line is empty


@pytest.mark.parametrize("draw", [plot_tokens, plot_top])
def test_tokens_are_never_mathematics_or_markup(draw):
    hostile = ("$x_1$", " $\\frac$", "\\alpha", "<b>", "\x00", "_^{", "%", "$")
    figure = draw(example(hostile, [[1.0, -1, 2, 0, 1, 1, 1, 1]], targets=(Target(text="$\\bad$", id=0),)))
    assert pixels_of(figure).min() < 100


def test_figures_without_text_units_show_the_maps():
    assert len(image_example().plot().axes[0].images) == 2  # the map and the scale


def test_drawing_needs_no_pyplot_and_leaves_settings_alone(monkeypatch):
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    names = [name for name in matplotlib.rcParams if name != "backend"]  # reading that one imports pyplot
    before = [matplotlib.rcParams[name] for name in names]
    for figure in (example().plot(), plot_top(example()), plot_curves({"AtMan": [1.0, 0.0]})):
        assert figure._repr_png_()[:4] == b"\x89PNG"
    assert [matplotlib.rcParams[name] for name in names] == before


def test_missing_libraries_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Plots need matplotlib: pip install atman-explain\[plot\]"):
        example().plot()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"Painting over pictures needs Pillow: pip install atman-explain\[plot\]"):
        image_example().overlay(np.zeros((4, 4, 3), np.uint8))


def test_bars_are_ranked_by_size_and_sided_by_sign():
    axes = plot_top(example(("a", "b", "c", "d"), ((1.0, -3.0, math.nan, 2.0),)), k=2).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "d"]
    assert [bar.get_width() for bar in axes.patches] == [-3.0, 2.0]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        plot_top(example(), k=0)


def test_curves_state_their_areas():
    axes = plot_curves({"AtMan": [1.0, 0.0], "$x$": [1.0, 1.0]}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["AtMan (area 0.500)", "$x$ (area 1.000)"]
    assert axes.get_xlabel() == "% of units removed"
    with pytest.raises(ValueError, match="curves must hold at least one curve"):
        plot_curves({})


def test_overlay_figure_has_two_pictures_and_a_scale():
    figure = plot_overlay(image_example(), np.full((8, 16, 3), 128, np.uint8))
    assert len(figure.axes) == 3
    assert figure.axes[0].get_title() == "picture" and figure.axes[1].get_title() == '" t0"   p = 50.0 %'
    assert pixels_of(figure).std() > 0


def test_overlay_lights_up_support_and_leaves_the_rest():
    grey = Image.new("L", (40, 20), 128)
    result = image_example().overlay(grey, alpha=1.0)
    assert result.size == (40, 20) and result.mode == "RGB"
    assert result.getpixel((0, 0)) == tuple(round(255 * channel) for channel in RAMP[-1])
    assert result.getpixel((39, 0)) == (128, 128, 128)  # opposes the target
    assert np.array_equal(image_example().overlay(grey, alpha=0.0), np.full((20, 40, 3), 128))


def test_overlay_takes_arrays_and_refuses_what_is_no_picture():
    values = torch.tensor([[1.0, math.nan]])
    assert overlay_map(values, np.zeros((3, 5, 3), np.uint8)).size == (5, 3)
    with pytest.raises(ValueError, match=r"image must be a PIL image or uint8 \[H, W, 3\], got float64 \[3, 5\]"):
        overlay_map(values, np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        overlay_map(values, np.zeros((3, 5, 3), np.uint8), alpha=2)


def test_upsampling_keeps_the_range_and_the_place_of_the_peak():
    pixels = upsample(torch.tensor([[0.0, -5.0, 0.0], [0.0, 0.0, 10.0]], dtype=torch.bfloat16), 20, 30)
    assert pixels.shape == (20, 30) and pixels.min() == 0.0 and pixels.max() == 1.0
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert row >= 10 and column >= 20
    assert not upsample(torch.full((2, 2), -1.0), 4, 4).any()


def test_ramp_gets_lighter():
    weights = np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(ramp_colors(np.linspace(0, 1, 50)) @ weights) > 0).all()


def lines_of(pieces, width):
    return [[(box.piece, box.text, box.x) for box in line] for line in set_lines(pieces, width, len)]


def test_lines_break_between_words():
    assert lines_of(["Oslo is nice"], 8) == [[(0, "Oslo is", 0)], [(0, "nice", 0)]]


def test_words_of_several_pieces_stay_together():
    assert lines_of(["a b", "c", ","], 4) == [[(0, "a", 0)], [(0, "b", 0), (1, "c", 1), (2, ",", 2)]]


def test_line_breaks_and_indents_are_kept():
    assert lines_of(["a\n  b\n", "c"], 9) == [[(0, "a", 0)], [(0, "  b", 0)], [(1, "c", 0)]]


def test_long_words_break_anywhere():
    assert lines_of(["abcdefgh", "ij"], 3) == [
        [(0, "abc", 0)],
        [(0, "def", 0)],
        [(0, "gh", 0), (1, "i", 2)],
        [(1, "j", 0)],
    ]
