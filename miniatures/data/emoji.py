"""Emoji with their pictures (Noto colour font) and names in many languages (CLDR), and a seeded split.

`python -m miniatures.data.emoji` prints how many there are and writes a contact sheet.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from miniatures.data.packages import unpacked

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

CLDR = "usr/share/unicode/cldr/common"
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109
"""The only size of the font's bitmaps."""
LANGUAGES = ("en", "de", "fr", "es", "it")

SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
GENDER_SIGNS = re.compile("\u200d[♀♂]")
EMOJI_PRESENTATION = "\ufe0f"


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji and what people call it."""

    text: str
    """The character sequence, without variation selectors (as CLDR writes it)."""
    names: dict[str, str]
    """Short name by language."""
    keywords: dict[str, tuple[str, ...]]
    """Search terms by language."""
    category: str
    """CLDR's group, e.g. "Animals & Nature"; empty for emoji newer than its list."""
    subcategory: str
    """CLDR's sub-group, e.g. "animal-mammal"."""

    @property
    def base(self) -> str:
        """The sequence without skin tones and gender signs: what its variants share."""
        return base_sequence(self.text)


def load_emoji(languages: Sequence[str] = LANGUAGES) -> list[Emoji]:
    """All emoji that the font draws and that have a name in every language, in CLDR's order.

    Left out: bare digits and signs, and skin tones by themselves.

    Raises:
        ValueError: CLDR has no annotations for a language.
        PackageError: a package could not be had.
    """
    root = unpacked("unicode-cldr-core") / CLDR
    tables = {language: _read_language(root, language) for language in languages}
    categories = parse_labels((root / "properties/labels.txt").read_text(encoding="utf-8"))
    shared = [text for text in tables[languages[0]] if all(text in table for table in tables.values())]
    shared = [text for text in shared if not (text.isascii() or SKIN_TONES.fullmatch(text))]
    found = []
    for text in shared:
        category, subcategory = categories.get(base_sequence(text), ("", ""))
        names = {language: table[text][0] for language, table in tables.items()}
        keywords = {language: table[text][1] for language, table in tables.items()}
        if _is_drawn(text):
            found.append(Emoji(text=text, names=names, keywords=keywords, category=category, subcategory=subcategory))
    return found


def split_emoji(emoji: Sequence[Emoji], *, test_share: float = 0.2, seed: int = 0) -> tuple[list[Emoji], list[Emoji]]:
    """Split into training and test emoji; variants by skin tone or gender stay on one side.

    Raises:
        ValueError: `test_share` outside (0, 1).
    """
    if not 0.0 < test_share < 1.0:
        raise ValueError(f"test_share must lie in (0, 1), got {test_share}.")
    sides: tuple[list[Emoji], list[Emoji]] = ([], [])
    for one in emoji:
        digest = hashlib.sha256(f"{seed}\n{one.base}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < test_share * 2**64].append(one)
    return sides


def render_emoji(text: str, size: int = 128) -> Image:
    """Draw an emoji, centered and as large as fits, on transparent ground.

    Returns:
        RGBA image of `size` x `size` pixels.

    Raises:
        ValueError: the font does not draw the text in color as a single sign.
    """
    from PIL import Image

    picture = _bitmap(text)
    if picture is None:
        raise ValueError(f"text must be one emoji of the font, got {text!r}.")
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGBA", (size, size))
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas


def parse_annotations(xml: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Read one CLDR annotation file: sequence -> (short name, search terms)."""
    names: dict[str, str] = {}
    terms: dict[str, tuple[str, ...]] = {}
    for entry in ElementTree.fromstring(xml).iter("annotation"):
        text, value = entry.get("cp", ""), (entry.text or "").strip()
        if entry.get("type") == "tts":
            names[text] = value
        else:
            terms[text] = tuple(term.strip() for term in value.split("|"))
    return {text: (name, terms.get(text, ())) for text, name in names.items()}


def parse_labels(text: str) -> dict[str, tuple[str, str]]:
    """Read CLDR's labels: sequence -> (category, sub-category)."""
    labels: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(";")]
        if line.startswith("#") or len(fields) < 3 or not fields[0].startswith("["):
            continue
        for member in _set_members(fields[0][1:-1]):
            labels.setdefault(base_sequence(member), (fields[1], fields[2]))
    return labels


def base_sequence(text: str) -> str:
    """Drop skin tones, gender signs and variation selectors."""
    return GENDER_SIGNS.sub("", SKIN_TONES.sub("", text.replace(EMOJI_PRESENTATION, ""))) or text


def _set_members(members: str) -> list[str]:
    """Members of a set such as "ab-d{xy}": characters, ranges, and sequences in braces."""
    found: list[str] = []
    for sequence, first, last, single in re.findall(r"\{(.*?)\}|(.)-(.)|(\S)", members):
        if first:
            found += map(chr, range(ord(first), ord(last) + 1))
        else:
            found.append(sequence or single)
    return found


def _read_language(root: Path, language: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    table: dict[str, tuple[str, tuple[str, ...]]] = {}
    for folder in ("annotations", "annotationsDerived"):
        path = root / folder / f"{language}.xml"
        if not re.fullmatch(r"[a-z]{2,3}(_[A-Za-z]+)*", language) or not path.is_file():
            raise ValueError(f"languages must be codes that CLDR has annotations for, got {language!r}.")
        table |= parse_annotations(path.read_text(encoding="utf-8"))
    return table


def _is_drawn(text: str) -> bool:
    return _bitmap(text) is not None


@lru_cache(maxsize=1)
def _font() -> FreeTypeFont:
    from PIL import ImageFont

    path = unpacked("fonts-noto-color-emoji") / FONT
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)


@lru_cache(maxsize=512)
def _bitmap(text: str) -> Image | None:
    """The sign as the font draws it, cropped to its ink; None when it is not a single one in color."""
    from PIL import Image, ImageDraw

    font = _font()
    if font.getlength(text) > 1.5 * font.getlength("😀"):
        return None
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), text, font=font, embedded_color=True)
    ink = canvas.getbbox()
    return canvas.crop(ink) if ink else None


def contact_sheet(emoji: Sequence[Emoji], *, columns: int = 32, size: int = 32) -> Image:
    """All pictures in a grid."""
    from PIL import Image

    sheet = Image.new("RGB", (columns * size, -(-len(emoji) // columns) * size), "white")
    for number, one in enumerate(emoji):
        picture = render_emoji(one.text, size)
        sheet.paste(picture, (number % columns * size, number // columns * size), picture)
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m miniatures.data.emoji", description=__doc__)
    parser.add_argument("--sheet", type=Path, help="write all pictures in a grid to this file")
    options = parser.parse_args(arguments)
    emoji = load_emoji()
    train, test = split_emoji(emoji)
    print(
        f"{len(emoji)} emoji, {len({one.base for one in emoji})} without variants; {len(train)} train, {len(test)} test"
    )
    if options.sheet:
        contact_sheet(emoji).save(options.sheet)


if __name__ == "__main__":
    main()
