import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize

from sae_jax.outliers import moments as moments_lib


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_streamed_moments_of_float32_equal_float64_in_one_go(rng, offset):
    x = (rng.normal(size=(1000, 7)) ** 2 * np.arange(1, 8) + offset).astype(np.float32)
    cuts = [0, 1, 17, 400, 1000]
    got = moments_lib.severity((x[a:b] for a, b in zip(cuts, cuts[1:], strict=False)), covariance=True).raw
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(got.mean, x64.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.sigma, x64.std(0), rtol=1e-9)
    np.testing.assert_allclose(got.gamma, np.linalg.norm(x64.mean(0)) / np.linalg.norm(x64.std(0)), rtol=1e-9)
    np.testing.assert_allclose(got.kurtosis, stats.kurtosis(x64), rtol=1e-7)
    np.testing.assert_allclose(got.cube / len(x), stats.moment(x64, 3), rtol=1e-7)
    np.testing.assert_allclose(got.scatter / len(x), np.cov(x64.T, ddof=0), rtol=1e-8, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), min_size=2, max_size=6), st.floats(-1e4, 1e4))
def test_merging_parts_in_any_order_is_one_pass(seed, sizes, offset):
    rng = np.random.default_rng(seed)
    parts = [rng.exponential(size=(size, 3)) * 10 ** rng.uniform(-2, 2, 3) + offset for size in sizes]
    moments = [moments_lib.moments(part, covariance=True) for part in parts]
    whole = moments_lib.moments(np.concatenate(parts), covariance=True)
    left = moments[0]
    for part in moments[1:]:
        left = moments_lib.merge(left, part)
    right = moments[-1]
    for part in reversed(moments[:-1]):
        right = moments_lib.merge(part, right)
    for merged in (left, right):
        assert merged.n_tokens == whole.n_tokens
        scale = np.sqrt(whole.square / whole.n_tokens) + 1e-9 * abs(offset)
        for power, name in enumerate(("mean", "square", "cube", "fourth"), start=1):
            size = scale**power * (whole.n_tokens if power > 1 else 1)
            np.testing.assert_allclose(getattr(merged, name) / size, getattr(whole, name) / size, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-6, atol=1e-8 * np.abs(whole.scatter).max())


def test_gammas_do_not_change_with_global_scale_and_the_forms_differ_as_defined(rng):
    x = rng.normal(size=(500, 6)) + 3.0  # an outlier along the all-ones direction: LayerNorm takes it away
    a, b = moments_lib.severity([x]).gammas(), moments_lib.severity([1e3 * x]).gammas()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4)
    assert a["gamma_raw"] == pytest.approx(3.0, rel=0.1)
    assert a["gamma"] < 0.2
    rescaled = moments_lib.severity([x * rng.uniform(0.5, 20, size=(500, 1))]).gammas()
    assert rescaled["gamma_direction"] == pytest.approx(a["gamma_direction"], rel=1e-9)
    assert rescaled["gamma_raw"] < 0.7 * a["gamma_raw"]


def test_effective_rank_of_known_spectra(rng):
    assert moments_lib.effective_rank(np.ones(12)) == pytest.approx(12)
    assert moments_lib.effective_rank(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert moments_lib.effective_rank(np.array([0.5, 0.25, 0.25])) == pytest.approx(2 ** 1.5)
    x = rng.normal(size=(4000, 10)) @ np.diag([3.0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    values, vectors = moments_lib.moments(x, covariance=True).eigen
    np.testing.assert_allclose(values[:4], [9, 1, 1, 1], rtol=0.1)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(10), atol=1e-9)
    with pytest.raises(ValueError, match="without the covariance"):
        _ = moments_lib.moments(x).eigenvalues


def test_outlier_dimensions_come_largest_first(rng):
    x = rng.normal(size=(1000, 8))
    x[:, 2] += 5
    x[:, 6] -= 20
    assert moments_lib.moments(x).outlier_dimensions.tolist() == [6, 2]


def test_no_activations_are_refused():
    with pytest.raises(ValueError, match="no activations"):
        moments_lib.severity([])


def test_geometric_median_minimises_the_mean_distance(rng):
    x = rng.normal(size=(400, 4)) + 2
    x[:40] *= 50  # a tenth of the tokens far out: the mean follows them, the median hardly
    got = moments_lib.geometric_median(lambda: np.array_split(x, 7), x.mean(0), tolerance=1e-7, max_iterations=1000)
    best = minimize(lambda c: np.linalg.norm(x - c, axis=1).mean(), x.mean(0), tol=1e-12).x
    np.testing.assert_allclose(got, best, atol=1e-4)
    assert np.linalg.norm(got - 2) < 0.5 < np.linalg.norm(x.mean(0) - 2)


@pytest.mark.parametrize("start", range(4))
def test_geometric_median_leaves_a_token_it_starts_on(start):
    x = np.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    got = moments_lib.geometric_median(lambda: [x], x[start], tolerance=1e-8, max_iterations=1000)
    best = minimize(lambda c: np.linalg.norm(x - c, axis=1).sum(), x.mean(0), method="Nelder-Mead").fun
    assert np.linalg.norm(x - got, axis=1).sum() == pytest.approx(best, rel=1e-4)


def test_the_first_step_from_tokens_is_shorter_by_their_pull():
    """Two tokens lie where it starts: of Weiszfeld's step of the others 1 − 2 / ‖R‖ is taken (Vardi and Zhang)."""
    x = np.asarray([[1.0, 1.0]] * 2 + [[2.0, 1.0], [1.0, 4.0], [3.0, 5.0], [5.0, 1.0]])
    away = x[2:] - 1
    distance = np.linalg.norm(away, axis=1)
    pull = (away / distance[:, None]).sum(axis=0)
    step = (1 - 2 / np.linalg.norm(pull)) * pull / np.sum(1 / distance)
    got = moments_lib.geometric_median(lambda: [x[:3], x[3:]], x[0], max_iterations=1)
    np.testing.assert_allclose(got, 1 + step, rtol=1e-12)


def test_geometric_median_stays_on_a_token_that_is_it():
    x = np.asarray([[0.0, 0.0]] * 5 + [[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    np.testing.assert_array_equal(moments_lib.geometric_median(lambda: [x], x[0]), [0, 0])


def test_a_part_without_rows_changes_nothing(rng):
    a = moments_lib.moments(rng.normal(size=(9, 3)), True)
    none = moments_lib.Moments(0, *(np.zeros(3) for _ in range(4)))
    assert moments_lib.merge(a, none) is a
    assert moments_lib.merge(none, a) is a


@pytest.mark.parametrize("power", [-20, 20])
def test_the_geometric_median_of_tokens_in_other_units_is_in_those_units(rng, power):
    """A power of two changes no digit: neither the point nor where the iteration stops may hang on the units."""
    x = rng.exponential(size=(300, 4)) ** 3
    plain, scaled = (
        moments_lib.geometric_median(lambda c=c: [x * c], x.mean(axis=0) * c, tolerance=1e-3) for c in (1.0, 2.0**power)
    )
    np.testing.assert_array_equal(scaled, plain * 2.0**power)


def test_dimensions_that_stand_out_have_their_share_of_the_mean(rng):
    x = rng.normal(size=(500, 6)) + [0, -8, 0, 5, 0, 0]
    x[:, 5] = 4.0  # does not vary
    first, *rest = moments_lib.standing_out(found := moments_lib.moments(x))
    mean = x.mean(axis=0)
    assert [first["dimension"], *(one["dimension"] for one in rest)] == [1, 3, 5]
    assert first["share_of_mean_square"] == pytest.approx(mean[1] ** 2 / (mean @ mean))
    assert first["mean_over_sigma"] == pytest.approx(-mean[1] / x[:, 1].std())
    assert rest[1]["mean_over_sigma"] is None
    assert len(moments_lib.standing_out(found, most=2)) == 2


def test_a_spectrum_is_that_of_numpy_whole_and_perpendicular_to_the_mean(rng):
    """Variances under 1 as well; across the mean in a basis of its complement."""
    x = rng.normal(size=(300, 6)) * np.geomspace(2, 1e-3, 6) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    found = moments_lib.moments(x, covariance=True)
    covariance = np.cov(x.T, ddof=0)
    values = np.linalg.eigvalsh(covariance)[::-1]
    basis = np.linalg.svd(x.mean(axis=0)[None])[2][1:]
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-6)
    np.testing.assert_allclose(found.eigen[0], values, rtol=1e-6)
    np.testing.assert_allclose(found.eigen[1] @ covariance, values[:, None] * found.eigen[1], atol=1e-12 * values[0])
    across = np.linalg.eigvalsh(basis @ covariance @ basis.T)[::-1]
    np.testing.assert_allclose(found.across_mean, across, rtol=1e-6)
    np.testing.assert_allclose(found.axis, x.mean(axis=0) / np.linalg.norm(x.mean(axis=0)))
    still = moments_lib.moments(np.stack([x - x.mean(axis=0), x.mean(axis=0) - x]).reshape(-1, 6), covariance=True)
    assert moments_lib.merge(still, still).across_mean.shape == (5,)


def test_where_there_is_no_mean_or_nothing_varies():
    up_and_down = np.array([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]])
    found = moments_lib.moments(up_and_down, covariance=True)
    assert found.gamma == 0
    assert found.axis.tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.across_mean, [4, 0], atol=1e-12)
    assert moments_lib.moments(np.ones((4, 3))).gamma == np.inf
    assert moments_lib.effective_rank(np.zeros(3)) == 1
    assert moments_lib.effective_rank(np.full(3, 0.01)) == pytest.approx(3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_layer_norm_and_directions_of_short_tokens_and_long(size):
    """LayerNorm adds 1e-5 to the variance; a direction has length 1 however short the token."""
    x = size * np.array([[3.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    normed = moments_lib.layer_norm(x)
    np.testing.assert_allclose(normed[0], size * np.array([2, 0, -2, 0]) / np.sqrt(2 * size**2 + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(normed[2], size * np.array([3, -1, -1, -1]) / np.sqrt(3 * size**2 + 4e-5), rtol=1e-12)
    assert not normed[1].any()
    expected = [np.array([3, 1, -1, 1]) / np.sqrt(12), np.zeros(4), [1, 0, 0, 0]]
    np.testing.assert_allclose(moments_lib.direction(x), expected, rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_gamma_of_short_tokens_is_that_of_long_ones(rng, factor):
    x = rng.normal(size=(200, 5)) + 2
    gamma = np.linalg.norm(x.mean(axis=0)) / np.linalg.norm(x.std(axis=0))
    found = moments_lib.moments(factor * x)
    assert found.gamma == pytest.approx(gamma, rel=1e-9)
    np.testing.assert_allclose(found.axis, x.mean(axis=0) / np.linalg.norm(x.mean(axis=0)), rtol=1e-9)


def test_covariances_are_there_where_they_were_asked_for(rng):
    x = rng.normal(size=(50, 4)) + 1
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    every = moments_lib.severity([x[:20], x[20:]], covariance=True)
    np.testing.assert_allclose(every.directions.covariance, np.cov(unit.T, ddof=0), rtol=1e-9, atol=1e-15)
    two = moments_lib.severity([x[:20], x[20:]], covariance=True, of_directions=False)
    np.testing.assert_array_equal(two.layer_normed.scatter, every.layer_normed.scatter)
    assert two.directions.scatter is None
    assert all(one.scatter is None for one in moments_lib.severity([x]))
    assert all(one.scatter is None for one in moments_lib.severity([x], of_directions=True))


def test_a_dimension_stands_out_from_three_deviations_on_and_fifty_are_named():
    x = np.array([2.0, 4.0])[:, None] * np.ones(60)  # mean 3, deviation 1
    x[:, ::2] -= 0.5
    found = moments_lib.moments(x)
    assert found.outlier_dimensions.tolist() == list(range(1, 60, 2))
    named = moments_lib.standing_out(moments_lib.moments(np.hstack([x, x])[:, 1::2]))
    assert [one["dimension"] for one in named] == list(range(50))
    assert {one["mean_over_sigma"] for one in named} == {3.0}
    assert [one["share_of_mean_square"] for one in named] == pytest.approx([1 / 60] * 50)


def test_the_geometric_median_stops_where_it_is_told_to(rng):
    passes = []

    def batches():
        passes.append(1)
        return [x]

    x = rng.exponential(size=(300, 4)) ** 3
    moments_lib.geometric_median(batches, x.mean(axis=0), tolerance=0.0, max_iterations=7)
    assert len(passes) == 7
    near = moments_lib.geometric_median(batches, x.mean(axis=0), tolerance=1e9)
    assert len(passes) == 8  # the first step is short enough
    weight = 1 / np.linalg.norm(x - x.mean(axis=0), axis=1)
    np.testing.assert_allclose(near, weight @ x / weight.sum(), rtol=1e-12)
