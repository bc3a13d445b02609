"""The word-splitting rules, one step after another and without a regular expression: slow, and written to be read.

Tests hold the fast implementations against it. Characters come from `POOLS`.
"""

import random
import unicodedata
from collections.abc import Iterator

AFTER = set("#$=-+*/'\"\\(<[]~^&@%_\n ")
BEFORE = set(".,:;?!=-+*/'\"\\)>]~^&@%_\n 1234567890")
BLANKS_V2 = set("\t\r\u00a0\u3000")
JOINER = "\u200d"
SPACELESS_NAMES = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC")
MARKERS = {1: ("<|ws|>", "<|\n|>")} | {n: (f"<|{n}<-ws->|>", f"<|{n}<-\n->|>") for n in (2, 4, 8, 16)}

POOLS = {
    "ascii": [chr(c) for c in range(32, 127)] + [" ", "  ", "\n"] * 8,
    "prose": ["a", "Zz", "éß", "naïve", "дом", "σ", " ", " ", " ", ", ", ". ", "'", "-", "(", ")", "3", "1",
        "²", "ª", "\n"],
    "spacing": [" ", "  ", "   ", " " * 7, " " * 37, "\n", "\n\n", "\n" * 5, "\n" * 9, "\t", "\r\n", "\u00a0",
        "\u3000", "\u2003", "a", "."],
    "code": ["def", "f", "(", ")", ":", "    ", " " * 12, "\n", "_", "x", "=", "==", "0", "42", '"', "#", "[",
        "]", "\t", "\\"],
    "marks": ["e", "a", "\u0301", "\u0308", "ह", "ि", "न", "्", "द", "ी", " ", "1", "-", "\u200c", "\u200d",
        "\ufe0f", "\n", "אָ", "ش", "ّ"],
    "east": ["日", "本", "か", "\u3099", "ハ", "ー", "ก", "ำ", "ั", "ເ", "ຊ", "ភ", "ា", "မ", "ြ", " ", "\u3000",
        "、", "。", "a", "7", "\ufe00"],
    "emoji": ["😀", "👨", "👩", "\u200d", "\ufe0f", "🏽", "🇩", "🇪", "❤", "🏴", "\U000e0067", "\U000e007f", "\u20e3",
        "1", "#", " ", "a", "\n", "→"],
    "markers": ["<|", "|>", "<|ws|>", "<|no_ws|>", "<|\n|>", "<|2<-ws->|>", "<|endoftext|>", "<|x|>", "<", "|",
        ">", " ", "a", "\n"],
    "odd": ["\0", "\ufeff", "\x1b", "\x7f", "\u202e", "\u200f", "\ud800", "\udfff", "\ud83d", "𝒳", "٣", "१",
        "\U0010ffff", " ", "a", "ﬁ"],
}  # fmt: skip


def random_texts(count: int, seed: int, *, longest: int = 16, any_code_points: bool = True) -> Iterator[str]:
    """Yield strings from each pool in turn, from all of them mixed, and of any code points.

    The rules below know every character under v1, but under v2 only those of the pools.
    """
    rng = random.Random(seed)
    mixed = [piece for pool in POOLS.values() for piece in pool]
    sources = [*POOLS.values(), mixed, mixed, *([None] if any_code_points else [])]
    for index in range(count):
        source, length = sources[index % len(sources)], rng.randint(0, longest)
        if source is None:
            yield "".join(chr(rng.choice([rng.randrange(0x110000), rng.randrange(0x3000)])) for _ in range(length))
        else:
            yield "".join(rng.choices(source, k=length))


def words_by_rule(text: str, ruleset: str) -> list[str]:
    """Split a text without special tokens into words and marker strings."""
    atoms, gaps = _atoms_and_gaps(text, ruleset)
    words: list[str] = []
    spaces = 0
    for index, atom in enumerate([*atoms, None]):
        if index == 0 or atom is None:
            spaces, missing = gaps[index], False
        else:
            expected = space_expected(atoms[index - 1], atom, ruleset)
            spaces = 0 if expected and gaps[index] == 1 else gaps[index]
            missing = expected and gaps[index] == 0
        words += ["<|no_ws|>"] if missing else _packed(spaces, 0, 16 if ruleset == "v2" else 4)
        if atom is not None:
            words.append(atom)
    return _with_line_packs(words)


def space_expected(left: str, right: str, ruleset: str) -> bool:
    """The predicate X."""
    blanks = BLANKS_V2 if ruleset == "v2" else set()
    if left[-1] in AFTER | blanks or right[0] in BEFORE | blanks:
        return False
    return not (ruleset == "v2" and is_spaceless(left[0]) and is_spaceless(right[0]))


def is_spaceless(character: str) -> bool:
    name = unicodedata.name(character, "")
    return (name.startswith(SPACELESS_NAMES) and character != "\u3000") or character == "\u3099"


def is_letter(character: str) -> bool:
    return character.isalnum() and not character.isdecimal()


def _atoms_and_gaps(text: str, ruleset: str) -> tuple[list[str], list[int]]:
    """Atoms in order, and how many spaces stand before each and at the end."""
    atoms: list[str] = []
    gaps = [0]
    position = 0
    while position < len(text):
        if text[position] == " ":
            gaps[-1] += 1
            position += 1
            continue
        length = _run_v1(text[position:]) if ruleset == "v1" else _cluster_v2(text[position:])
        atoms.append(text[position : position + length])
        gaps.append(0)
        position += length
    return atoms, gaps


def _run_v1(text: str) -> int:
    length = 1
    while is_letter(text[0]) and length < len(text) and is_letter(text[length]):
        length += 1
    return length


def _cluster_v2(text: str) -> int:
    """Length of the atom that begins a text, taking one character after another for as long as it belongs."""
    if text[0] == "\n":
        return 1
    length = 1
    is_run = _is_run_letter(text[0])
    flag_letters = int(_is_region(text[0]))
    while length < len(text):
        last, here = text[length - 1], text[length]
        if _is_picture(text[0]) and (_is_tone(here) or _is_tag(here) or (last == JOINER and _is_plain_picture(here))):
            pass
        elif _is_mark(here):
            flag_letters = 2  # a mark closes a flag
        elif is_run and _is_run_letter(here):
            pass
        elif flag_letters == 1 and _is_region(here):
            flag_letters = 2
        else:
            break
        length += 1
    return length


def _is_run_letter(character: str) -> bool:
    return is_letter(character) and not is_spaceless(character) and not _is_mark(character)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"


def _is_region(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _is_tone(character: str) -> bool:
    return "\U0001f3fb" <= character <= "\U0001f3ff"


def _is_tag(character: str) -> bool:
    return "\U000e0020" <= character <= "\U000e007f"


def _is_picture(character: str) -> bool:
    return _is_plain_picture(character) or _is_tone(character)


def _is_plain_picture(character: str) -> bool:
    return character in "😀👨👩❤🏴→"


def _packed(count: int, column: int, longest: int) -> list[str]:
    packs: list[str] = []
    size = longest
    while count:
        if size <= count:
            packs.append(MARKERS[size][column])
            count -= size
        else:
            size //= 2
    return packs


def _with_line_packs(words: list[str]) -> list[str]:
    packed: list[str] = []
    count = 0
    for word in [*words, ""]:
        if word == "\n":
            count += 1
            continue
        packed += _packed(count, 1, 4)
        count = 0
        packed.append(word)
    return packed[:-1]
