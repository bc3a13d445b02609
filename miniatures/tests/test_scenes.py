"""Scenes: relations that can be checked by eye, masks that match the picture, prompts that single out one object."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from miniatures.data import scenes
from miniatures.data.emoji import Emoji
from miniatures.data.scenes import Box, compose_scene, find_relations, join_names, scene_emoji

COLORS = ["red", "green", "blue", "black", "white", "orange", "purple", "brown"]
THINGS = [
    Emoji(text=chr(65 + i), names={"en": f"{color} disk"}, keywords={"en": ()}, category="", subcategory="")
    for i, color in enumerate(COLORS)
]


@pytest.fixture(autouse=True)
def _disks_instead_of_emoji(monkeypatch):
    def disk(text, size=128):
        picture = Image.new("RGBA", (size, size))
        ImageDraw.Draw(picture).ellipse((0, 0, size - 1, size - 1), fill=COLORS[ord(text) - 65])
        return picture

    monkeypatch.setattr(scenes, "render_emoji", disk)


def relations(a, b):
    return [name for subject, name, _ in find_relations([Box(*a), Box(*b)]) if subject == 0]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), ["left of"]),
        ((50, 0, 60, 10), (0, 0, 10, 10), ["right of"]),
        ((0, 0, 10, 10), (14, 0, 24, 10), ["left of", "next to"]),
        ((0, 0, 10, 10), (2, 40, 12, 50), ["above"]),
        ((0, 40, 10, 50), (2, 0, 12, 10), ["below"]),
        ((0, 0, 10, 10), (1, 9, 11, 19), ["on", "next to"]),
        ((1, 9, 11, 19), (0, 0, 10, 10), ["under", "next to"]),
        ((0, 0, 10, 10), (40, 90, 50, 100), ["above"]),
    ],
)
def test_relations_of_two_boxes(a, b, expected):
    assert relations(a, b) == expected


def test_opposite_relations_come_in_pairs():
    opposite = {"left of": "right of", "above": "below", "on": "under", "next to": "next to"}
    opposite |= {value: key for key, value in opposite.items()}
    for seed in range(20):
        found = compose_scene(THINGS, seed=seed).relations
        assert all((r.object, opposite[r.relation], r.subject) in found for r in found)


def test_a_scene_depends_on_its_seed_alone():
    first, again, other = (compose_scene(THINGS, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


def test_masks_show_where_each_object_is_seen_and_never_overlap():
    for seed in range(10):
        scene = compose_scene(THINGS, seed=seed, num_objects=(3, 5))
        pixels = np.asarray(scene.image)
        assert np.stack([one.mask for one in scene.objects]).sum(0).max() == 1
        for one in scene.objects:
            rows, columns = one.mask.nonzero()
            assert one.box.left <= columns.min() <= columns.max() < one.box.right
            assert one.box.top <= rows.min() <= rows.max() < one.box.bottom
            seen = pixels[rows, columns]
            color = np.array(Image.new("RGB", (1, 1), one.name().split()[0]).getpixel((0, 0)))
            assert (np.abs(seen.astype(int) - color).max(1) < 130).mean() > 0.9


def test_a_prompt_fits_its_target_alone_and_does_not_name_it():
    count = 0
    for seed in range(20):
        scene = compose_scene(THINGS, seed=seed, num_objects=(3, 5))
        names = [one.name() for one in scene.objects]
        for target, prompt in scene.deictic_prompts().items():
            conditions = prompt.removeprefix("An object that is ").removesuffix(".").split(", and that is ")
            pairs = [tuple(condition.split(" the ")) for condition in conditions]
            facts = {(subject, relation, names[other]) for subject, relation, other in scene.relations}
            fitting = [i for i in range(len(names)) if all((i, *pair) in facts for pair in pairs)]
            assert fitting == [target]
            assert names[target] not in prompt
            count += 1
    assert count > 30


def test_names_in_a_row():
    assert [join_names(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="size must be at least 64 pixels, got 8"):
        compose_scene(THINGS, seed=0, size=8)
    with pytest.raises(ValueError, match="num_objects must lie between 1 and the number of distinct emoji"):
        compose_scene(THINGS, seed=0, num_objects=(2, 99))


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_things_are_found_for_scenes():
    assert len(scene_emoji()) > 400
