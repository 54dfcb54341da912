"""Arrays of others seen as one matrix (tokens, d_model): sequences end to end, shards end to end, some of the rows.

Each of these has a shape, a dtype and slices of rows, as a memory-mapped array has; nothing is read before it is asked
for. Those that know where a row comes from have `places` as well.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sae_jax.outliers import giants

GAP = 256  # more unwanted rows in a row than this are skipped in reading
UNKNOWN = -1  # token_id and sequence_id where nobody wrote them down


class Unfit(ValueError):
    """What is there can be read, but it is no matrix of tokens: says what would be."""


class Places(NamedTuple):
    """Where some rows come from."""

    token_id: np.ndarray
    sequence_id: np.ndarray
    position: np.ndarray  # in its sequence; the number of the row where sequences are not known


def places(array: Any, start: int, stop: int) -> Places:
    """Where rows from start up to stop come from, as far as an array knows."""
    if hasattr(array, "places"):
        found: Places = array.places(start, stop)
        return found
    nobody = np.full(stop - start, UNKNOWN)
    return Places(nobody, nobody, np.arange(start, stop))


def unpacked(array: Any) -> int:
    """Bytes of what an array unpacks in pieces much larger than what is asked for; 0 where it is read in place."""
    return int(getattr(array, "unpacked", 0))


def sequences(array: Any) -> bool:
    """Whether an array knows which rows make a sequence."""
    return bool(getattr(array, "known", False))


class Rows:
    """What all of them have in common: a matrix of `shape` whose rows come with places.

    Args:
      ends: (sequences,) number of the row after the last of each sequence; None where sequences are not known.
      token_ids: (tokens,) or None.
    """

    ndim = 2

    def __init__(self, shape: tuple[int, int], dtype: Any, ends: Any = None, token_ids: Any = None):
        self.shape, self.dtype, self._ends, self._token_ids = shape, np.dtype(dtype), ends, token_ids
        if token_ids is not None and len(token_ids) != len(self):
            raise Unfit(f"a token id for each of {len(self)} tokens, not {len(token_ids)}")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Of all rows together."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        return self.take(start, max(start, stop))

    def take(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop, both in the array."""
        raise NotImplementedError

    @property
    def known(self) -> bool:
        """Whether it is known which rows make a sequence."""
        return self._ends is not None

    def places(self, start: int, stop: int) -> Places:
        """Where rows from start up to stop come from."""
        rows = np.arange(start, stop)
        ids = np.full(len(rows), UNKNOWN) if self._token_ids is None else np.asarray(self._token_ids[start:stop])
        if self._ends is None:
            return Places(ids, np.full(len(rows), UNKNOWN), rows)
        sequence = np.searchsorted(self._ends, rows, side="right")
        begins = np.where(sequence > 0, self._ends[np.maximum(sequence - 1, 0)], 0)
        return Places(ids, sequence, rows - begins)


class Flat(Rows):
    """(sequences, context, d_model), one sequence after the other."""

    def __init__(self, array: Any, token_ids: Any = None):
        count, self._context, width = array.shape
        ids = None if token_ids is None else np.asarray(token_ids).reshape(-1)
        super().__init__((count * self._context, width), array.dtype, self._context * np.arange(1, count + 1), ids)
        self._array = array

    def take(self, start: int, stop: int) -> np.ndarray:
        first, last = start // self._context, -(-stop // self._context)
        if stop - start < self._context:  # sequences may be long: of each only what is asked for
            parts = [np.zeros((0, self.shape[1]), self.dtype)]
            for number in range(first, last):
                begin = number * self._context
                rows = slice(max(start - begin, 0), min(stop - begin, self._context))
                parts.append(np.asarray(self._array[number : number + 1, rows])[0])
            return parts[1] if len(parts) == 2 else np.concatenate(parts, dtype=self.dtype)  # of its own byte order
        block = np.asarray(self._array[first:last]).reshape(-1, self.shape[1])
        return block[start - first * self._context : stop - first * self._context]


class Matrix(Rows):
    """(tokens, d_model) with token ids, or sequences, beside it."""

    def __init__(self, array: Any, token_ids: Any = None, lengths: Any = None):
        ends = None if lengths is None else np.cumsum(np.asarray(lengths, np.int64))
        if ends is not None and ends[-1] != len(array):
            raise Unfit(f"lengths that add up to {len(array)} tokens, not to {ends[-1]}")
        super().__init__(tuple(array.shape), array.dtype, ends, token_ids)
        self._array = array

    def take(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._array[start:stop])


class Joined(Rows):
    """Shards of equal width, one after the other."""

    def __init__(self, parts: Sequence[Any]):
        widths, kinds = {part.shape[1] for part in parts}, {part.dtype for part in parts}
        if len(widths) > 1 or len(kinds) > 1:
            found = ", ".join(sorted(f"{part.shape[1]} of {part.dtype}" for part in {
                (part.shape[1], part.dtype): part for part in parts
            }.values()))  # fmt: skip
            raise Unfit(f"shards of one width and one type, not {found}")
        self._parts = parts
        self._stops = np.cumsum([len(part) for part in parts])
        super().__init__((int(self._stops[-1]), widths.pop()), kinds.pop())
        # Sequences are counted on from shard to shard.
        counts = [
            int(places(part, len(part) - 1, len(part)).sequence_id[0]) + 1 if sequences(part) and len(part) else 0
            for part in parts
        ]
        self.unpacked = sum(map(unpacked, parts))
        self._first_sequence, self._known = np.cumsum([0, *counts]), all(map(sequences, parts))

    @property
    def known(self) -> bool:
        return self._known

    def _within(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Number of a part, and the rows of it that lie between start and stop."""
        found, begin = [], 0
        first = int(np.searchsorted(self._stops, start, side="right"))
        begin = int(self._stops[first - 1]) if first else 0
        for number in range(first, len(self._parts)):
            if begin >= stop:
                break
            end = int(self._stops[number])
            found.append((number, max(start - begin, 0), min(stop, end) - begin))
            begin = end
        return found

    def take(self, start: int, stop: int) -> np.ndarray:
        parts = [np.asarray(self._parts[number][low:high]) for number, low, high in self._within(start, stop)]
        if not parts:
            return np.zeros((0, self.shape[1]), self.dtype)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def places(self, start: int, stop: int) -> Places:
        found = []
        for number, low, high in self._within(start, stop):
            ids, sequence, position = places(self._parts[number], low, high)
            if self.known:
                sequence = sequence + self._first_sequence[number]
            else:
                sequence, position = np.full(high - low, UNKNOWN), np.arange(high - low) + start
                start += high - low
            found.append(Places(ids, sequence, position))
        return Places(*map(np.concatenate, zip(*found, strict=True)))


class Selected(Rows):
    """Some rows of an array, in order; sequences and positions stay what they were there."""

    def __init__(self, array: Any, rows: np.ndarray):
        super().__init__((len(rows), array.shape[1]), array.dtype)
        self._array, self._rows, self.unpacked = array, rows, unpacked(array)

    @property
    def known(self) -> bool:
        return sequences(self._array)

    def take(self, start: int, stop: int) -> np.ndarray:
        rows = self._rows[start:stop]
        if not len(rows):
            return np.zeros((0, self.shape[1]), self.dtype)
        parts = [np.asarray(self._array[int(part[0]) : int(part[-1]) + 1])[part - part[0]] for part in _near(rows)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, dtype=self.dtype)

    def places(self, start: int, stop: int) -> Places:
        rows = self._rows[start:stop]
        if not len(rows):
            return Places(*(np.zeros(0, np.int64) for _ in range(3)))
        found = [
            [known[part - part[0]] for known in places(self._array, int(part[0]), int(part[-1]) + 1)]
            for part in _near(rows)
        ]
        return Places(*map(np.concatenate, zip(*found, strict=True)))


def first(array: Any, most: int) -> Selected:
    """The first rows of an array, or all."""
    return Selected(array, np.arange(min(most, len(array))))


def _near(rows: np.ndarray) -> list[np.ndarray]:
    """Rows in runs that are read at once."""
    return np.split(rows, np.flatnonzero(np.diff(rows) > GAP) + 1)


BLOCK = 2**14  # rows looked at together


def without(array: Any, spec: str) -> Selected:
    """The rows that are left when some are left out: one pass over what is needed to tell.

    Args:
      spec: with commas between: `first` (the first row of each sequence), `id=N` (tokens of that id), `norm=X` (norms
        of more than X times the median; zeros do not count).
    """
    wanted = [part.partition("=") for part in spec.split(",")]
    for name, _, value in wanted:
        fine = {"first": not value, "id": value.isdecimal(), "norm": value.replace(".", "", 1).isdecimal()}
        if not fine.get(name, False):
            raise Unfit(f"tokens to leave out as first, id=N or norm=X, with commas between, not {spec}")
    first = any(name == "first" for name, *_ in wanted)
    ids = [int(value) for name, _, value in wanted if name == "id"]
    multiples = [float(value) for name, _, value in wanted if name == "norm"]
    keep, norms, before = np.ones(len(array), bool), np.zeros(len(array) if multiples else 0), UNKNOWN
    for start in range(0, len(array), BLOCK):
        stop = min(start + BLOCK, len(array))
        if first or ids:
            token_id, sequence_id, _ = places(array, start, stop)
            if first and (sequence_id == UNKNOWN).any() or ids and (token_id == UNKNOWN).any():
                raise Unfit(f"{'sequences' if first else 'token ids'} beside the activations, to leave out {spec}")
            keep[start:stop] &= ~np.isin(token_id, ids)
            if first:
                keep[start:stop] &= np.diff(sequence_id, prepend=before) == 0
                before = sequence_id[-1]
        if multiples:
            norms[start:stop] = giants.norms(np.asarray(array[start:stop], np.float32))
    for multiple in multiples:
        keep &= norms <= giants.giant_norm(norms, multiple)
    if not keep.any():
        raise Unfit(f"tokens that are left without {spec}")
    return Selected(array, np.flatnonzero(keep))
