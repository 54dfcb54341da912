"""The one door to activations of others: a path as a matrix of tokens, or as chunks of its rows.

PATH::NAME is one of several arrays, columns or splits; PATH::NAME?without=first,norm=10 leaves tokens out.
"""

import errno
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sae_jax.activations import arrow, containers, tokens
from sae_jax.activations.chunks import ArrayChunks, Chunks
from sae_jax.errors import Refused
from sae_jax.runtime import disk
from sae_jax.runtime.disk import SAMPLED

FORMATS = (
    "a .npy, .npz, .safetensors, .pt or .parquet file, a folder or a pattern of such files, a zarr, a dataset folder, "
    "or one that SAELens or Hugging Face's save_to_disk left"
)
ENDINGS = (*containers.ENDINGS, ".parquet")
SAMPLES, SAMPLE_BYTES = 64, 2**16  # blocks of a file that its checksum covers, and how long one is


def there(where: epath.Path) -> str:
    """What could have been meant: datasets and files in the nearest folder on the way to a path."""
    folder = next((parent for parent in where.parents if parent.exists()), None)
    if folder is None or not folder.is_dir():
        return ""
    from sae_jax.activations import stored

    files = sorted(str(path) for path in folder.iterdir() if path.suffix in ENDINGS)
    found = [*stored.datasets(folder), *files]
    return f"; there is {', '.join(found[:5])}" + (", …" if len(found) > 5 else "") if found else ""


WITHOUT = "?without="


class Wanted(NamedTuple):
    """What PATH::NAME?without=TOKENS asks for; the name and what is left out may be missing."""

    where: str
    name: str
    without: str  # as in `tokens.without`


def split(path: str) -> Wanted:
    """The parts of a path."""
    if "::" not in path or Path(path).exists():
        return Wanted(path, "", "")
    where, _, rest = path.rpartition("::")
    name, _, without = rest.partition(WITHOUT)
    return Wanted(where, name, without)


def exists(path: str) -> bool:
    """Whether there is something at a path, or files that a pattern fits. Object stores are asked too."""
    where = split(path).where
    return epath.Path(where).exists() or bool("://" not in where and glob.glob(where))


def open_chunks(path: str) -> Chunks:
    """A file or a dataset folder, as chunks of rows."""
    try:
        found = exists(path)
    except Exception as error:  # a name that is too long, or is none; an object store that needs a package
        raise Refused("data.path", path, f"a path: {FORMATS} ({error})") from error
    where, _, without = split(path)
    if not found:
        raise Refused("data.path", path, f"nothing is there. Taken are {FORMATS}{there(epath.Path(where))}")
    if epath.Path(where).is_dir() and not _of_others(epath.Path(where)) and not without:
        return _dataset(where)
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


# Files of a folder that is something else, and what it is then called.
FOREIGN = {
    "checkpoints": "is a run of train, which has no activations in it",
    "sae_weights.safetensors": "is an SAE, and no activations: diagnose takes it as --sae",
    "sae.safetensors": "is an SAE, and no activations: diagnose takes it as --sae",
    "ae.pt": "is an SAE, and no activations: diagnose takes it as --sae",
    "report.json": "is what a verb reported, which has no activations in it",
}


def _foreign(folder: epath.Path) -> str:
    """What a folder is, where it is plainly something else than activations."""
    for name, what in FOREIGN.items():
        if (folder / name).exists():
            return what
    model = _model_of(folder / "config.json")
    return f"is a model, {model}: its activations are extracted with --config.data.model.id={folder}" if model else ""


def _model_of(config: epath.Path) -> str:
    """The kind of model that a configuration of Hugging Face's describes."""
    try:
        found = json.loads(config.read_text())
        return str(found.get("model_type") or (found.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return ""


def _refuse_foreign(folder: str) -> None:
    """Says in plain words what a folder is that holds no activations."""
    root = epath.Path(folder)
    what = _foreign(root)
    if not what and not any(True for _ in _candidates(root)):
        names = sorted(path.name for path in root.iterdir())
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = f"holds {', '.join(names[:3])}{more}, none of them activations" if names else "is empty"
    if what:
        raise Refused("data.path", folder, f"a dataset folder, or one of files of activations: this one {what}")


def _candidates(root: epath.Path) -> Iterator[Any]:
    """What in a folder, or below it, may be activations."""
    from sae_jax.activations import stored

    yield from (mark for mark in (stored.MANIFEST, arrow.STATE, arrow.DICTIONARY) if (root / mark).exists())
    yield from (path for path in root.iterdir() if path.suffix in ENDINGS)
    yield from stored.datasets(root)


def _dataset(folder: str) -> Any:
    from sae_jax.activations import stored

    _refuse_foreign(folder)
    try:
        return stored.StoredChunks(folder)
    except Refused:
        raise
    except Exception as error:  # as below
        raise Refused("data.path", folder, f"a dataset folder as it was written ({error})") from error


class Dataset(tokens.Rows):
    """A dataset that we wrote, row by row."""

    def __init__(self, folder: str):
        self._chunks = _dataset(folder)
        super().__init__((self._chunks.n_tokens, self._chunks.d_model), np.float32)

    @property
    def known(self) -> bool:
        return bool(self.places(0, 1).sequence_id[0] != tokens.UNKNOWN)

    def take(self, start: int, stop: int) -> np.ndarray:
        found: np.ndarray = self._chunks.tokens(start, stop)
        return found

    def places(self, start: int, stop: int) -> tokens.Places:
        size = self._chunks.rows
        first = start // size
        read = [self._chunks.example(number)[1:] for number in range(first, -(-stop // size))]  # not the activations
        rows = slice(start - first * size, stop - first * size)
        return tokens.Places(*(np.concatenate([row[part] for row in read])[rows] for part in range(3)))


def _of_others(folder: epath.Path) -> bool:
    """Whether a folder holds files of activations itself, or is one of Hugging Face's."""
    from sae_jax.activations import stored

    if (folder / stored.MANIFEST).exists():
        return False
    if containers.is_zarr(Path(folder)):
        return True
    marks = (arrow.STATE, arrow.DICTIONARY)
    return any((folder / mark).exists() for mark in marks) or any(p.suffix in ENDINGS for p in folder.iterdir())


def open_array(path: str) -> Any:
    """The one matrix of floating point numbers at a path; rows are read when they are asked for."""
    where, name, without = split(path)
    try:
        found = _opened(Path(where), where, name)
        return tokens.without(found, without) if without else found
    except Refused:
        raise
    except tokens.Unfit as error:
        raise Refused("data.path", path, str(error)) from error
    except Exception as error:  # readers of damaged files raise what they like
        reason = "" if "pickle" in str(error) else f" ({error})"  # NumPy's advice would be to unpickle
        raise Refused("data.path", path, f"{FORMATS}, complete and without objects{reason}") from error


def _opened(where: Path, pattern: str, name: str) -> Any:
    if where.is_dir() and containers.is_zarr(where):
        return containers.open_file(where, name)
    if where.is_dir():
        _refuse_foreign(str(where))
    if where.is_dir() and any((where / mark).exists() for mark in (arrow.STATE, arrow.DICTIONARY)):
        return arrow.open_folder(where, name)
    if where.is_dir() and _of_others(epath.Path(where)):
        return _joined([path for path in where.iterdir() if path.suffix in ENDINGS], name)
    if where.is_dir():
        return Dataset(str(where))
    if where.is_file():
        return _file(where, name)
    if where.exists():  # the pipe of a shell, say, would be waited on for ever
        raise Refused("data.path", str(where), f"{FORMATS}, not a device or a pipe")
    return _joined([Path(found) for found in glob.glob(pattern)], name)


def _file(path: Path, name: str) -> Any:
    return arrow.open_parquet(path, name) if path.suffix == ".parquet" else containers.open_file(path, name)


def _joined(paths: list[Path], name: str) -> Any:
    """Shards in the order of the numbers in their names: shard_2 before shard_10."""
    paths = sorted((path for path in paths if not containers.is_beside(path)), key=_order)
    kinds = sorted({path.suffix for path in paths})
    if len(kinds) != 1:
        raise tokens.Unfit(f"shards of one kind, not {', '.join(kinds) or 'none'}")
    disk.open_files(2 * len(paths))  # token ids may lie beside each
    parts = []
    for path in paths:
        try:
            parts.append(_file(path, name))
        except tokens.Unfit as error:
            raise tokens.Unfit(f"{error} (in {path.name})") from error
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            most = f"{len(parts)} of {len(paths)} could be opened, under the limit of open files that ulimit -n tells"
            raise tokens.Unfit(f"fewer shards: {most}") from error
    return parts[0] if len(parts) == 1 else tokens.Joined(parts)


def _order(path: Path) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
