"""An explanation as HTML for notebooks: one fragment without scripts or outside links, for light and dark pages.

Colours are translucent and text keeps the page's own color, so that the fragment needs to know nothing about the page.
"""

import base64
import math
import struct
import zlib
from html import escape

from torch import Tensor

from .display_atman import (
    OPPOSES,
    SUPPORTS,
    greatest,
    is_signed,
    mapped_images,
    probability,
    prompt_pieces,
    shorten,
    target_text,
    visible,
)
from .explanation_atman import Explanation

MAX_ROWS = 8
"""More targets than this become columns of a table."""
MAX_PIECES = 4000
MAX_TABLE_UNITS = 200
MAX_TABLE_TARGETS = 64
OPACITY = 0.55
"""Of the strongest color: text in the page's color stays readable on it."""
_UNKNOWN = "background:repeating-linear-gradient(45deg,rgba(128,128,128,.35) 0 2px,transparent 2px 6px)"
_FAINT = "opacity:.65"
_CELL = "padding:1px 8px;text-align:right;white-space:nowrap;border:0"


def render_html(explanation: Explanation) -> str:
    """Render an explanation: the prompt coloured per target, or a table for many targets, and a map of every image."""
    count = len(explanation.targets)
    is_table = count > MAX_ROWS
    shown = [None] if is_table else list(range(count))
    rows = {target: explanation.relevance(target).tolist() for target in shown}
    scale = greatest(score for scores in rows.values() for score in scores)
    body = "".join(_row(explanation, target, scores, scale) for target, scores in rows.items())
    return (
        '<div class="atman-explain" style="font:15px/1.9 system-ui,sans-serif;color:inherit;text-align:left;'
        'max-width:62em;margin:.4em 0">'
        f"{_legend(explanation, scale)}{body}{_table(explanation) if is_table else ''}</div>"
    )


def _legend(explanation: Explanation, scale: float) -> str:
    signed = is_signed(explanation)
    colors = ",".join(_rgba(step / 4) for step in range(-4 if signed else 0, 5))
    bar = f"display:inline-block;width:9em;height:.8em;border-radius:3px;background:linear-gradient(90deg,{colors})"
    unit = escape(explanation.score_unit)
    low, high = (
        (f"opposes −{scale:.3g}", f"+{scale:.3g} supports ({unit})") if signed else ("0", f"{scale:.3g} ({unit})")
    )
    return (
        '<div style="display:flex;gap:.6em;align-items:baseline;font-size:12px;margin-bottom:.3em">'
        f'<span style="{_FAINT}">{low}</span><span style="{bar}"></span><span style="{_FAINT}">{high}</span></div>'
    )


def _row(explanation: Explanation, target: int | None, scores: list[float], scale: float) -> str:
    name = "all targets" if target is None and len(explanation.targets) > 1 else "target"
    heading = (
        f'<span style="{_FAINT};font-size:12px">{name} </span><b>{escape(target_text(explanation, target))}</b>'
        f'<span style="{_FAINT};font-size:12px"> {probability(explanation, target)}</span>'
    )
    maps = "".join(_map(explanation, i, target, scale) for i in mapped_images(explanation))
    return (
        '<div style="border-left:3px solid rgba(128,128,128,.4);padding-left:.8em;margin:.5em 0">'
        f'<div style="line-height:1.5">{heading}</div><div dir="auto" style="white-space:pre-wrap;'
        f'overflow-wrap:anywhere">{_text(explanation, scores, scale)}</div>{maps}</div>'
    )


def _text(explanation: Explanation, scores: list[float], scale: float) -> str:
    pieces = prompt_pieces(explanation)
    shown = [_piece(explanation, piece.text, piece.unit, scores, scale) for piece in pieces[:MAX_PIECES]]
    if len(pieces) > MAX_PIECES:
        shown.append(f'<span style="{_FAINT}"> … {len(pieces) - MAX_PIECES} more</span>')
    return "".join(shown)


def _piece(explanation: Explanation, text: str, unit: int | None, scores: list[float], scale: float) -> str:
    text = escape(text)
    if unit is None:
        return f'<span style="{_FAINT};unicode-bidi:isolate">{text}</span>'
    is_coarse = explanation.is_coarse is not None and explanation.is_coarse[unit]
    style = _background(scores[unit], scale) + ";border-radius:3px;padding:2px 0;unicode-bidi:isolate"
    if is_coarse:
        style += ";border-bottom:1px dashed"
    label = describe(explanation, unit, scores[unit])
    return f'<span style="{style}" title="{escape(label)}">{text}</span>'


def describe(explanation: Explanation, unit: int, score: float) -> str:
    """Say what a unit is and how it scored, in full."""
    value = "not computed" if math.isnan(score) else f"{score:+.6g} {explanation.score_unit}"
    is_coarse = explanation.is_coarse is not None and explanation.is_coarse[unit]
    return f"{shorten(visible(explanation.units[unit].text), 60)}: {value}" + (" (of a larger unit)" * is_coarse)


def _background(score: float, scale: float) -> str:
    return _UNKNOWN if math.isnan(score) else f"background:{_rgba(score / scale)}"


def _rgba(strength: float) -> str:
    red, green, blue = SUPPORTS if strength > 0 else OPPOSES
    return f"rgba({red},{green},{blue},{min(abs(strength), 1.0) * OPACITY:.3f})"


def _map(explanation: Explanation, i: int, target: int | None, scale: float) -> str:
    values = explanation.image_map(i, target)
    rows, columns = values.shape
    width = round(min(280.0, 280.0 * columns / rows))
    picture = base64.b64encode(_png(values, scale)).decode("ascii")
    label = f"image {i}: relevance of {rows} x {columns} patches"
    return (
        f'<img alt="{label}" title="{label}" src="data:image/png;base64,{picture}" style="width:{width}px;'
        f"aspect-ratio:{columns}/{rows};image-rendering:pixelated;border:1px solid rgba(128,128,128,.5);"
        'border-radius:3px;margin:.4em .6em .2em 0;vertical-align:top">'
    )


def _png(values: Tensor, scale: float) -> bytes:
    """Write a map [rows, columns] as a PNG file of translucent pixels; the format is that of RFC 2083."""
    lines = [b"\0" + b"".join(_pixel(score / scale) for score in row) for row in values.tolist()]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, 6, 0, 0, 0)  # 8 bits each of RGBA
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _pixel(strength: float) -> bytes:
    if math.isnan(strength):
        return bytes((128, 128, 128, 90))
    return bytes((*(SUPPORTS if strength > 0 else OPPOSES), round(255 * min(abs(strength), 1.0) * 0.9)))


def _table(explanation: Explanation) -> str:
    scores = explanation.scores[:MAX_TABLE_TARGETS, :MAX_TABLE_UNITS].tolist()
    scale = greatest(score for row in scores for score in row)
    heads = "".join(
        f'<th style="{_CELL};font-weight:600">{escape(target_text(explanation, t))}<br>'
        f'<span style="{_FAINT};font-weight:400">{probability(explanation, t)}</span></th>'
        for t in range(len(scores))
    )
    lines = "".join(
        f'<tr><th style="{_CELL};text-align:left;font-weight:400">'
        f"{escape(shorten(visible(explanation.units[u].text), 40))}</th>"
        + "".join(_cell(explanation, u, row[u], scale) for row in scores)
        + "</tr>"
        for u in range(len(scores[0]))
    )
    return (
        f'<div style="overflow:auto;max-height:28em;font-size:12px;line-height:1.5"><table style="border-collapse:'
        f'collapse;color:inherit"><tr><th style="{_CELL}"></th>{heads}</tr>{lines}</table></div>'
        f"{_omitted(explanation)}"
    )


def _cell(explanation: Explanation, unit: int, score: float, scale: float) -> str:
    text = "" if math.isnan(score) else f"{score:+.2f}"
    label = escape(describe(explanation, unit, score))
    return f'<td style="{_CELL};{_background(score, scale)}" title="{label}">{text}</td>'


def _omitted(explanation: Explanation) -> str:
    units = max(0, len(explanation.units) - MAX_TABLE_UNITS)
    targets = max(0, len(explanation.targets) - MAX_TABLE_TARGETS)
    if not units and not targets:
        return ""
    return f'<div style="{_FAINT};font-size:12px">… {units} more units and {targets} more targets in scores</div>'
