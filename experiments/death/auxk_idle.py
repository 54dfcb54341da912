"""Why AuxK leaves most rows of a centred, over-complete SAE dead by TopK: an intervention on its gradient.

    python -m experiments.death.auxk_idle --workdir=runs/auxk_idle --scale=cpu

configs/synthetic.py's centred SAE (256 true features) without AuxK, with it, and with its gradient let through to the
encoder or to the decoder alone; with as many rows as true features; and, once trained, with the encoder rows of the
dead stretched to the length of the live ones. If the dead rows were only too small to win, stretching would wake them
without further training. Writes auxk_idle.csv. About six minutes on 2 CPU cores.
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
from sae_jax.autoencoder import death, objective
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE
from sae_jax.reports import tables
from sae_jax.training import recovery
from sae_jax.training import step as step_lib

# d, true features, active, n, k, batch, steps, held-out tokens
SCALES = {"smoke": (16, 32, 2, 128, 4, 32, 60, 500), "cpu": (64, 256, 5, 1024, 8, 128, 4000, 20_000),
          "paper": (256, 1024, 5, 8192, 32, 2048, 100_000, 100_000)}  # fmt: skip
# name: rows for every true feature, and which of AuxK's gradients arrive (encoder, decoder)
ARMS = {"no AuxK": (4, False, False), "AuxK": (4, True, True), "AuxK on the encoder": (4, True, False),
        "AuxK on the decoder": (4, False, True), "no AuxK, n = true": (1, False, False),
        "AuxK, n = true": (1, True, True)}  # fmt: skip


def trained(scale: str, rows: int, encoder: bool, decoder: bool) -> tuple[SAE, synthetic.Synthetic, ConfigDict]:
    """The centred SAE after training. The gradient of AuxK is what the loss with it has more than the one without."""
    d, n_true, active, n, k, batch, steps, _ = SCALES[scale]
    c = config_lib.base()
    c.sae.n_features, c.sae.k = n * rows // 4, k
    c.data.update(signal="sparse", gamma=20.0, d_model=d, n_true_features=n_true, n_active=active)
    c.train.update(steps=steps, batch_size=batch, learning_rate=1e-3)
    static, spec = step_lib.Static.of(c), synthetic.build(c.data, c.seed)
    weight = config_lib.auxk_weight(c)

    def step(t: jax.Array, s: step_lib.TrainState) -> step_lib.TrainState:
        x = synthetic.sample(spec, 0, t, jnp.arange(batch))
        dead = s.tokens_since_fired >= s.hyper.dead_after_tokens

        def loss(sae: SAE, w: float) -> tuple[jax.Array, Any]:
            return objective.loss(sae, x, dead, jnp.asarray(w), preset=static.preset)

        (_, batch_found), grads = jax.value_and_grad(loss, has_aux=True)(s.sae, 0.0)
        if encoder or decoder:
            more = jax.tree.map(jnp.subtract, jax.grad(loss, has_aux=True)(s.sae, weight)[0], grads)
            grads = grads.replace(
                W_enc=grads.W_enc + encoder * more.W_enc, b_enc=grads.b_enc + encoder * more.b_enc,
                b_dec=grads.b_dec + encoder * more.b_dec, W_dec=grads.W_dec + decoder * more.W_dec,
            )  # fmt: skip
        sae, moments, _ = step_lib.descend(s, grads, static)
        fired = sae_lib.fired(batch_found.codes, static.n_features) > 0
        return s.replace(step=s.step + 1, sae=sae, moments=moments,
                         tokens_since_fired=death.count_tokens(s.tokens_since_fired, fired, batch))  # fmt: skip

    start = step_lib.init_state(jax.random.key(c.seed), static, step_lib.hyper(c), spec.mu)
    return jax.jit(lambda s: jax.lax.fori_loop(0, steps, step, s))(start).sae, spec, c


def looked_at(sae: SAE, spec: synthetic.Synthetic, n_tokens: int) -> dict[str, Any]:
    """Deaths, recovery, and the live and the dead rows beside each other."""
    x = synthetic.sample(spec, synthetic.SPLITS["eval"], 0, jnp.arange(n_tokens))
    seen, codes = death.sight(sae, x, jnp.ones(n_tokens, bool))
    e = x - sae_lib.decode(sae, codes)
    alive = np.asarray(seen.fired)
    length, offset = np.linalg.norm(sae.W_enc, axis=1), np.asarray(sae.b_enc)
    best = np.asarray(sae_lib.preactivations(sae, x).max(axis=0))
    found: dict[str, Any] = {
        **death.pathways(seen), "fve": float(1 - jnp.sum(e**2) / jnp.sum((x - x.mean(0)) ** 2)),
        "mmcs": float(recovery.mmcs(spec.rows, sae.W_dec)), "bar": float(jnp.mean(codes.values[:, -1])),
    }  # fmt: skip
    for name, mask in (("live", alive), ("dead", ~alive)):
        for key, values in (("length", length), ("b_enc", offset), ("largest", best)):
            found[f"{key}_{name}"] = float(np.median(values[mask])) if mask.any() else None
    woken = None
    if not alive.all():
        factor = jnp.asarray(np.where(alive, 1.0, np.median(length[alive]) / length), jnp.float32)
        stretched = sae.replace(W_enc=sae.W_enc * factor[:, None], b_enc=sae.b_enc * factor)
        woken = float(np.mean(np.asarray(death.sight(stretched, x, jnp.ones(n_tokens, bool))[0].fired)[~alive]))
    return {**found, "woken_by_stretching": woken}


def main(workdir: Path, scale: str) -> None:
    """Goes through the arms; writes the table."""
    rows = []
    for name, (per_feature, encoder, decoder) in ARMS.items():
        sae, spec, c = trained(scale, per_feature, encoder, decoder)
        rows.append({"arm": name, "n": c.sae.n_features, **looked_at(sae, spec, SCALES[scale][-1])})
        print(rows[-1], flush=True)
    tables.write_csv(workdir / "auxk_idle.csv", rows)


if __name__ == "__main__":
    command.start(main, "auxk_idle")
