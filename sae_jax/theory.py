"""Feature death at initialisation in closed form, with no fitted constant.

Setting: random unit encoder rows, zero biases, N tokens, dictionary size n, k kept. For a row w the shift w·mu is
N(0, ‖mu‖²/d) and the signal w·(x − mu) is N(0, ‖sigma‖²/d): full-rank Gaussian data, d large.
All functions take scalars or arrays and return fractions of n.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm


def top_k_threshold(n_features: int, k: int) -> float:
    """t_k = Φ⁻¹(1 − k/n): where the k-th largest of n standard normals lies (2.418 at 64/8192)."""
    return float(norm.isf(k / n_features))


def extreme(n_tokens: int) -> float:
    """C = Φ⁻¹(1 − 1/N), the paper's largest signal over N tokens (4.265 at 100,000)."""
    return float(norm.isf(1 / n_tokens))


def median_extreme(n_tokens: int) -> float:
    """C̃ = Φ⁻¹(2^(−1/N)), the median of the largest of N standard normals (4.346 at 100,000)."""
    return float(norm.isf(-np.expm1(-np.log(2) / n_tokens)))


def dead_by_relu_paper(gamma: ArrayLike, n_tokens: int) -> NDArray[np.float64]:
    """Φ(−C/gamma). Source: Simon, Adams and Zou, arXiv:2605.31518."""
    with np.errstate(divide="ignore"):
        return norm.cdf(-extreme(n_tokens) / np.asarray(gamma, np.float64))


def dead_total_paper(gamma: ArrayLike, n_tokens: int, n_features: int, k: int) -> NDArray[np.float64]:
    """Φ(t_k − C/gamma): the threshold at its limit for large gamma, so tight only for gamma > 3. Same source."""
    with np.errstate(divide="ignore"):
        return norm.cdf(top_k_threshold(n_features, k) - extreme(n_tokens) / np.asarray(gamma, np.float64))


def dead_total_finite_gamma(gamma: ArrayLike, n_tokens: int, n_features: int, k: int) -> NDArray[np.float64]:
    """Φ(t_k·√(1 + 1/gamma²) − C̃/gamma).

    The k-th largest pre-activation on token x is t_k·‖x‖/√d, and ‖x‖² = ‖mu‖² + ‖sigma‖²: the token's own signal
    raises the bar that a feature has to pass. In units of ‖mu‖/√d the bar is t_k·√(1 + 1/gamma²), the shift is
    standard normal and the largest signal C̃/gamma.
    """
    gamma = np.asarray(gamma, np.float64)
    bar = top_k_threshold(n_features, k)
    with np.errstate(divide="ignore", invalid="ignore"):
        dead = norm.cdf(bar * np.sqrt(1 + gamma**-2) - median_extreme(n_tokens) / gamma)
    # gamma = 0: all features are alike, and they die together only if the largest signal cannot reach the bar.
    return np.where(gamma > 0, dead, float(bar > median_extreme(n_tokens)))
