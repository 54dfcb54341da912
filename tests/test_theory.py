import numpy as np
import pytest
from scipy.special import gammainc, ndtr
from scipy.stats import beta, norm

from sae_jax.outliers import theory
from sae_jax.outliers.probes import Forecast, stratified_rows


def count_deaths(x, n, k, seed=0):
    """Dead by ReLU and in total, straight from the definition, in NumPy."""
    w = np.random.default_rng(seed).normal(size=(n, x.shape[1]))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    positive, fired = np.zeros(n, bool), np.zeros(n, bool)
    for part in np.array_split(x, 20):
        z = part @ w.T
        positive |= (z > 0).any(axis=0)
        kept = np.argpartition(-z, k - 1, axis=1)[:, :k]
        fired[kept[np.take_along_axis(z, kept, axis=1) > 0]] = True
    return {"dead_by_relu": np.mean(~positive), "dead_total": np.mean(~fired)}


def tokens(rng, n_tokens, d, rank, gamma, tail=0.0):
    """mu + a signal of equal variance in `rank` dimensions; ‖sigma‖ = 1."""
    basis = np.linalg.qr(rng.normal(size=(d, rank)))[0]
    signal = rng.normal(size=(n_tokens, rank)) @ basis.T / np.sqrt(rank)
    if tail:
        signal *= np.sqrt((tail - 2) / rng.chisquare(tail, size=(n_tokens, 1)))
    mu = rng.normal(size=d)
    return signal + gamma * mu / np.linalg.norm(mu)


def test_constants_are_those_of_the_paper():
    assert theory.extreme(100_000) == pytest.approx(4.265, abs=5e-4)
    assert theory.top_k_threshold(8192, 64) == pytest.approx(2.418, abs=5e-4)
    assert theory.median_extreme(100_000) == pytest.approx(4.35, abs=1e-2)
    assert norm.cdf(theory.median_extreme(1000)) ** 1000 == pytest.approx(0.5, rel=1e-9)


def test_the_threshold_on_alignments_is_exact_in_any_dimension(rng):
    w = rng.normal(size=(400_000, 16))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    assert np.mean(4 * w[:, 0] > theory.alignment_threshold(1 / 128, 16)) == pytest.approx(1 / 128, rel=0.05)
    assert theory.alignment_threshold(1 / 128, 16) == pytest.approx(2.30, abs=0.01)
    assert theory.alignment_threshold(1 / 128, 10**6) == pytest.approx(theory.top_k_threshold(128, 1), abs=1e-4)
    assert theory.alignment_threshold(0.7, 16) == 0  # ReLU comes before top-k


def test_limits_and_order():
    gammas = np.array([0.0, 0.5, 1, 2, 5, 10, 20, 40, 1e6])
    for law in (theory.dead_total_paper, theory.dead_total_finite_gamma):
        dead = law(gammas, 100_000, 8192, 64)
        assert (np.diff(dead) >= 0).all()
        assert dead[0] == 0
        assert dead[-1] == pytest.approx(1 - 1 / 128, abs=1e-4)
    for relu in (theory.dead_by_relu_paper(gammas, 100_000), theory.dead_by_relu_finite_gamma(gammas, 100_000)):
        assert (relu <= theory.dead_total_finite_gamma(gammas, 100_000, 8192, 64)).all()
        assert relu[-1] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("gamma", [0.7, 2.0, 8.0])
def test_laws_on_a_spectrum_agree_with_finite_gamma_at_full_rank(gamma):
    d = 1024
    expected = float(theory.dead_total_finite_gamma(gamma, 100_000, 8192, 64))
    integral = theory.token_integral(gamma, d, d, 100_000, 8192, 64)
    cosines = gamma / np.sqrt(gamma**2 + np.random.default_rng(0).chisquare(d, size=2000) / d)
    spectrum = theory.spectrum_law(np.ones(d - 1), cosines, 100_000, 8192, 64)
    assert theory.spectrum_law(np.zeros(d - 1), cosines, 100_000, 8192, 64) == spectrum  # rounding has left nothing
    for found in (integral, spectrum):
        assert found["dead_total"] == pytest.approx(expected, abs=0.01)
        assert found["dead_by_relu"] == pytest.approx(
            float(theory.dead_by_relu_finite_gamma(gamma, 100_000)), abs=0.01
        )


@pytest.mark.parametrize("d", [2, 3])
def test_where_nothing_varies_all_directions_are_alike(d):
    cosines = np.linspace(-0.5, 0.9, 30)
    found, expected = (theory.spectrum_law(same, cosines, 100, 64, 4) for same in (np.zeros(d - 1), np.ones(d - 1)))
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0.1 < found["dead_total"] < 0.9


@pytest.mark.parametrize(
    ("rank", "gamma", "tail"), [(8, 1.0, 0), (16, 0.5, 0), (64, 3.0, 0), (64, 2.0, 3), (16, 3.0, 3)]
)
def test_laws_on_a_spectrum_and_probes_against_a_count(rng, rank, gamma, tail):
    d, n, k, n_tokens = 64, 2000, 20, 6000
    x = tokens(rng, n_tokens, d, rank, gamma, tail)
    counted = count_deaths(x, n, k)
    if not tail:
        law = theory.token_integral(gamma, rank, d, n_tokens, n, k)
        assert law["dead_total"] == pytest.approx(counted["dead_total"], abs=0.06)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    axis = unit.mean(axis=0) / np.linalg.norm(unit.mean(axis=0))
    across = unit - np.outer(unit @ axis, axis)
    values = np.maximum(np.linalg.eigvalsh(np.cov(across.T, ddof=0))[1:], 0)
    law = theory.spectrum_law(values, unit @ axis, n_tokens, n, k)
    w = stratified_rows(1024, axis, rng)
    probe = Forecast(w, np.sqrt(d) * np.max(unit @ w.T, axis=0)).deaths(n, k)
    for key in ("dead_by_relu", "dead_total"):
        assert law[key] == pytest.approx(counted[key], abs=0.06)
        assert probe[key] == pytest.approx(counted[key], abs=0.03 + 2 * np.sqrt(0.25 / 1024))


@pytest.mark.parametrize("d", [2, 8, 64])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1e3, np.inf])
@pytest.mark.parametrize("size", [(8, 1), (64, 40), (1, 1)])
def test_laws_are_fractions_in_order_in_every_corner(d, gamma, size):
    found = [theory.token_integral(gamma, rank, d, 1000, *size) for rank in (1, 1.5, min(d, 3))]
    found.append(theory.two_gammas(gamma, gamma, 2, d, 1000, *size))
    for cosines in (np.ones(20), np.zeros(20), np.linspace(-1, 1, 20)):
        for eigenvalues in (np.ones(d - 1), np.eye(d - 1)[0], np.zeros(d - 1)):
            found.append(theory.spectrum_law(eigenvalues, cosines, 1000, *size))
    found.append({
        "dead_by_relu": float(theory.dead_by_relu_finite_gamma(gamma, 1000)),
        "dead_total": float(theory.dead_total_finite_gamma(gamma, 1000, *size)),
    })
    for deaths in found:
        assert 0 <= deaths["dead_by_relu"] <= deaths["dead_total"] + 1e-12 <= 1 + 1e-9


def test_laws_at_small_width_against_a_count(rng):
    x = tokens(rng, 6000, 8, 7, 1.0)
    counted = count_deaths(x, 2000, 20)["dead_total"]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    axis = unit.mean(axis=0) / np.linalg.norm(unit.mean(axis=0))
    values = np.linalg.eigvalsh(np.cov((unit - np.outer(unit @ axis, axis)).T, ddof=0))[1:]
    assert theory.spectrum_law(values, unit @ axis, 6000, 2000, 20)["dead_total"] == pytest.approx(counted, abs=0.05)


def test_two_gammas_goes_without_a_jump_from_one_cause_of_the_gap_to_the_other():
    def integral(gamma):
        return theory.token_integral(gamma, 100, 768, 100_000, 8192, 64)

    def dead(raw):
        return theory.two_gammas(1.5, raw, 100, 768, 100_000, 8192, 64)["dead_total"]

    assert theory.two_gammas(1.0, 1.5, 100, 768, 100_000, 8192, 64) == integral(1.5)
    for raw in (1.4999, 0.02, 1e-9, 0.0):  # no gap; or nothing but excess
        assert dead(raw) == pytest.approx(integral(1.5)["dead_total"], abs=0.01)
    for gamma in np.geomspace(1e-3, 1e3, 300):  # of LayerNormed tokens the two agree but for rounding
        signal, v = theory.signal_and_spread(gamma, np.nextafter(gamma, 0))
        assert (signal, v) == pytest.approx((gamma, 0), abs=1e-9)
    found = np.array([dead(raw) for raw in np.linspace(0.05, 1.5, 30)])
    assert np.abs(np.diff(found)).max() < 0.08
    assert found.min() < integral(1.5)["dead_total"] - 0.1


def test_two_gammas_finds_the_spread_it_assumes(rng):
    """On tokens made as it supposes, it comes closer to the count than the law that knows one gamma only.

    Its gap has one of the two causes alone, and the law is the mean over both: nearest is that cause's own.
    """
    d, n, k, n_tokens = 64, 2000, 20, 6000
    x = tokens(rng, n_tokens, d, d, 0.0)
    own, signal = (np.exp(rng.normal(size=(n_tokens, 1)) * np.sqrt(0.5) / 2) for _ in range(2))
    x = own * (np.full(d, 2 / np.sqrt(d)) + signal / np.sqrt(np.mean(signal**2)) * x)
    directions = x / np.linalg.norm(x, axis=1, keepdims=True)  # nothing here lies along all-ones but mu itself
    gamma, raw = (np.linalg.norm(y.mean(0)) / np.linalg.norm(y.std(0)) for y in (directions, x))
    counted = count_deaths(x, n, k)["dead_total"]
    plain = theory.token_integral(gamma, d, d, n_tokens, n, k)["dead_total"]
    both = theory.two_gammas(gamma, raw, d, d, n_tokens, n, k)["dead_total"]
    signal, v = theory.signal_and_spread(gamma, raw)
    own_cause = theory.token_integral(signal, d, d, n_tokens, n, k, tau_log_variance=v)["dead_total"]
    assert abs(own_cause - counted) < 0.03 < abs(both - counted) < abs(plain - counted)


@pytest.mark.parametrize("rank", [1, 1.01, 2, 20, 700])
def test_the_table_of_a_law_is_its_sum(rank):
    """Over the whole range of float64 that decides anything, also where there is no rest at all."""
    rest = theory._rest((rank - 1) / 2, max(1 - 1 / rank, 1e-9))
    roots = np.sqrt(np.maximum(rest, 1e-12))
    height = np.concatenate([np.linspace(-40, 40, 4001), np.geomspace(1e-6, 1e7, 500), [-np.inf, np.inf]])
    whole = np.sum(theory.REST_LEVELS[1][:, None] * ndtr(-height * roots), axis=0)
    found = theory._beyond(height[None], roots)[0]
    counts = whole > 1e-30
    np.testing.assert_allclose(found[counts], whole[counts], rtol=2e-4)
    assert (found[~counts] < 1e-29).all()


def test_bias_learning_time_by_direction_of_the_mean():
    one, spread = np.zeros(256), np.full(256, 20.0)
    one[3] = -320
    assert theory.bias_learning_time(one) == pytest.approx(288)
    assert theory.bias_learning_time(spread) == pytest.approx(18)
    uneven = np.array([3.0, 4.0])  # 25 in all; at T = 3 it has 9 + 12, then 4 a unit
    assert theory.bias_learning_time(uneven, 0.5) == pytest.approx(12.5 / 7)
    assert theory.bias_learning_time(uneven, 0.96) == pytest.approx(3.75)
    assert theory.bias_learning_time(uneven, 0.1) == pytest.approx(2.5 / 7)
    assert theory.bias_learning_time(np.zeros(4)) == 0


def test_few_nodes_for_many_are_as_fine_at_one_end_as_at_the_other():
    rng = np.random.default_rng(0)
    cosine, weight = rng.normal(size=5000), rng.uniform(0.5, 1.5, 5000)
    weight /= weight.sum()
    nodes, mirrored = theory._condensed(cosine, weight), theory._condensed(-cosine, weight)
    np.testing.assert_allclose(mirrored.cosine, -nodes.cosine[::-1], atol=1e-9)
    np.testing.assert_allclose(mirrored.weight, nodes.weight[::-1], atol=1e-12)
    assert nodes.cosine @ nodes.weight == pytest.approx(cosine @ weight, abs=1e-12)
    assert len(nodes.cosine) < 150
    assert max(nodes.weight[0], nodes.weight[-1]) < 1e-3


@pytest.mark.parametrize(("gamma", "raw"), [(3.0, 2.0), (1.0, 0.7), (8.0, 1.5)])
def test_the_signal_and_its_spread_solve_the_two_equations(gamma, raw):
    """Both expectations by the quantiles of a lognormal, ten thousand of them."""
    signal, v = theory.signal_and_spread(gamma, raw)
    tau_square = np.exp(np.sqrt(v) * norm.ppf((np.arange(10_000) + 0.5) / 10_000))
    tau_square /= tau_square.mean()
    found = np.mean((1 + tau_square / signal**2) ** -0.5) ** 2
    assert found == pytest.approx(gamma**2 / (1 + gamma**2), rel=5e-3)
    assert signal**2 / (np.exp(v / 4) * (signal**2 + 1) - signal**2) == pytest.approx(raw**2, rel=1e-6)


# -- against sums over the normal variable itself ----------------------------------------------------------------------
#
# The laws ask how large z must be, and know by how much for every rest. Here every z is asked how small the rest must
# be, which scipy's incomplete gamma function answers.


def midpoints(count):
    """Of equal shares of probability."""
    return (np.arange(count) + 0.5) / count


def rows_along_axis(count, d):
    """√d times one coordinate of a random direction; its square is d·Beta(1/2, (d − 1)/2)."""
    side = 2 * midpoints(count) - 1
    return np.sign(side) * np.sqrt(d * beta.ppf(np.abs(side), 0.5, (d - 1) / 2))


def passing(along, spread, share, freedom, cosine, height):
    """Of each row P(along·cos + sin·spread·z / √(share·z² + rest) > height), the rest gamma of mean 1 − share."""
    z = (np.arange(400) - 199.5) / 25
    weight = norm.pdf(z) / norm.pdf(z).sum()
    found = np.zeros(len(along))
    for c in cosine:
        needed = (height - along * c) / np.sqrt(1 - c**2)
        small = (z**2 * ((spread / needed) ** 2 - share)[:, None]) * (freedom / (1 - share))[:, None]
        below = gammainc(freedom[:, None], np.maximum(small, 0))
        passes = np.where(needed[:, None] > 0, (z > 0) * below, 1 - (z < 0) * below)
        found += passes @ weight / len(cosine)
    return found


@pytest.mark.parametrize("alike", [True, False])  # one curve for all rows, or a curve for each
@pytest.mark.parametrize("row", [
    (0.5, 1.2, 0.1, 4.5, 0.3), (-1.5, 0.9, 0.4, 1.0, 0.6), (-1.5, 0.8, 0.05, 12.0, 0.5), (-1.0, 1.0, 0.3, 0.5, -0.4),
    (0.2, 1.1, 0.6, 0.5, 0.1),
])  # fmt: skip
@pytest.mark.parametrize("height", [0.3, 1.0])
def test_a_row_lives_as_often_as_some_token_takes_it_past_the_bar(row, height, alike):
    along, spread, share, freedom, cosine = row
    one = np.ones(1 if alike else 2)
    rows, tokens = theory.EncoderRows(along * one, spread * one, share * one), theory.Cosines(np.r_[cosine], np.ones(1))
    rest = theory._rest(freedom * one, (1 - share) * one)
    for key, bar in (("dead_by_relu", 0.0), ("dead_total", height)):
        chance = passing(*(np.r_[value] for value in row), bar)[0]
        n_tokens = round(1 / max(chance, 1e-3))
        found = theory._deaths(rows, tokens, rest, height, n_tokens)[key]
        assert found == pytest.approx((1 - chance) ** n_tokens, abs=6e-3)


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize(("gamma", "rank", "d", "n_tokens", "n", "k"), [
    (1.0, 3, 8, 300, 64, 4), (2.0, 8, 32, 1000, 512, 8), (0.5, 5, 16, 500, 256, 8), (1.0, 7, 8, 300, 64, 4),
    (1.5, 15, 16, 300, 64, 4),
])  # fmt: skip
def test_the_token_integral_is_its_integral(gamma, rank, d, n_tokens, n, k, tau):
    """p(a, b) of its docstring, summed over z, q and tau, for a grid of rows."""
    within = beta.ppf(midpoints(16), rank / 2, (d - 1 - rank) / 2) if rank < d - 1 else np.ones(1)
    a, within = (grid.ravel()[:, None] for grid in np.meshgrid(rows_along_axis(200, d), within))
    b = np.sqrt((d - a**2) * within)
    z = (np.arange(66) - 32.5) / 5
    weight = norm.pdf(z) / norm.pdf(z).sum()
    sizes = np.exp(np.sqrt(tau) * norm.ppf(midpoints(60 if tau else 1)))  # tau²
    sizes /= sizes.mean()
    t = np.sqrt(d * beta.isf(2 * k / n, 0.5, (d - 1) / 2))
    positive = passes = 0.0
    for size in sizes:
        positive += norm.cdf(gamma * a * np.sqrt(rank / size) / b)[:, 0] / len(sizes)
        seen = gamma * a + np.sqrt(size / rank) * b * z
        q = rank * ((seen / t) ** 2 - gamma**2) / size - z**2
        passes += (seen > 0) * gammainc((rank - 1) / 2, np.maximum(q, 0) / 2) @ weight / len(sizes)
    found = theory.token_integral(gamma, rank, d, n_tokens, n, k, tau_log_variance=tau)
    assert found["dead_by_relu"] == pytest.approx(np.mean((1 - positive) ** n_tokens), abs=2.5e-3)
    assert found["dead_total"] == pytest.approx(np.mean((1 - passes) ** n_tokens), abs=2.5e-3)


@pytest.mark.parametrize(("eigenvalues", "cosines"), [
    (np.geomspace(1, 1e-3, 15), [0.9, 0.95]), (np.r_[8.0, np.ones(23)], [0.7, 0.9]),
    (np.r_[np.ones(4), np.zeros(7)], [0.8, 0.9]), (np.geomspace(3, 0.03, 100), [0.8, 0.95]),
])  # fmt: skip
def test_the_law_on_a_spectrum_is_its_sum(rng, eigenvalues, cosines):
    """Rows of its own; the rest of ‖s‖² is gamma of the mean and the variance that λ leaves it."""
    d, n_tokens, n, k = len(eigenvalues) + 1, 400, 256, 8
    lam = eigenvalues / eigenvalues.sum()
    along = rows_along_axis(4000, d)
    w = rng.normal(size=(4000, d - 1))
    w *= np.sqrt((d - along**2) / np.sum(w**2, axis=1))[:, None]
    spread = np.sqrt(w**2 @ lam)
    share = w**2 @ lam**2 / spread**2
    freedom = (1 - share) ** 2 / (2 * (lam @ lam - share**2))
    found = theory.spectrum_law(eigenvalues, np.array(cosines), n_tokens, n, k)
    t = np.sqrt(d * beta.isf(2 * k / n, 0.5, (d - 1) / 2))
    for key, bar, error in (("dead_by_relu", 0.0, 3e-3), ("dead_total", t, 8e-3)):
        chance = passing(along, spread, share, freedom, cosines, bar)
        assert found[key] == pytest.approx(np.mean((1 - chance) ** n_tokens), abs=error), key


def test_in_the_plane_the_laws_are_arcs_of_a_circle():
    """All tokens at 0.9 rad to either side of the mean: a row is dead unless it is within π·k/n of one of them."""
    angle, n, k = 0.9, 64, 4
    found = theory.spectrum_law(np.ones(1), np.full(20, np.cos(angle)), 10**6, n, k)
    assert found["dead_by_relu"] == pytest.approx(0.5 - angle / np.pi, abs=2e-3)
    assert found["dead_total"] == pytest.approx(1 - 2 * k / n, abs=2e-3)


def test_directions_along_an_axis_in_closed_form():
    """On a line two, on a circle a sine, on a sphere evenly spread (Archimedes); thresholds are the same from above."""
    p = np.array([0.01, 0.2, 0.49, 0.6, 0.95])
    np.testing.assert_array_equal(theory.along_axis(p, 1), [-1, -1, -1, 1, 1])
    np.testing.assert_allclose(theory.along_axis(p, 2), np.sqrt(2) * np.sin(np.pi * (p - 0.5)), rtol=1e-9)
    np.testing.assert_allclose(theory.along_axis(p, 3), np.sqrt(3) * (2 * p - 1), rtol=1e-9)
    np.testing.assert_array_equal(theory.alignment_threshold(p, 1), [1, 1, 1, 0, 0])
    np.testing.assert_allclose(theory.alignment_threshold(p[:3], 2), np.sqrt(2) * np.cos(np.pi * p[:3]), rtol=1e-9)
    np.testing.assert_allclose(theory.alignment_threshold(p[:3], 3), np.sqrt(3) * (1 - 2 * p[:3]), rtol=1e-9)
    assert (theory.alignment_threshold(p[3:], 3) == 0).all()
    assert theory.top_k_threshold(100, 16) == pytest.approx(0.994458, abs=1e-6)
    assert theory.top_k_threshold(100, 60) == 0  # ReLU comes before top-k


@pytest.mark.parametrize(("n_tokens", "n", "k"), [(1000, 512, 8), (100_000, 8192, 64), (3, 1024, 1)])
def test_the_laws_of_gamma_are_their_formulae(n_tokens, n, k):
    gamma = np.array([0.3, 1.0, 2.5, 7.0])
    t, c = norm.isf(k / n), norm.isf(1 / n_tokens)
    median = norm.ppf(0.5 ** (1 / n_tokens))
    np.testing.assert_allclose(theory.dead_by_relu_paper(gamma, n_tokens), norm.cdf(-c / gamma))
    np.testing.assert_allclose(theory.dead_total_paper(gamma, n_tokens, n, k), norm.cdf(t - c / gamma))
    np.testing.assert_allclose(theory.dead_by_relu_finite_gamma(gamma, n_tokens), norm.cdf(-median / gamma))
    np.testing.assert_allclose(
        theory.dead_total_finite_gamma(gamma, n_tokens, n, k),
        norm.cdf(t * np.sqrt(1 + 1 / gamma**2) - median / gamma),
    )
    alike = theory.dead_total_finite_gamma(0.0, n_tokens, n, k)  # three tokens do not reach the bar of 1 in 1024
    assert alike == (1 if n_tokens == 3 else 0)


def test_two_gammas_is_the_mean_over_the_two_causes_of_the_gap():
    """Weighed by the variance that gamma leaves room for, (1.2 / 1.5)²."""
    size = (10, 64, 1000, 512, 8)
    signal, v = theory.signal_and_spread(1.5, 1.2)
    spread, massive = theory.token_integral(signal, *size, tau_log_variance=v), theory.token_integral(1.5, *size)
    found = theory.two_gammas(1.5, 1.2, *size)
    for key, share in found.items():
        assert share == pytest.approx(0.64 * spread[key] + 0.36 * massive[key], rel=1e-9)
    assert theory.two_gammas(1.2, 1.5, *size) == theory.token_integral(1.5, *size)


def test_a_rank_is_at_most_what_the_mean_leaves():
    """Of d dimensions one is the mean's: the signal has the other three, however many are said."""
    found = theory.token_integral(1.0, 40, 4, 300, 64, 4)
    assert found == theory.token_integral(1.0, 3, 4, 300, 64, 4)
    assert found["dead_total"] != theory.token_integral(1.0, 2.9, 4, 300, 64, 4)["dead_total"]
