"""Recovery of known ground-truth features and of annotated concepts, and how often features fire.

Cosines are of unit rows; an untrained dictionary is not at 0: with n = 1024 random rows in d = 64 MMCS is about 0.39.
Nor is it for concepts: the best of many random features scores too, so an untrained SAE belongs beside every count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse import csr_array

BLOCK = 1024  # true features looked at together
THRESHOLDS = (0.0, 0.15, 0.5, 0.6, 0.8)  # InterPLM's, of a feature's largest value
Rows = Array | np.ndarray


def cosines(truth: Float[Rows, "m d"], learned: Float[Rows, "n d"]) -> Float[Array, "m n"]:
    """Cosine similarity of every true feature with every learned row."""
    unit_truth = truth / jnp.linalg.norm(truth, axis=1, keepdims=True)
    unit_learned = learned / jnp.linalg.norm(learned, axis=1, keepdims=True)
    return jnp.matmul(unit_truth, unit_learned.T, precision=jax.lax.Precision.HIGHEST)


def mmcs(
    truth: Float[Rows, "m d"], learned: Float[Rows, "n d"], alive: Bool[Rows, "n"] | None = None
) -> Float[Array, ""]:
    """Mean over the true features of the largest cosine similarity to any learned row, or any live one.

    The reading of Simon, Adams and Zou (arXiv:2605.31518). Sign counts: a flipped feature is not recovered. Where no
    row is alive nothing is recovered: 0.
    """

    def best(row: Array) -> Array:
        found = cosines(row[None], learned)[0]
        return (found if alive is None else jnp.where(alive, found, -1.0)).max()

    mean = jax.lax.map(best, truth, batch_size=BLOCK).mean()  # all cosines at once may be more than the SAE
    return mean if alive is None else jnp.where(alive.any(), mean, 0.0)


def mcc(truth: Float[Rows, "m d"], learned: Float[Rows, "n d"]) -> float:
    """Mean |cosine| under the best one-to-one assignment of rows to true features (Hungarian).

    A learned row counts once, so one row between two features or two rows on one feature earn less than in MMCS. True
    features that outnumber the rows count as 0.
    """
    from scipy.optimize import linear_sum_assignment  # half a second, where true features are known

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


# -- concepts ----------------------------------------------------------------------------------------------------------


def concept_f1(
    values: Float[np.ndarray, "N k"], indices: Int[np.ndarray, "N k"], largest: Float[np.ndarray, "n"],
    instances: Int[np.ndarray, "N C"],
) -> Float[np.ndarray, "T n C"]:  # fmt: skip
    """F1 of every feature as a detector of every concept: on where z > threshold · largest, for all `THRESHOLDS`.

    The protocol of InterPLM (Simon and Zou, Nature Methods 2025). Precision counts tokens: the share of those where the
    feature is on that carry the concept. Recall counts instances: the share that have the feature on somewhere. Where a
    concept is of single tokens, each is an instance of its own. 0 where a feature is never on, as if it is dead.

    Args:
      values, indices: what is kept of each token, as `encode` gives it.
      largest: each feature's largest value on tokens that are not those scored last; 0 where it is dead.
      instances: −1 where a token does not carry a concept, else the number of the instance, its own in the column.
    """
    n, (n_tokens, n_concepts) = len(largest), instances.shape
    token, concept = np.nonzero(instances >= 0)
    labels, which = np.unique(np.stack([concept, instances[token, concept]]), axis=1, return_inverse=True)
    which, ones = which.ravel(), np.ones(len(token))
    carried = csr_array((ones, (token, concept)), (n_tokens, n_concepts))
    parts = csr_array((ones, (token, which)), (n_tokens, labels.shape[1]))
    number = np.arange(labels.shape[1])
    of_concept = csr_array((np.ones(len(number)), (labels[0], number)), (n_concepts, len(number)))
    n_instances = np.bincount(labels[0], minlength=n_concepts)
    scale = largest[indices]
    relative = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    scores = np.zeros((len(THRESHOLDS), n, n_concepts))
    for score, threshold in zip(scores, THRESHOLDS, strict=True):
        row, column = np.nonzero(relative > threshold)
        on = csr_array((np.ones(len(row)), (indices[row, column], row)), (n, n_tokens))
        precision = (on @ carried).toarray() / np.maximum(on.sum(axis=1), 1)[:, None]
        hit = (on @ parts > 0).astype(float)
        recall = (of_concept @ hit.T).T.toarray() / np.maximum(n_instances, 1)
        np.divide(2 * precision * recall, precision + recall, out=score, where=precision + recall > 0)
    return scores


class Concepts(NamedTuple):
    """For each concept the detector that validation tokens pick, and what it is worth on others."""

    feature: Int[np.ndarray, "C"]
    threshold: Float[np.ndarray, "C"]
    validation: Float[np.ndarray, "C"]  # F1 that it was picked by: the largest of many, so too good
    test: Float[np.ndarray, "C"]  # F1 of the same feature at the same threshold


def best_detectors(validation: Float[np.ndarray, "T n C"], test: Float[np.ndarray, "T n C"]) -> Concepts:
    """Feature and threshold of the largest F1 on validation tokens; the test has no part in the choice."""
    shape = validation.shape[:2]
    at, feature = np.unravel_index(validation.reshape(-1, validation.shape[2]).argmax(axis=0), shape)
    concept = np.arange(validation.shape[2])
    return Concepts(
        feature, np.asarray(THRESHOLDS)[at], validation[at, feature, concept], test[at, feature, concept]
    )
