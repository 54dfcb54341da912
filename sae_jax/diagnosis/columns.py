"""What is known of every feature of an SAE, as the columns of a table: features.csv and the page's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae_jax.autoencoder import topk
from sae_jax.exchange.encoders import Opened

BLOCK = 1024  # rows whose cosines with all others are looked at together


def nearest_twins(rows: Float[np.ndarray, "n d"]) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """For each row the other row of the largest cosine with it, the first where there are several; −1 and 0 of one."""
    n = len(rows)
    if n < 2:
        return np.full(n, -1), np.zeros(n)
    norms = np.linalg.norm(np.asarray(rows, np.float64), axis=1, keepdims=True)
    units = jnp.asarray(rows / np.where(norms > 0, norms, 1), jnp.float32)
    starts = [min(start, max(n - BLOCK, 0)) for start in range(0, n, BLOCK)]  # the last block overlaps: one shape
    index, cosine = np.zeros(n, np.int64), np.zeros(n)
    for start in starts:
        found = jax.device_get(_nearest(units, start, min(BLOCK, n)))
        index[start : start + BLOCK], cosine[start : start + BLOCK] = found
    return index, cosine


@partial(jax.jit, static_argnums=2)
def _nearest(units: Float[Array, "n d"], start: Int[Array, ""], block: int) -> tuple[Array, Array]:
    with topk.exact():
        some = jax.lax.dynamic_slice_in_dim(units, start, block)
        cosines = some @ units.T
    itself = jnp.arange(len(units)) == start + jnp.arange(block)[:, None]
    cosines = jnp.where(itself, -jnp.inf, cosines)
    return cosines.argmax(axis=1), cosines.max(axis=1)


def of(opened: Opened, here: Any, revived: np.ndarray, cosines: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Column → value of each feature; `here` is the autopsy's look at the SAE as it is.

    `distance_to_threshold` is the largest margin (`sightings.py`): what a dead feature lacked where it came nearest to
    firing, below 0, and how far the others rise above their bar. The twin is of decoder rows.
    """
    encoder, silent = opened.encoder, opened.tokens_since_fired
    twin, twin_cosine = nearest_twins(encoder.W_dec)
    return {
        "fate": here.fates, "n_fired": here.n_fired, "cosine_with_mean": cosines,
        "mean_preactivation": here.shift.mean / scale, "std_preactivation": here.shift.std / scale,
        "largest_activation": here.largest / scale, "decoder_norm": np.linalg.norm(encoder.W_dec, axis=1),
        "revived_if_centred": revived, "frequency": here.n_fired / here.shift.n_tokens,
        "distance_to_threshold": here.margin / scale, "nearest_twin": twin, "twin_cosine": twin_cosine,
        **({} if silent is None else {"tokens_since_fired": silent}),
    }  # fmt: skip
