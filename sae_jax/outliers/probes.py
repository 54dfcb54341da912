"""Feature death at initialisation forecast by probes: a few hundred random rows sent past all tokens.

A feature's fate, with zero biases, hangs on M = max over tokens of √d·cos(w, x) alone: dead for (n, k) where M is under
the threshold that k/n of all directions pass, dead by ReLU where M ≤ 0. Nothing is assumed of the data; n must not be
tiny (for small k the k-th largest of n jitters about its expectation). One pass serves every k/n at once.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from sae_jax.outliers.theory import Deaths, alignment_threshold, along_axis


class Band(NamedTuple):
    """A forecast over several k/n with its 95 % confidence band; arrays of equal length."""

    share: np.ndarray  # k/n
    dead: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Forecast(NamedTuple):
    """What probes saw of the tokens."""

    rows: np.ndarray  # (P, d) unit vectors, in the order of their strata
    best: np.ndarray  # (P,) M, the largest √d·cos with any token

    def deaths(self, n_features: int, k: int) -> Deaths:
        """Forecast for one SAE."""
        dead = self._dead(np.array([k / n_features]))[0]
        return {"dead_by_relu": float(np.mean(self.best <= 0)), "dead_total": float(np.mean(dead))}

    def _dead(self, share: Float[np.ndarray, "S"]) -> np.ndarray:
        """(S, P) which probes would be dead."""
        count, d_model = self.rows.shape
        if d_model == 1:
            # Features of one sign have the same pre-activation on every token: k of them are kept, always the same.
            sign = self.rows[:, 0] > 0
            before = np.where(sign, np.cumsum(sign), np.cumsum(~sign)) - 1
            return (self.best <= 0) | (before >= share[:, None] * count)
        return (self.best <= 0) | (self.best < alignment_threshold(share, d_model)[:, None])

    def curve(self, share: Float[np.ndarray, "S"], n_features: int | None = None) -> Band:
        """Death against k/n.

        The band is Wilson's for as many independent rows as would give the variance between neighbouring strata. Where
        that is estimated from few deaths it is drawn towards what independent rows would give. With n_features it is a
        band for the count in one SAE of that size, whose rows are random too.
        """
        dead_probe = self._dead(share)
        count = dead_probe.shape[1]
        dead = dead_probe.mean(axis=1)
        pairs = dead_probe[:, : count // 2 * 2].reshape(len(share), -1, 2)
        differ = np.sum(pairs[..., 0] != pairs[..., 1], axis=1)
        gain = np.maximum((count * dead * (1 - dead) + 4) / (differ + 4), 1)
        n_effective, z = 1 / (1 / (count * gain) + (1 / n_features if n_features else 0)), ndtri(0.975)
        middle = (dead + z**2 / (2 * n_effective)) / (1 + z**2 / n_effective)
        half = z / (1 + z**2 / n_effective) * np.sqrt(dead * (1 - dead) / n_effective + z**2 / (4 * n_effective**2))
        return Band(share, dead, middle - half, middle + half)


def stratified_rows(count: int, mean: Float[np.ndarray, "d"], rng: np.random.Generator) -> Float[np.ndarray, "P d"]:
    """Random unit vectors whose components along `mean` take one value from each of `count` equally likely strata.

    The rest of each is uniform. Fate hangs on the component along mu more than on anything else, so the share that
    dies is known better than from as many independent rows. Rows are in the order of the strata.
    """
    d = len(mean)
    rows = rng.normal(size=(count, d))
    level = (np.arange(count) + rng.uniform(size=count)) / count
    length = np.linalg.norm(mean)
    if d == 1 or not length > 0:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    axis = mean / length
    rows -= np.outer(rows @ axis, axis)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    along = along_axis(level, d) / np.sqrt(d)
    return along[:, None] * axis + np.sqrt(1 - along**2)[:, None] * rows
