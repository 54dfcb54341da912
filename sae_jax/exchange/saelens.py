"""SAELens: folders of version 6 and before, and its published releases through its own loaders.

    W_enc (d, n)    b_enc (n,)    W_dec (n, d_out)    b_dec (d_out,)    cfg.json, sae_weights.safetensors
    jumprelu: threshold (n,)    gated: b_gate, r_mag, b_mag (n,) for b_enc    skip: W_skip (d_out, d)

    z_pre = W_enc (norm(x) − b_dec) + b_enc        b_dec is subtracted where `apply_b_dec_to_input`, by no transcoder

As in SAELens 6.54.12. Folders before 6.0 are read as its `handle_pre_6_0_config` does. `expected_average_only_in` and
`covariance_whitening` mean nothing to an SAE on disk, there as here: SAELens folds them into the weights when it saves
for inference, and otherwise runs the SAE on activations as they are.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused, first_line
from sae_jax.exchange import arrays as arrays_lib
from sae_jax.exchange.arrays import Arrays
from sae_jax.exchange.encoders import Encoder, Opened, of_sae
from sae_jax.runtime.optional import module

SAELENS_VERSION = "6.54.12"  # whose layout is written
WEIGHTS = "sae_weights.safetensors"
HUB = "saelens:"
RULES = {  # architecture → rule; the two batchtopk are SAEs saved in training
    "standard": "relu", "topk": "topk", "abstopk": "abstopk", "jumprelu": "threshold", "gated": "gated",
    "batchtopk": "threshold", "matryoshka_batchtopk": "threshold",
    "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu_transcoder": "threshold", "jumprelu_skip_transcoder": "threshold",
}  # fmt: skip
NOT_TAKEN = {
    "matching_pursuit": "matching pursuit is not supported: it has no encoder, features are chosen one by one",
    "temporal": "temporal SAEs are not supported: what a feature does depends on the tokens before",
}
NORMS = {
    "none": "none", "layer_norm": "sample_layer_norm", "constant_norm_rescale": "constant_norm_rescale",
    "expected_average_only_in": "none", "covariance_whitening": "none",
}  # fmt: skip


def write(sae: SAE, flag: str, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The files of an SAE; `flag` is its normalize_activations. BatchTopK becomes JumpReLU, as in SAELens itself."""
    from safetensors.numpy import save as to_bytes

    n, d = sae.W_enc.shape
    encoder = of_sae(sae)
    own: dict[str, dict[str, Any]] = {
        "topk": {"architecture": "topk", "k": sae.k, "rescale_acts_by_decoder_norm": False},
        "threshold": {"architecture": "jumprelu"}, "relu": {"architecture": "standard"},
    }  # fmt: skip
    config = {
        **own[encoder.rule], "d_in": d, "d_sae": n, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": flag, "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
    }  # fmt: skip
    arrays = {"W_enc": np.ascontiguousarray(sae.W_enc.T), "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    arrays |= {"threshold": encoder.threshold} if encoder.rule == "threshold" else {}
    return {WEIGHTS: to_bytes(arrays), "cfg.json": arrays_lib.to_json(config)}


def read(path: epath.Path) -> Opened:
    """The SAE of a folder, by its weights' path."""
    where = path.parent / "cfg.json"
    config = modern(arrays_lib.config_beside(where), where)
    architecture = config.get("architecture", "missing")
    if architecture in NOT_TAKEN or architecture not in RULES:
        allowed = NOT_TAKEN.get(str(architecture), "one of " + ", ".join(RULES))
        raise Refused(f"{where}: architecture", architecture, allowed)
    arrays, _ = arrays_lib.read_arrays(path)
    return opened(config, arrays, where, path)


def temporal(path: epath.Path) -> Opened:
    """latest_ckpt.safetensors, of the temporal SAEs that SAELens lists: refused."""
    raise Refused("--sae", str(path.parent), NOT_TAKEN["temporal"])


def modern(config: dict[str, Any], where: epath.Path) -> dict[str, Any]:
    """A configuration as version 6 has it; those of earlier versions are flat and name some things otherwise."""
    metadata = arrays_lib.of(config, "metadata", where)
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    if int((re.match(r"\d+", version) or ["0"])[0]) >= 6:
        return config
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
               "activation_fn_str": "activation_fn", "hook_layer": "layer", "hook_point_layer": "layer"}  # fmt: skip
    config = {renamed.get(key, key): value for key, value in config.items()}
    architecture = config.get("architecture") or "standard"
    activation, norm = config.get("activation_fn") or "relu", config.get("normalize_activations") or "none"
    if activation == "topk":
        architecture = "topk"
        config["k"] = arrays_lib.of(config, "activation_fn_kwargs", where).get("k", config.get("k"))
    elif activation != "relu":
        raise Refused(f"{where}: activation_fn", activation, "relu or topk: others are not supported")
    known = ("model_name", "hook_name", "layer", "context_size", "prepend_bos", "dataset_path")
    return config | {
        "architecture": architecture,
        "normalize_activations": "expected_average_only_in" if norm is True else norm,
        "metadata": metadata | {key: config[key] for key in known if config.get(key) is not None},
    }


def opened(config: Mapping[str, Any], arrays: Arrays, where: epath.Path, path: epath.Path) -> Opened:
    """An SAE from a configuration as version 6 has it and arrays under SAELens' names."""
    config = dict(config)
    architecture, flag = config["architecture"], config.get("normalize_activations") or "none"
    rule, transcodes, skips = RULES[architecture], "transcoder" in architecture, "skip" in architecture
    if not isinstance(flag, str) or flag not in NORMS:
        raise Refused(f"{where}: normalize_activations", flag, ", ".join(NORMS))
    n, d = (arrays_lib.integer(config, key, where) for key in ("d_sae", "d_in"))
    d_out = arrays_lib.integer(config, "d_out", where) if transcodes else d
    wanted: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "W_dec": (n, d_out), "b_dec": (d_out,)}
    wanted |= {"b_gate": (n,), "r_mag": (n,), "b_mag": (n,)} if rule == "gated" else {"b_enc": (n,)}
    # One for all, of an SAE saved in training.
    if rule == "threshold" and "topk_threshold" in arrays and "threshold" not in arrays:
        arrays["threshold"] = np.broadcast_to(arrays["topk_threshold"], (n,))
    wanted |= {"threshold": (n,)} if rule == "threshold" else {}
    wanted |= {"W_skip": (d_out, d)} if skips else {}
    factor = arrays.get("scaling_factor", np.ones(n))  # of SAELens 1 to 5, finetuned: acts · factor are decoded
    found = dict(zip(wanted, arrays_lib.take(arrays, wanted, path), strict=True))
    if factor.shape != (n,) or not np.isfinite(factor).all():
        raise Refused(f"{path}: scaling_factor", factor.shape, f"finite numbers of the shape {(n,)}")
    k = arrays_lib.integer(config, "k", where) if rule in ("topk", "abstopk") else None
    applied = config.get("apply_b_dec_to_input", True) and not transcodes
    W_dec = found["W_dec"]
    rescaled = config.get("rescale_acts_by_decoder_norm", False) and (k is not None or "batchtopk" in architecture)
    encoder = Encoder(
        W_enc=np.ascontiguousarray(found["W_enc"].T), b_enc=found["b_gate" if rule == "gated" else "b_enc"],
        W_dec=W_dec if np.all(factor == 1) else np.float32(W_dec * factor[:, None]), b_dec=found["b_dec"],
        b_in=found["b_dec"] if applied else np.zeros(d, np.float32),
        threshold=found.get("threshold"), r_mag=found.get("r_mag"), b_mag=found.get("b_mag"),
        ranked_by=np.float32(np.linalg.norm(np.asarray(W_dec, np.float64), axis=1)) if rescaled else None,
        W_skip=found.get("W_skip"), rule=rule, k=k, norm=NORMS[flag], transcodes=transcodes,
    )  # fmt: skip
    reshape = config.get("reshape_activations") or "none"
    stays = "" if reshape == "none" else f"reshape_activations = {reshape!r} is not written"
    notes = arrays_lib.unread(arrays, {*wanted, "topk_threshold", "scaling_factor"})
    if flag in ("expected_average_only_in", "covariance_whitening"):
        notes += (f"Its configuration says {flag}, which SAELens, like this report, does not apply to an SAE on disk: "
                 "the activations have to be scaled as they were in training.",)  # fmt: skip
        stays = f"normalize_activations = {flag!r} is not written"
    versions = ("sae_lens_version", "sae_lens_training_version")
    metadata = {key: value for key, value in arrays_lib.of(config, "metadata", where).items() if key not in versions}
    return Opened(encoder, metadata, "saelens", notes, stays)


# -- published releases ----------------------------------------------------------------------------------------------


def from_release(name: str) -> Opened:
    """saelens:RELEASE/ID, through `SAE.from_pretrained`: what SAELens reads, and as it reads it.

    A release may also be a repository of the hub, as SAELens takes it: saelens:OWNER/NAME/ID.
    """
    with warnings.catch_warnings():  # of what it is built on
        warnings.simplefilter("ignore")
        sae_lens = module("sae_lens", "saelens")
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    rest = name.removeprefix(HUB).strip("/")
    directory = get_pretrained_saes_directory()
    release, _, ident = rest.partition("/")
    if release not in directory:
        owner, _, other = ident.partition("/")
        if not other:
            near = [known for known in directory if release.lower() in known.lower()] or list(directory)
            raise Refused("--sae", name, f"saelens:RELEASE/ID, a release of SAELens' list as {arrays_lib.listed(near)}")
        release, ident = f"{release}/{owner}", other
    elif ident not in directory[release].saes_map:
        raise Refused("--sae", name, f"one of the {len(directory[release].saes_map)} SAEs of {release}: "
                      + arrays_lib.listed(list(directory[release].saes_map)))  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = sae_lens.SAE.from_pretrained(release, ident, device="cpu", dtype="float32")
    except Exception as error:  # no network, a file that is missing, an architecture of tomorrow
        raise Refused("--sae", name, f"an SAE that SAELens can load ({first_line(error)})") from error
    return _of_module(sae, name)


def _of_module(sae: Any, name: str) -> Opened:
    config = sae.cfg.to_dict()
    architecture = config["architecture"]
    if architecture not in RULES:
        raise Refused(name, architecture, NOT_TAKEN.get(architecture, "one of " + ", ".join(RULES)))
    arrays = {key: value.detach().float().numpy() for key, value in sae.state_dict().items()}
    metadata = {key: value for key, value in config["metadata"].items() if isinstance(value, str | int | float | bool)}
    return opened(config | {"metadata": metadata}, arrays, epath.Path(name), epath.Path(name))
