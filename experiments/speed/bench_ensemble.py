"""What an ensemble costs: eight members in one program against eight programs of one, on the same batches.

    python -m experiments.speed.bench_ensemble --workdir=runs/bench_ensemble --scale=cpu

A small toy and a larger one, without AuxK and with it at work in every step; thousands of steps
to a dispatch, data made on the device. The median of five turns each, taken in turn. Writes bench_ensemble.csv; two
minutes on 2 CPU cores.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import command
from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.reports import tables
from sae_jax.training import step as step_lib

# d, n, k, batch
SHAPES = ((32, 128, 3, 32), (32, 256, 2, 64))
MEMBERS, TURNS = 8, 5
STEPS = {"smoke": 20, "cpu": 1000, "paper": 20_000}


def timed(config: ConfigDict, like: Any, steps: int) -> Callable[[Any], float]:
    """A function that runs `steps` steps from states of a shape and returns the seconds they took."""
    static, spec = step_lib.Static.of(config), synthetic.build(config.data, 0)

    def body(t: jax.Array, states: Any) -> Any:
        x = synthetic.sample(spec, 0, t, jnp.arange(config.train.batch_size))
        return step_lib.group_step(states, x, static=static, allsum=lambda tree: tree)[0]

    run = jax.jit(lambda states: jax.lax.fori_loop(0, steps, body, states)).lower(like).compile()

    def turn(states: Any) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(states))
        return time.perf_counter() - began

    return turn


def row(shape: tuple[int, int, int, int], preset: str, steps: int) -> dict[str, Any]:
    """Both ways at one shape."""
    d, n, k, batch = shape
    config = config_lib.base()
    config.sae.n_features, config.sae.k = n, k
    config.data.update(signal="sparse", gamma=20.0, d_model=d, n_true_features=2 * d, n_active=2)
    config.train.update(batch_size=batch, steps=1_000_000)
    config.auxk.preset, config.auxk.dead_after_tokens = preset, 1
    configs = []
    for seed in range(MEMBERS):
        member = ConfigDict(config.to_dict())
        member.seed = seed
        configs.append(member)
    group = step_lib.init_group(configs, jnp.zeros((MEMBERS, d)))
    members = [step_lib.init_group([c], jnp.zeros((1, d))) for c in configs]
    together, alone = timed(config, group, steps), timed(config, members[0], steps)
    turns = np.array([(together(group), sum(map(alone, members))) for _ in range(TURNS)])
    one, many = np.median(turns, axis=0)
    return {"d": d, "n": n, "k": k, "batch": batch, "auxk": preset, "members": MEMBERS, "seconds_together": one,
            "seconds_one_by_one": many, "ratio": one / many, "sae_steps_per_second": MEMBERS * steps / one}  # fmt: skip


def main(workdir: Path, scale: str) -> None:
    """Goes through shapes and presets; writes the table."""
    rows = []
    for shape in SHAPES:
        for preset in ("none", "dictionary_learning"):
            rows.append(row(shape, preset, STEPS[scale]))
            print(tables.one_line(rows[-1]), flush=True)
    tables.write_csv(workdir / "bench_ensemble.csv", rows)


if __name__ == "__main__":
    command.start(main, "bench_ensemble")
