"""Cells of a dataset become one label per token and concept."""

from typing import Any

import pytest
import torch

from scar_peft.training.labels import LabelReader, canonical_row, rows_of
from tests.support.scar_texts import word_tokenizer

TEXT = "thou hath a horse"  # <s> and four words


def labels_of(row: dict[str, Any], tokenizer: Any = None, max_length: int = 512, **settings: Any) -> list[Any]:
    reader = LabelReader(**({"concepts": ("x",), "columns": ("x",)} | settings))
    return reader.tokenize([row], tokenizer or word_tokenizer(), max_length)[0].labels.tolist()


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, 0.0), (1, 1.0), (True, 1.0), (0.5, 1.0), (0.49, 0.0), (None, -1.0), (-1, -1.0), ([1], 1.0), ({"x": 0.7}, 1.0)],
)
def test_label_of_a_text_goes_to_each_token(value: Any, label: float) -> None:
    assert labels_of({"text": TEXT, "x": value}) == [[label]] * 5


def test_threshold_and_soft_labels() -> None:
    row = {"text": TEXT, "x": 0.3}
    assert labels_of(row, threshold=0.3)[0] == [1.0]
    assert labels_of(row, soft=True)[0] == pytest.approx([0.3])


@pytest.mark.parametrize("cell", [[1, 0, None], {"a": 1, "b": 0}, (True, 0.2, -1)])
def test_one_column_holds_all_concepts(cell: Any) -> None:
    row = {"text": TEXT, "all": cell}
    assert labels_of(row, concepts=("a", "b", "c"), columns=("all",))[0] == [1.0, 0.0, -1.0]


def test_one_column_per_concept_in_the_order_of_the_concepts() -> None:
    row = {"text": TEXT, "p": 0, "q": 1}
    assert labels_of(row, concepts=("a", "b"), columns=("q", "p"))[0] == [1.0, 0.0]


def test_unlabelled_cell_of_all_concepts() -> None:
    assert labels_of({"text": TEXT, "all": None}, concepts=("a", "b"), columns=("all",))[0] == [-1.0, -1.0]


def test_special_tokens_are_marked() -> None:
    reader = LabelReader(concepts=("x",), columns=("x",))
    text = reader.tokenize([{"text": TEXT, "x": 1}], word_tokenizer(), 512)[0]
    assert text.is_special == [True, False, False, False, False]


def test_token_labels_skip_special_tokens() -> None:
    assert labels_of({"text": TEXT, "x": [1, 0, 1, None]}, level="token") == [[-1], [1], [0], [1], [-1]]


def test_token_labels_of_all_concepts_in_one_column() -> None:
    row = {"text": "thou hath", "all": [[1, 0], {"b": 1}]}
    assert labels_of(row, concepts=("a", "b"), columns=("all",), level="token") == [[-1, -1], [1, 0], [-1, 1]]


def test_word_labels_go_to_all_tokens_of_a_word() -> None:
    row = {"text": ["thou hath", "a", "horse"], "x": [1, 0, 1]}
    assert labels_of(row, level="token") == [[-1], [1], [1], [0], [1]]


def test_labels_of_a_cut_text_are_cut() -> None:
    assert labels_of({"text": TEXT, "x": [1, 0, 1, 0]}, level="token", max_length=3) == [[-1], [1], [0]]


def test_spans_become_tokens_through_character_offsets() -> None:
    # "hath" is characters 5 to 9; a span that touches the "a" at 10 must reach past 10
    spans = {"text": TEXT, "x": [[5, 9]]}
    assert labels_of(spans, level="span") == [[-1], [0], [1], [0], [0]]
    assert labels_of({"text": TEXT, "x": [[8, 10]]}, level="span") == [[-1], [0], [1], [0], [0]]
    assert labels_of({"text": TEXT, "x": [[8, 11]]}, level="span") == [[-1], [0], [1], [1], [0]]


@pytest.mark.parametrize(
    "cell",
    [
        [(0, 4, "a"), (12, 17, "b"), (5, 9, "other")],
        [{"start": 0, "end": 4, "label": "a"}, {"start": 12, "end": 17, "label": "b"}],
        {"start": [0, 12], "end": [4, 17], "label": ["a", "b"]},
    ],
    ids=["tuples", "records", "columns"],
)
def test_spans_name_their_concept(cell: Any) -> None:
    row = {"text": TEXT, "spans": cell}
    found = labels_of(row, concepts=("a", "b"), columns=("spans",), level="span")
    assert found == [[-1, -1], [1, 0], [0, 0], [0, 0], [0, 1]]


def test_text_without_spans_is_negative_and_without_a_cell_unlabelled() -> None:
    assert labels_of({"text": TEXT, "x": []}, level="span")[1:] == [[0.0]] * 4
    assert labels_of({"text": TEXT, "x": None}, level="span") == [[-1.0]] * 5


@pytest.mark.parametrize("value", [2, -2, 1.5, float("nan"), "yes", -0.5])
def test_other_labels_are_refused_by_column_and_value(value: Any) -> None:
    with pytest.raises(ValueError, match=r"label column 'x' must hold 0, 1, a float in \[0, 1\].* got "):
        labels_of({"text": TEXT, "x": value})


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": TEXT}, {}, r"label_columns names 'x', which the dataset lacks; it has \['text'\]"),
        ({"x": 1}, {}, "text_column names 'text', which the dataset lacks"),
        ({"text": 3, "x": 1}, {}, "column 'text' must hold strings, got int"),
        ("abc", {}, "dataset must consist of dicts, got a row of type str"),
        ({"text": TEXT, "x": [1, 0]}, {}, "label column 'x' must hold 1 values, one per concept, got 2"),
        ({"text": TEXT, "x": {"y": 1}}, {}, r"label column 'x' must hold values of \['x'\], got the keys \['y'\]"),
        ({"text": TEXT, "x": 1}, {"level": "token"}, "label column 'x' must hold one list per text, got int"),
        ({"text": TEXT, "x": [1]}, {"level": "token"}, r"one value per token or word \(4\), got 1"),
        ({"text": TEXT, "x": [1] * 5}, {"level": "token"}, r"one value per token or word \(4\), got 5"),
        ({"text": TEXT, "x": 3}, {"level": "span"}, r"must hold a list of \(start, end\) spans, got int"),
        ({"text": TEXT, "x": [(4, 1)]}, {"level": "span"}, "must hold spans with 0 <= start <= end"),
        ({"text": TEXT, "x": [(4,)]}, {"level": "span"}, "must hold spans with 0 <= start <= end"),
    ],
)
def test_what_does_not_fit_is_refused(row: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels_of(row, **settings)


def test_spans_of_several_concepts_must_be_named() -> None:
    with pytest.raises(ValueError, match="'x' must name the concept of each span"):
        labels_of({"text": TEXT, "x": [(0, 4)]}, concepts=("a", "b"), columns=("x",), level="span")


def test_one_number_cannot_label_two_concepts() -> None:
    with pytest.raises(ValueError, match="'x' must hold a list or a dict of 2 values, one per concept, got 1"):
        labels_of({"text": TEXT, "x": 1}, concepts=("a", "b"), columns=("x",))


def test_spans_need_a_fast_tokenizer() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(
        ValueError, match="processing_class must be a fast tokenizer for labels of spans or words, got Slow"
    ):
        labels_of({"text": TEXT, "x": []}, tokenizer=Slow(), level="span")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concepts": ()}, "concepts must name at least one concept"),
        ({"concepts": ("a", "b", "c"), "columns": ("p", "q")}, r"one column per concept \(3\) or one for all, got 2"),
        ({"level": "word"}, 'label_level must be "sequence", "token" or "span"'),
        ({"threshold": 2.0}, r"label_threshold must lie in \[0, 1\], got 2.0"),
    ],
)
def test_reader_refuses_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelReader(**({"concepts": ("x",), "columns": ("x",)} | settings))


def test_rows_of_many_kinds_of_dataset() -> None:
    import datasets

    rows = [{"text": TEXT, "x": 1}, {"text": TEXT, "x": 0}]
    assert list(rows_of(datasets.Dataset.from_list(rows))) == rows
    assert list(rows_of(datasets.Dataset.from_list(rows).to_iterable_dataset())) == rows
    once = rows_of(row for row in rows)
    assert list(once) == list(once) == rows  # a generator can be read only once, and is kept
    with pytest.raises(ValueError, match=r"got a dict with the keys \['text', 'x'\]; pass one split"):
        rows_of({"text": [TEXT], "x": [1]})
    with pytest.raises(ValueError, match="dataset must be an iterable of rows, got int"):
        rows_of(3)


def test_rows_differ_by_text_and_labels_alone() -> None:
    reader = LabelReader(concepts=("x",), columns=("x",))
    row = {"text": TEXT, "x": 1, "id": 5}
    assert canonical_row(reader, row) == canonical_row(reader, row | {"id": 6})
    assert canonical_row(reader, row) != canonical_row(reader, row | {"x": 0})
    assert canonical_row(reader, row) == canonical_row(reader, row | {"x": torch.tensor(1)})
