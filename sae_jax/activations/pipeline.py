"""From stored activations to batches: one global order, the same for any number of processes, with random access.

Rows are stored in chunks of consecutive tokens. An epoch is all training rows, in the order of their chunks shuffled
anew, cut into equal stretches, one for each of a fixed number of lanes. A lane shuffles its rows within windows of a
few chunks, and a global batch takes an equal share from every lane: every training row comes exactly once an epoch.
Batch number i is a pure function of (seed, i), so the position in the data is one number, and processes that own
different lanes agree on the order without talking to each other.
"""

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from math import gcd

import grain
import numpy as np

from sae_jax.activations.chunks import LANES, Chunks
from sae_jax.errors import Refused

WINDOW = 1024  # rows shuffled together in a lane, in whole chunks
READERS = 2  # threads that fill lanes side by side
AHEAD = 8  # batches made before they are asked for


class Batches(grain.MapDataset):
    """Batch number i of the training rows: this process's part of the global batch, (batch / processes, d_model).

    Args:
      chunks: where rows come from.
      order: endless dataset of positions in `train`, shuffled anew each epoch.
      train: chunk numbers that may be used.
      batch_size: tokens in a global batch.
      seed: of the row shuffle.
      process, processes: which share of the lanes to read.
    """

    def __init__(
        self, chunks: Chunks, order: grain.MapDataset, train: np.ndarray, batch_size: int, seed: int,
        process: int = 0, processes: int = 1,
    ):  # fmt: skip
        super().__init__(order)
        self._chunks, self._train, self._seed = chunks, train, seed
        self._n_rows, self._window_rows = len(train) * chunks.rows, max(1, WINDOW // chunks.rows) * chunks.rows
        most = LANES
        while most > 1 and most * self._window_rows > LANES * WINDOW:  # long chunks: what is held stays the same
            most //= 2
        self._n_lanes = gcd(most, batch_size)
        if self._n_lanes % processes:
            raise Refused("train.batch_size", batch_size, f"a multiple of the {processes} processes, up to {most}")
        share = self._n_lanes // processes
        self._lanes = range(process * share, (process + 1) * share)
        self._rows_per_lane = batch_size // self._n_lanes
        # The window that each lane is in: which, and where its rows stand in the shuffle.
        self._held: list[tuple[int, int] | None] = [None] * share
        self._order = np.empty((share, self._window_rows), np.int64)
        self._hold(share * self._window_rows)

    def _hold(self, count: int) -> None:
        """Room for the rows of all windows, as they are read."""
        self._rows = np.empty((count, self._chunks.d_model), self._chunks.dtype)
        self._readers = ThreadPoolExecutor(READERS)

    def _put(self, number: int, first: int, end: int, at: int) -> None:
        """Rows first to end of chunk `number`, from row `at` on."""
        self._rows[at : at + end - first] = self._chunks[number][first:end]

    def __len__(self) -> int:
        return len(self._parent)  # endless

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if isinstance(index, slice):
            return self.slice(index)
        batch = np.empty((len(self._lanes) * self._rows_per_lane, self._chunks.d_model), self._chunks.dtype)
        source = np.zeros((len(self._lanes), self._rows_per_lane), np.int64)  # places in self._rows
        crossing: dict[int, np.ndarray] = {}  # rows of lanes that go on to their next window within this batch

        def prepare(slots: range) -> None:
            for slot in slots:
                stretches = self._stretches(self._lanes[slot], index * self._rows_per_lane)
                parts = []
                for epoch, low, high, start, count in stretches:
                    self._read(slot, epoch, low, high)
                    places = self._order[slot, start - low : start - low + count]
                    parts.append(places if len(stretches) == 1 else self._rows[places])
                if len(parts) == 1:
                    source[slot] = parts[0]
                else:
                    crossing[slot] = np.concatenate(parts)

        # Neighbours to the same reader: lanes a fixed number apart often come to a new window in the same batch.
        cuts = [len(self._lanes) * reader // READERS for reader in range(READERS + 1)]
        for _ in self._readers.map(prepare, map(range, cuts, cuts[1:])):
            pass
        np.take(self._rows, source.ravel(), axis=0, out=batch, mode="clip")
        for slot, rows in crossing.items():
            batch[slot * self._rows_per_lane : (slot + 1) * self._rows_per_lane] = rows
        return batch

    def _stretches(self, lane: int, first: int) -> list[tuple[int, int, int, int, int]]:
        """A lane's share of a batch, from its row number `first` on: epoch, window (from, to), first row, count."""
        found, done = [], 0
        while done < self._rows_per_lane:
            epoch, place, start, stop = self._stretch(lane, first + done)
            number = place // self._window_rows
            low, high = max(start, number * self._window_rows), min(stop, (number + 1) * self._window_rows)
            count = min(high - place, self._rows_per_lane - done)
            found.append((epoch, low, high, place, count))
            done += count
        return found

    def _stretch(self, lane: int, row: int) -> tuple[int, int, int, int]:
        """Where row number `row` of a lane lies: epoch, place in it, and where the lane's stretch starts and stops.

        By the end of epoch e lane l has had ⌊((e + 1)·n + l) / lanes⌋ rows, which add up to all: where lanes do not
        divide n rows, stretches differ by one, and lanes never drift apart.
        """
        n, lanes = self._n_rows, self._n_lanes
        epoch = ((row + 1) * lanes - 1 - lane) // n
        taken = (epoch * n + lane) // lanes
        # Rows of the lanes before this one, up to an epoch: Σ over l < lane of ⌊(e·n + l) / lanes⌋, in closed form.
        before = [lane * (m // lanes) + max(0, lane - lanes + m % lanes) for m in (epoch * n, (epoch + 1) * n)]
        start = before[1] - before[0]
        return epoch, start + row - taken, start, start + ((epoch + 1) * n + lane) // lanes - taken

    def _read(self, slot: int, epoch: int, low: int, high: int) -> None:
        """Makes rows low to high of an epoch, shuffled, the window of a lane."""
        if self._held[slot] == (epoch, low):
            return
        self._held[slot] = None
        size, begin = self._chunks.rows, slot * self._window_rows
        for number in range(low // size, (high - 1) // size + 1):
            first, end = max(low, number * size), min(high, (number + 1) * size)
            chunk = int(self._train[self._parent[epoch * len(self._train) + number]])
            self._put(chunk, first - number * size, end - number * size, begin + first - low)
        order = np.random.default_rng([self._seed, epoch, low]).permutation(high - low)
        self._order[slot, : high - low] = begin + order
        self._held[slot] = epoch, low


def _keep_freed_memory() -> None:
    """Asks glibc not to give freed blocks of a chunk's size back to the system each time: the page faults of getting
    them again cost more than the reading itself. Up to 256 MB stay with the process."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD


def order(n_chunks: int, seed: int) -> grain.MapDataset:
    """Positions of chunks, shuffled anew each epoch, without end."""
    return grain.MapDataset.range(n_chunks).seed(seed).shuffle().repeat()


def batches(
    chunks: Chunks, train: np.ndarray, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> grain.DatasetIterator:
    """Endless iterator over training batches, read ahead by a thread; `get_state` is the number of the next batch."""
    _keep_freed_memory()
    dataset = Batches(chunks, order(len(train), seed), train, batch_size, seed, process, processes)
    # One batch after the other, as lanes keep the window they are in.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
