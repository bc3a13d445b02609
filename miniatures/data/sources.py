"""Unpacked Debian packages -> raw pages: one reader per source of text, each giving (page id, blocks)."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from miniatures.data.html_blocks import Attributes, Block, html_blocks
from miniatures.data.packages import PackageError, unpacked

BIBLE_MAGIC = b"EC02Compressed Data File"
COMPRESS_HEADER = b"\x1f\x9d\x90"  # of Unix compress with codes of up to 16 bits; the data file leaves it out
SECTION_NUMBER = re.compile(r"(?:(\d+|[A-Z])\.(\d+)\.)(?=\s)")
VERSE = re.compile(r"(\d?[A-Z][a-z]+)(\d+):(\d+) (.+)")


class RawPage(NamedTuple):
    """One page as its package has it."""

    page: str
    """The same in every language of a source."""
    blocks: list[Block]


def office_help_pages(language: str) -> Iterator[RawPage]:
    """LibreOffice help, one page per topic; page ids and paragraph anchors agree across languages."""
    package = "libreoffice-help-" + ("en-us" if language == "en" else language)
    locale = "en-US" if language == "en" else language
    root = unpacked(package) / "usr/share/libreoffice/help" / locale / "text"
    for path in sorted(root.rglob("*.html")):
        blocks = office_help_blocks(path.read_text(encoding="utf-8"))
        yield RawPage(path.relative_to(root).with_suffix("").as_posix(), blocks)


def office_help_blocks(html: str) -> list[Block]:
    """The blocks of one LibreOffice help page.

    Left out: links to related topics, icons' texts, and all but the default variant of text that depends on the system.
    """
    return html_blocks(html, is_content=_is_office_content, is_skipped=_is_office_furniture)


def debian_reference_pages(language: str) -> Iterator[RawPage]:
    """Debian Reference, one page per section of the second level ("9.4"); numbers agree across languages."""
    root = unpacked(f"debian-reference-{language}") / "usr/share/debian-reference"
    for path in sorted(root.glob(f"ch*.{language}.html")) + sorted(root.glob(f"ap*.{language}.html")):
        yield from debian_reference_sections(path.read_text(encoding="utf-8"), chapter=path.name.split(".")[0])


def debian_reference_sections(html: str, chapter: str) -> list[RawPage]:
    """Cut one chapter into its sections."""
    blocks = html_blocks(html, is_content=_is_reference_content, is_skipped=_is_reference_furniture)
    pages = [RawPage(f"{chapter}/0", [])]
    for block in blocks:
        number = SECTION_NUMBER.match(block.text) if block.kind == "heading" else None
        if number and f"{chapter}/{number[2]}" != pages[-1].page:
            pages.append(RawPage(f"{chapter}/{number[2]}", []))
        pages[-1].blocks.append(block)
    return [page for page in pages if page.blocks]


def bible_pages(language: str = "en") -> Iterator[RawPage]:
    """King James Bible, one page per chapter, one block per verse; verse numbers are left out."""
    if language != "en":
        return
    path = unpacked("bible-kjv-text") / "usr/lib/bible.data"
    yield from bible_chapters(bible_text(path))


def bible_text(path: Path) -> str:
    """Unpack the package's data file: sections of 64 kB, each in the format of Unix `compress` without its header.

    Raises:
        PackageError: the file is not of this format, or gzip is absent or refuses a section.
    """
    data = path.read_bytes()
    if not data.startswith(BIBLE_MAGIC):
        raise PackageError(f"{path.name} must start with {BIBLE_MAGIC!r}, got {data[:24]!r}.")
    (count,) = struct.unpack_from(">I", data, 0x58)
    offsets = struct.unpack_from(f">{count + 1}I", data, 0x5C)
    return b"".join(map(_decompress, (data[a:b] for a, b in pairwise(offsets)))).decode("ascii")


def bible_chapters(text: str) -> list[RawPage]:
    """Group lines such as "Ge1:1 In the beginning ..." by chapter."""
    pages: list[RawPage] = []
    for line in text.splitlines():
        verse = VERSE.fullmatch(line.strip())
        if verse is None:
            continue
        page = f"{verse[1]}/{verse[2]}"
        if not pages or pages[-1].page != page:
            pages.append(RawPage(page, []))
        pages[-1].blocks.append(Block("text", verse[4], verse[3]))
    return pages


def _decompress(section: bytes) -> bytes:
    try:
        done = subprocess.run(["gzip", "-dc"], input=COMPRESS_HEADER + section, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PackageError(f"gzip could not unpack a section of bible.data: {error}.") from error
    return done.stdout


def _is_office_content(_tag: str, attributes: Attributes) -> bool:
    return attributes.get("id") == "DisplayArea"


def _is_office_furniture(tag: str, attributes: Attributes) -> bool:
    kind = attributes.get("class", "")
    if attributes.get("hidden") == "true":
        return not attributes.get("id", "").startswith("default")
    return kind in {"noteicon", "howtogetheader"} or (tag == "p" and kind in {"embedded", "related"})


def _is_reference_content(_tag: str, attributes: Attributes) -> bool:
    return attributes.get("class", "") in {"chapter", "appendix"}


def _is_reference_furniture(_tag: str, attributes: Attributes) -> bool:
    return attributes.get("class", "") in {"toc", "navheader", "navfooter"}
