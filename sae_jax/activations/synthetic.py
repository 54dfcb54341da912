"""Activations made on the device, with an exact gamma and, for the sparse signal, known ground-truth features.

    x = mu + signal,  E[signal] = 0,  ‖sigma‖ = √d,  ‖mu‖ = gamma·√d

Every row has its own key, made from the seed, the split, the step and the row's number in the global batch: any number
of devices and processes sees the same batches, and the step alone is the position in the data.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray
from ml_collections import ConfigDict

from sae_jax.autoencoder import topk
from sae_jax.autoencoder.kept import Kept

N_FEW = 4  # dimensions that carry the mean where mean_direction = 'few'
SPLITS = {"train": 0, "statistics": 1, "eval": 2}


class Synthetic(struct.PyTreeNode):
    """A distribution of activations. `rows` are the true features (sparse) or the signal's basis (gaussian)."""

    mu: Any  # (d,)
    direction: Any  # (d,) unit direction of mu, whatever gamma
    rows: Any  # (m, d) unit features, or (rank, d) orthonormal basis
    signal_mean: Any  # (d,) what is taken off so that the signal has none
    scale: Any  # () what makes ‖sigma‖ = √d
    key: Any
    signal: str = struct.field(pytree_node=False)
    n_active: int = struct.field(pytree_node=False)
    tail_df: float = struct.field(pytree_node=False)


def build(data: ConfigDict, seed: int) -> Synthetic:
    """The distribution that `config.data` describes; everything random in it comes from the seed."""
    d = data.d_model
    k_rows, k_mean, k_sample = jax.random.split(jax.random.key(seed), 3)
    direction = _mean_direction(k_mean, d, data.mean_direction)
    mu = data.gamma * jnp.sqrt(float(d)) * direction
    if data.signal == "gaussian":
        rank = data.rank or d
        rows = jnp.linalg.qr(jax.random.normal(k_rows, (d, rank)))[0].T
        return Synthetic(mu, direction, rows, jnp.zeros(d), jnp.sqrt(d / rank), k_sample, "gaussian", 0, data.tail_df)
    m, s = data.n_true_features, data.n_active
    rows = jax.random.normal(k_rows, (m, d))
    rows /= jnp.linalg.norm(rows, axis=1, keepdims=True)
    # s of m features, uniformly, without replacement; amplitudes uniform on [0.5, 1.5]: mean 1, second moment 13/12.
    both = s * (s - 1) / (m * (m - 1))  # chance that two given features are active together
    row_sum = rows.sum(axis=0)
    mean = row_sum * (s / m)
    second = both * (row_sum @ row_sum - m) + s * 13 / 12  # E‖Σ‖²: the m unit rows paired with each other, and alone
    return Synthetic(mu, direction, rows, mean, jnp.sqrt(d / (second - mean @ mean)), k_sample, "sparse", s, 0.0)


def sample(
    spec: Synthetic, split: int | Int[Array, ""], step: int | Int[Array, ""], rows: Int[Array, "B"]
) -> Float[Array, "B d"]:
    """Rows number `rows` of global batch `step` of a split (a value of `SPLITS`)."""
    key = jax.random.fold_in(jax.random.fold_in(spec.key, split), step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    draw = _draw_sparse if spec.signal == "sparse" else _draw_gaussian
    return spec.mu + spec.scale * (draw(spec, keys) - spec.signal_mean)


def _mean_direction(key: PRNGKeyArray, d: int, name: str) -> Float[Array, "d"]:
    """Unit direction of mu: one dimension, a few (equal shares), or spread over all (random normal)."""
    if name == "spread":
        u = jax.random.normal(key, (d,))
        return u / jnp.linalg.norm(u)
    width = 1 if name == "one" else min(N_FEW, d)
    return jnp.zeros(d).at[:width].set(width**-0.5)


def _draw_sparse(spec: Synthetic, keys: Key[Array, "B"]) -> Float[Array, "B d"]:
    m, s = spec.rows.shape[0], spec.n_active

    def one(key: PRNGKeyArray) -> tuple[Array, Array]:
        draws = jax.random.uniform(key, (m + s,), minval=0.0, maxval=1.0)
        return draws[:m], draws[m:]

    order, amplitude = jax.vmap(one)(keys)
    _, active = jax.lax.top_k(order, s)  # the s largest of m uniforms: a uniform choice without replacement
    return topk.decode(Kept(amplitude + 0.5, active), spec.rows)


def _draw_gaussian(spec: Synthetic, keys: Key[Array, "B"]) -> Float[Array, "B d"]:
    """Normal in the span of the basis; with tail_df > 2, multivariate Student-t of the same covariance."""
    rank = spec.rows.shape[0]
    pair = jax.vmap(jax.random.split)(keys)
    signal = jax.vmap(lambda key: jax.random.normal(key, (rank,)))(pair[:, 0])
    if spec.tail_df:
        half = spec.tail_df / 2
        chi2 = 2 * jax.vmap(lambda key: jax.random.gamma(key, half))(pair[:, 1])
        signal *= jnp.sqrt((spec.tail_df - 2) / chi2)[:, None]
    return signal @ spec.rows
