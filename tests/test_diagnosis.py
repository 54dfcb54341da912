"""`diagnose`: the report against independent counts, the same from every input, one line where that is wrong."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.flax import save_file
from test_theory import count_deaths

import sae_jax
from sae_jax import cli
from sae_jax.activations import store
from sae_jax.diagnosis import diagnosis, recipes, remedies, survey
from sae_jax.errors import Refused, RunFailed
from sae_jax.models import sources
from sae_jax.outliers.probes import Forecast

SIZE = {"n_features": 512, "k": 8}
ROOT = Path(__file__).parents[1]


def outlying(rng, n_tokens=3000, d=24, gamma=4.0):
    """A mean in two dimensions, correlated signal, float32."""
    x = rng.normal(size=(n_tokens, d)) * np.linspace(1, 0.5, d)
    x[:, [3, 11]] += gamma * np.linalg.norm(x.std(axis=0)) * np.array([0.8, -0.6])
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def activations():
    return outlying(np.random.default_rng(0))


@pytest.fixture(scope="module")
def report(activations):
    return sae_jax.diagnose(activations, measure=True, **SIZE)


def test_the_report_holds_what_the_contract_says(report, activations):
    assert report["n_tokens"] == 3000
    assert report["gamma"] == pytest.approx(report["gamma_direction"], rel=0.2)
    assert report["gamma_raw"] == pytest.approx(4.0, rel=1e-3)
    assert 1 < report["effective_rank"] <= 24
    assert set(report["kurtosis"]) == {"median", "max"}
    assert [o["dimension"] for o in report["outlier_dimensions"][:2]] == [3, 11]
    for law in ("paper", "finite_gamma", "token_integral", "two_gammas", "spectrum", "probe"):
        assert 0 <= report["predicted"][law]["dead_by_relu"] <= report["predicted"][law]["dead_total"] <= 1
    shares = [float(share) for share in report["death_curve"]]
    assert shares == sorted(shares)
    assert 8 / 512 in shares
    assert report["death_curve"][repr(8 / 512)] == report["predicted"]["probe"]["dead_total"]
    assert list(report["remedies"]) == list(remedies.REMEDIES)
    assert report["remedies"]["none"]["probe"]["dead_total"] == report["predicted"]["probe"]["dead_total"]
    json.dumps(report, allow_nan=False)
    assert set(report.figures) == {"landscape", "spectrum", "death_curve", "shift_signal", "remedies"}


def test_measured_and_forecast_agree_with_an_independent_count(report, activations):
    x = activations.astype(np.float64)
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(x.T, ddof=0))
    whitened = (x - x.mean(0)) @ vectors / np.sqrt(values)
    views = {"none": x, "mean": x - x.mean(0), "layer_norm_centred": normed - normed.mean(0),
             "unit_norm_centred": unit - unit.mean(0), "whitening": whitened}  # fmt: skip
    for name, view in views.items():
        counted = count_deaths(view, 512, 8, seed=3)
        for key, fraction in counted.items():
            # Two dictionaries of 512 random rows, and 512 probes.
            noise = 3 * np.sqrt(2 * max(fraction * (1 - fraction), 0.002) / 512)
            assert report["remedies"][name]["measured"][key] == pytest.approx(fraction, abs=noise), name
            assert report["remedies"][name]["probe"][key] == pytest.approx(fraction, abs=0.03 + noise), name


def test_the_cheapest_harmless_remedy_is_recommended(report):
    assert report["recommended"] == "mean"
    assert "arithmetic mean" in report["advice"]
    assert "risk, not a verdict" in report["advice"]
    fine = {"dead_by_relu": 0.0, "dead_total": 0.004}
    bad = {"dead_by_relu": 0.2, "dead_total": 0.9}
    topk_only = {"dead_by_relu": 0.0, "dead_total": 0.5}
    hopeless = {"dead_by_relu": 0.0, "dead_total": 0.51}
    names = list(remedies.REMEDIES)
    assert remedies.recommended({name: fine for name in names}) == "none"
    assert remedies.recommended({**{name: bad for name in names}, "whitening": fine}) == "whitening"
    assert remedies.recommended({**{name: bad for name in names}, "mean": topk_only}) == "mean"
    no_help = {name: topk_only if name == "whitening" else hopeless for name in names}
    assert remedies.recommended(no_help) == "none"  # a point is not worth a matrix
    assert "No remedy is forecast to leave clearly fewer" in remedies.advice(no_help, "none")


def test_the_recipe_is_settings_of_a_run(report, activations, tmp_path):
    assert report["recipe"] == {"sae.center": "geometric_median", "sae.balance": True, "auxk.preset": "none"}
    assert sae_jax.diagnose(activations, n_features=64, selection="relu")["recipe"] is None  # not trained here
    never = {name: {"dead_by_relu": 0.2, "dead_total": 0.3} for name in remedies.REMEDIES}
    for chosen in remedies.REMEDIES:  # where centring cannot reach them
        sae_jax.base(recipes.recipe(never, chosen))
    assert recipes.recipe(never, "whitening")["sae.whiten"]
    np.save(tmp_path / "x.npy", activations)
    small = {"data.path": f"{tmp_path}/x.npy", "sae.n_features": 64, "sae.k": 4, "train.steps": 60,
             "train.batch_size": 64, "train.learning_rate": 3e-3, "train.devices": 1}  # fmt: skip
    ends = {
        name: sae_jax.train(sae_jax.base(small | more), f"{tmp_path}/{name}")["members"][0]["final"]
        for name, more in {"recipe": report["recipe"], "as_usual": {}}.items()
    }
    assert ends["recipe"]["dead_total"] < ends["as_usual"]["dead_total"] / 2
    assert ends["recipe"]["fve"] > ends["as_usual"]["fve"]


def test_a_second_look_is_taken_only_where_the_choice_hangs_on_it():
    def forecast(n_dead):
        return Forecast(np.zeros((512, 64)), np.r_[-np.ones(n_dead), np.full(512 - n_dead, 9.0)])

    def undecided(**found):
        return remedies.undecided({name: forecast(n_dead) for name, n_dead in found.items()}, 4096, 32)

    assert undecided(none=200, mean=0, whitening=5) == []
    assert undecided(none=5, mean=200, median=4, whitening=0) == ["none", "median"]


def test_a_close_call_is_looked_at_again_until_it_is_decided_or_said_to_be_close(rng):
    signal, axis = rng.normal(size=(3000, 24)), np.sqrt(24) * np.eye(24)[3]
    clear = sae_jax.diagnose(signal + 2 * axis, n_features=4096, k=64, n_probes=64)
    assert clear["remedies"]["none"]["n_probes"] == 64
    close = sae_jax.diagnose(signal + 0.5 * axis, n_features=4096, k=64, n_probes=64, measure=True)
    none = close["remedies"]["none"]
    assert none["n_probes"] == 1024  # after two closer looks it is clear
    assert none["probe"]["dead_total"] == pytest.approx(none["measured"]["dead_total"], abs=0.012)
    said = {"none": none["probe"], "mean": close["remedies"]["mean"]["probe"]}
    assert "cannot tell: none 1.8 %" in remedies.advice(said, "mean", ["none"])


def test_a_mean_that_a_few_tokens_make_is_warned_of(rng):
    x = rng.normal(size=(3000, 24))
    x[:30] = 60 * (np.eye(24)[5] * 10 + rng.normal(size=(30, 24)))  # one token in a hundred, of giant norm
    found = sae_jax.diagnose(x, **SIZE)
    assert found["remedies"]["mean"]["probe"]["dead_total"] > found["remedies"]["none"]["probe"]["dead_total"] + 0.1
    assert found["remedies"]["geometric_median"]["probe"]["dead_total"] < 0.02
    assert "make it worse: mean" in found["advice"]


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_scale_changes_no_fate(activations, report, factor):
    found = sae_jax.diagnose(activations.astype(np.float64) * factor, **SIZE)
    assert found["gamma"] == pytest.approx(report["gamma"], rel=1e-3)
    assert found["remedies"]["none"]["probe"] == report["remedies"]["none"]["probe"]
    assert found["recommended"] == report["recommended"]


def test_probes_are_not_the_activations_of_the_same_seed():
    x = np.random.default_rng(0).normal(size=(600, 24))
    found = sae_jax.diagnose(x, n_probes=512, seed=0, measure=True, **SIZE)
    best = remedies.forecast(
        sources.open_tokens(x), {"none": remedies.Preprocessing(shift=np.zeros(24, np.float32))}, np.zeros(24), 512, 0
    )["none"].best
    assert best.max() < 0.99 * np.sqrt(24)
    assert found["remedies"]["none"]["measured"]["dead_total"] < 0.05


def test_padding_is_counted(activations):
    found = sae_jax.diagnose(np.vstack([activations, np.zeros((40, 24), np.float32)]), **SIZE)
    assert found["n_zero_tokens"] == 40
    assert "40 tokens are zero" in diagnosis.tables.diagnosis_table(found)


def test_few_directions_that_no_remedy_helps_are_not_called_harmless(rng):
    x = rng.normal(size=(20, 64))[rng.integers(20, size=4000)] + 1e-3 * rng.normal(size=(4000, 64))
    found = sae_jax.diagnose(x, **SIZE)
    assert found["remedies"]["none"]["probe"]["dead_total"] > 0.3
    assert "No remedy is needed" not in found["advice"]


def test_array_file_and_dataset_give_the_same_report(tmp_path, activations):
    np.save(tmp_path / "x.npy", activations)
    folder = store.import_file(str(tmp_path / "x.npy"), str(tmp_path))
    whole = 3000 // 2 * 2  # a dataset holds whole chunks, two rows each in a file this small
    save_file({"x": jnp.asarray(activations)}, tmp_path / "x.safetensors")
    given = [activations[:whole], str(tmp_path / "x.npy"), folder, str(tmp_path / "x.safetensors")]
    reports = [sae_jax.diagnose(source, **SIZE) for source in given]
    assert [r["n_tokens"] for r in reports] == [whole, 3000, whole, 3000]
    for key in ("gamma", "predicted", "remedies", "death_curve"):
        assert reports[0][key] == reports[2][key]
    assert reports[0]["gamma"] == pytest.approx(reports[1]["gamma"], rel=0.02)


def test_more_tokens_than_a_batch_and_a_sample_are_all_seen(rng, monkeypatch):
    x = outlying(rng, n_tokens=1000)
    plain = sae_jax.diagnose(x, measure=True, **SIZE)
    monkeypatch.setattr(sources, "BATCH", 300)
    monkeypatch.setattr(remedies, "BATCH", 300)
    monkeypatch.setattr(survey, "SAMPLE", 100)
    cut = sae_jax.diagnose(x, measure=True, **SIZE)
    assert cut["gamma"] == pytest.approx(plain["gamma"], rel=1e-9)
    for name in ("none", "mean", "layer_norm_centred", "whitening"):
        for key in ("probe", "measured"):
            for pathway, value in plain["remedies"][name][key].items():
                assert cut["remedies"][name][key][pathway] == pytest.approx(value, abs=0.005)
    _, sample, _ = survey.first_pass(sources.open_tokens(x))
    rows = np.flatnonzero((x[:, None, 0] == sample[None, :, 0]).any(axis=1))
    assert 75 <= len(sample) <= 200
    assert len(rows) == len(sample)


# -- the command -----------------------------------------------------------------------------------------------------


def run(capsys, *flags):
    code = cli.main(["diagnose", *flags])
    return code, capsys.readouterr()


def test_the_command_prints_a_table_and_leaves_report_and_figures(capsys, tmp_path, activations):
    np.save(tmp_path / "x.npy", activations)
    code, streams = run(
        capsys, f"--activations={tmp_path}/x.npy", f"--workdir={tmp_path}/w", "--k=8", "--n_features=512", "--measure"
    )
    assert code == 0
    assert "token integral" in streams.out
    assert "geometric median" in streams.out
    found = json.loads((tmp_path / "w" / "report.json").read_text())
    assert found["recommended"] == "mean"
    assert found["remedies"]["none"]["measured"]["dead_total"] > 0.5
    assert found["n_features"] == 512
    names = {path.name for path in (tmp_path / "w").iterdir()}
    assert names == {"report.json", *(f"{n}.png" for n in ("landscape", "spectrum", "death_curve", "shift_signal",
                                                           "remedies"))}  # fmt: skip


def test_a_configuration_names_the_activations(capsys, tmp_path):
    code, streams = run(
        capsys, f"--config={ROOT}/configs/synthetic.py", f"--workdir={tmp_path}/w", "--config.data.signal=gaussian",
        "--config.data.gamma=5", "--config.data.statistics_tokens=3000",
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "w" / "report.json").read_text())
    assert (found["n_features"], found["k"], found["n_tokens"]) == (1024, 8, 3000)
    assert found["gamma_raw"] == pytest.approx(5, rel=0.02)


NOISE = np.random.default_rng(0).normal(size=(6000, 4))


@pytest.mark.parametrize(("array", "said", "code"), [
    (np.zeros(7), "tokens, d_model", 2),
    (np.zeros((0, 4)), "tokens, d_model", 2),
    (NOISE[:10], "at least 16 tokens, not 10", 2),
    (np.full((300, 4), 7.0), "the same on every token", 2),
    (NOISE.astype(int), "floating point", 2),
    (np.where(np.arange(6000)[:, None] // 7 == 700, np.nan, NOISE),
     "28 values are not finite; the first: row 4900, dimension 0 is nan", 2),
])  # fmt: skip
def test_what_cannot_be_diagnosed_is_one_line(capsys, tmp_path, array, said, code):
    np.save(tmp_path / "x.npy", array)
    got, streams = run(capsys, f"--activations={tmp_path}/x.npy", f"--workdir={tmp_path}/w")
    assert got == code
    assert said in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("flags", "said"), [
    (["--workdir={w}"], "--activations"),
    (["--activations=nowhere.npy", "--workdir={w}"], "activations = 'nowhere.npy': an existing path"),
    (["--activations={x}"], "--workdir"),
    (["--activations={x}", "--workdir={w}", "--k=0"], "k = 0: 1 to n_features = 8192"),
    (["--activations={x}", "--workdir={w}", "--k=9", "--n_features=8"], "k = 9: 1 to n_features = 8"),
    (["--activations={x}", "--workdir={w}", "--n_features=-1"], "n_features = -1"),
    (["--activations={x}", "--workdir={w}", "--n_features=2147483648"], "n_features = 2147483648: 1 to 2^31 - 1"),
    (["--activations={x}", "--workdir={w}", "--n_probes=3"], "n_probes = 3"),
    (["--activations={x}", "--workdir={w}", "--n_probes=1048577"], "n_probes = 1048577: 16 to 2^20"),
    (["--activations={x}", "--workdir={w}", "--seed=2147483648"], "seed = 2147483648: 0 to 2^31 - 1"),
    (["--activations={x}", "--workdir={x}"], "--workdir"),
    (["--activations={x}", "--workdir={x}/inside"], "--workdir"),
    (["--activations={x}", "--workdir={w}", "--seed=-1"], "seed = -1"),
    (["--activations={x}", "--workdir={w}", "--config.sae.k=3"], "--config=FILE beside it"),
])  # fmt: skip
def test_wrong_flags_are_one_line(capsys, tmp_path, flags, said):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(900, 4)))
    code, streams = run(capsys, *(flag.format(x=tmp_path / "x.npy", w=tmp_path / "w") for flag in flags))
    assert code == 2
    assert said in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_dimensions_that_do_not_vary_are_named_and_the_others_diagnosed(rng):
    x = rng.normal(size=(3000, 24)) + 0.5
    still = np.insert(np.insert(x, 7, 3.25, axis=1), 20, 0.0, axis=1)
    found = sae_jax.diagnose(still, n_features=512, k=8, measure=True)
    assert found["constant_dimensions"] == [7, 20]
    assert "2 of 26 dimensions are the same on every token: 7, 20" in found["warnings"][0]
    assert found["warnings"][0] in diagnosis.tables.diagnosis_table(found)
    gamma = np.linalg.norm(still.mean(0)) / np.linalg.norm(still.std(0))
    assert found["gamma_raw"] == pytest.approx(gamma, rel=1e-6)
    counted = count_deaths(still - still.mean(0), 512, 8, seed=3)
    assert found["remedies"]["mean"]["measured"]["dead_total"] == pytest.approx(counted["dead_total"], abs=0.02)
    assert found["remedies"]["whitening"]["dimensions"] == 24
    json.dumps(diagnosis.tables.finite(dict(found)), allow_nan=False)


def test_few_tokens_give_numbers_and_say_what_they_rest_on(rng):
    x = rng.normal(size=(40, 24)) + 0.5
    found = sae_jax.diagnose(x, n_features=512, k=8, measure=True)
    assert found["n_tokens"] == 40
    assert "rest on 40 tokens, where 24 dimensions want at least 256" in found["warnings"][0]
    counted = count_deaths(x, 512, 8, seed=3)
    assert found["remedies"]["none"]["measured"]["dead_total"] == pytest.approx(counted["dead_total"], abs=0.08)


def test_untrained_saes_that_memory_cannot_hold_are_refused(activations):
    with pytest.raises(Refused, match="n_features = 2000000000: at most about"):
        sae_jax.diagnose(activations, n_features=2 * 10**9, k=8, measure=True)


def test_values_that_are_not_finite_in_made_activations_fail_the_run(monkeypatch, tiny: ConfigDict):
    monkeypatch.setattr(sources.SyntheticSource, "statistics", lambda self: iter([np.full((300, 16), np.inf)]))
    with pytest.raises(RunFailed, match="4800 values are not finite"):
        sae_jax.diagnose(tiny)


def test_every_token_is_in_one_batch(rng):
    size = sources.BATCH
    x = np.float32(rng.normal(size=(2 * size + 7, 2)))
    tokens = sources.Tokens(lambda: iter(np.split(x, [size + 3, size + 4])), 2, {}, given=True)
    parts = list(remedies.padded(tokens))
    assert {len(part) for part, _ in parts} == {size}
    np.testing.assert_array_equal(np.concatenate([part[valid] for part, valid in parts]), x)


@pytest.mark.parametrize("n_probes", [1, 512, 4096, 10**5, 10**9])
def test_as_many_tokens_are_looked_at_together_as_a_piece_has_room_for(n_probes):
    rows = remedies._rows(n_probes)
    assert rows == 2 ** int(np.log2(rows))
    assert rows in (1, sources.BATCH) or rows * n_probes <= remedies.PIECE < 2 * rows * n_probes
    assert rows == 1 or rows * n_probes <= remedies.PIECE


@pytest.mark.parametrize(("still", "named"), [(5, "0, 1, 2, 3, 4"), (6, "0, 1, 2, 3, 4, …")])
def test_dimensions_that_do_not_move_are_named_up_to_five(rng, still, named):
    x = rng.normal(size=(400, 30))
    x[:, :still] = 3.0
    said = survey.warnings(survey.moments_lib.severity([x]), 24)[-1]
    assert said == f"{still} of 30 dimensions are the same on every token: {named}"
