"""BatchTopK: the k·B largest positive pre-activations of a batch of B tokens, which share that budget.

    acts       = ReLU(z_pre) where it is at least the (k·B)-th largest of the batch         in training
    acts       = ReLU(z_pre) where z_pre > threshold                                        in use
    threshold ← threshold + FOLLOWS · (the least of acts that is positive − threshold), from the first batch on

Bussmann, Leask and Nanda, arXiv:2412.06410; as in SAELens 6 and dictionary_learning 0.1.0, whose losses are those of
their TopK (`objective.PRESETS`). SAELens' threshold follows as fast and starts from 0; dictionary_learning's follows a
tenth as fast, from step 1000 on. Under balanced selection ours follows what would be selected without the head start.
Equal values at the bar are all taken, where torch takes some of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae_jax.autoencoder.kept import largest
from sae_jax.autoencoder.sae import AllSum
from sae_jax.autoencoder.threshold import kth_largest

FOLLOWS = 0.01
FEW, LARGE = 4, 2**20  # entries of a token that are looked at, over k; entries of a batch from which that pays
UNSET = -1.0  # the threshold before the first batch: in use the budget is that of the batch then


def bar(
    z: Float[Array, "B n"], count: Int[Array, ""], allsum: AllSum = lambda tree: tree, a_token: int = 0
) -> Float[Array, ""]:  # fmt: skip
    """The count-th largest of the positive entries of all devices; where there are fewer, the least of them; or 0.

    Of a large batch the few largest of each token are looked at, several times as many as the `a_token` that are
    expected of it; all entries only where some token has more than those above the bar.
    """
    count, few = jnp.clip(allsum((z > 0).sum()), 1, count), FEW * a_token
    if not a_token or z.size < LARGE or FEW * few > z.shape[1]:
        return kth_largest(z, count, allsum, axis=None)
    most = largest(z, few)[0]
    found = kth_largest(most, count, allsum, axis=None)
    more = allsum((most[:, -1] >= found).sum())
    return jax.lax.cond(more == 0, lambda: found, lambda: kth_largest(z, count, allsum, axis=None))


def follow(threshold: Float[Array, ""], least: Float[Array, ""]) -> Float[Array, ""]:
    """The threshold after a batch whose least positive activation is this; 0: there was none, and it stays."""
    moved = jnp.where(threshold < 0, least, threshold + FOLLOWS * (least - threshold))
    return jnp.where(least > 0, moved, threshold)
