"""Activations in files of others: .npy, .npz, .safetensors, .pt and what SAELens cached; in slices, never unpickled."""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.ipc
from etils import epath

from sae_jax.activations.chunks import ArrayChunks, Chunks
from sae_jax.errors import Refused
from sae_jax.runtime.disk import SAMPLED, read_json
from sae_jax.runtime.optional import module

MOST = 100  # fold: whatever a compressed file grows by more than this is no activations
FORMATS = "a .npy, .npz, .safetensors or .pt file, a dataset folder, or a folder that SAELens cached activations in"
SAMPLES, SAMPLE_BYTES = 64, 2**16  # blocks of a file that its checksum covers, and how long one is
ENDINGS = (".npy", ".npz", ".safetensors", ".pt", ".pth")


class SafeTensor:
    """One tensor of a .safetensors file that looks like a memory-mapped array."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        self.ndim = len(self.shape)
        self.dtype = np.asarray(self._slice[:0] if self.ndim else np.zeros(0)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.asarray(self._slice[rows])


class CachedSequences:
    """Activations cached by SAELens (a Hugging Face dataset in Arrow files) that look like a memory-mapped array.

    Every row of the table is a sequence: a column named after the hook, (context, d_model), and `token_ids`.
    """

    ndim = 2

    def __init__(self, folder: Path):
        found: dict[str, list[Any]] = {}
        for entry in _state(folder)["_data_files"]:
            path = folder / entry["filename"]
            if path.parent != folder:  # whoever wrote the folder says what is read in it, and only in it
                raise ValueError(f"files beside state.json, not {entry['filename']}")
            for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    found.setdefault(name, []).append(getattr(column, "storage", column))
        names = [name for name, columns in found.items() if columns[0].type.num_fields and name != "token_ids"]
        if len(names) != 1:
            raise ValueError(f"one column of activations, not {', '.join(names) or 'none'}")
        sequences = [column for column in found[names[0]] if len(column)]
        self.hook, self.context = names[0], len(sequences[0].flatten()) // len(sequences[0])
        width = len(sequences[0].flatten().flatten()) // len(sequences[0].flatten())
        self._blocks = [  # NumPy refuses what is not (sequences, context, d_model) to the last number
            column.flatten().flatten().to_numpy(zero_copy_only=True).reshape(len(column) * self.context, width)
            for column in sequences
        ]
        self._starts = np.cumsum([0, *map(len, self._blocks)])
        self.shape, self.dtype = (int(self._starts[-1]), width), self._blocks[0].dtype
        ids = [column.flatten().to_numpy(zero_copy_only=False) for column in found.get("token_ids", [])]
        self._token_ids = np.concatenate(ids) if ids else np.full(self.shape[0], -1)
        if len(self._token_ids) != self.shape[0]:
            raise ValueError(f"a token id for each of {self.shape[0]} tokens, not {len(self._token_ids)}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        first, last = np.searchsorted(self._starts, [start, max(stop - 1, start)], side="right") - 1
        parts = [
            self._blocks[i][max(start - self._starts[i], 0) : max(stop - self._starts[i], 0)]
            for i in range(first, min(last + 1, len(self._blocks)))
        ]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """token_id, sequence_id and position of some rows."""
        rows = np.arange(start, stop)
        return self._token_ids[start:stop], rows // self.context, rows % self.context


def _state(folder: Path) -> dict[str, Any]:
    return read_json("data.path", epath.Path(folder) / "state.json", ("_data_files",))


def there(where: epath.Path) -> str:
    """What could have been meant: datasets and files in the nearest folder on the way to a path."""
    folder = next((parent for parent in where.parents if parent.exists()), None)
    if folder is None or not folder.is_dir():
        return ""
    from sae_jax.activations import stored

    files = sorted(str(path) for path in folder.iterdir() if path.suffix in ENDINGS)
    found = [*stored.datasets(folder), *files]
    return f"; there is {', '.join(found[:5])}" + (", …" if len(found) > 5 else "") if found else ""


def open_chunks(path: str) -> Chunks:
    """A file or a dataset folder, as chunks of rows."""
    try:
        where = epath.Path(path)
        found = where.exists()
    except Exception as error:  # a name that is too long, or is none; an object store that needs a package
        raise Refused("data.path", path, f"a path: {FORMATS} ({error})") from error
    if not found:
        raise Refused("data.path", path, f"an existing path: {FORMATS}{there(where)}")
    if where.is_dir() and not (where / "state.json").exists():
        from sae_jax.activations import stored

        try:
            return stored.StoredChunks(path)
        except Refused:
            raise
        except Exception as error:  # as below
            raise Refused("data.path", path, f"a dataset folder as it was written ({error})") from error
    return chunks_of(open_array(path), path)


def chunks_of(array: Any, path: str) -> ArrayChunks:
    """The array of a file in chunks, which know what stands in the file.

    Their identity has a checksum of evenly spaced rows: of all where they are at most `SAMPLES` · `SAMPLE_BYTES`, else
    as many as can be read at once from a file of any size. What differs elsewhere alone goes unnoticed.
    """
    chunks = ArrayChunks(array, path)
    rows = min(len(array), max(1, SAMPLE_BYTES // (chunks.d_model * array.dtype.itemsize)))
    starts = np.linspace(0, len(array) - rows, min(SAMPLES, -(-len(array) // rows))).astype(int).tolist()
    digest = hashlib.sha256()
    for start in starts:
        digest.update(np.ascontiguousarray(array[start : start + rows]).tobytes())
    chunks.identity[SAMPLED] = digest.hexdigest()
    return chunks


def open_array(path: str) -> Any:
    """The one matrix of floating point numbers in a file or SAELens folder; rows are read when they are asked for."""
    if not (Path(path).is_file() or Path(path).is_dir()):  # the pipe of a shell, say, would be waited on for ever
        raise Refused("data.path", path, f"{FORMATS}, not a device or a pipe")
    try:
        arrays = {name: array for name, array in _arrays(Path(path)) if hasattr(array, "shape")}
    except Refused:
        raise
    except Exception as error:  # readers of damaged files raise what they like
        reason = "" if "pickle" in str(error) else f" ({error})"  # NumPy's advice would be to unpickle
        raise Refused("data.path", path, f"{FORMATS}, complete and without objects{reason}") from error
    fitting = {name: array for name, array in arrays.items() if array.ndim == 2} if len(arrays) > 1 else arrays
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in list(arrays.items())[:8])
        raise Refused("data.path", path, f"a file with one array of shape (tokens, d_model); it holds {shapes}")
    return next(iter(fitting.values()))


def _arrays(path: Path) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        yield path.name, CachedSequences(path)
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        file = safe_open(path, framework="flax")  # the one framework that knows bfloat16 without torch
        yield from ((name, SafeTensor(file, name)) for name in file.keys())  # noqa: SIM118 (not a dictionary)
    elif path.suffix in (".pt", ".pth"):
        yield from _tensors(path)
    elif path.suffix == ".npz":
        yield from _members(path)
    else:
        yield path.stem, np.load(path, mmap_mode="r", allow_pickle=False)


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a PyTorch file, mapped; weights only, so nothing in it is run."""
    torch = module("torch", "hf")
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for name, tensor in (found if isinstance(found, dict) else {path.stem: found}).items():
        if isinstance(tensor, torch.Tensor):
            tensor, half = tensor.detach(), tensor.dtype == torch.bfloat16  # NumPy itself has no such type
            yield str(name), tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if half else tensor.numpy()


def _members(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of an .npz: mapped where they are stored plainly (numpy.savez), read into memory where compressed."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if info.compress_type != zipfile.ZIP_STORED:
                if info.file_size > MOST * max(info.compress_size, 4096):
                    raise ValueError(f"{name} is {info.file_size} bytes packed into {info.compress_size}")
                with archive.open(info) as member:
                    yield name, np.lib.format.read_array(member, allow_pickle=False)
                continue
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(member)
                header = member.tell()
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects")
            with path.open("rb") as raw:  # the local header's own lengths say where the member's bytes begin
                raw.seek(info.header_offset + 26)
                lengths = np.frombuffer(raw.read(4), "<u2")
            start = info.header_offset + 30 + int(lengths.sum()) + header
            if int(np.prod(shape)) == 0:
                yield name, np.zeros(shape, dtype)
                continue
            yield name, np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
