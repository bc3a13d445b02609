"""Text of three groups with labels of two concepts, prompts, and text of its own for the classifier that judges."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from miniatures.data.text import TextDocument, TextSplit
from miniatures.tfree.windows import line_pieces

CONCEPTS = ("scripture", "german")
GROUPS = ("scripture", "en", "de")
"""King James Bible, English manuals, German manuals."""
LABELS = {"scripture": (1, 0), "en": (0, 0), "de": (0, 1)}
"""Group -> one label per concept. All are known: the Bible is English, and a German manual is no scripture."""
OTHERS = ("fr", "es", "it")
"""More manuals, which the classifier knows, so that broken text is not counted for a concept."""
PIECE_BYTES = 500
PROMPT_WORDS = 16
SALT = "scar"


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A few lines of one page."""

    text: str
    group: str

    @property
    def labels(self) -> tuple[int, ...]:
        """One per concept."""
        return LABELS[self.group]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the miniature is trained, judged and measured on. No page is in two parts, in any language."""

    train: list[LabelledText]
    """For the adapters, from a half of the training pages."""
    test: list[LabelledText]
    """From held-out pages, which the language model has not seen either."""
    judge: dict[str, list[str]]
    """Group -> texts for the classifier, from the other half of the training pages."""
    judge_test: dict[str, list[str]]
    """The same from held-out pages."""


def load_material(split: TextSplit, *, train_bytes: int, test_bytes: int, judge_bytes: int, seed: int = 0) -> Material:
    """Cut pages into pieces of whole lines, about so many bytes for each group in each part."""
    ours = [document for document in split.train if not is_for_judge(document)]
    judged = [document for document in split.train if is_for_judge(document)]
    groups = (*GROUPS, *OTHERS)
    return Material(
        train=[one for group in GROUPS for one in _pieces(ours, group, train_bytes, seed)],
        test=[one for group in GROUPS for one in _pieces(split.held_out, group, test_bytes, seed)],
        judge={group: [one.text for one in _pieces(judged, group, judge_bytes, seed)] for group in groups},
        judge_test={group: [one.text for one in _pieces(split.held_out, group, test_bytes, seed)] for group in groups},
    )


def group_of(document: TextDocument) -> str:
    """The group of a page: "scripture", or the language of a manual."""
    return "scripture" if document.register == "scripture" else document.language


def is_for_judge(document: TextDocument) -> bool:
    """Half of the pages, the same ones in every language."""
    digest = hashlib.sha256(f"{SALT}\n{document.source}\n{document.page}".encode()).digest()
    return digest[0] % 2 == 0


def as_rows(texts: Iterable[LabelledText]) -> list[dict[str, object]]:
    """Rows of a data set: a column of text and one for each concept."""
    return [{"text": one.text, **dict(zip(CONCEPTS, one.labels, strict=True))} for one in texts]


def prompts_of(documents: Sequence[TextDocument], group: str, *, seed: int = 0) -> list[str]:
    """The first words of all lines of a group that are long enough and begin with words alone, in mixed order."""
    lines = [line for document in documents if group_of(document) == group for line in document.paragraphs]
    starts = [" ".join(line.split()[:PROMPT_WORDS]) for line in lines if len(line.split()) >= 2 * PROMPT_WORDS]
    plain = sorted({start for start in starts if re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ ,.;:'-])*", start)})
    random.Random(f"prompts {seed}").shuffle(plain)
    return plain


def _pieces(documents: Sequence[TextDocument], group: str, total_bytes: int, seed: int) -> list[LabelledText]:
    pages = [document for document in documents if group_of(document) == group]
    random.Random(f"pages {seed}").shuffle(pages)
    pieces: list[LabelledText] = []
    taken = 0
    for page in pages:
        text = ""
        for line in (*line_pieces(page.text, PIECE_BYTES), ""):
            if text and (not line or len((text + line).encode()) > PIECE_BYTES):
                pieces.append(LabelledText(text=text.strip("\n"), group=group))
                taken += len(text.encode())
                text = ""
            text += line
        if taken >= total_bytes:
            break
    return pieces
