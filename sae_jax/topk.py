"""Top-k through `jax.lax.top_k`, the sparse decode, and the pre-activation product with its own gradient.

Notation: batch B, width d (d_model), dictionary size n (n_features), k kept entries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    values, indices = jax.lax.top_k(jax.nn.relu(z_pre), k)
    return values, indices


def decode(
    values: Float[Array, "B k"], indices: Int[Array, "B k"], rows: Float[Array, "n d"]
) -> Float[Array, "B d"]:
    """Σ_j values[:, j] · rows[indices[:, j]].

    Written as scatter and matmul: autodiff then gives one matmul for the rows and one for the values.
    """
    batch, n = values.shape[0], rows.shape[0]
    codes = jnp.zeros((batch, n), values.dtype).at[jnp.arange(batch)[:, None], indices].add(values)
    return codes @ rows
