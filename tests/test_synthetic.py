import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.activations import synthetic
from sae_jax.config import base
from sae_jax.outliers import moments as moments_lib


def drawn(n=40_000, **settings):
    data = base().data
    data.d_model, data.n_true_features, data.n_active = 32, 64, 3
    data.update(settings)
    spec = synthetic.build(data, seed=3)
    return spec, np.asarray(synthetic.sample(spec, 0, 0, jnp.arange(n)))


@pytest.mark.parametrize("direction", ["one", "few", "spread"])
@pytest.mark.parametrize("settings", [
    {"signal": "sparse"},
    {"signal": "gaussian"},
    {"signal": "gaussian", "rank": 4},
    {"signal": "gaussian", "tail_df": 8.0},
])
def test_gamma_mean_and_scale_are_those_asked_for(direction, settings):
    spec, x = drawn(gamma=5.0, mean_direction=direction, **settings)
    found = moments_lib.severity([x]).raw
    assert np.linalg.norm(found.sigma) == pytest.approx(32**0.5, rel=0.02)
    assert found.gamma == pytest.approx(5.0, rel=0.02)
    np.testing.assert_allclose(found.mean, spec.mu, atol=0.06)
    carrying = np.sum(np.asarray(spec.mu) ** 2 > 0.01 * np.sum(np.asarray(spec.mu) ** 2))
    assert carrying == {"one": 1, "few": 4}.get(direction, carrying)
    assert direction != "spread" or carrying > 10


def test_gaussian_rank_and_tail():
    _, x = drawn(signal="gaussian", rank=4, gamma=0.0)
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    np.testing.assert_allclose(values[:4], 8, rtol=0.05)  # ‖sigma‖² = 32 over 4 dimensions
    assert values[4] < 1e-5
    _, light = drawn(signal="gaussian", gamma=0.0)
    _, heavy = drawn(signal="gaussian", gamma=0.0, tail_df=5.0)
    kurtosis = lambda a: np.mean((a / a.std(0)) ** 4)  # noqa: E731
    assert kurtosis(light) == pytest.approx(3, abs=0.1)
    assert kurtosis(heavy) > 5  # Student-t with 5 degrees of freedom: 9 in the limit


def test_sparse_signal_is_made_of_n_active_true_features():
    spec, x = drawn(n=50, signal="sparse", gamma=2.0, d_model=32, n_true_features=16)
    signal = (x - np.asarray(spec.mu)) / float(spec.scale) + np.asarray(spec.signal_mean)
    amplitudes = np.linalg.lstsq(np.asarray(spec.rows).T, signal.T, rcond=None)[0].T
    active = np.abs(amplitudes) > 1e-3
    assert (active.sum(axis=1) == 3).all()
    assert ((amplitudes[active] > 0.499) & (amplitudes[active] < 1.501)).all()
    assert active.any(axis=0).all()


@pytest.mark.parametrize(("m", "s"), [(2, 1), (5, 3), (6, 6)])
def test_mean_and_scale_of_a_sparse_signal_are_those_of_all_choices_of_features(m, s):
    """Amplitudes are uniform on [0.5, 1.5]: mean 1, second moment 13/12, one independent of the other."""
    spec, _ = drawn(n=1, signal="sparse", d_model=6, n_true_features=m, n_active=s)
    rows = np.asarray(spec.rows, np.float64)
    choices = [rows[list(chosen)] for chosen in itertools.combinations(range(m), s)]
    mean = np.mean([chosen.sum(axis=0) for chosen in choices], axis=0)
    np.testing.assert_allclose(spec.signal_mean, mean, atol=1e-6)
    products = [chosen @ chosen.T for chosen in choices]
    second = np.mean([p.sum() + np.trace(p) / 12 for p in products])
    assert float(spec.scale) ** 2 * (second - mean @ mean) == pytest.approx(6, rel=1e-5)


def test_splits_are_told_apart_by_the_same_numbers_in_every_version():
    assert synthetic.SPLITS == {"train": 0, "statistics": 1, "eval": 2}


def test_compiled_it_draws_the_same():
    spec, x = drawn(n=10, gamma=2.0, signal="gaussian", tail_df=5.0)
    found = jax.jit(synthetic.sample)(spec, jnp.int32(0), jnp.int32(0), jnp.arange(10))
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)


def test_a_row_depends_on_its_number_only():
    spec, x = drawn(n=10, signal="sparse", gamma=1.0)
    again = synthetic.sample(spec, 0, 0, jnp.arange(4, 8))
    np.testing.assert_allclose(again, x[4:8], rtol=1e-6)
    for split, step in ((1, 0), (0, 1)):
        assert not np.allclose(synthetic.sample(spec, split, step, jnp.arange(10)), x)
