"""How far a layer's mean stands out from its variation: streaming moments, gamma, the geometric median.

gamma = ‖mu‖ / ‖sigma‖ (Simon, Adams and Zou, arXiv:2605.31518). It is reported in three forms, because a feature's
fate depends on the direction of a token only:

    gamma_raw        of x as it is
    gamma            after a per-token LayerNorm (no affine, eps 1e-5): the paper's number
    gamma_direction  of x / ‖x‖
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

LAYER_NORM_EPS = 1e-5
OUTLIER = 3.0  # a dimension stands out where its mean is this many of its standard deviations from zero


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, per dimension, of powers of the deviation from the mean; float64, mergeable in any order.

    The last three are there only where the covariance was asked for: what a diagnosis looks at and training does not.
    """

    n_tokens: int
    mean: np.ndarray  # (d,)
    square: np.ndarray  # (d,): Σ (x − mean)²
    cube: np.ndarray | None = None  # (d,): Σ (x − mean)³
    fourth: np.ndarray | None = None  # (d,): Σ (x − mean)⁴
    scatter: np.ndarray | None = None  # (d, d): Σ (x − mean)(x − mean)ᵀ

    @property
    def sigma(self) -> np.ndarray:
        """(d,) standard deviations, ddof 0."""
        return np.sqrt(self.square / self.n_tokens)

    @property
    def gamma(self) -> float:
        """‖mu‖ / ‖sigma‖; infinite where nothing varies."""
        spread = float(np.linalg.norm(self.sigma))
        return float(np.linalg.norm(self.mean)) / spread if spread > 0 else float("inf")

    @property
    def kurtosis(self) -> np.ndarray:
        """(d,) excess kurtosis: 0 for a normal dimension, nan for a constant one."""
        if self.fourth is None:
            raise ValueError("moments were taken without the covariance")
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.n_tokens * self.fourth / self.square**2 - 3

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), ddof 0. Raises ValueError where it was not asked for."""
        if self.scatter is None:
            raise ValueError("moments were taken without the covariance")
        return self.scatter / self.n_tokens

    @cached_property
    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues (d,) of the covariance, largest first, and its eigenvectors as rows (d, d)."""
        values, vectors = np.linalg.eigh(self.covariance)
        return np.maximum(values[::-1], 0), vectors.T[::-1]

    @cached_property
    def eigenvalues(self) -> np.ndarray:
        """(d,) eigenvalues of the covariance, largest first."""
        return np.maximum(np.linalg.eigvalsh(self.covariance)[::-1], 0)

    @property
    def axis(self) -> np.ndarray:
        """(d,) direction of the mean; the first coordinate where the mean is zero."""
        length = np.linalg.norm(self.mean)
        return self.mean / length if length > 0 else np.eye(len(self.mean))[0]

    @cached_property
    def across_mean(self) -> np.ndarray:
        """(d − 1,) eigenvalues of the covariance perpendicular to the mean, largest first."""
        turned, axis = self.covariance @ self.axis, self.axis
        mixed = np.outer(axis, turned)
        across = self.covariance - mixed - mixed.T + (axis @ turned) * np.outer(axis, axis)
        return np.maximum(np.linalg.eigvalsh(across)[:0:-1], 0)

    @property
    def outlier_dimensions(self) -> np.ndarray:
        """Dimensions with |mu_j| ≥ 3 sigma_j, the largest share of ‖mu‖² first."""
        standing = np.flatnonzero(np.abs(self.mean) >= OUTLIER * self.sigma)
        return standing[np.argsort(-np.abs(self.mean[standing]), kind="stable")]


def standing_out(normed: Moments, most: int = 50) -> list[dict[str, Any]]:
    """The outlier dimensions of layer-normed activations, with |mean|/sigma and their share of ‖mu‖²."""
    share = normed.mean**2 / max(float(normed.mean @ normed.mean), np.finfo(np.float64).tiny)
    return [
        {
            "dimension": int(j),
            "mean_over_sigma": float(abs(normed.mean[j]) / normed.sigma[j]) if normed.sigma[j] > 0 else None,
            "share_of_mean_square": float(share[j]),
        }
        for j in normed.outlier_dimensions[:most]
    ]


def effective_rank(eigenvalues: Float[np.ndarray, "d"]) -> float:
    """exp of the entropy of the normalised eigenvalues: 1 to d. Source: the paper; Roy and Vetterli 2007.

    1 where nothing varies.
    """
    if not eigenvalues.sum() > 0:
        return 1.0
    share = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def moments(x: Float[np.ndarray, "N d"], covariance: bool = False) -> Moments:
    """Moments of one batch, by two passes over it in float64."""
    x64 = np.asarray(x, np.float64)
    mean = x64.mean(axis=0)
    delta = x64 - mean
    if not covariance:
        return Moments(len(x64), mean, np.einsum("nd,nd->d", delta, delta))
    square = delta * delta
    return Moments(
        len(x64),
        mean,
        square.sum(axis=0),
        np.einsum("nd,nd->d", square, delta),
        np.einsum("nd,nd->d", square, square),
        delta.T @ delta,
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both together (Chan, Golub and LeVeque 1983; third and fourth: Pébay 2008)."""
    na, nb = a.n_tokens, b.n_tokens
    if not (na and nb):  # a host may have no rows
        return a if na else b
    n = na + nb
    delta = b.mean - a.mean
    mean, square = a.mean + delta * (nb / n), a.square + b.square + delta**2 * (na * nb / n)
    if a.cube is None or a.fourth is None or a.scatter is None:
        return Moments(n, mean, square)
    if b.cube is None or b.fourth is None or b.scatter is None:
        return Moments(n, mean, square)
    return Moments(
        n,
        mean,
        square,
        a.cube + b.cube + delta**3 * (na * nb * (na - nb) / n**2) + 3 * delta * (na * b.square - nb * a.square) / n,
        a.fourth + b.fourth + delta**4 * (na * nb * (na**2 - na * nb + nb**2) / n**3)
        + 6 * delta**2 * (na**2 * b.square + nb**2 * a.square) / n**2
        + 4 * delta * (na * b.cube - nb * a.cube) / n,
        a.scatter + b.scatter + np.outer(delta, delta) * (na * nb / n),
    )  # fmt: skip


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


def severity(
    batches: Iterable[Float[np.ndarray, "_ d"]], covariance: bool = False, of_directions: bool = True
) -> Severity:
    """One pass over the batches, with covariances if wanted, that `of_directions` if that is wanted too.

    Raises ValueError where there are no batches.
    """
    total: Severity | None = None
    for x in batches:
        x64 = np.asarray(x, np.float64)
        part = Severity(
            moments(x64, covariance), moments(layer_norm(x64), covariance),
            moments(direction(x64), covariance and of_directions),
        )  # fmt: skip
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

    Tokens on which an iterate lies pull it back as Vardi and Zhang (2000) show, so that it leaves them if it should.

    Args:
      batches: makes a fresh iterator over the tokens; called once an iteration, so nothing needs to fit in memory.
      start: where to begin (the mean).
      tolerance: stop when a step is shorter than this times the mean distance. The iteration converges linearly, so
        what is left to go is a small multiple of that.
      max_iterations: stop here at the latest.
    """
    centre = np.asarray(start, np.float64)
    for _ in range(max_iterations):
        weighted, weights, distances, count, here = np.zeros_like(centre), 0.0, 0.0, 0, 0
        for x in batches():
            delta = np.asarray(x, np.float64) - centre
            distance = np.sqrt(np.einsum("nd,nd->n", delta, delta))
            apart = distance > 0
            weight = np.where(apart, 1 / np.where(apart, distance, 1), 0)
            weighted += weight @ delta
            weights, distances, count = weights + weight.sum(), distances + distance.sum(), count + len(x)
            here += int(len(x) - apart.sum())
        pull = float(np.linalg.norm(weighted))
        if not pull > here:
            break  # this point is the median
        step = (1 - here / pull) * weighted / weights
        centre = centre + step
        if np.linalg.norm(step) <= tolerance * distances / count:
            break
    return centre
