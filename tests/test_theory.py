import numpy as np
import pytest
from scipy.stats import norm

from sae_jax import theory


def test_constants_are_those_of_the_paper():
    assert theory.extreme(100_000) == pytest.approx(4.265, abs=5e-4)
    assert theory.top_k_threshold(8192, 64) == pytest.approx(2.418, abs=5e-4)
    assert theory.median_extreme(100_000) == pytest.approx(4.35, abs=1e-2)
    assert norm.cdf(theory.median_extreme(1000)) ** 1000 == pytest.approx(0.5, rel=1e-9)


def test_limits_and_order():
    gammas = np.array([0.0, 0.5, 1, 2, 5, 10, 20, 40, 1e6])
    for law in (theory.dead_total_paper, theory.dead_total_finite_gamma):
        dead = law(gammas, 100_000, 8192, 64)
        assert (np.diff(dead) >= 0).all()
        assert dead[0] == 0
        assert dead[-1] == pytest.approx(1 - 1 / 128, abs=1e-4)
    relu = theory.dead_by_relu_paper(gammas, 100_000)
    assert (relu <= theory.dead_total_paper(gammas, 100_000, 8192, 64)).all()
    assert relu[-1] == pytest.approx(0.5, abs=1e-4)
