"""Batches come in a shuffled order that can be continued anywhere."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from scar_peft.training import sampler as sampler_module
from scar_peft.training.activations import ActivationRows
from scar_peft.training.sampler import StoreSampler, StreamSampler, is_held_out, validation_batches
from scar_peft.training.store import ActivationStore, StoreOrigin, StoreWriter, finish_store

ORIGIN = StoreOrigin(
    model="m",
    revision="",
    weights="w",
    tokenizer="t",
    dataset="d",
    layers=[0],
    site="block",
    dtype="float32",
    hidden_size=1,
    concepts=["a"],
    label_level="sequence",
    label_threshold=0.5,
    soft_labels=False,
    max_length=8,
    drop_sink_tokens=True,
)
PER_TEXT = 4


def rows(first: int, count: int) -> ActivationRows:
    """Rows whose activation is their number; four of them make a text."""
    numbers = torch.arange(first, first + count)
    labels = torch.zeros(count, 1, dtype=torch.int8)
    return ActivationRows({0: numbers[:, None].float()}, labels, (numbers // PER_TEXT).int(), numbers.int() % PER_TEXT)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActivationStore:
    """100 rows in shards of 40, 24 and 36, read in blocks of 8."""
    monkeypatch.setattr(sampler_module, "_BLOCK_ROWS", 8)
    writer = StoreWriter(tmp_path, ORIGIN)
    for number, (first, count) in enumerate([(0, 40), (40, 24), (64, 36)]):
        writer.write(rows(first, count), texts_done=number)
    finish_store(tmp_path, ORIGIN)
    return ActivationStore(tmp_path)


def epoch_of(sampler: StoreSampler, epoch: int) -> list[ActivationRows]:
    return list(islice(sampler.batches_from(epoch * sampler.steps_per_epoch), sampler.steps_per_epoch))


def numbers(batch: ActivationRows) -> list[int]:
    return batch.acts[0][:, 0].int().tolist()


def test_an_epoch_holds_each_row_at_most_once_and_drops_less_than_a_batch(store: ActivationStore) -> None:
    sampler = StoreSampler(store, 7, buffer_rows=30)
    batches = [numbers(batch) for batch in epoch_of(sampler, 0)]
    assert len(batches) == sampler.steps_per_epoch == 14
    assert {len(batch) for batch in batches} == {7}
    seen = [row for batch in batches for row in batch]
    assert len(set(seen)) == len(seen) == 98


def test_rows_keep_their_labels_and_places(store: ActivationStore) -> None:
    for batch in epoch_of(StoreSampler(store, 7, buffer_rows=30), 0):
        assert (batch.seq_id * PER_TEXT + batch.pos).tolist() == numbers(batch)


def test_order_is_shuffled_across_shards_and_differs_by_epoch_and_seed(store: ActivationStore) -> None:
    first = [numbers(batch) for batch in epoch_of(StoreSampler(store, 20, buffer_rows=200), 0)]
    assert all(max(batch) - min(batch) > 40 for batch in first)
    assert first == [numbers(batch) for batch in epoch_of(StoreSampler(store, 20, buffer_rows=200), 0)]
    assert first != [numbers(batch) for batch in epoch_of(StoreSampler(store, 20, buffer_rows=200), 1)]
    assert first != [numbers(batch) for batch in epoch_of(StoreSampler(store, 20, buffer_rows=200, seed=1), 0)]


@pytest.mark.parametrize("step", [0, 1, 4, 5, 13, 14, 30])
def test_any_step_can_be_the_first(store: ActivationStore, step: int) -> None:
    sampler = StoreSampler(store, 7, buffer_rows=30, validation_share=0.0)
    whole = sampler.batches_from(0)
    for _ in range(step):
        next(whole)
    rest = sampler.batches_from(step)
    assert [numbers(next(rest)) for _ in range(20)] == [numbers(next(whole)) for _ in range(20)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_and_take_equally_many_steps(store: ActivationStore, processes: int) -> None:
    samplers = [StoreSampler(store, 4, buffer_rows=16, rank=rank, processes=processes) for rank in range(processes)]
    assert len({sampler.steps_per_epoch for sampler in samplers}) == 1
    seen = [row for sampler in samplers for batch in epoch_of(sampler, 0) for row in numbers(batch)]
    assert len(set(seen)) == len(seen) == 4 * processes * samplers[0].steps_per_epoch > 80


@pytest.mark.parametrize("processes", [1, 2])
def test_held_out_texts_are_validated_and_never_trained_on(store: ActivationStore, processes: int) -> None:
    share = 0.3
    trained = [
        row
        for rank in range(processes)
        for batch in epoch_of(StoreSampler(store, 2, validation_share=share, rank=rank, processes=processes), 0)
        for row in numbers(batch)
    ]
    validated = [
        row
        for rank in range(processes)
        for batch in validation_batches(store, 5, share, rank=rank, processes=processes)
        for row in numbers(batch)
    ]
    expected = {row for row in range(100) if is_held_out(row // PER_TEXT, share)}
    assert set(validated) == expected and len(validated) == len(expected)
    assert not set(trained) & expected
    assert len(trained) >= 100 - len(expected) - 6 * processes  # the process with more rows waits for the other


def test_share_of_texts_held_out() -> None:
    assert sum(is_held_out(text, 0.1) for text in range(5000)) == pytest.approx(500, rel=0.1)
    assert all(is_held_out(text, 1.0) for text in range(100))
    assert not any(is_held_out(text, 0.0) for text in range(100))


def test_batch_larger_than_the_store_is_refused(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match=r"batch_tokens must be at most the rows for training \(100\), got 101"):
        StoreSampler(store, 101)


def windows(start: int) -> Iterator[tuple[int, ActivationRows]]:
    """Six windows of two texts."""
    for text in range(start, 12, 2):
        yield text + 2, rows(text * PER_TEXT, 2 * PER_TEXT)


def test_stream_gives_every_row_once_per_pass() -> None:
    batches = StreamSampler(windows, 4, buffer_rows=16).batches_from(0)
    seen = [row for _ in range(24) for row in numbers(next(batches))]  # two passes
    counts = torch.bincount(torch.tensor(seen), minlength=48)
    assert counts.min() >= 1 and counts.max() <= 3  # up to half a buffer is ahead or behind
    assert seen[:16] != sorted(seen[:16])


@pytest.mark.parametrize("step", [1, 3, 7, 12, 20])
def test_stream_goes_on_from_a_state(step: int) -> None:
    whole = StreamSampler(windows, 4, buffer_rows=16)
    batches = whole.batches_from(0)
    for _ in range(step):
        next(batches)
    fresh = StreamSampler(windows, 4, buffer_rows=16)
    fresh.load_state(whole.state())
    rest = fresh.batches_from(step)
    assert [numbers(next(rest)) for _ in range(20)] == [numbers(next(batches)) for _ in range(20)]


def test_state_of_a_stream_that_has_not_begun() -> None:
    fresh = StreamSampler(windows, 4, buffer_rows=16)
    fresh.load_state(StreamSampler(windows, 4, buffer_rows=16).state())
    expected = StreamSampler(windows, 4, buffer_rows=16)
    assert numbers(next(fresh.batches_from(0))) == numbers(next(expected.batches_from(0)))


def test_stream_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset must hold at least one token for training"):
        next(StreamSampler(lambda _: iter(()), 4, buffer_rows=16).batches_from(0))
