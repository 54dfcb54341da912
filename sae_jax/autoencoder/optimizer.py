"""Adam with a global clip and unit decoder rows, one pass over memory for each thing that has to be written.

    g ← g · min(1, clip / ‖g‖)                      ‖g‖ over all parameters of one SAE, after the projection below
    m ← beta1 m + (1 − beta1) g,  v ← beta2 v + (1 − beta2) g²
    p ← p − rate · m / (1 − beta1^t) / (√(v / (1 − beta2^t)) + 1e-8)

With unit rows, the gradient of W_dec first loses its component along each row, and the rows are renormalised last.
The same formula in optax, as a chain of whole-tree transformations, costs two to four times as much on a CPU: each link
writes its own copy of every array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from sae_jax.autoencoder import kept, topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE

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
    squares = jax.tree.map(lambda g: jnp.sum(g * g), grads)
    along: Array | None = None  # what the gradient of a row of W_dec has along the row
    if unit_decoder:
        along = jnp.sum(grads.W_dec * sae.W_dec, axis=1)
        # ‖g − a w‖² of every row, from one pass over g and w.
        taken = jnp.sum(along**2 * (2 - jnp.sum(sae.W_dec * sae.W_dec, axis=1)))
        squares = squares.replace(W_dec=squares.W_dec - taken)
    of_features = topk.over_shards(sum(jax.tree.leaves(squares.replace(b_dec=None))), shards)
    norm = jnp.sqrt(jnp.maximum(of_features + squares.b_dec, 0.0))
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    beta1, beta2 = betas
    step_size = rate / (1 - beta1 ** count.astype(norm.dtype))
    correct2 = 1 - beta2 ** count.astype(norm.dtype)

    def seen(m: Array, v: Array, p: Array, g: Array, along: Array | None) -> tuple[Array, Array]:
        g = scale * (g if along is None else g - along[:, None] * p)
        return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2

    def moved(p: Array, m: Array, v: Array, along: Array | None) -> Array:
        p = p - step_size * m / (jnp.sqrt(v / correct2) + EPSILON)
        return p if along is None else sae_lib.unit_rows(p)

    def one(p: Array, m: Array, v: Array, g: Array, along: Array | None = None) -> tuple[Array, Array, Array]:
        def at_once(p: Array, m: Array, v: Array, g: Array, along: Array | None) -> tuple[Array, Array, Array]:
            m, v = seen(m, v, p, g, along)
            return moved(p, m, v, along), m, v

        def in_blocks(p: Array, m: Array, v: Array, g: Array, along: Array | None) -> tuple[Array, Array, Array]:
            def block(i: Array, held: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                p, m, v = held
                m, v = _in_place(seen, (m, v), (p, g, along), i * size, size // 2)
                (p,) = _in_place(lambda *a: (moved(*a),), (p,), (m, v, along), i * size, size // 2)
                return p, m, v

            return jax.lax.fori_loop(0, len(p) // size, block, (p, m, v))

        is_matrix = p.ndim == 2
        size = next((size for size in range(BLOCK, BLOCK // 8, -2) if is_matrix and len(p) % size == 0), 0)
        whole = not size or not kept.is_large(*p.shape)
        done: tuple[Array, Array, Array] = kept.by_platform(
            p, m, v, g, along, cpu=at_once if whole else in_blocks, elsewhere=at_once
        )
        return done

    done = jax.tree.map(one, sae, moments.mean, moments.square, grads)
    if unit_decoder:
        done = done.replace(W_dec=one(sae.W_dec, moments.mean.W_dec, moments.square.W_dec, grads.W_dec, along))
    sae, mean, square = jax.tree.transpose(jax.tree.structure(sae), jax.tree.structure((0, 0, 0)), done)
    return sae, Moments(mean, square), norm


BLOCK = 512  # rows of a matrix and its moments that stay in a core's cache


def _in_place(
    fn: Callable[..., tuple[Array, ...]], old: tuple[Array, ...], given: tuple[Array | None, ...],
    start: Array, size: int,
) -> tuple[Array, ...]:  # fmt: skip
    """The 2 · `size` rows from `start` on of `old` replaced by fn(*old, *given).

    A loop is what XLA cannot merge with its neighbours: as one expression it computes the moments a second time for the
    parameters, and then has to copy what is read and written at once.
    """

    def body(j: Array, held: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start + j * size, size), (*held, *given))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(a, new, start + j * size, 0)
            for a, new in zip(held, fn(*rows), strict=True)
        )

    return jax.lax.fori_loop(0, 2, body, old)
