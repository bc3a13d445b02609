"""Explanations as matplotlib figures, drawn without pyplot: no window, no display, no global state."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .display_atman import (
    blend,
    greatest,
    probability,
    prompt_pieces,
    shorten,
    target_text,
    text_color,
    visible,
)
from .explanation_atman import Explanation
from .metrics_atman import area_under_curve
from .overlay_atman import ramp_colors, to_picture

MAX_PANELS = 6
MAX_LINES = 40
_POINTS = 72.0  # per inch; token heat maps are laid out in points
_WIDTH, _MARGIN, _LINE, _SIZE = 640.0, 16.0, 22.0, 12.0
_MAP = 150.0  # height of an image map
_WORDS = re.compile(r"\n|[^\S\n]*\S+|[^\S\n]+")
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Emoji")


def plot_tokens(explanation: Explanation, target: int | None = None) -> Any:
    """Draw the prompt as a heat map: red units support the target, blue ones oppose it.

    Args:
        explanation: of any granularity.
        target: index of the only target to draw; None draws one panel for each of the first six.

    Returns:
        A matplotlib Figure, with a map per image if the prompt has any.
    """
    targets = list(range(len(explanation.targets)))[:MAX_PANELS] if target is None else [target]
    scores = {t: explanation.relevance(t).tolist() for t in targets}
    scale = greatest(score for row in scores.values() for score in row)
    figure = _figure(_WIDTH, 100.0)
    flow = _Flow(figure)
    for t in targets:
        flow.title(f"{target_text(explanation, t)}   p = {probability(explanation, t)}")
        for piece in prompt_pieces(explanation):
            flow.add(piece.text, None if piece.unit is None else scores[t][piece.unit] / scale)
        flow.end_panel()
        for i in _mapped_images(explanation):
            flow.add_map(explanation.image_map(i, t) / scale, f"image {i}")
        flow.end_maps()
    if target is None and len(explanation.targets) > MAX_PANELS:
        flow.title(f"… {len(explanation.targets) - MAX_PANELS} more targets")
    flow.finish(scale, explanation.score_unit)
    return figure
