"""Remedies against each other on the same batches: death by pathway, FVE, MMCS and cost, at a small and a large gamma.

    python -m experiments.death.remedies_compared --workdir=runs/remedies --scale=cpu

    none            b starts at 0
    AuxK            the dictionary_learning preset
    mean, median    b starts at the arithmetic mean, at the geometric median
    encoder bias    b_enc starts at −W_enc·mu, b at 0 (pre-activations are centred, reconstructions are not)
    whitening       PCA whitening of the mean-centred tokens, folded back
    batch norm      pre-activations of each feature shifted and scaled to mean 0, variance 1 over the batch
    resampling      every few thousand steps dead features take the direction of tokens that are badly reconstructed
    ghost gradients dead features, through an exponential in place of the ReLU, are fitted to the error

The last three are written in their simplest form, here and in rivals.py. Batch norm keeps its statistics of the
held-out tokens for the count. Writes remedies_compared.csv, with the features by density (share of tokens) in half
decades. About four minutes on 2 CPU cores.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import command
from experiments.death import rivals
from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.autoencoder import death
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.preprocess import fold, whitening
from sae_jax.reports import tables
from sae_jax.training import recovery
from sae_jax.training import step as step_lib

# d, true features, n, k, batch, steps, held-out tokens
SCALES = {
    "smoke": (16, 32, 64, 3, 32, 60, 500), "cpu": (32, 64, 128, 3, 32, 20_000, 20_000),
    "paper": (256, 1024, 8192, 64, 2048, 200_000, 100_000),
}  # fmt: skip
GAMMAS, SEEDS = (2.0, 20.0), range(3)
RATE = 1e-3


def settings(scale: str, gamma: float, seed: int, auxk: bool = False) -> ConfigDict:
    """One member on its data set."""
    d, n_true, n, k, batch, steps, _ = SCALES[scale]
    c = config_lib.base()
    c.seed, c.sae.n_features, c.sae.k = seed, n, k
    c.data.update(signal="sparse", gamma=gamma, d_model=d, n_true_features=n_true, n_active=2)
    c.train.update(steps=steps, batch_size=batch, learning_rate=RATE)
    c.auxk.preset, c.auxk.dead_after_tokens = "dictionary_learning" if auxk else "none", batch * max(1, steps // 20)
    return c


def normalised(sae: SAE, x: jax.Array) -> SAE:
    """The SAE whose pre-activations on x have mean 0 and variance 1 for every feature: batch norm, folded in."""
    z_pre = sae_lib.preactivations(sae.replace(b_enc=jnp.zeros_like(sae.b_enc)), x)
    mean, scale = z_pre.mean(axis=0), 1 / (z_pre.std(axis=0) + 1e-5)
    return sae.replace(W_enc=sae.W_enc * scale[:, None], b_enc=sae.b_enc - mean * scale)


def _batch_norm(sae: SAE, x: jax.Array, *_: Any) -> tuple[jax.Array, jax.Array]:
    own = normalised(sae, x)
    acts = rivals.kept(sae_lib.preactivations(own, x), sae.k)
    return rivals.mean_square(rivals.error(own, x, acts)), acts


OWN = {
    "batch norm": rivals.going_down(_batch_norm), "resampling": rivals.resampling,
    "ghost gradients": rivals.ghost_gradients,
}  # fmt: skip


def arm(name: str, scale: str, gamma: float) -> list[dict[str, Any]]:
    """Trains the seeds of one remedy in one program and counts; a row a seed."""
    configs = [settings(scale, gamma, seed, auxk=name == "AuxK") for seed in SEEDS]
    d, _, _, _, batch, steps, n_eval = SCALES[scale]
    static, spec = step_lib.Static.of(configs[0]), synthetic.build(configs[0].data, seed=0)
    sample = np.asarray(synthetic.sample(spec, synthetic.SPLITS["statistics"], 0, jnp.arange(20_000)))
    severity = moments_lib.severity([sample], covariance=True).raw
    before = whitening(severity)
    median = moments_lib.geometric_median(lambda: iter([sample]), severity.mean)
    starts = {"mean": severity.mean, "geometric median": median}
    center = jnp.asarray(np.tile(starts.get(name, np.zeros(d)), (len(configs), 1)), jnp.float32)
    states = step_lib.init_group(configs, center)
    if name == "encoder bias":
        against = -states.sae.W_enc @ jnp.asarray(severity.mean, jnp.float32)
        states = states.replace(sae=states.sae.replace(b_enc=against))
    given: dict[str, Any] = {"static": static, "allsum": lambda tree: tree}
    step = OWN.get(name, step_lib.group_step)

    def body(t: jax.Array, states: step_lib.TrainState) -> step_lib.TrainState:
        x = synthetic.sample(spec, 0, t, jnp.arange(batch))
        return step(states, before(x) if name == "whitening" else x, **given)[0]

    train = jax.jit(lambda states: jax.lax.fori_loop(0, steps, body, states)).lower(states).compile()
    began = time.process_time()
    states = jax.block_until_ready(train(states))
    seconds = time.process_time() - began
    x = synthetic.sample(spec, synthetic.SPLITS["eval"], 0, jnp.arange(n_eval))
    rows = []
    for i, seed in enumerate(SEEDS):
        sae = jax.tree.map(lambda a, i=i: a[i], states.sae)
        sae = fold(sae, before) if name == "whitening" else normalised(sae, x) if name == "batch norm" else sae
        seen, codes = death.sight(sae, x, jnp.ones(n_eval, bool))
        e = x - sae_lib.decode(sae, codes)
        counts, edges = recovery.density_histogram(np.asarray(sae_lib.fired(codes, static.n_features)), n_eval)
        rows.append({
            "gamma": gamma, "remedy": name, "seed": seed, **death.pathways(seen),
            "fve": float(1 - jnp.sum(e**2) / jnp.sum((x - x.mean(0)) ** 2)),
            "mmcs": float(recovery.mmcs(spec.rows, sae.W_dec)),
            "mmcs_alive": float(recovery.mmcs(spec.rows, sae.W_dec, jnp.asarray(seen.fired))),
            "mcc": recovery.mcc(spec.rows, sae.W_dec),
            "bias_projection": float(sae.b_dec @ spec.mu / (spec.mu @ spec.mu)),
            "cpu_us_per_step": round(1e6 * seconds / steps / len(configs), 1),
            **{f"density_1e{low:.1f}": int(count) for low, count in zip(edges, counts, strict=False)},
        })  # fmt: skip
    return rows


ARMS = ("none", "AuxK", "mean", "geometric median", "encoder bias", "whitening", "batch norm", "resampling",
        "ghost gradients")  # fmt: skip


def main(workdir: Path, scale: str) -> None:
    """Goes through gammas and remedies; prints means over seeds."""
    rows = []
    for gamma in GAMMAS:
        for name in ARMS:
            mine = arm(name, scale, gamma)
            rows += mine
            shown = ("dead_by_relu", "dead_total", "fve", "mmcs", "mmcs_alive", "mcc", "cpu_us_per_step")
            means = {key: float(np.mean([row[key] for row in mine])) for key in shown}
            print(f"gamma {gamma:g}  {name:16s} " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()), flush=True)
    tables.write_csv(workdir / "remedies_compared.csv", rows)


if __name__ == "__main__":
    command.start(main, "remedies")
