"""A few held-out pictures with questions and masks, committed so that tests and examples need no emoji font.

`python -m miniatures.captioner.examples` writes them anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from miniatures.captioner.answering import held_out_questions
from miniatures.captioner.questions import Question
from miniatures.captioner.scenes import NAMES, PLACES, Picture, emoji_composer

FOLDER = Path(__file__).with_name("examples")
COUNT = 12


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture and what is asked about it."""

    picture: Picture
    questions: tuple[Question, ...]


def load_examples(folder: Path = FOLDER) -> list[Example]:
    """The committed pictures in order."""
    examples = []
    for index, entry in enumerate(json.loads((folder / "examples.json").read_text(encoding="utf-8"))):
        numbers = np.asarray(Image.open(folder / f"{index:02d}-objects.png"))  # 0: ground, i + 1: object i
        picture = Picture(
            pixels=np.asarray(Image.open(folder / f"{index:02d}.png").convert("RGB")),
            things=tuple(NAMES.index(name) for name in entry["things"]),
            places=tuple(PLACES.index(place) for place in entry["places"]),
            masks=np.stack([numbers == i + 1 for i in range(len(entry["things"]))]),
        )
        asked = [Question(**(fields | {"about": tuple(fields["about"])})) for fields in entry["questions"]]
        examples.append(Example(picture=picture, questions=tuple(asked)))
    return examples


def write_examples(material: Iterable[tuple[Picture, list[Question]]], folder: Path = FOLDER) -> None:
    """Write pictures, the objects' masks as one picture of numbers, and the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (picture, questions) in enumerate(material):
        Image.fromarray(picture.pixels).save(folder / f"{index:02d}.png", optimize=True)
        numbers = (picture.masks * np.arange(1, len(picture.masks) + 1)[:, None, None]).sum(0)
        Image.fromarray(numbers.astype(np.uint8)).save(folder / f"{index:02d}-objects.png", optimize=True)
        entries.append(
            {
                "things": [NAMES[thing] for thing in picture.things],
                "places": [PLACES[place] for place in picture.places],
                "questions": [asdict(question) for question in questions],
            }
        )
    (folder / "examples.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: write the committed examples."""
    write_examples(held_out_questions(emoji_composer(), COUNT))


if __name__ == "__main__":
    main()
