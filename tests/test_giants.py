"""A few tokens of giant norm, as attention sinks are, change no number without a word."""

import numpy as np
import pytest
from test_theory import count_deaths

import sae_jax
from sae_jax.activations import files
from sae_jax.activations.chunks import split_chunks
from sae_jax.exchange import formats
from sae_jax.outliers import giants, preprocess
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.probes import Forecast
from sae_jax.reports import tables


def sinks(rng, n_tokens=20_000, d=64, every=128, noise=0.02):
    """Normal tokens with mean 1 in every dimension, every 128th replaced by 2000 times one and the same vector."""
    x = rng.normal(size=(n_tokens, d)) + 1
    sink = rng.normal(size=d)
    x[::every] = 2000 * sink * (1 + noise * rng.normal(size=(len(x[::every]), 1)))
    return x.astype(np.float32)


def test_whitening_keeps_the_dimensions_that_only_look_small_beside_a_sink(rng):
    x = sinks(rng, n_tokens=8192)
    found = sae_jax.diagnose(x, n_features=4096, k=64, measure=True)
    x64 = x.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(x64.T, ddof=0))
    counted = count_deaths((x64 - x64.mean(0)) @ vectors / np.sqrt(values), 4096, 64, seed=3)
    whitening = found["remedies"]["whitening"]
    assert whitening["dimensions"] == 64
    for key, fraction in counted.items():
        assert whitening["measured"][key] == pytest.approx(fraction, abs=0.01)
        assert whitening["probe"][key] == pytest.approx(fraction, abs=0.01)
    assert found["n_giant_tokens"] == len(x[::128])
    ordinary = np.delete(x64, np.s_[::128], axis=0)
    gamma = np.linalg.norm(ordinary.mean(0)) / np.linalg.norm(ordinary.std(0))
    assert found["without_giants"]["gamma_raw"] == pytest.approx(gamma, rel=1e-6)
    assert "64 tokens have more than 10 times the median norm" in tables.diagnosis_table(found)


def test_dimensions_that_whitening_leaves_out_stand_in_the_table_and_the_advice(rng):
    x = rng.normal(size=(3000, 24)) * np.where(np.arange(24) < 9, 1.0, 1e-4)
    found = sae_jax.diagnose(x, n_features=512, k=8)
    assert found["remedies"]["whitening"]["dimensions"] == 9
    assert "whitening (9 of 24 dimensions)" in tables.diagnosis_table(found)
    assert "keeps 9 of 24 dimensions" in found["advice"]


def test_in_one_dimension_the_forecast_knows_that_all_features_tie(rng):
    """All features of one sign are equal: k of them are kept, always the same."""
    x = rng.normal(size=(2000, 1)).astype(np.float32)
    sign = np.where(rng.random(4096) < 0.5, -1.0, 1.0)
    forecast = Forecast(np.where(rng.random(512) < 0.5, -1.0, 1.0)[:, None], np.ones(512))
    alive = np.zeros(4096, bool)
    for token in x[:, 0]:
        alive[np.argsort(-sign * token, kind="stable")[:64]] = True
    assert forecast.deaths(4096, 64)["dead_total"] == pytest.approx(np.mean(~alive), abs=0.01)


def test_without_giants_nothing_changes_and_a_direction_without_variance_is_no_direction(rng):
    x = rng.normal(size=(2000, 12)) * np.logspace(0, -2, 12)
    plain = moments_lib.moments(x, covariance=True)
    ordinary = giants.without(lambda: [x], np.inf, covariance=True).raw
    np.testing.assert_array_equal(
        preprocess.whitening(plain).matrix, preprocess.whitening(plain, ordinary=ordinary).matrix
    )
    flat = x[:, :5] @ rng.normal(size=(5, 12))
    flat[0] *= 1e5
    moments = moments_lib.moments(flat, covariance=True)
    assert len(preprocess.whitening(moments, ordinary=moments_lib.moments(flat[1:], covariance=True)).matrix) == 5


def test_the_sample_is_of_all_tokens_whatever_the_context(rng):
    """Evenly spaced rows would all be first tokens here."""
    x = np.arange(2**16, dtype=np.float32)[:, None]
    whole, cut = giants.Sample(1000), giants.Sample(1000)
    whole.add(x)
    for part in np.array_split(x, 37):
        cut.add(part)
    np.testing.assert_array_equal(whole.rows, cut.rows)
    assert 400 < len(whole.rows) <= 1000
    first = np.mean(whole.rows % 128 == 0)
    assert first < 0.03
    assert whole.rows.mean() == pytest.approx(2**15, rel=0.1)


def test_padding_does_not_make_every_token_a_giant():
    assert giants.giant_norm(np.r_[np.zeros(10), 1.0, 2.0, 3.0]) == 20
    assert giants.giant_norm(np.zeros(4)) == np.inf


def test_a_run_behind_whitening_explains_tokens_with_sinks(tiny, tmp_path, rng):
    np.save(tmp_path / "x.npy", sinks(rng, d=16))
    tiny.data.signal, tiny.data.path, tiny.members = "", str(tmp_path / "x.npy"), {}
    tiny.sae.whiten, tiny.train.steps, tiny.train.batch_size = True, 200, 256
    report = sae_jax.train(tiny, str(tmp_path / "run"))
    assert report["members"][0]["final"]["fve"] > 0.8


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.two_devices)])
def test_fve_with_and_without_giants_and_deaths_over_tokens_are_those_of_numpy(tiny, tmp_path, rng, devices):
    """From the SAE as it was saved, over the same held-out tokens, in float64; on two devices the batch is shared."""
    x = sinks(rng, n_tokens=20_480, d=16)
    np.save(tmp_path / "x.npy", x)
    tiny.data.signal, tiny.data.path, tiny.train.devices = "", str(tmp_path / "x.npy"), devices
    tiny.eval.n_tokens, tiny.eval.batch_size, tiny.train.steps = 4096, 500, 20
    tiny.members = {"median": {"sae": {"center": "geometric_median"}}}
    report = sae_jax.train(tiny, str(tmp_path / "run"))
    final = report["members"][0]["final"]
    chunks = files.open_chunks(str(tmp_path / "x.npy"))
    _, held_out = split_chunks(len(chunks), -(-4096 // chunks.rows))
    x = np.concatenate([chunks[int(i)] for i in held_out])[:4096].astype(np.float64)
    packed = sae_jax.load(str(tmp_path / "run"))
    sae = formats.folded(packed)
    W_enc, b_enc, W_dec, b_dec = (np.asarray(a, np.float64) for a in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    z = np.maximum((x - b_dec) @ W_enc.T + b_enc, 0)
    kept = z >= np.sort(z, axis=1)[:, -4:-3]
    error = np.sum((x - (z * kept) @ W_dec - b_dec) ** 2, axis=1)
    norm = np.linalg.norm(x, axis=1)
    ordinary = norm <= 10 * np.median(norm)
    assert final["n_giant_tokens"] == (~ordinary).sum() > 20
    for key, rows in (("fve", np.ones(4096, bool)), ("fve_without_giants", ordinary)):
        variance = np.sum((x[rows] - x[rows].mean(0)) ** 2)
        assert final[key] == pytest.approx(1 - error[rows].sum() / variance, abs=2e-3), key
    fired = kept & (z > 0)
    assert [tokens for tokens, *_ in final["dead_over_tokens"]] == [1000, 2000, 4000, 4096]
    for tokens, by_relu, total in final["dead_over_tokens"]:
        assert by_relu == pytest.approx(np.mean(~(z[:tokens] > 0).any(0)), abs=1 / 64)
        assert total == pytest.approx(np.mean(~fired[:tokens].any(0)), abs=1 / 64)
    assert report["highest_rate_of_dead"] == pytest.approx(1 - 0.05 ** (1 / 4096))
    table = tables.table(report)
    assert "FVE without giants" in table
    assert "1 in 1,368 or fewer" in table
