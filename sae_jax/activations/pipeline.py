"""From stored activations to batches: one global order, the same for any number of processes, with random access.

Rows are stored in chunks of consecutive tokens. Chunks are shuffled anew each epoch and dealt to a fixed number of
lanes; each lane shuffles the rows of a window of its chunks; a global batch takes an equal share from every lane.
Every training row comes exactly once an epoch. Batch number i is a pure function of (seed, i), so the position in the
data is one number, and processes that own different lanes agree on the order without talking to each other.
"""

from collections import OrderedDict
from collections.abc import Iterator
from math import gcd
from typing import Any, Protocol

import grain
import jax.numpy as jnp
import numpy as np

from sae_jax.errors import Refused

LANES = 64  # at most; the batch size has to be a multiple
WINDOW = 4  # chunks whose rows are shuffled together in a lane
CHUNK = 256  # tokens a chunk, where the file has no chunks of its own


class Chunks(Protocol):
    """Stored activations as equally long chunks of rows."""

    n_tokens: int
    d_model: int
    rows: int  # tokens a chunk
    identity: dict[str, Any]  # what data this is, for reports

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...
    def tokens(self, start: int, stop: int) -> np.ndarray: ...


class ArrayChunks:
    """An array of shape (tokens, d_model), in memory or mapped: whatever has a shape, a dtype and slices of rows.

    Raises:
      Refused: it is not two-dimensional, is empty, or does not hold floating point numbers.
    """

    def __init__(self, array: Any, name: str):
        if array.ndim != 2 or min(array.shape) == 0:
            raise Refused("data.path", name, f"an array of shape (tokens, d_model), not {tuple(array.shape)}")
        # Types that NumPy has no letter for, such as bfloat16, are of kind V.
        if not (array.dtype.kind == "f" or jnp.issubdtype(array.dtype, jnp.floating)):
            raise Refused("data.path", name, f"floating point activations, not {array.dtype}")
        self._array = array
        self.n_tokens: int = array.shape[0]
        self.d_model: int = array.shape[1]
        # Small files get small chunks, so that the held-out tokens and the lanes still come from all over the file.
        self.rows = min(CHUNK, max(1, len(array) // (16 * LANES)))
        self.identity = {"path": name, "shape": list(array.shape), "dtype": str(array.dtype)}

    def __len__(self) -> int:
        return self.n_tokens // self.rows

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens(index * self.rows, (index + 1) * self.rows)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop; those after the last whole chunk too."""
        block = self._array[start : min(stop, self.n_tokens)]
        if block.dtype.kind == "f":
            return np.ascontiguousarray(block, dtype=block.dtype.newbyteorder("="))
        return np.asarray(block, np.float32)


def split_chunks(n_chunks: int, n_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunk numbers for training and, evenly spaced between them, for evaluation. They never overlap."""
    held_out = (np.arange(n_held_out) * n_chunks + n_chunks // 2) // max(n_held_out, 1)
    return np.setdiff1d(np.arange(n_chunks), held_out), held_out


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
        self._n_lanes = gcd(LANES, batch_size)
        if self._n_lanes % processes:
            raise Refused("train.batch_size", batch_size, f"a multiple of the {processes} processes, up to {LANES}")
        share = self._n_lanes // processes
        self._lanes = range(process * share, (process + 1) * share)
        self._rows_per_lane = batch_size // self._n_lanes
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parent) // self._n_lanes

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if isinstance(index, slice):
            return self.slice(index)
        return np.concatenate([self._lane_rows(lane, index * self._rows_per_lane) for lane in self._lanes])

    def _lane_rows(self, lane: int, start: int) -> np.ndarray:
        """The next rows of one lane, from as many of its windows as they touch."""
        length, stop = WINDOW * self._chunks.rows, start + self._rows_per_lane
        parts = []
        for number in range(start // length, (stop - 1) // length + 1):
            window = self._window(lane, number)
            parts.append(window[max(start - number * length, 0) : stop - number * length])
        return np.concatenate(parts)

    def _window(self, lane: int, number: int) -> np.ndarray:
        key = (lane, number)
        if key not in self._cache:
            positions = [(number * WINDOW + i) * self._n_lanes + lane for i in range(WINDOW)]
            rows = np.concatenate([self._chunks[self._train[self._parent[p]]] for p in positions])
            rng = np.random.default_rng([self._seed, lane, number])
            self._cache[key] = rows[rng.permutation(len(rows))]
            while len(self._cache) > 2 * len(self._lanes):
                self._cache.popitem(last=False)
        return self._cache[key]


def batches(
    chunks: Chunks, train: np.ndarray, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> grain.DatasetIterator:
    """Endless iterator over training batches, read ahead by a thread; `get_state` is the number of the next batch."""
    order = grain.MapDataset.range(len(train)).seed(seed).shuffle().repeat()
    dataset = Batches(chunks, order, train, batch_size, seed, process, processes)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def read(chunks: Chunks, numbers: np.ndarray, batch_size: int, n_rows: int) -> Iterator[np.ndarray]:
    """The first n_rows rows of the given chunks, in order, in batches (the last one may be shorter)."""
    buffer: list[np.ndarray] = []
    held, left = 0, n_rows
    for number in numbers:
        if left <= 0:
            break
        rows = chunks[number][:left]
        buffer.append(rows)
        held, left = held + len(rows), left - len(rows)
        while held >= batch_size:
            joined = np.concatenate(buffer)
            yield joined[:batch_size]
            buffer, held = [joined[batch_size:]], held - batch_size
    if held:
        yield np.concatenate(buffer)
