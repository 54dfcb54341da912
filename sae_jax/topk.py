"""The hot kernel: pre-activations, top-k through `jax.lax.top_k`, sparse decode, and their gradients.

Notation: batch B, width d (d_model), dictionary size n (n_features), k kept entries a token. `A` is the (B, n) matrix
of kept entries, Aᵀ @ dense the gradient of a weight matrix. Three exact forms of the products with A, by measured cost:

    compressed  A in compressed rows, one sort by feature for both weight gradients: one large SAE on a CPU
    rows        k gathered rows a token, rows scattered back: small SAEs on a CPU, under vmap too
    dense       A written out and multiplied: accelerators, and wherever many of the n are kept
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCSR
from jaxtyping import Array, Bool, Float, Int

LARGE = 2**20  # entries of a weight matrix (n · d) from which compressed rows pay, measured on two CPU cores
SPARSE = 1 / 32  # the largest share k / n for which the sparse forms pay there
UNROLLED = 8  # kept entries of a token handled in one pass over memory
FEW = 16  # tokens whose kept rows fit in a core's cache
CHUNKS, CHUNK = 16, 128  # pieces of a batch, and least tokens in one: top-k of one runs beside the matmul of the next


def is_large(n: int, d: int) -> bool:
    """Whether one SAE keeps the machine busy by itself."""
    return n * d >= LARGE


def form(k: int, n: int, d: int) -> str:
    """How products with the kept entries are computed on a CPU: `dense` (as elsewhere), `rows` or `compressed`."""
    if k > n * SPARSE:
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
    values, indices = largest(z_pre, k)  # ReLU keeps the order, and costs k a token after the choice, not n
    return jax.nn.relu(values), indices


def largest(z: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`jax.lax.top_k` behind a barrier: where XLA merges it with a slice of its result it sorts all n instead."""
    values, indices = jax.lax.top_k(z, k)  # one barrier each: XLA's partitioner aborts on one for the pair
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)


def product(x: Float[Array, "B d"], W_enc: Float[Array, "n d"], precision: str) -> Float[Array, "B n"]:
    """W_enc x in float32, or from operands rounded to bfloat16 and added up in float32.

    bfloat16 keeps 8 bits, so x has to be centred: otherwise the rounding is about gamma / 400 of the signal.
    """
    if precision == "float32":
        return x @ W_enc.T
    low = (x.astype(jnp.bfloat16), W_enc.T.astype(jnp.bfloat16))
    return jnp.matmul(*low, preferred_element_type=x.dtype)


def encode(
    x: Float[Array, "B d"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"], b_dec: Float[Array, "d"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`top_k` of `preactivations`."""
    values, indices = _chosen(x, W_enc, b_enc, b_dec, None, Way(k))
    return jax.nn.relu(values), indices


# -- the whole SAE ---------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How entries are chosen: static."""

    k: int  # how many a token, over all shards
    rectified: bool = True  # from ReLU(z_pre); False: from z_pre itself, negative values too
    shards: str | None = None  # the mesh axis over which the features are split, where they are
    precision: str = "float32"  # of the encoder's matmul, as in `product`


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def reconstruct(
    x: Float[Array, "B d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, "n"],
    W_dec: Float[Array, "n d"],
    b_dec: Float[Array, "d"],
    only: Bool[Array, "n"] | None,
    way: Way,
) -> tuple[Float[Array, "B d"], tuple[Float[Array, "B k"], Int[Array, "B k"]]]:
    """W_decᵀ z, and the kept entries z of this shard. The gradient goes through the kept entries only.

    `only` limits the choice to some features.
    """
    return _reconstruct_fwd(x, W_enc, b_enc, W_dec, b_dec, only, way)[0]


def _reconstruct_fwd(
    x: Array, W_enc: Array, b_enc: Array, W_dec: Array, b_dec: Array, only: Array | None, way: Way
) -> tuple[Any, tuple[Array, ...]]:
    values, indices = _chosen(x, W_enc, b_enc, b_dec, only, way)
    live = values > (0.0 if way.rectified else -jnp.inf)
    values = jnp.where(live, values, 0.0)
    x_hat = over_shards(_combine(Kept(values, indices), W_dec), way.shards)
    return (x_hat, (values, indices)), (x, W_enc, W_dec, b_dec, values, indices, live)


def _reconstruct_bwd(way: Way, residuals: tuple[Array, ...], cotangents: tuple[Array, Any]) -> tuple[Any, ...]:
    x, W_enc, W_dec, b_dec, values, indices, live = residuals
    g, (g_values, _) = cotangents
    g_kept = jnp.where(live, _pick(g, Kept(values, indices), W_dec) + g_values, 0.0)
    g_dec, g_enc = _scatter((values, g_kept), indices, (g, x - b_dec), W_enc.shape[0])
    g_sum = jnp.zeros_like(W_enc[:, 0]).at[indices.ravel()].add(g_kept.ravel())
    # The gradient of x is computed only where somebody asks for it: training does not, and XLA drops it. That of b_dec
    # sums over the batch first, which leaves a vector-matrix product.
    g_x = over_shards(_combine(Kept(g_kept, indices), W_enc), way.shards)
    return g_x, g_enc, g_sum, g_dec, -over_shards(g_sum @ W_enc, way.shards), None


reconstruct.defvjp(_reconstruct_fwd, _reconstruct_bwd)


def _chosen(
    x: Array, W_enc: Array, b_enc: Array, b_dec: Array, only: Array | None, way: Way
) -> tuple[Array, Array]:
    """The k largest pre-activations of this shard, −inf where they are not among the k largest of all shards."""
    k = min(way.k, W_enc.shape[0])

    def choose(x: Array, W_enc: Array, b_enc: Array, b_dec: Array, only: Array | None) -> tuple[Array, Array]:
        z_pre = product(x - b_dec, W_enc, way.precision) + b_enc
        return largest(z_pre if only is None else jnp.where(only, z_pre, -jnp.inf), k)

    values, indices = in_pieces(choose, (x,), W_enc, b_enc, b_dec, only)
    if way.shards is None:
        return values, indices
    # Candidates in order of shard, so that of equal values the lowest feature wins, as on one device.
    candidates = jax.lax.all_gather(values, way.shards, axis=1, tiled=True)  # (B, shards · k)
    winners = largest(candidates, way.k)[1]
    rows = jnp.arange(values.shape[0])[:, None]
    won = jnp.zeros(candidates.shape, bool).at[rows, winners].set(True)
    mine = jax.lax.dynamic_slice_in_dim(won, jax.lax.axis_index(way.shards) * k, k, axis=1)
    return jnp.where(mine, values, -jnp.inf), indices


def seen(
    x: Float[Array, "B d"], valid: Bool[Array, "B"], W_enc: Float[Array, "n d"], b_enc: Float[Array, "n"],
    b_dec: Float[Array, "d"], k: int,
) -> tuple[Bool[Array, "n"], Float[Array, "B k"], Int[Array, "B k"]]:  # fmt: skip
    """Which features are positive on a valid token, and the k largest of ReLU of every token, none where not valid."""

    def look(x: Array, valid: Array, W_enc: Array, b_enc: Array, b_dec: Array) -> tuple[Array, ...]:
        z_pre = jnp.where(valid[:, None], preactivations(x, W_enc, b_enc, b_dec), -1.0)
        return z_pre.max(axis=0)[None], *top_k(z_pre, k)

    most, values, indices = in_pieces(look, (x, valid), W_enc, b_enc, b_dec)
    return most.max(axis=0) > 0, values, indices


def in_pieces(fn: Callable[..., tuple[Array, ...]], rows: tuple[Array, ...], W_enc: Array, *rest: Any) -> Any:
    """fn(*rows, W_enc, *rest), whose results are then joined; at once but for large SAEs on a CPU.

    XLA's top-k on a CPU has one thread. In pieces it works while the other cores multiply, and on data in cache.
    """
    pieces, n = min(CHUNKS, rows[0].shape[0] // CHUNK), len(rows)

    def split(*args: Any) -> tuple[Array, ...]:
        parts = zip(*(jnp.array_split(a, pieces) for a in args[:n]), strict=True)
        found = [fn(*part, *args[n:]) for part in parts]
        return tuple(jnp.concatenate(each) for each in zip(*found, strict=True))

    return on_cpu(split if pieces > 1 and is_large(*W_enc.shape) else fn, fn, *rows, W_enc, *rest)


def over_shards(tree: Any, shards: str | None) -> Any:
    """A pytree added up over the shards of the features."""
    return tree if shards is None else jax.lax.psum(tree, shards)


def n_shards(shards: str | None) -> int:
    """Into how many the features are split."""
    return 1 if shards is None else jax.lax.axis_size(shards)


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


def on_cpu(cpu: Callable[..., Any], elsewhere: Callable[..., Any], *args: Any) -> Any:
    """One of two ways, by the platform that the program is compiled for, which need not be the one it is built on."""
    return elsewhere(*args) if cpu is elsewhere else jax.lax.platform_dependent(*args, cpu=cpu, default=elsewhere)


def _dense(kept: Kept, n: int) -> Array:
    batch = kept.values.shape[0]
    return jnp.zeros((batch, n), kept.values.dtype).at[jnp.arange(batch)[:, None], kept.indices].add(kept.values)


def _combine(kept: Kept, rows: Array) -> Array:
    """A @ rows, (B, d)."""
    (batch, k), (n, d) = kept.values.shape, rows.shape

    def dense(kept: Kept, rows: Array) -> Array:
        return _dense(kept, n) @ rows

    def gathered(kept: Kept, rows: Array) -> Array:
        add = lambda j, sum: sum + kept.values[:, j, None] * rows[kept.indices[:, j]]  # noqa: E731
        return _over_kept(k, add, jnp.zeros((batch, d), rows.dtype))

    def compressed(kept: Kept, rows: Array) -> Array:
        starts = jnp.arange(batch + 1, dtype=kept.indices.dtype) * k
        product: Array = BCSR((kept.values.ravel(), kept.indices.ravel(), starts), shape=(batch, n)) @ rows
        return product

    ways = {"dense": dense, "rows": gathered, "compressed": compressed}
    product: Array = on_cpu(ways[form(k, n, d)], dense, kept, rows)
    return product


def _pick(g: Array, kept: Kept, rows: Array) -> Array:
    """(g @ rowsᵀ) at the kept entries, (B, k)."""
    (batch, k), (n, d) = kept.values.shape, rows.shape

    def dense(g: Array, indices: Array, rows: Array) -> Array:
        return jnp.take_along_axis(g @ rows.T, indices, axis=1)

    def gathered(g: Array, indices: Array, rows: Array) -> Array:
        # One kept entry of every token at a time fuses, where gather and einsum would write out (B, k, d).
        put = lambda j, out: out.at[:, j].set(jnp.sum(g * rows[indices[:, j]], axis=1))  # noqa: E731
        return _over_kept(k, put, jnp.zeros((batch, k), g.dtype))

    def few_tokens(g: Array, indices: Array, rows: Array) -> Array:
        # The k rows of a few tokens at a time stay in the cache.
        picked: Array = jax.lax.map(lambda token: rows[token[1]] @ token[0], (g, indices), batch_size=FEW)
        return picked

    ways = {"dense": dense, "rows": gathered, "compressed": few_tokens}
    picked: Array = on_cpu(ways[form(k, n, d)], dense, g, kept.indices, rows)
    return picked


def _over_kept(k: int, body: Any, start: Array) -> Array:
    return jax.lax.fori_loop(0, k, body, start, unroll=min(k, UNROLLED))


def _scatter(values: tuple[Array, ...], indices: Array, tokens: tuple[Array, ...], n: int) -> tuple[Array, ...]:
    """Aᵀ @ tokens, (n, d), for several A with the same indices: for every feature a weighted sum of its tokens."""
    (batch, k), d = indices.shape, tokens[0].shape[1]

    def dense(pairs: list[tuple[Array, Array]], indices: Array) -> tuple[Array, ...]:
        return tuple(_dense(Kept(v, indices), n).T @ t for v, t in pairs)

    def scattered(pairs: list[tuple[Array, Array]], indices: Array) -> tuple[Array, ...]:
        return tuple(
            jnp.zeros((n, d), v.dtype).at[indices.ravel()].add((v[:, :, None] * t[:, None]).reshape(-1, d))
            for v, t in pairs
        )

    def compressed(pairs: list[tuple[Array, Array]], indices: Array) -> tuple[Array, ...]:
        features, order = _sorted(indices.ravel(), n)
        starts = jnp.searchsorted(features, jnp.arange(n + 1, dtype=indices.dtype)).astype(indices.dtype)
        return tuple(BCSR((v.ravel()[order], order // k, starts), shape=(n, batch)) @ t for v, t in pairs)

    ways = {"dense": dense, "rows": scattered, "compressed": compressed}
    sums: tuple[Array, ...] = on_cpu(
        ways[form(k, n, d)], dense, list(zip(values, tokens, strict=True)), indices
    )
    return sums


def _sorted(features: Array, n: int) -> tuple[Array, Array]:
    """Features in ascending order, and where each stood before."""
    position = jnp.arange(features.size, dtype=features.dtype)
    bits = (features.size - 1).bit_length()
    if n << bits > 2**32:
        ordered, order = jax.lax.sort((features, position), num_keys=1)
        return ordered, order
    # One key in place of a pair: four times as fast.
    packed = jax.lax.sort((features.astype(jnp.uint32) << bits) | position.astype(jnp.uint32))
    return (packed >> bits).astype(features.dtype), (packed & (2**bits - 1)).astype(features.dtype)
