"""Pictures -> questions of four kinds with their answers and the objects that the answers are about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miniatures.captioner.scenes import NAMES, PLACES, Picture

KINDS = ("what", "where", "presence", "list")
PROMPTS = {
    "what": "<image> what is at the {} ?",
    "where": "<image> where is the {} ?",
    "presence": "<image> is the {} there ?",
    "list": "<image> what do you see ?",
}
NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one picture."""

    kind: str
    """One of `KINDS`."""
    prompt: str
    """Starts with the image's placeholder, ends with a question mark."""
    answer: str
    about: tuple[int, ...]
    """Objects of the picture that decide the answer; empty where it is about something that is not there."""


def ask(picture: Picture, generator: np.random.Generator) -> list[Question]:
    """All questions about the objects of a picture, and two about what is not there."""
    objects = list(zip(picture.things, picture.places, strict=True))
    asked = [_question("list", "", " and ".join(NAMES[thing] for thing, _ in objects), *range(len(objects)))]
    for index, (thing, place) in enumerate(objects):
        asked.append(_question("what", PLACES[place], NAMES[thing], index))
        asked.append(_question("where", NAMES[thing], PLACES[place], index))
        asked.append(_question("presence", NAMES[thing], "yes", index))
    absent = int(generator.choice(np.setdiff1d(np.arange(len(NAMES)), picture.things)))
    empty = int(generator.choice(np.setdiff1d(np.arange(len(PLACES)), picture.places)))
    return [*asked, _question("presence", NAMES[absent], "no"), _question("what", PLACES[empty], NOTHING)]


def sample_questions(picture: Picture, generator: np.random.Generator) -> list[Question]:
    """The questions of one training scene: the list, two about objects of each other kind, and those about nothing."""
    asked = ask(picture, generator)
    first, second = generator.permutation(len(picture.things))[:2]
    third, fourth = generator.permutation(len(picture.things))[:2]
    chosen = [0, 1 + 3 * first, 1 + 3 * second, 2 + 3 * third, 2 + 3 * fourth, 3 + 3 * first]
    return [*(asked[i] for i in chosen), *asked[-2:]]


def words() -> list[str]:
    """Every word of the questions and answers, sorted."""
    texts = [*NAMES, *PLACES, NOTHING, "yes no and", *(prompt.replace("<image>", "") for prompt in PROMPTS.values())]
    return sorted({word for text in texts for word in text.replace("{}", "").split()})


def _question(kind: str, topic: str, answer: str, *about: int) -> Question:
    return Question(kind=kind, prompt=PROMPTS[kind].format(topic), answer=answer, about=about)
