"""Which characters and words of its input each id stands for: what fast tokenizers offer, for this one.

transformers truncates and pads lists of ids without saying where they came from. So positions travel in place of ids, as
numbers beyond every id, and are turned back afterwards.
"""

import bisect
from collections.abc import Callable, Sequence

from .encoding_tfree import Located

Span = tuple[int, int]
_TAG = 1 << 40


class Alignment:
    """The ids of one input beside their characters; answers what `BatchEncoding` asks of `tokenizers.Encoding`."""

    def __init__(
        self, tagged: Sequence[int], inputs: Sequence[Located], to_tokens: Callable[[list[int]], list[str]]
    ) -> None:
        """Turn tagged positions back.

        Args:
            tagged: what became of `tags` of the inputs, with padding and specials added.
            inputs: the text, or the two texts of a pair.
            to_tokens: names ids.
        """
        self._to_tokens = to_tokens
        self._ends = [[end for _, end in located.spans] for located in inputs]
        self.n_sequences = len(inputs)
        origins = [None if number < _TAG else divmod(number - _TAG, _TAG) for number in tagged]
        self.sequence_ids = [None if origin is None else origin[0] for origin in origins]
        self.ids = [
            number if origin is None else inputs[origin[0]].ids[origin[1]]
            for number, origin in zip(tagged, origins, strict=True)
        ]
        self.word_ids = [None if origin is None else inputs[origin[0]].words[origin[1]] for origin in origins]
        self.offsets = [(0, 0) if origin is None else inputs[origin[0]].spans[origin[1]] for origin in origins]
        self.special_tokens_mask = [int(origin is None) for origin in origins]
        self._index_of = {origin: index for index, origin in enumerate(origins)}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> list[str]:
        """Name every id."""
        return self._to_tokens(self.ids)

    def token_to_sequence(self, index: int) -> int | None:
        """Return which of the two texts an id belongs to."""
        return self.sequence_ids[index]

    def token_to_word(self, index: int) -> int | None:
        """Return the word an id belongs to."""
        return self.word_ids[index]

    def token_to_chars(self, index: int) -> Span | None:
        """Return the characters of an id."""
        return None if self.sequence_ids[index] is None else self.offsets[index]

    def char_to_token(self, char: int, sequence: int = 0) -> int | None:
        """Return the id a character went into; a space that goes without saying belongs to the word after it."""
        # Ends never fall, and an id without characters ends where the one before it does, so it is never the first.
        return self._index_of.get((sequence, bisect.bisect_right(self._ends[sequence], char)))

    def word_to_tokens(self, word: int, sequence: int = 0) -> Span | None:
        """Return the range of ids of a word."""
        indices = [
            index
            for index, number in enumerate(self.word_ids)
            if number == word and self.sequence_ids[index] == sequence
        ]
        return (indices[0], indices[-1] + 1) if indices else None

    def word_to_chars(self, word: int, sequence: int = 0) -> Span | None:
        """Return the range of characters of a word."""
        tokens = self.word_to_tokens(word, sequence)
        return None if tokens is None else (self.offsets[tokens[0]][0], self.offsets[tokens[1] - 1][1])

    def char_to_word(self, char: int, sequence: int = 0) -> int | None:
        """Return the word a character belongs to."""
        index = self.char_to_token(char, sequence)
        return None if index is None else self.word_ids[index]


def tags(located: Located, sequence: int) -> list[int]:
    """Return a number for every id of the first (0) or second (1) text, to be passed through in its place."""
    first = _TAG * (sequence + 1)
    return list(range(first, first + len(located.ids)))


def join_located(parts: Sequence[Located]) -> Located:
    """Join the words of a split input; spans stay those within each word, words count the parts."""
    return Located(
        [index for part in parts for index in part.ids],
        [span for part in parts for span in part.spans],
        [number for number, part in enumerate(parts) for _ in part.ids],
    )
