"""From a model to activations: one path for every family, many layers from one forward pass."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.activations import store
from sae_jax.activations.chunks import CHUNK
from sae_jax.errors import Refused
from sae_jax.models import adapters, facts, hooks, inputs
from sae_jax.models.network import Batch, Network
from sae_jax.runtime import progress


def places(
    shape: tuple[int, ...], batch: Batch, keep: np.ndarray, seed: tuple[int, int]
) -> Int[np.ndarray, "rows"]:
    """Which rows are tokens of what a layer gives, in the order of `hooks.flat`."""
    if len(shape) == 2:  # this class leaves padding out itself
        return np.flatnonzero(keep[batch.real])
    sequence, position = np.nonzero(keep)
    if len(shape) == 4:  # positions drawn for every image
        drawn = np.argsort(np.random.default_rng(seed).random((len(keep), shape[2] * shape[3])), axis=1)
        return sequence * drawn.shape[1] + drawn[sequence, position]
    return sequence * shape[1] + position


def kept(model: ConfigDict, batch: Batch) -> np.ndarray:
    """(B, T): which positions count as tokens."""
    return batch.real if model.keep_special_tokens else batch.real & ~batch.special


def forward(
    network: Network, model: ConfigDict, batch: Batch, first: int, layers: Collection[int]
) -> dict[int, store.Rows]:
    """The tokens of one batch, whose first sequence is number `first`, at each layer."""
    keep = kept(model, batch)
    where = np.indices(keep.shape, np.int32)
    found = (network.compute or partial(hooks.computed, network))(batch, layers, model.hook)
    known = (batch.token_ids[keep], where[0][keep] + first, where[1][keep])
    return {
        layer: store.Rows(hooks.flat(np.asarray(x, np.float32))[places(x.shape, batch, keep, (first, layer))], *known)
        for layer, x in found.items()
    }


def rows(
    network: Network, model: ConfigDict, layers: Collection[int], start: int = 0
) -> Iterator[tuple[int, dict[int, store.Rows]]]:
    """Activations of at least n_tokens tokens (or all there are), special tokens left out unless asked for.

    Yields the number of a first token, and by layer the rows from it on. Batches that lie before token `start` are not
    computed; the others are the same as from the beginning, so what is written after a restart is what would have been.
    """
    wanted = model.n_tokens + CHUNK - 1  # a dataset keeps whole chunks
    done, first = 0, 0
    with progress.Progress(model.n_tokens, start, "tokens", f"extracting {model.id}") as shown:
        for batch in network.batches():
            if done >= wanted:
                break
            count = int(kept(model, batch).sum())
            if done + count > start:
                yield done, forward(network, model, batch, first, layers)
                shown.update(count)
            first, done = first + len(batch.real), done + count


def activations(name: str, layers: Collection[int], n_tokens: int) -> dict[int, np.ndarray]:
    """The first n_tokens tokens at each layer, (n_tokens, d_model) float32, held in memory."""
    model = config_lib.base().data.model
    model.id, model.n_tokens = name, n_tokens
    facts.check(model, layers)
    facts.check_allowed(model)
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    for _, parts in rows(adapters.load(model), model, layers):
        for layer, part in parts.items():
            found[layer].append(part.x)
    return {layer: np.concatenate(parts)[:n_tokens] for layer, parts in found.items()}


def _widths(network: Network, model: ConfigDict, layers: Collection[int]) -> dict[int, int]:
    if model.hook != "residual" or model.backend == "jax":  # as wide as the module makes it; and whether JAX can run it
        first = next(rows(network, model, layers), None)
        if first is None:
            raise Refused("data.model.id", model.id, "inputs that are long enough for one sequence")
        return {layer: part.x.shape[1] for layer, part in first[1].items()}
    return {layer: width if isinstance(width := network.width, int) else width[layer - 1] for layer in layers}


def shown(model: ConfigDict) -> dict[str, str]:
    """What a model is shown; of a user's text it takes a pass over it."""
    known = facts.find(model)
    kinds = [known.inputs] if known else [kind for kind in inputs.COLUMN if kind == "text" or model[kind]]
    return {kind: inputs.identity(kind, model[kind]) for kind in kinds}


def described(model: ConfigDict, layer: int, given: dict[str, str] | None = None) -> dict[str, Any]:
    """What the activations of a layer are, without having them; `given` as of `shown`, where that is known."""
    ignored = {"cache", "batch_size", "stream", "activations", *inputs.COLUMN}
    plain = config_lib.defaults()  # datasets of before these could be chosen keep their names
    ignored |= {key for key in ("backend", "weights") if model[key] == plain[f"data.model.{key}"]}
    settings = {key: model[key] for key in sorted(model) if key not in ignored}
    return settings | {"layer": layer, "inputs": shown(model) if given is None else given}


def extracted(model: ConfigDict, devices: Sequence[Any] = ()) -> str:
    """The dataset folder of `config.data.model`: found in the cache, or extracted into it now."""
    cache = os.path.expanduser(model.cache or "~/.cache/sae_jax")
    return extract(model, [model.layer], cache, devices)[model.layer]


def extract(
    model: ConfigDict, layers: Collection[int], data_dir: str, devices: Sequence[Any] = ()
) -> dict[int, str]:
    """Datasets of several layers, from one forward pass; those that are finished are left as they are.

    Killed and called again it goes on after the last whole shard. Of a model whose activations the user supplies it is
    the user's file. `devices` as of `adapters.load`.
    """
    facts.check(model, layers)
    facts.check_allowed(model)
    known = facts.find(model)
    if known and known.family == "activations":
        return dict.fromkeys(layers, model.activations)
    folders, identity, given = {}, {}, shown(model)
    for layer in layers:
        identity[layer] = described(model, layer, given)
        fingerprint = hashlib.sha256(json.dumps(identity[layer]).encode()).hexdigest()[:8]
        dataset = f"{model.id.strip('/').replace('/', '--')}_layer{layer:02d}_{fingerprint}"
        folders[layer] = store.folder_of(data_dir, dataset)
    missing = [layer for layer in layers if not (folders[layer] / store.MANIFEST).exists()]
    if missing:
        network = adapters.load(model, devices=devices)
        if max(missing) > len(network.blocks):
            raise Refused("data.model.layer", max(missing), f"0 (embeddings) to {len(network.blocks)}")
        width = _widths(network, model, missing)
        writers = {
            layer: store.Writer(folders[layer], width[layer], identity[layer], model.dtype) for layer in missing
        }
        store.write(writers, lambda start: rows(network, model, missing, start))
    return {layer: str(folder) for layer, folder in folders.items()}
