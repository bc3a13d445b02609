"""Items and methods -> a picture: scene, object, and the map of every method, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from miniatures.captioner.items import Item
from miniatures.captioner.scenes import GRID, NAMES, PATCH_SIZE

SIDE = 1.25  # inches of one panel


def draw_maps(items: Sequence[Item], methods: Mapping[str, Callable[[Item], Tensor]], path: Path) -> None:
    """Draw squared maps, each scaled to its own maximum, over the gray scene."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIDE * (2 + len(methods)), 1.2 * SIDE * len(items)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(items), 2 + len(methods), squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, title in zip(panels[0, 1:], ["object", *methods], strict=True):
        panel.set_title(title.replace(", ", "\n").replace(" (", "\n("), fontsize=7)
    for row, item in zip(panels, items, strict=True):
        row[0].imshow(item.picture.pixels)
        row[0].set_title(f"{item.question.prompt.removeprefix('<image> ')}\n{_told(item)}", fontsize=7)
        row[1].imshow(item.shares.view(GRID, GRID), cmap="gray")
        gray = item.picture.pixels.mean(-1)
        for panel, method in zip(row[2:], methods.values(), strict=True):
            values = method(item).detach().double().square().sum(0).view(GRID, GRID)
            panel.imshow(gray, cmap="gray", vmin=-128, vmax=383)
            panel.imshow(np.kron(values, np.ones((PATCH_SIZE, PATCH_SIZE))), cmap="magma", alpha=0.8)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def _told(item: Item) -> str:
    """The answer; of a list only the name that is explained."""
    return (
        f"... {NAMES[item.picture.things[item.object]]} ..." if item.question.kind == "list" else item.question.answer
    )
