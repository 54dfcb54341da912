"""The combinations of a sweep as jobs: which there are, which are chosen, what each costs."""

import collections
import hashlib
import importlib.util
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.errors import Refused
from sae_jax.models import facts

# What may be given later: where activations are kept, which code may run, activations that only the user has. What it
# comes to is in the table's column `data`. train.mesh has been counted ever since the first sweeps.
FREE_KEYS = {*config_lib.FREE_KEYS, "data.model.remote_code", "data.model.activations"} - {"train.mesh"}

# What the trained jobs of both shipped sweeps compare, as members.
CONDITIONS = {
    "topk": {"sae": {"center": "none"}},
    "auxk": {"auxk": {"preset": "dictionary_learning"}},
    "centred": {"sae": {"center": "geometric_median"}},
}


YOUNGER = ("sae.activation", "sae.groups", "sae.init_norm", "sparsity.", "data.model.backend", "data.model.weights")


class Job(NamedTuple):
    """One combination, resolved."""

    name: str
    config: ConfigDict

    @property
    def hash(self) -> str:
        """Of all that its result hangs on. Keys that are younger than the first sweeps count where they are set."""
        plain = config_lib.defaults()
        kept = {key: value for key, value in config_lib.flatten(self.config).items()
                if key not in FREE_KEYS and not (key.startswith(YOUNGER) and value == plain[key])}  # fmt: skip
        bare = [name for name in self.config.members if not any(key.startswith(f"members.{name}.") for key in kept)]
        kept |= {"members": bare} if bare else {}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def model(self) -> str:
        """As the table names it."""
        return str(self.config.data.model.id or self.config.data.path or self.config.data.signal)

    @property
    def known(self) -> facts.Facts | None:
        """What is known of its model."""
        return facts.MODELS.get(self.config.data.model.id)

    @property
    def group(self) -> str:
        """Jobs with equal groups get their activations from one forward pass."""
        model = {key: value for key, value in self.config.data.model.items() if key != "layer"}
        return json.dumps([self.config.data.path, self.config.data.signal, model], sort_keys=True)


# -- which jobs ------------------------------------------------------------------------------------------------------


def jobs(path: str, config: ConfigDict, grid: Sequence[str] = ()) -> list[Job]:
    """Every combination that the file's `sweep(add)` names, laid over the configuration, times the grid.

    Args:
      path: of the file; `add(overrides, label)` takes dotted keys.
      grid: KEY=VALUE,VALUE,… each; every combination of values is made.
    """
    spec = importlib.util.spec_from_file_location("sweep_config", path.split(":")[0])
    if spec is None or spec.loader is None:
        raise Refused("--config", path, "a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise Refused("--config", path, "a file with sweep(add) beside get_config(), as configs/sweep.py")
    found: list[Job] = []
    axes, keys = [_axis(config, text) for text in grid], config_lib.flatten(config)

    def add(overrides: dict[str, Any], label: str = "") -> None:
        for point in itertools.product(*axes):
            resolved = ConfigDict(config.to_dict())
            wrong = sorted(set(overrides) - set(keys))
            if wrong:
                raise Refused("--config", wrong[0], f"existing keys in the overrides of sweep(add) of {path}")
            resolved.update_from_flattened_dict({**overrides, **dict(point)})
            config_lib.check(resolved)
            model = resolved.data.model
            name = f"{model.id.replace('/', '--')}_L{model.layer:02d}" if model.id else resolved.data.signal or "data"
            tail = [f"{key.split('.')[-1]}{value}" for key, value in point]
            # Names become those of files in the workdir, and must not lead out of it.
            found.append(Job("_".join([name, *filter(None, [label]), *tail]).replace("/", "-"), resolved))

    try:
        module.sweep(add)
    except Refused:
        raise
    except Exception as error:  # as of the file itself
        raise Refused("--config", path, f"a sweep(add) that runs ({type(error).__name__}: {error})") from error
    if not found:
        raise Refused("--config", path, "a sweep(add) that adds something")
    often, count = collections.Counter(job.name for job in found).most_common(1)[0]
    if count > 1:
        raise Refused("--config", often, "names that are unique: give add() a label")
    return found


FLAGS = {"true": True, "1": True, "false": False, "0": False}


def _axis(config: ConfigDict, text: str) -> list[tuple[str, Any]]:
    key, equals, values = text.partition("=")
    flat = config_lib.flatten(config)
    if not equals or key not in flat:
        raise Refused("--grid", text, "KEY=VALUE,VALUE,… with an existing key, as seed=0,1,2")
    kind = type(flat[key])
    try:
        return [(key, FLAGS[value.lower()] if kind is bool else kind(value)) for value in values.split(",")]
    except (ValueError, KeyError) as error:
        allowed = "values true or false" if kind is bool else f"values of type {kind.__name__}"
        raise Refused("--grid", text, allowed) from error


def selected(every: list[Job], filters: Sequence[str]) -> list[Job]:
    """Those that pass all filters: model=NAME,…, domain=NAME,… or layer=NUMBER,FROM-TO,…"""
    found = every
    for text in filters:
        key, _, values = text.partition("=")
        if key not in ("model", "domain", "layer") or not values:
            raise Refused("--filter", text, "model=NAME,…, domain=NAME,… or layer=NUMBER,FROM-TO,…")
        valid = list(dict.fromkeys(_answer(job, key) for job in every))
        wanted: set[Any] = set(values.split(","))
        if key == "layer":
            wanted = set(itertools.chain(*(_layers(text, part) for part in values.split(","))))
        elif not wanted <= set(valid):
            raise Refused("--filter", text, f"{key} one of {', '.join(map(str, valid))}")
        found = [job for job in found if _answer(job, key) in wanted]
    if not found:
        there = sorted({job.config.data.model.layer for job in every})
        allowed = f"a choice that leaves something; layers are {there[0]} to {there[-1]}"
        raise Refused("--filter", " ".join(filters), allowed)
    return found


def _answer(job: Job, key: str) -> Any:
    return {"model": job.model, "domain": job.known.domain if job.known else "",
            "layer": job.config.data.model.layer}[key]  # fmt: skip


def _layers(text: str, part: str) -> range:
    first, dash, last = part.partition("-")
    last = last if dash else first
    if not first.isdecimal() or not last.isdecimal():
        raise Refused("--filter", text, "layers as 3 or 1-6")
    return range(int(first), int(last) + 1)


def share(found: list[Job], shard: str) -> list[Job]:
    """Part i of N (`shard` = "i/N"), in the order of the jobs, so that models stay together; parts cost about alike."""
    i, slash, count = shard.partition("/")
    if not slash or not i.isdecimal() or not count.isdecimal() or not int(i) < int(count):
        raise Refused("--shard", shard, "i/N with 0 ≤ i < N")
    cost = np.array([estimate(job).forward / 10 + estimate(job).rest for job in found])
    middle = (np.cumsum(cost) - cost / 2) / cost.sum()
    return [job for job, at in zip(found, middle, strict=True) if int(at * int(count)) == int(i)]


def grouped(found: Iterable[Job]) -> list[list[Job]]:
    """Jobs that share a forward pass, together."""
    groups: dict[str, list[Job]] = {}
    for job in found:
        groups.setdefault(job.group, []).append(job)
    return list(groups.values())


# -- what they cost --------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Of one job."""

    d_model: int
    forward: float  # FLOPs of the model's forward pass up to this layer, which jobs of one model share
    rest: float  # FLOPs of counting or training
    bytes: float  # of stored activations


def estimate(job: Job) -> Estimate:
    """To within a factor of two or so: 24·d² a token and block for a transformer's forward pass."""
    config, model, known = job.config, job.config.data.model, job.known
    d = known.width_at(model.layer) if known else config.data.d_model
    n, n_tokens = config.sae.n_features, model.n_tokens
    if config.train.steps:
        rest = 12.0 * n * d * config.train.steps * config.train.batch_size * max(1, len(config.members))
    else:  # moments, six remedies counted and forecast
        rest = 2.0 * n_tokens * d * (3 * d + 6 * (n + 512))
    size = 4 if model.dtype == "float32" else 2
    return Estimate(d, 24.0 * d * d * n_tokens * (model.layer if known else 0), rest, float(n_tokens * d * size))


def plan(found: list[Job]) -> str:
    """What --dry_run prints: every job with its cost, and the sums by model."""
    rate = _rate()
    lines = [f"{'name':40s} {'layer':>5s} {'d_model':>7s} {'GFLOP':>10s} {'MB':>9s} {'minutes':>8s}"]
    models: dict[str, list[tuple[int, Estimate]]] = {}
    for job in found:
        cost, layer = estimate(job), job.config.data.model.layer
        flops = cost.forward + cost.rest
        lines.append(f"{job.name:40s} {layer:5d} {cost.d_model:7d} {flops / 1e9:10.0f} {cost.bytes / 1e6:9.0f} "
                     f"{flops / rate / 60:8.1f}")  # fmt: skip
        models.setdefault(job.model, []).append((layer, cost))
    total = size = 0.0
    for name, costs in models.items():
        layers, widths = [layer for layer, _ in costs], [cost.d_model for _, cost in costs]
        flops = max(cost.forward for _, cost in costs) + sum(cost.rest for _, cost in costs)
        stored = sum(cost.bytes for _, cost in costs)
        total, size = total + flops, size + stored
        width = f"{min(widths)}" + (f"–{max(widths)}" if min(widths) < max(widths) else "")
        lines.append(f"{name}: {len(costs)} combinations, layers {min(layers)}–{max(layers)}, d_model {width}, "
                     f"{flops / 1e12:.1f} TFLOP, {stored / 1e9:.1f} GB, {flops / rate / 60:.0f} min")  # fmt: skip
    lines.append(f"{len(found)} combinations, {total / 1e12:.0f} TFLOP, {size / 1e9:.1f} GB of activations, "
                 f"{total / rate / 3600:.1f} hours at {rate / 1e9:.0f} GFLOP/s (a matmul here)")  # fmt: skip
    return "\n".join(lines)


def _rate() -> float:
    """FLOP/s of a float32 matmul here."""
    size = 1024
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)
