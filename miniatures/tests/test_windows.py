"""Windows: all of the text, once, in pieces of about equal size."""

import pytest

from miniatures.data.text import TextDocument
from miniatures.tfree.windows import held_out_windows, line_pieces, step_windows, training_windows


def documents(count=30):
    texts = [
        "\n".join(f"Line {j} of document {i} says é." * (1 + j % 3) for j in range(i % 7 + 1)) for i in range(count)
    ]
    return [
        TextDocument(language="en", source="s", register="manual", page=f"{i:02d}", text=text)
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("text", ["", "a", "\n", "a\n", "\n\na", "one two three four five", "éééééé\nx " * 5])
def test_pieces_join_back_and_keep_the_limit(text):
    pieces = line_pieces(text, 6)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= 6 for piece in pieces)


def test_long_lines_are_cut_in_front_of_spaces():
    assert line_pieces("one two three\nx", 9) == ["one two", " three\n", "x"]


def test_a_limit_below_one_character_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 4"):
        line_pieces("abc", 3)


def test_training_windows_hold_every_document_once_and_whole():
    windows = training_windows(documents(), window_bytes=200, seed=0)
    joined = "".join(s.text + ("\0" if s.ends_document else "") for window in windows for s in window.segments)
    assert sorted(joined.split("\0")[:-1]) == sorted(document.text for document in documents())
    assert max(len(window.text.encode()) for window in windows) <= 200


def test_a_window_that_begins_a_document_always_leads_with_an_end_of_text_and_others_sometimes():
    windows = training_windows(documents(), window_bytes=120, seed=0)
    begins = [True, *(window.segments[-1].ends_document for window in windows[:-1])]
    assert all(window.leads for window, begin in zip(windows, begins, strict=True) if begin)
    inner = [window.leads for window, begin in zip(windows, begins, strict=True) if not begin]
    assert 0 < sum(inner) < len(inner)


def test_windows_depend_on_the_seed_alone():
    assert training_windows(documents(), window_bytes=99, seed=1) == training_windows(
        documents(), window_bytes=99, seed=1
    )
    assert training_windows(documents(), window_bytes=99, seed=1) != training_windows(
        documents(), window_bytes=99, seed=2
    )


def test_an_epoch_of_steps_visits_every_window_once_in_an_order_of_its_own():
    windows = training_windows(documents(), window_bytes=100, seed=0)
    steps = len(windows) // 3
    epochs = [
        [
            window.text
            for step in range(first, first + steps)
            for window in step_windows(windows, step=step, batch_windows=3, seed=5)
        ]
        for first in (0, steps)
    ]
    texts = [window.text for window in windows]
    assert all(len(set(epoch)) == len(epoch) == 3 * steps and set(epoch) <= set(texts) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_held_out_windows_stop_at_the_asked_size_and_stay_inside_documents():
    windows = held_out_windows(documents(), window_bytes=100, total_bytes=1000)
    sizes = [len(window.text.encode()) for window in windows]
    assert 1000 <= sum(sizes) <= 1100
    assert all(window.leads and len(window.segments) == 1 for window in windows)
    everything = "\0".join(document.text for document in documents())
    assert all(window.text in everything for window in windows)
