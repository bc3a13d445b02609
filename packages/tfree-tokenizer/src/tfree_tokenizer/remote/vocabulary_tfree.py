"""Which id is which: specials, structural words, the bytes of spelled words, the dictionary, tokens added later."""

from collections.abc import Mapping, Sequence

from .words_tfree import Ruleset, structural_words

NUM_BYTE_IDS = 512
_BYTE_TOKENS = tuple(f"<0x{byte:02X}|{place}>" for place in ("inside", "last") for byte in range(256))
"""Names of the byte ids. No word and no structural word looks like this, and no added token may."""


class Vocabulary:
    """The ids that a tokenizer is built with.

    Args:
        specials: special tokens with the first ids.
        ruleset: "v1" or "v2", decides the structural words.
        words: the dictionary, checked.
    """

    def __init__(self, specials: Sequence[str], ruleset: Ruleset, words: Sequence[str]) -> None:
        self.specials, self.ruleset, self.words = tuple(specials), ruleset, words
        self.structural = structural_words(ruleset)
        self.reserved = frozenset(self.structural).union(_BYTE_TOKENS)
        """Names of ids that are no text; a special or added token must not be called so."""
        check_specials(specials, self.reserved)
        self.first_structural_id = len(self.specials)
        self.first_byte_id = self.first_structural_id + len(self.structural)
        self.first_word_id = self.first_byte_id + NUM_BYTE_IDS
        self._ids: dict[str, int] | None = None

    def __reduce__(self) -> tuple[type["Vocabulary"], tuple[Sequence[str], Ruleset, Sequence[str]]]:
        """Copy what it was made from: small, and equal for equal vocabularies."""
        return Vocabulary, (self.specials, self.ruleset, self.words)

    def __len__(self) -> int:
        return self.first_word_id + len(self.words)

    def token(self, index: int) -> str:
        """Name an id.

        Raises:
            IndexError: it is none of these.
        """
        if index >= self.first_word_id:
            return self.words[index - self.first_word_id]
        if index < 0:
            raise IndexError(f"ids must not be negative, got {index}.")
        if index >= self.first_byte_id:
            return _BYTE_TOKENS[index - self.first_byte_id]
        return (self.specials + self.structural)[index]

    def ids(self) -> dict[str, int]:
        """Return the id of every name; built once."""
        if self._ids is None:
            names = [*self.specials, *self.structural, *_BYTE_TOKENS, *self.words]
            self._ids = dict(zip(names, range(len(names)), strict=True))
        return self._ids

    def words_by_id(self) -> list[str | None]:
        """Return the word of every id, None for bytes."""
        return [*self.specials, *self.structural, *[None] * NUM_BYTE_IDS, *self.words]

    def check_added(self, added: Mapping[int, str]) -> None:
        """Check the tokens of a saved tokenizer that stand beside the dictionary.

        Raises:
            ValueError: one has the id of something else, or they do not follow the dictionary without a gap.
        """
        for index, token in added.items():
            if index < len(self) and (index < 0 or self.token(index) != token):
                raise ValueError(
                    f"added_tokens_decoder gives id {index} to {token!r}, but it stands for something else."
                )
            if index >= len(self) and token in self.reserved:
                raise ValueError(f"added_tokens_decoder must not hold the structural token {token!r}.")
        later = sorted(index for index in added if index >= len(self))
        if later != list(range(len(self), len(self) + len(later))):
            raise ValueError(f"added_tokens_decoder must continue with id {len(self)} without a gap, got {later[:5]}.")


def check_specials(specials: Sequence[str], reserved: frozenset[str]) -> None:
    """Raise ValueError unless the tokens are distinct strings, not empty, and none has a reserved name."""
    if isinstance(specials, str) or not all(isinstance(token, str) and token for token in specials):
        raise ValueError(f"base_special_tokens must be a list of strings that are not empty, got {specials!r}.")
    if len(set(specials)) < len(specials):
        raise ValueError(f"base_special_tokens must be distinct, got {list(specials)}.")
    if taken := sorted(reserved.intersection(specials)):
        raise ValueError(f"base_special_tokens must not be structural words, got {taken}.")
