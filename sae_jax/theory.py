"""Feature death at initialisation, predicted: closed forms, a law on the measured spectrum, and probes.

Setting: random unit encoder rows w, zero biases, N tokens, dictionary size n, k kept. For a row the shift is w·mu and
the signal w·(x − mu). Nothing in here is fitted. All laws return fractions of n.

    law                 needs                                         holds where
    paper               gamma                                         full-rank normal signal; total: gamma > 3
    finite_gamma        gamma                                         full-rank normal signal, any gamma
    token_integral      gamma, effective rank                         normal signal, equal variance in `rank` dimensions
    two_gammas          gamma, gamma_raw, effective rank              the same, with a signal that varies between tokens
    spectrum            eigenvalues, mean in their basis, norms       elliptical signal of any spectrum and tail
    probe               a second pass over the tokens                 any data; n not tiny
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, polygamma
from scipy.stats import beta, norm
from scipy.stats import gamma as gamma_distribution

Deaths = dict[str, float]  # dead_by_relu, dead_total: fractions of n


def top_k_threshold(n_features: int, k: int) -> float:
    """t_k = Φ⁻¹(1 − k/n): where the k-th largest of n standard normals lies (2.418 at 64/8192)."""
    return float(norm.isf(k / n_features))


def alignment_threshold(share: ArrayLike, d_model: int) -> NDArray[np.float64]:
    """t with P(√d·cos(w, x) > t) = share for a random direction w in d dimensions; `top_k_threshold` as d → ∞.

    cos² is Beta(1/2, (d−1)/2). ReLU comes first, so t is at least 0.
    """
    share = np.asarray(share, np.float64)
    if d_model == 1:
        return np.where(share < 0.5, 1.0, 0.0)
    return np.sqrt(d_model * beta.isf(np.minimum(2 * share, 1.0), 0.5, (d_model - 1) / 2))


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


def dead_by_relu_finite_gamma(gamma: ArrayLike, n_tokens: int) -> NDArray[np.float64]:
    """Φ(−C̃/gamma): the paper's law with the median of the largest signal in place of C."""
    with np.errstate(divide="ignore"):
        return norm.cdf(-median_extreme(n_tokens) / np.asarray(gamma, np.float64))


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


# -- laws on a spectrum ----------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What decides the fate of encoder rows on elliptical tokens x = mu + tau·s, s normal; arrays of equal length."""

    shift: np.ndarray  # w·mu
    spread: np.ndarray  # standard deviation of w·s
    tilt: np.ndarray  # covariance of mu·s with (w·s / spread)
    share: np.ndarray  # variance of s along the direction in which it covaries with w·s: (w'Λ²w) / (w'Λw)


class Tokens(NamedTuple):
    """What varies from token to token besides the signal along w: nodes with weights that add up to 1."""

    tau: np.ndarray  # scale of the signal
    rest: np.ndarray  # ‖s‖² off that direction, over its expectation
    weight: np.ndarray


def _never(rows: Rows, tokens: Tokens, mean_square: float, variance: float, bar: float, n_tokens: int) -> float:
    """Share of rows that on none of N independent tokens have w·x > bar·‖x‖ (bar = 0: the ReLU).

    With z standard normal along w: w·x = shift + tau·spread·z, and
    ‖x‖² = mean_square + 2 tau·tilt·z + tau²·(share·z² + (variance − share)·rest).
    The condition is quadratic in z, so each row and node has its chance in closed form.
    """
    shift, spread, tilt, share = (part[:, None] for part in rows)
    scale = tokens.tau * spread
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(scale > 0, -shift / scale, np.where(shift > 0, -np.inf, np.inf))  # w·x > 0 above it
        if bar == 0:
            chance = ndtr(-zero)
        else:
            a = tokens.tau**2 * (spread**2 - bar**2 * share)
            b = tokens.tau * (shift * spread - bar**2 * tilt)
            c = shift**2 - bar**2 * (mean_square + tokens.tau**2 * (variance - share) * tokens.rest)
            root = np.sqrt(np.maximum(b * b - a * c, 0))
            # a > 0: above the larger root. a < 0: between the roots, if there are any, where w·x > 0.
            low, high = (-b + root) / a, (-b - root) / a
            between = np.where((b * b > a * c) & (low >= zero), ndtr(high) - ndtr(low), 0.0)
            chance = np.where(a > 0, ndtr(-low), between)
    chance = np.nan_to_num(chance) @ tokens.weight
    with np.errstate(divide="ignore"):
        return float(np.mean(np.exp(n_tokens * np.log1p(-np.minimum(chance, 1.0)))))


def _deaths(rows: Rows, tokens: Tokens, mean_square: float, variance: float, bar: float, n_tokens: int) -> Deaths:
    return {
        "dead_by_relu": _never(rows, tokens, mean_square, variance, 0.0, n_tokens),
        "dead_total": _never(rows, tokens, mean_square, variance, bar, n_tokens),
    }


N_REST = 12  # nodes for the rest of a norm


def _product(tau: np.ndarray, weight: np.ndarray, rest: np.ndarray) -> Tokens:
    """Every tau with every rest."""
    m = len(rest)
    return Tokens(np.repeat(tau, m), np.tile(rest, len(tau)), np.repeat(weight, m) / m)


def _levels(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels of probability and their weights: four a halving of the upper tail, which decides who fires at all."""
    edges = np.append(1 - 2 ** (-np.arange(int(4 * np.log2(count))) / 4), 1.0)
    return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


def _midpoints(count: int) -> np.ndarray:
    """Midpoints of `count` equal shares of probability."""
    return (np.arange(count) + 0.5) / count


def token_integral(
    gamma: float, rank: float, d_model: int, n_tokens: int, n_features: int, k: int, tau_log_variance: float = 0.0
) -> Deaths:
    """Death where the signal is normal with equal variance in `rank` random dimensions, and mu lies outside them.

    Row: shift a ~ N(0, 1), signal b² ~ d·Beta(r/2, (d−r)/2). Token: z ~ N(0, 1), q ~ chi²_{r−1}.
    p(a, b) = P( gamma·a + b·z/√r > t·√(gamma² + (z² + q)/r) );  dead = E[(1 − p)^N], with t = 0 for dead-by-ReLU.
    With `tau_log_variance` the signal (z and √q) is multiplied by a lognormal tau of E tau² = 1, Var log tau² as given.
    """
    a = norm.ppf(_midpoints(200))
    b = np.sqrt(d_model * beta.ppf(_midpoints(24), rank / 2, (d_model - rank) / 2)) if rank < d_model else np.ones(1)
    shift, spread = (grid.ravel() for grid in np.meshgrid(gamma * a, b / np.sqrt(rank)))
    rows = Rows(shift, spread, np.zeros_like(shift), np.full_like(shift, 1 / rank))
    freedom = (rank - 1) / 2
    rest = gamma_distribution.ppf(_midpoints(N_REST), freedom, scale=1 / freedom) if rank > 1 else np.ones(1)
    level, weight = _levels(n_tokens) if tau_log_variance > 0 else (np.full(1, 0.5), np.ones(1))
    tau_square = np.exp(np.sqrt(tau_log_variance) * norm.ppf(level))
    tokens = _product(np.sqrt(tau_square / (weight @ tau_square)), weight, rest)
    bar = float(alignment_threshold(k / n_features, d_model))
    return _deaths(rows, tokens, gamma**2, 1.0, bar, n_tokens)


MASSIVE = 0.5  # share of the variance of x that has to be excess before it is laid to a few massive tokens


def two_gammas(
    gamma: float, gamma_raw: float, rank: float, d_model: int, n_tokens: int, n_features: int, k: int
) -> Deaths:
    """`token_integral` with the spread of the signal from token to token read off the gap between the two gammas.

    Take x = tau_0·(mu + tau·s). tau_0 cancels in every cosine, tau does not: a token with little of the mean in it can
    wake features that the others cannot. Both lower gamma_raw. Nothing says how the spread is shared out between
    them, so they are given the same lognormal law of log variance v, and the unknowns G = ‖mu‖/‖s‖ and v solve

        gamma²/(1 + gamma²)      =  E[ (1 + tau²/G²)^(−1/2) ]²                       (LayerNorm fixes each norm)
        gamma_raw²               =  G² / ( e^(v/4)·(G² + 1) − G² )                   (E tau_0² = e^(v/4)·(E tau_0)²)

    Two cases have another cause. gamma_raw > gamma: LayerNorm has removed a mean along the all-ones direction, so
    gamma_raw is taken and v = 0. gamma_raw² < gamma²/2: more than half of the variance is excess, which a few massive
    tokens carry; they share few directions and wake nothing, so gamma is taken and v = 0.
    """
    if gamma_raw >= gamma or gamma_raw**2 < MASSIVE * gamma**2:
        return token_integral(max(gamma, gamma_raw), rank, d_model, n_tokens, n_features, k)
    z = norm.ppf(_midpoints(200))

    def signal(v: float) -> float:
        room = 1 - gamma_raw**2 * np.expm1(v / 4)
        return float(gamma_raw * np.exp(v / 8) / np.sqrt(room)) if room > 0 else np.inf

    def excess(v: float) -> float:
        tau_square = np.exp(np.sqrt(v) * z)
        length = np.mean(1 / np.sqrt(1 + tau_square / tau_square.mean() / signal(v) ** 2))
        return float(length - gamma / np.sqrt(1 + gamma**2))

    v = brentq(excess, 0.0, 60.0)
    return token_integral(signal(v), rank, d_model, n_tokens, n_features, k, tau_log_variance=v)


N_ROWS = 2048


def spectrum_law(
    eigenvalues: Float[np.ndarray, "d"],
    mean: Float[np.ndarray, "d"],
    square_norms: Float[np.ndarray, "m"],
    n_tokens: int,
    n_features: int,
    k: int,
) -> Deaths:
    """Death where tokens are x = mu + tau·s with s normal of any covariance and tau of any distribution.

    Like `token_integral`, with the measured eigenvalues λ in place of a rank: for a row w (in the eigenbasis)
    spread² = Σ λ_j w_j², and ‖s‖² given z is (Σ λ_j² w_j² / spread²)·z² plus a remainder that is close to a gamma
    variable. tau comes from the spread of the norms beyond that of a normal signal: log‖x − mu‖² has the variance
    trigamma((Σλ)²/(2Σλ²)) for a normal one; what is more belongs to tau, whose quantiles are those of the norms, drawn
    in by as much. Rows are 2048 random ones of a fixed seed, stratified along mu.

    Args:
      eigenvalues: of the covariance of the tokens.
      mean: mu in the basis of the eigenvectors.
      square_norms: ‖x − mu‖² of a sample of tokens.
    """
    d = len(eigenvalues)
    variance = float(eigenvalues.sum())
    w = stratified_rows(N_ROWS, mean, np.random.default_rng(0))
    square = w * w
    spread = np.sqrt(square @ eigenvalues)
    safe = np.maximum(spread, np.finfo(np.float64).tiny)
    rows = Rows(w @ mean, spread, (w * mean) @ eigenvalues / safe, square @ eigenvalues**2 / safe**2)
    typical = float(np.mean(rows.share))
    left = max(float(np.sum(eigenvalues**2)) - typical**2, np.finfo(np.float64).tiny)
    freedom = (variance - typical) ** 2 / (2 * left)
    rest = gamma_distribution.ppf(_midpoints(N_REST), freedom, scale=1 / freedom)
    tokens = _product(*_scales(square_norms, variance**2 / (2 * float(np.sum(eigenvalues**2)))), rest)
    bar = float(alignment_threshold(k / n_features, d)) / np.sqrt(d)
    return _deaths(rows, tokens, float(mean @ mean), variance, bar, n_tokens)


def _scales(square_norms: np.ndarray, freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for tau (E tau² = 1), from norms of which a normal signal explains trigamma(freedom)."""
    logs = np.log(square_norms[square_norms > 0])
    own = max(0.0, 1 - float(polygamma(1, freedom)) / max(float(np.var(logs)), np.finfo(np.float64).tiny))
    level, weight = _levels(len(logs))
    tau_square = np.exp(np.sqrt(own) * np.quantile(logs - logs.mean(), level))
    return np.sqrt(tau_square / (weight @ tau_square)), weight


# -- probes ----------------------------------------------------------------------------------------------------------


def stratified_rows(count: int, mean: Float[np.ndarray, "d"], rng: np.random.Generator) -> Float[np.ndarray, "P d"]:
    """Random unit vectors whose components along `mean` take one value from each of `count` equally likely strata.

    The rest of each is uniform. Fate hangs on the component along mu more than on anything else, so the share that
    dies is known better than from as many independent rows. Rows are in the order of the strata.
    """
    d = len(mean)
    rows = rng.normal(size=(count, d))
    length = np.linalg.norm(mean)
    if d == 1 or not length > 0:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    axis = mean / length
    rows -= np.outer(rows @ axis, axis)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    level = 2 * (np.arange(count) + rng.uniform(size=count)) / count - 1
    along = np.sign(level) * np.sqrt(beta.ppf(np.abs(level), 0.5, (d - 1) / 2))
    return along[:, None] * axis + np.sqrt(1 - along**2)[:, None] * rows


def probe_deaths(best: Float[np.ndarray, "P"], d_model: int, n_features: int, k: int) -> Deaths:
    """Death forecast by probes: `best` is max over tokens of √d·cos(w_i, x) for each probe w_i.

    A probe would be dead for (n, k) where its best is under the threshold that k/n of all directions pass, whatever
    the data: nothing is assumed of them. Dead by ReLU: best ≤ 0.
    """
    bar = alignment_threshold(k / n_features, d_model)
    return {"dead_by_relu": float(np.mean(best <= 0)), "dead_total": float(np.mean((best <= 0) | (best < bar)))}


class Band(NamedTuple):
    """A forecast over several k/n with its 95 % confidence band; arrays of equal length."""

    share: np.ndarray  # k/n
    dead: np.ndarray
    low: np.ndarray
    high: np.ndarray


def death_curve(best: Float[np.ndarray, "P"], d_model: int, share: Float[np.ndarray, "S"]) -> Band:
    """Death against k/n from one set of probes, in the order of their strata.

    The band is Wilson's for as many independent rows as would give the variance between neighbouring strata.
    """
    bars = alignment_threshold(share, d_model)
    dead_probe = (best <= 0) | (best < bars[:, None])  # (S, P)
    count = dead_probe.shape[1]
    dead = dead_probe.mean(axis=1)
    pairs = dead_probe[:, : count // 2 * 2].reshape(len(share), -1, 2)
    stratified = np.sum(pairs[..., 0] != pairs[..., 1], axis=1) / count**2
    plain = dead * (1 - dead) / count
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(stratified > 0, np.clip(plain / stratified, 1, 10), 1.0)
    n_effective, z = count * gain, norm.ppf(0.975)
    middle = (dead + z**2 / (2 * n_effective)) / (1 + z**2 / n_effective)
    half = z / (1 + z**2 / n_effective) * np.sqrt(dead * (1 - dead) / n_effective + z**2 / (4 * n_effective**2))
    return Band(share, dead, middle - half, middle + half)


# -- how long the bias takes ------------------------------------------------------------------------------------------


def bias_learning_time(mu: Float[np.ndarray, "d"], fraction: float = 0.9) -> float:
    """Σ learning rates that Adam needs at least until b·mu = fraction·‖mu‖², from b = 0; in the units of mu.

    Adam moves a coordinate by about the learning rate a step, so after T = Σ lr coordinate j has come at most
    min(T, |mu_j|) towards its target: T solves Σ_j |mu_j|·min(T, |mu_j|) = fraction·‖mu‖². Divide by the learning rate
    for steps. A mean in one dimension takes √d times as long as one of the same length spread over d.
    """
    size = np.sort(np.abs(np.asarray(mu, np.float64)))
    wanted = fraction * float(size @ size)
    reached = np.cumsum(size**2) + size * (size.sum() - np.cumsum(size))  # the left side at T = each |mu_j|
    knots = np.concatenate([[0.0], size])
    return float(np.interp(wanted, np.concatenate([[0.0], reached]), knots))
