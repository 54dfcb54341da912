"""Rank correlation over layers of several models: layers of one model are not independent, so models are drawn."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Correlation(NamedTuple):
    """Spearman's rho with what it hangs on."""

    rho: float
    low: float  # 95 % interval, whole models drawn again; nan for one model
    high: float
    least: float  # with each model left out in turn; nan where that leaves nothing that varies
    most: float
    n: int
    n_models: int

    def __str__(self) -> str:
        drawn, left = f"{self.low:.2f} to {self.high:.2f}", f"{self.least:.3f} to {self.most:.3f}"
        return (f"rho {self.rho:.3f} (95 % {drawn}, models drawn; {left} leaving one out) over {self.n} layers of "
                f"{self.n_models} models").replace("nan to nan", "undefined").replace("nan", "undefined")  # fmt: skip


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Correlation of ranks, ties at their mean rank; nan where one of the two does not vary."""
    from scipy.stats import rankdata  # half a second, for the table of a sweep alone

    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def interval(
    a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], models: np.ndarray, draws: int = 1000
) -> tuple[float, float]:
    """95 % interval of Spearman's rho when whole models are drawn again; nan for a single model."""
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(models == name) for name in np.unique(models)]
    if len(rows) < 2:
        return float("nan"), float("nan")
    found = []
    for _ in range(draws):
        drawn = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        found.append(spearman(a[drawn], b[drawn]))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], models: np.ndarray) -> Correlation:
    """Spearman's rho of a and b, a row a layer, with its interval and its range over models left out."""
    names = np.unique(models)
    left_out = [spearman(a[models != name], b[models != name]) for name in names] if len(names) > 1 else [np.nan]
    return Correlation(
        spearman(a, b), *interval(a, b, models), float(np.min(left_out)), float(np.max(left_out)), len(a), len(names)
    )
