"""Where bfloat16 has little room beside the mean it is said, with the dimension and what is left of it."""

import ml_dtypes
import numpy as np
import pytest

import sae_jax
from sae_jax.activations import store
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers import rounding


def activations(rng, mean):
    x = rng.normal(size=(4000, 8))
    x[:, 3] += mean
    return x.astype(np.float32)


@pytest.mark.parametrize(("kind", "bits"), [(ml_dtypes.bfloat16, 8), (np.float16, 11), (np.float32, 24)])
def test_the_bits_that_numbers_were_rounded_to_are_seen_in_them(rng, kind, bits):
    seen = rounding.Bits()
    assert sum(len(x) for x in seen.watching([activations(rng, 300).astype(kind).astype(np.float32)] * 2)) == 8000
    assert seen.kept == bits


@pytest.mark.parametrize("mean", [40.0, 150.0, 300.0])
def test_the_share_that_is_rounding_is_that_of_the_error(rng, mean):
    x = activations(rng, mean)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    found = rounding.shares(moments_lib.moments(rounded), 8)
    error = ((rounded - x) ** 2).mean(axis=0) / rounded.var(axis=0)
    assert found[3] == pytest.approx(error[3], rel=0.25)  # values across a power of two have two steps


def test_what_is_constant_or_lies_about_zero_is_not_coarse():
    """However little it varies: numbers near zero have small steps, and a constant loses nothing."""
    x = np.zeros((100, 3))
    x[:, 0], x[::2, 1], x[1::2, 1] = 5.0, 2.0**-12, -(2.0**-12)
    found = moments_lib.moments(x)
    np.testing.assert_array_equal(rounding.shares(found, 8), 0)
    assert rounding.warnings(found, 8) == []


def test_diagnose_and_extract_say_what_bfloat16_leaves(tmp_path, rng, capsys):
    x = activations(rng, 300)
    assert sae_jax.diagnose(x, n_features=64, k=4)["warnings"] == []
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)  # saved as float32 by a model that ran in bfloat16
    (said,) = sae_jax.diagnose(rounded, n_features=64, k=4)["warnings"]
    assert said.startswith("1 of 8 dimensions are coarse in bfloat16")
    assert "dimension 3 has mean 300" in said
    np.save(tmp_path / "x.npy", x)
    store.import_file(str(tmp_path / "x.npy"), str(tmp_path / "a"))
    assert capsys.readouterr().err == ""
    store.import_file(str(tmp_path / "x.npy"), str(tmp_path / "b"), "bfloat16")
    assert "dimension 3 has mean 300" in capsys.readouterr().err
