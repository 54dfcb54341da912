"""Activations in files of others: .npy, .npz, .safetensors and .pt, read in slices, never unpickled."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from sae_jax.activations import pipeline
from sae_jax.errors import Refused, missing_extra

MOST = 100  # fold: whatever a compressed file grows by more than this is no activations
FORMATS = "a .npy, .npz, .safetensors or .pt file, or a dataset folder"


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


def open_chunks(path: str) -> pipeline.Chunks:
    """A file or a dataset folder, as chunks of rows."""
    where = epath.Path(path)
    try:
        found = where.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or is none
        raise Refused("data.path", path, f"a path: {FORMATS} ({error})") from error
    if not found:
        raise Refused("data.path", path, f"an existing path: {FORMATS}")
    if where.is_dir():
        from sae_jax.activations import store

        try:
            return store.StoredChunks(path)
        except Refused:
            raise
        except Exception as error:  # as below
            raise Refused("data.path", path, f"a dataset folder as it was written ({error})") from error
    return pipeline.ArrayChunks(open_array(path), path)


def open_array(path: str) -> Any:
    """The one two-dimensional floating point array in a file; rows are read when they are asked for."""
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
    if path.suffix == ".safetensors":
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
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "hf") from error
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
