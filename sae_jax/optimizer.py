"""Adam with a global clip and unit decoder rows, one pass over memory for each thing that has to be written.

    g ← g · min(1, clip / ‖g‖)                      ‖g‖ over all parameters of one SAE, after the projection below
    m ← beta1 m + (1 − beta1) g,  v ← beta2 v + (1 − beta2) g²
    p ← p − rate · m / (1 − beta1^t) / (√(v / (1 − beta2^t)) + 1e-8)

With unit rows, the gradient of W_dec first loses its component along each row, and the rows are renormalised last.
The same formula in optax, as a chain of whole-tree transformations, costs two to four times as much on a CPU: each link
writes its own copy of every array.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from sae_jax import topk
from sae_jax.sae import SAE

EPSILON = 1e-8


class Moments(struct.PyTreeNode):
    """Running mean and mean square of the gradient."""

    mean: SAE
    square: SAE


def init(sae: SAE) -> Moments:
    """Nothing seen yet."""
    return Moments(jax.tree.map(jnp.zeros_like, sae), jax.tree.map(jnp.zeros_like, sae))


def update(
    sae: SAE,
    moments: Moments,
    grads: SAE,
    *,
    count: Int[Array, ""],
    rate: Float[Array, ""],
    betas: tuple[float, float],
    clip_norm: float,
    unit_decoder: bool,
    shards: str | None = None,
) -> tuple[SAE, Moments, Float[Array, ""]]:
    """Parameters and moments after step number `count` (from 1), and the norm of the gradient before the clip.

    `shards` names the mesh axis over which the features are split, where they are.
    """
    if unit_decoder:
        radial = _written(jnp.sum(grads.W_dec * sae.W_dec, axis=1, keepdims=True))
        grads = grads.replace(W_dec=grads.W_dec - radial * sae.W_dec)
    *of_features, of_bias = (jnp.sum(g * g) for g in (grads.W_enc, grads.b_enc, grads.W_dec, grads.b_dec))
    norm = jnp.sqrt(topk.over_shards(sum(of_features), shards) + of_bias)
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    beta1, beta2 = betas
    correct1, correct2 = 1 - beta1 ** count.astype(norm.dtype), 1 - beta2 ** count.astype(norm.dtype)

    def one(p: Array, m: Array, v: Array, g: Array) -> tuple[Array, Array, Array]:
        m, v = _written((beta1 * m + (1 - beta1) * scale * g, beta2 * v + (1 - beta2) * (scale * g) ** 2))
        return p - (rate / correct1) * m / (jnp.sqrt(v / correct2) + EPSILON), m, v

    done = jax.tree.map(one, sae, moments.mean, moments.square, grads)
    sae, mean, square = jax.tree.transpose(jax.tree.structure(sae), jax.tree.structure((0, 0, 0)), done)
    if unit_decoder:
        rows = _written(sae.W_dec)
        sae = sae.replace(W_dec=rows * _written(jax.lax.rsqrt(jnp.sum(rows * rows, axis=1, keepdims=True))))
    return sae, Moments(mean, square), norm


def _written(tree: Any) -> Any:
    """Computed once and kept: XLA would compute the moments again for the parameters, and copy what it reads."""
    return jax.lax.optimization_barrier(tree)
