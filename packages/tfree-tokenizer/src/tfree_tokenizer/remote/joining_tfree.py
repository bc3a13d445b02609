"""Ids back to text, a piece at a time; what has been written never changes when more ids follow."""

from .words_tfree import Ruleset, SpecialSyntax, expects_space

_REPLACEMENT = "\ufffd"


class TextJoiner:
    """Writes words, spacing and bytes one after another, and the spaces that go without saying."""

    def __init__(self, ruleset: Ruleset, special_syntax: SpecialSyntax = "registered") -> None:
        self.pieces: list[str] = []
        self._ruleset, self._any_special = ruleset, special_syntax == "any"
        self._left = ""  # the word that a space could follow; empty where none is expected
        self._bytes = bytearray()  # of a word that is not finished

    def add_word(self, word: str) -> None:
        """Write a word, after a space if one is expected."""
        self._end_fragment()
        self._write(word)

    def add_verbatim(self, text: str) -> None:
        """Write spacing or a special token; no space is expected next to it, not even if the text is empty."""
        self._end_fragment()
        self.pieces.append(text)
        self._left = ""

    def add_byte(self, byte: int, is_last: bool) -> None:
        """Continue a spelled word; it is written with its last byte."""
        self._bytes.append(byte)
        if is_last:
            data = bytes(self._bytes)
            self._bytes.clear()
            try:
                word = data.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError:
                word = data.decode("utf-8", "replace")
            if self._any_special and word.startswith("<|") and word.endswith("|>"):
                self.add_verbatim(word)
            else:
                self._write(word)

    def text(self, first_piece: int = 0) -> str:
        """Return what is written from a piece on, an unfinished word with its incomplete character replaced."""
        return "".join([*self.pieces[first_piece:], self._fragment()])

    def _write(self, word: str) -> None:
        if expects_space(self._left, word, self._ruleset):
            self.pieces.append(" ")
        self.pieces.append(word)
        self._left = word

    def _end_fragment(self) -> None:
        if self._bytes:
            self.pieces.append(self._fragment())
            self._bytes.clear()
            self._left = ""

    def _fragment(self) -> str:
        shown = self._bytes.decode("utf-8", "replace")
        # Which character comes is not known before it is complete, and whether it wants a space neither.
        is_known = not shown.startswith(_REPLACEMENT) or self._bytes.startswith(_REPLACEMENT.encode())
        return " " + shown if is_known and expects_space(self._left, shown, self._ruleset) else shown
