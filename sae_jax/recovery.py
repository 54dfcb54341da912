"""Recovery of known ground-truth features, and how often features fire.

Cosines are of unit rows; an untrained dictionary is not at 0: with n = 1024 random rows in d = 64 MMCS is about 0.39.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment


def cosines(truth: Float[Array, "m d"], learned: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """Cosine similarity of every true feature with every learned row."""
    unit_truth = truth / jnp.linalg.norm(truth, axis=1, keepdims=True)
    unit_learned = learned / jnp.linalg.norm(learned, axis=1, keepdims=True)
    return jnp.matmul(unit_truth, unit_learned.T, precision=jax.lax.Precision.HIGHEST)


def mmcs(
    truth: Float[Array, "m d"], learned: Float[Array, "n d"], alive: Bool[Array, "n"] | None = None
) -> Float[Array, ""]:
    """Mean over the true features of the largest cosine similarity to any learned row, or any live one.

    The reading of Simon, Adams and Zou (arXiv:2605.31518). Sign counts: a flipped feature is not recovered. Where no
    row is alive nothing is recovered: 0.
    """
    found = cosines(truth, learned)
    if alive is None:
        return found.max(axis=1).mean()
    return jnp.where(alive.any(), jnp.where(alive, found, -1.0).max(axis=1).mean(), 0.0)


def mcc(truth: Float[Array, "m d"], learned: Float[Array, "n d"]) -> float:
    """Mean |cosine| under the best one-to-one assignment of rows to true features (Hungarian).

    A learned row counts once, so one row between two features or two rows on one feature earn less than in MMCS. True
    features that outnumber the rows count as 0.
    """
    found = np.abs(np.asarray(cosines(truth, learned), np.float64))
    return float(found[linear_sum_assignment(found, maximize=True)].sum() / len(truth))


def density_histogram(
    fired: Int[np.ndarray, "n"], n_tokens: int
) -> tuple[Int[np.ndarray, "bins"], Float[np.ndarray, "edges"]]:
    """Features by log10 of the share of tokens on which they fired, in half decades from one token to all.

    Features that never fired are in no bin: they are dead.
    """
    edges = np.arange(np.floor(-2 * np.log10(n_tokens)), 1) / 2
    counts, _ = np.histogram(np.log10(fired[fired > 0] / n_tokens), bins=edges)
    return counts, edges
