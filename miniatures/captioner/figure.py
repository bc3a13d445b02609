"""Items and methods -> a picture: scene, object, and the map of every method, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from miniatures.captioner.items import Item
from miniatures.captioner.scenes import GRID

SIDE = 1.3  # inches of one panel


def draw_maps(items: Sequence[Item], methods: Mapping[str, Callable[[Item], Tensor]], path: Path) -> None:
    """Draw squared maps, each scaled to its own maximum, over the gray scene."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIDE * (2 + len(methods)), 1.15 * SIDE * len(items)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(items), 2 + len(methods), squeeze=False)
    for row, item in zip(panels, items, strict=True):
        gray = item.picture.pixels.mean(-1) / 255
        row[0].imshow(item.picture.pixels)
        row[0].set_title(f"{item.question.prompt.removeprefix('<image> ')}\n{item.question.answer}", fontsize=6)
        row[1].imshow(item.shares.view(GRID, GRID), cmap="gray")
        for panel, (name, method) in zip(row[2:], methods.items(), strict=True):
            values = method(item).detach().double().square().sum(0).view(GRID, GRID)
            panel.imshow(gray, cmap="gray", vmin=-0.5, vmax=1.5)
            panel.imshow(np.kron(values, np.ones((8, 8))), cmap="magma", alpha=0.8)
            if row is panels[0]:
                panel.set_title(name.replace(", ", "\n").replace(" (", "\n("), fontsize=6)
    for panel in panels.flat:
        panel.set_axis_off()
    panels[0][1].set_title("object", fontsize=6)
    figure.savefig(path, dpi=90)
