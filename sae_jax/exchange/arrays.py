"""Files of arrays read with care: safetensors, npz and torch files into float32, nothing unpickled, shapes checked."""

import io
import json
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from sae_jax.errors import Refused, first_line
from sae_jax.runtime import memory
from sae_jax.runtime.disk import read_json
from sae_jax.runtime.optional import module

Arrays = dict[str, np.ndarray]
# safetensors' names of the number formats that weights come in; bfloat16 is not NumPy's own.
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_arrays(path: epath.Path) -> tuple[Arrays, dict[str, Any]]:
    """Name → float32 array of a .safetensors, .npz, .pt or .pth file, and what else a torch file holds.

    Raises:
      Refused: the file is damaged, of another kind, or holds what would have to be unpickled.
    """
    _check_size(path)
    if path.suffix == ".safetensors":
        return _safetensors(path), {}
    if path.suffix == ".npz":
        return _npz(path), {}
    return _torch(path)


COPIES = 4  # of a file: its bytes, the arrays in them, the same as float32, and on the device


def _check_size(path: epath.Path) -> None:
    size, there = path.stat().length, memory.of_the_machine()
    if there is not None and COPIES * size > there:
        raise Refused(
            str(path), f"{size / 1e9:,.1f} GB", f"at most about {there / COPIES / 1e9:,.1f} GB: it takes "
            f"{COPIES} times its size to examine it, and {there / 1e9:,.1f} GB are free"
        )  # fmt: skip


def _safetensors(path: epath.Path) -> Arrays:
    from safetensors import deserialize  # its readers for NumPy and JAX stumble over bfloat16

    try:
        return {
            name: _float32(np.frombuffer(found["data"], DTYPES[found["dtype"]]).reshape(found["shape"]))
            for name, found in deserialize(path.read_bytes())
        }
    except KeyError as error:
        raise Refused(str(path), f"numbers of type {error.args[0]}", "weights in " + ", ".join(DTYPES)) from error
    except Exception as error:  # a damaged file, or one that only looks like it
        raise Refused(str(path), "unreadable", f"a safetensors file ({first_line(error)})") from error


def _npz(path: epath.Path) -> Arrays:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            return {name: _float32(found[name]) for name in found.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise Refused(str(path), "unreadable", f"an npz file of arrays ({first_line(error)})") from error


def _torch(path: epath.Path) -> tuple[Arrays, dict[str, Any]]:
    torch = module("torch", "hf")
    try:
        with warnings.catch_warnings():  # of pickles that it then refuses
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        arrays = {str(key): value.float().numpy() for key, value in state.items() if isinstance(value, torch.Tensor)}
        numbers = {str(key): np.float32(value) for key, value in state.items() if isinstance(value, int | float)}
        rest = {str(key): value for key, value in state.items() if not isinstance(value, torch.Tensor | int | float)}
        return arrays | numbers, rest
    except Exception as error:  # whatever else a pickle holds is refused by torch, in many words
        raise Refused(str(path), "not tensors alone", "a torch state dict; nothing else is unpickled") from error


def take(arrays: Arrays, wanted: dict[str, tuple[int, ...]], path: epath.Path) -> list[np.ndarray]:
    """The wanted arrays in that order. Refuses missing ones, other shapes, and values that are not finite."""
    missing = sorted(wanted.keys() - arrays.keys())
    if missing:
        raise Refused(f"{path}: {', '.join(missing)}", "missing", "all of " + ", ".join(wanted))
    for key, shape in wanted.items():
        if arrays[key].shape != shape:
            raise Refused(f"{path}: {key}", arrays[key].shape, f"the shape {shape}, as the others have it")
        if not np.isfinite(arrays[key]).all():
            raise Refused(f"{path}: {key}", "not finite", "finite numbers")
    return [_float32(arrays[key]) for key in wanted]


def unread(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """What a reader of the report has to know of a file with more in it than an SAE of its kind has."""
    more = sorted(set(names) - set(known))
    return (f"Its file also has {listed(more)}, which nothing here looks at.",) if more else ()


def only(names: Iterable[str], known: Iterable[str], kind: str, path: epath.Path) -> None:
    """Refuses a file, whose kind was told by its keys, with others than that kind has: it may be of another."""
    if more := sorted(set(names) - set(known)):
        own = ", ".join(known)
        raise Refused(f"{path}: {listed(more)}", "unexpected", f"{own} alone, by which it would be of {kind}")


def listed(names: list[str], most: int = 8) -> str:
    """The first of them, and how many there are."""
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def matrix(arrays: Arrays, key: str, path: epath.Path) -> tuple[int, int]:
    """The two sizes of the matrix that tells the others' shapes."""
    if key not in arrays:
        raise Refused(f"{path}: {key}", "missing", "the matrix of an encoder")
    if arrays[key].ndim != 2:
        raise Refused(f"{path}: {key}", arrays[key].shape, "a matrix")
    return arrays[key].shape[0], arrays[key].shape[1]


def config_beside(path: epath.Path) -> dict[str, Any]:
    """A configuration that has to be there."""
    if not path.exists():
        raise Refused(str(path), "missing", "the configuration beside the weights")
    return read_json("--sae", path)


def integer(config: dict[str, Any], key: str, path: epath.Path) -> int:
    """An integer of a configuration."""
    if not isinstance(config.get(key), int) or isinstance(config[key], bool):
        raise Refused(f"{path}: {key}", config.get(key, "missing"), "an integer")
    return int(config[key])


def number(config: dict[str, Any], key: str, path: epath.Path) -> float:
    """A finite number of a configuration."""
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
        raise Refused(f"{path}: {key}", config.get(key, "missing"), "a number")
    return float(value)


def of(config: dict[str, Any], key: str, path: epath.Path) -> dict[str, Any]:
    """A part of a configuration that is one itself; empty where there is none."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise Refused(f"{path}: {key}", found, "an object")
    return found


def to_json(value: Any) -> bytes:
    """A configuration as it is written."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32, order="C")
