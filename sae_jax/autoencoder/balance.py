"""Balanced selection: features that fall silent get a head start in the choice of the k, and in nothing else.

    chosen      the k largest of z_pre + beta, where z_pre > 0; what is kept of them is z_pre
    beta      ← max(0, beta + u) while a feature has been silent for T tokens, max(0, beta − u) otherwise
    T         = PATIENCE · n / k, so many times the mean distance between two firings
    u         = PACE · √d · learning rate of the step

The k-th largest pre-activation rises while features compete in training, and those under it get no gradient that would
lift them as well. beta lifts them over that bar until they fire, and so are trained. It fades away over the last part
of a run, so what is trained is an ordinary TopK SAE. After the balance of experts without an auxiliary loss of Wang et
al., arXiv:2408.15664.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PATIENCE = 10.0
PACE = 4.0
FADE = 0.2  # the last part of a run, over which beta goes to 0


def update(
    beta: Float[Array, "n"], tokens_since_fired: Int[Array, "n"], *, n_features: int, k: int, d_model: int,
    rate: Float[Array, ""],
) -> Float[Array, "n"]:  # fmt: skip
    """beta after a step at this learning rate; `n_features` counts those of all shards."""
    silent = tokens_since_fired >= PATIENCE * n_features / k
    u = PACE * d_model**0.5 * rate
    return jnp.maximum(0.0, beta + jnp.where(silent, u, -u))


def fading(step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """The share of beta that counts at a step: 1, then linear to 0 at the last."""
    last = max(1, round(FADE * steps))
    return jnp.clip((steps - 1 - step) / last, 0.0, 1.0)
