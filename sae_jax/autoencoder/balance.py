"""Balanced selection: features that fall silent get a head start in the choice of the k, and in nothing else.

    chosen      the k largest of z_pre + beta, where z_pre > 0; what is kept of them is z_pre
                (BatchTopK: the k·B largest of the batch; JumpReLU: where z_pre + beta > threshold)
    beta      ← max(0, beta + u) while a feature fires less than once in T tokens, max(0, beta − u) otherwise
    T         = PATIENCE · n / k, so many times the mean distance between two firings
    u         = PACE · √d · learning rate of the step: the bar below rises by about √d · learning rate

The k-th largest pre-activation rises while features compete in training, and those under it get no gradient that would
lift them as well. beta lifts them over that bar until they fire, and so are trained. It fades away over the last part
of a run, so what is trained is an ordinary TopK SAE. After the balance of experts without an auxiliary loss of Wang et
al., arXiv:2408.15664.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PATIENCE = 2.0
PACE = 4.0
FADE = 0.2  # the last part of a run, over which beta goes to 0


def update(
    beta: Float[Array, "n"], n_fired: Int[Array, "n"], tokens_since_fired: Int[Array, "n"], n_tokens: Int[Array, ""],
    *, n_features: int, k: int | Float[Array, ""], d_model: int, rate: Float[Array, ""],
) -> Float[Array, "n"]:  # fmt: skip
    """beta after a step of `n_tokens` tokens at this learning rate; `n_features` counts those of all shards.

    `k` is L0 where the SAE has no k, and at least 1.

    A batch longer than T shows by itself how often a feature fires; shorter ones are counted from its last firing on.
    """
    patience = PATIENCE * n_features / k
    starved = jnp.where(n_tokens >= patience, n_fired * patience < n_tokens, tokens_since_fired >= patience)
    u = PACE * d_model**0.5 * rate
    return jnp.maximum(0.0, beta + jnp.where(starved, u, -u))


def fading(step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """The share of beta that counts at a step: 1, then linear to 0 at the last."""
    last = max(1, round(FADE * steps))
    return jnp.clip((steps - 1 - step) / last, 0.0, 1.0)
