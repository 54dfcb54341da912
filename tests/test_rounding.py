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


@pytest.mark.parametrize(("mean", "sigma", "bits", "said"), [
    (300.0, 1.0, 8, "mean 300 and varies by 1, of which about 0.0 bits are left (rounding is 33 % of its variance)"),
    (-300.0, 8.0, 11, None), (-600.0, 1.0, 11, "mean -600 and varies by 1, of which about 1.0 bits are left "
                                               "(rounding is 2 % of its variance)"),
    (300.0, 0.25, 8, "about 0.0 bits are left (rounding is 100 % of its variance)"),
    (0.3, 0.0039, 8, "about 1.0 bits are left (rounding is 2 % of its variance)"),
    (0.3, 2.0**-7, 8, None), (300.0, 4.7, 8, "about 1.2 bits are left (rounding is 2 % of its variance)"),
])  # fmt: skip
def test_the_coarsest_dimension_is_named_with_what_is_left_of_it(mean, sigma, bits, said):
    """At 300 bfloat16 has steps of 2, which are 4 / 12 of variance; at 600 float16 has 1/2; at 0.3 bfloat16 2^-9."""
    x = np.array([1.0, -1.0])[:, None] * np.array([1.0, sigma, 4.7]) + np.array([0.0, mean, 1.0])
    found = rounding.warnings(moments_lib.moments(x), bits)
    if said is None:
        assert found == []
        return
    kind = {8: "bfloat16", 11: "float16"}[bits]
    assert found[0].startswith(f"1 of 3 dimensions are coarse in {kind}, which keeps {bits} bits of a number")
    assert f": dimension 1 has mean {mean:.3g} and" in found[0]
    assert said in found[0]
