"""Activations straight from a model into training: chunks that are computed when they are asked for, nothing stored."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sae_jax.activations import pipeline
from sae_jax.activations.chunks import rows_of
from sae_jax.errors import Refused
from sae_jax.models import adapters, extraction, facts, hooks
from sae_jax.models.sources import Counter


class StreamedChunks:
    """One chunk is one forward pass: its number is all that it depends on, so order, splits, resuming and sharing over
    processes are those of a stored dataset, and what has been forgotten comes back the same.

    The inputs stay in memory (14 bytes a token of text; 0.6 MB an image, so millions of them are better extracted), the
    activations do not. Chunks have to be equally long: tokens that a batch has beyond the shortest one are left out.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, model: ConfigDict, devices: Sequence[jax.Device] = ()):
        facts.check(model, [model.layer])
        facts.check_allowed(model)
        known = facts.find(model)
        if known and known.family == "activations":
            raise Refused("data.model.stream", True, f"False: {model.id} is a file, not a model that runs here")
        self._model, self._network, self._running = model, adapters.load(model, devices=devices), threading.Lock()
        self.devices = list(devices) or jax.local_devices()
        self._batches: list[adapters.Batch] = []
        lengths: list[int] = []
        done = 0
        for batch in self._network.batches():
            if done >= model.n_tokens:
                break
            self._batches.append(batch)
            lengths.append(int(extraction.kept(model, batch).sum()))
            done += lengths[-1]
        if len(lengths) > 1 and lengths[-1] < min(lengths[:-1]):  # the end of the text
            lengths.pop()
        if min(lengths, default=0) == 0:
            raise Refused("data.model.id", model.id, "inputs of which every batch has tokens")
        self._n, self.rows = len(lengths), min(lengths)
        self._firsts = np.cumsum([0, *(len(batch.real) for batch in self._batches)])
        self.n_tokens = self._n * self.rows
        self.d_model = self[0].shape[1]
        described = extraction.described(model, model.layer)
        self.identity = {**described, "tokens": self.n_tokens, "tokens_a_batch": self.rows}

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> np.ndarray:
        with self._running:  # hooks belong to the network, not to a thread
            found = extraction.forward(
                self._network, self._model, self._batches[index], int(self._firsts[index]), [self._model.layer]
            )
        return found[self._model.layer].x[: self.rows].astype(np.float32, copy=False)

    def on_device(self, index: int) -> Float[Array, "rows d"]:
        """A chunk where JAX computed it."""
        model, batch = self._model, self._batches[index]
        assert self._network.compute is not None
        (x,) = self._network.compute(batch, [model.layer], model.hook).values()
        kept = extraction.kept(model, batch)
        places = extraction.places(x.shape, batch, kept, (int(self._firsts[index]), model.layer))
        return _picked(x, jax.device_put(places[: self.rows].astype(np.int32)))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop."""
        return rows_of(self, start, stop)


@jax.jit
def _picked(x: Array, places: Array) -> Array:
    return hooks.flat(x)[places]


# -- on the devices ---------------------------------------------------------------------------------------------------


class DeviceBatches(pipeline.Batches):
    """`Batches` whose rows never leave the devices: the model's, the windows that are shuffled and the batch.

    Each device holds a part of every row while they wait, and its share of the batch in the end.
    """

    def __init__(self, chunks: StreamedChunks, *how: Any):
        self._streamed = chunks
        super().__init__(chunks, *how)

    def _hold(self, count: int) -> None:
        d, mesh = self._streamed.d_model, Mesh(np.array(self._streamed.devices), ("device",))
        waiting = NamedSharding(mesh, PartitionSpec(None, "device" if d % mesh.size == 0 else None))
        size = len(self._lanes) * self._rows_per_lane
        shared = NamedSharding(mesh, PartitionSpec("device" if size % mesh.size == 0 else None))

        @partial(jax.jit, donate_argnums=0, out_shardings=waiting)
        def put(rows: Array, chunk: Array, span: Array) -> Array:
            i, (first, end, at) = jnp.arange(len(chunk)), span
            return rows.at[jnp.where((first <= i) & (i < end), at + i - first, len(rows))].set(chunk, mode="drop")

        @partial(jax.jit, out_shardings=shared)
        def take(rows: Array, source: Array, mask: Array, batch: Array) -> Array:
            return jnp.where(mask[:, None], rows[source], batch)

        self._put_rows, self._take = put, take
        self._rows = jax.jit(lambda: jnp.zeros((count, d), float), out_shardings=waiting)()
        self._empty = jax.jit(lambda: jnp.zeros((size, d), float), out_shardings=shared)()

    def _put(self, number: int, first: int, end: int, at: int) -> None:
        chunk = self._streamed.on_device(number)
        self._rows = self._put_rows(self._rows, chunk, jax.device_put(np.array([first, end, at], np.int32)))

    def __getitem__(self, index: int) -> Float[Array, "B d"]:  # type: ignore[override]  # one at a time, of JAX
        """Batch number `index`, (batch, d_model), spread over the local devices."""
        found = [self._stretches(lane, index * self._rows_per_lane) for lane in self._lanes]
        batch, done = self._empty, np.zeros(len(found), int)
        for turn in range(max(map(len, found))):  # a lane goes on to its next window once this one's rows are taken
            source = np.zeros((len(found), self._rows_per_lane), np.int32)
            mask = np.zeros(source.shape, bool)
            for slot, stretches in enumerate(found):
                if turn < len(stretches):
                    epoch, low, high, start, count = stretches[turn]
                    self._read(slot, epoch, low, high)
                    here = slice(done[slot], done[slot] + count)
                    source[slot, here] = self._order[slot, start - low : start - low + count]
                    mask[slot, here], done[slot] = True, done[slot] + count
            batch = self._take(self._rows, *jax.device_put((source.ravel(), mask.ravel())), batch)
        return batch


def batches(
    chunks: StreamedChunks, train: np.ndarray, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> "Stream":
    """As `pipeline.batches`, on the devices."""
    order = pipeline.order(len(train), seed)
    return Stream(DeviceBatches(chunks, order, train, batch_size, seed, process, processes))


class Stream(Counter):
    """Endless iterator over batches. What is asked of the devices is only begun: they have the next batch to work on
    while a step is under way."""

    def __init__(self, batches: DeviceBatches):
        super().__init__(0)
        self._batches = batches

    def __next__(self) -> Array:
        return self._batches[int(super().__next__())]
