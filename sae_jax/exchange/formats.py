"""The formats of other SAE libraries: SAELens 6, dictionary_learning, sparsify; to bytes and back.

                W_enc                b_enc          W_dec                b_dec  a folder with
    saelens     W_enc (d, n)         b_enc          W_dec (n, d)         b_dec  cfg.json, sae_weights.safetensors
    dictionary  encoder.weight       encoder.bias   decoder.weight       b_dec  config.json, ae.pt
    _learning     (n, d)                              (d, n)
    sparsify    encoder.weight       encoder.bias   W_dec (n, d)         b_dec  cfg.json, sae.safetensors
                  (n, d)

All three compute relu and top-k of W_enc (x − b_dec) + b_enc, as we do, so scaling, centring and whitening fold into
weights and biases (in float64, rounded once to float32). A norm of each token does not fold: SAELens has a flag for
it, the other two have none, and refuse. Layouts as in SAELens 6.54.12, dictionary_learning 0.1.0, sparsify 1.3.3.
Nothing is unpickled: safetensors, and torch files with weights only.
"""

import io
import json
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.outliers.preprocess import Preprocessing, fold
from sae_jax.runtime.disk import read_json
from sae_jax.runtime.optional import module

SAELENS_VERSION = "6.54.12"  # whose layout is written
# SAELens' flag for each norm, and what ours is a multiple of: its LayerNorm divides by the deviation with ddof 1 (and
# adds 1e-5 to that, where we add it to the variance), its other norm makes every token √d long.
NORM_FLAGS: dict[str, tuple[str, Callable[[int], float]]] = {
    "none": ("none", lambda d: 1.0),
    "layer_norm": ("layer_norm", lambda d: (d / (d - 1)) ** 0.5),
    "layer_norm_unit": ("layer_norm", lambda d: (d - 1) ** -0.5),
    "unit": ("constant_norm_rescale", lambda d: d**-0.5),
}
FLAG_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "unit"}


class Packed(NamedTuple):
    """An SAE and what comes with it: `sae`, of NumPy float32 arrays, sees before(x) and reconstructs that.

    Metadata is plain JSON: `model_name`, `hook_name`, `layer`, `context_size` where known, and whatever else there is.
    """

    sae: SAE
    before: Preprocessing
    metadata: dict[str, Any]


def encode(packed: Packed, format: str) -> dict[str, bytes]:
    """The files of an SAE in a format, name → content, with its preprocessing folded in.

    Raises:
      Refused: there is no such format, or it has no flag for the norm.
    """
    if format not in FORMATS:
        raise Refused("--format", format, "one of " + ", ".join(FORMATS))
    norm = packed.before.norm
    if norm != "none" and format != "saelens":
        raise Refused("--format", format, f"saelens: {norm} looks at each token, and only saelens has a flag for it")
    flag, factor = NORM_FLAGS[norm]
    return FORMATS[format][1](folded(packed, factor(packed.before.shift.shape[0])), flag, packed.metadata)


def folded(packed: Packed, factor: float = 1.0) -> SAE:
    """The SAE with the affine part of its preprocessing in its weights; it sees norm(x) / factor.

    A scalar goes into the biases alone: an SAE of s·y is that of y with its biases over s and its features in the units
    of y. So scaling and centring leave the weights as they are to the last bit, and the decoder rows of unit length.
    """
    scale = np.float64(packed.before.scale) * factor
    sae = packed.sae.replace(
        b_enc=np.float64(packed.sae.b_enc) / scale, b_dec=np.float64(packed.sae.b_dec) / scale
    )
    before = packed.before.replace(norm="none", shift=np.float64(packed.before.shift) / factor, scale=1.0)
    found: SAE = jax.tree.map(_float32, fold(sae, before))
    return found


def decode(folder: epath.Path) -> Packed:
    """The SAE in a folder, in whatever format its files say.

    Raises:
      Refused: no SAE is there, a key is missing, shapes disagree, values are not finite, the SAE is of a kind that is
        not TopK, or a file holds anything but arrays.
    """
    for weights, _, read in FORMATS.values():
        if (folder / weights).exists():
            sae, before, metadata = read(folder)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                if not np.isfinite(getattr(sae, name)).all():
                    raise Refused(f"{folder / weights}: {name}", "not finite", "finite numbers")
            if not 1 <= sae.k <= sae.W_enc.shape[0]:
                raise Refused(f"{folder}: k", sae.k, f"1 to the {sae.W_enc.shape[0]} features")
            return Packed(sae, before, metadata)
    files = ", ".join(f"{weights} ({name})" for name, (weights, *_) in FORMATS.items())
    raise Refused("--sae", str(folder), f"a folder with one of {files}, or that of a run")


# -- SAELens ---------------------------------------------------------------------------------------------------------


def _write_saelens(sae: SAE, flag: str, metadata: dict[str, Any]) -> dict[str, bytes]:
    from safetensors.numpy import save as to_bytes

    n, d = sae.W_enc.shape
    config = {
        "architecture": "topk", "d_in": d, "d_sae": n, "k": sae.k, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": flag, "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
    }  # fmt: skip
    arrays = {"W_enc": np.ascontiguousarray(sae.W_enc.T), "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    return {"sae_weights.safetensors": to_bytes(arrays), "cfg.json": _json(config)}


def _read_saelens(folder: epath.Path) -> tuple[SAE, Preprocessing, dict[str, Any]]:
    path, config = folder / "cfg.json", _config(folder)
    if config.get("architecture") != "topk":
        raise Refused(f"{path}: architecture", config.get("architecture"), "topk")
    if config.get("reshape_activations", "none") != "none":
        raise Refused(f"{path}: reshape_activations", config["reshape_activations"], "none")
    flag = config.get("normalize_activations", "none")
    if flag not in FLAG_NORMS:  # SAELens itself folds the others in before it saves an SAE for inference
        raise Refused(f"{path}: normalize_activations", flag, ", ".join(FLAG_NORMS))
    n, d, k = (_integer(config, key, path) for key in ("d_sae", "d_in", "k"))
    W_enc, W_dec, b_enc, b_dec = _safetensors(
        folder / "sae_weights.safetensors", {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
    )
    sae = SAE(W_enc=np.ascontiguousarray(W_enc.T), b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, k=k)
    if config.get("rescale_acts_by_decoder_norm", False):  # it ranks by z · ‖row‖ and divides the rows by their norms
        norms = np.linalg.norm(W_dec.astype(np.float64), axis=1)
        rows = norms[:, None]
        sae = sae.replace(
            W_enc=_float32(sae.W_enc * rows), b_enc=_float32(b_enc * norms),
            W_dec=_float32(W_dec / np.where(rows > 0, rows, 1)),
        )  # fmt: skip
    if not config.get("apply_b_dec_to_input", True):  # W x + b_enc = W (x − b_dec) + (b_enc + W b_dec)
        sae = sae.replace(b_enc=_float32(sae.b_enc + sae.W_enc.astype(np.float64) @ b_dec))
    norm = FLAG_NORMS[flag]
    before = Preprocessing(shift=np.zeros(d), scale=1 / NORM_FLAGS[norm][1](d), norm=norm)
    versions = ("sae_lens_version", "sae_lens_training_version")
    return sae, before, {key: value for key, value in config.get("metadata", {}).items() if key not in versions}


# -- dictionary_learning ---------------------------------------------------------------------------------------------


def _write_dictionary_learning(sae: SAE, flag: str, metadata: dict[str, Any]) -> dict[str, bytes]:
    torch = module("torch", "hf")
    n, d = sae.W_enc.shape
    config = {
        "trainer": {
            "trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "activation_dim": d, "dict_size": n,
            "k": sae.k, "layer": metadata.get("layer"), "lm_name": metadata.get("model_name"),
            "submodule_name": metadata.get("hook_name"),
        },
        "buffer": {"ctx_len": metadata.get("context_size")},
        "metadata": metadata,
    }  # fmt: skip
    state = {
        "encoder.weight": torch.tensor(sae.W_enc), "encoder.bias": torch.tensor(sae.b_enc),
        "decoder.weight": torch.tensor(sae.W_dec.T.copy()), "b_dec": torch.tensor(sae.b_dec),
        "k": torch.tensor(sae.k, dtype=torch.int), "threshold": torch.tensor(-1.0),  # −1: not set
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return {"ae.pt": buffer.getvalue(), "config.json": _json(config)}


def _read_dictionary_learning(folder: epath.Path) -> tuple[SAE, Preprocessing, dict[str, Any]]:
    torch, path = module("torch", "hf"), folder / "ae.pt"
    config = read_json("--sae", folder / "config.json") if (folder / "config.json").exists() else {}
    trainer = config.get("trainer", {})
    if trainer.get("dict_class", "AutoEncoderTopK") != "AutoEncoderTopK":
        raise Refused(f"{folder / 'config.json'}: trainer.dict_class", trainer["dict_class"], "AutoEncoderTopK")
    try:
        with warnings.catch_warnings():  # of pickles that it then refuses
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        arrays = {key: value.float().numpy() for key, value in state.items()}
    except Exception as error:  # whatever else a pickle holds is refused by torch, in many words
        raise Refused(str(path), "not tensors alone", "a torch state dict; nothing else is unpickled") from error
    first = arrays.get("encoder.weight", np.zeros((0, 0)))
    n, d = first.shape if first.ndim == 2 else (0, 0)
    W_enc, b_enc, W_dec, b_dec, k = _take(
        arrays, {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "b_dec": (d,), "k": ()}, path
    )
    sae = SAE(W_enc=W_enc, b_enc=b_enc, W_dec=np.ascontiguousarray(W_dec.T), b_dec=b_dec, k=int(k))
    names = {"model_name": "lm_name", "layer": "layer", "hook_name": "submodule_name"}
    known = {name: trainer[key] for name, key in names.items() if trainer.get(key) is not None}
    return sae, Preprocessing(shift=np.zeros(d)), config.get("metadata", known)


# -- sparsify --------------------------------------------------------------------------------------------------------


def _write_sparsify(sae: SAE, flag: str, metadata: dict[str, Any]) -> dict[str, bytes]:
    from safetensors.numpy import save as to_bytes

    n, d = sae.W_enc.shape
    config = {
        "activation": "topk", "expansion_factor": max(1, n // d), "num_latents": n, "k": sae.k, "d_in": d,
        "normalize_decoder": bool(np.allclose(np.linalg.norm(sae.W_dec, axis=1), 1, atol=1e-5)),
        "multi_topk": False, "skip_connection": False, "transcode": False,
    }  # fmt: skip
    arrays = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    # Metadata lie beside: sparsify warns of every key in its configuration that it does not know.
    return {"sae.safetensors": to_bytes(arrays), "cfg.json": _json(config), "metadata.json": _json(metadata)}


def _read_sparsify(folder: epath.Path) -> tuple[SAE, Preprocessing, dict[str, Any]]:
    path, config = folder / "cfg.json", _config(folder)
    for key, allowed in {"activation": "topk", "skip_connection": False, "transcode": False}.items():
        if config.get(key, allowed) != allowed:
            raise Refused(f"{path}: {key}", config[key], str(allowed))
    d, k = _integer(config, "d_in", path), _integer(config, "k", path)
    n = config.get("num_latents") or d * _integer(config, "expansion_factor", path)
    W_enc, b_enc, W_dec, b_dec = _safetensors(
        folder / "sae.safetensors", {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    )
    sae = SAE(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, k=k)
    beside = folder / "metadata.json"
    return sae, Preprocessing(shift=np.zeros(d)), read_json("--sae", beside) if beside.exists() else {}


# name → (the file that tells the format, writer, reader)
FORMATS: dict[str, tuple[str, Callable[..., dict[str, bytes]], Callable[..., Any]]] = {
    "saelens": ("sae_weights.safetensors", _write_saelens, _read_saelens),
    "dictionary_learning": ("ae.pt", _write_dictionary_learning, _read_dictionary_learning),
    "sparsify": ("sae.safetensors", _write_sparsify, _read_sparsify),
}


# -- reading with care -----------------------------------------------------------------------------------------------


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _config(folder: epath.Path) -> dict[str, Any]:
    path = folder / "cfg.json"
    if not path.exists():
        raise Refused(str(path), "missing", "the configuration beside the weights")
    return read_json("--sae", path)


def _integer(config: dict[str, Any], key: str, path: epath.Path) -> int:
    if not isinstance(config.get(key), int):
        raise Refused(f"{path}: {key}", config.get(key, "missing"), "an integer")
    return int(config[key])


def _safetensors(path: epath.Path, wanted: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    from safetensors.flax import load  # the one framework that knows bfloat16 without torch

    try:
        arrays = {key: np.asarray(value, np.float32) for key, value in load(path.read_bytes()).items()}
    except Exception as error:  # a damaged file, or one that only looks like it
        raise Refused(str(path), "unreadable", f"a safetensors file ({error})") from error
    return _take(arrays, wanted, path)


def _take(arrays: dict[str, np.ndarray], wanted: dict[str, tuple[int, ...]], path: epath.Path) -> list[np.ndarray]:
    missing = sorted(wanted.keys() - arrays.keys())
    if missing:
        raise Refused(f"{path}: {', '.join(missing)}", "missing", "all of " + ", ".join(wanted))
    for key, shape in wanted.items():
        if arrays[key].shape != shape:
            raise Refused(f"{path}: {key}", arrays[key].shape, f"the shape {shape}, as the others have it")
    return [_float32(arrays[key]) for key in wanted]


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32, order="C")
