"""Top-k by its threshold, where many of the n are kept, as of AuxK's dead: nothing is sorted and no list is made.

The bits of floats that are not negative, read as an integer, are in the order of the floats. So the k-th largest is
found bit by bit, from the highest: a bit is 1 where at least k are as large. Each takes one pass over the token.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae_jax.autoencoder import topk
from sae_jax.autoencoder.kept import by_platform
from sae_jax.autoencoder.topk import Way

PIECE = 128  # tokens at a time on a CPU, whose cache then holds them for all passes


def kth_largest(z: Float[Array, "B n"], way: Way) -> Float[Array, "B"]:
    """The k-th largest of each token, over all shards; at least 0 if `way` is rectified, −inf where there are fewer."""
    integer = jnp.dtype(f"int{8 * z.dtype.itemsize}")
    bits, least, largest = jnp.iinfo(integer).bits - 1, jnp.iinfo(integer).min, jnp.iinfo(integer).max

    def as_float(a: Int[Array, "b"]) -> Float[Array, "b"]:  # of negative floats the order is the other way round
        return jax.lax.bitcast_convert_type(jnp.where(a < 0, a ^ largest, a), z.dtype)

    def of(z: Float[Array, "b n"]) -> Float[Array, "b"]:
        def reached(bar: Int[Array, "b"]) -> Any:  # a sum of floats takes two thirds of the time of one of integers
            count = (z >= as_float(bar)[:, None]).sum(axis=1, dtype=jnp.float32)
            return topk.over_shards(count, way.shards) >= way.k

        def higher(i: Any, bar: Int[Array, "b"]) -> Int[Array, "b"]:
            candidate = bar | (jnp.ones((), integer) << (bits - 1 - i).astype(integer))
            return jnp.where(reached(candidate), candidate, bar)

        start = jnp.zeros(len(z), integer)
        start = start if way.rectified else jnp.where(reached(start), start, least)
        return jnp.fmax(as_float(jax.lax.fori_loop(0, bits, higher, start)), -jnp.inf)  # below −inf are only NaNs

    def in_pieces(z: Float[Array, "B n"]) -> Float[Array, "B"]:
        return jax.lax.map(lambda token: of(token[None])[0], z, batch_size=PIECE)

    bar: Array = by_platform(z, cpu=in_pieces if way.shards is None else of, elsewhere=of)
    return bar


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def square_error(
    z_pre: Float[Array, "B n"],
    x: Float[Array, "B d"],
    target: Float[Array, "B d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, "n"],
    W_dec: Float[Array, "n d"],
    b_dec: Float[Array, "d"],
    way: Way,
) -> Float[Array, ""]:
    """That of `topk.square_error`, with its gradient, from z_pre that is there already.

    Of entries equal to the k-th largest all are kept.
    """
    return _square_error_fwd(z_pre, x, target, W_enc, b_enc, W_dec, b_dec, way)[0]


def _square_error_fwd(
    z_pre: Array, x: Array, target: Array, W_enc: Array, b_enc: Array, W_dec: Array, b_dec: Array, way: Way
) -> tuple[Array, tuple[Array, ...]]:
    with topk.exact(way.precision):
        least = 0.0 if way.rectified else -jnp.inf
        z = jnp.where((z_pre >= kth_largest(z_pre, way)[:, None]) & (z_pre > least), z_pre, 0.0)
        e = target - topk.over_shards(z @ W_dec, way.shards)
    return jnp.sum(e * e), (x, W_enc, W_dec, b_dec, z, e)


def _square_error_bwd(way: Way, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    x, W_enc, W_dec, b_dec, z, e = residuals
    g = -2 * cotangent * e
    with topk.exact(way.precision):
        g_z = jnp.where(z != 0, g @ W_dec.T, 0.0)
        g_sum = g_z.sum(axis=0)
        g_x = topk.over_shards(g_z @ W_enc, way.shards)  # XLA drops it in training, which asks for none
        g_b_dec = -topk.over_shards(g_sum @ W_enc, way.shards)
        return None, g_x, -g, g_z.T @ (x - b_dec), g_sum, z.T @ g, g_b_dec


square_error.defvjp(_square_error_fwd, _square_error_bwd)
