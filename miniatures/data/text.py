"""Multilingual text for training: cleaned documents from Debian packages, and a split without leaks.

`python -m miniatures.data.text` reads everything and prints sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from miniatures.data.packages import cache_folder, read_pins
from miniatures.data.sources import RawPage, bible_pages, debian_reference_pages, office_help_pages

LANGUAGES = ("en", "de", "fr", "es", "it")
READERS: dict[str, tuple[str, Callable[[str], Iterator[RawPage]]]] = {
    "libreoffice-help": ("manual", office_help_pages),
    "debian-reference": ("manual", debian_reference_pages),
    "bible-kjv": ("scripture", bible_pages),
}
FORMAT = 1
"""Raised whenever cleaning or splitting changes, so that cached results are made anew."""

FURNITURE_WORDS = 3
FURNITURE_PAGES = 20
SHINGLE_WORDS = 5
SHINGLE_SHARE = 0.6
LONG_PARAGRAPH_WORDS = 4
WORD = re.compile(r"[^\W\d_]+")
SENTENCE_END = re.compile(r"[.!?:…»\"”)]$")


@dataclass(frozen=True, kw_only=True)
class TextDocument:
    """One page of text in one language."""

    language: str
    """ISO 639-1 code."""
    source: str
    """Key of `READERS`."""
    register: str
    """Kind of language: "manual" or "scripture"."""
    page: str
    """Page id within the source; pages with the same id are translations of each other."""
    text: str
    """Paragraphs, one per line; an empty line stands before a heading."""

    @property
    def paragraphs(self) -> list[str]:
        """The lines that hold text."""
        return [line for line in self.text.split("\n") if line]


@dataclass(frozen=True)
class TextSplit:
    """Training and held-out documents; no page is in both, in any language."""

    train: list[TextDocument]
    held_out: list[TextDocument]


def load_split(
    *,
    languages: Sequence[str] = LANGUAGES,
    sources: Sequence[str] = tuple(READERS),
    held_out_share: float = 0.04,
    seed: int = 0,
) -> TextSplit:
    """Read, clean and split the documents, or take the cached result of an earlier call.

    Raises:
        ValueError: an unknown source, or a share outside (0, 1).
        PackageError: a package could not be had.
    """
    if unknown := sorted(set(sources) - set(READERS)):
        raise ValueError(f"sources must be among {sorted(READERS)}, got {unknown}.")
    if not 0.0 < held_out_share < 1.0:
        raise ValueError(f"held_out_share must lie in (0, 1), got {held_out_share}.")
    settings = [FORMAT, sorted(languages), sorted(sources), held_out_share, seed]
    settings.append({pin.name: pin.version for pin in read_pins().values() if pin.name.startswith(tuple(sources))})
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = cache_folder() / "text" / f"split-{key}.jsonl"
    if not path.is_file():
        documents = read_documents(languages, sources)
        _write_split(path, split_documents(documents, held_out_share=held_out_share, seed=seed))
    return _read_split(path)


def read_documents(languages: Sequence[str] = LANGUAGES, sources: Sequence[str] = tuple(READERS)) -> list[TextDocument]:
    """Cleaned documents of the given sources, English first, in page order."""
    documents: list[TextDocument] = []
    for source in sources:
        register, read = READERS[source]
        english: set[str] = set()
        for language in sorted(languages, key=lambda code: (code != "en", code)):
            cleaned = clean_pages(read(language), drop_keys=frozenset(english))
            for page, lines in cleaned:
                text = "\n".join(lines).strip("\n")
                documents.append(
                    TextDocument(language=language, source=source, register=register, page=page, text=text)
                )
                if language == "en":
                    english.update(map(paragraph_key, lines))
    return documents


def clean_pages(
    pages: Iterable[RawPage], *, drop_keys: frozenset[str] = frozenset()
) -> Iterator[tuple[str, list[str]]]:
    """Drop what is not prose of its own; give the remaining lines of every page.

    Dropped: code, table cells without a sentence (three words at most, no final punctuation), short lines that stand on
    more than 20 pages, repetitions of a longer paragraph, and longer paragraphs in `drop_keys` (untranslated ones).
    """
    pages = list(pages)
    on_pages = Counter(key for page in pages for key in {block.text for block in page.blocks})
    seen: set[str] = set()
    for page in pages:
        lines: list[str] = []
        for block in page.blocks:
            words = len(WORD.findall(block.text))
            if block.kind == "code" or words == 0:
                continue
            if words <= FURNITURE_WORDS:
                is_cell = block.kind == "text" and not SENTENCE_END.search(block.text)
                if is_cell or on_pages[block.text] > FURNITURE_PAGES:
                    continue
            else:
                key = paragraph_key(block.text)
                if key in seen or key in drop_keys:
                    continue
                seen.add(key)
            lines += ["", block.text] if block.kind == "heading" else [block.text]
        if any(len(WORD.findall(line)) > FURNITURE_WORDS for line in lines):
            yield page.page, lines


def split_documents(documents: Sequence[TextDocument], *, held_out_share: float, seed: int) -> TextSplit:
    """Hold out whole pages, in every language at once, and strip them of paragraphs that training pages repeat."""
    train: list[TextDocument] = []
    held_out: list[TextDocument] = []
    for document in documents:
        chosen = _page_fraction(document, seed) < held_out_share
        (held_out if chosen else train).append(document)
    return TextSplit(train, _without_near_duplicates(held_out, train))


def paragraph_key(paragraph: str) -> str:
    """What two paragraphs share that differ only in case, digits, punctuation or spacing."""
    return " ".join(WORD.findall(paragraph.casefold()))


def text_sizes(documents: Iterable[TextDocument]) -> dict[tuple[str, str], dict[str, int]]:
    """Documents, bytes and words (runs without white space) by (source, language)."""
    sizes: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0, "words": 0})
    for document in documents:
        entry = sizes[document.source, document.language]
        entry["documents"] += 1
        entry["bytes"] += len(document.text.encode())
        entry["words"] += len(document.text.split())
    return dict(sizes)


def _page_fraction(document: TextDocument, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{document.source}\n{document.page}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _without_near_duplicates(documents: list[TextDocument], train: list[TextDocument]) -> list[TextDocument]:
    wanted = {shingle for document in documents for line in document.paragraphs for shingle in _shingles(line)}
    seen = {
        shingle
        for document in train
        for line in document.paragraphs
        for shingle in _shingles(line)
        if shingle in wanted
    }
    kept = []
    for document in documents:
        lines = [line for line in document.text.split("\n") if not _is_mostly_seen(line, seen)]
        text = "\n".join(lines).strip("\n")
        if text:
            kept.append(replace(document, text=text))
    return kept


def _shingles(line: str) -> list[int]:
    """Hashes of runs of five words; a shorter paragraph of at least four words is one run."""
    words = paragraph_key(line).split(" ")
    if len(words) < LONG_PARAGRAPH_WORDS:
        return []
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return [hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(count)]


def _is_mostly_seen(line: str, seen: set[int]) -> bool:
    shingles = _shingles(line)
    return bool(shingles) and sum(shingle in seen for shingle in shingles) > SHINGLE_SHARE * len(shingles)


def _write_split(path: Path, split: TextSplit) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        for held_out, documents in ((False, split.train), (True, split.held_out)):
            for document in documents:
                file.write(json.dumps({"held_out": held_out, **asdict(document)}, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def _read_split(path: Path) -> TextSplit:
    split = TextSplit([], [])
    with path.open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            (split.held_out if values.pop("held_out") else split.train).append(TextDocument(**values))
    return split


def main() -> None:
    """Print documents, megabytes and words of every source and language."""
    split = load_split()
    for name, documents in (("train", split.train), ("held out", split.held_out)):
        for (source, language), size in sorted(text_sizes(documents).items()):
            row = f"{size['documents']:6d} documents {size['bytes'] / 1e6:7.3f} MB {size['words']:9d} words"
            print(f"{name:8s} {source:18s} {language}  {row}")


if __name__ == "__main__":
    main()
