"""Where batches come from: made on the device, or read from stored activations. Both answer the same questions."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from math import gcd
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.activations import arrow, files, synthetic, tokens
from sae_jax.activations.chunks import LANES, ArrayChunks, Chunks, read, split_chunks, spread
from sae_jax.errors import Refused, RunFailed
from sae_jax.runtime import memory
from sae_jax.runtime.devices import Part, own_part
from sae_jax.runtime.disk import HELD_OUT

STATISTICS = 2000  # synthetic tokens made at a time for statistics


class Source(Protocol):
    """A stream of training tokens, a held-out set and a sample for statistics, all of width d_model."""

    d_model: int
    n_eval_tokens: int
    n_train_tokens: int | None  # None: as many as are asked for
    truth: Float[Array, "m d"] | None  # true features, where they are known
    identity: dict[str, Any]  # what data this is, for reports
    split_axis: int | None  # axis of a batch's input to share out over devices; None: all devices get it whole

    def train(self, start: int) -> Any:
        """Iterator over the inputs of training batches from number `start`; has `get_state` and `close`."""

    def held_out(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Inputs of the held-out batches, each with the valid-row mask of this process's share."""

    def statistics(self) -> Iterator[np.ndarray]:
        """Training tokens to take moments of, (rows, d_model) at a time; a fresh iterator each call."""

    def mean_shift(self, member: ConfigDict) -> np.ndarray:
        """What a member of another data.gamma has its tokens moved by, (d_model,)."""

    def tokens(self, split: str, given: Array, rows: Int[Array, "B"]) -> Float[Array, "B d"]:
        """What an input stands for, inside the compiled program; `rows` are this device's rows of the batch."""


def open_source(
    config: ConfigDict, fits: Callable[[int], None] = lambda d_model: None, evenly: bool = False,
    part: Part | None = None,
) -> Source:  # fmt: skip
    """The source that `config.data` names; refuses what cannot be read. Models are extracted (or found) first.

    Args:
      fits: called with d_model as soon as that is known, before all that takes time or memory; may refuse.
      evenly: held-out chunks are evenly spaced, as in runs of before.
      part: what this process reads of every batch; not given: an equal share of its own.
    """
    if config.data.path:
        chunks = files.open_chunks(config.data.path)
        fits(chunks.d_model)
        model = config.data.model.id
        if model and chunks.identity.get("id") != model and jax.process_index() == 0:
            print(f"sae_jax: beware: data.path is read; data.model.id = {model!r} is not run", file=sys.stderr)
        if isinstance(chunks, ArrayChunks):  # what we wrote ourselves has been looked at
            chunks.check()
            if chunks.unpacked > arrow.DECODED and jax.process_index() == 0:
                print(
                    f"sae_jax: beware: of {config.data.path} every batch unpacks whole row groups; as a dataset, by "
                    f"sae_jax extract --from={config.data.path} --out=FOLDER, it is read in place", file=sys.stderr
                )  # fmt: skip
        return StoredSource(config, chunks, evenly=evenly, part=part)
    if config.data.model.id:
        from sae_jax.models import extraction, facts

        if width := facts.width(config.data.model):
            fits(width)
        devices = jax.local_devices()[: config.train.devices or None]
        if config.data.model.stream:
            from sae_jax.models import streaming

            streamed = streaming.StreamedChunks(config.data.model, devices)
            fits(streamed.d_model)
            batches = streaming.batches if config.data.model.backend == "jax" else None
            return StoredSource(config, streamed, cache(streamed.__getitem__), evenly, batches, part)
        chunks = files.open_chunks(extraction.extracted(config.data.model, devices))
        fits(chunks.d_model)
        return StoredSource(config, chunks, evenly=evenly, part=part)
    _check_truth(config)
    fits(config.data.d_model)
    return SyntheticSource(config, part)


def _check_truth(config: ConfigDict) -> None:
    """Refuses more true features than there is memory for: they, and a number for each of them for every token."""
    d, m = config.data.d_model, config.data.n_true_features
    train, held_out = config.train.batch_size, config.eval.batch_size

    def need(m: int, train: int, held_out: int) -> float:
        return 4.0 * m * (2 * d + 2 * max(train, held_out, STATISTICS))

    if config.data.signal == "sparse":
        memory.check(
            "true features, and a draw of each for every token,",
            memory.Choice("data.n_true_features", m, lambda m: need(m, train, held_out)),
            memory.Choice("train.batch_size", train, lambda rows: need(m, rows, held_out)),
            memory.Choice("eval.batch_size", held_out, lambda rows: need(m, train, rows)),
        )


class SyntheticSource:
    """Batches made on the device; an input is just the number of the batch."""

    split_axis: int | None = None
    n_train_tokens: int | None = None

    def __init__(self, config: ConfigDict, part: Part | None = None):
        self._part = part or own_part()
        self._spec = synthetic.build(config.data, config.seed)
        self._sample = jax.jit(synthetic.sample)
        self._eval_batch = config.eval.batch_size
        self._n_statistics = config.data.statistics_tokens
        self._gamma = config.data.gamma
        self.d_model = config.data.d_model
        self.n_eval_tokens = config.eval.n_tokens
        self.truth = self._spec.rows if self._spec.signal == "sparse" else None
        self.identity = {"signal": self._spec.signal, "gamma": config.data.gamma, "seed": config.seed}

    def train(self, start: int) -> "Counter":
        return Counter(start)

    def held_out(self) -> Iterator[tuple[Any, np.ndarray]]:
        for number, done in enumerate(range(0, self.n_eval_tokens, self._eval_batch)):
            valid = np.arange(self._eval_batch) < self.n_eval_tokens - done
            yield np.int32(number), valid[self._part.rows(self._eval_batch)]

    def statistics(self) -> Iterator[np.ndarray]:
        for number, done in enumerate(range(0, self._n_statistics, STATISTICS)):
            rows = jnp.arange(min(STATISTICS, self._n_statistics - done))
            yield np.asarray(self._sample(self._spec, synthetic.SPLITS["statistics"], number, rows))

    def mean_shift(self, member: ConfigDict) -> np.ndarray:
        more: np.ndarray = (member.data.gamma - self._gamma) * np.sqrt(self.d_model) * np.asarray(self._spec.direction)
        return more

    def tokens(self, split: str, given: Array, rows: Int[Array, "B"]) -> Float[Array, "B d"]:
        return synthetic.sample(self._spec, synthetic.SPLITS[split], given, rows)


class Counter:
    """An iterator over the numbers of batches with the interface of a grain iterator."""

    def __init__(self, start: int):
        self._next = start

    def __next__(self) -> Any:
        self._next += 1
        return np.int32(self._next - 1)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["next_index"]

    def close(self) -> None:
        """Nothing is open."""


class StoredSource:
    """Batches read from chunks of activations; an input is the rows themselves.

    Args:
      again: how the chunks are read that are needed more than once, for statistics and evaluation; where chunks are
        computed it keeps them.
      evenly, part: as of `open_source`.
      batches: what makes training batches of them; not given: `pipeline.batches`.
    """

    split_axis: int | None = 0
    truth: Float[Array, "m d"] | None = None

    def __init__(
        self, config: ConfigDict, chunks: Chunks, again: Callable[[int], np.ndarray] | None = None,
        evenly: bool = False, batches: Callable[..., Any] | None = None, part: Part | None = None,
    ):  # fmt: skip
        self._chunks, self._config, self._again = chunks, config, again or chunks.__getitem__
        self._batches, self._part = batches, part or own_part()
        if gcd(LANES, config.train.batch_size) % self._part.of:
            allowed = f"a multiple of the {self._part.of} parts that processes read, which have to divide {LANES}"
            raise Refused("train.batch_size", config.train.batch_size, allowed)
        n_tokens = len(chunks) * chunks.rows
        self.n_eval_tokens = min(config.eval.n_tokens, n_tokens // 5)
        if self.n_eval_tokens < 1 or n_tokens - self.n_eval_tokens < 2:
            raise Refused("data.path", config.data.path, f"at least 5 tokens to train and evaluate on, not {n_tokens}")
        n_held_out = -(-self.n_eval_tokens // chunks.rows)
        self._train, self._held_out = split_chunks(len(chunks), n_held_out, evenly)
        self.n_train_tokens: int | None = len(self._train) * chunks.rows
        self.d_model = chunks.d_model
        self._evenly = evenly
        self.identity = chunks.identity | ({} if evenly else {HELD_OUT: "drawn"})

    def train(self, start: int) -> Any:
        from sae_jax.activations import pipeline  # and with it grain, which nothing but training waits for

        iterator = (self._batches or pipeline.batches)(
            self._chunks, self._train, self._config.train.batch_size, self._config.seed,
            *self._part,
        )  # fmt: skip
        iterator.set_state({"next_index": start})
        return iterator

    def held_out(self) -> Iterator[tuple[Any, np.ndarray]]:
        size = self._config.eval.batch_size
        mine = self._part.rows(size)
        for x in read(self._again, self._held_out, size, self.n_eval_tokens):
            padding = ((0, size - len(x)), (0, 0))
            yield np.pad(x, padding)[mine], (np.arange(size) < len(x))[mine]

    def statistics(self) -> Iterator[np.ndarray]:
        wanted = min(self._config.data.statistics_tokens, len(self._train) * self._chunks.rows)
        n_chunks = -(-wanted // self._chunks.rows)
        chosen = np.arange(n_chunks) * len(self._train) // n_chunks
        spaced = self._train[chosen if self._evenly else spread(len(self._train), n_chunks)]
        return read(self._again, spaced, 4096, wanted)

    def mean_shift(self, member: ConfigDict) -> np.ndarray:
        return np.zeros(self.d_model)

    def tokens(self, split: str, given: Array, rows: Int[Array, "B"]) -> Float[Array, "B d"]:
        return given.astype(jnp.zeros(()).dtype)


# -- the same tokens, to be gone through in order --------------------------------------------------------------------

BATCH = 4096  # tokens at a time


class Tokens(NamedTuple):
    """Activations that can be gone through more than once."""

    batches: Callable[[], Iterator[np.ndarray]]
    d_model: int
    identity: dict[str, Any]
    given: bool  # a file or an array of the user's, as against one made or extracted on the way


def open_tokens(
    activations: np.ndarray | tokens.Rows | str | ConfigDict, fits: Callable[[int], None] = lambda d_model: None
) -> Tokens:
    """Whatever the user points at, as batches that can be read again; `fits` as of `open_source`."""
    if isinstance(activations, ConfigDict):
        config_lib.check(activations)
        source = open_source(activations, fits)
        return Tokens(source.statistics, source.d_model, source.identity, given=bool(activations.data.path))
    try:
        chunks: Any = (
            files.open_chunks(activations) if isinstance(activations, str)
            else ArrayChunks(activations if isinstance(activations, tokens.Rows) else np.asarray(activations), "array")
        )  # fmt: skip
    except Refused as error:
        raise Refused("activations", error.value, error.allowed) from error
    except ValueError as error:  # lists of rows that are not equally long
        raise Refused("activations", "array", f"an array of shape (tokens, d_model) ({error})") from error

    fits(chunks.d_model)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, chunks.n_tokens, BATCH):
            try:
                x = chunks.tokens(start, start + BATCH)
            except RunFailed as error:
                raise Refused("activations", chunks.identity["path"], f"whole shards; {error}") from error
            yield x

    return Tokens(batches, chunks.d_model, chunks.identity, given=True)
