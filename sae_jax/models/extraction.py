"""From a model to activations: one path for every family, many layers from one forward pass.

Layer L is the residual stream after L blocks (0: what goes into the first). Other hook points are modules of the L-th
block: `attention`, `mlp`, or the path of any of its submodules, as that module returns it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.activations import store
from sae_jax.activations.chunks import CHUNK
from sae_jax.errors import Refused
from sae_jax.models import adapters, facts, inputs
from sae_jax.models.network import Batch, Network
from sae_jax.runtime import progress
from sae_jax.runtime.optional import module

# Where families keep these. In BERT and its like `attention` and `output` add the residual stream: their last dense
# layer is the part that is written to it.
HOOKS = {
    "attention": ("attention.output.dense", "self_attn", "attn", "attention", "inner_mha_cls"),
    "mlp": ("output.dense", "mlp", "feed_forward", "ffn", "ff"),
}


class _Stop(Exception):
    """Raised in a hook: the last layer asked for has been computed."""


def _tensor(output: Any, stream: int) -> Any:
    """The stream among what a block returns: several things or one."""
    if not isinstance(output, tuple):
        return output
    return output[min(stream, len(output) - 1)]


def _submodule(block: Any, hook: str) -> Any:
    known = dict(block.named_modules())
    for path in HOOKS.get(hook, (hook,)):
        if path and path in known:
            return known[path]
    within = ", ".join(name for name in known if name and "." not in name)
    allowed = f"residual, attention, mlp or a submodule of {type(block).__name__}: {within}"
    raise Refused("data.model.hook", hook, allowed)


def streams(network: Network, given: dict[str, Any], layers: Collection[int], hook: str = "residual") -> dict[int, Any]:
    """What a hook point gives at some layers, in one forward pass that goes no further than the last of them."""
    torch = module("torch", "hf")
    lowest = 0 if hook == "residual" else 1
    for layer in layers:
        if not lowest <= layer <= len(network.blocks):
            raise Refused("data.model.layer", layer, f"{lowest} to {len(network.blocks)}")
    caught: dict[int, Any] = {}

    def keep(layer: int, found: Any) -> None:
        caught[layer] = found
        if len(caught) == len(set(layers)):
            raise _Stop

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args and network.stream == 0 else kwargs.get("hidden_states", args[0] if args else None))

    def after(layer: int) -> Callable[..., None]:
        stream = network.stream if hook == "residual" else 0
        return lambda module, args, output: keep(layer, _tensor(output, stream))

    handles = []
    try:
        for layer in layers:
            if layer == 0:
                handles.append(network.blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            else:
                block = network.blocks[layer - 1]
                watched = block if hook == "residual" else _submodule(block, hook)
                handles.append(watched.register_forward_hook(after(layer)))
        with torch.inference_mode():
            network.run(**given)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _kept(x: Any, batch: Batch, keep: np.ndarray, network: Network, seed: tuple[int, int]) -> np.ndarray:
    """The rows of one layer that are tokens, (rows, d_model)."""
    found: np.ndarray = x.float().cpu().numpy()
    if network.maps:  # (B, C, H, W) → (B, positions, C), at positions drawn for every image
        rng, flat = np.random.default_rng(seed), found.reshape(*found.shape[:2], -1).transpose(0, 2, 1)
        at = np.argsort(rng.random(flat.shape[:2]), axis=1)[:, : keep.shape[1]]
        found = np.take_along_axis(flat, at[:, :, None], axis=1)
    if found.ndim == 2:  # this class leaves padding out itself
        return found[keep[batch.real]]
    return found[keep]


def kept(model: ConfigDict, batch: Batch) -> np.ndarray:
    """(B, T): which positions count as tokens."""
    return batch.real if model.keep_special_tokens else batch.real & ~batch.special


def forward(
    network: Network, model: ConfigDict, batch: Batch, first: int, layers: Collection[int]
) -> dict[int, store.Rows]:
    """The tokens of one batch, whose first sequence is number `first`, at each layer."""
    device = next(iter(network.blocks[0].parameters())).device
    keep = kept(model, batch)
    where = np.indices(keep.shape, np.int32)
    found = streams(network, {key: x.to(device) for key, x in batch.inputs.items()}, layers, model.hook)
    places = (batch.token_ids[keep], where[0][keep] + first, where[1][keep])
    return {
        layer: store.Rows(_kept(x, batch, keep, network, (first, layer)), *places) for layer, x in found.items()
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
    if model.hook != "residual":  # as wide as the module makes it
        return {layer: part.x.shape[1] for layer, part in next(rows(network, model, layers))[1].items()}
    return {layer: width if isinstance(width := network.width, int) else width[layer - 1] for layer in layers}


def described(model: ConfigDict, layer: int) -> dict[str, Any]:
    """What the activations of a layer are, without having them."""
    known = facts.find(model)
    kinds = [known.inputs] if known else [kind for kind in inputs.COLUMN if kind == "text" or model[kind]]
    shown = {kind: inputs.identity(kind, model[kind]) for kind in kinds}
    ignored = {"cache", "batch_size", "stream", "activations", *inputs.COLUMN}
    settings = {key: model[key] for key in sorted(model) if key not in ignored}
    return settings | {"layer": layer, "inputs": shown}


def extracted(model: ConfigDict) -> str:
    """The dataset folder of `config.data.model`: found in the cache, or extracted into it now."""
    cache = os.path.expanduser(model.cache or "~/.cache/sae_jax")
    return extract(model, [model.layer], cache)[model.layer]


def extract(model: ConfigDict, layers: Collection[int], data_dir: str) -> dict[int, str]:
    """Datasets of several layers, from one forward pass; those that are finished are left as they are.

    Killed and called again it goes on after the last whole shard. Of a model whose activations the user supplies it is
    the user's file.
    """
    facts.check(model, layers)
    facts.check_allowed(model)
    known = facts.find(model)
    if known and known.family == "activations":
        return dict.fromkeys(layers, model.activations)
    folders, identity = {}, {}
    for layer in layers:
        identity[layer] = described(model, layer)
        fingerprint = hashlib.sha256(json.dumps(identity[layer]).encode()).hexdigest()[:8]
        dataset = f"{model.id.strip('/').replace('/', '--')}_layer{layer:02d}_{fingerprint}"
        folders[layer] = store.folder_of(data_dir, dataset)
    missing = [layer for layer in layers if not (folders[layer] / store.MANIFEST).exists()]
    if missing:
        network = adapters.load(model)
        if max(missing) > len(network.blocks):
            raise Refused("data.model.layer", max(missing), f"0 (embeddings) to {len(network.blocks)}")
        width = _widths(network, model, missing)
        writers = {
            layer: store.Writer(folders[layer], width[layer], identity[layer], model.dtype) for layer in missing
        }
        store.write(writers, lambda start: rows(network, model, missing, start))
    return {layer: str(folder) for layer, folder in folders.items()}
