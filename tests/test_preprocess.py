import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.autoencoder import sae as sae_lib
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers import preprocess
from sae_jax.outliers.preprocess import Preprocessing


def skewed(rng, gamma=0.0, n_tokens=4000, d=24):
    """Correlated tokens whose eigenvalues span four decades, with a mean of the given gamma; float32."""
    x = rng.normal(size=(n_tokens, d)) * np.logspace(0, -2, d) @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    mu = rng.normal(size=d)
    return (x + gamma * np.linalg.norm(x.std(axis=0)) * mu / np.linalg.norm(mu)).astype(np.float32)


def choices(x):
    moments = moments_lib.moments(x, covariance=True)
    shift = jnp.asarray(moments.mean, jnp.float32)
    return {
        "centred": Preprocessing(shift=shift),
        "scaled": Preprocessing(shift=shift, scale=jnp.float32(3.7)),
        "whitened": preprocess.whitening(moments),
        "shrunk": preprocess.whitening(moments, shrinkage=0.1),
        "cut": preprocess.whitening(moments, rank_cut=1e-2),
    }


@pytest.mark.parametrize("name", ["centred", "scaled", "whitened", "shrunk", "cut"])
@pytest.mark.parametrize("gamma", [0.0, 100.0])
def test_a_folded_sae_does_on_x_what_the_sae_does_behind_the_preprocessing(name, gamma):
    rng = np.random.default_rng(1)
    x = skewed(rng, gamma)
    before = choices(x)[name]
    y = before(jnp.asarray(x))
    sae = sae_lib.init(jax.random.key(0), 200, 8, jnp.asarray(0.1 * rng.normal(size=y.shape[1]), jnp.float32))
    sae = sae.replace(b_enc=jnp.asarray(0.1 * rng.normal(size=200), jnp.float32))
    folded = preprocess.fold(sae, before)
    behind, alone = sae_lib.encode(sae, y), sae_lib.encode(folded, jnp.asarray(x))
    expected = np.asarray(before.invert(sae_lib.decode(sae, behind)), np.float64)
    error = np.linalg.norm(np.asarray(sae_lib.decode(folded, alone), np.float64) - expected, axis=1)
    size = np.linalg.norm(x - x.mean(axis=0), axis=1)
    # Where two pre-activations are equal to rounding, the two may keep different ones of them.
    same = np.all(np.sort(behind.indices, axis=1) == np.sort(alone.indices, axis=1), axis=1)
    assert np.mean(~same) < 1e-3
    assert np.linalg.norm(error[same]) < 1e-5 * np.linalg.norm(size[same])
    # No token does worse but for the last bit of x̂ itself, which at gamma 100 is as large.
    last_bit = np.linalg.norm(np.spacing(np.abs(expected).astype(np.float32)), axis=1)
    assert (error[same] < 1e-5 * size[same] + last_bit[same]).all()


def test_whitened_activations_have_unit_covariance_and_the_cut_leaves_directions_out(rng):
    x = skewed(rng, gamma=5.0)
    done = choices(x)
    y = np.asarray(done["whitened"](jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(np.cov(y.T, ddof=0), np.eye(24), atol=1e-3)
    cut = np.asarray(done["cut"](jnp.asarray(x)))
    assert cut.shape[1] < 24
    np.testing.assert_allclose(cut.var(axis=0), 1, rtol=1e-3)
    back = np.asarray(done["whitened"].invert(jnp.asarray(y, jnp.float32)))
    np.testing.assert_allclose(back, x, atol=1e-4 * np.abs(x).max())
    shrunk = np.asarray(done["shrunk"](jnp.asarray(x))).var(axis=0)
    values = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64), ddof=0))[::-1]
    np.testing.assert_allclose(shrunk, values / (0.9 * values + 0.1 * values.mean()), rtol=2e-2)


def test_a_spectrum_with_zeros_is_cut_not_blown_up(rng):
    x = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 10))
    before = preprocess.whitening(moments_lib.moments(x, covariance=True))
    assert before.matrix.shape == (3, 10)


def test_per_token_norms_agree_with_their_definitions_and_cannot_be_folded(rng):
    x = rng.normal(size=(50, 12)).astype(np.float32) * 10 + 3
    x[7] = 0
    got = preprocess.per_token(jnp.asarray(x), "layer_norm")
    np.testing.assert_allclose(got, moments_lib.layer_norm(x.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(preprocess.per_token(jnp.asarray(x), "layer_norm_unit") * np.sqrt(12), got, atol=1e-5)
    unit = preprocess.per_token(jnp.asarray(x), "unit")
    np.testing.assert_allclose(unit, moments_lib.direction(x.astype(np.float64)), atol=1e-6)
    assert np.isfinite(unit).all()
    sae = sae_lib.init(jax.random.key(0), 20, 2, jnp.zeros(12))
    with pytest.raises(ValueError, match="not affine"):
        preprocess.fold(sae, Preprocessing(shift=jnp.zeros(12), norm="layer_norm"))


def spectrum(*values):
    """Moments of four tokens with these variances along the axes."""
    square = 4 * np.array(values)
    return moments_lib.Moments(4, np.arange(1.0, len(values) + 1), square, square, square, np.diag(square))


def test_directions_under_a_millionth_of_the_largest_variance_are_left_out():
    before = preprocess.whitening(spectrum(4.0, 7e-6, 1.0, 3e-6))
    np.testing.assert_allclose(np.abs(before.matrix), [[0.5, 0, 0, 0], [0, 0, 1, 0], [0, 7e-6**-0.5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(np.abs(before.inverse.T), [[2, 0, 0, 0], [0, 0, 1, 0], [0, 7e-6**0.5, 0, 0]], rtol=1e-6)
    assert before.width == 3
    whole = spectrum(4.0, 1e-7, 1e-10, 4e-14)
    assert preprocess.whitening(whole).width == 1
    ordinary = preprocess.whitening(whole, ordinary=spectrum(1e-9, 1e-9, 1e-10, 4e-14))
    assert ordinary.width == 3  # the fourth is what rounding leaves beside the largest of all


@pytest.mark.parametrize("matrix", [None, np.array([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]])])
def test_one_point_goes_where_all_do(matrix):
    shift, x = np.array([1.0, -2.0, 0.5]), np.array([4.0, 1.0, 2.0])
    expected = 2.5 * (x - shift)
    if matrix is not None:
        expected = matrix @ expected
    before = Preprocessing(shift=shift, scale=2.5, matrix=matrix)
    np.testing.assert_allclose(before.affine(x), expected, rtol=1e-12)
    plain = Preprocessing(shift=shift, matrix=matrix)
    np.testing.assert_allclose(plain.affine(x), expected / 2.5, rtol=1e-12)
    np.testing.assert_allclose(before(jnp.asarray(x[None], jnp.float32))[0], expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_norms_of_short_tokens_and_long(size):
    x = jnp.asarray(size * np.array([[3.0, 1.0, -1.0, 1.0]]), jnp.float32)
    normed = size * np.array([2, 0, -2, 0]) / np.sqrt(2 * size**2 + 1e-5)
    np.testing.assert_allclose(preprocess.per_token(x, "layer_norm")[0], normed, rtol=1e-5)
    np.testing.assert_allclose(preprocess.per_token(x, "layer_norm_unit")[0], normed / 2, rtol=1e-5)
    np.testing.assert_allclose(preprocess.per_token(x, "unit")[0], np.array([3, 1, -1, 1]) / np.sqrt(12), rtol=1e-6)
    np.testing.assert_array_equal(preprocess.per_token(x, "none"), x)
