"""Stored activations as chunks of rows: what every reader of them gives, and what all that follows asks for."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from sae_jax.activations import tokens
from sae_jax.errors import Refused

LANES = 64  # at most; the batch size has to be a multiple
CHUNK = 256  # tokens a chunk, where the file has no chunks of its own


class Chunks(Protocol):
    """Stored activations as equally long chunks of rows."""

    n_tokens: int
    d_model: int
    rows: int  # tokens a chunk
    dtype: np.dtype
    identity: dict[str, Any]  # what data this is, for reports

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...  # of `dtype`; may be read-only and unaligned
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
        self._array, self.unpacked = array, tokens.unpacked(array)
        self.n_tokens: int = array.shape[0]
        self.d_model: int = array.shape[1]
        self.dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else np.dtype(np.float32)
        # Small files get small chunks, so that the held-out tokens and the lanes still come from all over the file.
        self.rows = min(CHUNK, max(1, len(array) // (16 * LANES)))
        self.identity = {"path": name, "shape": list(array.shape), "dtype": str(array.dtype)}

    def check(self) -> None:
        """Refuses numbers that are not finite, and rows that are all the same: reads everything once."""
        first, varies = self.tokens(0, 1), False
        for start in range(0, self.n_tokens, 4096):
            x = self.tokens(start, start + 4096)
            varies = varies or bool((x != first).any())
            if np.isfinite(x.sum(dtype=np.float64)):
                continue
            for row, dimension in np.argwhere(~np.isfinite(x))[:1]:
                where = f"row {start + row}, dimension {dimension} is {x[row, dimension]}"
                raise Refused("data.path", self.identity["path"], f"finite numbers; {where}")
        if not varies:
            allowed = "activations that vary; all rows are the same" if self.n_tokens > 1 else "more than one token"
            raise Refused("data.path", self.identity["path"], allowed)

    def __len__(self) -> int:
        return self.n_tokens // self.rows

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens(index * self.rows, (index + 1) * self.rows)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop; those after the last whole chunk too."""
        return np.ascontiguousarray(self._array[start : min(stop, self.n_tokens)], self.dtype)


def rows_of(chunks: Chunks, start: int, stop: int) -> np.ndarray:
    """Rows from start up to stop, of chunks that can only be had whole."""
    first, stop = start // chunks.rows, min(stop, chunks.n_tokens)
    blocks = [chunks[number] for number in range(first, -(-stop // chunks.rows))]
    return np.concatenate(blocks)[start - first * chunks.rows : stop - first * chunks.rows]


def spread(n_chunks: int, count: int, evenly: bool = False) -> np.ndarray:
    """Numbers of `count` chunks from all over, in order: one, drawn, of each of as many equal stretches.

    Evenly spaced, as runs of before have them, they fall in step with the length of the sequences: all of them may be
    first tokens, or none.
    """
    if evenly:
        return (np.arange(count) * n_chunks + n_chunks // 2) // max(count, 1)
    edges = np.arange(count + 1) * n_chunks // max(count, 1)
    drawn: np.ndarray = np.random.default_rng([n_chunks, count]).integers(edges[:-1], edges[1:])
    return drawn


def split_chunks(n_chunks: int, n_held_out: int, evenly: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Chunk numbers for training and, `spread` between them, for evaluation. They never overlap."""
    held_out = spread(n_chunks, n_held_out, evenly)
    return np.setdiff1d(np.arange(n_chunks), held_out), held_out


def read(
    chunk: Callable[[int], np.ndarray], numbers: np.ndarray, batch_size: int, n_rows: int
) -> Iterator[np.ndarray]:
    """The first n_rows rows of the given chunks, in order, in batches (the last one may be shorter)."""
    buffer: list[np.ndarray] = []
    held, left = 0, n_rows
    for number in numbers:
        if left <= 0:
            break
        rows = chunk(int(number))[:left]
        buffer.append(rows)
        held, left = held + len(rows), left - len(rows)
        if held >= batch_size:
            joined, whole = np.concatenate(buffer), held // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield joined[start : start + batch_size]
            buffer, held = [joined[whole:]], held - whole
    if held:
        yield np.concatenate(buffer)
