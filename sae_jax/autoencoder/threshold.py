"""Top-k by its threshold, where many of the n are kept, as of AuxK's dead: nothing is sorted and no list is made.

The bits of floats that are not negative, read as an integer, are in the order of the floats. So the k-th largest is
found bit by bit, from the highest: a bit is 1 where at least k are as large. Each takes one pass over the entries.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae_jax.autoencoder import topk
from sae_jax.autoencoder.kept import by_platform
from sae_jax.autoencoder.sae import AllSum
from sae_jax.autoencoder.topk import Way

PIECE = 128  # tokens at a time on a CPU, whose cache then holds them for all passes


def kth_largest(
    z: Float[Array, "B n"], k: int | Int[Array, ""], added: AllSum = lambda count: count, axis: int | None = 1,
    rectified: bool = True,
) -> Float[Array, "*B"]:  # fmt: skip
    """The k-th largest (k ≥ 1) of each token, or of all of a batch (axis None); 0 and −inf are one where rectified.

    Args:
      added: adds counts up over the devices that have the other entries.
      rectified: of ReLU(z); otherwise of z itself, −inf where there are fewer than k.
    """
    integer = jnp.dtype(f"int{8 * z.dtype.itemsize}")
    bits, least, largest = jnp.iinfo(integer).bits - 1, jnp.iinfo(integer).min, jnp.iinfo(integer).max
    # A sum of floats takes two thirds of the time of one of integers, and is exact up to 2^24.
    counted = jnp.float32 if axis == 1 and z.shape[1] < 2**24 else jnp.int32

    def as_float(a: Int[Array, "*B"]) -> Float[Array, "*B"]:  # of negative floats the order is the other way round
        return jax.lax.bitcast_convert_type(jnp.where(a < 0, a ^ largest, a), z.dtype)

    def reached(bar: Int[Array, "*B"]) -> Any:
        edge = as_float(bar) if axis is None else as_float(bar)[:, None]
        return added((z >= edge).sum(axis=axis, dtype=counted)) >= k

    def higher(i: Any, bar: Int[Array, "*B"]) -> Int[Array, "*B"]:
        candidate = bar | (jnp.ones((), integer) << (bits - 1 - i).astype(integer))
        return jnp.where(reached(candidate), candidate, bar)

    start = jnp.zeros(() if axis is None else len(z), integer)
    start = start if rectified else jnp.where(reached(start), start, least)
    bar = jax.lax.fori_loop(0, bits, higher, start)
    # XLA compares numbers below the least normal one as 0, of which 0 then seems to have reached the largest.
    bar = jnp.where((bar > 0) & (bar < 1 << jnp.finfo(z.dtype).nmant), 0, bar)
    return jnp.fmax(as_float(bar), -jnp.inf)  # below −inf are only NaNs


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def square_error(
    x: Float[Array, "B d"],
    target: Float[Array, "B d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, "n"],
    W_dec: Float[Array, "n d"],
    b_dec: Float[Array, "d"],
    way: Way,
) -> Float[Array, ""]:
    """That of `topk.square_error`, with its gradient. Of entries equal to the k-th largest all are kept."""
    return _square_error_fwd(x, target, W_enc, b_enc, W_dec, b_dec, way)[0]


def _square_error_fwd(
    x: Array, target: Array, W_enc: Array, b_enc: Array, W_dec: Array, b_dec: Array, way: Way
) -> tuple[Array, tuple[Array, ...]]:
    def whole(z_pre: Array) -> Array:
        return kth_largest(z_pre, way.k, partial(topk.over_shards, shards=way.shards), rectified=way.rectified)

    def in_pieces(z_pre: Array) -> Array:
        return jax.lax.map(lambda row: whole(row[None])[0], z_pre, batch_size=PIECE)

    with topk.exact(way.precision):
        z_pre = topk.scores(x, W_enc, b_enc, b_dec, way.precision)
        bar = by_platform(z_pre, cpu=in_pieces if way.shards is None else whole, elsewhere=whole)[:, None]
        least = 0.0 if way.rectified else -jnp.inf
        z = jnp.where((z_pre < bar) | (z_pre <= least), 0.0, z_pre)  # a NaN stays one
        e = target - topk.over_shards(z @ W_dec, way.shards)
    return jnp.sum(e * e), (x, W_enc, W_dec, b_dec, z, e)


def _square_error_bwd(way: Way, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    x, W_enc, W_dec, b_dec, z, e = residuals
    g = -2 * cotangent * e
    with topk.exact(way.precision):
        g_z = jnp.where(z != 0, g @ W_dec.T, 0.0)
        g_sum = g_z.sum(axis=0)
        g_x = topk.over_shards(g_z @ W_enc, way.shards)  # XLA drops it in training, which asks for none
        g_b_dec = -topk.over_shards(g_sum @ W_enc, way.shards)
        return g_x, -g, g_z.T @ (x - b_dec), g_sum, z.T @ g, g_b_dec


square_error.defvjp(_square_error_fwd, _square_error_bwd)
