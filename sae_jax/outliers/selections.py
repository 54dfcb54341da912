"""What an untrained SAE selects of its pre-activations z, and the bar that a feature has to pass once to be alive.

    rule        selected of a token, or a batch of B tokens   a feature lives where, over all tokens
    topk        the k largest of ReLU(z)                      max √d·cos(w, x) passes what k/n of all directions pass
    batch_topk  the k·B largest of ReLU(z), arXiv:2412.06410  max w·x > t
    jumprelu    z > threshold, arXiv:2407.14435               max w·x > threshold
    relu        z > 0                                         max w·x > 0

BatchTopK's tokens share a budget. Of a token of length ‖x‖ a share P(√d·cos > t√d / ‖x‖) of all features is above t, so
the bar t of many tokens is where the mean of that share over tokens is k/n: the quantile of all pre-activations over
tokens and features. A long token takes from the budget of the others. Batches are taken to be alike, and n to be large.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import betaincc

from sae_jax.autoencoder import death
from sae_jax.errors import Refused
from sae_jax.outliers.moments import Severity
from sae_jax.outliers.preprocess import Preprocessing

NAMES = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU", "relu": "ReLU"}
COUNTED = ("topk", "batch_topk")  # rules that keep k a token
BINS, STEPS = 256, 50  # groups of tokens of about equal length; halvings of where the bar may be


class Selection(NamedTuple):
    """A rule, and the threshold of a JumpReLU SAE."""

    rule: str = "topk"
    threshold: float | None = None

    @property
    def pathway(self) -> str:
        """By what a feature dies that is positive somewhere."""
        return death.pathway(self.rule)


def behind(
    selection: Selection, choices: dict[str, Preprocessing], severity: Severity, scale: float = 1.0
) -> dict[str, Selection]:
    """The same selection behind several preprocessings.

    A threshold is of the activations as they are, `scale` of which are here. Where tokens get another size it stays as
    many ‖sigma‖ high.
    """
    if selection.threshold is None:
        return dict.fromkeys(choices, selection)
    views = {"none": severity.raw, "layer_norm": severity.layer_normed, "unit": severity.directions}
    sizes = {name: float(np.linalg.norm(of.sigma)) for name, of in views.items()}
    height = selection.threshold * scale / sizes["none"]
    return {
        name: selection._replace(threshold=height * (sizes[y.norm] if y.matrix is None else y.width**0.5))
        for name, y in choices.items()
    }


def in_activations(threshold: float, severity: Severity, scale: float = 1.0) -> float:
    """A threshold of a run, whose tokens have ‖sigma‖ = √d, as one of the activations, `scale` of which are here."""
    return threshold * float(np.linalg.norm(severity.raw.sigma)) / len(severity.raw.sigma) ** 0.5 / scale


def share_above(height: Float[np.ndarray, "..."], d_model: int) -> np.ndarray:
    """P(√d·cos(w, x) > height) for a random direction w in d dimensions and a height ≥ 0."""
    if d_model == 1:
        return 0.5 * (height < 1)
    share: np.ndarray = 0.5 * betaincc(0.5, (d_model - 1) / 2, np.minimum(height**2 / d_model, 1))
    return share


def batch_threshold(share: Float[np.ndarray, "S"], norms: Float[np.ndarray, "N"], d_model: int) -> np.ndarray:
    """t ≥ 0 such that a share k/n of all pre-activations of random unit rows is above t, over tokens of these norms."""
    there = np.asarray(norms[norms > 0], np.float64)
    if not len(there):
        return np.zeros(len(share))
    edges = np.geomspace(there.min(), there.max() * (1 + 1e-9), BINS + 1)
    which = np.clip(np.searchsorted(edges, there, side="right") - 1, 0, BINS - 1)
    count = np.bincount(which, minlength=BINS)
    length = np.bincount(which, there, BINS)[count > 0] / count[count > 0]
    weight = count[count > 0] / len(norms)  # zeros have no share of the budget
    low, high = np.zeros(len(share)), np.full(len(share), there.max())
    for _ in range(STEPS):
        middle = (low + high) / 2
        above = share_above(np.sqrt(d_model) * middle[:, None] / length, d_model) @ weight
        low, high = np.where(above > share, middle, low), np.where(above > share, high, middle)
    return low


def named(rule: str, threshold: float | None) -> Selection:
    """The selection of these names; refuses what is none."""
    if rule not in NAMES:
        raise Refused("selection", rule, "one of " + ", ".join(NAMES))
    if rule != "jumprelu" and threshold is not None:
        raise Refused("threshold", threshold, f"leave it out: {rule} has none, jumprelu has one")
    if rule == "jumprelu" and not (threshold is not None and 0 < threshold < np.inf):
        raise Refused("threshold", threshold, "a finite number > 0, in the units of the activations")
    return Selection(rule, threshold)


def known(laws: dict[str, Any], rule: str) -> dict[str, Any]:
    """Of a selection other than TopK the laws know death by ReLU alone."""
    if rule == "topk":
        return laws
    return {name: {**found, "dead_total": found["dead_by_relu"] if rule == "relu" else None}
            for name, found in laws.items()}  # fmt: skip
