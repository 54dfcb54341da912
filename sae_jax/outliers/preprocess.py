"""What may be done to activations before an SAE sees them, and how the affine part folds into the SAE's weights.

    y = matrix · (norm(x) − shift)

`norm` acts on one token at a time: nothing, LayerNorm, or unit length. The rest is affine: centring (shift only),
scaling (a multiple of the identity, kept as a number), PCA whitening (a matrix). Without a `norm` the whole is affine
and costs nothing at inference: `fold` gives the SAE that does on x what the given one does on y.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from sae_jax.autoencoder.sae import SAE
from sae_jax.outliers.moments import LAYER_NORM_EPS, Moments


class Preprocessing(struct.PyTreeNode):
    """y = matrix · (norm(x) − shift) · scale; `matrix` (r, d) or None for the identity.

    norm: none | layer_norm (each token to mean 0, variance 1, so norm √d) | layer_norm_unit (the same over √d) | unit.
    """

    shift: Any  # (d,)
    scale: Any = 1.0  # ()
    matrix: Any = None  # (r, d)
    inverse: Any = None  # (d, r): right inverse of the matrix
    norm: str = struct.field(pytree_node=False, default="none")

    @property
    def width(self) -> int:
        """r, that of y."""
        found: int = (self.shift if self.matrix is None else self.matrix).shape[0]
        return found

    def __call__(self, x: Float[Array, "B d"]) -> Float[Array, "B r"]:
        y = (per_token(x, self.norm) - self.shift) * self.scale
        # Full float32, where a TPU would round its operands to bfloat16.
        return y if self.matrix is None else jnp.matmul(y, self.matrix.T, precision="highest")

    def affine(self, x: Float[np.ndarray, "d"]) -> Float[np.ndarray, "r"]:
        """Where a preprocessing without a norm takes one point, in float64 and without a compiler."""
        shift, scale = np.asarray(self.shift, np.float64), np.asarray(self.scale, np.float64)
        y = (np.float32(x) - shift) * scale
        return y if self.matrix is None else np.asarray(self.matrix, np.float64) @ y

    def invert(self, y: Float[Array, "B r"]) -> Float[Array, "B d"]:
        """From y back to norm(x), and to x where there is no norm. What a rank cut has left out stays at the mean."""
        x = y if self.matrix is None else jnp.matmul(y, self.inverse.T, precision="highest")
        return x / self.scale + self.shift


def per_token(x: Float[Array, "B d"], norm: str) -> Float[Array, "B d"]:
    """The part that looks at each token alone. A token that is zero stays zero."""
    if norm in ("layer_norm", "layer_norm_unit"):
        centred = x - x.mean(axis=1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=1, keepdims=True) + LAYER_NORM_EPS)
        return y if norm == "layer_norm" else y / np.sqrt(x.shape[1])
    if norm == "unit":
        length = jnp.linalg.norm(x, axis=1, keepdims=True)
        return x / jnp.where(length > 0, length, 1)
    return x


ROUNDING = 1e-13  # share of the largest eigenvalue that sums in float64 leave of a direction without variance


def whitening(
    moments: Moments, shrinkage: float = 0.0, rank_cut: float = 1e-6, ordinary: Moments | None = None
) -> Preprocessing:
    """PCA whitening: every direction that is kept gets variance 1.

    Args:
      moments: taken with the covariance.
      shrinkage: share of the mean eigenvalue mixed into every eigenvalue, 0 to 1; tames directions of little variance.
      rank_cut: directions whose variance is under this share of the largest are left out (a near-singular spectrum
        would blow up what is only rounding).
      ordinary: moments of the tokens that are no giants, where there are giants: the largest is taken of these, as one
        direction in which a few tokens are enormous makes all the others look like rounding.
    """
    values, vectors = moments.eigen
    largest = (ordinary or moments).eigenvalues[0]
    kept = values > max(rank_cut * largest, ROUNDING * values[0])
    values, vectors = values[kept], vectors[kept]
    values = (1 - shrinkage) * values + shrinkage * moments.square.mean() / moments.n_tokens
    return Preprocessing(
        shift=jnp.asarray(moments.mean, float),
        matrix=jnp.asarray(vectors / np.sqrt(values)[:, None], float),
        inverse=jnp.asarray((vectors * np.sqrt(values)[:, None]).T, float),
    )


def fold(sae: SAE, before: Preprocessing) -> SAE:
    """The SAE on x that does what `sae` does on before(x), its output mapped back; float32, worked out in float64.

    Decoder rows take up scale and matrix, so they are no longer of unit length. What float32 cannot hold of b_dec (at
    gamma 100 that is a good part of a direction of little variance) goes into b_enc, so features fire as before.

    Raises:
      ValueError: a per-token norm is not affine and cannot be folded.
    """
    if before.norm != "none":
        raise ValueError(f"{before.norm} looks at each token: it is not affine, so it cannot be folded into weights")
    W_enc, b_enc, W_dec, b_dec, shift = (
        np.asarray(a, np.float64) for a in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, before.shift)
    )
    scale = np.asarray(before.scale, np.float64)
    if before.matrix is not None:
        inverse = np.asarray(before.inverse, np.float64)
        W_enc, W_dec, b_dec = W_enc @ np.asarray(before.matrix, np.float64), W_dec @ inverse.T, inverse @ b_dec
    W_enc, W_dec, b_dec = W_enc * scale, W_dec / scale, shift + b_dec / scale
    b_enc = b_enc - W_enc @ (b_dec - b_dec.astype(np.float32))
    folded: SAE = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), sae.replace(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
    )
    return folded
