"""Activations straight from a model into training: chunks that are computed when they are asked for, nothing stored."""

import threading

import numpy as np
from ml_collections import ConfigDict

from sae_jax.activations.chunks import rows_of
from sae_jax.errors import Refused
from sae_jax.models import adapters, extraction, facts


class StreamedChunks:
    """One chunk is one forward pass: its number is all that it depends on, so order, splits, resuming and sharing over
    processes are those of a stored dataset, and what has been forgotten comes back the same.

    The inputs stay in memory (4 to 8 bytes a token of text; pixels), the activations do not. Chunks have to be equally
    long: tokens that a batch has beyond the shortest one are left out.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, model: ConfigDict):
        facts.check(model, [model.layer])
        facts.check_allowed(model)
        known = facts.find(model)
        if known and known.family == "activations":
            raise Refused("data.model.stream", True, f"False: {model.id} is a file, not a model that runs here")
        self._model, self._network, self._running = model, adapters.load(model), threading.Lock()
        self._batches: list[adapters.Batch] = []
        lengths: list[int] = []
        for batch in self._network.batches():
            if sum(lengths) >= model.n_tokens:
                break
            self._batches.append(batch)
            lengths.append(int(extraction.kept(model, batch).sum()))
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

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop."""
        return rows_of(self, start, stop)
