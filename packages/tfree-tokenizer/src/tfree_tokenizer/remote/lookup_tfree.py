"""Text to ids."""

from collections.abc import Sequence

from .words_tfree import (
    NO_SPACE,
    Ruleset,
    _split_v1,
    _split_v2,
    line_packs,
    pack,
    space_packs,
    structural_words,
)


class WordLookup:
    def __init__(
        self, words: Sequence[str], *, first_structural_id: int, ruleset: Ruleset, max_word_bytes: int | None
    ) -> None:
        markers = {word: first_structural_id + i for i, word in enumerate(structural_words(ruleset))}
        self.first_byte_id = first_structural_id + len(markers)
        self.first_word_id = self.first_byte_id + 512
        self.ruleset, self.max_word_bytes = ruleset, max_word_bytes
        self._spaces = {size: markers[name] for size, name in space_packs(ruleset).items()}
        self._lines = {size: markers[name] for size, name in line_packs().items()}
        self._ids = {word: index for index, word in enumerate(words, self.first_word_id)}
        self._ids[""] = markers[NO_SPACE]
        self._ids |= {" " * size: index for size, index in self._spaces.items()}
        self._ids |= {"\n" * size: index for size, index in self._lines.items()}

    def encode(self, text: str) -> list[int]:
        split = _split_v1 if self.ruleset == "v1" else _split_v2
        words = split(text, self.max_word_bytes)
        ids = list(map(self._ids.get, words))
        if None in ids:
            ids = self._with_spelled(words, ids)
        return ids

    def _with_spelled(self, words, ids):
        out = []
        for word, index in zip(words, ids, strict=True):
            if index is not None:
                out.append(index)
            elif word[0] == " ":
                out += pack(len(word), self._spaces)
            elif word[0] == "\n":
                out += pack(len(word), self._lines)
            else:
                out += self.spell(word)
        return out

    def spell(self, word: str) -> list[int]:
        data = word.encode("utf-8", "surrogatepass")
        return [self.first_byte_id + byte for byte in data[:-1]] + [self.first_byte_id + 256 + data[-1]]
