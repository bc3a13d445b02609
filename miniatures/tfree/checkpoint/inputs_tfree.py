"""The many forms in which transformers lets texts be passed to a tokenizer, brought into one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import TruncationStrategy


@dataclass(frozen=True)
class Inputs:
    """First and second sequence of every input."""

    first: list[Any]
    second: list[Any] | None
    """None if no input is a pair; otherwise None for each that is not."""

    is_batched: bool
    """False for a single input, which is then the only one here."""

    is_split: bool
    """A list of strings is one text, cut into words."""

    @classmethod
    def of(cls, text: Any, text_pair: Any, is_split: bool) -> "Inputs":
        """Tell batches from pairs and from split texts, as transformers does.

        Raises:
            ValueError: the two batches differ in length, or an input has more than two sequences.
        """
        if not _is_batch(text, is_split):
            return cls([text], None if text_pair is None else [text_pair], False, is_split)
        if text_pair is not None and not (isinstance(text_pair, (list, tuple)) and len(text_pair) == len(text)):
            raise ValueError("text_pair must be a batch as long as text, if text is a batch.")
        second = list(text_pair) if text_pair is not None else [None] * len(text)
        rows = [_unpack(*row, is_split) for row in zip(text, second, strict=True)]
        has_pairs = any(pair is not None for _, pair in rows)
        return cls([row[0] for row in rows], [row[1] for row in rows] if has_pairs else None, True, is_split)

    @property
    def is_text(self) -> bool:
        """Tell whether no input is given as ids."""
        return all(_texts_of(sequence, self.is_split) is not None for sequence in self._sequences())

    def replace_texts(
        self, encode: Callable[[list[str]], Sequence[Any]], join: Callable[[Sequence[Any]], Any]
    ) -> "Inputs":
        """Encode the texts of all inputs together, and put what they become in their places.

        Args:
            encode: maps all texts at once.
            join: makes one of what the words of a split text became.
        """
        texts = [text for sequence in self._sequences() for text in _texts_of(sequence, self.is_split) or ()]
        encoded = iter(encode(texts))

        def replaced(sequence: Any) -> Any:
            if sequence is None or (words := _texts_of(sequence, self.is_split)) is None:
                return sequence
            parts = [next(encoded) for _ in words]
            return parts[0] if isinstance(sequence, str) else join(parts)

        pairs = [(replaced(first), replaced(second)) for first, second in self._rows()]
        second = None if self.second is None else [pair[1] for pair in pairs]
        return Inputs([pair[0] for pair in pairs], second, self.is_batched, False)

    def map(self, change: Callable[[Any, int], Any]) -> "Inputs":
        """Change every sequence; `change` also gets 0 for first and 1 for second ones."""
        second = None if self.second is None else [None if x is None else change(x, 1) for x in self.second]
        return Inputs([change(x, 0) for x in self.first], second, self.is_batched, self.is_split)

    def arguments(self) -> tuple[Any, Any]:
        """Return `text` and `text_pair` for transformers, from ids. It takes an empty list for an empty batch."""
        first = [x or "" for x in self.first]
        second = None if self.second is None else [None if x is None else x or "" for x in self.second]
        return (first, second) if self.is_batched else (first[0], None if second is None else second[0])

    def _rows(self) -> list[tuple[Any, Any]]:
        return list(zip(self.first, self.second or [None] * len(self.first), strict=True))

    def _sequences(self) -> list[Any]:
        return [sequence for row in self._rows() for sequence in row if sequence is not None]


def is_plain_call(options: Mapping[str, Any], model_input_names: Sequence[str]) -> bool:
    """Tell whether a call asks for ids and attention mask of whole sequences only."""
    truncation = options.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE)
    asked = ("return_overflowing_tokens", "return_special_tokens_mask", "return_length", "return_token_type_ids")
    is_more = any(options.get(name) for name in asked) or "token_type_ids" in model_input_names
    return truncation == TruncationStrategy.DO_NOT_TRUNCATE and not is_more


def _is_batch(text: Any, is_split: bool) -> bool:
    if not isinstance(text, (list, tuple)):
        return False
    if not text:
        return not is_split
    return isinstance(text[0], (list, tuple) if is_split else (str, list, tuple))


def _unpack(first: Any, second: Any, is_split: bool) -> tuple[Any, Any]:
    """Take a pair that came as one entry of a batch apart."""
    if not isinstance(first, (list, tuple)) or not first or isinstance(first[0], int) or second is not None:
        return first, second
    is_pair = len(first) == 2 and (not is_split or isinstance(first, tuple))
    if is_pair and all(isinstance(sequence, (str, list, tuple)) for sequence in first):
        return first[0], first[1]
    if len(first) == 1:
        return first[0], None
    if is_split:
        return first, None
    raise ValueError(f"text must hold single texts or pairs, got an input of {len(first)} sequences.")


def _texts_of(sequence: Any, is_split: bool) -> list[str] | None:
    """Return the texts in one sequence; None if it is ids.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(sequence, str):
        return [sequence]
    if isinstance(sequence, (list, tuple)):
        if not sequence or (is_split and all(isinstance(part, str) for part in sequence)):
            return list(sequence)
        if isinstance(sequence[0], int):
            return None
    raise ValueError(f"text must be a string, a list of strings or a list of ids, got {type(sequence).__name__}.")
