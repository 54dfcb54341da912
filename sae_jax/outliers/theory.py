"""Feature death at initialisation, predicted by closed forms and by a law on the measured spectrum.

Setting: random unit encoder rows w, zero biases, N tokens, dictionary size n, k kept. For a row the shift is w·mu and
the signal w·(x − mu). Nothing in here is fitted. All laws return fractions of n.

    law                 needs                                         holds where
    paper               gamma                                         full-rank normal signal; total: gamma > 3
    finite_gamma        gamma                                         full-rank normal signal, any gamma
    token_integral      gamma, effective rank                         normal signal, equal variance in `rank` dimensions
    two_gammas          gamma, gamma_raw, effective rank              the same, with a signal that varies between tokens
    spectrum            eigenvalues, cosines with the mean            elliptical signal of any spectrum and tail

`probes.py` assumes nothing of the data and takes a second pass over it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainccinv, betaincinv, gammaincinv, ndtr, ndtri

Deaths = dict[str, float]  # dead_by_relu, dead_total: fractions of n
N_ROWS = 2048  # of `spectrum_law`
STREAM = 2605_31518  # keeps random rows apart from activations that somebody made with the same seed


def top_k_threshold(n_features: int, k: int) -> float:
    """t_k = Φ⁻¹(1 − k/n): where the k-th largest of n standard normals lies (2.418 at 64/8192).

    ReLU comes first, so it is at least 0.
    """
    return max(0.0, float(-ndtri(k / n_features)))


def alignment_threshold(share: ArrayLike, d_model: int) -> NDArray[np.float64]:
    """t with P(√d·cos(w, x) > t) = share for a random direction w in d dimensions; `top_k_threshold` as d → ∞.

    cos² is Beta(1/2, (d−1)/2). ReLU comes first, so t is at least 0.
    """
    share = np.asarray(share, np.float64)
    if d_model == 1:
        return np.where(share < 0.5, 1.0, 0.0)
    return np.sqrt(d_model * betainccinv(0.5, (d_model - 1) / 2, np.minimum(2 * share, 1.0)))


def extreme(n_tokens: int) -> float:
    """C = Φ⁻¹(1 − 1/N), the paper's largest signal over N tokens (4.265 at 100,000)."""
    return float(-ndtri(1 / n_tokens))


def median_extreme(n_tokens: int) -> float:
    """C̃ = Φ⁻¹(2^(−1/N)), the median of the largest of N standard normals (4.346 at 100,000)."""
    return float(-ndtri(-np.expm1(-np.log(2) / n_tokens)))


def dead_by_relu_paper(gamma: ArrayLike, n_tokens: int) -> NDArray[np.float64]:
    """Φ(−C/gamma). Source: Simon, Adams and Zou, arXiv:2605.31518."""
    with np.errstate(divide="ignore"):
        return ndtr(-extreme(n_tokens) / np.asarray(gamma, np.float64))


def dead_total_paper(gamma: ArrayLike, n_tokens: int, n_features: int, k: int) -> NDArray[np.float64]:
    """Φ(t_k − C/gamma): the threshold at its limit for large gamma, so tight only for gamma > 3. Same source."""
    with np.errstate(divide="ignore"):
        return ndtr(top_k_threshold(n_features, k) - extreme(n_tokens) / np.asarray(gamma, np.float64))


def dead_by_relu_finite_gamma(gamma: ArrayLike, n_tokens: int) -> NDArray[np.float64]:
    """Φ(−C̃/gamma): the paper's law with the median of the largest signal in place of C."""
    with np.errstate(divide="ignore"):
        return ndtr(-median_extreme(n_tokens) / np.asarray(gamma, np.float64))


def dead_total_finite_gamma(gamma: ArrayLike, n_tokens: int, n_features: int, k: int) -> NDArray[np.float64]:
    """Φ(t_k·√(1 + 1/gamma²) − C̃/gamma).

    The k-th largest pre-activation on token x is t_k·‖x‖/√d, and ‖x‖² = ‖mu‖² + ‖sigma‖²: the token's own signal
    raises the bar that a feature has to pass. In units of ‖mu‖/√d the bar is t_k·√(1 + 1/gamma²), the shift is
    standard normal and the largest signal C̃/gamma.
    """
    gamma = np.asarray(gamma, np.float64)
    bar = top_k_threshold(n_features, k)
    with np.errstate(divide="ignore", invalid="ignore"):
        dead = ndtr(bar * np.sqrt(1 + gamma**-2) - median_extreme(n_tokens) / gamma)
    # gamma = 0: all features are alike, and they die together only if the largest signal cannot reach the bar.
    return np.where(gamma > 0, dead, float(bar > median_extreme(n_tokens)))


# -- laws on directions ----------------------------------------------------------------------------------------------
#
# A token's norm changes nothing, so let x be its direction, cos its cosine with the mean direction c, and v the unit
# vector of what is left: x = cos·c + sin·v. A row w sees  w·x = (w·c)·cos + sin·(w·v).  v is taken to be the direction
# of a normal vector, independent of cos; the laws differ in where they get the two distributions from.


class EncoderRows(NamedTuple):
    """Encoder rows, scaled to length √d; arrays of equal length."""

    along: np.ndarray  # w·c
    spread: np.ndarray  # b, standard deviation of w·s for the normal vector s behind v
    share: np.ndarray  # variance of s in the direction that covaries with w·s: (w'Λ²w) / (w'Λw)


class Cosines(NamedTuple):
    """Nodes for the cosine of a token with the mean direction; weights add up to 1."""

    cosine: np.ndarray
    weight: np.ndarray


def _deaths(rows: EncoderRows, tokens: Cosines, rest: np.ndarray, bar: float, n_tokens: int) -> Deaths:
    """Rows that pass 0 (the ReLU) or the bar on none of N independent tokens.

    With z standard normal, w·v = b·z / √(share·z² + rest), which grows with z: a row passes where z exceeds a value
    that each cosine and each rest gives in closed form.

    Args:
      rest: what of ‖s‖² does not covary with w·s, at 1 − `REST_LEVELS`: (J, 1), or (J, F) one a row.
    """
    cosine = tokens.cosine
    sine = np.sqrt(np.maximum(1 - cosine**2, 1e-12))
    square, share = (rows.spread**2)[:, None], rows.share[:, None]
    # Where there is no rest (rank 1), w·v has two values only: the floor leaves the infinities as they are.
    roots, found = np.sqrt(np.maximum(rest, 1e-12)), {}
    for key, height in (("dead_by_relu", 0.0), ("dead_total", bar)):
        needed = (height - rows.along[:, None] * cosine) / sine  # of w·v
        room = square - share * needed**2
        with np.errstate(divide="ignore", invalid="ignore"):
            per_root = np.where(room > 0, needed / np.sqrt(np.maximum(room, 0)), np.copysign(np.inf, needed))
            chance = np.minimum(_beyond(per_root, roots) @ tokens.weight, 1.0)
            found[key] = float(np.mean(np.exp(n_tokens * np.log1p(-chance))))
    return found


def _beyond(height: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """P(z > height·root), the mean over the roots, of heights (F, M); roots (J, 1) or (J, F)."""
    if roots.shape[1] == 1:  # one curve for all: its logarithm in a table, in a fifth of the time, to 1e-4 of the value
        values = REST_LEVELS[1] @ ndtr(-HEIGHTS * roots)
        return np.exp(np.interp(height, HEIGHTS, np.log(np.maximum(values, 1e-300))))
    return sum(weight * ndtr(-height * root[:, None]) for root, weight in zip(roots, REST_LEVELS[1], strict=True))


def _midpoints(count: int) -> np.ndarray:
    """Midpoints of `count` equal shares of probability."""
    return (np.arange(count) + 0.5) / count


def along_axis(level: np.ndarray, d_model: int) -> np.ndarray:
    """√d times the component along a given axis of a random direction in d dimensions, at levels of probability."""
    if d_model == 1:
        return np.where(level < 0.5, -1.0, 1.0)
    side = 2 * level - 1
    return np.sign(side) * np.sqrt(d_model * betaincinv(0.5, (d_model - 1) / 2, np.abs(side)))


def _levels(count: int, per_octave: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints and weights of probability bins, down to 1/count in the upper tail: it decides who fires at all."""
    edges = np.append(1 - 2 ** (-np.arange(int(per_octave * np.log2(count))) / per_octave), 1.0)
    return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


REST_LEVELS = _levels(1 << 12, per_octave=2)
HEIGHTS = np.sinh(np.linspace(-20, 20, 1 << 14))


def _rest(freedom: ArrayLike, mean: ArrayLike) -> np.ndarray:
    """Nodes of a gamma variable, finest where it is small and w·v large."""
    freedom = np.maximum(freedom, 1e-3)  # at rank 1 there is no rest
    return gammaincinv(freedom, 1 - REST_LEVELS[0][:, None]) * (np.asarray(mean) / freedom)


def _condensed(cosine: np.ndarray, weight: np.ndarray) -> Cosines:
    """Few nodes for many: means over bins that get finer towards both ends."""
    order = np.argsort(cosine)
    cosine, weight = cosine[order], weight[order]
    tail = 2 ** (-np.arange(4, 4 * np.log2(max(len(cosine), 4))) / 4)
    middle = np.linspace(0, 1, 33)
    number = np.searchsorted(np.unique(np.concatenate([tail, 1 - tail, middle])), np.cumsum(weight) - weight / 2)
    _, bins = np.unique(number, return_inverse=True)
    total = np.bincount(bins, weight)
    return Cosines(np.bincount(bins, weight * cosine) / total, total / total.sum())


def token_integral(
    gamma: float, rank: float, d_model: int, n_tokens: int, n_features: int, k: int, tau_log_variance: float = 0.0
) -> Deaths:
    """Death where the signal is normal with equal variance in `rank` random dimensions, and mu lies outside them.

    Row: shift a ~ N(0, 1), signal b² ~ d·Beta(r/2, (d−r)/2), as d is large (here: exactly). Token: z ~ N(0, 1),
    q ~ chi²_{r−1}.
    p(a, b) = P( gamma·a + b·z/√r > t·√(gamma² + (z² + q)/r) );  dead = E[(1 − p)^N], with t = 0 for dead-by-ReLU.
    With `tau_log_variance` the signal (z and √q) is multiplied by a lognormal tau of E tau² = 1, Var log tau² as given.
    """
    rank, gamma = min(rank, max(d_model - 1, 1)), min(gamma, 1e8)
    along, level = (grid.ravel() for grid in np.meshgrid(along_axis(_midpoints(200), d_model), _midpoints(32)))
    within = betaincinv(rank / 2, (d_model - 1 - rank) / 2, level) if rank < d_model - 1 else np.ones_like(along)
    spread = np.sqrt(np.maximum(d_model - along**2, 0) * within / rank)
    rest = _rest((rank - 1) / 2, 1 - 1 / rank)
    level, weight = _levels(n_tokens)
    square = gammaincinv(rank / 2, level) * (2 / rank)  # ‖s‖², which no direction of it depends on
    if tau_log_variance > 0:
        tau_square = np.exp(np.sqrt(tau_log_variance) * ndtri(level))
        square = np.outer(tau_square / (weight @ tau_square), square).ravel()
        weight = np.outer(weight, weight).ravel()
    tokens = _condensed(gamma / np.sqrt(np.maximum(gamma**2 + square, 1e-300)), weight)
    bar = float(alignment_threshold(k / n_features, d_model))
    return _deaths(EncoderRows(along, spread, np.full_like(along, 1 / rank)), tokens, rest, bar, n_tokens)


def two_gammas(
    gamma: float, gamma_raw: float, rank: float, d_model: int, n_tokens: int, n_features: int, k: int
) -> Deaths:
    """`token_integral` with the spread of the signal from token to token read off the gap between the two gammas.

    Take x = tau_0·(mu + tau·s). tau_0 cancels in every cosine, tau does not: a token with little of the mean in it can
    wake features that the others cannot. Both lower gamma_raw. Nothing says how the spread is shared out between
    them, so they are given the same lognormal law of log variance v, and the unknowns G = ‖mu‖/‖s‖ and v solve

        gamma²/(1 + gamma²)      =  E[ (1 + tau²/G²)^(−1/2) ]²                       (LayerNorm fixes each norm)
        gamma_raw²               =  G² / ( e^(v/4)·(G² + 1) − G² )                   (E tau_0² = e^(v/4)·(E tau_0)²)

    A few massive tokens make a gap as well. They share few directions and wake nothing: then gamma counts and v = 0.
    Two numbers do not tell which it is. The share of the variance that gamma leaves no room for, 1 − gamma_raw²/gamma²,
    is taken for the chance that massive tokens make the gap, and the law is the mean over both causes. Where gamma_raw
    is above gamma, LayerNorm has removed a mean along the all-ones direction: gamma_raw is taken and v = 0.
    """
    massive = token_integral(max(gamma, gamma_raw), rank, d_model, n_tokens, n_features, k)
    share = (gamma_raw / gamma) ** 2 if gamma_raw < gamma else 0.0  # of the variance that is not in excess
    if share < 1e-4:
        return massive
    signal, v = signal_and_spread(gamma, gamma_raw)
    spread = token_integral(signal, rank, d_model, n_tokens, n_features, k, tau_log_variance=v)
    return {key: share * spread[key] + (1 - share) * massive[key] for key in massive}


def signal_and_spread(gamma: float, gamma_raw: float) -> tuple[float, float]:
    """G and v of `two_gammas` for a gamma_raw below gamma, and above a hundredth of it."""
    z = ndtri(_midpoints(200))

    def signal(v: float) -> float:
        room = 1 - gamma_raw**2 * np.expm1(v / 4)
        return float(gamma_raw * np.exp(v / 8) / np.sqrt(room)) if room > 0 else np.inf

    def excess(v: float) -> float:
        tau_square = np.exp(np.sqrt(v) * z)
        length = np.mean(1 / np.sqrt(1 + tau_square / tau_square.mean() / signal(v) ** 2))
        return float(length - gamma / np.sqrt(1 + gamma**2))

    if excess(0.0) >= 0:  # the two gammas agree but for rounding
        return signal(0.0), 0.0
    low, high = 0.0, 60.0
    while high - low > 2e-12:  # as brentq; halved here, as scipy.optimize takes a third of a second to import
        v = (low + high) / 2
        low, high = (v, high) if excess(v) < 0 else (low, v)
    return signal(low), low


def spectrum_law(
    eigenvalues: Float[np.ndarray, "r"], cosines: Float[np.ndarray, "m"], n_tokens: int, n_features: int, k: int
) -> Deaths:
    """Death from the measured spectrum of the directions and their measured cosines with the mean direction.

    Like `token_integral`, with the eigenvalues λ in place of a rank (spread² = Σ λ_j w_j², share = Σ λ_j² w_j²/spread²,
    the rest of ‖s‖² close to a gamma variable), and with the cosines of a sample of tokens in place of those of a
    normal signal: they hold the spread of the norms and the weight of the tails as far as these matter. Rows are 2048
    random ones of a fixed seed, stratified along the mean.

    Args:
      eigenvalues: of the covariance of x/‖x‖ in the d − 1 dimensions perpendicular to its mean.
      cosines: of tokens with that mean.
    """
    d = len(eigenvalues) + 1
    eigenvalues = eigenvalues / eigenvalues.sum() if eigenvalues.sum() > 0 else np.full(d - 1, 1 / max(d - 1, 1))
    square = np.random.default_rng([0, STREAM]).chisquare(1, size=(N_ROWS, d - 1))
    along = along_axis(_midpoints(N_ROWS), d)
    # A row of length √d: what is not along the mean lies in a random direction perpendicular to it.
    square *= (np.maximum(d - along**2, 1e-12) / square.sum(axis=1))[:, None]
    spread = np.sqrt(square @ eigenvalues)
    share = np.minimum(square @ eigenvalues**2 / spread**2, 1)
    left = np.maximum(np.sum(eigenvalues**2) - share**2, 1e-12)
    freedom = np.clip((1 - share) ** 2 / (2 * left), 1e-6, 1e6)
    tokens = _condensed(cosines, np.full(len(cosines), 1 / len(cosines)))
    bar = float(alignment_threshold(k / n_features, d))
    return _deaths(EncoderRows(along, spread, share), tokens, _rest(freedom, 1 - share), bar, n_tokens)


# -- how long the bias takes ------------------------------------------------------------------------------------------


def bias_learning_time(mu: Float[np.ndarray, "d"], fraction: float = 0.9) -> float:
    """Σ learning rates that Adam needs at least until b·mu = fraction·‖mu‖², from b = 0; in the units of mu.

    Adam moves a coordinate by about the learning rate a step, so after T = Σ lr coordinate j has come at most
    min(T, |mu_j|) towards its target: T solves Σ_j |mu_j|·min(T, |mu_j|) = fraction·‖mu‖². Divide by the learning rate
    for steps. A mean in one dimension takes √d times as long as one of the same length spread over d.
    """
    size = np.sort(np.abs(np.asarray(mu, np.float64)))
    reached = np.cumsum(size**2) + size * (size.sum() - np.cumsum(size))  # the left side at T = each |mu_j|
    return float(np.interp(fraction * (size @ size), np.r_[0.0, reached], np.r_[0.0, size]))
