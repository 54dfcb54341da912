"""A stored dataset of activations, read: TFDS ArrayRecord shards whose examples are chunks of consecutive tokens.

One example: `x` (chunk, d_model) and, for every row, `token_id`, `sequence_id` and `position`. `activations.json`
beside the shards says which model, layer and text they come from, how numbers are kept, the moments, and each shard's
size and checksum.
"""

import contextlib
import functools
import hashlib
import json
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from sae_jax.activations.chunks import rows_of
from sae_jax.errors import Refused, RunFailed
from sae_jax.runtime.disk import read_json

NAME, SPLIT, VERSION = "activations", "tokens", "2.0.0"
MANIFEST = "activations.json"
HEAD_BYTES = 2**16  # of a shard, looked at when a dataset is opened: no two extractions begin alike
OPEN = 32  # shards open at a time: an open one keeps the chunk that was read last
ZEROS = 64 * "0"  # in place of a manifest's checksum while it is computed
UNSEALED = {  # what manifests hold besides it
    "facts", "shards", "center", "scale", "moments", "n_tokens", "dropped_tokens", "gamma", "gamma_raw",
    "gamma_direction",
}  # fmt: skip
# How numbers are kept: as they are; as their upper 16 bits; z-scored with the mean and deviation of the first shard.
STORED = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


class Rows(NamedTuple):
    """Activations of some tokens, and where each comes from."""

    x: np.ndarray  # (rows, d_model) float32
    token_id: np.ndarray  # (rows,)
    sequence_id: np.ndarray  # (rows,)
    position: np.ndarray  # (rows,) in its sequence

    def cut(self, start: int, stop: int | None = None) -> "Rows":
        """Some of the rows."""
        return Rows(*(part[start:stop] for part in self))


def folder_of(data_dir: str, dataset: str) -> epath.Path:
    """Where a dataset lies once it is finished."""
    return epath.Path(data_dir) / NAME / dataset / VERSION


def find(data_dir: str, dataset: str) -> str | None:
    """The folder of a finished dataset, if there is one."""
    folder = folder_of(data_dir, dataset)
    return str(folder) if (folder / MANIFEST).exists() else None


def datasets(root: epath.Path) -> list[str]:
    """Folders of finished datasets at most three levels below a folder, or in it."""
    patterns = ("", "*/", "*/*/", "*/*/*/")
    found = [path.parent for pattern in patterns for path in root.glob(f"{pattern}{MANIFEST}")]
    return sorted(str(folder) for folder in found if folder.name == VERSION)


def features_of(d_model: int, dtype: str, rows: int) -> tfds.features.FeaturesDict:
    """What an example holds, as TFDS writes and parses it."""
    def tensor(shape: tuple[int, ...], kind: Any) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=kind, encoding=tfds.features.Encoding.BYTES)

    row = tensor((rows,), np.int32)
    return tfds.features.FeaturesDict(
        {"x": tensor((rows, d_model), STORED[dtype]), "token_id": row, "sequence_id": row, "position": row}
    )


def sha256(data: bytes) -> str:
    """The checksum that manifests hold."""
    return hashlib.sha256(data).hexdigest()


def head_of(data: bytes) -> str:
    """The checksum of a shard's beginning."""
    return sha256(data[:HEAD_BYTES])


def template(folder: epath.Path) -> tfds.core.ShardedFileTemplate:
    """How shards are named."""
    return tfds.core.ShardedFileTemplate(
        dataset_name=NAME, data_dir=folder, split=SPLIT, filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )  # fmt: skip


def encode(x: np.ndarray, dtype: str, manifest: dict[str, Any]) -> np.ndarray:
    """Activations as they are kept."""
    if dtype == "float16":
        z = (x - np.asarray(manifest["center"], np.float32)) / np.asarray(manifest["scale"], np.float32)
        return np.clip(z, -65504, 65504).astype(np.float16)
    return x.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "bfloat16" else x


def decode(kept: np.ndarray, dtype: str, manifest: dict[str, Any]) -> np.ndarray:
    """And back, float32."""
    if dtype == "float16":
        scale, center = (np.asarray(manifest[key], np.float32) for key in ("scale", "center"))
        return kept.astype(np.float32) * scale + center
    return kept.view(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else kept


def seal(manifest: dict[str, Any]) -> bytes:
    """activations.json as it is written: its last 64 digits are the checksum of all its bytes, with zeros for those."""
    blank = json.dumps({**manifest, "checksum": ZEROS}).encode()
    return blank[:-66] + sha256(blank).encode() + blank[-2:]


def read_manifest(field: str, folder: epath.Path) -> dict[str, Any]:
    """activations.json, refused if a bit of it is not as it was written."""
    path = folder / MANIFEST
    found, data = read_json(field, path, ("facts", "shards")), path.read_bytes()
    if "checksum" in found:
        said = found.pop("checksum")
        meant = json.dumps(found, sort_keys=True).encode()  # what the checksums of datasets of before cover
        right = said in (sha256(data[:-66] + ZEROS.encode() + data[-2:]), sha256(meant))
    else:  # older still, unless the name of the checksum is what was damaged
        right = found.keys() <= UNSEALED
    if not right:
        raise Refused(field, str(path), "a file as it was written; this one's checksum is another")
    return found


def _head_of_x(features: tfds.features.FeaturesDict) -> bytes:
    """What stands before the numbers of `x` in a record: its name and its size."""
    zeros = np.zeros(features["x"].shape, features["x"].np_dtype)
    serialise = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    alone = serialise.get_tf_example(features.encode_example({"x": zeros})).features.SerializeToString()
    return bytes(alone[: len(alone) - zeros.nbytes])


class StoredChunks:
    """Reads a dataset folder chunk by chunk.

    Raises:
      Refused: it is no dataset, or a shard is missing or of another size than the manifest says.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, folder: str):
        root = epath.Path(folder)
        if not (root / MANIFEST).exists():
            inside = datasets(root)
            there = f"; there is {', '.join(inside[:5])}" if inside else ""
            raise Refused("data.path", folder, f"a dataset folder (one with {MANIFEST}) or a .npy file{there}")
        self._root, self._manifest = root, read_manifest("data.path", root)
        self._shards = self._manifest["shards"]
        for number, shard in enumerate(self._shards):
            path = self._path(number)
            size = path.stat().length if path.exists() else None
            if size != shard["bytes"]:
                raise Refused("data.path", str(path), f"a shard of {shard['bytes']} bytes, not {size or 'none'}")
            with path.open("rb") as file:
                if head_of(file.read(HEAD_BYTES)) != shard["head"]:
                    raise Refused("data.path", str(path), f"the shard that {MANIFEST} describes, not one of other data")
        facts = self._manifest["facts"]
        self._dtype, self.rows, self.d_model = facts["dtype"], facts["chunk"], facts["d_model"]
        # What TFDS would make of features.json it would import by name, from a folder that may be anybody's.
        self._features = features_of(self.d_model, self._dtype, self.rows)
        self._x = tfds.features.FeaturesDict({"x": self._features["x"]})
        self._head = _head_of_x(self._x)
        self._ends = np.cumsum([shard["chunks"] for shard in self._shards])
        self._reader = functools.lru_cache(OPEN)(self._open)
        try:
            for number, shard in enumerate(self._shards):
                if (found := self._reader(number).num_records()) != shard["chunks"]:
                    raise ValueError(f"{found} chunks in {self._path(number)}, not {shard['chunks']}")
        except Exception as error:  # as in `example`
            names = ", ".join(self.damaged()) or "none of those by their checksums"
            raise Refused("data.path", folder, f"shards as they were written; damaged: {names} ({error})") from error
        self.n_tokens: int = self._manifest["n_tokens"]
        checksum = sha256("".join(shard["sha256"] for shard in self._shards).encode())
        self.identity = {"path": str(folder), "tokens": self.n_tokens, "sha256": checksum, **facts}

    def _path(self, number: int) -> epath.Path:
        return template(self._root).sharded_filepath(shard_index=number, num_shards=None)

    def _open(self, number: int) -> Any:
        # Chunks come in random order, so nothing is read ahead. Threads may share a reader.
        return array_record_module.ArrayRecordReader(
            str(self._path(number)), options="readahead_buffer_size:0", file_reader_buffer_size=2**15
        )

    def _record(self, index: int) -> bytes:
        number = int(np.searchsorted(self._ends, index, side="right"))
        record: bytes = self._reader(number).read([index - int(self._ends[number]) + self._shards[number]["chunks"]])[0]
        return record

    def __len__(self) -> int:
        return int(self._ends[-1])

    def example(self, index: int) -> Rows:
        """One chunk, with where each row comes from."""
        found = self._read(index, self._features)
        return Rows(decode(found["x"], self._dtype, self._manifest), *(found[name] for name in Rows._fields[1:]))

    def _read(self, index: int, features: tfds.features.FeaturesDict) -> dict[str, np.ndarray]:
        try:
            return self._example(self._record(int(index)), features)
        except Exception as error:  # the reader of a damaged file raises what it likes
            raise RunFailed(f"chunk {index} cannot be read: {self._culprit(int(index))} ({error})") from error

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self._read(index, self._x)["x"], self._dtype, self._manifest)

    def _example(self, record: bytes, features: tfds.features.FeaturesDict) -> dict[str, np.ndarray]:
        """Parsed; `x` alone, which stands last in a record, is taken from where it lies: parsing copies it twice."""
        size = np.dtype(STORED[self._dtype]).itemsize * self.rows * self.d_model
        if features is self._x and record[: len(record) - size].endswith(self._head):
            x = np.frombuffer(record, STORED[self._dtype], self.rows * self.d_model, len(record) - size)
            return {"x": x.reshape(self.rows, self.d_model)}
        found: dict[str, np.ndarray] = features.deserialize_example_np(record)
        return found

    def _intact(self, number: int) -> bool:
        return sha256(self._path(number).read_bytes()) == self._shards[number]["sha256"]

    def _culprit(self, index: int) -> str:
        number = int(np.searchsorted(self._ends, index, side="right"))
        path = self._path(number)
        with contextlib.suppress(OSError):
            if self._intact(number):
                return f"{path} (its checksum is right)"
        return f"{path} is damaged: its checksum is not the one in {MANIFEST}"

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop."""
        return rows_of(self, start, stop)

    def damaged(self) -> list[str]:
        """Shards whose checksum is not the recorded one; reads everything."""
        return [str(self._path(number)) for number in range(len(self._shards)) if not self._intact(number)]
