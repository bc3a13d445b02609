"""Text and label columns of a dataset -> token ids and one label per token and concept."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

IGNORE = -1
"""Label of a token about which nothing is known."""

LabelLevel = Literal["sequence", "token", "span"]


class TokenizedText(NamedTuple):
    """One text as the model reads it."""

    input_ids: list[int]
    labels: Tensor
    """`[L, C]` float32: 0 or 1 (anything between when labels are soft), -1 where unlabelled."""
    is_special: list[bool]
    """Tokens that the tokenizer added."""


@dataclass(frozen=True, kw_only=True)
class LabelReader:
    """Reads texts and their labels from the rows of a dataset."""

    concepts: tuple[str, ...]
    """Names of the concepts; concept c is column c of the labels."""

    columns: tuple[str, ...]
    """One column per concept, in their order; or a single column that holds the values of all concepts."""

    text_column: str = "text"
    """Column of the text: a string, or for `level="token"` also a list of words with one label each."""

    level: LabelLevel = "sequence"
    """`"sequence"`: one value per text, given to each of its tokens. `"token"`: a list with one value per token, not
    counting those that the tokenizer adds. `"span"`: a list of character ranges; tokens that overlap are positive."""

    threshold: float = 0.5
    """A float in [0, 1] counts as positive from here on."""

    soft: bool = False
    """Keep floats in [0, 1] as they are, as targets between the classes."""

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ValueError("concepts must name at least one concept.")
        if len(self.columns) not in (1, len(self.concepts)):
            raise ValueError(
                f"label_columns must name one column per concept ({len(self.concepts)}) or one for all, "
                f"got {len(self.columns)}: {list(self.columns)}."
            )
        if self.level not in ("sequence", "token", "span"):
            raise ValueError(f'label_level must be "sequence", "token" or "span", got {self.level!r}.')
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"label_threshold must lie in [0, 1], got {self.threshold}.")

    def text_of(self, row: Mapping[str, Any]) -> str | list[str]:
        """The text of one row.

        Raises:
            ValueError: the column is missing or holds no text; the message names it.
        """
        text = _column(row, self.text_column, "text_column")
        if isinstance(text, str):
            return text
        if self.level == "token" and isinstance(text, Sequence) and all(isinstance(word, str) for word in text):
            return list(text)
        raise ValueError(f"column {self.text_column!r} must hold strings, got {type(text).__name__}.")

    def values_of(self, row: Mapping[str, Any]) -> list[Any]:
        """What a row says about its labels, without the text: the cells of the label columns."""
        return [_column(row, column, "label_columns") for column in self.columns]

    def sequence_labels(self, row: Mapping[str, Any]) -> list[float]:
        """One label per concept for the whole text (`level="sequence"`)."""
        cells = self.values_of(row)
        if len(self.columns) == 1 and (len(self.concepts) > 1 or isinstance(cells[0], (Mapping, list, tuple))):
            return self._shared_cell(cells[0])
        return [self._label(cell, column) for cell, column in zip(cells, self.columns, strict=True)]

    def tokenize(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[TokenizedText]:
        """Tokenize some rows and give every token its labels.

        Args:
            rows: rows of the dataset.
            tokenizer: a transformers tokenizer; `level="span"` and lists of words need a fast one.
            max_length: longer texts are cut here.

        Raises:
            ValueError: a column is missing or a cell cannot be a label; the message names the column and the value.
        """
        texts = [self.text_of(row) for row in rows]
        encoding = _encode(tokenizer, texts, max_length, offsets=self.level == "span")
        result = []
        for i, row in enumerate(rows):
            is_special = [bool(flag) for flag in encoding["special_tokens_mask"][i]]
            labels = self._token_labels(row, encoding, i, is_special)
            result.append(TokenizedText(list(encoding["input_ids"][i]), labels, is_special))
        return result

    def _token_labels(self, row: Mapping[str, Any], encoding: Any, i: int, is_special: list[bool]) -> Tensor:
        length = len(is_special)
        if self.level == "sequence":
            return torch.tensor(self.sequence_labels(row), dtype=torch.float32).expand(length, -1)
        if self.level == "span":
            return self._span_labels(row, encoding["offset_mapping"][i], is_special)
        words = encoding.word_ids(i) if isinstance(row[self.text_column], (list, tuple)) else _counted(is_special)
        return self._listed_labels(row, words, is_cut=encoding["is_cut"][i])

    def _listed_labels(self, row: Mapping[str, Any], items: list[int | None], is_cut: bool) -> Tensor:
        """Labels of tokens of which each stands for one item of the lists in the label columns, or for none."""
        count = 1 + max((item for item in items if item is not None), default=-1)
        columns = self.columns
        table = torch.full((count, len(self.concepts)), float(IGNORE))
        for c, (cell, column) in enumerate(zip(self.values_of(row), columns, strict=True)):
            if cell is None:
                continue
            if isinstance(cell, (str, Mapping)) or not isinstance(cell, Iterable):
                raise ValueError(f"label column {column!r} must hold one list per text, got {type(cell).__name__}.")
            values = list(cell)
            if len(values) < count or (len(values) > count and not is_cut):
                raise ValueError(
                    f"label column {column!r} must hold one value per token or word ({count}), got {len(values)}."
                )
            if len(columns) == len(self.concepts) and not any(isinstance(v, (Mapping, list, tuple)) for v in values):
                table[:, c] = torch.tensor([self._label(value, column) for value in values[:count]])
            else:
                table = torch.tensor([self._shared_cell(value) for value in values[:count]])
        ignored = torch.full((1, len(self.concepts)), float(IGNORE))
        return torch.cat([table, ignored])[[count if item is None else item for item in items]]

    def _span_labels(self, row: Mapping[str, Any], offsets: Sequence[Sequence[int]], is_special: list[bool]) -> Tensor:
        start, end = torch.tensor(list(offsets)).reshape(-1, 2).unbind(1)
        labels = torch.zeros(len(is_special), len(self.concepts))
        is_shared = len(self.columns) == 1 and len(self.concepts) > 1
        for c, (cell, column) in enumerate(zip(self.values_of(row), self.columns, strict=True)):
            if cell is None:
                labels[:, slice(None) if is_shared else c] = IGNORE
                continue
            for first, last, label in _spans(cell, column):
                if label is not None and label not in self.concepts:
                    continue
                if is_shared and label is None:
                    raise ValueError(
                        f"label column {column!r} must name the concept of each span: (start, end, label)."
                    )
                concept = c if label is None else self.concepts.index(label)
                labels[(start < last) & (end > first), concept] = 1.0
        labels[torch.tensor(is_special, dtype=torch.bool)] = IGNORE
        return labels

    def _shared_cell(self, cell: Any) -> list[float]:
        column = self.columns[0]
        if cell is None:
            return [float(IGNORE)] * len(self.concepts)
        if isinstance(cell, Mapping):
            if not any(concept in cell for concept in self.concepts):
                raise ValueError(
                    f"label column {column!r} must hold values of {list(self.concepts)}, got the keys {sorted(cell)}."
                )
            return [self._label(cell.get(concept), column) for concept in self.concepts]
        if isinstance(cell, (str, bytes)) or not isinstance(cell, Iterable):
            if len(self.concepts) == 1:
                return [self._label(cell, column)]
            raise ValueError(
                f"label column {column!r} must hold a list or a dict of {len(self.concepts)} values, one per concept, "
                f"got {cell!r}."
            )
        values = list(cell)
        if len(values) != len(self.concepts):
            raise ValueError(
                f"label column {column!r} must hold {len(self.concepts)} values, one per concept, got {len(values)}."
            )
        return [self._label(value, column) for value in values]

    def _label(self, value: Any, column: str) -> float:
        if value is None or value == IGNORE:
            return float(IGNORE)
        if isinstance(value, (bool, Integral)) and value in (0, 1):
            return float(value)
        if isinstance(value, Real) and not isinstance(value, Integral) and 0.0 <= float(value) <= 1.0:
            return float(value) if self.soft else float(float(value) >= self.threshold)
        raise ValueError(
            f"label column {column!r} must hold 0, 1, a float in [0, 1], or -1 or None where unlabelled, got {value!r}."
        )


def rows_of(dataset: Any) -> Iterable[Mapping[str, Any]]:
    """The rows of a dataset, as something that can be read more than once.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, a list of dicts, or any iterable of dicts.

    Raises:
        ValueError: it is a dict (of columns or of splits) or not iterable.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"dataset must be an iterable of rows, got a {type(dataset).__name__} with the keys {sorted(dataset)}; "
            "pass one split, or datasets.Dataset.from_dict(columns)."
        )
    if not isinstance(dataset, Iterable):
        raise ValueError(f"dataset must be an iterable of rows, got {type(dataset).__name__}.")
    return list(dataset) if isinstance(dataset, Iterator) else dataset


def canonical_row(reader: LabelReader, row: Mapping[str, Any]) -> bytes:
    """The bytes by which a row is told from others: its text and its labels, nothing else."""
    return json.dumps([reader.text_of(row), reader.values_of(row)], default=_plain, ensure_ascii=True).encode()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _column(row: Mapping[str, Any], column: str, argument: str) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"dataset must consist of dicts, got a row of type {type(row).__name__}.")
    if column not in row:
        raise ValueError(f"{argument} names {column!r}, which the dataset lacks; it has {sorted(row)}.")
    return row[column]


def _encode(tokenizer: Any, texts: list[Any], max_length: int, offsets: bool) -> Any:
    is_split = any(isinstance(text, list) for text in texts)
    if (offsets or is_split) and not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"processing_class must be a fast tokenizer for labels of spans or words, got {type(tokenizer).__name__}."
        )
    encoding = tokenizer(
        texts,
        is_split_into_words=is_split,
        truncation=True,
        max_length=max_length,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        **({"return_offsets_mapping": True} if offsets else {}),
    )
    encoding["is_cut"] = [len(ids) >= max_length for ids in encoding["input_ids"]]
    return encoding


def _counted(is_special: list[bool]) -> list[int | None]:
    """0, 1, 2, ... for the tokens of the text, None for the special ones."""
    count = iter(range(len(is_special)))
    return [None if special else next(count) for special in is_special]


def _spans(cell: Any, column: str) -> Iterator[tuple[int, int, str | None]]:
    if isinstance(cell, Mapping) and "start" in cell and "end" in cell:  # how `datasets` keeps a list of records
        names = cell.get("label") or [None] * len(cell["start"])
        cell = list(zip(cell["start"], cell["end"], names, strict=True))
    if isinstance(cell, (str, Mapping)) or not isinstance(cell, Iterable):
        raise ValueError(f"label column {column!r} must hold a list of (start, end) spans, got {type(cell).__name__}.")
    for span in cell:
        parts = [span.get(key) for key in ("start", "end", "label")] if isinstance(span, Mapping) else [*span]
        start, end, label = [*parts, None][:3] if len(parts) in (2, 3) else (None, None, None)
        if not (isinstance(start, Integral) and isinstance(end, Integral) and 0 <= int(start) <= int(end)):
            raise ValueError(f"label column {column!r} must hold spans with 0 <= start <= end, got {span!r}.")
        yield int(start), int(end), label
