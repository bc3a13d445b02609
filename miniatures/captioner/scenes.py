"""Seed -> a scene of two to four emoji at nine places, with masks; composed fast enough to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from miniatures.data.emoji import render_emoji
from miniatures.data.scenes import scene_emoji

IMAGE_SIZE = 96
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
OBJECTS = (2, 4)
"""Least and greatest number of emoji in a scene."""
OBJECT_SIZES = range(22, 37, 2)
"""Sides of an emoji in pixels."""
JITTER = 8
"""How far, in pixels, the middle of an emoji may lie from the middle of its place."""
MASK_SHARE = 0.25
"""Share of a patch that an emoji must cover for the patch to count as its own."""
THINGS = """
panda; fox; lion; elephant; zebra; koala; frog; penguin; owl; octopus; crab; butterfly; honeybee; turtle; snail;
parrot; cactus; palm tree; evergreen tree; sunflower; tulip; mushroom; maple leaf; banana; strawberry; lemon;
watermelon; pineapple; grapes; carrot; broccoli; avocado; eggplant; red apple; green apple; pizza; hamburger;
hot dog; doughnut; cookie; french fries; birthday cake; pretzel; popcorn; croissant; cheese wedge; rocket;
sailboat; tractor; bus; taxi; helicopter; flying saucer; rainbow; snowman; alarm clock; guitar; trumpet; drum;
light bulb; hammer; scissors; umbrella; fire
"""
NAMES = tuple(" ".join(name.split()) for name in THINGS.split(";"))
"""What the emoji are called in English (CLDR); the order decides what a seed shows."""


class Sprite(NamedTuple):
    """One emoji at one size, cropped to its ink."""

    colors: np.ndarray
    """float32 [height, width, 3], values in [0, 255]."""
    opacity: np.ndarray
    """float32 [height, width, 1], values in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A composed scene; objects stand in reading order of their places."""

    pixels: np.ndarray
    """uint8 [96, 96, 3]."""
    things: tuple[int, ...]
    """Indices into `NAMES`, each at most once."""
    places: tuple[int, ...]
    """Indices into `PLACES`, ascending."""
    masks: np.ndarray
    """bool [objects, 96, 96]: where each object is seen."""

    def shares(self) -> np.ndarray:
        """Part of every patch that each object covers: float [objects, 12, 12]."""
        return self.masks.reshape(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((2, 4))

    def patch_things(self) -> np.ndarray:
        """What every patch shows: int64 [144], 0 for the ground, 1 + index into `NAMES` for an object."""
        shares = self.shares().reshape(len(self.things), -1)
        shown = np.array(self.things, dtype=np.int64)[shares.argmax(0)] + 1
        return np.where(shares.max(0) >= MASK_SHARE, shown, 0)


class Composer:
    """Composes pictures from a fixed set of sprites: the same seed gives the same picture."""

    def __init__(self, sprites: Sequence[Sequence[Sprite]]) -> None:
        """Take the sizes of every thing: `sprites[thing][size]`, in the order of `NAMES`."""
        self.sprites = sprites

    def __call__(self, *seed: int) -> Picture:
        """Compose the picture of a seed (several numbers make one seed)."""
        generator = np.random.default_rng(seed)
        count = int(generator.integers(OBJECTS[0], OBJECTS[1] + 1))
        things = generator.choice(len(self.sprites), count, replace=False)
        places = np.sort(generator.choice(len(PLACES), count, replace=False))
        pixels = _ground(generator)
        masks = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for i in generator.permutation(count):
            sprite = self.sprites[things[i]][int(generator.integers(len(self.sprites[things[i]])))]
            spot = _spot(int(places[i]), sprite.opacity.shape, generator)
            pixels[spot] += sprite.opacity * (sprite.colors - pixels[spot])
            masks[:, spot[0], spot[1]] &= sprite.opacity[..., 0] <= 0.5
            masks[i][spot] = sprite.opacity[..., 0] > 0.5
        pixels += generator.normal(0.0, 3.0, pixels.shape)
        return Picture(
            pixels=pixels.clip(0, 255).astype(np.uint8),
            things=tuple(map(int, things)),
            places=tuple(map(int, places)),
            masks=masks,
        )


@lru_cache(maxsize=1)
def emoji_composer() -> Composer:
    """The composer of the emoji in `NAMES`, all of them drawn once."""
    texts = {one.names["en"]: one.text for one in scene_emoji()}
    return Composer([[_sprite(texts[name], size) for size in OBJECT_SIZES] for name in NAMES])


def _sprite(text: str, size: int) -> Sprite:
    picture = render_emoji(text, size)
    values = np.asarray(picture.crop(picture.getbbox()), dtype=np.float32)
    return Sprite(values[..., :3], values[..., 3:] / 255)


def _ground(generator: np.random.Generator) -> np.ndarray:
    top, bottom = generator.uniform(130, 255, (2, 3))
    shares = np.linspace(0.0, 1.0, IMAGE_SIZE)[:, None, None]
    return np.broadcast_to((1 - shares) * top + shares * bottom, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


def _spot(place: int, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of an object: near the middle of its place, inside the picture."""
    cell = IMAGE_SIZE // 3
    spot = []
    for index, side in zip(divmod(place, 3), shape[:2], strict=True):
        middle = index * cell + cell // 2 + int(generator.integers(-JITTER, JITTER + 1))
        first = min(max(middle - side // 2, 0), IMAGE_SIZE - side)
        spot.append(slice(first, first + side))
    return spot[0], spot[1]
