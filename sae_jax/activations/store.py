"""Activations on disk: a TFDS dataset (ArrayRecord, no TensorFlow) whose examples are chunks of consecutive tokens.

One example: `x` (chunk, d_model) float32 and, for every row, `token_id`, `sequence_id` and `position`. Which model,
layer and text they come from stands in the dataset's metadata. A dataset that is not finished is never visible.
"""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from sae_jax.activations.pipeline import CHUNK
from sae_jax.errors import Refused

SPLIT = "tokens"


class Rows(NamedTuple):
    """Activations of some tokens, and where each comes from."""

    x: np.ndarray  # (rows, d_model) float32
    token_id: np.ndarray  # (rows,)
    sequence_id: np.ndarray  # (rows,)
    position: np.ndarray  # (rows,) in its sequence


class Activations(tfds.core.GeneratorBasedBuilder):
    """One model and layer, as a dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, dataset: str, d_model: int, rows: Iterable[Rows], facts: dict[str, Any], data_dir: str):
        self._d_model, self._rows, self._facts = d_model, rows, facts
        super().__init__(config=tfds.core.BuilderConfig(name=dataset), data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        row = tfds.features.Tensor(shape=(CHUNK,), dtype=np.int32, encoding=tfds.features.Encoding.BYTES)
        x = tfds.features.Tensor(
            shape=(CHUNK, self._d_model), dtype=np.float32, encoding=tfds.features.Encoding.BYTES
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Activations of one layer, in chunks of consecutive tokens.",
            features=tfds.features.FeaturesDict({"x": x, "token_id": row, "sequence_id": row, "position": row}),
            metadata=tfds.core.MetadataDict(self._facts),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        held: Rows | None = None
        number = 0
        for rows in self._rows:
            held = rows if held is None else Rows(*(np.concatenate(pair) for pair in zip(held, rows, strict=True)))
            while len(held.x) >= CHUNK:
                yield number, {name: part[:CHUNK] for name, part in held._asdict().items()}
                held, number = Rows(*(part[CHUNK:] for part in held)), number + 1


def write(data_dir: str, dataset: str, d_model: int, rows: Iterable[Rows], facts: dict[str, Any]) -> str:
    """Writes a dataset and returns its folder. A last incomplete chunk (under 256 tokens) is left out."""
    tfds.disable_progress_bar()
    builder = Activations(dataset=dataset, d_model=d_model, rows=rows, facts=facts, data_dir=data_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads; there are none
        builder.download_and_prepare()
    return str(builder.data_path)


def find(data_dir: str, dataset: str) -> str | None:
    """The folder of a finished dataset, if there is one."""
    folder = epath.Path(data_dir) / "activations" / dataset / str(Activations.VERSION)
    return str(folder) if (folder / "dataset_info.json").exists() else None


class StoredChunks:
    """Reads a dataset folder chunk by chunk."""

    def __init__(self, folder: str):
        if not (epath.Path(folder) / "dataset_info.json").exists():
            raise Refused("data.path", folder, "a dataset folder (one with a dataset_info.json) or a .npy file")
        builder = tfds.builder_from_directory(folder)
        self._source = builder.as_data_source(split=SPLIT)
        shape: tuple[int, int] = builder.info.features["x"].shape
        self.rows, self.d_model = shape
        self.n_tokens = len(self._source) * self.rows
        facts = json.loads(json.dumps(dict(builder.info.metadata or {})))
        self.identity = {"path": str(folder), "tokens": self.n_tokens, **facts}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._source[int(index)]["x"]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop."""
        first, stop = start // self.rows, min(stop, self.n_tokens)
        blocks = [self[number] for number in range(first, -(-stop // self.rows))]
        return np.concatenate(blocks)[start - first * self.rows : stop - first * self.rows]
