"""Writes a dataset of activations, as `stored.py` describes and reads it.

Until it is finished a dataset lies in FOLDER.partial; killed at any moment, writing goes on after its last whole shard,
and ends with the same bytes as if it had not been killed.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from sae_jax.activations import tokens
from sae_jax.activations.chunks import CHUNK
from sae_jax.activations.stored import (
    MANIFEST,
    NAME,
    SPLIT,
    STORED,
    VERSION,
    Rows,
    decode,
    encode,
    features_of,
    find,
    folder_of,
    head_of,
    read_manifest,
    seal,
    sha256,
    template,
)  # fmt: skip
from sae_jax.errors import Refused, RunFailed
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers import rounding
from sae_jax.outliers.moments import Moments, Severity
from sae_jax.runtime.disk import LOCK, sole_user, unwritable, write_bytes
from sae_jax.runtime.stopping import StopRequest

SHARD_BYTES = 128 * 2**20


class Writer:
    """One dataset in the making.

    Args:
      folder: where it will lie once it is finished.
      facts: what it is; goes into the manifest. A half-written dataset with other facts is thrown away.
      dtype: one of `STORED`.
      chunk: tokens an example.
    """

    def __init__(
        self, folder: epath.Path, d_model: int, facts: dict[str, Any], dtype: str = "float32", chunk: int = CHUNK
    ):
        self.folder, self._partial = folder, folder.parent / (folder.name + ".partial")
        self._dtype, self._chunk = dtype, chunk
        self._features = features_of(d_model, dtype, chunk)
        self._serialise = tfds.core.example_serializer.ExampleSerializer(self._features.get_serialized_info())
        self._chunks_per_shard = max(1, SHARD_BYTES // (chunk * d_model * np.dtype(STORED[dtype]).itemsize))
        self._facts = _as_kept(facts, d_model, dtype, chunk)
        self._severity: Severity | None = None
        self._manifest: dict[str, Any] = {"facts": self._facts, "shards": []}
        self._buffer: list[Rows] = []
        self._held = 0
        if (self._partial / MANIFEST).exists():
            found = read_manifest("--out", self._partial)
            if found["facts"] == self._facts:
                self._manifest, self._severity = found, _severity_from(found.get("moments"))
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable("--out", str(self._partial), error) from error

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing the same dataset."""
        return sole_user(self._partial, "--out")

    @property
    def n_tokens(self) -> int:
        """Tokens in whole shards: where the rows have to go on after a restart."""
        return self._chunk * sum(shard["chunks"] for shard in self._manifest["shards"])

    def add(self, start: int, rows: Rows) -> None:
        """Rows of which the first is token number `start`; those that are on disk already are passed over."""
        rows = rows.cut(max(0, self.n_tokens + self._held - start))
        if not len(rows.x):
            return
        self._buffer.append(rows)
        self._held += len(rows.x)
        size = self._chunks_per_shard * self._chunk
        while self._held >= size:
            joined = self._joined()
            self._write_shard(joined.cut(0, size))
            self._buffer, self._held = [joined.cut(size)], self._held - size

    def _joined(self) -> Rows:
        return Rows(*map(np.concatenate, zip(*self._buffer, strict=True)))

    def _write_shard(self, rows: Rows) -> None:
        number, n_chunks = len(self._manifest["shards"]), len(rows.x) // self._chunk
        x = np.ascontiguousarray(rows.x[: n_chunks * self._chunk], np.float32)
        if not np.isfinite(x).all():
            raise RunFailed(f"token {self.n_tokens + int(np.argwhere(~np.isfinite(x))[0][0])}: activations not finite")
        seen = moments_lib.severity(np.array_split(x, -(-len(x) // 4096)))
        self._severity = seen if self._severity is None else Severity(*map(moments_lib.merge, self._severity, seen))
        if self._dtype == "bfloat16" and not self._manifest["shards"]:
            for warning in rounding.warnings(seen.raw, 8):
                print(f"sae_jax: beware: {warning}", file=sys.stderr)
        if self._dtype == "float16" and "center" not in self._manifest:
            sigma = seen.raw.sigma
            self._manifest["center"] = seen.raw.mean.astype(np.float32).tolist()
            self._manifest["scale"] = np.where(sigma > 0, sigma, 1).astype(np.float32).tolist()
        kept = encode(x, self._dtype, self._manifest)
        self._check_kept(x, kept, seen.raw)
        path = template(self._partial).sharded_filepath(shard_index=number, num_shards=None)
        # Compression saves 7 % of the space of float32 and makes reading three times slower.
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        try:
            for start in range(0, n_chunks * self._chunk, self._chunk):
                part = rows._replace(x=kept).cut(start, start + self._chunk)
                example = {name: values if name == "x" else values.astype(np.int32)
                           for name, values in part._asdict().items()}  # fmt: skip
                record = self._serialise.get_tf_example(self._features.encode_example(example))
                writer.write(record.SerializeToString(deterministic=True))  # the same bytes in every process
            writer.close()
        except RuntimeError as error:  # what array_record makes of a full disk
            raise OSError(error) from error
        data = path.read_bytes()
        shard = {
            "chunks": n_chunks, "bytes": len(data), "head": head_of(data), "sha256": sha256(data),
        }  # fmt: skip
        self._manifest["shards"].append(shard)
        self._manifest["moments"] = _severity_to(self._severity)
        # The shard counts from here on: killed before, the next run writes it again.
        self._write_manifest()

    def _check_kept(self, x: np.ndarray, kept: np.ndarray, seen: Moments) -> None:
        """Refuses to keep a dimension that has come to vary so much, or so little, since the first shard that z-scored
        float16 would clip it, or lose what float16 holds of the numbers as they are."""
        if self._dtype != "float16":
            return
        error = np.sqrt(np.mean((decode(kept, "float16", self._manifest) - x.astype(np.float64)) ** 2, axis=0))
        lost = error > np.maximum(seen.sigma * 2**-6, np.abs(seen.mean) * 2**-10)
        if lost.any():
            worst = int(np.argmax(np.where(lost, error / np.maximum(seen.sigma, 1e-30), 0)))
            raise RunFailed(
                f"tokens {self.n_tokens} to {self.n_tokens + len(x)}: dimension {worst} varies by "
                f"{seen.sigma[worst]:.3g} here, by {self._manifest['scale'][worst]:.3g} in the first shard, by which "
                f"float16 is z-scored: {error[worst]:.3g} of it would be lost; dtype bfloat16 or float32 keeps it"
            )

    def _write_manifest(self) -> None:
        write_bytes(self._partial / MANIFEST, seal(self._manifest))

    def finish(self) -> str:
        """Writes what is left in whole chunks, then makes the dataset visible. Returns its folder."""
        dropped = self._held % self._chunk
        if self._held >= self._chunk:
            self._write_shard(self._joined())
        if not self._manifest["shards"] or self._severity is None:
            raise RunFailed(f"fewer than {self._chunk} tokens: nothing to store")
        self._manifest |= {"n_tokens": self.n_tokens, "dropped_tokens": dropped, **self._severity.gammas()}
        self._write_manifest()
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=NAME, version=tfds.core.Version(VERSION), data_dir=str(self._partial), module_name=__name__,
            config_name=self.folder.parent.name,
        )  # fmt: skip
        info = tfds.core.DatasetInfo(
            builder=identity, description="Activations of one layer, in chunks of consecutive tokens.",
            features=self._features, disable_shuffling=True,
        )  # fmt: skip
        info.set_file_format("array_record")
        shards = self._manifest["shards"]
        info.set_splits(tfds.core.SplitDict([tfds.core.SplitInfo(
            name=SPLIT, shard_lengths=[shard["chunks"] for shard in shards],
            num_bytes=sum(shard["bytes"] for shard in shards), filename_template=template(self._partial),
        )]))  # fmt: skip
        info.write_to_directory(self._partial)
        for path in self._partial.glob(f"{NAME}-{SPLIT}.array_record-*"):  # of something else, begun here before
            if int(path.name.rpartition("-")[2]) >= len(shards):
                path.unlink()
        (self._partial / LOCK).unlink(missing_ok=True)
        self._partial.rename(self.folder)
        return str(self.folder)


def _as_kept(facts: dict[str, Any], d_model: int, dtype: str, chunk: int) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(json.dumps({**facts, "d_model": d_model, "dtype": dtype, "chunk": chunk}))
    return kept


def _severity_to(severity: Severity) -> dict[str, Any]:
    return {
        view: {"n_tokens": m.n_tokens, "mean": m.mean.tolist(), "square": m.square.tolist()}
        for view, m in severity._asdict().items()
    }


def _severity_from(found: dict[str, Any] | None) -> Severity | None:
    if found is None:
        return None
    return Severity(*(
        Moments(found[view]["n_tokens"], np.asarray(found[view]["mean"]), np.asarray(found[view]["square"]))
        for view in Severity._fields
    ))


def write(
    writers: dict[int, Writer], rows: Callable[[int], Iterable[tuple[int, dict[int, Rows]]]]
) -> dict[int, str]:
    """Fills several datasets (a layer each) from one stream, going on where they were. Returns their folders.

    Args:
      rows: of a number of tokens to pass over: yields the number of a first token and the rows from it on, by layer.

    Raises:
      RunFailed: activations are not finite, or the disk is full; whole shards stay, and the next run goes on.
    """
    try:
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            for writer in writers.values():
                stack.enter_context(writer.alone())
            for start, parts in rows(min(writer.n_tokens for writer in writers.values())):
                for layer, part in parts.items():
                    writers[layer].add(start, part)
                if stop.requested():
                    raise stop.stopped(f"after token {start}, with every whole shard kept")
            return {layer: writer.finish() for layer, writer in writers.items()}
    except OSError as error:
        raise RunFailed(f"cannot write activations ({error}); shards that are complete stay") from error


def import_file(path: str, data_dir: str, dtype: str = "float32") -> str:
    """A dataset from a file of activations, in the same chunks in which the file itself would be read.

    Where the file does not tell where rows come from, token_id and sequence_id are −1, position the number of the row.
    What was imported before, of the same file, is left as it is.
    """
    from sae_jax.activations import files

    if not files.exists(path):
        raise Refused("--from", path, f"nothing is there. Taken are {files.FORMATS}{files.there(epath.Path(path))}")
    given = files.open_array(path)
    array = files.chunks_of(given, path)
    facts = {"imported": array.identity | getattr(given, "facts", {})}
    where, *parts = files.split(path)
    name = re.sub(r"[^\w.-]+", "_", "_".join(filter(None, (epath.Path(where).stem, *parts)))) or "activations"
    folder = folder_of(data_dir, name)
    if find(data_dir, name):
        held = read_manifest("--out", folder)["facts"]
        wanted = _as_kept(facts, array.d_model, dtype, array.rows)
        for imported in (held.get("imported", {}), wanted["imported"]):
            imported.pop("path", None)  # which may be written in several ways
        if held != wanted:
            raise Refused("--out", str(folder), "a dataset that is not there yet, or this very one")
        return str(folder)
    array.check()

    def rows(start: int) -> Iterator[tuple[int, dict[int, Rows]]]:
        for first in range(start, array.n_tokens, 4096):
            x = array.tokens(first, first + 4096).astype(np.float32)
            yield first, {0: Rows(x, *tokens.places(given, first, first + len(x)))}

    writer = Writer(folder, array.d_model, facts, dtype, array.rows)
    return write({0: writer}, rows)[0]
