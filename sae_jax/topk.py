"""The hot kernel: pre-activations, top-k through `jax.lax.top_k`, sparse decode, and their gradients.

Notation: batch B, width d (d_model), dictionary size n (n_features), k kept entries a token. `A` is the (B, n) matrix
of kept entries, Aᵀ @ dense the gradient of a weight matrix. Three exact forms of the products with A, by measured cost:

    compressed  A in compressed rows, one sort by feature for both weight gradients: one large SAE on a CPU
    rows        k gathered rows a token, rows scattered back: small SAEs on a CPU, under vmap too
    dense       A written out and multiplied: accelerators, and wherever many of the n are kept
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCSR
from jaxtyping import Array, Float, Int

LARGE = 2**20  # entries of a weight matrix (n · d) from which compressed rows pay, measured on two CPU cores
SPARSE = 1 / 32  # the largest share k / n for which the sparse forms pay there
UNROLLED = 8  # kept entries of a token handled in one pass over memory


def is_large(n: int, d: int) -> bool:
    """Whether one SAE keeps the machine busy by itself."""
    return n * d >= LARGE


def form(k: int, n: int, d: int) -> str:
    """How products with the kept entries are computed: `dense`, `rows` or `compressed`."""
    if jax.default_backend() != "cpu" or k > n * SPARSE:
        return "dense"
    return "compressed" if is_large(n, d) else "rows"


# -- encode ----------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def preactivations(
    x: Float[Array, "B d"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"], b_dec: Float[Array, "d"]
) -> Float[Array, "B n"]:
    """z_pre = W_enc (x − b_dec) + b_enc.

    The mean is subtracted before the product: at high gamma W_enc x − W_enc b_dec cancels and float32 loses the signal.
    The gradient of b_dec sums over the batch first, so it needs a vector-matrix product in place of a third matmul.
    """
    return (x - b_dec) @ W_enc.T + b_enc


def _preactivations_fwd(x: Array, W_enc: Array, b_enc: Array, b_dec: Array) -> tuple[Array, tuple[Array, ...]]:
    return preactivations(x, W_enc, b_enc, b_dec), (x, W_enc, b_dec)


def _preactivations_bwd(residuals: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    x, W_enc, b_dec = residuals
    g_sum = g.sum(axis=0)
    # g @ W_enc is only computed where somebody asks for the gradient of x: training does not, and XLA drops it.
    return g @ W_enc, g.T @ (x - b_dec), g_sum, -(g_sum @ W_enc)


preactivations.defvjp(_preactivations_fwd, _preactivations_bwd)


def top_k(z_pre: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The k largest of ReLU(z_pre), in descending order. A row with fewer than k positive entries keeps zeros."""
    values, indices = jax.lax.top_k(z_pre, k)  # ReLU keeps the order, and costs k a token after the choice, not n
    return jax.nn.relu(values), indices


def encode(
    x: Float[Array, "B d"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"], b_dec: Float[Array, "d"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`top_k` of `preactivations`."""
    return top_k(preactivations(x, W_enc, b_enc, b_dec), k)


# -- the whole SAE ---------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def reconstruct(
    x: Float[Array, "B d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, "n"],
    W_dec: Float[Array, "n d"],
    b_dec: Float[Array, "d"],
    k: int,
) -> tuple[Float[Array, "B d"], tuple[Float[Array, "B k"], Int[Array, "B k"]]]:
    """x̂ and the kept entries it is made of. The gradient goes through the kept entries only."""
    values, indices = encode(x, W_enc, b_enc, b_dec, k)
    return _combine(Kept(values, indices), W_dec) + b_dec, (values, indices)


def _reconstruct_fwd(
    x: Array, W_enc: Array, b_enc: Array, W_dec: Array, b_dec: Array, k: int
) -> tuple[Any, tuple[Array, ...]]:
    out = reconstruct(x, W_enc, b_enc, W_dec, b_dec, k)
    return out, (x, W_enc, W_dec, b_dec, *out[1])


def _reconstruct_bwd(k: int, residuals: tuple[Array, ...], cotangents: tuple[Array, Any]) -> tuple[Array, ...]:
    x, W_enc, W_dec, b_dec, values, indices = residuals
    g, (g_values, _) = cotangents
    kept = Kept(values, indices)
    g_kept = jnp.where(values > 0, _pick(g, kept, W_dec) + g_values, 0.0)  # ReLU
    both = _scatter((values, g_kept), indices, (g, x - b_dec), W_enc.shape[0])
    g_sum = jnp.zeros_like(W_enc[:, 0]).at[indices.ravel()].add(g_kept.ravel())
    # The first is computed only where somebody asks for the gradient of x; training does not.
    return _combine(Kept(g_kept, indices), W_enc), both[1], g_sum, both[0], g.sum(0) - g_sum @ W_enc


reconstruct.defvjp(_reconstruct_fwd, _reconstruct_bwd)


@jax.custom_vjp
def decode(values: Float[Array, "B k"], indices: Int[Array, "B k"], rows: Float[Array, "n d"]) -> Float[Array, "B d"]:
    """Σ_j values[:, j] · rows[indices[:, j]]."""
    return _combine(Kept(values, indices), rows)


def _decode_fwd(values: Array, indices: Array, rows: Array) -> tuple[Array, tuple[Array, ...]]:
    return decode(values, indices, rows), (values, indices, rows)


def _decode_bwd(residuals: tuple[Array, ...], g: Array) -> tuple[Array, None, Array]:
    values, indices, rows = residuals
    return _pick(g, Kept(values, indices), rows), None, _scatter((values,), indices, (g,), rows.shape[0])[0]


decode.defvjp(_decode_fwd, _decode_bwd)


# -- products with the (B, n) matrix A of kept entries ---------------------------------------------------------------


class Kept(NamedTuple):
    """The entries of A, k a token."""

    values: jax.Array  # (B, k)
    indices: jax.Array  # (B, k)


def _dense(kept: Kept, n: int) -> Array:
    batch = kept.values.shape[0]
    return jnp.zeros((batch, n), kept.values.dtype).at[jnp.arange(batch)[:, None], kept.indices].add(kept.values)


def _combine(kept: Kept, rows: Array) -> Array:
    """A @ rows, (B, d)."""
    (batch, k), (n, d) = kept.values.shape, rows.shape
    match form(k, n, d):
        case "dense":
            return _dense(kept, n) @ rows
        case "rows":
            return _over_kept(k, lambda j, sum: sum + kept.values[:, j, None] * rows[kept.indices[:, j]],
                              jnp.zeros((batch, d), rows.dtype))  # fmt: skip
    starts = jnp.arange(batch + 1, dtype=kept.indices.dtype) * k
    product: Array = BCSR((kept.values.ravel(), kept.indices.ravel(), starts), shape=(batch, n)) @ rows
    return product


def _pick(g: Array, kept: Kept, rows: Array) -> Array:
    """(g @ rowsᵀ) at the kept entries, (B, k)."""
    (batch, k), (n, d) = kept.values.shape, rows.shape
    if form(k, n, d) == "dense":
        return jnp.take_along_axis(g @ rows.T, kept.indices, axis=1)
    # One kept entry of every token at a time: a loop that fuses, where gather and einsum would write out (B, k, d).
    return _over_kept(k, lambda j, out: out.at[:, j].set(jnp.sum(g * rows[kept.indices[:, j]], axis=1)),
                      jnp.zeros((batch, k), g.dtype))  # fmt: skip


def _over_kept(k: int, body: Any, start: Array) -> Array:
    return jax.lax.fori_loop(0, k, body, start, unroll=min(k, UNROLLED))


def _scatter(values: tuple[Array, ...], indices: Array, tokens: tuple[Array, ...], n: int) -> tuple[Array, ...]:
    """Aᵀ @ tokens, (n, d), for several A with the same indices: for every feature a weighted sum of its tokens."""
    (batch, k), d = indices.shape, tokens[0].shape[1]
    match form(k, n, d):
        case "dense":
            return tuple(_dense(Kept(v, indices), n).T @ t for v, t in zip(values, tokens, strict=True))
        case "rows":
            return tuple(
                jnp.zeros((n, d), v.dtype).at[indices.ravel()].add((v[:, :, None] * t[:, None]).reshape(-1, d))
                for v, t in zip(values, tokens, strict=True)
            )
    position = jnp.arange(batch * k, dtype=indices.dtype)
    features, order = jax.lax.sort((indices.ravel(), position), num_keys=1)
    starts = jnp.searchsorted(features, jnp.arange(n + 1, dtype=indices.dtype)).astype(indices.dtype)
    return tuple(
        BCSR((v.ravel()[order], order // k, starts), shape=(n, batch)) @ t for v, t in zip(values, tokens, strict=True)
    )
