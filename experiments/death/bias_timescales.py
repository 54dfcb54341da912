"""How long the bias takes to learn the mean, against Adam's own time, and what explains the excess.

    python -m experiments.death.bias_timescales --workdir=runs/bias_timescales --scale=cpu

Steps until b·mu passes 50, 90 and 99 % of ‖mu‖², over gamma, the direction of the mean and the learning rate, five
seeds each; data scaled to ‖sigma‖ = √d. Beside it the least that Adam could take (`theory.bias_learning_time` over the
learning rate) and the floor: b's optimum is not mu but mu − W_decᵀE[z], which live features that carry some of the mean
move away from it. Then interventions at one gamma, in both directions: the weights held still (nothing can learn to
carry the mean), rows of both weights kept from moving along the mean, a batch 8 times as large (less noise in the
gradient), and that with the weights held. Writes bias_timescales.csv and bias_interventions.csv.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import command
from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.outliers import theory
from sae_jax.outliers.preprocess import Preprocessing
from sae_jax.reports import tables
from sae_jax.training import step as step_lib

SHARES = (0.5, 0.9, 0.99)
SEEDS = range(5)
# d, true features, n, k; gammas, learning rates, steps; gamma and batches of the interventions
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"d": 8, "n": 16, "gammas": (1.0,), "rates": (3e-2,), "steps": 600, "gamma": 1.0, "batches": (8, 16)},
    "cpu": {"d": 16, "n": 64, "gammas": (2.0, 5.0), "rates": (1e-3, 3e-3), "steps": 60_000, "gamma": 2.0,
            "batches": (32, 256)},
    "paper": {"d": 256, "n": 8192, "gammas": (1.0, 5.0, 20.0, 40.0), "rates": (3e-4,), "steps": 2_000_000,
              "gamma": 20.0, "batches": (2048, 32768)},
}  # fmt: skip


def shared(scale: str, direction: str, batch: int, steps: int) -> ConfigDict:
    """What all members have in common; gamma is 1 and the members move further away."""
    c = config_lib.base()
    c.sae.n_features, c.sae.k = SCALES[scale]["n"], 3
    c.data.update(signal="sparse", gamma=1.0, d_model=SCALES[scale]["d"], n_true_features=SCALES[scale]["n"],
                  n_active=2, mean_direction=direction)  # fmt: skip
    c.train.update(steps=steps, batch_size=batch, decay_fraction=0.0)
    c.auxk.preset = "none"
    return c


def kept(new: sae_lib.SAE, old: sae_lib.SAE, hold: str, direction: jax.Array) -> sae_lib.SAE:
    """The SAEs after a step whose weights are held: `all`, or what of them is `along` a unit vector; or not."""
    if hold == "all":
        return old.replace(b_dec=new.b_dec)
    if hold != "along":
        return new

    def off(after: jax.Array, before: jax.Array) -> jax.Array:
        return after - ((after - before) @ direction)[..., None] * direction

    return new.replace(W_enc=off(new.W_enc, old.W_enc), W_dec=off(new.W_dec, old.W_dec))


def crossings(
    config: ConfigDict, overrides: list[dict[str, Any]], hold: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trains the members in one program that stops at nothing, with the weights held (`all`, or what is `along` mu).

    Returns:
      steps (M, 3) until each share of the projection, inf where not reached; the floor (M,) of the relative error of b,
      that of its optimum given the features at the end; mu (M, d).
    """
    config.members = ConfigDict({str(i): override for i, override in enumerate(overrides)})
    resolved = config_lib.members(config)  # in the order of their names
    members = [resolved[str(i)] for i in range(len(overrides))]
    static, spec = step_lib.Static.of(config), synthetic.build(config.data, config.seed)
    d, batch, total = config.data.d_model, config.train.batch_size, config.train.steps
    mus = jnp.stack([m.data.gamma * jnp.sqrt(float(d)) * spec.direction for m in members])
    before = Preprocessing(shift=spec.mu - mus, scale=jnp.ones(len(members)))
    states = step_lib.init_group(members, jnp.zeros((len(members), d)), before)

    def body(t: jax.Array, carry: Any) -> Any:
        states, found = carry
        new, _ = step_lib.group_step(
            states, synthetic.sample(spec, 0, t, jnp.arange(batch)), static=static, allsum=lambda tree: tree
        )
        new = new.replace(sae=kept(new.sae, states.sae, hold, spec.direction))
        share = jnp.sum(new.sae.b_dec * mus, axis=1) / jnp.sum(mus**2, axis=1)
        passed = share[:, None] >= jnp.asarray(SHARES)
        return new, jnp.where(passed, jnp.minimum(found, t + 1.0), found)  # (M, 3)

    start = (states, jnp.full((len(members), len(SHARES)), jnp.inf))
    states, found = jax.jit(lambda carry: jax.lax.fori_loop(0, total, body, carry))(start)
    x = synthetic.sample(spec, synthetic.SPLITS["eval"], 0, jnp.arange(20_000))

    def left(sae: sae_lib.SAE, mu: jax.Array) -> jax.Array:
        own = x + (mu - spec.mu)
        optimum = sae.b_dec + jnp.mean(own - sae_lib.decode(sae, sae_lib.encode(sae, own)), axis=0)
        return jnp.linalg.norm(optimum - mu) / jnp.linalg.norm(mu)

    return np.asarray(found), np.asarray(jax.vmap(left)(states.sae, mus)), np.asarray(mus)


def summary(steps: np.ndarray, floor: np.ndarray, mu: np.ndarray, rate: float) -> dict[str, Any]:
    """Median over seeds of the steps to each share, the excess over Adam's time at 90 %, and the floor."""
    row: dict[str, Any] = {}
    for i, share in enumerate(SHARES):
        middle, adam = np.median(steps[:, i]), theory.bias_learning_time(mu, share) / rate
        reached = np.isfinite(middle)
        row[f"steps_{100 * share:.0f}"] = int(middle) if reached else None
        row[f"adam_{100 * share:.0f}"] = round(adam)
        row[f"excess_{100 * share:.0f}"] = round(float(middle / adam), 2) if reached else None
    low, high = np.min(steps[:, 1]), np.max(steps[:, 1])
    row["range_90"] = f"{low:.0f}-{high:.0f}"
    row["floor"] = round(float(np.median(floor)), 4)
    return row


def time_scales(scale: str) -> list[dict[str, Any]]:
    """The table over gamma, direction and learning rate."""
    rows, s = [], SCALES[scale]
    cells = [(gamma, rate) for gamma in s["gammas"] for rate in s["rates"]]
    overrides = [{"data": {"gamma": gamma}, "train": {"learning_rate": rate}, "seed": seed}
                 for gamma, rate in cells for seed in SEEDS]  # fmt: skip
    for direction in ("one", "spread"):
        config = shared(scale, direction, s["batches"][0], s["steps"])
        steps, floor, mu = crossings(config, overrides)
        for i, (gamma, rate) in enumerate(cells):
            mine = slice(i * len(SEEDS), (i + 1) * len(SEEDS))
            rows.append({"direction": direction, "gamma": gamma, "learning_rate": rate, "seeds": len(SEEDS),
                         **summary(steps[mine], floor[mine], mu[mine][0], rate)})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def interventions(scale: str) -> list[dict[str, Any]]:
    """What takes the excess away, at one gamma and the largest learning rate."""
    rows, s = [], SCALES[scale]
    rate = s["rates"][-1]
    small, large = s["batches"]
    overrides = [{"data": {"gamma": s["gamma"]}, "train": {"learning_rate": rate}, "seed": seed} for seed in SEEDS]
    arms = {
        "as it is": (small, ""), "weights held": (small, "all"), "held along mu": (small, "along"),
        "larger batch": (large, ""), "larger batch, weights held": (large, "all"),
    }  # fmt: skip
    for direction in ("one", "spread"):
        for name, (batch, hold) in arms.items():
            steps, floor, mu = crossings(shared(scale, direction, batch, s["steps"] // 2), overrides, hold)
            rows.append({"intervention": name, "direction": direction, "batch": batch, "gamma": s["gamma"],
                         "learning_rate": rate, **summary(steps, floor, mu[0], rate)})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main(workdir: Path, scale: str) -> None:
    """Both tables."""
    tables.write_csv(workdir / "bias_interventions.csv", interventions(scale))
    tables.write_csv(workdir / "bias_timescales.csv", time_scales(scale))


if __name__ == "__main__":
    command.start(main, "bias_timescales")
