"""The k largest entries of every token, and products with A, the (B, n) matrix of what top-k kept of them.

A is worked with in the cheapest of four exact forms. Aᵀ @ dense is the gradient of a weight matrix, A @ dense the
decoder. By measured cost:

    compressed  A in compressed rows, one sort by feature for both weight gradients: one large SAE on a CPU
    rows        k gathered rows a token, rows scattered back: small SAEs on a CPU, under vmap too
    sorted      k gathered rows a token, rows scattered back in the order of their features: GPUs
    dense       A written out and multiplied: TPUs, and wherever many of the n are kept
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGE = 2**20  # entries of a weight matrix (n · d) from which compressed rows pay, measured on two CPU cores
SPARSE, SPARSE_ON_GPU = 1 / 32, 1 / 16  # the largest share k / n for which the sparse forms pay, there and on an H200
UNROLLED = 8  # kept entries of a token handled in one pass over memory
# Neighbours that are first compared among themselves, on a GPU; 4 to 16 are alike there. On a CPU groups of 16 halve
# the time of top-k where n is 256 · k or more, and not that of the step, where it is hidden behind the matmul.
GROUP = 8
FEW = 16  # tokens whose kept rows are read together; 4 to 32 are alike at k 64, d 768


def is_large(n: int, d: int) -> bool:
    """Whether one SAE keeps the machine busy by itself."""
    return n * d >= LARGE


def form(k: int, n: int, d: int) -> str:
    """How products with the kept entries are computed on a CPU."""
    if k > n * SPARSE:
        return "dense"
    return "compressed" if is_large(n, d) else "rows"


def form_on_gpu(k: int, n: int) -> str:
    """The same on a GPU."""
    return "dense" if k > n * SPARSE_ON_GPU else "sorted"


class Kept(NamedTuple):
    """The kept entries of a batch: k values a token, and the features they belong to."""

    values: Any  # (B, k), ≥ 0 where an SAE encoded them; 0: fewer than k were positive
    indices: Any  # (B, k)


def by_platform(
    *args: Any, elsewhere: Callable[..., Any], cpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Any:  # fmt: skip
    """One of several ways, by the platform that the program is compiled for, which need not be the one it is built on.

    A way that is not given is that of `elsewhere`.
    """
    named = {"cpu": cpu, "cuda": gpu, "rocm": gpu}
    own = {name: way for name, way in named.items() if way is not None and way is not elsewhere}
    return jax.lax.platform_dependent(*args, **own, default=elsewhere) if own else elsewhere(*args)


def in_form(ways: dict[str, Callable[..., Any]], k: int, n: int, d: int, *args: Any) -> Any:
    """The way named after the form that is cheapest where it runs."""
    return by_platform(*args, cpu=ways[form(k, n, d)], gpu=ways[form_on_gpu(k, n)], elsewhere=ways["dense"])


def largest(z: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`jax.lax.top_k`; in groups on a GPU, where that sorts all n."""
    values, indices = by_platform(z, gpu=partial(in_groups, k=k, size=GROUP), elsewhere=partial(_top_k, k=k))
    # Where XLA merges top-k with a slice of its result it sorts all n instead: hence a barrier; one each, as its
    # partitioner aborts on one for the pair.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)


def in_groups(z: Float[Array, "B n"], k: int, size: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Exactly `jax.lax.top_k`, of equal values the first too.

    The k largest lie in the k groups of `size` neighbours with the largest maxima, which are found in the same way;
    what is in no whole group is looked at anyway.
    """
    batch, n = z.shape
    n_groups = n // size
    if n_groups <= 2 * k:
        return _top_k(z, k)
    whole = n_groups * size
    maxima = z[:, :whole].reshape(batch, n_groups, size).max(axis=2)
    groups = jnp.sort(in_groups(maxima, k, size)[1], axis=1)
    inside = (groups[:, :, None] * size + jnp.arange(size, dtype=groups.dtype)).reshape(batch, -1)
    rest = jnp.broadcast_to(jnp.arange(whole, n, dtype=groups.dtype), (batch, n - whole))
    candidates = jnp.concatenate([inside, rest], axis=1)
    values, places = _top_k(jnp.take_along_axis(z, candidates, axis=1), k)
    return values, jnp.take_along_axis(candidates, places, axis=1)


def _top_k(z: Array, k: int) -> tuple[Array, Array]:
    values, indices = jax.lax.top_k(z, k)  # a list
    return values, indices


def _dense(kept: Kept, n: int) -> Array:
    batch = kept.values.shape[0]
    return jnp.zeros((batch, n), kept.values.dtype).at[jnp.arange(batch)[:, None], kept.indices].add(kept.values)


def _compressed(values: Array, columns: Array, starts: Array, shape: tuple[int, int]) -> Any:
    from jax.experimental.sparse import BCSR  # and with it scipy.sparse, which only large SAEs on a CPU need

    return BCSR((values, columns, starts), shape=shape)


def combine(kept: Kept, rows: Array) -> Array:
    """A @ rows, (B, d)."""
    (batch, k), (n, d) = kept.values.shape, rows.shape

    def dense(kept: Kept, rows: Array) -> Array:
        return _dense(kept, n) @ rows

    def gathered(kept: Kept, rows: Array) -> Array:
        add = lambda j, sum: sum + kept.values[:, j, None] * rows[kept.indices[:, j]]  # noqa: E731
        return _over_kept(k, add, jnp.zeros((batch, d), jnp.result_type(kept.values, rows)))

    def compressed(kept: Kept, rows: Array) -> Array:
        starts = jnp.arange(batch + 1, dtype=kept.indices.dtype) * k
        product: Array = _compressed(kept.values.ravel(), kept.indices.ravel(), starts, (batch, n)) @ rows
        return product

    ways = {"dense": dense, "rows": gathered, "sorted": gathered, "compressed": compressed}
    product: Array = in_form(ways, k, n, d, kept, rows)
    return product


def pick(g: Array, kept: Kept, rows: Array) -> Array:
    """(g @ rowsᵀ) at the kept entries, (B, k)."""
    (batch, k), (n, d) = kept.values.shape, rows.shape

    def dense(g: Array, indices: Array, rows: Array) -> Array:
        return jnp.take_along_axis(g @ rows.T, indices, axis=1)

    def gathered(g: Array, indices: Array, rows: Array) -> Array:
        # One kept entry of every token at a time fuses, where gather and einsum would write out (B, k, d).
        put = lambda j, out: out.at[:, j].set(jnp.sum(g * rows[indices[:, j]], axis=1))  # noqa: E731
        return _over_kept(k, put, jnp.zeros((batch, k), g.dtype))

    def fused(g: Array, indices: Array, rows: Array) -> Array:
        return jnp.sum(g[:, None] * rows[indices], axis=2)  # a GPU's compiler writes none of it out

    def few_tokens(g: Array, indices: Array, rows: Array) -> Array:
        # Of all tokens at once the rows would be (B, k, d).
        picked: Array = jax.lax.map(lambda token: rows[token[1]] @ token[0], (g, indices), batch_size=FEW)
        return picked

    ways = {"dense": dense, "rows": gathered, "sorted": fused, "compressed": few_tokens}
    picked: Array = in_form(ways, k, n, d, g, kept.indices, rows)
    return picked


def _over_kept(k: int, body: Any, start: Array) -> Array:
    return jax.lax.fori_loop(0, k, body, start, unroll=min(k, UNROLLED))


def scatter(values: tuple[Array, ...], indices: Array, tokens: tuple[Array, ...], n: int) -> tuple[Array, ...]:
    """Aᵀ @ tokens, (n, d), for several A with the same indices: for every feature a weighted sum of its tokens."""
    (batch, k), d = indices.shape, tokens[0].shape[1]

    def dense(each: list[tuple[Array, Array]], indices: Array) -> tuple[Array, ...]:
        return tuple(_dense(Kept(v, indices), n).T @ t for v, t in each)

    def scattered(each: list[tuple[Array, Array]], indices: Array) -> tuple[Array, ...]:
        return tuple(
            jnp.zeros((n, d), v.dtype).at[indices.ravel()].add((v[:, :, None] * t[:, None]).reshape(-1, d))
            for v, t in each
        )

    def compressed(each: list[tuple[Array, Array]], indices: Array) -> tuple[Array, ...]:
        features, order = _sorted(indices.ravel(), n)
        starts = jnp.searchsorted(features, jnp.arange(n + 1, dtype=indices.dtype)).astype(indices.dtype)
        return tuple(_compressed(v.ravel()[order], order // k, starts, (n, batch)) @ t for v, t in each)

    def in_order(each: list[tuple[Array, Array]], indices: Array) -> tuple[Array, ...]:
        features, order = _sorted(indices.ravel(), n)
        return tuple(
            jnp.zeros((n, d), v.dtype).at[features].add(
                v.ravel()[order][:, None] * t[order // k], indices_are_sorted=True
            )
            for v, t in each
        )  # fmt: skip

    ways = {"dense": dense, "rows": scattered, "sorted": in_order, "compressed": compressed}
    sums: tuple[Array, ...] = in_form(ways, k, n, d, list(zip(values, tokens, strict=True)), indices)
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
