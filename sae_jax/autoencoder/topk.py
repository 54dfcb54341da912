"""The hot kernel: pre-activations, top-k through `jax.lax.top_k`, sparse decode, and their gradients.

Notation: batch B, width d (d_model), dictionary size n (n_features), k kept entries a token. Products with what is kept
are those of `kept.py`.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sae_jax.autoencoder.kept import FEW, Kept, by_platform, combine, form, is_large, largest, pick, scatter

CHUNKS, CHUNK = 16, 128  # pieces of a batch, and least tokens in one: top-k of one runs beside the matmul of the next


# -- encode ----------------------------------------------------------------------------------------------------------


def exact(precision: str = "float32") -> Any:
    """A context in which float32 matrices are multiplied as such: left to itself a TPU rounds them to bfloat16.

    That rounding is about gamma / 400 of the signal, so deaths and uncentred SAEs cannot bear it: every function here
    asks for the whole. `bfloat16`, a way to train centred SAEs, leaves products to the accelerator.
    """
    return jax.default_matmul_precision("highest" if precision == "float32" else "default")


@jax.custom_vjp
def preactivations(
    x: Float[Array, "B d"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"], b_dec: Float[Array, "d"]
) -> Float[Array, "B n"]:
    """z_pre = W_enc (x − b_dec) + b_enc.

    The mean is subtracted before the product: at high gamma W_enc x − W_enc b_dec cancels and float32 loses the signal.
    The gradient of b_dec sums over the batch first, so it needs a vector-matrix product in place of a third matmul.
    """
    with exact():
        return (x - b_dec) @ W_enc.T + b_enc


def _preactivations_fwd(x: Array, W_enc: Array, b_enc: Array, b_dec: Array) -> tuple[Array, tuple[Array, ...]]:
    return preactivations(x, W_enc, b_enc, b_dec), (x, W_enc, b_dec)


def _preactivations_bwd(residuals: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    x, W_enc, b_dec = residuals
    g_sum = g.sum(axis=0)
    # g @ W_enc is only computed where somebody asks for the gradient of x: XLA drops it elsewhere.
    with exact():
        return g @ W_enc, g.T @ (x - b_dec), g_sum, -(g_sum @ W_enc)


preactivations.defvjp(_preactivations_fwd, _preactivations_bwd)


def top_k(z_pre: Float[Array, "B n"], k: int) -> Kept:
    """The k largest of ReLU(z_pre), in descending order. A row with fewer than k positive entries keeps zeros."""
    values, indices = largest(z_pre, k)  # ReLU keeps the order, and costs k a token after the choice, not n
    return Kept(jax.nn.relu(values), indices)


def product(x: Float[Array, "B d"], W_enc: Float[Array, "n d"]) -> Float[Array, "B n"]:
    """W_enc x, added up in the precision of x; W_enc may be bfloat16, then so is the other operand.

    bfloat16 keeps 8 bits, so x has to be centred: otherwise the rounding is about gamma / 400 of the signal.
    """
    operand = x.astype(W_enc.dtype) if W_enc.dtype == jnp.bfloat16 else x
    return jnp.matmul(operand, W_enc.T, preferred_element_type=x.dtype)


def scores(
    x: Float[Array, "B d"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"], b_dec: Float[Array, "d"],
    precision: str,
) -> Float[Array, "B n"]:  # fmt: skip
    """z_pre by the product that the choice of the k is made from, so that a program that needs both computes one."""
    one = lambda *args: (_score(*args),)  # noqa: E731
    (z_pre,) = in_pieces(one, (jnp.concatenate,), (x,), _operand(W_enc, precision), b_enc, b_dec)
    found: Array = z_pre
    return found


def _score(x: Array, W_enc: Array, b_enc: Array, b_dec: Array) -> Array:
    return product(x - b_dec, W_enc) + b_enc


def _operand(W_enc: Array, precision: str) -> Array:
    return W_enc.astype(jnp.bfloat16) if precision == "bfloat16" else W_enc


def encode(
    x: Float[Array, "B d"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"], b_dec: Float[Array, "d"], k: int
) -> Kept:
    """`top_k` of `preactivations`."""
    with exact():
        values, indices = _chosen(x, W_enc, b_enc, b_dec, None, Way(k))
    return Kept(jax.nn.relu(values), indices)


# -- the whole SAE ---------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How entries are chosen: static."""

    k: int  # how many a token, over all shards
    rectified: bool = True  # from ReLU(z_pre); False: from z_pre itself, negative values too
    shards: str | None = None  # the mesh axis over which the features are split, where they are
    precision: str = "float32"  # of the operands of the encoder's matmul: float32 (as they are) | bfloat16


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def square_error(
    x: Float[Array, "B d"],
    target: Float[Array, "B d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, "n"],
    W_dec: Float[Array, "n d"],
    b_dec: Float[Array, "d"],
    lift: Float[Array, "n"] | None,
    way: Way,
) -> tuple[Float[Array, ""], Float[Array, "B d"], Kept]:
    """Σ‖e‖² with e = target − W_decᵀ z; e itself; and the kept entries z of this shard.

    `b_dec` is what the encoder subtracts, `lift` is what positive pre-activations have more in the choice of the k, and
    there alone. A feature whose b_enc is −inf is never kept. The gradient is that of Σ‖e‖², through the kept entries; e
    and z are results without one.
    """
    return _square_error_fwd(x, target, W_enc, b_enc, W_dec, b_dec, lift, way)[0]


def _square_error_fwd(
    x: Array, target: Array, W_enc: Array, b_enc: Array, W_dec: Array, b_dec: Array, lift: Array | None, way: Way
) -> tuple[Any, tuple[Any, ...]]:
    with exact(way.precision):
        values, indices = _chosen(x, W_enc, b_enc, b_dec, lift, way)
        live = ~(values <= 0) if way.rectified else values != -jnp.inf  # a NaN stays one, and stops the run
        values = jnp.where(live, values, 0.0)
        kept = Kept(values, indices)
        e, along = _error(target, kept, W_dec, way.shards)
    return (jnp.sum(e * e), e, kept), (x, W_enc, b_dec, kept, live, e, along)


def _square_error_bwd(way: Way, residuals: tuple[Any, ...], cotangents: tuple[Array, Any, Any]) -> tuple[Any, ...]:
    x, W_enc, b_dec, (values, indices), live, e, along = residuals
    factor = -2 * cotangents[0]
    g, g_kept = factor * e, jnp.where(live, factor * along, 0.0)
    g_sum = jnp.zeros_like(W_enc[:, 0]).at[indices.ravel()].add(g_kept.ravel())
    # The gradient of x is computed only where somebody asks for it: training does not, and XLA drops it. That of b_dec
    # sums over the batch first, which leaves a vector-matrix product.
    with exact(way.precision):
        g_dec, g_enc = scatter((values, g_kept), indices, (g, x - b_dec), W_enc.shape[0])
        g_x = over_shards(combine(Kept(g_kept, indices), W_enc), way.shards)
        g_b_dec = -over_shards(g_sum @ W_enc, way.shards)
    return g_x, -g, g_enc, g_sum, g_dec, g_b_dec, None


square_error.defvjp(_square_error_fwd, _square_error_bwd)


def _error(target: Array, kept: Kept, W_dec: Array, shards: str | None) -> tuple[Array, Array]:
    """e = target − W_decᵀ z, and (e @ W_decᵀ) at the kept entries, which is what their gradient is made of."""

    def apart(target: Array, kept: Kept, W_dec: Array) -> tuple[Array, Array]:
        e = target - over_shards(combine(kept, W_dec), shards)
        return e, pick(e, kept, W_dec)

    def few_tokens(target: Array, kept: Kept, W_dec: Array) -> tuple[Array, Array]:
        # The k rows of a few tokens at a time are read once for both, and stay in the cache in between.
        def one(token: tuple[Array, Kept]) -> tuple[Array, Array]:
            rows = W_dec[token[1].indices]
            e = token[0] - token[1].values @ rows
            return e, rows @ e

        found: tuple[Array, Array] = jax.lax.map(one, (target, kept), batch_size=FEW)
        return found

    fused = shards is None and form(kept.values.shape[1], *W_dec.shape) == "compressed"
    found: tuple[Array, Array] = by_platform(
        target, kept, W_dec, cpu=few_tokens if fused else apart, elsewhere=apart
    )
    return found


def _chosen(
    x: Array, W_enc: Array, b_enc: Array, b_dec: Array, lift: Array | None, way: Way
) -> tuple[Array, Array]:
    """The k largest pre-activations of this shard, −inf where they are not among the k largest of all shards."""
    k = min(way.k, W_enc.shape[0])

    def choose(x: Array, W_enc: Array, b_enc: Array, b_dec: Array, lift: Array | None) -> tuple[Array, Array]:
        score = _score(x, W_enc, b_enc, b_dec)
        if lift is not None:  # what is not positive would only take the place of something that is
            score = jnp.where(score > 0, score + lift, score)
        return largest(score, k)

    def lowered(values: Array, indices: Array) -> Array:
        return values if lift is None else jnp.where(values > 0, values - lift[indices], values)

    operand = _operand(W_enc, way.precision)
    values, indices = in_pieces(choose, (jnp.concatenate,) * 2, (x,), operand, b_enc, b_dec, lift)
    if way.shards is None:
        return lowered(values, indices), indices
    # Candidates in order of shard, so that of equal values the lowest feature wins, as on one device.
    candidates = jax.lax.all_gather(values, way.shards, axis=1, tiled=True)  # (B, shards · k)
    winners = largest(candidates, way.k)[1]
    rows = jnp.arange(values.shape[0])[:, None]
    won = jnp.zeros(candidates.shape, bool).at[rows, winners].set(True)
    mine = jax.lax.dynamic_slice_in_dim(won, jax.lax.axis_index(way.shards) * k, k, axis=1)
    return jnp.where(mine, lowered(values, indices), -jnp.inf), indices


def seen(
    x: Float[Array, "B d"], valid: Bool[Array, "B"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"],
    b_dec: Float[Array, "d"], k: int,
) -> tuple[Bool[Array, "n"], Kept]:  # fmt: skip
    """Which features are positive on a valid token, and the k largest of ReLU of every token, none where not valid."""

    def look(x: Array, valid: Array, W_enc: Array, b_enc: Array, b_dec: Array) -> tuple[Array, ...]:
        z_pre = jnp.where(valid[:, None], preactivations(x, W_enc, b_enc, b_dec), -1.0)
        return z_pre.max(axis=0) > 0, *top_k(z_pre, k)

    anywhere = partial(reduce, jnp.logical_or)
    positive, values, indices = in_pieces(
        look, (anywhere, jnp.concatenate, jnp.concatenate), (x, valid), W_enc, b_enc, b_dec
    )
    return positive, Kept(values, indices)


def in_pieces(
    fn: Callable[..., tuple[Array, ...]], joins: tuple[Callable[..., Array], ...], rows: tuple[Array, ...],
    W_enc: Array, *rest: Any,
) -> Any:  # fmt: skip
    """fn(*rows, W_enc, *rest), for large SAEs on a CPU on a part of the rows at a time, results joined as `joins` say.

    XLA's top-k on a CPU has one thread. In pieces it works while the other cores multiply, and on data in cache.
    """
    pieces, n = min(CHUNKS, rows[0].shape[0] // CHUNK), len(rows)

    def split(*args: Any) -> tuple[Array, ...]:
        parts = zip(*(jnp.array_split(a, pieces) for a in args[:n]), strict=True)
        found = [fn(*part, *args[n:]) for part in parts]
        return tuple(join(each) for join, each in zip(joins, zip(*found, strict=True), strict=True))

    return by_platform(*rows, W_enc, *rest, cpu=split if pieces > 1 and is_large(*W_enc.shape) else fn, elsewhere=fn)


def rows_at_a_time(rows: float | int, n: int, d: int) -> float:
    """How many of the rows of a batch have their pre-activations in memory together, on a CPU: see `in_pieces`."""
    return rows / max(1, min(CHUNKS, rows // CHUNK)) if is_large(n, d) else float(rows)


def over_shards(tree: Any, shards: str | None) -> Any:
    """A pytree added up over the shards of the features."""
    return tree if shards is None else jax.lax.psum(tree, shards)


def n_shards(shards: str | None) -> int:
    """Into how many the features are split."""
    return 1 if shards is None else jax.lax.axis_size(shards)


@jax.custom_vjp
def decode(kept: Kept, rows: Float[Array, "n d"]) -> Float[Array, "B d"]:
    """Σ_j values[:, j] · rows[indices[:, j]]."""
    with exact():
        return combine(kept, rows)


def _decode_fwd(kept: Kept, rows: Array) -> tuple[Array, tuple[Kept, Array]]:
    return decode(kept, rows), (kept, rows)


def _decode_bwd(residuals: tuple[Kept, Array], g: Array) -> tuple[tuple[Array, None], Array]:
    kept, rows = residuals
    with exact():
        g_values, (g_rows,) = pick(g, kept, rows), scatter((kept.values,), kept.indices, (g,), rows.shape[0])
    return Kept(g_values, None), g_rows


decode.defvjp(_decode_fwd, _decode_bwd)
