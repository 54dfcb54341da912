"""dictionary_learning: every class of its version 0.1.0, and files from before k and threshold were in them.

    AutoEncoder                 encoder.weight (n, d)  encoder.bias  decoder.weight (d, n)  bias (d,)
    AutoEncoderNew              the same with decoder.bias for bias, which is not subtracted from the input
    AutoEncoderTopK             the same with b_dec, k and a threshold that `encode` does not use
    BatchTopKSAE                the same with b_dec, k and the threshold that `encode` uses
    MatryoshkaBatchTopKSAE      W_enc (d, n)  b_enc  W_dec (n, d)  b_dec  k  threshold  group_sizes
    JumpReluAutoEncoder         W_enc (d, n)  b_enc  W_dec (n, d)  b_dec, which is not subtracted  threshold (n,)
    GatedAutoEncoder            encoder.weight  decoder.weight  decoder_bias  r_mag  gate_bias  mag_bias

in ae.pt; config.json beside it names the class (`trainer.dict_class`). Without one a class is told by its keys, but for
AutoEncoderTopK and BatchTopKSAE, whose keys are the same. A file with keys besides those of the class is then refused.

InterPLM's files (ElanaPearl/InterPLM, of AutoEncoder and AutoEncoderNew) have two keys more: normalize_to_sqrt_d, by
which tokens are made √d long first, and activation_rescale_factor, each feature's unit, which its `encode` leaves out.
"""

import io
from typing import Any

import numpy as np
from etils import epath

from sae_jax.autoencoder.dense import DenseSAE, groups_of
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import arrays as arrays_lib
from sae_jax.exchange import origin
from sae_jax.exchange.arrays import Arrays
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.runtime.disk import read_json
from sae_jax.runtime.optional import module

WEIGHTS = "ae.pt"
RULES = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "threshold",
    "MatryoshkaBatchTopKSAE": "threshold", "JumpReluAutoEncoder": "threshold", "GatedAutoEncoder": "gated",
}  # fmt: skip

TRAINERS = {
    "AutoEncoder": "StandardTrainer", "AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer", "JumpReluAutoEncoder": "JumpReluTrainer",
}  # fmt: skip


def write(sae: SAE, flag: str, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The files of an SAE, as one of its classes. Its JumpReLU subtracts no b_dec, which is left to the bias: float32
    loses digits of that where gamma is high."""
    torch = module("torch", "hf")
    n, d = sae.W_enc.shape
    kind, state = _state(sae, metadata)
    config = {
        "trainer": {
            "trainer_class": TRAINERS[kind], "dict_class": kind, "activation_dim": d, "dict_size": n,
            **({"k": sae.k} if sae.k else {}), "layer": metadata.get("layer"), "lm_name": metadata.get("model_name"),
            "submodule_name": origin.spelled(metadata.get("hook_name"), "dictionary_learning"),
        },
        "buffer": {"ctx_len": metadata.get("context_size")},
        "metadata": metadata,
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save({key: torch.tensor(value) for key, value in state.items()}, buffer)
    return {WEIGHTS: buffer.getvalue(), "config.json": arrays_lib.to_json(config)}


def _state(sae: SAE, metadata: dict[str, Any]) -> tuple[str, Arrays]:
    """The class that an SAE is there, and its arrays."""
    kind = _class(sae, metadata)
    linear = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T.copy()}
    turned = {"W_enc": sae.W_enc.T.copy(), "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    counted = {"k": np.asarray(sae.k, np.int32), "threshold": np.asarray(-1, np.float32)}  # −1: not set
    if isinstance(sae, DenseSAE) and sae.threshold is not None:
        counted["threshold"] = np.asarray(sae.threshold, np.float32)
    if kind == "AutoEncoder":
        return kind, linear | {"bias": sae.b_dec}
    if kind == "JumpReluAutoEncoder":
        b_enc = sae.b_enc - np.asarray(sae.W_enc, np.float64) @ sae.b_dec
        return kind, turned | {"b_enc": np.float32(b_enc), "threshold": counted["threshold"]}
    if kind == "MatryoshkaBatchTopKSAE":
        return kind, turned | counted | {"group_sizes": np.diff((0, *groups_of(metadata["config"]["sae.groups"])))}
    return kind, linear | {"b_dec": sae.b_dec} | counted


def _class(sae: SAE, metadata: dict[str, Any]) -> str:
    activation = sae.activation if isinstance(sae, DenseSAE) else "topk"
    if activation == "batch_topk" and metadata.get("config", {}).get("sae.groups"):
        return "MatryoshkaBatchTopKSAE"
    return {"topk": "AutoEncoderTopK", "batch_topk": "BatchTopKSAE", "jumprelu": "JumpReluAutoEncoder",
            "relu": "AutoEncoder"}[activation]  # fmt: skip


def loaded_by(sae: SAE, metadata: dict[str, Any]) -> dict[str, str]:
    """The class that an SAE is there, and the module that has it."""
    kind = _class(sae, metadata)
    places = {"AutoEncoderTopK": "trainers.top_k", "BatchTopKSAE": "trainers.batch_top_k",
              "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k"}  # fmt: skip
    return {"kind": kind, "place": places.get(kind, "dictionary")}


def read(path: epath.Path) -> Opened:
    """The dictionary of a folder, by its weights' path."""
    where = path.parent / "config.json"
    config = read_json("--sae", where) if where.exists() else {}
    trainer, buffer = arrays_lib.of(config, "trainer", where), arrays_lib.of(config, "buffer", where)
    arrays, rest = arrays_lib.read_arrays(path)
    named = trainer.get("dict_class") or config.get("dict_class")
    kind = named or told_by_keys(arrays, path)
    if not isinstance(kind, str) or kind not in RULES:
        raise Refused(f"{where}: trainer.dict_class", kind, "one of " + ", ".join(RULES) + ": others are not supported")
    names = {"model_name": (trainer, "lm_name"), "layer": (trainer, "layer"), "hook_name": (trainer, "submodule_name"),
             "context_size": (buffer, "ctx_len")}  # fmt: skip
    known = {name: part[key] for name, (part, key) in names.items() if part.get(key) is not None}
    if not named:
        _check_guess(kind, trainer, where)
    own, keys = [*keys_of(kind), *MORE.get(kind, ()), *INTERPLM], [*arrays, *rest]
    # Of a class that is named another version may hold more, but nothing that decides what fires.
    arrays_lib.only({"k", "threshold"}.intersection(keys) if named else keys, own, kind, path)
    encoder, notes = of_class(kind, arrays, trainer, path)
    notes += arrays_lib.unread(keys, own)
    return Opened(encoder, arrays_lib.of(config, "metadata", where) or known, "dictionary_learning", notes)


TURNED = ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")  # with the features of W_enc as columns
# Keys that not every class has; what each is for stands in `of_class`.
MORE: dict[str, tuple[str, ...]] = {
    "AutoEncoderTopK": ("k", "threshold"), "BatchTopKSAE": ("k", "threshold"),
    "MatryoshkaBatchTopKSAE": ("k", "threshold", "group_sizes"), "JumpReluAutoEncoder": ("threshold",),
}  # fmt: skip
INTERPLM = ("activation_rescale_factor", "normalize_to_sqrt_d")


def keys_of(kind: str) -> dict[str, str]:
    """Key → axes, "nd" for (n, d), of the arrays that a class has: matrices, b_dec, b_enc or a gate's three."""
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    turned = kind in TURNED
    gates = ("gate_bias", "r_mag", "mag_bias") if kind == "GatedAutoEncoder" else ()
    return {
        **({"W_enc": "dn", "W_dec": "nd"} if turned else {"encoder.weight": "nd", "decoder.weight": "dn"}),
        bias.get(kind, "b_dec"): "d",
        **dict.fromkeys(gates or ("b_enc" if turned else "encoder.bias",), "n"),
    }


def told_by_keys(arrays: Arrays, path: epath.Path) -> str:
    """The class whose keys these are."""
    keys = arrays.keys()
    if "gate_bias" in keys:
        return "GatedAutoEncoder"
    if "W_enc" in keys:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in keys else "JumpReluAutoEncoder"
    if "b_dec" in keys:
        raise Refused(str(path), "no config.json beside it", "one whose trainer.dict_class says AutoEncoderTopK or "
                      "BatchTopKSAE: their files look alike")  # fmt: skip
    return "AutoEncoderNew" if "decoder.bias" in keys else "AutoEncoder"


def _check_guess(kind: str, trainer: dict[str, Any], where: epath.Path) -> None:
    """Refuses a configuration that names no class and speaks of one that selects otherwise than the keys say."""
    selecting = {TRAINERS[each] for each in MORE if each != kind}
    for key, wrong in (("trainer_class", trainer.get("trainer_class") in selecting),
                       ("k", "k" in trainer and "k" not in MORE.get(kind, ()))):  # fmt: skip
        if wrong:
            raise Refused(f"{where}: trainer.{key}", trainer[key], f"a trainer.dict_class too: the keys of the weights "
                          f"are those of {kind}")  # fmt: skip


def of_class(
    kind: str, arrays: Arrays, trainer: dict[str, Any], path: epath.Path
) -> tuple[Encoder, tuple[str, ...]]:
    """The encoder of a class, and what there is to say of it."""
    turned = kind in TURNED
    n, d = arrays_lib.matrix(arrays, "W_enc" if turned else "encoder.weight", path)
    n, d = (d, n) if turned else (n, d)
    wanted = {key: tuple({"n": n, "d": d}[axis] for axis in axes) for key, axes in keys_of(kind).items()}
    W_enc, W_dec, b_dec, b_enc, *gated = arrays_lib.take(arrays, wanted, path)
    W_enc, W_dec = (W_enc.T, W_dec) if turned else (W_enc, W_dec.T)
    threshold: Any = None
    notes: tuple[str, ...] = ()
    if RULES[kind] == "threshold":
        one = kind != "JumpReluAutoEncoder"
        (threshold,) = arrays_lib.take(arrays, {"threshold": () if one else (n,)}, path)
        if one and threshold < 0:
            notes = ("Its threshold was never set, so every positive feature fires, as in dictionary_learning.",)
        threshold = np.full(n, threshold, np.float32) if one else threshold
    normed = "normalize_to_sqrt_d" in arrays and arrays_lib.take(arrays, {"normalize_to_sqrt_d": ()}, path)[0]
    subtracts = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    encoder = Encoder(
        W_enc=np.ascontiguousarray(W_enc), b_enc=b_enc, W_dec=np.ascontiguousarray(W_dec), b_dec=b_dec,
        b_in=b_dec if subtracts else np.zeros_like(b_dec), threshold=threshold,
        r_mag=gated[0] if gated else None, b_mag=gated[1] if gated else None,
        rule=RULES[kind], k=_k(arrays, trainer, path) if kind == "AutoEncoderTopK" else None,
        norm="constant_norm_rescale" if normed else "none",
    )  # fmt: skip
    return encoder, notes


def _k(arrays: Arrays, trainer: dict[str, Any], path: epath.Path) -> int:
    """k of the file or of its configuration: until December 2024 it was in the latter alone."""
    if "k" not in arrays:
        return arrays_lib.integer(trainer, "k", path.parent / "config.json")
    (k,) = arrays_lib.take(arrays, {"k": ()}, path)
    if trainer.get("k", int(k)) != int(k):
        raise Refused(f"{path}: k", int(k), f"the k of config.json, {trainer['k']}")
    return int(k)
