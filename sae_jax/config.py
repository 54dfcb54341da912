"""The one schema of a run: every key, its default and its meaning; what members may change; when runs are the same."""

import functools
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sae_jax import checks
from sae_jax.autoencoder.dense import PENALTIES
from sae_jax.autoencoder.objective import PRESETS
from sae_jax.checks import MOST
from sae_jax.errors import Refused

# Keys that change how a run is carried out but not what it computes: a workdir may be continued with others.
FREE_KEYS = ("train.devices", "train.mesh", "checkpoint.keep", "data.model.cache",
             "report.every_seconds", "report.wandb")  # fmt: skip
# Keys that name a file or a folder, which may be named in several ways.
PATH_KEYS = ("data.path", *(f"data.model.{kind}" for kind in ("text", "images", "proteins", "dna", "activations")))
# Keys that all members of a run share: they see the same batches for the same number of steps.
SHARED_KEYS = ("train.steps", "train.batch_size", "train.steps_per_dispatch", "train.devices", "train.mesh")
MEMBER_SECTIONS = ("seed", "sae", "sparsity", "auxk", "train")
MEMBER_DATA = "data.gamma"  # synthetic data: the members share the signal and differ in how far the mean is


def base(overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The default configuration, which files in configs/ start from, with overrides as {"train.steps": 1000}.

    Every key, with its meaning, stands below. Raises Refused where an override has no such key, or another type.
    """
    config = ConfigDict()
    config.seed = 0  # initialisation, data order and synthetic data

    config.sae = sae = ConfigDict()
    sae.n_features = 8192  # n, dictionary size
    sae.activation = "topk"  # topk | batch_topk | jumprelu | relu
    sae.k = 64  # features kept per token, of batch_topk on average; 0 where a penalty decides: jumprelu, relu
    sae.groups = ""  # Matryoshka: widths of the prefixes that reconstruct by themselves, as 1024,4096,8192
    sae.center = "none"  # where b_dec starts: none (zeros) | mean | geometric_median
    sae.whiten = False  # trained behind PCA whitening, which is part of the SAE: held-out metrics are of x itself
    sae.balance = False  # features that starve get a head start in the selection, gone at the end: few die
    sae.freeze_bias = False  # b_dec stays where it starts
    sae.unit_decoder = True  # decoder rows kept at unit norm: gradient projected, rows renormalised
    sae.init_norm = 1.0  # of decoder rows at the start, where they may have any norm; SAELens has 0.1

    # The penalty of jumprelu and relu, by the library it is from (autoencoder/jumprelu.py, autoencoder/relu.py).
    config.sparsity = sparsity = ConfigDict()
    sparsity.preset = "none"  # none | saelens | dictionary_learning, and of jumprelu saelens_tanh | saelens_quadratic
    sparsity.weight = -1.0  # -1: the preset's own
    sparsity.target_l0 = 0.0  # features a token, of jumprelu's saelens_quadratic and dictionary_learning
    sparsity.warmup_steps = 0  # over which the weight grows from 0
    sparsity.threshold = -1.0  # where those of jumprelu start, of tokens with ‖sigma‖ = √d; -1: the preset's own
    sparsity.bandwidth = -1.0  # of jumprelu's pseudo-derivative, in the same units; -1: the preset's own

    # Where activations come from: `path` if set, else `model.id` if set, else `signal`.
    config.data = data = ConfigDict()
    # PATH::NAME is one of several arrays, columns or splits; PATH::NAME?without=first,id=3,norm=10 leaves tokens out.
    data.path = ""  # a file, folder or pattern of files of (tokens, d_model), or a dataset that `sae_jax` wrote
    data.norm = "none"  # of each token, before all else: none | layer_norm | unit
    data.statistics_tokens = 100_000  # training tokens for mu, sigma, gamma and the median
    data.model = model = ConfigDict()
    model.id = ""  # OWNER/NAME on the Hugging Face hub, or a name of models/facts.py, as gpt2 or gemma-3-270m
    model.revision = "main"  # of the model on the hub: branch, tag or commit
    model.remote_code = ""  # NAME=COMMIT[,…]: models whose class is code on the hub, and the commit that may run here
    model.layer = 9  # number of blocks; 0 is the embedding output
    model.hook = "residual"  # residual: the stream after `layer` blocks | attention | mlp | a submodule of that block
    model.n_tokens = 150_000  # tokens to keep (special tokens are not counted)
    model.backend = "torch"  # what runs the model: torch | jax, on the devices that train the SAE (extra torchax)
    model.weights = "float32"  # of the model where JAX runs it: float32 | bfloat16, faster on accelerators
    model.context = 256  # tokens a sequence, special tokens included
    model.batch_size = 16  # sequences a forward pass
    # What the model is shown, by kind: a file (images: a folder), hf:OWNER/NAME for a dataset of the hub, or empty for
    # what is built in (models/inputs.py).
    model.text = ""  # UTF-8; built in: the documentation of Python
    model.images = ""  # built in: crops of photos
    model.proteins = ""  # FASTA; built in: variants of antibody domains
    model.dna = ""  # FASTA; built in: the same as codons
    model.activations = ""  # af3: a file of activations, (tokens, d_model)
    model.keep_special_tokens = False  # BOS tokens are attention sinks with huge norms
    model.dtype = "float32"  # how they are kept: float32 | bfloat16 | float16 (z-scored)
    model.stream = False  # straight into training: computed when needed and not kept, for what no disk would hold
    model.cache = ""  # where datasets are kept; empty: ~/.cache/sae_jax
    data.signal = ""  # synthetic: sparse (known true features) | gaussian (the theory's own assumptions)
    data.gamma = 0.0  # synthetic: gamma_raw = ‖mu‖ / ‖sigma‖
    data.d_model = 256  # synthetic: width
    data.mean_direction = "spread"  # synthetic: one | few | spread, the dimensions that carry the mean
    data.n_true_features = 1024  # sparse: true features there are
    data.n_active = 5  # sparse: true features active per token
    data.rank = 0  # gaussian: dimensions of the signal; 0 is all
    data.tail_df = 0.0  # gaussian: degrees of freedom of a Student-t tail (> 2); 0 is normal

    config.train = train = ConfigDict()
    train.steps = 10_000  # of Adam; 0: evaluation at initialisation only
    train.batch_size = 2048  # tokens a step, over all devices
    train.learning_rate = 3e-4  # of Adam, after warm-up and before decay
    train.beta1 = 0.9  # of Adam: decay of the mean of gradients
    train.beta2 = 0.999  # of Adam: decay of the mean of their squares
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
    config.eval.batch_size = 2000  # held-out tokens at a time, over all devices
    config.eval.points = 0  # evaluations spread evenly over log(step), besides those at checkpoints

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 0  # steps; 0: 5 % of the run
    config.checkpoint.keep = 2  # how many to keep

    config.report = ConfigDict()
    config.report.every_seconds = 30.0  # between lines of progress where stderr is no terminal; 0: none
    config.report.wandb = ""  # a project on Weights & Biases that gets the curves and the report; empty: none

    config.members = ConfigDict()  # name → overrides: SAEs trained side by side on the same batches; empty: one
    for key, value in (overrides or {}).items():
        if key not in flatten(config):
            raise Refused(key, value, "there is no such setting")
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
    return config.auxk.dead_after_tokens or min(10_000_000, max(1, config.train.steps * config.train.batch_size // 20))


def auxk_weight(config: ConfigDict) -> float:
    """The weight of the auxiliary loss."""
    return PRESETS[config.auxk.preset].weight if config.auxk.weight == -1 else config.auxk.weight


def of_penalty(config: ConfigDict, field: str) -> float:
    """A number of `sparsity`, or the preset's own where it is -1; 0 where there is none."""
    own = getattr(PENALTIES.get(config.sae.activation, {}).get(config.sparsity.preset), field, 0.0)
    return float(own if config.sparsity[field] == -1 else config.sparsity[field])


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
        checks.member_name(name)
        member = ConfigDict(config.to_dict())
        if not isinstance(overrides, ConfigDict):
            raise Refused(f"members.{name}", overrides, "a dictionary of overrides, as {'sae': {'center': 'mean'}}")
        for key, value in flatten(overrides).items():
            field = f"members.{name}.{key}"
            own = key.split(".")[0] in MEMBER_SECTIONS and key not in SHARED_KEYS
            if key not in flatten(config) or not (own or key == MEMBER_DATA):
                allowed = ", ".join(MEMBER_SECTIONS)
                raise Refused(field, value, f"a setting of {allowed} that is not shared, or {MEMBER_DATA}")
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
    """What a run computes, as a flat dictionary that JSON keeps; `members` has their names, as some set nothing."""
    return {"members": list(config.members)} | {k: v for k, v in flatten(config).items() if k not in FREE_KEYS}


def changed(config: ConfigDict, held: dict[str, Any], folder: str) -> tuple[str, Any, Any] | None:
    """The first key in which a configuration computes something else than a run that is held: (key, then, now).

    Args:
      held: the `identity` of the run. A key that it lacks did not exist then: its default counts, any of `members`.
      folder: that its relative paths start from.
    """
    wanted = json.loads(json.dumps(identity(config)))
    for key in sorted((wanted.keys() | held.keys()) - set(FREE_KEYS) - ({"members"} - held.keys())):
        then, now = held.get(key, defaults().get(key)), wanted.get(key)
        if then != now and not (key in PATH_KEYS and then and now and _place(folder, then) == _place("", now)):
            return key, then, now
    return None


def _place(folder: str, path: str) -> str:
    """Where a path leads, seen from a folder; addresses stay as they are."""
    return path if "://" in path or path.startswith("hf:") else os.path.realpath(os.path.join(folder, path))


def split_member(config: ConfigDict, key: str) -> tuple[str, str]:
    """members.NAME.KEY → (NAME, KEY), which any member may be given on the command line; other keys → ("", key).

    In a configuration that names members a new name is more likely a slip: it stays a key that does not exist.
    """
    section, _, rest = key.partition(".")
    name, _, own = rest.partition(".")
    known = not config.members or name in config.members
    return (name, own) if section == "members" and name and own and known else ("", key)


def lay_over_member(config: ConfigDict, name: str, key: str, value: Any) -> None:
    """Sets an override of one member, which is made where the configuration names no members at all."""
    with config.unlocked():
        _put(config, f"members.{name}.{key}", value)


def _put(config: ConfigDict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if section not in config:  # members and their overrides have no default
            config[section] = ConfigDict()
        config = config[section]
    config[last] = value


def from_identity(flat: dict[str, Any], names: Iterable[str] = ()) -> ConfigDict:
    """The configuration that `identity` was taken of, with `names` of members if it has none; free keys as `base`."""
    config = ConfigDict(base().to_dict() | {"members": {name: {} for name in flat.get("members", names)}})
    for key in flat.keys() - {"members"}:
        _put(config, key, flat[key])
    return config


def check(config: ConfigDict) -> None:
    """Refuses values that cannot be run, each with its field, value and what is allowed."""
    _check_keys(config)
    checks.data(config.data)
    checks.shared(config)
    checks.member(config, "", mesh(config)["feature"])
    for name, member in members(config).items():
        prefix = f"members.{name}." if config.members else ""
        checks.member(member, prefix, mesh(member)["feature"])
        checks.gamma(f"{prefix}data.gamma", member.data.gamma)


@functools.cache
def defaults() -> dict[str, Any]:
    """`base`, flat; made once, so not to be changed."""
    return flatten(base())


def _check_keys(config: ConfigDict) -> None:
    """All keys of the schema and no others, each of the type of its default: files are free to do what flags cannot."""
    known, given = defaults(), flatten(config)
    for key, value in given.items():
        if key not in known and not key.startswith("members."):
            raise Refused(key, value, "a key of sae_jax.config.base(), or members.NAME.KEY")
    for key, default in known.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(given.get(key), kinds) or isinstance(given[key], bool) != isinstance(default, bool):
            raise Refused(key, given.get(key), f"a value of type {type(default).__name__}")
