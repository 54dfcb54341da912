"""Releases with layouts of their own: Gemma Scope 1 and 2, Qwen Scope, Llama Scope, OpenAI, Goodfire and others.

    Gemma Scope 1    params.npz                     W_enc (d, n)  W_dec (n, d)  threshold    jumprelu
    Gemma Scope 2    params.safetensors             w_enc (d, n)  w_dec (n, d)  threshold    jumprelu
    Qwen Scope       layerN.sae.pt                  W_enc (n, d)  W_dec (d, n)               topk, k in the path
    Llama Scope      checkpoints/final.safetensors  encoder.weight (n, d)  decoder.weight    jumprelu, one threshold
    Llama Scope R1   sae_weights.safetensors        the same, log_jumprelu_threshold         jumprelu
    OpenAI           *.pt                           encoder.weight  pre_bias  latent_bias    topk of LayerNorm, or relu
    Goodfire         *.pt, *.pth                    encoder_linear.weight  decoder_linear.…  relu
    attention SAEs   *.pt, *_cfg.json               W_enc (d, n)  W_dec (n, d)               relu, b_dec subtracted
    transcoders      layer_N.safetensors            W_enc (n, d)  W_dec (n, d)               relu
    cross-layer      W_enc_N.safetensors            W_enc_N (n, d), b_enc_N, b_dec_N         relu, decoders summed

None but OpenAI's and the attention SAEs (C. Kissane, R. Krzyzanowski) subtracts b_dec. Layouts and scalings as in
`sae_lens.loading.pretrained_sae_loaders` 6.54.12; OpenAI's as in its sparse_autoencoder/model.py.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from sae_jax.errors import Refused
from sae_jax.exchange import arrays as arrays_lib
from sae_jax.exchange import dictionary_learning
from sae_jax.exchange.arrays import Arrays
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.runtime.disk import read_json


def _plain(
    arrays: Arrays, path: epath.Path, names: str, layout: str, *, b_in: bool = False, **more: Any
) -> Encoder:
    """An encoder from four arrays, `names` in the order W_enc b_enc W_dec b_dec.

    Args:
      layout: of the two matrices, features as `rows` or `columns` of either: "columns rows" is (d, n) and (n, d_out).
      b_in: whether b_dec is subtracted.
      more: of the Encoder; `threshold=None` is the array of that name, a number one threshold for all.
    """
    enc, b_enc, dec, b_dec = names.split()
    columns, turned = (word == "columns" for word in layout.split())
    d, n = arrays_lib.matrix(arrays, enc, path)[:: 1 if columns else -1]
    d_out, _ = arrays_lib.matrix(arrays, dec, path)[:: 1 if turned else -1]
    wanted: dict[str, tuple[int, ...]] = {
        enc: (d, n) if columns else (n, d), b_enc: (n,), dec: (d_out, n) if turned else (n, d_out), b_dec: (d_out,)
    }  # fmt: skip
    if "threshold" in more:
        more["rule"] = "threshold"
        if more["threshold"] is None:
            (more["threshold"],) = arrays_lib.take(arrays, {"threshold": (n,)}, path)
        else:
            more["threshold"] = np.full(n, more["threshold"], np.float32)
    W_enc, first, W_dec, second = arrays_lib.take(arrays, wanted, path)
    if d_out != d and not more.get("transcodes"):
        raise Refused(f"{path}: {dec}", wanted[dec], f"the width {d} of the encoder")
    return Encoder(
        W_enc=np.ascontiguousarray(W_enc.T if columns else W_enc), b_enc=first,
        W_dec=np.ascontiguousarray(W_dec.T if turned else W_dec), b_dec=second,
        b_in=second if b_in else np.zeros(d, np.float32), **more,
    )  # fmt: skip


def gemma_scope_1(path: epath.Path) -> Opened:
    """params.npz. SAEs of embeddings were trained on √d times what the model has, which goes into the weights."""
    arrays, _ = arrays_lib.read_arrays(path)
    arrays = {re.sub("^w_", "W_", key): value for key, value in arrays.items()}
    where = str(path.parent)
    encoder = _plain(arrays, path, "W_enc b_enc W_dec b_dec", "columns rows", threshold=None,
                     transcodes="transcoder" in where)  # fmt: skip
    if re.search(r"(^|[/_])embedding([/_]|$)", where):
        root = np.float32(encoder.W_enc.shape[1] ** 0.5)
        encoder = encoder.replace(W_enc=encoder.W_enc / root, W_dec=encoder.W_dec * root)
    return Opened(encoder, {}, "gemma_scope")


def gemma_scope_2(path: epath.Path) -> Opened:
    """params.safetensors, or a layer of a cross-layer transcoder, whose decoders are summed."""
    arrays, _ = arrays_lib.read_arrays(path)
    where = path.parent / "config.json"
    config = read_json("--sae", where) if where.exists() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise Refused(f"{where}: architecture", config["architecture"], "jump_relu: others are not supported")
    folder, skip = path.parent.name, arrays.get("affine_skip_connection")
    several = "w_dec" in arrays and arrays["w_dec"].ndim == 3
    if several:
        arrays["w_dec"] = arrays["w_dec"].sum(axis=1)
    out = config.get("hf_hook_point_out")
    encoder = _plain(
        arrays, path, "w_enc b_enc w_dec b_dec", "columns rows", threshold=None,
        W_skip=None if skip is None else np.ascontiguousarray(skip.T),
        transcodes=several or skip is not None or out is not None or "transcoder" in str(path) or "clt" in folder,
    )  # fmt: skip
    if skip is not None and skip.shape != (encoder.W_enc.shape[1], encoder.W_dec.shape[1]):
        raise Refused(f"{path}: affine_skip_connection", skip.shape, "the widths of encoder and decoder")
    names = {"model_name": "model_name", "hook_name": "hf_hook_point_in", "hook_name_out": "hf_hook_point_out"}
    return Opened(encoder, {key: config[name] for key, name in names.items() if config.get(name)}, "gemma_scope_2")


def qwen_scope(path: epath.Path) -> Opened:
    """layerN.sae.pt; k is in the name of the repository, SAE-Res-MODEL-W32K-L0_50, and so has to be in the path."""
    found = re.findall(r"-L0_(\d+)", str(path))
    if not found:
        raise Refused("--sae", str(path), "a file in a folder of its repository's name, SAE-Res-…-L0_50: k is there")
    arrays, _ = arrays_lib.read_arrays(path)
    encoder = _plain(arrays, path, "W_enc b_enc W_dec b_dec", "rows columns", k=int(found[-1]))
    model = re.search(r"SAE-Res-(.+?)-W\d+K", str(path))
    return Opened(encoder, {"model_name": f"Qwen/{model[1]}"} if model else {}, "qwen_scope")


def llama_scope(path: epath.Path) -> Opened:
    """checkpoints/final.safetensors, hyperparams.json above: trained on tokens scaled to a mean norm of √d."""
    where = path.parents[1] / "hyperparams.json"
    config = arrays_lib.config_beside(where)
    scale = _dataset_scale(config, {}, where)
    arrays, _ = arrays_lib.read_arrays(path)
    threshold = arrays_lib.number(config, "jump_relu_threshold", where) * scale
    names = "encoder.weight encoder.bias decoder.weight decoder.bias"
    encoder = _plain(arrays, path, names, "rows columns", threshold=threshold)
    return Opened(_scaled(encoder, scale), {"hook_name": config.get("hook_point_in")}, "llama_scope")


def llama_scope_r1(path: epath.Path) -> Opened:
    """sae_weights.safetensors with config.json beside it."""
    where = path.parent / "config.json"
    config = arrays_lib.config_beside(where)
    arrays, _ = arrays_lib.read_arrays(path)
    if "log_jumprelu_threshold" not in arrays:
        raise Refused(str(path), ", ".join(sorted(arrays)), "those of Llama Scope, log_jumprelu_threshold among them")
    scale = _dataset_scale(config, arrays, where)
    arrays["threshold"] = np.exp(arrays["log_jumprelu_threshold"])
    names = "encoder.weight encoder.bias decoder.weight decoder.bias"
    encoder = _plain(arrays, path, names, "rows columns", threshold=None)
    return Opened(_scaled(encoder, scale), {"hook_name": config.get("hook_point_in")}, "llama_scope")


def _dataset_scale(config: dict[str, Any], arrays: Arrays, where: epath.Path) -> float:
    norms = arrays_lib.of(config, "dataset_average_activation_norm", where)
    key = f"dataset_average_activation_norm.{config.get('hook_point_in')}"
    if key in arrays and arrays[key].size == 1:
        norms = {"in": float(arrays[key].ravel()[0])}
    if not norms:
        raise Refused(f"{where}: dataset_average_activation_norm", "missing",
                      "the norm that its tokens were scaled by; saelens:RELEASE/ID knows it")  # fmt: skip
    norm = arrays_lib.number(norms, "in", where)
    if norm <= 0:
        raise Refused(f"{where}: dataset_average_activation_norm.in", norm, "> 0")
    return float(arrays_lib.integer(config, "d_model", where) ** 0.5 / norm)


def _scaled(encoder: Encoder, scale: float) -> Encoder:
    """For activations as they are, of an encoder of scale · x; thresholds stay (SAELens' scaling factor)."""
    s = np.float32(scale)
    return encoder.replace(W_enc=encoder.W_enc * s, W_dec=encoder.W_dec / s, b_dec=encoder.b_dec / s)


def layer_file(path: epath.Path) -> Opened:
    """layer_N.safetensors: a ReLU transcoder (M. Hanna), or a layer of Gemma Scope 2's cross-layer transcoder."""
    arrays, _ = arrays_lib.read_arrays(path)
    if "w_enc" in arrays:
        return gemma_scope_2(path)
    return Opened(_plain(arrays, path, "W_enc b_enc W_dec b_dec", "rows rows", rule="relu", transcodes=True), {},
                  "transcoder")  # fmt: skip


def cross_layer(path: epath.Path) -> Opened:
    """W_enc_N.safetensors, W_dec_N.safetensors beside it: a layer of a cross-layer transcoder, its decoders summed."""
    number = path.stem.removeprefix("W_enc_")
    arrays, _ = arrays_lib.read_arrays(path)
    beside = path.parent / f"W_dec_{number}.safetensors"
    if not beside.exists():
        raise Refused(str(beside), "missing", "the decoders beside their encoder")
    key = f"W_dec_{number}"
    decoders = arrays_lib.read_arrays(beside)[0].get(key)
    if decoders is None or decoders.ndim != 3:
        raise Refused(f"{beside}: {key}", "missing" if decoders is None else decoders.shape, "(n, layers, d)")
    names = f"W_enc_{number} b_enc_{number} W_dec_{number} b_dec_{number}"
    encoder = _plain(arrays | {key: decoders.sum(axis=1)}, path, names, "rows rows", rule="relu", transcodes=True)
    return Opened(encoder, {"layer": int(number)}, "cross_layer_transcoder")


def by_keys(path: epath.Path) -> Opened:
    """A file of any other name, by the names of its arrays."""
    arrays, rest = arrays_lib.read_arrays(path)
    if "pre_bias" in arrays:
        return _openai(arrays, rest, path)
    if "encoder_linear.weight" in arrays:
        names = "encoder_linear.weight encoder_linear.bias decoder_linear.weight decoder_linear.bias"
        arrays_lib.only([*arrays, *rest], names.split(), "Goodfire", path)
        return Opened(_plain(arrays, path, names, "rows columns", rule="relu"), {}, "goodfire")
    if "w_enc" in arrays and "threshold" in arrays:
        return gemma_scope_2(path)
    beside = path.parent / f"{path.name.split('.pt')[0]}_cfg.json"
    if arrays.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"} and beside.exists():
        config = read_json("--sae", beside)
        encoder = _plain(arrays, path, "W_enc b_enc W_dec b_dec", "columns rows", b_in=True, rule="relu")
        return Opened(encoder, {"hook_name": config.get("act_name")}, "attention SAEs")
    keys = {"encoder.weight", "W_enc", "W_dec", "decoder.weight", "b_dec", "bias", "decoder_bias", "decoder.bias"}
    distinct = arrays.keys() & {"bias", "decoder_bias", "decoder.bias", "group_sizes", "threshold", "k"}
    if path.suffix in (".pt", ".pth") and arrays.keys() & keys and distinct:
        return dictionary_learning.read(path)
    said = ", ".join(sorted([*arrays, *rest])[:8]) or "nothing"
    raise Refused("--sae", str(path), "a file whose arrays say what the encoder does, or a folder with cfg.json or "
                  f"config.json; this one has {said}")  # fmt: skip


def _openai(arrays: Arrays, rest: dict[str, Any], path: epath.Path) -> Opened:
    activation, state = rest.get("activation", "ReLU"), rest.get("activation_state_dict") or {}
    after = state.get("postact_fn", "ReLU") if isinstance(state, dict) else "missing"
    if activation not in ("TopK", "ReLU") or after != "ReLU":
        raise Refused(f"{path}: activation", activation, "TopK or ReLU, with ReLU after it: others are not supported")
    names = "encoder.weight latent_bias decoder.weight pre_bias"
    others = ("stats_last_nonzero", "activation", "activation_state_dict")
    arrays_lib.only([*arrays, *rest], [*names.split(), *others], "OpenAI", path)
    if activation == "ReLU":
        return Opened(_plain(arrays, path, names, "rows columns", b_in=True, rule="relu"), {}, "openai")
    k = arrays_lib.integer({"k": int(state["k"])} if "k" in state else {}, "k", path)
    encoder = _plain(arrays, path, names, "rows columns", b_in=True, k=k, norm="sample_layer_norm")
    return Opened(encoder, {}, "openai")


Reader = Callable[[epath.Path], Opened]
