import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import recovery


def test_mmcs_knows_sign_scale_and_absence(rng):
    truth = rng.normal(size=(5, 8))
    assert float(recovery.mmcs(jnp.asarray(truth), jnp.asarray(3 * truth))) == pytest.approx(1, rel=1e-5)
    basis = jnp.eye(4)
    assert float(recovery.mmcs(basis, -basis[:1])) == pytest.approx(0 * 3 / 4 - 1 / 4, abs=1e-6)
    assert float(recovery.mmcs(basis, basis[:3])) == pytest.approx(3 / 4, abs=1e-6)


def test_mmcs_of_live_rows_leaves_the_dead_out():
    basis = jnp.eye(4)
    assert float(recovery.mmcs(basis, basis, jnp.array([True, True, False, False]))) == pytest.approx(0.5)
    assert float(recovery.mmcs(basis, basis, jnp.zeros(4, bool))) == 0


def test_mcc_assigns_each_row_once_and_forgives_the_sign(rng):
    rows = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    order = rng.permutation(6)
    assert recovery.mcc(jnp.asarray(rows), jnp.asarray(-2 * rows[order])) == pytest.approx(1, rel=1e-5)
    assert recovery.mcc(jnp.asarray(rows), jnp.asarray(rows[[0, 0, 0]])) == pytest.approx(1 / 6, abs=1e-5)


def test_densities_count_every_live_feature_once():
    fired = np.array([0, 1, 10, 100, 1000])
    counts, edges = recovery.density_histogram(fired, 1000)
    assert counts.sum() == 4
    assert edges[0] == -3
    assert edges[-1] == 0
    assert counts[0] == 1
