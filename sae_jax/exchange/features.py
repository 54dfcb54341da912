"""The features of tokens: any SAE and activations in, what is kept of each token and x̂ out, some rows at a time.

Preprocessing is applied and undone here. Its affine part is folded into the weights. A norm of each token is undone by
x = offset + size · norm(x), so that features and x̂ come in the units of x.
"""

from collections.abc import Iterator
from functools import partial
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.kept import Kept
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import formats, sharing
from sae_jax.exchange.formats import Packed
from sae_jax.models.sources import open_tokens
from sae_jax.outliers.moments import LAYER_NORM_EPS
from sae_jax.outliers.preprocess import per_token
from sae_jax.runtime import progress

ROWS, ENTRIES = 4096, 2**26  # tokens at a time, and most pre-activations of them: 256 MB


def features(
    sae: str | PathLike[str] | SAE | Packed, activations: Float[Array | np.ndarray, "N d"] | str, *,
    member: str | None = None,
) -> Kept:  # fmt: skip
    """Which features fire on each token, and how strongly.

        values, indices = sae_jax.features("runs/mine", x, member="centred")     # x of shape (tokens, d_model)

    Args:
      sae: what `load` takes (a run, a folder of another library's format, hf://…) or returns, or an SAE.
      activations: an array, in memory or mapped, or a file or dataset as for `diagnose`; as they are: scaling, norm,
        centring and whitening of the SAE are applied here.
      member: which SAE of a run that trained several.

    Returns:
      NumPy arrays: `values` (tokens, k) float32, largest first, 0 where fewer than k features fire, and `indices`
      (tokens, k) int32. A value is in the units of the activations: it is what x̂ has of that feature's decoder row.

    Raises:
      Refused: the SAE or the activations cannot be read, their widths differ, or a value is not finite.
    """
    parts = [Kept(*(np.asarray(a)[:n] for a in codes)) for n, codes, _ in _streamed(sae, activations, member, False)]
    values, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Kept(values, indices)


def reconstruct(
    sae: str | PathLike[str] | SAE | Packed, activations: Float[Array | np.ndarray, "N d"] | str, *,
    member: str | None = None,
) -> Float[np.ndarray, "N d"]:  # fmt: skip
    """x̂ of each token, (tokens, d_model) float32, in the units of the activations; arguments as for `features`.

    x_hat = sae_jax.reconstruct("runs/mine", x, member="centred")
    """
    return np.concatenate([np.asarray(x_hat)[:n] for n, _, x_hat in _streamed(sae, activations, member, True)])


def _streamed(
    sae: str | PathLike[str] | SAE | Packed, activations: Array | np.ndarray | str, member: str | None, whole: bool
) -> Iterator[tuple[int, Kept, Array | None]]:
    """For some rows at a time: how many, what is kept of them, and x̂ if asked for; padded to one shape."""
    packed = sharing.packed_of(sae, member)
    arrays = jax.tree.map(jnp.asarray, formats.folded(packed))
    n_features, d_model = arrays.W_enc.shape
    tokens = open_tokens(activations if isinstance(activations, str) else np.asarray(activations))
    if tokens.d_model != d_model:
        raise Refused("activations", (tokens.d_model,), f"activations of the SAE's width {d_model}")
    most, done = max(16, min(ROWS, ENTRIES // n_features)), 0
    for batch in progress.counted(tokens.batches(), "features"):
        for start in range(0, len(batch), most):
            x = np.asarray(batch[start : start + most], np.float32)
            if not np.isfinite(x).all():
                row = done + int(np.argmin(np.isfinite(x).all(axis=1)))
                raise Refused("activations", f"row {row}", "finite numbers")
            shape = 1 << (len(x) - 1).bit_length()  # of the last rows; one of a few shapes, each compiled once
            padded = np.pad(x, ((0, min(shape, most) - len(x)), (0, 0)))
            yield len(x), *_of_rows(arrays, padded, packed.before.norm, whole)
            done += len(x)


@partial(jax.jit, static_argnames=("norm", "whole"))
def _of_rows(sae: SAE, x: Float[Array, "B d"], norm: str, whole: bool) -> tuple[Kept, Array | None]:
    codes = sae_lib.encode(sae, per_token(x, norm))
    offset, size = _taken(x, norm)
    x_hat = offset + size * sae_lib.decode(sae, codes) if whole else None
    return Kept(codes.values * size, codes.indices), x_hat


def _taken(x: Float[Array, "B d"], norm: str) -> tuple[Array, Array]:
    """What `per_token` takes from each token: x = offset + size · norm(x). Both (B, 1)."""
    if norm in ("layer_norm", "layer_norm_unit"):
        mean = x.mean(axis=1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean((x - mean) ** 2, axis=1, keepdims=True) + LAYER_NORM_EPS)
        return mean, deviation if norm == "layer_norm" else deviation * np.sqrt(x.shape[1])
    zero = jnp.zeros_like(x[:, :1])
    return zero, jnp.linalg.norm(x, axis=1, keepdims=True) if norm == "unit" else zero + 1
