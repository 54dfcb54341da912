"""The features of tokens: any SAE and activations in, what is kept of each token and x̂ out, some rows at a time.

Preprocessing is applied and undone here. Its affine part is folded into the weights. A norm of each token is undone by
x = offset + size · norm(x), so that features and x̂ come in the units of x; a transcoder's come in those of its target.
"""

from collections.abc import Iterator
from functools import partial
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax.autoencoder import topk
from sae_jax.autoencoder.kept import Kept, largest
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused
from sae_jax.exchange import encoders, sharing
from sae_jax.exchange.encoders import Acts, Encoder, Opened
from sae_jax.exchange.formats import Packed
from sae_jax.models.sources import open_tokens
from sae_jax.runtime import progress

ROWS, ENTRIES = 4096, 2**26  # tokens at a time, and most pre-activations of them: 256 MB


def features(
    sae: str | PathLike[str] | SAE | Packed | Opened, activations: Float[Array | np.ndarray, "N d"] | str, *,
    member: str | None = None,
) -> Kept:  # fmt: skip
    """Which features fire on each token, and how strongly.

        values, indices = sae_jax.features("runs/mine", x, member="centred")     # x of shape (tokens, d_model)

    Args:
      sae: what `load` takes (a run, a folder or file of any library, hf://…, saelens:…) or returns, or an SAE.
      activations: an array, in memory or mapped, or a file or dataset as for `diagnose`; as they are: scaling, norm,
        centring and whitening of the SAE are applied here.
      member: which SAE of a run that trained several.

    Returns:
      NumPy arrays: `values` (tokens, k) float32, largest first, 0 where fewer than k features fire, and `indices`
      (tokens, k) int32. A value is in the units of the activations: it is what x̂ has of that feature's decoder row (of
      that row at unit length, where an SAE of SAELens rescales by it).

      Where the number that fires varies from token to token (BatchTopK as a threshold, JumpReLU, ReLU, gated), k is
      the most that fire on any of these tokens. Where values may be negative (AbsTopK), the largest in absolute value
      are first.

    Raises:
      Refused: the SAE or the activations cannot be read, their widths differ, or a value is not finite.
    """
    parts = [Kept(*(np.asarray(a)[:n] for a in codes)) for n, codes, _ in _streamed(sae, activations, member, False)]
    width = max(part.values.shape[1] for part in parts)
    padded = [[np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in part] for part in parts]
    values, indices = (np.concatenate(column) for column in zip(*padded, strict=True))
    return Kept(values, indices)


def reconstruct(
    sae: str | PathLike[str] | SAE | Packed | Opened, activations: Float[Array | np.ndarray, "N d"] | str, *,
    member: str | None = None,
) -> Float[np.ndarray, "N d"]:  # fmt: skip
    """x̂ of each token, (tokens, d_model) float32, in the units of the activations; arguments as for `features`.

    x_hat = sae_jax.reconstruct("runs/mine", x, member="centred")

    Of a transcoder it is what it makes of its target, (tokens, d_out), its skip connection counted.
    """
    return np.concatenate([np.asarray(x_hat)[:n] for n, _, x_hat in _streamed(sae, activations, member, True)])


def _streamed(
    sae: str | PathLike[str] | SAE | Packed | Opened, activations: Array | np.ndarray | str, member: str | None,
    whole: bool,
) -> Iterator[tuple[int, Kept, Array | None]]:  # fmt: skip
    """For some rows at a time: how many, what is kept of them, and x̂ if asked for; padded to one shape."""
    encoder = jax.tree.map(jnp.asarray, sharing.opened(sae, member).encoder)
    n_features, d_model = encoder.W_enc.shape
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
            acts, x_hat = _of_rows(encoder, padded, whole)
            yield len(x), Kept(None, None) if whole else _kept(acts, len(x)), x_hat
            done += len(x)


@partial(jax.jit, static_argnames="whole")
def _of_rows(encoder: Encoder, x: Float[Array, "B d"], whole: bool) -> tuple[Acts, Array | None]:
    kept, dense = encoders.selected(encoder, x)
    offset, size = encoders.undone(x, "none" if encoder.transcodes else encoder.norm)
    if whole:
        with topk.exact():
            x_hat = encoders.decode(encoder, Acts(kept, dense), x, encoder.b_dec)
        return Acts(None, None), offset + size * x_hat
    if kept is None:
        assert dense is not None
        return Acts(None, dense * size), None
    if encoder.rule == "groupmax":  # which come in the order of the groups
        values, order = largest(kept.values, kept.values.shape[1])
        kept = Kept(values, jnp.take_along_axis(kept.indices, order, axis=1))
    return Acts(Kept(kept.values * size, kept.indices), None), None


def _kept(acts: Acts, n_tokens: int) -> Kept:
    """What fires of dense activations, as many columns as any of the first tokens needs."""
    if acts.kept is not None:
        return acts.kept
    assert acts.dense is not None
    width = int(_most(acts.dense[:n_tokens]))
    shape = min(1 << max(width - 1, 0).bit_length(), acts.dense.shape[1])  # one of a few
    return Kept(*(np.asarray(a)[:, :width] for a in _largest(acts.dense, shape)))


_largest = jax.jit(largest, static_argnums=1)


@jax.jit
def _most(dense: Float[Array, "B n"]) -> Array:
    return (dense > 0).sum(axis=1).max()
