import numpy as np
import pytest
from scipy.stats import beta

from sae_jax.outliers.probes import Forecast, places, stratified_rows
from sae_jax.outliers.selections import Selection


def test_probes_are_unit_rows_spread_evenly_along_the_mean(rng):
    mean = rng.normal(size=32)
    w = stratified_rows(500, mean, rng)
    np.testing.assert_allclose(np.linalg.norm(w, axis=1), 1)
    along = w @ mean / np.linalg.norm(mean)
    assert (np.diff(along) > 0).all()
    level = 0.5 * (1 + np.sign(along) * beta.cdf(along**2, 0.5, 31 / 2))  # uniform for random directions
    np.testing.assert_allclose(level, (np.arange(500) + 0.5) / 500, atol=1 / 500)
    np.testing.assert_allclose(np.linalg.norm(stratified_rows(5, np.zeros(8), rng), axis=1), 1)


def test_stratified_probes_scatter_less_than_independent_ones(rng):
    x = rng.normal(size=(3000, 128)) + 2 * np.sqrt(128) * np.eye(128)[5]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = {True: [], False: []}
    for _ in range(30):
        for stratified, values in found.items():
            w = stratified_rows(128, x.mean(axis=0) if stratified else np.zeros(128), rng)
            values.append(Forecast(w, np.sqrt(128) * (x @ w.T).max(axis=0)).deaths(4096, 32)["dead_total"])
    assert np.std(found[True]) < 0.7 * np.std(found[False])
    assert np.mean(found[True]) == pytest.approx(np.mean(found[False]), abs=0.03)


def test_the_death_curve_falls_with_k_and_its_band_holds_it(rng):
    best = rng.normal(size=512) + 1.5
    found = Forecast(np.zeros((512, 256)), best)
    band = found.curve(np.array([0.001, 0.01, 0.1, 0.5]))
    assert (np.diff(band.dead) <= 0).all()
    assert ((band.low <= band.dead) & (band.dead <= band.high)).all()
    assert band.dead[1] == found.deaths(1000, 10)["dead_total"]
    assert band.dead[-1] == np.mean(best <= 0)
    clear = found._replace(best=np.full(512, 9.0)).curve(np.array([0.01]))
    assert (clear.dead[0], round(clear.high[0], 4)) == (0, 0.0074)  # no death in 512 is not proof of none


@pytest.mark.parametrize(("n_features", "n_effective"), [(None, 512), (64, 1 / (1 / 512 + 1 / 64))])
def test_the_band_is_wilsons_for_the_probes_and_the_rows_of_one_sae(n_features, n_effective):
    """Its ends solve (share − end)² = 1.96² · end (1 − end) / n (Wilson 1927). Neighbours differ: no gain of strata."""
    found = Forecast(np.zeros((512, 256)), np.where(np.arange(512) % 2, 9.0, -1.0))
    band = found.curve(np.array([0.01]), n_features)
    assert band.dead[0] == 0.5
    for end in (band.low[0], band.high[0]):
        assert (0.5 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n_effective, rel=1e-5)


def test_where_neighbours_agree_the_band_counts_for_more_rows_but_not_for_as_many_as_few_deaths_suggest():
    """512 probes of which the first 128 are dead: neighbours never differ. The variance between them counts as that of
    four pairs more, as independent rows would have it, so that the rows count (512 · 0.25 · 0.75 + 4) / 4 times."""
    found = Forecast(np.zeros((512, 256)), np.where(np.arange(512) < 128, -1.0, 9.0))
    band = found.curve(np.array([0.01]))
    for end in (band.low[0], band.high[0]):
        assert (0.25 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / (512 * 25), rel=1e-5)


@pytest.mark.parametrize("length", [1e-6, 0.5, 1e6])
def test_rows_are_stratified_along_a_mean_of_any_length(rng, length):
    mean = rng.normal(size=6)
    mean /= np.linalg.norm(mean)
    plain, scaled = (stratified_rows(40, by * mean, np.random.default_rng(5)) for by in (1.0, length))
    np.testing.assert_allclose(scaled, plain, atol=1e-12)
    assert (np.diff(scaled @ mean) > 0).all()
    across = stratified_rows(20_000, mean, rng)
    across -= np.outer(across @ mean, mean)
    basis = np.linalg.svd(mean[None])[2][1:]
    np.testing.assert_allclose(np.mean(across**2, axis=0).sum(), 5 / 6, rtol=0.01)  # as of all random directions
    np.testing.assert_allclose((across @ basis.T).T @ (across @ basis.T) / 20_000, np.eye(5) / 6, atol=0.01)


@pytest.mark.parametrize(("n", "k", "where"), [
    (8, 3, [8 / 64, 0.5 * 2**-1.75, 0.5 * 2**-1.5, 0.5 * 2**-1.25, 0.25, 0.5 * 2**-0.75, 0.5 * 2**-0.5, 3 / 8,
            0.5 * 2**-0.25, 0.5]),
    (4, 1, [0.25, 0.5 * 2**-0.75, 0.5 * 2**-0.5, 0.5 * 2**-0.25, 0.5]),
    (64, 50, [*(2.0 ** (np.arange(-24, -3) / 4)), 50 / 64]),
])  # fmt: skip
def test_the_death_curve_is_drawn_four_an_octave_from_one_feature_to_half(n, k, where):
    np.testing.assert_allclose(places(Selection(), n, k), where, rtol=1e-12)
    np.testing.assert_allclose(places(Selection("batch_topk"), n, k), where, rtol=1e-12)


def test_the_curve_of_a_threshold_is_drawn_four_octaves_to_either_side():
    np.testing.assert_allclose(places(Selection("jumprelu", 0.3), 64, 4), np.geomspace(0.3 / 16, 0.3 * 16, 33))
    assert places(Selection("relu"), 64, 4).tolist() == [0]


@pytest.mark.parametrize(("selection", "at", "dead"), [
    (Selection("relu"), 0.0, 0.4), (Selection("jumprelu", 0.3), 0.3, 0.6), (Selection("jumprelu", 3.0), 3.0, 1.0),
    (Selection(), 0.125, 0.8),
])  # fmt: skip
def test_a_probe_that_is_never_above_zero_or_under_the_bar_is_dead(selection, at, dead):
    """In three dimensions 1/8 of all directions have √d·cos above √3·(1 − 2/8) = 1.3."""
    found = Forecast(np.eye(3)[[0, 1, 2, 0, 1]], np.array([-1.0, 0.0, 0.2, 0.5, 2.0]), selection)
    assert found.at(64, 8) == at
    assert found.deaths(64, 8) == {"dead_by_relu": 0.4, "dead_total": pytest.approx(dead)}


@pytest.mark.parametrize(("dead_probes", "differ"), [([2, 3, 6, 7], 0), ([2, 3, 4, 5, 7], 1), ([1, 4, 5, 6], 2)])
def test_an_odd_probe_has_no_neighbour_and_is_counted_all_the_same(dead_probes, differ):
    """Of nine four pairs are compared, the last of them as the first."""
    best = np.where(np.isin(np.arange(9), dead_probes), -1.0, 9.0)
    band = Forecast(np.zeros((9, 256)), best).curve(np.array([0.01]))
    dead = len(dead_probes) / 9
    rows = 9 * (9 * dead * (1 - dead) + 4) / (differ + 4)
    assert band.dead[0] == pytest.approx(dead)
    for end in (band.low[0], band.high[0]):
        assert (dead - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / rows, rel=1e-5)


def test_features_on_a_line_are_kept_in_their_order():
    """4 of 16 features, so as many of 8 probes as a quarter of all: the first two of either sign."""
    signs = np.array([1, 1, -1, 1, -1, -1, 1, -1.0])[:, None]
    found = Forecast(signs, np.ones(8)).deaths(16, 4)
    assert found == {"dead_by_relu": 0.0, "dead_total": 0.5}
    assert Forecast(signs, np.where(signs[:, 0] > 0, 1.0, -1.0)).deaths(16, 4) == {
        "dead_by_relu": 0.5, "dead_total": 0.75,
    }  # fmt: skip
    assert Forecast(signs, np.r_[0.0, np.ones(7)]).deaths(16, 16) == {"dead_by_relu": 0.125, "dead_total": 0.125}
