"""Many SAEs on synthetic activations in one program: any settings, several seeds, evaluated as they go.

What `sae_jax train` does for members that see one signal at one scale, for SAEs that differ in both. Each seed has true
features, tokens and initial rows of its own. The step is the package's own. Data are made on the device, so that a step
of hundreds of small SAEs costs a GPU little more than a step of one.
"""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.autoencoder import death, objective
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.errors import Refused
from sae_jax.outliers.preprocess import Preprocessing
from sae_jax.runtime import checkpoint, disk
from sae_jax.training import recovery
from sae_jax.training import step as step_lib

MEASURES = ("dead_by_relu", "dead_by_topk", "collateral", "revived", "bias_projection", "bias_error", "fve",
            "fve_about_zero", "mmcs")  # fmt: skip
# No library's: dictionary_learning's, with as few features a token as the SAE itself keeps.
OWN_PRESETS = {"of 5": objective.PRESETS["dictionary_learning"]._replace(k_aux=5)}
FREE = 1e9  # of train.clip_norm: no clipping
BLOCK = 500  # held-out tokens at a time


class Toy(NamedTuple):
    """What all SAEs have in common."""

    d: int = 64
    n_true: int = 128
    active: int = 5
    n: int = 256
    k: int = 5
    batch: int = 32
    steps: int = 200_000
    held_out: int = 20_000

    @property
    def wakes(self) -> int:
        """For how many steps a feature has to be silent before AuxK takes it up: as 10M tokens at a batch of 2,048."""
        return min(5000, max(1, self.steps // 10))


class Member(NamedTuple):
    """One SAE. `size`: that of the data, ‖sigma‖ = size·√d."""

    gamma: float
    rate: float = 3e-4
    size: float = 1.0
    direction: str = "one"
    clip: float = 1.0
    unit: bool = True
    condition: str = "baseline"
    seed: int = 0


def config(toy: Toy, member: Member) -> ConfigDict:
    """What the package would be told, but for the size of the data."""
    c = config_lib.base()
    c.seed = member.seed
    c.sae.update(n_features=toy.n, k=toy.k, unit_decoder=member.unit, freeze_bias="frozen" in member.condition,
                 balance=member.condition == "balanced")  # fmt: skip
    c.data.update(signal="sparse", d_model=toy.d, n_true_features=toy.n_true, n_active=toy.active,
                  mean_direction=member.direction)  # fmt: skip
    c.train.update(steps=toy.steps, batch_size=toy.batch, learning_rate=member.rate, decay_fraction=0.0,
                   clip_norm=member.clip)  # fmt: skip
    c.auxk.preset, c.auxk.weight = "dictionary_learning", -1.0 if "AuxK" in member.condition else 0.0
    if member.condition == "AuxK of 5":
        c.auxk.preset, c.auxk.weight = "of 5", OWN_PRESETS["of 5"].weight
    elif "AuxK" not in member.condition and jax.default_backend() == "cpu":
        c.auxk.preset = "none"  # a program of its own: there AuxK costs by the member, on a GPU next to nothing
    c.auxk.dead_after_tokens = toy.batch * toy.wakes
    return c


class Toys:
    """SAEs that train together, in groups of one compiled step each."""

    def __init__(self, toy: Toy, members: list[Member]):
        self.toy, self.seeds = toy, sorted({member.seed for member in members})
        statics = [step_lib.Static.of(config(toy, member)) for member in members]
        self.statics = list(dict.fromkeys(statics))
        self.groups = [[m for m, s in zip(members, statics, strict=True) if s == static] for static in self.statics]
        self.members = [member for group in self.groups for member in group]
        specs = [synthetic.build(config(toy, Member(0.0, seed=seed)).data, seed) for seed in self.seeds]
        self.specs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *specs)
        self.of_seed = [jnp.asarray([self.seeds.index(m.seed) for m in group]) for group in self.groups]
        directions = {
            key: synthetic.build(config(toy, Member(0.0, seed=key[0], direction=key[1])).data, key[0]).direction
            for key in {(member.seed, member.direction) for member in members}
        }
        self.mus = [
            jnp.stack([m.gamma * toy.d**0.5 * directions[m.seed, m.direction] for m in group])
            for group in self.groups
        ]
        self._compiled = jax.jit(self._run, donate_argnums=0)
        self._seen = jax.jit(self._evaluate)

    def states(self) -> list[step_lib.TrainState]:
        """Untrained, with what each sees of the signal: its own mean added, at its own size."""
        found = []
        for group, mu in zip(self.groups, self.mus, strict=True):
            before = Preprocessing(shift=-mu, scale=jnp.asarray([member.size for member in group]))
            found.append(step_lib.init_group([config(self.toy, m) for m in group], jnp.zeros_like(mu), before))
        return found

    def _signal(self, split: int, step: Any, rows: Array) -> Float[Array, "S B d"]:
        return jax.vmap(lambda spec: synthetic.sample(spec, split, step, rows))(self.specs)

    def run(self, states: list[step_lib.TrainState], first: int, count: int) -> list[step_lib.TrainState]:
        """The states `count` steps after step `first`; those that are given are used up."""
        with mock.patch.dict(objective.PRESETS, OWN_PRESETS):
            found: list[step_lib.TrainState] = self._compiled(states, np.int32(first), np.int32(count))
        return found

    def _run(self, states: Any, first: Any, count: Any) -> Any:

        def body(t: Array, states: Any) -> Any:
            signal = self._signal(0, t, jnp.arange(self.toy.batch))
            return [
                _each(partial(_step, static=static), state, signal[seeds])
                for static, state, seeds in zip(self.statics, states, self.of_seed, strict=True)
            ]

        return jax.lax.fori_loop(first, first + count, body, states)

    def _evaluate(self, states: Any) -> Any:
        """Of every SAE: positive and kept on some held-out token, mean squares of error and tokens, MMCS, its bias."""

        def block(number: Array, seen: Any) -> Any:
            signal = self._signal(2, number, jnp.arange(BLOCK))
            found = [_each(_sight, state, signal[seeds]) for state, seeds in zip(states, self.of_seed, strict=True)]
            return [
                (positive | p, fired | f, *(a + b for a, b in zip(sums, more, strict=True)))
                for (positive, fired, *sums), (p, f, *more) in zip(seen, found, strict=True)
            ]

        none = [
            (jnp.zeros((len(group), self.toy.n), bool),) * 2 + (jnp.zeros(len(group)),) * 3 for group in self.groups
        ]
        seen = jax.lax.fori_loop(0, self.toy.held_out // BLOCK, block, none)
        return [
            (*of, jax.vmap(lambda sae, s: recovery.mmcs(self.specs.rows[s], sae.W_dec))(state.sae, seeds),
             state.sae.b_dec / state.hyper.before.scale[:, None])
            for of, state, seeds in zip(seen, states, self.of_seed, strict=True)
        ]  # fmt: skip

    def record(self, states: Any, first: Any = None) -> tuple[dict[str, list[float]], Any]:
        """`MEASURES` of every member, and what was positive at the first record, against which later ones are told.

        `collateral`: positive on some token then, and dead by ReLU now; `revived`: the other way round.
        """
        parts = jax.device_get(self._seen(states))
        positive, fired, error, square, about_zero, mmcs, bias = (np.concatenate(p) for p in zip(*parts, strict=True))
        mu = np.concatenate(jax.device_get(self.mus)).astype(np.float64)
        length = np.maximum(np.sum(mu**2, axis=1), 1e-30)
        then = positive if first is None else first
        shares = {
            "dead_by_relu": ~positive, "dead_by_topk": positive & ~fired,
            "collateral": then & ~positive, "revived": ~then & positive,
        }  # fmt: skip
        found = {key: share.mean(axis=1) for key, share in shares.items()} | {
            "bias_projection": np.sum(bias * mu, axis=1) / length,
            "bias_error": np.linalg.norm(bias - mu, axis=1) / np.sqrt(length),
            "fve": 1 - error / square, "fve_about_zero": 1 - error / about_zero, "mmcs": mmcs,
        }  # fmt: skip
        return {key: [round(float(value), 5) for value in found[key]] for key in MEASURES}, then


def _each(one: Callable[..., Any], states: Any, x: Float[Array, "M B d"]) -> Any:
    return jax.vmap(one, axis_name=sae_lib.MEMBER)(states, x)


def _step(state: step_lib.TrainState, signal: Float[Array, "B d"], *, static: step_lib.Static) -> Any:
    x = state.hyper.before(signal)
    return step_lib.train_step(state, x, static=static, most=lambda number: jax.lax.pmax(number, sae_lib.MEMBER))[0]


def _sight(state: step_lib.TrainState, signal: Float[Array, "B d"]) -> Any:
    x = state.hyper.before(signal)
    seen, codes = death.sight(state.sae, x, jnp.ones(len(x), bool))
    square = [jnp.sum(a**2) / state.hyper.before.scale**2 for a in (x - sae_lib.decode(state.sae, codes), x)]
    return seen.positive | seen.fired, seen.fired, square[0], jnp.sum(signal**2), square[1]


def train(toy: Toy, members: list[Member], workdir: Path, points: int = 30) -> None:
    """Trains them, or goes on from the last checkpoint. What was found is in WORKDIR.json after each evaluation.

    Raises:
      Refused: the workdir holds others.
    """
    toys = Toys(toy, members)
    states = toys.states()
    identity = {"toy": toy._asdict(), "members": [member._asdict() for member in toys.members]}
    marks = sorted({0, *(round(step) for step in np.geomspace(max(1, toy.steps // 1000), toy.steps, points).tolist())})
    with contextlib.closing(checkpoint.Checkpoints(str(workdir), 1)) as kept:
        entry, first = toys.record(states)
        history: list[dict[str, Any]] = [{"step": 0, **entry}]
        if kept.latest is not None:
            states, history, held = kept.restore(states)
            if held != identity:
                raise Refused("--workdir", str(workdir), "a folder of these SAEs, or a new one: it holds others")
        for step in [mark for mark in marks if mark > history[-1]["step"]]:
            done = history[-1]["step"]
            states = toys.run(states, done, step - done)
            history.append({"step": step, **toys.record(states, first)[0]})
            disk.write_text(epath.Path(workdir.with_suffix(".json")), json.dumps({**identity, "history": history}))
            kept.save(step, states, {"seeds": np.asarray(toys.seeds)}, history, identity)
            print(f"{workdir.name}: step {step} of {toy.steps}", flush=True)


def read(workdir: Path) -> tuple[list[Member], list[dict[str, Any]]]:
    """The members, as they are ordered in each entry of the history, and the history."""
    told = json.loads(workdir.with_suffix(".json").read_text())
    return [Member(**of) for of in told["members"]], told["history"]
