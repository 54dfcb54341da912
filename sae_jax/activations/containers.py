"""Arrays in files of others: .npy, .npz, .safetensors, .pt and zarr; mapped, read in slices, never unpickled."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sae_jax.activations import tokens
from sae_jax.activations.arrow import MASKS, TOKEN_IDS
from sae_jax.errors import Refused, first_line
from sae_jax.runtime.optional import module

MOST = 100  # fold: whatever a compressed file grows by more than this is no activations
ENDINGS = (".npy", ".npz", ".safetensors", ".pt", ".pth")
ZARR = (".zarray", ".zgroup", "zarr.json")  # files that make a folder an array or a group of version 2, or either of 3
CACHE_BYTES = 2**26  # of chunks of a zarr that stay unpacked
LENGTHS = ("lengths", "length", "seq_lens")
BITS = "@bfloat16"  # behind PATH::NAME: unsigned integers of 16 bits that are the bits of bfloat16


def open_file(path: Path, wanted: str = "") -> Any:
    """The one array of activations in a file, as a matrix of tokens; `wanted` names one of several.

    Sequences (three dimensions) come end to end. Integers beside them are token ids, a mask or lengths, by their names.
    """
    name, bits, _ = wanted.partition(BITS)
    arrays = {key: _typed(array, bool(bits)) for key, array in _arrays(path) if hasattr(array, "shape")}
    fitting = {key: array for key, array in arrays.items() if array.ndim in (2, 3) and _floating(array)}
    if name:
        fitting = {key: array for key, array in arrays.items() if key == name}
    elif len(arrays) == 1:
        fitting = arrays
    if len(fitting) != 1:
        raise tokens.Unfit(f"one array of shape (tokens, d_model), or the name of one as PATH::NAME; {_listed(arrays)}")
    key, array = next(iter(fitting.items()))
    if array.dtype == np.uint16:
        raise tokens.Unfit(f"floating point activations, not uint16; bits of bfloat16 are read as PATH::{key}{BITS}")
    if array.ndim not in (2, 3) or min(array.shape) == 0:
        raise tokens.Unfit(
            f"an array of shape (tokens, d_model) or (sequences, length, d_model), not {tuple(array.shape)}"
        )
    beside = {other: found for other, found in arrays.items() if other != key} | _files_beside(path)
    return with_beside(array, beside)


def with_beside(array: Any, beside: dict[str, Any]) -> Any:
    """A matrix of tokens from an array of two or three dimensions and from what lies beside it by known names."""
    def find(names: tuple[str, ...]) -> Any:
        found = next((beside[name] for name in names if name in beside and not _floating(beside[name])), None)
        return None if found is None else np.asarray(found[:])

    ids, mask, lengths = map(find, (TOKEN_IDS, MASKS, LENGTHS))
    leading = tuple(array.shape[:-1])
    for name, found in (("token ids", ids), ("a mask", mask)):
        if found is not None and found.shape != leading:
            raise tokens.Unfit(f"{name} of the shape {leading} of the tokens, not {found.shape}")
    if array.ndim == 2:
        matrix: Any = array if ids is None and lengths is None else tokens.Matrix(array, ids, lengths)
    else:
        matrix = tokens.Flat(array, ids)
        if lengths is not None:
            if lengths.shape != leading[:1] or lengths.min() < 0 or lengths.max() > leading[1]:
                raise tokens.Unfit(f"a length from 0 to {leading[1]} for each of {leading[0]} sequences")
            within = np.arange(leading[1]) < lengths[:, None]
            mask = within if mask is None else within & (mask != 0)
    return matrix if mask is None else tokens.Selected(matrix, np.flatnonzero(mask))


def is_beside(path: Path) -> bool:
    """Whether a .npy file lies beside another as its mask, its lengths or its token ids: x.mask.npy or x_mask.npy."""
    return path.suffix == ".npy" and any(
        path.stem.endswith(mark + name) and path.with_name(path.stem[: -len(mark + name)] + ".npy").exists()
        for name in (*TOKEN_IDS, *MASKS, *LENGTHS) for mark in "._"
    )


def _files_beside(path: Path) -> dict[str, Any]:
    if path.suffix != ".npy":
        return {}
    candidates = {
        name: path.with_name(f"{path.stem}{mark}{name}.npy")
        for name in (*TOKEN_IDS, *MASKS, *LENGTHS) for mark in "._"
        if path.with_name(f"{path.stem}{mark}{name}.npy").exists()
    }
    return {name: np.load(found, mmap_mode="r", allow_pickle=False) for name, found in candidates.items()}


def _floating(array: Any) -> bool:
    return bool(array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16)


def _listed(arrays: dict[str, Any]) -> str:
    return "it holds " + ", ".join(f"{name} {tuple(array.shape)}" for name, array in list(arrays.items())[:8])


def _typed(array: Any, bits: bool) -> Any:
    """bfloat16 under its name: NumPy saves what it has no letter for as two bytes of nothing in particular."""
    if isinstance(array, np.ndarray) and (array.dtype == np.dtype("V2") or (bits and array.dtype == np.uint16)):
        return array.view(ml_dtypes.bfloat16)
    return array


def _within(rows: slice | tuple[slice, slice], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices of the first dimensions, whose ends are in the array and in order."""
    parts = rows if isinstance(rows, tuple) else (rows,)
    found = [part.indices(size)[:2] for part, size in zip(parts, shape, strict=False)]
    return tuple(slice(start, max(start, stop)) for start, stop in found)


class SafeTensor:
    """One tensor of a .safetensors file that looks like a memory-mapped array."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        self.ndim = len(self.shape)
        self.dtype = np.asarray(self._slice[:0] if self.ndim else np.zeros(0)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | tuple[slice, slice]) -> np.ndarray:
        return np.asarray(self._slice[_within(rows, self.shape)])


class ZarrArray:
    """An array of a zarr that looks like a memory-mapped one; chunks that were never written are no zeros here."""

    def __init__(self, folder: Path):
        import tensorstore  # comes with orbax

        def opened(cache: int) -> Any:
            return tensorstore.open({
                "driver": "zarr" if (folder / ".zarray").exists() else "zarr3",
                "kvstore": {"driver": "file", "path": str(folder)},
                "context": {"cache_pool": {"total_bytes_limit": cache}}, "recheck_cached_data": "open",
            }, read=True, open=True).result()  # fmt: skip

        self._folder, self._array = str(folder), opened(CACHE_BYTES)
        layout, itemsize = self._array.chunk_layout.read_chunk.shape, self._array.dtype.numpy_dtype.itemsize
        across = int(np.prod(layout[:-1])) * -(-self._array.shape[-1] // layout[-1]) * layout[-1] * itemsize
        if 2 * across > CACHE_BYTES:  # what the cache has no room for is unpacked again for every slice
            self._array = opened(2 * across)
        self.shape: tuple[int, ...] = tuple(self._array.shape)
        self.ndim, self.dtype = len(self.shape), self._array.dtype.numpy_dtype
        if not self._array.storage_statistics(query_fully_stored=True).result().fully_stored:
            raise tokens.Unfit(f"a zarr whose chunks are all there: some of {folder.name} are missing")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | tuple[slice, slice]) -> np.ndarray:
        try:
            return np.asarray(self._array[_within(rows, self.shape)].read().result())
        except ValueError as error:
            raise Refused("data.path", self._folder, f"a zarr whose chunks are whole ({first_line(error)})") from error


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a zarr."""
    return any((folder / mark).is_file() for mark in ZARR)


def _zarrs(folder: Path) -> Iterator[tuple[str, ZarrArray]]:
    """The array that a zarr is, or those of the group."""
    node = folder / "zarr.json"
    kind = json.loads(node.read_text()).get("node_type") if node.is_file() else ""
    if kind != "group" and not (folder / ".zgroup").is_file():
        yield folder.stem, ZarrArray(folder)
        return
    for inner in sorted(filter(is_zarr, filter(Path.is_dir, folder.iterdir()))):
        if not (inner / ".zgroup").is_file():
            yield from ((inner.name, array) for _, array in _zarrs(inner))


def _arrays(path: Path) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        yield from _zarrs(path)
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
                    raise tokens.Unfit(f"{name} is {info.file_size} bytes packed into {info.compress_size}")
                with archive.open(info) as member:
                    yield name, np.lib.format.read_array(member, allow_pickle=False)
                continue
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(member)
                header = member.tell()
            if dtype.hasobject:
                raise tokens.Unfit(f"{name} holds Python objects")
            with path.open("rb") as raw:  # the local header's own lengths say where the member's bytes begin
                raw.seek(info.header_offset + 26)
                lengths = np.frombuffer(raw.read(4), "<u2")
            start = info.header_offset + 30 + int(lengths.sum()) + header
            if int(np.prod(shape)) == 0:
                yield name, np.zeros(shape, dtype)
                continue
            yield name, np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
