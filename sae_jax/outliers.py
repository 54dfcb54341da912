"""How far a layer's mean stands out from its variation: streaming moments, gamma, the geometric median.

gamma = ‖mu‖ / ‖sigma‖ (Simon, Adams and Zou, arXiv:2605.31518). It is reported in three forms, because a feature's
fate depends on the direction of a token only:

    gamma_raw        of x as it is
    gamma            after a per-token LayerNorm (no affine, eps 1e-5): the paper's number
    gamma_direction  of x / ‖x‖
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LAYER_NORM_EPS = 1e-5


class Moments(NamedTuple):
    """Count, mean and summed squared deviations per dimension; float64, mergeable in any order."""

    n_tokens: int
    mean: np.ndarray  # (d,)
    square: np.ndarray  # (d,): Σ (x − mean)²

    @property
    def sigma(self) -> np.ndarray:
        """(d,) standard deviations, ddof 0."""
        return np.sqrt(self.square / self.n_tokens)

    @property
    def gamma(self) -> float:
        """‖mu‖ / ‖sigma‖; infinite where nothing varies."""
        spread = float(np.linalg.norm(self.sigma))
        return float(np.linalg.norm(self.mean)) / spread if spread > 0 else float("inf")


def moments(x: Float[np.ndarray, "N d"]) -> Moments:
    """Moments of one batch, by two passes over it in float64."""
    x64 = np.asarray(x, np.float64)
    mean = x64.mean(axis=0)
    return Moments(len(x64), mean, np.square(x64 - mean).sum(axis=0))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both together (Chan, Golub and LeVeque 1983)."""
    n_tokens = a.n_tokens + b.n_tokens
    delta = b.mean - a.mean
    return Moments(
        n_tokens,
        a.mean + delta * (b.n_tokens / n_tokens),
        a.square + b.square + delta**2 * (a.n_tokens * b.n_tokens / n_tokens),
    )


def layer_norm(x: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N d"]:
    """Per-token LayerNorm without affine: (x − mean_j x) / √(var_j x + eps)."""
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + LAYER_NORM_EPS)


def direction(x: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N d"]:
    """x / ‖x‖; a token that is zero stays zero."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


class Severity(NamedTuple):
    """Moments of a stream of activations as they are, after LayerNorm, and as directions."""

    raw: Moments
    layer_normed: Moments
    directions: Moments

    def gammas(self) -> dict[str, float]:
        """The three numbers under the names that reports use."""
        return {
            "gamma": self.layer_normed.gamma,
            "gamma_raw": self.raw.gamma,
            "gamma_direction": self.directions.gamma,
        }


def severity(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Severity:
    """One pass over the batches. Raises ValueError where there are none."""
    total: Severity | None = None
    for x in batches:
        x64 = np.asarray(x, np.float64)
        part = Severity(moments(x64), moments(layer_norm(x64)), moments(direction(x64)))
        total = part if total is None else Severity(*map(merge, total, part))
    if total is None:
        raise ValueError("no activations to take moments of")
    return total


def geometric_median(
    batches: Callable[[], Iterable[Float[np.ndarray, "_ d"]]],
    start: Float[np.ndarray, "d"],
    tolerance: float = 1e-4,
    max_iterations: int = 100,
) -> Float[np.ndarray, "d"]:
    """The point with the least mean Euclidean distance to all tokens, by Weiszfeld's iteration.

    Args:
      batches: makes a fresh iterator over the tokens; called once an iteration, so nothing needs to fit in memory.
      start: where to begin (the mean).
      tolerance: stop when a step is shorter than this times the mean distance.
      max_iterations: stop here at the latest.
    """
    centre = np.asarray(start, np.float64)
    for _ in range(max_iterations):
        weighted, weights, distances, count = np.zeros_like(centre), 0.0, 0.0, 0
        for x in batches():
            delta = np.asarray(x, np.float64) - centre
            distance = np.sqrt(np.einsum("nd,nd->n", delta, delta))
            weight = 1 / np.maximum(distance, np.finfo(np.float32).tiny)
            weighted += weight @ delta
            weights, distances, count = weights + weight.sum(), distances + distance.sum(), count + len(x)
        step = weighted / weights
        centre = centre + step
        if np.linalg.norm(step) <= tolerance * distances / count:
            break
    return centre
