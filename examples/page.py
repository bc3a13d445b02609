"""One HTML page from sections of text, tables and pictures, with nothing loaded from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #d0d7de; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; border-bottom: 1px solid #d0d7de; }
td { text-align: right; } td:first-child, th:first-child { text-align: left; }
blockquote { margin: 1rem 0; padding: .5rem 1rem; background: #f6f8fa; border-left: 4px solid #4c78a8; }
blockquote { white-space: pre-wrap; }
blockquote b { color: #4c78a8; } img { max-width: 100%; }
.word { display: inline-block; margin: .15rem; padding: .1rem .45rem; border-radius: .4rem; background: #e7eefb; }
.mark { background: #eee; color: #777; font-size: .8em; } .spelled { background: #fde8d7; }
"""


@dataclass
class Section:
    """One part of the page; every method adds to its end."""

    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, sentence: str) -> None:
        """Add a paragraph of plain text."""
        self.parts.append(f"<p>{html.escape(sentence)}</p>")

    def continuation(self, prompt: str, generated: str) -> None:
        """Add a prompt and what a model wrote after it."""
        self.parts.append(f"<blockquote><b>{html.escape(prompt)}</b>{html.escape(generated)}</blockquote>")

    def chips(self, words: Sequence[tuple[str, str]]) -> None:
        """Add a row of labelled words: (text, CSS class)."""
        self.parts.append("<p>" + "".join(f'<span class="word {c}">{html.escape(w)}</span>' for w, c in words) + "</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        lines = [_row("th", header), *(_row("td", row) for row in rows)]
        self.parts.append("<table>" + "".join(lines) + "</table>")

    def figure(self, figure: object, path: Path, caption: str) -> None:
        """Add a matplotlib figure, and save it as a PNG."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        path.write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )


def write_page(sections: Sequence[Section], path: Path) -> None:
    """Write the page."""
    body = "".join(f"<h2>{html.escape(section.title)}</h2>{''.join(section.parts)}" for section in sections)
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Demo</title>'
        f"<style>{_STYLE}</style><h1>What the packages do, on this machine</h1>{body}</html>",
        encoding="utf-8",
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
