"""Forecasts for SAEs that select by another rule than TopK, against a count in an initialised SAE, in NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import cli
from sae_jax.autoencoder import batch_topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.diagnosis import autopsy, remedies
from sae_jax.errors import Refused
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.models import sources
from sae_jax.outliers import moments, selections
from sae_jax.outliers.preprocess import Preprocessing
from sae_jax.outliers.probes import Forecast, places
from sae_jax.outliers.selections import Selection
from sae_jax.reports import tables

D, N, K, TOKENS, BATCH = 48, 1024, 16, 8192, 4096
NONE = {"none": Preprocessing(shift=np.zeros(D, np.float32))}


def activations(kind, gamma, seed):
    """Of a spectrum that falls: all tokens alike, of sizes of their own, or one in 250 of them a giant."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(TOKENS, D)) * np.geomspace(1, 0.3, D)
    mean = rng.normal(size=D)
    x = signal + gamma * np.linalg.norm(signal.std(axis=0)) * mean / np.linalg.norm(mean)
    if kind == "sized":
        x *= rng.lognormal(0, 0.5, size=(TOKENS, 1))
    if kind == "giants":
        x[rng.random(TOKENS) < 0.004] *= 40
    return np.float32(x)


def rows(seed, n, d):
    """Random unit rows."""
    W = np.random.default_rng(1000 + seed).normal(size=(n, d))
    return W / np.linalg.norm(W, axis=1, keepdims=True)


def counted(x, rule, threshold, W, k=K):
    """Deaths in an SAE of these rows without biases, on batches of 4096 tokens."""
    n = len(W)
    positive, fired = np.zeros(n, bool), np.zeros(n, bool)
    for start in range(0, len(x), BATCH):
        z = x[start : start + BATCH].astype(np.float64) @ W.T
        bar = threshold or 0.0
        if rule == "topk":
            bar = np.partition(z, -k, axis=1)[:, -k, None]
        elif rule == "batch_topk":
            bar = np.partition(z.ravel(), -k * len(z))[-k * len(z)]
        positive |= (z > 0).any(axis=0)
        fired |= ((z > 0) & (z >= bar)).any(axis=0)
    return {"dead_by_relu": 1 - positive.mean(), "dead_total": 1 - fired.mean()}


def in_band(forecast, count, n=N):
    """Within one and a half times the 95 % that the band of the forecast states."""
    band = forecast.curve(np.array([forecast.at(n, K)]), n)
    low, dead, high = band.low[0], band.dead[0], band.high[0]
    assert dead - 1.5 * (dead - low) - 2e-3 <= count <= dead + 1.5 * (high - dead), (low, dead, high, count)


@pytest.mark.parametrize("gamma", [0, 4, 20])
@pytest.mark.parametrize("kind", ["alike", "sized", "giants"])
@pytest.mark.parametrize("rule", ["batch_topk", "jumprelu", "relu"])
def test_the_forecast_is_what_an_initialised_sae_loses(rule, kind, gamma):
    for seed in (0, 1):
        x = activations(kind, gamma, seed)
        height = float(np.linalg.norm(x.std(axis=0)) / np.sqrt(D) * (2.5 + gamma / 3)) if rule == "jumprelu" else None
        each = {"none": Selection(rule, height)}
        tokens = sources.open_tokens(x)
        found = remedies.forecast(tokens, NONE, x.mean(axis=0), 512, seed, each)["none"]
        count = counted(x, rule, height, rows(seed, N, D))
        in_band(found, count["dead_total"])
        in_band(found._replace(selection=Selection("relu"), norms=None), count["dead_by_relu"])
    measured = remedies.measured(tokens, NONE, N, K, seed, each)[0]["none"]
    W = np.asarray(sae_lib.init(jax.random.key(seed), N, K, jnp.zeros(D)).W_enc, np.float64)
    for key, share in counted(x, rule, height, W).items():
        assert measured[key] == pytest.approx(share, abs=1.5 / N)  # a feature at the very bar


def test_long_tokens_are_where_batch_topk_parts_from_topk():
    """Giants take the budget of the others, and spend it on features that the others would not choose."""
    x = activations("giants", 4, 0)
    tokens = sources.open_tokens(x)
    by = {rule: remedies.forecast(tokens, NONE, x.mean(axis=0), 512, 0, {"none": Selection(rule)})["none"].deaths(N, K)
          for rule in ("topk", "batch_topk")}  # fmt: skip
    assert by["topk"]["dead_total"] == pytest.approx(counted(x, "topk", None, rows(0, N, D))["dead_total"], abs=0.03)
    assert by["batch_topk"]["dead_total"] < by["topk"]["dead_total"] - 0.4


@pytest.mark.parametrize("kind", ["alike", "sized", "giants"])
def test_the_bar_of_batch_topk_is_a_quantile_of_all_preactivations(rng, kind):
    x = activations(kind, 1, 0)[:1000]
    x[:10] = 0  # padding has none of the budget
    W = rng.normal(size=(40_000, D))
    z = x @ np.float32(W / np.linalg.norm(W, axis=1, keepdims=True)).T
    shares = np.array([1 / 100, 1 / 30, 0.2, 0.7])
    bars = selections.batch_threshold(shares, np.linalg.norm(x, axis=1), D)
    for share, bar in zip(shares[:3], bars, strict=False):
        assert np.mean(z > bar) == pytest.approx(share, rel=0.08)
    assert bars[3] < 1e-9 * bars[2]  # more than are positive
    assert (selections.batch_threshold(shares, np.zeros(5), D) == 0).all()


@pytest.mark.parametrize("power", [-30, 30])
def test_the_bar_of_batch_topk_is_in_the_units_of_the_tokens(rng, power):
    norms, shares = np.append(rng.uniform(0.5, 2, 200), 0), np.array([1 / 100, 0.2])
    plain, scaled = (selections.batch_threshold(shares, norms * 2.0**p, D) for p in (0, power))
    np.testing.assert_allclose(scaled, plain * 2.0**power, rtol=1e-6)


def test_the_nth_largest_is_that_of_a_sort(rng):
    z = np.float32(rng.normal(size=(30, 70)))
    z[0, :5] = [0.0, -0.0, 1e-30, np.inf, 3e38]
    for count in (1, 2, 3, 100, (z > 0).sum()):
        assert float(batch_topk.bar(jnp.asarray(z), jnp.int32(count))) == np.sort(z.ravel())[-count]
    assert float(batch_topk.bar(jnp.asarray(z), jnp.int32((z > 0).sum() + 1))) == z[z > 0].min()  # there is no other
    assert float(batch_topk.bar(jnp.asarray(-np.abs(z)), jnp.int32(3))) == 0


def test_the_curve_of_jumprelu_rises_with_its_threshold(rng):
    found = Forecast(np.zeros((512, 64)), np.abs(rng.normal(size=512)), Selection("jumprelu", 0.5))
    band = found.curve(at := places(found.selection, 1024, 8))
    assert (np.diff(band.dead) >= 0).all()
    assert band.dead[list(at).index(0.5)] == found.deaths(1024, 8)["dead_total"] == np.mean(found.best < 0.5)


@pytest.mark.parametrize("rule", ["batch_topk", "jumprelu", "relu"])
def test_the_command_says_what_each_remedy_leaves(tmp_path, capsys, rule):
    """Behind a remedy a threshold is as many of the tokens' standard deviations as without."""
    x = activations("sized", 4, 3)[:3000, :24]
    np.save(tmp_path / "x.npy", x)
    height = float(np.linalg.norm(x.std(axis=0)))
    flags = [f"--threshold={height}"] if rule == "jumprelu" else ["--k=8"] if rule == "batch_topk" else []
    code = cli.main(["diagnose", f"--activations={tmp_path / 'x.npy'}", f"--workdir={tmp_path / 'out'}", "--measure",
                     "--n_features=512", f"--selection={rule}", *flags])  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["selection"] == rule
    assert found["threshold"] == (height if rule == "jumprelu" else None)
    assert found["k"] == (8 if rule == "batch_topk" else None)
    assert "dead by selection" in said
    assert "TopK" not in said.replace("BatchTopK", "")
    assert {"batch_topk": "BatchTopK, n = 512, k = 8", "jumprelu": f"JumpReLU, n = 512, threshold = {height}",
            "relu": "ReLU, n = 512\n"}[rule] in said  # fmt: skip
    x = x.astype(np.float64)
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(x.T, ddof=0))
    views = {"none": x, "mean": x - x.mean(0), "layer_norm_centred": normed - normed.mean(0),
             "unit_norm_centred": unit - unit.mean(0), "whitening": (x - x.mean(0)) @ vectors / np.sqrt(values)}
    for name, view in views.items():
        own = height * np.linalg.norm(view.std(axis=0)) / np.linalg.norm(x.std(axis=0))
        count = counted(view, rule, own if rule == "jumprelu" else None, rows(3, 512, view.shape[1]), 8)
        for key, fraction in count.items():
            noise = 3 * np.sqrt(2 * max(fraction * (1 - fraction), 0.002) / 512)
            assert found["remedies"][name]["measured"][key] == pytest.approx(fraction, abs=noise), name
            assert found["remedies"][name]["probe"][key] == pytest.approx(fraction, abs=0.01 + noise), name
    laws = [found["predicted"][law] for law in ("paper", "spectrum")]
    totals = [law["dead_by_relu"] if rule == "relu" else None for law in laws]
    assert [law["dead_total"] for law in laws] == totals


@pytest.mark.parametrize(("rule", "pathway"), [("topk", "TopK"), ("threshold", "selection")])
def test_an_autopsy_names_the_pathway_by_what_selects(tmp_path, rule, pathway):
    x, zero = activations("alike", 4, 0)[:600], np.zeros(D, np.float32)
    W = np.float32(rows(0, 64, D))
    more = {"k": 2} if rule == "topk" else {"threshold": np.full(64, 12, np.float32)}
    encoder = Encoder(W_enc=W, b_enc=np.zeros(64, np.float32), W_dec=W, b_dec=zero, b_in=zero, rule=rule, **more)
    found = autopsy.dissect(Opened(encoder, {}, "none"), x, str(tmp_path), n_probes=16)
    assert found["dead_by_topk"] > 0.1
    texts = {"table": tables.autopsy_table(found), "page": (tmp_path / "report.html").read_text()}
    for name in ("density", "dead_over_tokens", "shifts", "alignment"):
        texts[name] = " ".join(t.get_text() for legend in found.figures[name].legends for t in legend.get_texts())
    other = {"TopK": "selection", "selection": "TopK"}[pathway]
    for name, text in texts.items():
        assert f"by {pathway}" in text, name
        assert f"dead by {other}" not in text, name


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_a_threshold_is_in_the_units_of_the_activations(factor):
    x, how = activations("sized", 4, 0)[:2000].astype(np.float64), {"n_features": 256, "selection": "jumprelu"}
    plain, scaled = (sae_jax.diagnose(x * by, threshold=2.0 * by, n_probes=64, **how) for by in (1, factor))
    assert 0.1 < plain["predicted"]["probe"]["dead_total"] < 0.9
    for name, one in plain["remedies"].items():
        assert scaled["remedies"][name]["probe"]["dead_total"] == pytest.approx(one["probe"]["dead_total"], abs=0.02)
    at, dead = (list(map(float, part)) for part in zip(*scaled["death_curve"].items(), strict=True))
    np.testing.assert_allclose(at, [factor * float(share) for share in plain["death_curve"]])
    np.testing.assert_allclose(dead, list(plain["death_curve"].values()), atol=0.02)


@pytest.mark.parametrize(("flags", "said"), [
    (["--selection=jumprelu"], "--threshold = None: a finite number > 0"),
    (["--selection=jumprelu", "--threshold=-1"], "--threshold = -1.0: a finite number > 0"),
    (["--selection=jumprelu", "--threshold=nan"], "--threshold = nan: a finite number > 0"),
    (["--threshold=1"], "--threshold = 1.0: leave it out: topk has none"),
    (["--selection=relu", "--k=3"], "--k = 3: leave it out: topk and batch_topk keep k"),
    (["--selection=gated"], "--selection = 'gated': one of topk, batch_topk, jumprelu, relu"),
    (["--sae=run", "--selection=relu"], "--selection = 'relu': leave it out: the SAE has its own"),
])  # fmt: skip
def test_flags_of_another_selection_are_refused(tmp_path, capsys, flags, said):
    np.save(tmp_path / "x.npy", activations("alike", 1, 0)[:100])
    assert cli.main(["diagnose", f"--activations={tmp_path / 'x.npy'}", f"--workdir={tmp_path / 'out'}", *flags]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refused, match="selection = 'gated'"):
        sae_jax.diagnose(np.ones((20, 4), np.float32), selection="gated")


def test_shares_of_directions_above_a_height_in_closed_form():
    """On a line two directions, on a circle an arc, on a sphere a cap (Archimedes); none above the length √d itself."""
    h = np.array([0.0, 0.4, 0.9])
    np.testing.assert_allclose(selections.share_above(h, 1), 0.5)
    np.testing.assert_allclose(selections.share_above(h, 2), np.arccos(h / np.sqrt(2)) / np.pi, rtol=1e-12)
    np.testing.assert_allclose(selections.share_above(h, 3), (1 - h / np.sqrt(3)) / 2, rtol=1e-12)
    for d in (1, 2, 3, 50):
        assert selections.share_above(np.array([1.5 * np.sqrt(d), 9 * np.sqrt(d)]), d).tolist() == [0, 0]


def test_the_bar_of_batch_topk_where_it_can_be_worked_out():
    """On a sphere a token of length L is above t of (1 − t / L) / 2 of all directions; a token in four is zero."""
    shares, norms = np.array([0.1, 0.2, 0.25]), np.array([0.0, 1.0, 2.0, 4.0])
    inverse = 1 + 1 / 2 + 1 / 4
    found = selections.batch_threshold(shares[1:], norms, 3)
    np.testing.assert_allclose(found, (3 - 8 * shares[1:]) / inverse, rtol=1e-6)
    long_alone = 4 * (1 - 2 * 4 * 0.02)  # above all that the others reach
    np.testing.assert_allclose(selections.batch_threshold(np.array([0.02]), norms, 3), long_alone, rtol=1e-6)
    alike = selections.batch_threshold(shares, np.full(7, 0.3), 3)
    np.testing.assert_allclose(alike, 0.3 * (1 - 2 * shares), rtol=1e-6)


@pytest.mark.parametrize("scale", [None, 8.0])
def test_a_threshold_is_as_many_deviations_high_behind_every_remedy(rng, scale):
    x = rng.normal(size=(400, 6)) * np.arange(1, 7) + 3
    severity = moments.severity([x])
    deviation = float(np.linalg.norm(x.std(axis=0)))
    more = {} if scale is None else {"scale": scale}
    plain = {"mean": Preprocessing(shift=x.mean(axis=0)), "norm": Preprocessing(shift=np.zeros(6), norm="layer_norm"),
             "unit": Preprocessing(shift=np.zeros(6), norm="unit"),
             "whitening": Preprocessing(shift=np.zeros(6), matrix=np.ones((4, 6)))}  # fmt: skip
    found = selections.behind(Selection("jumprelu", 2.5), plain, severity, **more)
    normed = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    sizes = {"mean": deviation, "norm": np.linalg.norm(normed.std(axis=0)), "unit": np.linalg.norm(unit.std(axis=0)),
             "whitening": 2.0}  # fmt: skip
    for name, size in sizes.items():
        assert found[name].threshold == pytest.approx(2.5 * (scale or 1) / deviation * size, rel=1e-9), name
    assert selections.behind(Selection(), plain, severity) == dict.fromkeys(plain, Selection())
    of_run = selections.in_activations(0.7, severity, **more)
    assert of_run == pytest.approx(0.7 * deviation / np.sqrt(6) / (scale or 1))
