"""What settings may be: refusals with the field, the value and what is allowed. Called by `config.check`."""

import math
from typing import Any

from ml_collections import ConfigDict

from sae_jax.autoencoder.dense import ACTIVATIONS, PENALTIES
from sae_jax.autoencoder.objective import PRESETS
from sae_jax.errors import Refused

MOST = 2**31 - 1  # steps, features and seeds are 32-bit integers on the device
NO_PROJECT = "/\\#?,%:"  # characters that Weights & Biases refuses in the name of a project


def shared(config: ConfigDict) -> None:
    """Settings that all members share."""
    for key in ("train.steps", "train.devices", "checkpoint.every", "eval.points"):
        _at_least(config, key, 0)
    for key in ("train.steps_per_dispatch", "eval.n_tokens", "eval.batch_size", "checkpoint.keep"):
        _at_least(config, key, 1)
    _at_least(config, "train.batch_size", 2)  # one token has no variance to explain
    if not 0 <= config.report.every_seconds < math.inf:
        raise Refused("report.every_seconds", config.report.every_seconds, "a finite number ≥ 0")
    if len(config.report.wandb) > 128 or set(config.report.wandb) & set(NO_PROJECT):
        raise Refused("report.wandb", config.report.wandb, f"a name of up to 128 characters, none of {NO_PROJECT}")


def member_name(name: object) -> None:
    """Names stand in keys, as members.NAME.sae.k, and in reports."""
    if not isinstance(name, str) or not name or "." in name:
        raise Refused("members", name, "names in quotation marks, not empty and without dots, as 'centred'")


def data(data: ConfigDict) -> None:
    """Where activations come from."""
    root = ConfigDict({"data": data})
    if not (data.path or data.model.id or data.signal):
        raise Refused("data.path", data.path, "set data.path (a .npy file or a dataset), data.model.id or data.signal")
    _one_of("data.signal", data.signal, ("", "sparse", "gaussian"))
    _one_of("data.norm", data.norm, ("none", "layer_norm", "unit"))
    _one_of("data.model.backend", data.model.backend, ("torch", "jax"))
    _one_of("data.model.weights", data.model.weights, ("float32", "bfloat16"))
    if data.model.weights != "float32" and data.model.backend != "jax":
        raise Refused("data.model.weights", data.model.weights, "float32, or data.model.backend=jax")
    _one_of("data.model.dtype", data.model.dtype, ("float32", "bfloat16", "float16"))
    _one_of("data.mean_direction", data.mean_direction, ("one", "few", "spread"))
    gamma("data.gamma", data.gamma)
    for key in ("d_model", "n_true_features", "n_active", "statistics_tokens", "model.n_tokens", "model.batch_size"):
        _at_least(root, f"data.{key}", 1)
    _at_least(root, "data.model.layer", 0)
    _at_least(root, "data.model.context", 2)
    if not 0 <= data.rank <= data.d_model:
        raise Refused("data.rank", data.rank, f"0 (all) to d_model = {data.d_model}")
    if data.n_active > data.n_true_features or data.n_true_features < 2:
        raise Refused("data.n_active", data.n_active, f"at most n_true_features = {data.n_true_features} (at least 2)")
    if data.tail_df != 0 and not 2 < data.tail_df < math.inf:
        raise Refused("data.tail_df", data.tail_df, "0 (normal) or a number > 2 (the variance has to exist)")


def gamma(field: str, value: float) -> None:
    """Of a mean."""
    if not (math.isfinite(value) and value >= 0):
        raise Refused(field, value, "a finite number ≥ 0")


def member(config: ConfigDict, prefix: str, feature: int) -> None:
    """Settings of one SAE, whose features are spread over `feature` devices; `prefix` is members.NAME. or empty."""
    _at_least(config, "sae.n_features", 1, prefix)
    for key in ("seed", "train.warmup_steps"):
        _at_least(config, key, 0, prefix)
    _one_of(f"{prefix}sae.activation", config.sae.activation, ACTIVATIONS)
    if config.sae.activation in PENALTIES:
        if config.sae.k:
            others = f"sparsity.preset is one of {', '.join(PENALTIES[config.sae.activation])}, auxk.preset none"
            allowed = f"0 with sae.activation = {config.sae.activation}; {others}"
            raise Refused(f"{prefix}sae.k", config.sae.k, allowed)
    elif not 1 <= config.sae.k <= config.sae.n_features:
        raise Refused(f"{prefix}sae.k", config.sae.k, f"1 to sae.n_features = {config.sae.n_features}")
    if not 0 < config.sae.init_norm < math.inf or (config.sae.unit_decoder and config.sae.init_norm != 1):
        allowed = "1 with sae.unit_decoder" if config.sae.unit_decoder else "a finite number > 0"
        raise Refused(f"{prefix}sae.init_norm", config.sae.init_norm, allowed)
    _sparsity(config, prefix)
    if feature > 1 and (config.sae.activation != "topk" or config.sae.groups):
        what = f"{prefix}sae.groups" if config.sae.groups else f"{prefix}sae.activation"
        value = config.sae.groups or config.sae.activation
        raise Refused(what, value, "topk without groups where train.mesh spreads the features")
    if config.sae.n_features % feature:
        raise Refused(f"{prefix}sae.n_features", config.sae.n_features, f"a multiple of {feature}, as of train.mesh")
    _one_of(f"{prefix}sae.center", config.sae.center, ("none", "mean", "geometric_median"))
    if config.sae.whiten and config.sae.center == "geometric_median":
        raise Refused(f"{prefix}sae.center", config.sae.center, "none or mean: whitening subtracts the mean itself")
    _one_of(f"{prefix}auxk.preset", config.auxk.preset, tuple(PRESETS))
    _one_of(f"{prefix}train.precision", config.train.precision, ("float32", "bfloat16"))
    if config.auxk.weight != -1 and not 0 <= config.auxk.weight < math.inf:
        raise Refused(f"{prefix}auxk.weight", config.auxk.weight, "a finite number ≥ 0, or -1 for the preset's own")
    if not 0 <= config.auxk.dead_after_tokens < 2**31:
        raise Refused(f"{prefix}auxk.dead_after_tokens", config.auxk.dead_after_tokens, "0 (automatic) to 2^31 - 1")
    for key in ("learning_rate", "clip_norm"):
        if not 0 < config.train[key] < math.inf:
            raise Refused(f"{prefix}train.{key}", config.train[key], "a finite number > 0")
    for key in ("beta1", "beta2"):
        if not 0 <= config.train[key] < 1:
            raise Refused(f"{prefix}train.{key}", config.train[key], "a number from 0 to under 1")
    if not 0 <= config.train.decay_fraction <= 1:
        raise Refused(f"{prefix}train.decay_fraction", config.train.decay_fraction, "a number from 0 to 1")


def _sparsity(config: ConfigDict, prefix: str) -> None:
    """What asks for few activations: k, or a penalty."""
    activation, given = config.sae.activation, config.sparsity
    presets = PENALTIES.get(activation, {"none": None})
    if given.preset not in presets:
        allowed = "one of " + ", ".join(presets) if activation in PENALTIES else "none"
        raise Refused(f"{prefix}sparsity.preset", given.preset, f"{allowed}, with sae.activation = {activation}")
    target = getattr(presets[given.preset], "has_target", False)
    if not (0 < given.target_l0 <= config.sae.n_features if target else given.target_l0 == 0):
        allowed = f"over 0, up to sae.n_features = {config.sae.n_features}" if target else "0"
        what = f"with sae.activation = {activation}, sparsity.preset = {given.preset}"
        raise Refused(f"{prefix}sparsity.target_l0", given.target_l0, f"{allowed}, {what}")
    parts, n = config.sae.groups.split(",") if config.sae.groups else [], config.sae.n_features
    if parts:
        ends = [int(part) if part.isdecimal() and len(part) < 12 else 0 for part in parts]
        if ends[-1] != n or any(a >= b for a, b in zip((0, *ends), ends, strict=False)):
            allowed = f"rising widths without spaces that end at sae.n_features, as {max(1, n // 4)},{n}"
            raise Refused(f"{prefix}sae.groups", config.sae.groups, allowed)
    _at_least(config, "sparsity.warmup_steps", 0, prefix)
    used = {"relu": ("weight", "warmup_steps")}.get(activation, ("weight", "warmup_steps", "threshold", "bandwidth"))
    for key, unused in (("weight", -1), ("warmup_steps", 0), ("threshold", -1), ("bandwidth", -1)):
        if given[key] != unused and (key not in used or activation not in PENALTIES):
            raise Refused(f"{prefix}sparsity.{key}", given[key], f"{unused} with sae.activation = {activation}")
    if given.warmup_steps > config.train.steps:
        raise Refused(f"{prefix}sparsity.warmup_steps", given.warmup_steps, f"up to train.steps = {config.train.steps}")
    for key in ("weight", "threshold", "bandwidth"):
        low = "> 0" if key == "bandwidth" else "≥ 0"
        fine = 0 < given[key] < math.inf or (given[key] == 0 and key != "bandwidth")
        if given[key] != -1 and not fine:
            raise Refused(f"{prefix}sparsity.{key}", given[key], f"a finite number {low}, or -1 for the preset's own")
    if activation in PENALTIES and config.auxk.preset != "none":
        raise Refused(f"{prefix}auxk.preset", config.auxk.preset, f"none with sae.activation = {activation}")
    if activation == "relu" and config.sae.balance:
        raise Refused(f"{prefix}sae.balance", True, "False with sae.activation = relu, which selects nothing")
    if (activation != "topk" or config.sae.groups) and config.train.precision != "float32":
        raise Refused(f"{prefix}train.precision", config.train.precision, "float32, but for topk without groups")


def _at_least(config: ConfigDict, key: str, low: int, prefix: str = "") -> None:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    if value < low:
        raise Refused(prefix + key, value, f"an integer ≥ {low}")
    if value > MOST:
        raise Refused(prefix + key, value, "an integer up to 2^31 - 1")


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise Refused(field, value, "one of " + ", ".join(name or "''" for name in allowed))
