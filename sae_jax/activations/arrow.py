"""Activations in Arrow tables: what Hugging Face's `save_to_disk` and SAELens leave, and Parquet files.

A row of a table is a token, (d_model,), or a sequence, (length, d_model), whose lengths may differ. Integers beside are
token ids, or a mask. Arrow files are memory-mapped; of Parquet a few row groups are decoded at a time.
"""

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from etils import epath

from sae_jax.activations import tokens
from sae_jax.runtime.disk import read_json

STATE, DICTIONARY = "state.json", "dataset_dict.json"
TOKEN_IDS = ("token_ids", "token_id", "input_ids", "tokens", "ids")
MASKS = ("attention_mask", "mask")
GROUPS = 4  # row groups of a Parquet file kept decoded
DECODED = 2**28  # bytes of them, of all files together; the latest is always kept


class Column(NamedTuple):
    """Numbers of one column of a batch: rows end to end."""

    values: np.ndarray  # (tokens, d_model), or (tokens,) of token ids
    lengths: np.ndarray | None  # tokens in each row; None where a row is a token


def _storage(column: Any) -> Any:
    return getattr(column, "storage", column)


def _flattened(column: Any) -> tuple[Any, np.ndarray]:
    """What lists hold, end to end, and the length of each."""
    if column.null_count:
        raise tokens.Unfit(f"{column.null_count} rows are missing")
    kind = column.type
    if pyarrow.types.is_fixed_size_list(kind):
        return _storage(column.flatten()), np.full(len(column), kind.list_size)
    return _storage(column.flatten()), np.asarray(column.value_lengths().to_numpy(zero_copy_only=False), np.int64)


def _depth(kind: Any) -> int:
    """How many lists lie in each other."""
    kind = getattr(kind, "storage_type", kind)
    return 1 + _depth(kind.value_type) if pyarrow.types.is_nested(kind) and hasattr(kind, "value_type") else 0


def _leaf(kind: Any) -> Any:
    kind = getattr(kind, "storage_type", kind)
    return _leaf(kind.value_type) if hasattr(kind, "value_type") and pyarrow.types.is_nested(kind) else kind


def _column(column: Any, matrix: bool) -> Column:
    """A column of vectors (matrix) or of numbers, token by token."""
    column, lengths = _storage(column), None
    if _depth(column.type) > int(matrix):
        column, lengths = _flattened(column)
    if not matrix:
        if column.null_count:
            raise tokens.Unfit(f"{column.null_count} numbers are missing")
        return Column(column.to_numpy(zero_copy_only=False), lengths)
    n_rows = len(column)
    column, widths = _flattened(column)
    if not n_rows:
        return Column(np.zeros((0, 0), column.type.to_pandas_dtype()), lengths)
    if widths.min() != widths.max():
        raise tokens.Unfit(f"tokens of one width, not of {widths.min()} to {widths.max()}")
    if column.null_count:
        raise tokens.Unfit(f"{column.null_count} numbers are missing")
    return Column(column.to_numpy(zero_copy_only=True).reshape(n_rows, int(widths[0])), lengths)


class Decoded:
    """The latest matrices that were asked for, by what they belong to and their number."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._alone = threading.Lock()

    def get(self, owner: int, number: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """A matrix, made if it is not held."""
        with self._alone:
            if (owner, number) in self._held:
                self._held.move_to_end((owner, number))
                return self._held[owner, number]
        found = make()
        with self._alone:
            self._held[owner, number] = found
            mine = [key for key in self._held if key[0] == owner]
            for key in mine[:-GROUPS]:
                del self._held[key]
            while len(self._held) > 1 and sum(matrix.nbytes for matrix in self._held.values()) > DECODED:
                self._held.popitem(last=False)
        return found

    def drop(self, owner: int) -> None:
        """Lets go of all that belongs to one."""
        with self._alone:
            for key in [key for key in self._held if key[0] == owner]:
                del self._held[key]


_decoded, _openings = Decoded(), itertools.count()


class Blocks(tokens.Rows):
    """Record batches or row groups end to end; `read` makes the matrix of one of them."""

    def __init__(
        self, read: Callable[[int], np.ndarray], counts: Sequence[int], width: int, dtype: Any, lengths: Any, ids: Any,
        hook: str,
    ):  # fmt: skip
        ends = None if lengths is None else np.cumsum(lengths)
        super().__init__((int(sum(counts)), width), dtype, ends, ids)
        self._read, self._starts = read, np.cumsum([0, *counts])
        context = {} if lengths is None or lengths.min() != lengths.max() else {"context": int(lengths[0])}
        self.facts = {"hook": hook, **context}

    def take(self, start: int, stop: int) -> np.ndarray:
        if start >= stop:
            return np.zeros((0, self.shape[1]), self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        parts = []
        for number in range(first, last):
            begin, end = self._starts[number : number + 2].tolist()
            if begin == end:  # sequences without tokens: a matrix of no width
                continue
            parts.append(self._read(number)[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


def _open(batches: Sequence[Any], schema: Any, wanted: str, load: Callable[[int, list[str]], Any], keep: bool) -> Any:
    """The one matrix of a table.

    Args:
      batches: numbers of the batches.
      load: (number, columns) → a batch with these columns.
      keep: batches are mapped and may be held; else they are decoded when they are asked for.
    """
    names = [field.name for field in schema]
    vectors = [
        field.name for field in schema
        if _depth(field.type) in (1, 2) and (pyarrow.types.is_floating(_leaf(field.type)) or field.name == wanted)
    ]  # fmt: skip
    if wanted:
        vectors = [name for name in vectors if name == wanted]
    if len(vectors) != 1:
        asked = f"a column of activations {wanted}" if wanted else "one column of activations (name it as PATH::COLUMN)"
        raise tokens.Unfit(f"{asked}, not {', '.join(vectors) or 'none'} of {', '.join(names)}")
    name = vectors[0]
    flat = _depth(schema.field(name).type) == 1
    beside = {
        kind: next((one for one in known if one in names and one != name), None)
        for kind, known in (("ids", TOKEN_IDS), ("mask", MASKS))
    }
    counts, lengths, found, kept = [], [], {"ids": [], "mask": []}, []  # type: ignore[var-annotated]
    width, dtype = 0, None
    for number in batches:
        batch = load(number, [name, *filter(None, beside.values())])
        column = _column(batch.column(name), matrix=True)
        counts.append(len(column.values))
        kept.append(column.values if keep else None)
        if len(column.values):
            if width not in (0, column.values.shape[1]):
                raise tokens.Unfit(f"tokens of one width, not of {width} and {column.values.shape[1]}")
            width, dtype = column.values.shape[1], column.values.dtype
        if column.lengths is not None:
            lengths.append(column.lengths)
        for kind, other in beside.items():
            if other is not None:
                numbers = _column(batch.column(other), matrix=False)
                if numbers.lengths is not None and (
                    column.lengths is None or not np.array_equal(numbers.lengths, column.lengths)
                ):
                    raise tokens.Unfit(f"as many {other} as tokens in every row")
                found[kind].append(numbers.values)
    if not sum(counts):
        raise tokens.Unfit("rows")

    owner = next(_openings)  # opened again, a file may be another one

    def decoded(number: int) -> np.ndarray:
        made = lambda: _column(load(batches[number], [name]).column(name), matrix=True).values  # noqa: E731
        return _decoded.get(owner, number, made)

    read: Any = kept.__getitem__ if keep else decoded
    ids, mask = (np.concatenate(parts) if parts else None for parts in (found["ids"], found["mask"]))
    array: Any = Blocks(read, counts, width, dtype, None if flat else np.concatenate(lengths), ids, name)
    if not keep:
        array.unpacked = array.nbytes
        weakref.finalize(array, _decoded.drop, owner)
    if mask is not None:
        if len(mask) != len(array):
            raise tokens.Unfit(f"a mask for each of {len(array)} tokens, not {len(mask)}")
        facts = array.facts
        array = tokens.Selected(array, np.flatnonzero(mask))
        array.facts = facts
    return array


def open_folder(folder: Path, wanted: str) -> Any:
    """A folder of `save_to_disk` (a Dataset, or one split of a DatasetDict as SPLIT or SPLIT/COLUMN)."""
    if (folder / DICTIONARY).exists():
        splits = read_json("data.path", epath.Path(folder) / DICTIONARY, ("splits",))["splits"]
        split, _, column = wanted.partition("/")
        if split not in splits and len(splits) == 1:
            split, column = splits[0], wanted
        if split not in splits or Path(split).name != split:
            raise tokens.Unfit(f"one of its splits, as PATH::{splits[0]}; it has {', '.join(splits)}")
        return open_folder(folder / split, column)
    found, schema = [], None
    for entry in read_json("data.path", epath.Path(folder) / STATE, ("_data_files",))["_data_files"]:
        path = folder / entry["filename"]
        if path.parent != folder:  # whoever wrote the folder says what is read in it, and only in it
            raise tokens.Unfit(f"files beside {STATE}, not {entry['filename']}")
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
            schema = stream.schema
            found += [batch for batch in stream if batch.num_rows]
    if schema is None or not found:
        raise tokens.Unfit("one column of activations, not none")
    return _open(range(len(found)), schema, wanted, lambda number, _: found[number], keep=True)


def open_parquet(path: Path, wanted: str) -> Any:
    """One Parquet file."""
    file = pyarrow.parquet.ParquetFile(path, memory_map=True)

    def load(number: int, columns: list[str]) -> Any:
        table = file.read_row_group(number, columns=columns).combine_chunks()
        return table.to_batches(max_chunksize=None)[0] if table.num_rows else table
    groups = [number for number in range(file.num_row_groups) if file.metadata.row_group(number).num_rows]
    return _open(groups, file.schema_arrow, wanted, load, keep=False)
