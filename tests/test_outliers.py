import numpy as np
import pytest
from scipy.optimize import minimize

from sae_jax import outliers


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_streamed_moments_of_float32_equal_float64_in_one_go(rng, offset):
    x = (rng.normal(size=(1000, 7)) * np.arange(1, 8) + offset).astype(np.float32)
    cuts = [0, 1, 17, 400, 1000]
    got = outliers.severity(x[a:b] for a, b in zip(cuts, cuts[1:], strict=False)).raw
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(got.mean, x64.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.sigma, x64.std(0), rtol=1e-9)
    np.testing.assert_allclose(got.gamma, np.linalg.norm(x64.mean(0)) / np.linalg.norm(x64.std(0)), rtol=1e-9)


def test_gammas_do_not_change_with_global_scale_and_the_forms_differ_as_defined(rng):
    x = rng.normal(size=(500, 6)) + 3.0  # an outlier along the all-ones direction: LayerNorm takes it away
    a, b = outliers.severity([x]).gammas(), outliers.severity([1e3 * x]).gammas()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4)
    assert a["gamma_raw"] == pytest.approx(3.0, rel=0.1)
    assert a["gamma"] < 0.2
    rescaled = outliers.severity([x * rng.uniform(0.5, 20, size=(500, 1))]).gammas()
    assert rescaled["gamma_direction"] == pytest.approx(a["gamma_direction"], rel=1e-9)
    assert rescaled["gamma_raw"] < 0.7 * a["gamma_raw"]


def test_no_activations_are_refused():
    with pytest.raises(ValueError, match="no activations"):
        outliers.severity([])


def test_geometric_median_minimises_the_mean_distance(rng):
    x = rng.normal(size=(400, 4)) + 2
    x[:40] *= 50  # a tenth of the tokens far out: the mean follows them, the median hardly
    got = outliers.geometric_median(lambda: np.array_split(x, 7), x.mean(0), tolerance=1e-7, max_iterations=1000)
    best = minimize(lambda c: np.linalg.norm(x - c, axis=1).mean(), x.mean(0), tol=1e-12).x
    np.testing.assert_allclose(got, best, atol=1e-4)
    assert np.linalg.norm(got - 2) < 0.5 < np.linalg.norm(x.mean(0) - 2)


def test_geometric_median_may_start_on_a_token():
    x = np.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    got = outliers.geometric_median(lambda: [x], x[0])
    assert np.isfinite(got).all()
