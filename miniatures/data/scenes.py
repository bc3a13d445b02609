"""Scenes composed of emoji: a picture with objects, boxes, masks, spatial relations, and prompts that single one out.

`python -m miniatures.data.scenes FILE` draws a few.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from miniatures.data.emoji import Emoji, load_emoji, render_emoji

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

RELATIONS = ("left of", "right of", "above", "below", "next to", "on", "under")
SCENE_CATEGORIES = frozenset(["Animals & Nature", "Food & Drink", "Travel & Places", "Objects"])
NEAR_SHARE = 0.6
"""Two objects are next to each other when the gap between them is at most this share of the smaller one's width."""


class Box(NamedTuple):
    """Pixels, left and top inside, right and bottom outside."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One emoji in a scene."""

    emoji: Emoji
    box: Box
    """Tight around what the object would show if nothing stood in front of it."""
    mask: np.ndarray
    """bool [height, width]: where the object is seen."""

    def name(self, language: str = "en") -> str:
        """What it is called."""
        return self.emoji.names[language]


class Relation(NamedTuple):
    """`objects[subject]` stands in `relation` to `objects[object]`."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and everything that is known about it."""

    image: Image
    """RGB."""
    objects: tuple[SceneObject, ...]
    relations: tuple[Relation, ...]
    seed: int

    @property
    def caption(self) -> str:
        """The objects by name, in drawing order."""
        return "A picture of " + join_names([f"“{one.name()}”" for one in self.objects]) + "."

    def deictic_prompts(self) -> dict[int, str]:
        """For each object that its relations single out, the shortest prompt that does so without naming it."""
        prompts: dict[int, str] = {}
        for target in range(len(self.objects)):
            facts = [(r.relation, self.objects[r.object].emoji.text, r) for r in self.relations if r.subject == target]
            chosen = _identifying(target, [(relation, text) for relation, text, _ in facts], self)
            if chosen is not None:
                parts = [f"is {relation} the {_english(text, self)}" for relation, text in chosen]
                prompts[target] = "An object that " + ", and that ".join(parts) + "."
        return prompts


def compose_scene(
    emoji: Sequence[Emoji], *, seed: int, size: int = 256, num_objects: tuple[int, int] = (2, 5)
) -> Scene:
    """Compose a scene from a seed: the same seed and emoji give the same picture.

    Args:
        emoji: what to choose from; each base sequence is used once in a scene.
        seed: decides everything.
        size: side of the square picture in pixels, at least 64.
        num_objects: least and greatest number of objects.

    Raises:
        ValueError: too small a size, or fewer emoji than objects.
    """
    least, most = num_objects
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, got {size}.")
    if not 1 <= least <= most <= len({one.base for one in emoji}):
        raise ValueError(f"num_objects must lie between 1 and the number of distinct emoji, got {num_objects}.")
    generator = random.Random(f"scene {seed}")
    chosen = _distinct(emoji, generator.randint(least, most), generator)
    placed: list[tuple[Emoji, Image, Box]] = []
    for one in chosen:
        spot = _place(one, [box for *_, box in placed], size, generator)
        if spot is not None:
            placed.append((one, *spot))
    image, masks = _paint(placed, size, generator)
    objects = tuple(
        SceneObject(emoji=one, box=box, mask=mask) for (one, _, box), mask in zip(placed, masks, strict=True)
    )
    return Scene(image=image, objects=objects, relations=find_relations([one.box for one in objects]), seed=seed)


def find_relations(boxes: Sequence[Box]) -> tuple[Relation, ...]:
    """All relations between pairs of boxes.

    "left of" and the like hold when the boxes do not overlap along that direction and it is the main one between their
    centers; "next to" when the gap is small; "on" when the lower edge of one meets the upper edge of the other.
    """
    found = []
    for i, a in enumerate(boxes):
        for j, b in enumerate(boxes):
            if i != j:
                found += [Relation(i, name, j) for name in _relations_of(a, b)]
    return tuple(found)


def scene_emoji() -> list[Emoji]:
    """Emoji that show a thing of its own: animals, plants, food, vehicles, objects; no people, signs or flags."""
    return [one for one in load_emoji() if one.category in SCENE_CATEGORIES]


def join_names(names: Sequence[str]) -> str:
    """Set names in a row: `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _distinct(emoji: Sequence[Emoji], count: int, generator: random.Random) -> list[Emoji]:
    chosen: dict[str, Emoji] = {}
    while len(chosen) < count:
        one = generator.choice(emoji)
        chosen.setdefault(one.base, one)
    return list(chosen.values())


def _place(one: Emoji, others: list[Box], size: int, generator: random.Random) -> tuple[Image, Box] | None:
    """A picture of random size and a place: half the time on top of an earlier object, else anywhere free."""
    for _ in range(60):
        side = generator.randint(size // 5, size // 3)
        picture = render_emoji(one.text, side)
        ink = Box(*(picture.getbbox() or (0, 0, side, side)))
        width, height = ink.right - ink.left, ink.bottom - ink.top
        if others and generator.random() < 0.5:
            below = generator.choice(others)
            left = (below.left + below.right - width) // 2 + generator.randint(-width // 6, width // 6)
            top = below.top - height + max(1, height // 12)
        else:
            left, top = generator.randint(0, size - width), generator.randint(0, size - height)
        box = Box(left, top, left + width, top + height)
        inside = min(box.left, box.top) >= 0 and max(box.right, box.bottom) <= size
        if inside and all(_overlap(box, other) <= 0.15 for other in others):
            return picture.crop(ink), box
    return None


def _paint(
    placed: list[tuple[Emoji, Image, Box]], size: int, generator: random.Random
) -> tuple[Image, list[np.ndarray]]:
    import numpy as np
    from PIL import Image

    sky = tuple(generator.randint(170, 255) for _ in range(3))
    ground = tuple(generator.randint(130, 225) for _ in range(3))
    shares = np.linspace(0.0, 1.0, size)[:, None, None]
    rows = (1.0 - shares) * np.array(sky) + shares * np.array(ground)
    image = Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8), "RGB")
    masks: list[np.ndarray] = []
    for _, picture, box in placed:
        image.paste(picture, (box.left, box.top), picture)
        shown = np.zeros((size, size), dtype=bool)
        shown[box.top : box.bottom, box.left : box.right] = np.asarray(picture.getchannel("A")) > 127
        masks = [mask & ~shown for mask in masks]
        masks.append(shown)
    return image, masks


def _overlap(a: Box, b: Box) -> float:
    """Shared area as a share of the smaller box."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (a, b)]
    return max(0, width) * max(0, height) / min(areas)


def _relations_of(a: Box, b: Box) -> list[str]:
    across = (a.left + a.right - b.left - b.right) / 2
    down = (a.top + a.bottom - b.top - b.bottom) / 2
    gap_across = max(a.left, b.left) - min(a.right, b.right)
    gap_down = max(a.top, b.top) - min(a.bottom, b.bottom)
    smaller = min(a.right - a.left, b.right - b.left)
    found = []
    if gap_across >= 0 and abs(across) >= abs(down):
        found.append("left of" if across < 0 else "right of")
    stacked = gap_across < -0.3 * smaller and abs(gap_down) <= 0.15 * min(a.bottom - a.top, b.bottom - b.top)
    if stacked and abs(down) > abs(across):
        found.append("on" if down < 0 else "under")
    elif gap_down >= 0 and abs(down) > abs(across):
        found.append("above" if down < 0 else "below")
    if max(gap_across, gap_down) <= NEAR_SHARE * smaller:
        found.append("next to")
    return found


def _identifying(target: int, facts: list[tuple[str, str]], scene: Scene) -> list[tuple[str, str]] | None:
    """One or two facts that hold for the target alone."""
    holds = {(r.subject, r.relation, scene.objects[r.object].emoji.text) for r in scene.relations}
    candidates = [[fact] for fact in facts] + [[a, b] for i, a in enumerate(facts) for b in facts[i + 1 :]]
    for chosen in candidates:
        fitting = [i for i in range(len(scene.objects)) if all((i, *fact) in holds for fact in chosen)]
        if fitting == [target]:
            return chosen
    return None


def _english(text: str, scene: Scene) -> str:
    return next(one.name() for one in scene.objects if one.emoji.text == text)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from PIL import Image

    parser = argparse.ArgumentParser(prog="python -m miniatures.data.scenes", description=__doc__)
    parser.add_argument("file", type=Path, help="picture to write")
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args(arguments)
    emoji = scene_emoji()
    scenes = [compose_scene(emoji, seed=seed) for seed in range(options.count)]
    sheet = Image.new("RGB", (256 * min(4, len(scenes)), 256 * -(-len(scenes) // 4)), "white")
    for number, scene in enumerate(scenes):
        sheet.paste(scene.image, (number % 4 * 256, number // 4 * 256))
        print(number, scene.caption, *scene.deictic_prompts().values(), sep="\n  ")
    sheet.save(options.file)


if __name__ == "__main__":
    main()
