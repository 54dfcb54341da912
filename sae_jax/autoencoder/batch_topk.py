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
        return _nth_largest(z, count, allsum)
    most = largest(z, few)[0]
    found = _nth_largest(most, count, allsum)
    more = allsum((most[:, -1] >= found).sum())
    return jax.lax.cond(more == 0, lambda: found, lambda: _nth_largest(z, count, allsum))


def _nth_largest(z: Float[Array, "B m"], count: Int[Array, ""], allsum: AllSum) -> Float[Array, ""]:
    """Bit by bit, without a sort: positive floats are in the order of their bits. 0 where there are fewer."""
    width = jnp.finfo(z.dtype).bits
    kind = jnp.int32 if width == 32 else jnp.int64
    bits = jax.lax.bitcast_convert_type(jnp.maximum(z, 0), kind)

    def one(i: Array, found: Array) -> Array:
        tried = found | jnp.left_shift(jnp.asarray(1, kind), (width - 2 - i).astype(kind))
        return jnp.where(allsum((bits >= tried).sum()) >= count, tried, found)

    found = jax.lax.fori_loop(0, width - 1, one, jnp.zeros((), kind))
    return jax.lax.bitcast_convert_type(found, z.dtype)


def follow(threshold: Float[Array, ""], least: Float[Array, ""]) -> Float[Array, ""]:
    """The threshold after a batch whose least positive activation is this; 0: there was none, and it stays."""
    moved = jnp.where(threshold < 0, least, threshold + FOLLOWS * (least - threshold))
    return jnp.where(least > 0, moved, threshold)
