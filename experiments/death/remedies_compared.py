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

The last three are written here in their simplest form: rivals live in experiments, not in the package. Batch norm keeps
its statistics of the held-out tokens for the count. Writes remedies_compared.csv, with the features by density (share
of tokens) in half decades. About four minutes on 2 CPU cores.
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
Step = Callable[[step_lib.TrainState, jax.Array, jax.Array], step_lib.TrainState]


def settings(scale: str, gamma: float, seed: int, auxk: bool = False) -> ConfigDict:
    """One member on its data set."""
    d, n_true, n, k, batch, steps, _ = SCALES[scale]
    c = config_lib.base()
    c.seed, c.sae.n_features, c.sae.k = seed, n, k
    c.data.update(signal="sparse", gamma=gamma, d_model=d, n_true_features=n_true, n_active=2)
    c.train.update(steps=steps, batch_size=batch, learning_rate=RATE)
    c.auxk.preset, c.auxk.dead_after_tokens = "dictionary_learning" if auxk else "none", batch * max(1, steps // 20)
    return c


def plain(static: step_lib.Static) -> Step:
    """The package's own step."""
    return lambda state, x, t: step_lib.group_step(state, x, static=static, allsum=lambda tree: tree)[0]


def resampling(static: step_lib.Static) -> Step:
    """`plain`, and now and then the dead features become normalised errors of random tokens, their moments zeroed.

    After Bricken et al., Towards Monosemanticity (2023), without their weighting of tokens by loss; encoder rows get a
    fifth of the mean length of the live ones, as there.
    """
    every = max(1, static.steps // 8)

    def revive(state: step_lib.TrainState, x: jax.Array, t: jax.Array) -> step_lib.TrainState:
        def one(s: step_lib.TrainState) -> step_lib.TrainState:
            sae: SAE = s.sae
            dead = s.tokens_since_fired >= s.hyper.dead_after_tokens
            e = x - sae_lib.decode(sae, sae_lib.encode(sae, x))
            picked = jax.random.randint(jax.random.fold_in(jax.random.key(0), t), (static.n_features,), 0, len(x))
            rows = sae_lib.unit_rows(e[picked])
            length = jnp.sum(jnp.where(dead, 0, jnp.linalg.norm(sae.W_enc, axis=1))) / jnp.maximum((~dead).sum(), 1)
            new = sae.replace(
                W_enc=jnp.where(dead[:, None], 0.2 * length * rows, sae.W_enc),
                b_enc=jnp.where(dead, 0.0, sae.b_enc), W_dec=jnp.where(dead[:, None], rows, sae.W_dec),
            )  # fmt: skip

            def cleared(leaf: Any) -> Any:
                mine = getattr(leaf, "shape", ())[:1] == (static.n_features,)
                return jnp.where(dead.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf) if mine else leaf

            return s.replace(sae=new, moments=jax.tree.map(cleared, s.moments),
                             tokens_since_fired=jnp.where(dead, 0, s.tokens_since_fired))  # fmt: skip

        return jax.vmap(one)(state)

    step = plain(static)

    def both(state: step_lib.TrainState, x: jax.Array, t: jax.Array) -> step_lib.TrainState:
        due = (t % every == every - 1) & (t < 0.9 * static.steps)  # the last ones have time to settle
        return jax.lax.cond(due, lambda s: revive(s, x, t), lambda s: s, step(state, x, t))

    return both


def normalised(sae: SAE, x: jax.Array) -> SAE:
    """The SAE whose pre-activations on x have mean 0 and variance 1 for every feature: batch norm, folded in."""
    z_pre = sae_lib.preactivations(sae.replace(b_enc=jnp.zeros_like(sae.b_enc)), x)
    mean, scale = z_pre.mean(axis=0), 1 / (z_pre.std(axis=0) + 1e-5)
    return sae.replace(W_enc=sae.W_enc * scale[:, None], b_enc=sae.b_enc - mean * scale)


def batch_norm(static: step_lib.Static) -> Step:
    """Gradient through `normalised`; Adam, clipping and unit decoder rows as in the package."""

    def loss(sae: SAE, x: jax.Array) -> jax.Array:
        own = normalised(sae, x)
        e = x - sae_lib.decode(own, sae_lib.encode(own, x))
        return jnp.sum(e**2) / len(x)

    def one(s: step_lib.TrainState, x: jax.Array) -> step_lib.TrainState:
        sae, moments, _ = step_lib.descend(s, jax.grad(loss)(s.sae, x), static)
        return s.replace(step=s.step + 1, sae=sae, moments=moments)

    return lambda state, x, t: jax.vmap(lambda s: one(s, x))(state)


def ghost_gradients(static: step_lib.Static) -> Step:
    """The loss, and that of the dead features' fit to the error, scaled to be as large.

    After Jermyn and Templeton, Ghost Grads (Transformer Circuits, January 2024): dead features give exp(z_pre), their
    reconstruction of each token is scaled to half the length of its error, and no gradient goes through either scale.
    The largest z_pre of a token is taken off first, which that scale undoes: exp of what gamma = 20 makes overflows.
    """
    still = jax.lax.stop_gradient

    def loss(sae: SAE, x: jax.Array, dead: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_hat, codes = sae_lib.reconstruct(sae, x)
        e = x - x_hat
        error = jnp.sum(e**2) / len(x)
        z_pre = jnp.where(dead, sae_lib.preactivations(sae, x), -1e30)
        ghost = jnp.where(dead, jnp.exp(z_pre - still(z_pre.max(axis=1, keepdims=True))), 0.0) @ sae.W_dec
        length = jnp.linalg.norm(still(e), axis=1) / (2 * jnp.linalg.norm(still(ghost), axis=1) + 1e-6)
        fit = jnp.sum((length[:, None] * ghost - still(e)) ** 2) / len(x)
        share = jnp.where(dead.any(), still(error / (fit + 1e-6)), 0.0)
        return error + share * fit, sae_lib.fired(codes, static.n_features) > 0

    def one(s: step_lib.TrainState, x: jax.Array) -> step_lib.TrainState:
        dead = s.tokens_since_fired >= s.hyper.dead_after_tokens
        grads, fired = jax.grad(loss, has_aux=True)(s.sae, x, dead)
        sae, moments, _ = step_lib.descend(s, grads, static)
        return s.replace(step=s.step + 1, sae=sae, moments=moments,
                         tokens_since_fired=death.count_tokens(s.tokens_since_fired, fired, len(x)))  # fmt: skip

    return lambda state, x, t: jax.vmap(lambda s: one(s, x))(state)


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
    own = {"batch norm": batch_norm, "resampling": resampling, "ghost gradients": ghost_gradients}
    step = own.get(name, plain)(static)

    def body(t: jax.Array, states: step_lib.TrainState) -> step_lib.TrainState:
        x = synthetic.sample(spec, 0, t, jnp.arange(batch))
        return step(states, before(x) if name == "whitening" else x, t)

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
