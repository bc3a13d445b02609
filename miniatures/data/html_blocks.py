"""HTML page -> list of text blocks (paragraphs, headings, list items, cells), without navigation or pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Literal

Attributes = Mapping[str, str]
TagTest = Callable[[str, Attributes], bool]

VOID_TAGS = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"]
)
HEADING_TAGS = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
BLOCK_TAGS = HEADING_TAGS | {"p", "li", "dt", "dd", "td", "th", "tr", "table", "ul", "ol", "dl", "caption"}
BLOCK_TAGS |= {"div", "section", "article", "pre", "blockquote"}
ALWAYS_SKIPPED = frozenset(["script", "style", "noscript", "head", "nav", "footer", "button"])


@dataclass(frozen=True)
class Block:
    """One paragraph-like piece of a page."""

    kind: Literal["heading", "text", "code"]
    text: str
    """Whitespace is collapsed as a browser shows it, except in code."""
    anchor: str | None
    """Nearest `id` or `name` on or inside the block's element."""


def html_blocks(html: str, *, is_content: TagTest, is_skipped: TagTest) -> list[Block]:
    """Read the blocks of one page in document order.

    Args:
        html: the page.
        is_content: true for the element that holds the page's own text; everything outside is dropped.
        is_skipped: true for elements inside it that are dropped with all they contain.
    """
    reader = _BlockReader(is_content, is_skipped)
    reader.feed(html)
    reader.close()
    reader.end_block()
    return reader.blocks


class _BlockReader(HTMLParser):
    def __init__(self, is_content: TagTest, is_skipped: TagTest) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._is_content, self._is_skipped = is_content, is_skipped
        self._open: list[str] = []
        self._content_depth: int | None = None
        self._skip_depth: int | None = None
        self._pieces: list[str] = []
        self._anchor: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag not in VOID_TAGS:
            self._open.append(tag)
        if self._content_depth is None and self._is_content(tag, values):
            self._content_depth = len(self._open)
        if self._content_depth is None or self._skip_depth is not None:
            return
        if tag not in VOID_TAGS and (tag in ALWAYS_SKIPPED or self._is_skipped(tag, values)):
            self._skip_depth = len(self._open)
            return
        if tag in BLOCK_TAGS:
            self.end_block()
        if tag == "br":
            self._pieces.append(" ")
        if anchor := values.get("id") or (tag == "a" and values.get("name")):
            self._anchor = anchor

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._open:
            return
        if tag in BLOCK_TAGS:
            self.end_block()
        while self._open.pop() != tag:  # elements whose end tag HTML lets authors leave out
            continue
        if self._skip_depth is not None and len(self._open) < self._skip_depth:
            self._skip_depth = None
        if self._content_depth is not None and len(self._open) < self._content_depth:
            self._content_depth = None

    def handle_data(self, data: str) -> None:
        if self._content_depth is not None and self._skip_depth is None:
            self._pieces.append(data)

    def end_block(self) -> None:
        """Close the current block, if it holds any text."""
        raw = "".join(self._pieces)
        in_code = "pre" in self._open
        text = raw.strip("\n") if in_code else " ".join(raw.split())
        if text.strip():
            kind: Literal["heading", "text", "code"] = "text"
            if in_code:
                kind = "code"
            elif any(tag in HEADING_TAGS for tag in self._open):
                kind = "heading"
            self.blocks.append(Block(kind, text, self._anchor))
            self._anchor = None
        self._pieces = []
