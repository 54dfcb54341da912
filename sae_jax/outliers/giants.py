"""Tokens of giant norm, as attention sinks are: a few of them make the mean, the spectrum and the FVE of a whole layer.

First tokens reach 100 times the norm of the others (Sun et al., arXiv:2402.17762). What is said of all tokens is then
said of those few, so it is said without them as well.
"""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.moments import Severity

GIANT = 10.0  # a token is a giant where its norm is more than this many times the median norm
MOST = 2**22  # norms kept for the median: all of them, or, of more tokens, a random choice


class Sample:
    """A random choice of rows of a stream, all of them as long as they are few; the same whatever the batches.

    Evenly spaced rows would not do: where the spacing is a multiple of the context all of them are first tokens.
    """

    def __init__(self, most: int):
        self._most, self._share = most, 1.0
        self._rng = np.random.default_rng(0)
        self._rows: list[np.ndarray] = []
        self._draws: list[np.ndarray] = []
        self._held = 0

    def add(self, x: np.ndarray) -> None:
        """Rows (N, …) to choose from."""
        draw = self._rng.random(len(x))
        taken = draw < self._share
        if self._rows and not taken.any():
            return
        self._rows.append(x[taken].astype(np.float32))
        self._draws.append(draw[taken])
        self._held += len(self._draws[-1])
        while self._held > self._most:
            self._share /= 2
            keep = [draws < self._share for draws in self._draws]
            self._rows = [np.concatenate([rows[k] for rows, k in zip(self._rows, keep, strict=True)])]
            self._draws = [np.concatenate([draws[k] for draws, k in zip(self._draws, keep, strict=True)])]
            self._held = len(self._draws[0])

    @property
    def rows(self) -> np.ndarray:
        """Those chosen so far, in order."""
        return np.concatenate(self._rows)


def norms(x: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N"]:
    """Euclidean norm of each token, by sums in float64."""
    return np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))


def giant_norm(norms: Float[np.ndarray, "N"], multiple: float = GIANT) -> float:
    """The norm above which a token is a giant, from the norms of tokens; zeros are padding and do not count."""
    there = norms[norms > 0]
    return multiple * float(np.median(there)) if len(there) else float("inf")


def without(
    batches: Callable[[], Iterable[Float[np.ndarray, "_ d"]]], most: float, covariance: bool = False
) -> Severity:
    """Moments of the tokens whose norm is at most `most`: one more pass."""
    return moments_lib.severity((x[norms(x) <= most] for x in batches()), covariance)
