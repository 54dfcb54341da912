"""From a saved SAE and an array to what is kept and x̂: against NumPy in float64, as the docstrings write it."""

import re
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.kept import LARGE
from sae_jax.errors import Refused
from sae_jax.exchange import features as features_lib
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.exchange.formats import Packed
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.preprocess import Preprocessing, whitening

SIZES = {"small": (24, 96, 5), "large": (256, 4096, 32)}  # d, n, k: n·d below and above 2^20
KINDS = ("plain", "scaled", "centred", "whitened", "layer_norm", "layer_norm_unit", "unit")


def activations(rng, d, n_tokens=300):
    """With a mean ten times as long as they vary, every token of a size of its own."""
    x = rng.normal(size=(n_tokens, d)) + 10 * rng.normal(size=d)
    return np.float32(x * rng.uniform(0.5, 2, size=(n_tokens, 1)))


def packed(rng, x, n, k, kind):
    """An SAE behind each kind of preprocessing, its bias at the mean of what it sees."""
    d, moments = x.shape[1], moments_lib.moments(x, covariance=True)
    before = {
        "plain": Preprocessing(shift=np.zeros(d)),
        "scaled": Preprocessing(shift=np.zeros(d), scale=0.25),
        "centred": Preprocessing(shift=moments.mean, scale=3.0),
        "whitened": whitening(moments).replace(scale=np.float64(2.0)) if kind == "whitened" else None,
        "layer_norm": Preprocessing(shift=0.1 * rng.normal(size=d), scale=0.5, norm="layer_norm"),
        "layer_norm_unit": Preprocessing(shift=np.zeros(d), scale=7.0, norm="layer_norm_unit"),
        "unit": Preprocessing(shift=np.zeros(d), scale=2.0, norm="unit"),
    }[kind]
    rows = rng.normal(size=(n, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    see = np.asarray(before(jnp.asarray(x)))
    arrays = {"W_enc": rows[:, : see.shape[1]], "b_enc": 0.01 * rng.normal(size=n), "W_dec": rows[:, : see.shape[1]],
              "b_dec": see.mean(axis=0)}  # fmt: skip
    return Packed(sae_jax.SAE(**{key: np.float32(a) for key, a in arrays.items()}, k=k), before, {})


def by_numpy(sae, before, x):
    """All n pre-activations, the kept features as a dense matrix, and x̂, from the formulae, in float64."""
    x = np.asarray(x, np.float64)
    offset, size = np.zeros((len(x), 1)), np.ones((len(x), 1))
    if before.norm.startswith("layer_norm"):
        offset = x.mean(axis=1, keepdims=True)
        size = np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * (x.shape[1] ** 0.5 if "unit" in before.norm else 1)
    elif before.norm == "unit":
        size = np.linalg.norm(x, axis=1, keepdims=True)
    scale, shift = np.float64(before.scale), np.float64(before.shift)
    y = ((x - offset) / size - shift) * scale
    y = y if before.matrix is None else y @ np.float64(before.matrix).T
    W_enc, b_enc, W_dec, b_dec = (np.float64(a) for a in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    z = (y - b_dec) @ W_enc.T + b_enc
    best = np.argsort(-z, axis=1, kind="stable")[:, : sae.k]
    kept = np.zeros_like(z)
    np.put_along_axis(kept, best, np.maximum(np.take_along_axis(z, best, axis=1), 0), axis=1)
    y_hat = kept @ W_dec + b_dec
    y_hat = y_hat if before.matrix is None else y_hat @ np.float64(before.inverse).T
    return kept / scale * size, offset + size * (y_hat / scale + shift)


def dense(codes, n):
    out = np.zeros((len(codes.values), n))
    np.put_along_axis(out, codes.indices, codes.values, axis=1)
    return out


def agree(codes, x_hat, expected, expected_x_hat, x):
    """Float32 at this gamma: 1e-5 of the token; where two features tie for the last place either may be kept."""
    n = expected.shape[1]
    assert isinstance(codes.values, np.ndarray)
    assert isinstance(codes.indices, np.ndarray)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    close = (np.abs(dense(codes, n) - expected) < 1e-5 * length).all(axis=1)
    assert close.mean() > 0.99
    assert np.linalg.norm(x_hat - expected_x_hat, axis=1)[close].max() < 1e-5 * length.max()
    assert (np.diff(codes.values, axis=1) <= 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_reconstructions_are_those_of_numpy(rng, size, kind):
    d, n, k = SIZES[size]
    assert (n * d >= LARGE) == (size == "large")
    x = activations(rng, d)
    given = packed(rng, x, n, k, kind)
    codes, x_hat = sae_jax.features(given, x), sae_jax.reconstruct(given, x)
    assert x_hat.shape == x.shape
    assert codes.indices.shape == (len(x), k)
    agree(codes, x_hat, *by_numpy(given.sae, given.before, x), x)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a file x.npy and of two runs on it, `none` and `layer_norm`, named by what was done to tokens."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    x = activations(rng, 24, 5000)
    np.save(folder / "x.npy", x)
    for norm in ("none", "layer_norm"):
        config = sae_jax.base({
            "sae.n_features": 96, "sae.k": 4, "data.path": str(folder / "x.npy"), "data.norm": norm,
            "train.steps": 4, "train.batch_size": 64, "train.learning_rate": 1e-2, "train.devices": 1,
            "checkpoint.every": 4, "auxk.preset": "none",
        })  # fmt: skip
        members = {"centred": {"sae": {"center": "mean"}}, "white": {"sae": {"whiten": True}}}
        config.members = ConfigDict(members if norm == "none" else {"centred": members["centred"]})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sae_jax.training.run.Run._draw", lambda *_: None)
            sae_jax.train(config, str(folder / norm))
    return folder


@pytest.mark.parametrize(("norm", "member"), [("none", "centred"), ("none", "white"), ("layer_norm", "centred")])
def test_a_run_from_its_path_on_a_mapped_file(runs, monkeypatch, norm, member):
    monkeypatch.setattr(features_lib, "ROWS", 512)
    x = np.load(runs / "x.npy", mmap_mode="r")
    run = runs / norm
    loaded = sae_jax.load(run, member)
    assert loaded.before.norm == norm
    assert float(loaded.before.scale) != 1
    codes, x_hat = sae_jax.features(run, x, member=member), sae_jax.reconstruct(str(run), x, member=member)
    agree(codes, x_hat, *by_numpy(loaded.sae, loaded.before, x), x)
    again = sae_jax.features(loaded, str(runs / "x.npy"))
    np.testing.assert_array_equal(again.indices, codes.indices)


@pytest.mark.parametrize("member", ["centred", "white"])
def test_the_largest_activation_of_a_run_is_that_of_one_of_its_tokens(runs, member):
    """In the units that `features` says; held-out tokens are a fifth of all."""
    table = np.genfromtxt(runs / "none" / "fates.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    found = table["largest_activation"][table["member"] == member]
    values = dense(sae_jax.features(runs / "none", np.load(runs / "x.npy"), member=member), 96)
    np.testing.assert_array_less(found, values.max(axis=0) * 1.001 + 1e-9)
    nearest = np.abs(values - found).min(axis=0)
    np.testing.assert_array_less(nearest, found * 1e-3 + 1e-9)
    assert 5 < np.isclose(found, values.max(axis=0), rtol=1e-3).sum() < 60
    np.testing.assert_array_equal(found > 0, table["final"][table["member"] == member] == "A")


def test_an_exported_run_has_the_features_of_the_run(runs, tmp_path):
    x = np.load(runs / "x.npy")[:500]
    for norm in ("none", "layer_norm"):
        sae_jax.export(str(runs / norm), str(tmp_path / norm), "saelens", member="centred")
        ours = sae_jax.features(runs / norm, x, member="centred")
        theirs = sae_jax.features(tmp_path / norm, x)
        agree(theirs, sae_jax.reconstruct(tmp_path / norm, x), dense(ours, 96),
              sae_jax.reconstruct(runs / norm, x, member="centred"), x)  # fmt: skip


def test_a_long_array_is_gone_through_in_parts(rng, tmp_path):
    d = 64
    np.save(tmp_path / "long.npy", rng.normal(size=(200_000, d)).astype(np.float32))
    x = np.load(tmp_path / "long.npy", mmap_mode="r")
    given = packed(rng, np.asarray(x[:500]), 32, 2, "centred")
    sae_jax.features(given, x[:5000])  # compiled
    tracemalloc.start()
    codes = sae_jax.features(given, x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes.values.shape == (200_000, 2)
    assert peak < x.nbytes / 3


@pytest.mark.parametrize("n_tokens", [1, 2, 511, 512, 513])
def test_any_number_of_tokens(rng, monkeypatch, n_tokens):
    monkeypatch.setattr(features_lib, "ROWS", 256)
    x = activations(rng, 24, 600)
    given = packed(rng, x, 96, 5, "centred")
    codes, x_hat = sae_jax.features(given, x[:n_tokens]), sae_jax.reconstruct(given, x[:n_tokens])
    agree(codes, x_hat, *by_numpy(given.sae, given.before, x[:n_tokens]), x[:n_tokens])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_encode_and_decode_take_arrays_of_numpy_and_of_jax(rng, size, as_array):
    d, n, k = SIZES[size]
    x = activations(rng, d)
    given = packed(rng, x, n, k, "plain")
    sae = jax.tree.map(as_array, given.sae)
    codes = sae_jax.encode(sae, as_array(x))
    kept = codes._replace(values=as_array(codes.values), indices=as_array(codes.indices))
    expected, expected_x_hat = by_numpy(sae, given.before, x)
    agree(codes._replace(values=np.asarray(codes.values), indices=np.asarray(codes.indices)),
          np.asarray(sae_jax.decode(sae, kept)), expected, expected_x_hat, x)  # fmt: skip
    z = np.asarray(sae_lib.preactivations(sae, as_array(x)))
    assert np.abs(np.maximum(z, 0).max(axis=1) - expected.max(axis=1)).max() < 1e-5 * np.abs(x).max() * d


@pytest.mark.parametrize("verb", ["load", "features", "reconstruct"])
def test_the_example_of_a_docstring_runs_as_written(runs, tmp_path, monkeypatch, verb):
    example = "\n".join(line.strip() for line in getattr(sae_jax, verb).__doc__.splitlines()
                        if re.match(r" +(\w+(, \w+)*) = sae_jax\.|        x_hat = ", line))  # fmt: skip
    assert len(example.splitlines()) == (3 if verb == "load" else 1)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(runs / "none")
    x = np.load(runs / "x.npy")
    names = {"sae_jax": sae_jax, "x": x}
    exec(compile(example, verb, "exec"), names)
    loaded = sae_jax.load("runs/mine", "centred")
    expected, expected_x_hat = by_numpy(loaded.sae, loaded.before, x)
    if verb == "features":
        np.testing.assert_allclose(names["values"].sum(), expected.sum(), rtol=1e-4)
    else:
        np.testing.assert_allclose(names["x_hat"], expected_x_hat, atol=1e-3)


@pytest.mark.parametrize(("change", "said"), [
    (lambda x: x[:, :-1], r"activations = \(23,\): activations of the SAE's width 24"),
    (lambda x: x[0], "an array of shape"),
    (lambda x: x.astype(int), "floating point activations"),
    (lambda x: np.where(np.arange(len(x))[:, None] == 280, np.nan, x), "row 280"),
    (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 280 * 24 + 7, np.inf, x), "row 280"),
])  # fmt: skip
def test_what_is_refused(rng, monkeypatch, change, said):
    monkeypatch.setattr(features_lib, "ROWS", 128)
    x = activations(rng, 24)
    given = packed(rng, x, 96, 5, "plain")
    for verb in (sae_jax.features, sae_jax.reconstruct):
        with pytest.raises(Refused, match=said):
            verb(given, change(x))


@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 9])
def test_of_what_fires_there_are_as_many_columns_as_any_token_needs(width):
    """Of ReLU, however small its activations; the rows that fill up the last part fire all their features."""
    n = 12
    x = np.full((5, n), -2.0, np.float32)
    for row in range(5):
        x[row, : min(width, row + 1) if row < 4 else width] = -0.75
    eye, zero = np.eye(n, dtype=np.float32), np.zeros(n, np.float32)
    encoder = Encoder(W_enc=eye, b_enc=zero + 1, W_dec=eye, b_dec=zero, b_in=zero, rule="relu")
    codes = sae_jax.features(Opened(encoder, {}, "none"), x)
    assert codes.values.shape == codes.indices.shape == (5, width)
    np.testing.assert_array_equal(dense(codes, n), np.maximum(x + 1, 0))


def test_of_wide_saes_fewer_tokens_are_taken_at_a_time(rng, monkeypatch):
    """Memory is bounded, and what comes out is the same."""
    monkeypatch.setattr(features_lib, "ENTRIES", 50 * 96 + 7)
    taken, of_rows = [], features_lib._of_rows
    monkeypatch.setattr(features_lib, "_of_rows", lambda *given: taken.append(len(given[1])) or of_rows(*given))
    x = activations(rng, 24, 130)
    given = packed(rng, x, 96, 5, "centred")
    agree(sae_jax.features(given, x), sae_jax.reconstruct(given, x), *by_numpy(given.sae, given.before, x), x)
    assert taken == [50, 50, 32] * 2  # as many as have ENTRIES; 30 are filled up
