"""Order of training: shuffled batches of token rows, from a store on disk or straight from the model."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .activations import ActivationRows
from .store import ActivationStore

_BLOCK_ROWS = 1024
"""Rows that stay together on the way from disk to the buffer: long reads, yet many parts of the store in a buffer."""


class _Block(NamedTuple):
    shard: int
    start: int
    stop: int


def is_held_out(text: int, share: float) -> bool:
    """Whether a text is kept for validation: a hash of its number, so that a text is never on both sides."""
    return bool(_are_held_out(np.array([text]), share)[0])


def _are_held_out(seq_id: np.ndarray, share: float) -> np.ndarray:
    mixed = (seq_id.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(40)) < np.uint64(round(share * (1 << 24)))


class StoreSampler:
    """Batches of one process from a store: blocks in random order, rows shuffled within a buffer.

    The batch of an epoch and step depends on nothing else, so a run can be continued at any step.
    """

    def __init__(
        self,
        store: ActivationStore,
        batch_rows: int,
        *,
        buffer_rows: int = 1 << 18,
        validation_share: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Plan the epochs.

        Args:
            store: all processes open the same.
            batch_rows: rows per step of this process. Rows that fill no whole batch wait for another epoch.
            buffer_rows: rows in memory, of which a half is shuffled together while the other half is read.
            validation_share: share of the texts that is left out here.
            seed: of the order.
            rank: which process this is; each takes its part of the rows.
            processes: number of processes. All take equally many steps.

        Raises:
            ValueError: the store has fewer rows than one batch of every process.
        """
        self.store, self.batch_rows, self.seed, self.rank = store, batch_rows, seed, rank
        self._share = validation_share
        self._steps_per_buffer = max(1, buffer_rows // 2 // batch_rows)  # while one half is used, the other is read
        self._blocks, self._rows = self._plan(rank, processes)
        per_process = [
            self._plan(other, processes)[1].sum() if other != rank else self._rows.sum() for other in range(processes)
        ]
        self.steps_per_epoch = int(min(per_process)) // batch_rows
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_tokens must be at most the rows for training ({int(min(per_process)) * processes}), "
                f"got {batch_rows * processes}."
            )

    def batches_from(self, step: int) -> Iterator[ActivationRows]:
        """The batches of all steps from `step` on, epoch after epoch, without end."""
        buffers = self._buffers_from(step)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, *next(buffers))
            while True:
                rows = coming.result()
                coming = reader.submit(self._read, *next(buffers))
                start = step % self.steps_per_epoch % self._steps_per_buffer
                for first in range(start * self.batch_rows, len(rows.seq_id) - self.batch_rows + 1, self.batch_rows):
                    yield rows.take(slice(first, first + self.batch_rows))
                    step += 1
                    if step % self.steps_per_epoch == 0:  # another process has fewer rows
                        break
                del rows  # before the wait for the next

    def state(self) -> dict[str, Tensor]:
        """Nothing: the step says it all."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to go on from but the step."""

    def _buffers_from(self, step: int) -> Iterator[tuple[int, int]]:
        """Epoch and number of each buffer, from that of a step on."""
        per_epoch = -(-self.steps_per_epoch // self._steps_per_buffer)
        epoch, within = divmod(step, self.steps_per_epoch)
        for position in count(epoch * per_epoch + within // self._steps_per_buffer):
            yield divmod(position, per_epoch)

    def _read(self, epoch: int, number: int) -> ActivationRows:
        """Fill a buffer: rows `number` * size to (`number` + 1) * size of the epoch's order of blocks, shuffled."""
        order = np.random.default_rng((self.seed, epoch, self.rank)).permutation(len(self._blocks))
        ends = np.cumsum(self._rows[order])
        size = self._steps_per_buffer * self.batch_rows
        first, last = number * size, min((number + 1) * size, int(ends[-1]))
        places = torch.from_numpy(
            np.random.default_rng((self.seed, epoch, self.rank, number)).permutation(last - first)
        )
        buffer, done = None, 0
        for block in range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last)) + 1):
            begin = int(ends[block] - self._rows[order[block]])
            rows = self._training_rows(self._blocks[order[block]]).take(slice(max(first - begin, 0), last - begin))
            buffer = buffer or rows.room_for(last - first)
            buffer.put(places[done : done + len(rows.seq_id)], rows)
            done += len(rows.seq_id)
        assert buffer is not None and done == last - first
        return buffer

    def _training_rows(self, block: _Block) -> ActivationRows:
        rows = self.store.read(*block)
        if not self._share:
            return rows
        return rows.take(torch.from_numpy(np.flatnonzero(~_are_held_out(rows.seq_id.numpy(), self._share))))

    def _plan(self, rank: int, processes: int) -> tuple[list[_Block], np.ndarray]:
        """Blocks of a process, and the number of training rows in each."""
        blocks, counts = [], []
        for shard, first, last in _parts_of(self.store, rank, processes):
            kept = ~_are_held_out(self.store.seq_ids(shard), self._share) if self._share else None
            for start in range(first, last, _BLOCK_ROWS):
                block = _Block(shard, start, min(start + _BLOCK_ROWS, last))
                rows = block.stop - start if kept is None else int(kept[start : block.stop].sum())
                if rows:
                    blocks.append(block)
                    counts.append(rows)
        return blocks, np.array(counts, dtype=np.int64)


class StreamSampler:
    """Batches of one process straight from the model: a shuffled buffer in memory, filled up when half of it is used.

    After the last text it begins again with the first. Processes need not agree on anything.
    """

    def __init__(
        self,
        windows: Callable[[int], Iterator[tuple[int, ActivationRows]]],
        batch_rows: int,
        *,
        buffer_rows: int = 1 << 18,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        """Begin with an empty buffer.

        Args:
            windows: gives rows from a text on, each time with the number of texts done; as `activation_windows`.
            batch_rows: rows per step of this process.
            buffer_rows: rows that are shuffled together in memory.
            seed: of the order.
            rank: which process this is.
        """
        self._windows, self._batch_rows, self._buffer_rows = windows, batch_rows, buffer_rows
        self._seed = (seed, rank)
        self._texts_done = self._fillings = self._used = 0
        self._buffer: ActivationRows | None = None

    def batches_from(self, step: int) -> Iterator[ActivationRows]:
        """Batches without end; the step is where the state says."""
        source = self._windows(self._texts_done)
        while True:
            if self._left() < max(self._batch_rows, self._buffer_rows // 2):
                source = self._fill(source)
            assert self._buffer is not None
            self._used += self._batch_rows
            yield self._buffer.take(slice(self._used - self._batch_rows, self._used))

    def state(self) -> dict[str, Tensor]:
        """Where in the texts it is, and the rows that wait in the buffer."""
        counters = torch.tensor([self._texts_done, self._fillings])
        if self._buffer is None:
            return {"stream.counters": counters}
        rows = self._buffer.take(slice(self._used, None))
        acts = {f"stream.acts.{layer}": values for layer, values in rows.acts.items()}
        marks = {f"stream.{name}": getattr(rows, name) for name in ("labels", "seq_id", "pos")}
        return {"stream.counters": counters, **acts, **marks}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self._texts_done, self._fillings = state["stream.counters"].tolist()
        prefix, self._used = "stream.acts.", 0
        acts = {int(name.removeprefix(prefix)): state[name] for name in state if name.startswith(prefix)}
        if acts:
            self._buffer = ActivationRows(acts, state["stream.labels"], state["stream.seq_id"], state["stream.pos"])

    def _left(self) -> int:
        return len(self._buffer.seq_id) - self._used if self._buffer else 0

    def _fill(self, source: Iterator[tuple[int, ActivationRows]]) -> Iterator[tuple[int, ActivationRows]]:
        """Add rows until the buffer is full and shuffle it; return what the rows came from, maybe begun anew."""
        parts = [self._buffer.take(slice(self._used, None))] if self._buffer else []
        held, is_fresh = self._left(), False
        while held < self._buffer_rows:
            texts_done, rows = next(source, (0, None))
            if rows is None:
                if is_fresh:
                    raise ValueError("dataset must hold at least one token for training, got none.")
                source, is_fresh = self._windows(0), True
            else:
                parts.append(rows)
                held, is_fresh = held + len(rows.seq_id), False
            self._texts_done = texts_done
        shuffle = np.random.default_rng((*self._seed, self._fillings)).permutation(held)
        self._buffer = ActivationRows.cat(parts).take(torch.from_numpy(shuffle))
        self._fillings, self._used = self._fillings + 1, 0
        return source


def validation_batches(
    store: ActivationStore, batch_rows: int, share: float, *, rank: int = 0, processes: int = 1
) -> Iterator[ActivationRows]:
    """The rows of held-out texts in the store's order, each in one of the processes.

    Args:
        store: a store.
        batch_rows: at most so many rows at a time.
        share: as in `StoreSampler`; 1 takes every text of the store.
        rank: which process this is.
        processes: number of processes.
    """
    for shard, first, last in _parts_of(store, rank, processes):
        for start in range(first, last, batch_rows):
            block = store.read(shard, start, min(start + batch_rows, last))
            block = block.take(torch.from_numpy(np.flatnonzero(_are_held_out(block.seq_id.numpy(), share))))
            if len(block.seq_id):
                yield block


def _parts_of(store: ActivationStore, rank: int, processes: int) -> Iterator[tuple[int, int, int]]:
    """Shard, first and last row of what one of several processes reads: equally many rows for each."""
    begin, end = len(store) * rank // processes, len(store) * (rank + 1) // processes
    offset = 0
    for shard, rows in enumerate(store.shard_rows):
        first, last = max(begin - offset, 0), min(end - offset, rows)
        if first < last:
            yield shard, first, last
        offset += rows
