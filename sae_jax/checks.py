"""What settings may be: refusals with the field, the value and what is allowed. Called by `config.check`."""

import math
from typing import Any

from ml_collections import ConfigDict

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
    if not 1 <= config.sae.k <= config.sae.n_features:
        raise Refused(f"{prefix}sae.k", config.sae.k, f"1 to sae.n_features = {config.sae.n_features}")
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
