"""Which characters and words of its input each id stands for: what fast tokenizers offer, for this one.

transformers truncates and pads lists of ids without saying where they came from. So positions travel in place of ids,
as numbers beyond every id, and are turned back afterwards.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from transformers import BatchEncoding
from transformers.utils import TensorType

from .encoding_tfree import Located
from .inputs_tfree import Inputs

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
        self._ends = [[end for _, end in located.spans] for located in inputs]
        self.n_sequences = len(inputs)
        origins = [None if number < _TAG else divmod(number - _TAG, _TAG) for number in tagged]
        self.sequence_ids = [None if origin is None else origin[0] for origin in origins]
        self.ids = [
            number if origin is None else inputs[origin[0]].ids[origin[1]]
            for number, origin in zip(tagged, origins, strict=True)
        ]
        self.tokens = to_tokens(self.ids)
        self.word_ids = [None if origin is None else inputs[origin[0]].words[origin[1]] for origin in origins]
        self.offsets = [(0, 0) if origin is None else inputs[origin[0]].spans[origin[1]] for origin in origins]
        self.special_tokens_mask = [int(origin is None) for origin in origins]
        self._index_of = {origin: index for index, origin in enumerate(origins)}

    def __len__(self) -> int:
        return len(self.ids)

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


def tagged(located: Located, sequence: int) -> list[int]:
    """Return a number for every id of a first (0) or second (1) text, to be passed through in its place."""
    first = _TAG * (sequence + 1)
    return list(range(first, first + len(located.ids)))


def restore(
    encoded: BatchEncoding,
    located: Inputs,
    to_tokens: Callable[[list[int]], list[str]],
    wants_spans: bool,
    return_tensors: str | TensorType | None,
) -> BatchEncoding:
    """Put the ids back, and add what is known about them.

    Args:
        encoded: what transformers made of the tagged numbers, as lists.
        located: the inputs, texts replaced by `Located`.
        to_tokens: names ids.
        wants_spans: add `offset_mapping`.
        return_tensors: what the lists shall become.
    """
    data = dict(encoded)
    second = located.second or [None] * len(located.first)
    pairs = [[x for x in pair if x is not None] for pair in zip(located.first, second, strict=True)]

    def rows(name: str) -> list[Alignment]:
        values = data[name] if located.is_batched else [data[name]]
        return [Alignment(row, texts, to_tokens) for row, texts in zip(values, pairs, strict=True)]

    def unbatched(values: list[Any]) -> Any:
        return values if located.is_batched else values[0]

    alignments = rows("input_ids")
    data["input_ids"] = unbatched([alignment.ids for alignment in alignments])
    if wants_spans:
        data["offset_mapping"] = unbatched([alignment.offsets for alignment in alignments])
    if return_tensors:  # as transformers does: what overflows has no common length
        data.pop("overflowing_tokens", None)
        data.pop("num_truncated_tokens", None)
    elif "overflowing_tokens" in data:
        data["overflowing_tokens"] = unbatched([row.ids for row in rows("overflowing_tokens")])
    return BatchEncoding(data, alignments, return_tensors, prepend_batch_axis=not located.is_batched)


def join_located(parts: Sequence[Located]) -> Located:
    """Join the words of a split input; spans stay those within each word, words count the parts."""
    return Located(
        [index for part in parts for index in part.ids],
        [span for part in parts for span in part.spans],
        [number for number, part in enumerate(parts) for _ in part.ids],
    )
