"""Real text and word lists for the cases, from what lies on this machine; nothing is downloaded.

Prose: files given with `--text`, else English pages that `miniatures` has cached, else paragraphs of Python's own
manual (`pydoc_data.topics`). Markup: READMEs and descriptions (Markdown, reStructuredText) of installed packages.
Code: the standard library's sources.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks import ROOT

WORD = re.compile(r"[^\W\d_]+")
SUFFIXES = ("s", "ed", "ing", "er", "ers", "ly", "ness", "able", "ment", "less", "en", "ung", "e", "ism")
PREFIXES = ("un", "re", "pre", "over", "non", "sub", "inter", "anti")
DOCUMENT = 4000  # characters


@dataclass(frozen=True)
class Corpus:
    """Text split in two halves: one to build dictionaries and train peers on, one to measure on."""

    name: str
    training: str
    measured: str
    source: str
    """Where it comes from, its size and the first digits of its sha256: two machines may hold different text."""

    def documents(self, characters: int = DOCUMENT, total: int = 1_000_000) -> list[str]:
        """Stretches of the measured half, each `characters` long, about `total` characters in all."""
        return [self.measured[i : i + characters] for i in range(0, min(total, len(self.measured)), characters)]


@lru_cache
def corpus(name: str, texts: tuple[str, ...] = ()) -> Corpus:
    """Read `"prose"`, `"markup"` or `"code"`.

    Raises:
        ValueError: the machine has no such text.
    """
    source, pieces = _SOURCES[name](texts)
    pieces = list(pieces)
    if sum(map(len, pieces)) < 4 * DOCUMENT:
        raise ValueError(f"--text must name files with prose, because this machine has too little {name} text.")
    # Alternating pieces, so that both halves hold the same mixture of topics.
    training, measured = "\n\n".join(pieces[0::2]), "\n\n".join(pieces[1::2])
    digest = hashlib.sha256((training + measured).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return Corpus(name, training, measured, f"{source}, {len(training) + len(measured)} characters, sha256 {digest}")


@lru_cache
def word_list(count: int) -> list[str]:
    """`count` distinct words: those of all texts by frequency, then their inflections, then compounds.

    A dictionary of a million words needs more than any text here holds; inflections and compounds of real words have
    the lengths and the shared trigrams of real words, which is what the cost depends on.
    """
    real = _real_words()
    words = dict.fromkeys(itertools.islice(itertools.chain(real, _inflected(real), _compounds(real)), 4 * count))
    chosen = list(itertools.islice(words, count))
    if len(chosen) < count:
        raise ValueError(f"count must be at most {len(chosen)} for the text on this machine, got {count}.")
    return chosen


@lru_cache
def _real_words() -> list[str]:
    """Words of all texts, most frequent first."""
    counts: Counter[str] = Counter()
    for name in _SOURCES:
        try:
            text = corpus(name)
        except ValueError:
            continue
        counts.update(WORD.findall(text.training))
        counts.update(WORD.findall(text.measured))
    return [word for word, _ in counts.most_common() if len(word) <= 24]


def _inflected(words: list[str]) -> Iterator[str]:
    plain = [word for word in words if word.isascii() and word.islower() and 3 <= len(word) <= 12]
    for word in plain:
        yield word.capitalize()
    for suffix in SUFFIXES:
        yield from (word + suffix for word in plain)
    for prefix in PREFIXES:
        yield from (prefix + word for word in plain)


def _compounds(words: list[str]) -> Iterator[str]:
    plain = [word for word in words if word.isascii() and word.islower() and 3 <= len(word) <= 8][:3000]
    for distance in range(1, len(plain)):
        yield from (word + plain[(i + distance) % len(plain)] for i, word in enumerate(plain))


def _prose(texts: tuple[str, ...]) -> tuple[str, Iterable[str]]:
    if texts:
        return "given files", (piece for path in texts for piece in _paragraphs(Path(path).read_text("utf-8")))
    cached = sorted((ROOT / "miniatures" / ".cache" / "text").glob("split-*.jsonl"))
    if cached:
        return "miniatures, English pages", _cached_pages(cached[-1])
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[key] for key in sorted(topics))
    return "pydoc_data.topics", _paragraphs(text)


def _markup(_: tuple[str, ...]) -> tuple[str, Iterable[str]]:
    folder = Path(sysconfig.get_path("purelib"))
    files = [*folder.glob("*.dist-info/METADATA"), *folder.rglob("*.md"), *folder.rglob("*.rst")]
    return "READMEs and METADATA of installed packages", _distinct_texts(sorted(files))


def _code(_: tuple[str, ...]) -> tuple[str, Iterable[str]]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        *folder.glob("*.py"),
        *folder.glob("asyncio/*.py"),
        *folder.glob("email/*.py"),
        *folder.glob("idlelib/*.py"),
    ]
    return "sources of the standard library", _distinct_texts(sorted(files))


_SOURCES = {"prose": _prose, "markup": _markup, "code": _code}


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs that are sentences: not indented, mostly letters; each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        letters = sum(map(str.isalpha, paragraph)) + paragraph.count(" ")
        if len(paragraph) >= 80 and not paragraph.startswith(" ") and letters >= 0.85 * len(paragraph):
            yield " ".join(paragraph.split())


def _cached_pages(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            page = json.loads(line)
            if page["language"] == "en" and page["register"] == "manual":
                yield page["text"]


def _distinct_texts(paths: list[Path]) -> Iterator[str]:
    seen = set()
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # not text after all
        if hash(text) not in seen:
            seen.add(hash(text))
            yield text
