"""Feature death at initialisation forecast by probes: a few hundred random rows sent past all tokens.

A feature's fate, with zero biases, hangs on M = max over tokens of √d·cos(w, x) alone: dead for (n, k) where M is under
the threshold that k/n of all directions pass, dead by ReLU where M ≤ 0. Nothing is assumed of the data; n must not be
tiny (for small k the k-th largest of n jitters about its expectation). One pass serves every k/n at once. Where another
rule than TopK selects, M is max over tokens of w·x, and the bar is that of `selections.py`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from sae_jax.outliers.selections import COUNTED, Selection, batch_threshold
from sae_jax.outliers.theory import Deaths, alignment_threshold, along_axis


class Band(NamedTuple):
    """A forecast over several k/n with its 95 % confidence band; arrays of equal length."""

    share: np.ndarray  # k/n; the threshold of jumprelu
    dead: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Forecast(NamedTuple):
    """What probes saw of the tokens."""

    rows: np.ndarray  # (P, d) unit vectors, in the order of their strata
    best: np.ndarray  # (P,) M, the largest √d·cos with any token; w·x where the selection is not topk
    selection: Selection = Selection()
    norms: np.ndarray | None = None  # (m,) of tokens, or some of them: where it is batch_topk

    def deaths(self, n_features: int, k: int) -> Deaths:
        """Forecast for one SAE."""
        dead = self._dead(np.array([self.at(n_features, k)]))[0]
        return {"dead_by_relu": float(np.mean(self.best <= 0)), "dead_total": float(np.mean(dead))}

    def at(self, n_features: int, k: int) -> float:
        """Where one SAE stands on the curve: k/n, the threshold of jumprelu, 0 of relu."""
        return k / n_features if self.selection.rule in COUNTED else self.selection.threshold or 0.0

    def bars(self, at: Float[np.ndarray, "S"]) -> np.ndarray:
        """(S,) what M has to pass."""
        d_model = self.rows.shape[1]
        if self.selection.rule == "topk":
            return alignment_threshold(at, d_model)
        if self.norms is not None:
            return batch_threshold(at, self.norms, d_model)
        return at

    def _dead(self, at: Float[np.ndarray, "S"]) -> np.ndarray:
        """(S, P) which probes would be dead."""
        count, d_model = self.rows.shape
        if d_model == 1 and self.selection.rule == "topk":
            # Features of one sign have the same pre-activation on every token: k of them are kept, always the same.
            sign = self.rows[:, 0] > 0
            before = np.where(sign, np.cumsum(sign), np.cumsum(~sign)) - 1
            return (self.best <= 0) | (before >= at[:, None] * count)
        return (self.best <= 0) | (self.best < self.bars(at)[:, None])

    def curve(self, at: Float[np.ndarray, "S"], n_features: int | None = None) -> Band:
        """Death against k/n, or against the threshold where the selection is jumprelu.

        The band is Wilson's for as many independent rows as would give the variance between neighbouring strata. Where
        that is estimated from few deaths it is drawn towards what independent rows would give. With n_features it is a
        band for the count in one SAE of that size, whose rows are random too.
        """
        dead_probe = self._dead(at)
        count = dead_probe.shape[1]
        dead = dead_probe.mean(axis=1)
        pairs = dead_probe[:, : count // 2 * 2].reshape(len(at), -1, 2)
        differ = np.sum(pairs[..., 0] != pairs[..., 1], axis=1)
        gain = np.maximum((count * dead * (1 - dead) + 4) / (differ + 4), 1)
        n_effective, z = 1 / (1 / (count * gain) + (1 / n_features if n_features else 0)), ndtri(0.975)
        middle = (dead + z**2 / (2 * n_effective)) / (1 + z**2 / n_effective)
        half = z / (1 + z**2 / n_effective) * np.sqrt(dead * (1 - dead) / n_effective + z**2 / (4 * n_effective**2))
        return Band(at, dead, middle - half, middle + half)


def places(selection: Selection, n_features: int, k: int) -> Float[np.ndarray, "S"]:
    """Where to draw the death curve: at k/n four an octave from 1/n to 1/2, and the one asked about, or at thresholds
    about the one of jumprelu."""
    if selection.rule not in COUNTED:
        return selection.threshold * 2 ** (np.arange(-16, 17) / 4) if selection.threshold else np.zeros(1)
    steps = np.arange(0, 4 * np.log2(max(n_features, 4)) - 3)
    return np.unique(np.append(0.5 * 2 ** (-steps / 4), k / n_features))


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
