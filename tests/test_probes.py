import numpy as np
import pytest
from scipy.stats import beta

from sae_jax.outliers.probes import Forecast, stratified_rows


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
