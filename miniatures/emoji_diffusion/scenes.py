"""Seed -> one or two tinted emoji on a plain or striped ground, with caption and masks; fast enough to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from miniatures.data.emoji import render_emoji

IMAGE_SIZE = 64
KINDS = {
    "apple": "🍎", "banana": "🍌", "bell": "🔔", "boat": "⛵", "butterfly": "🦋", "car": "🚗", "cat": "🐱",
    "cherries": "🍒", "cup": "☕", "duck": "🦆", "fish": "🐟", "ghost": "👻", "guitar": "🎸", "heart": "❤",
    "house": "🏠", "key": "🔑", "mushroom": "🍄", "rocket": "🚀", "star": "⭐", "umbrella": "☂",
}  # fmt: skip
"""Word of a caption -> emoji. Chosen for outlines that stay recognizable in one color."""
COLORS = {
    "red": (214, 32, 38), "orange": (245, 130, 20), "yellow": (240, 210, 30), "green": (30, 150, 60),
    "blue": (35, 85, 215), "purple": (135, 50, 175), "gray": (120, 122, 126),
}  # fmt: skip
GROUNDS = {
    "sand": (222, 196, 150), "sky": (160, 212, 246), "grass": (178, 222, 150), "snow": (244, 246, 248),
    "rose": (248, 190, 204), "night": (40, 42, 82),
}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
SINGLE_SIDES = range(28, 49, 2)
"""Longer sides, in pixels, of an object that is alone."""
PAIR_SIDES = range(22, 31, 2)
"""Longer sides, in pixels, of one of two objects."""
STRIPE_HEIGHTS = range(5, 9)
STRIPE_SHADE = 0.8
"""Brightness of every other stripe, as a share of the ground's; on a dark ground its inverse, squared."""
Side = Literal["train", "held-out", "all"]
"""Which combinations of kind and color are shown."""
PAIR_SHARE = 0.4
"""Share of pictures with two objects."""


class Thing(NamedTuple):
    """An emoji and its color."""

    kind: str
    color: str

    def __str__(self) -> str:
        """Write it as in a caption."""
        return f"{self.color} {self.kind}"


class Ground(NamedTuple):
    """What is behind the objects."""

    name: str
    is_striped: bool

    def __str__(self) -> str:
        """Write it as in a caption."""
        return f"striped {self.name}" if self.is_striped else self.name


class Sprite(NamedTuple):
    """One emoji at one size, cropped to its ink and without its color."""

    brightness: np.ndarray
    """float32 [height, width], values in [0, 1]."""
    opacity: np.ndarray
    """float32 [height, width, 1], values in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a caption says, and all that it says."""

    things: tuple[Thing, ...]
    """One or two; the first one is in `relation` to the second."""
    relation: str | None
    ground: Ground

    @property
    def caption(self) -> str:
        """Such as `blue house on sand` or `red apple left of green cat on striped sky`."""
        objects = f" {self.relation} ".join(map(str, self.things)) if self.relation else str(self.things[0])
        return f"{objects} on {self.ground}"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A composed scene."""

    pixels: np.ndarray
    """uint8 [64, 64, 3]."""
    description: Description
    masks: np.ndarray
    """bool [objects, 64, 64], in the order of `description.things`."""


class Composer:
    """Composes pictures from a fixed set of sprites: the same seed gives the same picture."""

    def __init__(self, sprites: Mapping[str, Mapping[int, Sprite]]) -> None:
        """Take the sizes of every kind: `sprites[kind][side]`."""
        self.sprites = sprites

    def __call__(self, *seed: int, side: Side = "train") -> Picture:
        """Compose the picture of a seed (several numbers make one seed) from the combinations of a side."""
        generator = np.random.default_rng(seed)
        return self.draw(describe(generator, side=side), generator)

    def draw(self, description: Description, generator: np.random.Generator) -> Picture:
        """Draw what a description says, at random sizes and places."""
        pixels = draw_ground(description.ground, generator)
        sprites = [self._choose(thing, len(description.things), generator) for thing in description.things]
        shapes = [sprite.brightness.shape for sprite in sprites]
        masks = np.zeros((len(sprites), IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        spots = _spots(shapes, description.relation, generator)
        for thing, sprite, spot, mask in zip(description.things, sprites, spots, masks, strict=True):
            pixels[spot] += sprite.opacity * (tint(sprite.brightness, COLORS[thing.color]) - pixels[spot])
            mask[spot] = sprite.opacity[..., 0] > 0.5
        return Picture(pixels=pixels.round().clip(0, 255).astype(np.uint8), description=description, masks=masks)

    def _choose(self, thing: Thing, count: int, generator: np.random.Generator) -> Sprite:
        sides = SINGLE_SIDES if count == 1 else PAIR_SIDES
        return self.sprites[thing.kind][int(generator.choice(sides))]


@lru_cache(maxsize=1)
def emoji_composer() -> Composer:
    """The composer of the emoji in `KINDS`, all of them drawn once."""
    sides = sorted({*SINGLE_SIDES, *PAIR_SIDES})
    return Composer({kind: {side: _sprite(text, side) for side in sides} for kind, text in KINDS.items()})


def describe(generator: np.random.Generator, *, side: Side = "train", pair_share: float = PAIR_SHARE) -> Description:
    """Choose what to show: one object or, in `pair_share` of all cases, two of different kind and color."""
    things = combinations(side)
    ground = Ground(str(generator.choice(list(GROUNDS))), bool(generator.random() < 0.5))
    first = things[int(generator.integers(len(things)))]
    if generator.random() >= pair_share:
        return Description(things=(first,), relation=None, ground=ground)
    others = [thing for thing in things if thing.kind != first.kind and thing.color != first.color]
    second = others[int(generator.integers(len(others)))]
    return Description(things=(first, second), relation=str(generator.choice(RELATIONS)), ground=ground)


@lru_cache(maxsize=3)
def combinations(side: Side) -> tuple[Thing, ...]:
    """The combinations of kind and color on one side of the split: one color of every kind is held out."""
    every = [(i, j, Thing(kind, color)) for i, kind in enumerate(KINDS) for j, color in enumerate(COLORS)]
    is_held_out = [i % len(COLORS) == j for i, j, _ in every]
    wanted = {"train": (False,), "held-out": (True,), "all": (False, True)}[side]
    return tuple(thing for (_, _, thing), held_out in zip(every, is_held_out, strict=True) if held_out in wanted)


def draw_ground(ground: Ground, generator: np.random.Generator) -> np.ndarray:
    """Paint a ground in one color, or in horizontal stripes of two shades: float32 [64, 64, 3] in [0, 255]."""
    color = np.array(GROUNDS[ground.name], dtype=np.float32)
    shades = np.ones(IMAGE_SIZE, dtype=np.float32)
    if ground.is_striped:
        height, start = int(generator.choice(STRIPE_HEIGHTS)), int(generator.integers(2 * max(STRIPE_HEIGHTS)))
        shade = STRIPE_SHADE if color.max() > 128 else STRIPE_SHADE**-2
        shades[(np.arange(IMAGE_SIZE) + start) // height % 2 == 1] = shade
    return np.repeat((shades[:, None] * color)[:, None], IMAGE_SIZE, axis=1)


def tint(brightness: np.ndarray, color: Sequence[int]) -> np.ndarray:
    """Color a gray picture: dark stays dark, the middle takes the color, bright is nearly white.

    Args:
        brightness: `[height, width]`, values in [0, 1].
        color: red, green and blue, values in [0, 255].

    Returns:
        `[height, width, 3]`, values in [0, 255].
    """
    middle = np.array(color, dtype=np.float32)
    dark, bright = 0.25 * middle, 0.45 * middle + 0.55 * 255
    values = brightness[..., None]
    return np.where(values < 0.5, dark + (middle - dark) * 2 * values, middle + (bright - middle) * (2 * values - 1))


def _sprite(text: str, side: int) -> Sprite:
    """Draw an emoji; its brightness is spread so that it uses dark, middle and bright about equally."""
    picture = render_emoji(text, side)
    values = np.asarray(picture.crop(picture.getbbox()), dtype=np.float32) / 255
    gray, opacity = values[..., :3] @ np.array([0.3, 0.59, 0.11], dtype=np.float32), values[..., 3:]
    inside = gray[opacity[..., 0] > 0.5]
    low, middle, high = np.percentile(inside, [2, 50, 98])
    spread = np.interp(gray, [low - 0.02, middle, high + 0.02], [0.05, 0.5, 0.95])
    return Sprite(spread.astype(np.float32), opacity)


def _spots(
    shapes: Sequence[tuple[int, ...]], relation: str | None, generator: np.random.Generator
) -> list[tuple[slice, slice]]:
    """Rows and columns of each object; two do not overlap along the direction of their relation."""
    firsts = [[int(generator.integers(IMAGE_SIZE - side + 1)) for side in shape] for shape in shapes]
    if relation is not None:
        axis = 1 if relation in ("left of", "right of") else 0
        order = (0, 1) if relation in ("left of", "above") else (1, 0)
        free = IMAGE_SIZE - sum(shape[axis] for shape in shapes)
        before, between = np.sort(generator.integers(free + 1, size=2))
        firsts[order[0]][axis] = int(before)
        firsts[order[1]][axis] = int(between) + shapes[order[0]][axis]
    return [
        (slice(top, top + shape[0]), slice(left, left + shape[1]))
        for (top, left), shape in zip(firsts, shapes, strict=True)
    ]
