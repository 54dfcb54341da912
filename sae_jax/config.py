"""The one schema of a run: every key, its default and its meaning; the checks; and what members may change."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sae_jax.autoencoder.objective import PRESETS
from sae_jax.errors import Refused

# Keys that change how a run is carried out but not what it computes: a workdir may be continued with others.
FREE_KEYS = ("train.devices", "checkpoint.keep")
# Keys that all members of a run share: they see the same batches for the same number of steps.
SHARED_KEYS = ("train.steps", "train.batch_size", "train.steps_per_dispatch", "train.devices", "train.mesh")
MOST = 2**31 - 1  # steps, features and seeds are 32-bit integers on the device
MEMBER_SECTIONS = ("seed", "sae", "auxk", "train")
MEMBER_DATA = "data.gamma"  # synthetic data: the members share the signal and differ in how far the mean is


def base(overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The default configuration, which files in configs/ start from, with overrides as {"train.steps": 1000}.

    Every key, with its meaning, stands below. Raises Refused where an override has no such key, or another type.
    """
    config = ConfigDict()
    config.seed = 0  # initialisation, data order and synthetic data

    config.sae = sae = ConfigDict()
    sae.n_features = 8192  # n, dictionary size
    sae.k = 64  # features kept per token
    sae.center = "none"  # where b_dec starts: none (zeros) | mean | geometric_median
    sae.whiten = False  # trained behind PCA whitening, which is part of the SAE: held-out metrics are of x itself
    sae.balance = False  # features that fall silent get a head start in the choice of the k, which fades at the end
    sae.freeze_bias = False  # b_dec stays where it starts
    sae.unit_decoder = True  # decoder rows kept at unit norm: gradient projected, rows renormalised

    # Where activations come from: `path` if set, else `model.id` if set, else `signal`.
    config.data = data = ConfigDict()
    data.path = ""  # a .npy file of (tokens, d_model), or a dataset folder that `sae_jax` wrote
    data.norm = "none"  # of each token, before all else: none | layer_norm | unit
    data.statistics_tokens = 100_000  # training tokens for mu, sigma, gamma and the median
    data.model = model = ConfigDict()
    model.id = ""  # OWNER/NAME on the Hugging Face hub, or a name of models/facts.py, as gpt2 or gemma-3-270m
    model.revision = "main"
    model.remote_code = ""  # NAME=COMMIT[,…]: models whose class is code on the hub, and the commit that may run here
    model.layer = 9  # number of blocks; 0 is the embedding output
    model.hook = "residual"  # residual: the stream after `layer` blocks | attention | mlp | a submodule of that block
    model.n_tokens = 150_000  # tokens to keep (special tokens are not counted)
    model.context = 256  # tokens a sequence, special tokens included
    model.batch_size = 16  # sequences a forward pass
    # What the model is shown, by kind: a file (images: a folder), hf:OWNER/NAME for a dataset of the hub, or empty for
    # what is built in (models/inputs.py).
    model.text = ""
    model.images = ""
    model.proteins = ""
    model.dna = ""
    model.activations = ""  # af3: a file of activations, (tokens, d_model)
    model.keep_special_tokens = False  # BOS tokens are attention sinks with huge norms
    model.dtype = "float32"  # how they are kept: float32 | bfloat16 | float16 (z-scored)
    model.stream = False  # straight into training: computed when needed and not kept, for what no disk would hold
    model.cache = ""  # where datasets are kept; empty: ~/.cache/sae_jax
    data.signal = ""  # synthetic: sparse (known true features) | gaussian (the theory's own assumptions)
    data.gamma = 0.0  # synthetic: gamma_raw = ‖mu‖ / ‖sigma‖
    data.d_model = 256  # synthetic: width
    data.mean_direction = "spread"  # synthetic: one | few | spread, the dimensions that carry the mean
    data.n_true_features = 1024  # sparse
    data.n_active = 5  # sparse: true features active per token
    data.rank = 0  # gaussian: dimensions of the signal; 0 is all
    data.tail_df = 0.0  # gaussian: degrees of freedom of a Student-t tail (> 2); 0 is normal

    config.train = train = ConfigDict()
    train.steps = 10_000
    train.batch_size = 2048  # tokens a step, over all devices
    train.learning_rate = 3e-4
    train.beta1 = 0.9
    train.beta2 = 0.999
    train.warmup_steps = 0  # linear from 1 / (this + 1)
    train.decay_fraction = 0.2  # the last part of the run, linear to 0
    train.clip_norm = 1.0  # of the gradient of one SAE
    train.precision = "float32"  # of matmuls: float32 | bfloat16 (the encoder's; on accelerators all): start centred
    train.steps_per_dispatch = 1  # steps in one compiled call; raise it where steps are short
    train.devices = 0  # local devices to use; 0 is all
    train.mesh = ""  # devices to spread members and features over, as member=2,feature=4; the rest share the batch

    config.auxk = auxk = ConfigDict()
    auxk.preset = "dictionary_learning"  # none | openai | dictionary_learning | saelens | sparsify
    auxk.weight = -1.0  # -1: the preset's own
    auxk.dead_after_tokens = 0  # silent for this long is dead; 0: the smaller of 10M and 5 % of the run

    config.eval = ConfigDict()
    config.eval.n_tokens = 100_000  # held-out tokens (at most a fifth of a stored data set)
    config.eval.batch_size = 2000
    config.eval.points = 0  # evaluations spread evenly over log(step), besides those at checkpoints

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 0  # steps; 0: 5 % of the run
    config.checkpoint.keep = 2  # how many to keep

    config.members = ConfigDict()  # name → overrides: SAEs trained side by side on the same batches; empty: one
    for key, value in (overrides or {}).items():
        if key not in flatten(config):
            raise Refused(key, value, "an existing key")
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise Refused(key, value, f"type {type(flatten(config)[key]).__name__}") from error
    return config


def checkpoint_every(config: ConfigDict) -> int:
    """Steps between checkpoints."""
    return config.checkpoint.every or max(1, config.train.steps // 20)


def evaluation_steps(config: ConfigDict) -> list[int]:
    """Steps at which the held-out set is gone through: every checkpoint, and `eval.points` of even spacing in log."""
    steps, every = config.train.steps, checkpoint_every(config)
    spread = np.geomspace(1, max(steps, 1), config.eval.points) if config.eval.points else np.zeros(0)
    return sorted({*range(0, steps, every), steps, *(min(round(step), steps) for step in spread.tolist())})


def dead_after_tokens(config: ConfigDict) -> int:
    """Tokens without firing after which AuxK takes a feature for dead."""
    return config.auxk.dead_after_tokens or min(
        10_000_000, max(1, config.train.steps * config.train.batch_size // 20)
    )


def auxk_weight(config: ConfigDict) -> float:
    """The weight of the auxiliary loss."""
    return PRESETS[config.auxk.preset].weight if config.auxk.weight == -1 else config.auxk.weight


def mesh(config: ConfigDict) -> dict[str, int]:
    """Axis of `train.mesh` → devices along it."""
    found: dict[str, int] = {}
    for part in filter(None, config.train.mesh.split(",")):
        axis, _, size = part.partition("=")
        if axis not in ("member", "feature") or axis in found or not (size.isdecimal() and 0 < int(size) <= MOST):
            raise Refused("train.mesh", config.train.mesh, "empty, member=N, feature=N, or member=N,feature=N")
        found[axis] = int(size)
    return {"member": 1, "feature": 1} | found


def members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The configuration of every member: the shared one with its overrides laid over, strictly."""
    if not config.members:
        return {"sae": config}
    resolved = {}
    for name, overrides in config.members.items():
        member = ConfigDict(config.to_dict())
        if not isinstance(overrides, ConfigDict):
            raise Refused(f"members.{name}", overrides, "a dictionary of overrides, as {'sae': {'center': 'mean'}}")
        for key, value in flatten(overrides).items():
            field = f"members.{name}.{key}"
            own = key.split(".")[0] in MEMBER_SECTIONS and key not in SHARED_KEYS
            if key not in flatten(config) or not (own or key == MEMBER_DATA):
                allowed = ", ".join(MEMBER_SECTIONS)
                raise Refused(field, value, f"an existing key of {allowed} that is not shared, or {MEMBER_DATA}")
            if key == MEMBER_DATA and (config.data.path or config.data.model.id):
                raise Refused(field, value, "nothing: stored activations have the mean that they have")
            try:
                member.update_from_flattened_dict({key: value})
            except (TypeError, ValueError) as error:
                raise Refused(field, value, f"type {type(flatten(config)[key]).__name__}") from error
        resolved[name] = member
    return resolved


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; empty sections are left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def identity(config: ConfigDict) -> dict[str, Any]:
    """What a run computes, as a flat dictionary that JSON keeps: two runs are the same run if these are equal."""
    return {key: value for key, value in flatten(config).items() if key not in FREE_KEYS}


def from_identity(flat: dict[str, Any]) -> ConfigDict:
    """The configuration that `identity` was taken of; free keys at their defaults."""
    config = base()
    for key, value in flat.items():
        *sections, last = key.split(".")
        part = config
        for section in sections:
            if section not in part:  # members and their overrides have no default
                part[section] = ConfigDict()
            part = part[section]
        part[last] = value
    return config


def check(config: ConfigDict) -> None:
    """Refuses values that cannot be run, each with its field, value and what is allowed."""
    _check_keys(config)
    _check_data(config.data)
    for key in ("train.steps", "train.devices", "checkpoint.every", "eval.points"):
        _at_least(config, key, 0)
    for key in ("train.steps_per_dispatch", "eval.n_tokens", "eval.batch_size", "checkpoint.keep"):
        _at_least(config, key, 1)
    _at_least(config, "train.batch_size", 2)  # one token has no variance to explain
    _check_member(config, "")
    for name, member in members(config).items():
        prefix = f"members.{name}." if config.members else ""
        _check_member(member, prefix)
        _check_gamma(f"{prefix}data.gamma", member.data.gamma)


@functools.cache
def _defaults() -> dict[str, Any]:
    return flatten(base())


def _check_keys(config: ConfigDict) -> None:
    """All keys of the schema and no others, each of the type of its default: files are free to do what flags cannot."""
    known, given = _defaults(), flatten(config)
    for key, value in given.items():
        if key not in known and not key.startswith("members."):
            raise Refused(key, value, "a key of sae_jax.config.base(), or members.NAME.KEY")
    for key, default in known.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(given.get(key), kinds) or isinstance(given[key], bool) != isinstance(default, bool):
            raise Refused(key, given.get(key), f"a value of type {type(default).__name__}")


def _check_data(data: ConfigDict) -> None:
    root = ConfigDict({"data": data})
    if not (data.path or data.model.id or data.signal):
        raise Refused("data.path", data.path, "set data.path (a .npy file or a dataset), data.model.id or data.signal")
    _one_of("data.signal", data.signal, ("", "sparse", "gaussian"))
    _one_of("data.norm", data.norm, ("none", "layer_norm", "unit"))
    _one_of("data.model.dtype", data.model.dtype, ("float32", "bfloat16", "float16"))
    _one_of("data.mean_direction", data.mean_direction, ("one", "few", "spread"))
    _check_gamma("data.gamma", data.gamma)
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


def _check_gamma(field: str, gamma: float) -> None:
    if not (math.isfinite(gamma) and gamma >= 0):
        raise Refused(field, gamma, "a finite number ≥ 0")


def _check_member(config: ConfigDict, prefix: str) -> None:
    _at_least(config, "sae.n_features", 1, prefix)
    for key in ("seed", "train.warmup_steps"):
        _at_least(config, key, 0, prefix)
    if not 1 <= config.sae.k <= config.sae.n_features:
        raise Refused(f"{prefix}sae.k", config.sae.k, f"1 to sae.n_features = {config.sae.n_features}")
    if config.sae.n_features % (feature := mesh(config)["feature"]):
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
