"""`diagnose`: the report against independent counts, the same from every input, one line where that is wrong."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.flax import save_file
from scipy.stats import norm
from test_theory import count_deaths

import sae_jax
from sae_jax import cli
from sae_jax.activations import store
from sae_jax.diagnosis import diagnosis, recipes, remedies, survey
from sae_jax.errors import Refused, RunFailed
from sae_jax.models import sources
from sae_jax.outliers import theory
from sae_jax.outliers.probes import Forecast, stratified_rows
from sae_jax.outliers.selections import Selection

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


def test_what_is_not_known_to_a_point_and_a_half_is_looked_at_again_if_that_is_cheap():
    def forecast(n_dead, by_relu, count=512):
        best = np.r_[-np.ones(by_relu), np.full(n_dead - by_relu, 0.1), np.full(count - n_dead, 9.0)]
        return Forecast(np.zeros((count, 64)), np.random.default_rng(0).permutation(best))

    dead = {"none": (500, 200), "mean": (100, 0), "median": (3, 0), "whitening": (90, 0)}  # in total, by ReLU
    found = {name: forecast(*counts) for name, counts in dead.items()}

    def wide(cosines):
        return remedies.wide(found, 4096, 32, cosines)

    assert wide(1) == ["none", "mean", "whitening"]  # of the first by ReLU alone
    assert wide(remedies.CLOSER / (3 * 64)) == ["none", "mean", "whitening"]
    assert wide(1.001 * remedies.CLOSER / (3 * 64)) == wide(0) == []  # all or none
    many = {"none": forecast(2000, 800, 4096)}
    assert remedies.wide(many, 4096, 32, 1) == ["none"]
    assert remedies.wide({"none": forecast(8000, 3200, 16384)}, 4096, 32, 1) == []


def test_a_share_is_known_to_a_point_and_a_half_unless_the_probes_are_said(rng):
    x = np.float32(rng.normal(size=(3000, 24)) + 0.8 * np.sqrt(24) * np.eye(24)[3])
    found = sae_jax.diagnose(x, n_features=8192, k=64, measure=True)
    none = found["remedies"]["none"]
    assert 0.1 < none["measured"]["dead_total"] < 0.9
    assert found["n_probes"] == 512 < none["n_probes"]
    assert none["probe"]["dead_total"] == pytest.approx(none["measured"]["dead_total"], abs=0.02)
    said = sae_jax.diagnose(x, n_features=8192, k=64, n_probes=512)["remedies"]["none"]
    assert said["n_probes"] == 512


@pytest.mark.parametrize(("n_probes", "most"), [(15, 60), (16, 16), (20, 20)])
def test_as_many_probes_as_features_are_enough(rng, n_probes, most):
    """Of so few no share can be told from 1 %."""
    x = np.float32(rng.normal(size=(300, 8)))
    severity = survey.moments_lib.severity([x], covariance=True)
    choices = remedies.preprocessings(severity, x.mean(0), only=("none", "mean"))
    found = remedies.forecast_closely(sources.open_tokens(x), choices, x.mean(0), 16, 4, n_probes, 0)
    assert {name: len(one.rows) for name, one in found.items()} == {"none": most, "mean": most}


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
     "values that are not finite: 28; the first: row 4900, dimension 0 is nan", 2),
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
    (["--activations=nowhere.npy", "--workdir={w}"], "activations = 'nowhere.npy': nothing is there"),
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
    assert "rest on 40 tokens (rows), where 24 dimensions want at least 256" in found["warnings"][0]
    counted = count_deaths(x, 512, 8, seed=3)
    assert found["remedies"]["none"]["measured"]["dead_total"] == pytest.approx(counted["dead_total"], abs=0.08)


def test_untrained_saes_that_memory_cannot_hold_are_refused(activations):
    with pytest.raises(Refused, match="n_features = 2000000000: at most about"):
        sae_jax.diagnose(activations, n_features=2 * 10**9, k=8, measure=True)


def test_values_that_are_not_finite_in_made_activations_fail_the_run(monkeypatch, tiny: ConfigDict):
    monkeypatch.setattr(sources.SyntheticSource, "statistics", lambda self: iter([np.full((300, 16), np.inf)]))
    with pytest.raises(RunFailed, match="values that are not finite: 4800;"):
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


@pytest.mark.parametrize("piece", [remedies.PIECE, 40 * 300])  # all tokens of a batch together, or 256 at a time
def test_the_best_of_each_probe_is_that_of_numpy(rng, monkeypatch, piece):
    """Over more than a batch of tokens, long and short ones and zeros; most rows see none of them from the front."""
    monkeypatch.setattr(remedies, "PIECE", piece)
    n_tokens = sources.BATCH + 700
    x = np.float32(rng.normal(size=(n_tokens, 6)) / 4 + 2) * rng.choice([1e-3, 1, 30], size=(n_tokens, 1))
    x[-5:] = 0
    x[0] = [-9, 1, 1, 1, 1, 1]  # the first is unlike all others
    mean, tokens = x.mean(axis=0, dtype=np.float64), sources.open_tokens(x)
    choices = {
        "none": remedies.Preprocessing(shift=np.zeros(6, np.float32)),
        "unit_norm_centred": remedies.Preprocessing(shift=np.full(6, 0.2, np.float32), norm="unit"),
    }
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.where(length > 0, length, 1) - 0.2
    views = {"none": x, "unit_norm_centred": unit}
    found = remedies.forecast(tokens, choices, mean, 40, 0)
    of_batch = remedies.forecast(tokens, choices, mean, 40, 0, dict.fromkeys(choices, Selection("batch_topk")))
    for name, view in views.items():
        w, size = found[name].rows, np.linalg.norm(view, axis=1, keepdims=True)
        seen = view @ w.T
        cosines = seen / np.where(size > 0, size, 1)
        np.testing.assert_allclose(found[name].best, np.sqrt(6) * cosines.max(axis=0), atol=1e-5)
        np.testing.assert_allclose(of_batch[name].best, seen.max(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_batch[name].norms, size[:, 0], rtol=1e-5)
        assert (found[name].norms, found[name].selection, of_batch[name].selection.rule) == (
            None, Selection(), "batch_topk",
        )  # fmt: skip
    assert (np.diff(found["none"].rows @ mean) > 0).all()  # in the order of their strata
    behind = stratified_rows(40, np.zeros(6), np.random.default_rng([0, theory.STREAM]))
    np.testing.assert_array_equal(found["unit_norm_centred"].rows, behind)  # a norm leaves nothing of the mean


def test_deaths_that_are_measured_are_told_over_the_tokens_seen(rng):
    x = np.float32(rng.normal(size=(sources.BATCH + 900, 6)) + 2)
    choices = {"none": remedies.Preprocessing(shift=np.zeros(6, np.float32))}
    deaths, curves = remedies.measured(sources.open_tokens(x), choices, 64, 4, 0)
    assert [count for count, *_ in curves["none"]] == [sources.BATCH, sources.BATCH + 900]
    assert curves["none"][-1][1:] == [deaths["none"]["dead_by_relu"], deaths["none"]["dead_total"]]
    assert remedies.measured_deaths(sources.open_tokens(x), choices, 64, 4, 0) == deaths


@pytest.mark.parametrize(("d_model", "n_probes", "n_features", "rule", "needed"), [
    (100, 512, 0, "topk", 16 * 8 * 100**2 + 6 * 512 * (12 * 100 + 8 * 4096)),
    (100, 2**17, 0, "topk", 16 * 8 * 100**2 + 6 * 2**17 * (12 * 100 + 8 * 1024)),
    (64, 16, 1000, "topk", 16 * 8 * 64**2 + 6 * 16 * (12 * 64 + 8 * 4096) + 4000 * (8 * 64 + 2 * 4096 + 12)),
    (64, 16, 1000, "relu", 16 * 8 * 64**2 + 6 * 16 * (12 * 64 + 8 * 4096) + 4000 * (8 * 64 + 4 * 4096 + 12)),
])  # fmt: skip
def test_the_memory_of_a_diagnosis_is_that_of_its_arrays(d_model, n_probes, n_features, rule, needed):
    """Sixteen scatters in float64; probes of six remedies in float64 and float32; eight arrays as large as W_enc."""
    assert remedies.bytes_needed(d_model, n_probes, n_features, rule) == needed
    if not n_features:
        assert remedies.bytes_needed(d_model, n_probes) == needed


def told(**totals):
    """By ReLU half of them, of the remedies named, in the order of cost."""
    return {name: {"dead_by_relu": totals[name] / 2, "dead_total": totals[name]}
            for name in remedies.REMEDIES if name in totals}  # fmt: skip


def test_one_in_a_hundred_is_harmless_and_two_are_alike():
    assert remedies.recommended(told(none=0.015, mean=0.009, whitening=0)) == "mean"
    assert remedies.recommended(told(none=0.515, mean=0.505, whitening=0.5)) == "none"
    assert remedies.recommended(told(none=0.62, mean=0.515, whitening=0.5)) == "mean"
    assert remedies.recommended(told(none=0.56, mean=0.53, whitening=0.5)) == "whitening"
    assert recipes.recipe(told(geometric_median=0.03, none=0.1), "whitening")["sae.whiten"] is True
    assert recipes.recipe(told(geometric_median=0.015, none=0.1), "whitening") == {
        "sae.center": "geometric_median", "sae.balance": True, "auxk.preset": "none",
    }  # fmt: skip


@pytest.mark.parametrize(("probe", "chosen", "rule", "said"), [
    (told(none=0.004, mean=0.0), "none", "topk",
     "Untreated, 0.4 % of the features are forecast to be dead at initialisation, 0.2 % by ReLU. No remedy is needed."),
    (told(none=0.5, mean=0.006), "mean", "topk",
     "Untreated, 50.0 % of the features are forecast to be dead at initialisation, 25.0 % by ReLU. Death by ReLU stays "
     "until the bias has learned the mean; death by TopK can shrink or grow in training, which --pilot forecasts "
     "roughly: this is a risk, not a verdict. "
     "Starting the bias at the arithmetic mean is forecast to leave 0.6 % dead."),
    (told(none=0.015, mean=0.04, whitening=0.034), "none", "relu",
     "Untreated, 1.5 % of the features are forecast to be dead at initialisation, 0.8 % by ReLU. Death by ReLU stays "
     "until the bias has learned the mean: this is a risk, not a verdict. No remedy is forecast to leave clearly "
     "fewer: the mean is not what they die of. Beware, these make it worse: mean 4.0 %. A mean that a few tokens of "
     "very large norm make does that; the geometric median ignores them."),
    (told(none=0.5, whitening=0.2), "whitening", "relu",
     "Untreated, 50.0 % of the features are forecast to be dead at initialisation, 25.0 % by ReLU. Death by ReLU stays "
     "until the bias has learned the mean: this is a risk, not a verdict. PCA whitening is the best found, and still "
     "leaves 20.0 % dead."),
])  # fmt: skip
def test_the_advice_word_for_word(probe, chosen, rule, said):
    assert remedies.advice(probe, chosen, rule=rule) == said


@pytest.mark.parametrize(("largest", "power"), [
    (3.0, 0), (0.0011, 0), (9e5, 0), (0.0, 0), (9e-4, 10), (1e-5, 17), (1.5e6, -21), (1e20, -66),
])  # fmt: skip
def test_tokens_that_float32_cannot_square_are_brought_near_one(largest, power):
    """By the power of two nearest to it in logarithm: 1e20 is 2^66.4."""
    x = largest * np.array([[0.5, -1.0], [0.25, 0.0]])
    tokens, scale = survey.rescaled(sources.Tokens(lambda: iter([x, 2 * x]), 2, {}, given=True))
    assert scale == 2.0**power
    np.testing.assert_array_equal(np.concatenate(list(tokens.batches())), np.concatenate([x, 2 * x]) * 2.0**power)
    empty, one = survey.rescaled(sources.Tokens(lambda: iter([]), 2, {}, given=True))
    assert (list(empty.batches()), one) == ([], 1.0)


def test_what_the_first_pass_counts(rng):
    x = np.float32(rng.normal(size=(600, 4))) / 64
    x[[3, 400, 401]] = 0
    x[:2, 1] = 0  # not zero in every dimension
    tokens = sources.Tokens(lambda: iter(np.split(x, [250, 500])), 4, {}, given=True)
    severity, sample, counts = survey.first_pass(tokens)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    assert counts == (3, pytest.approx(10 * np.median(norms[norms > 0])), False, 24)
    np.testing.assert_array_equal(sample, x)
    assert severity.directions.covariance.shape == (4, 4)
    x[7] *= 12 * np.median(norms) / norms[7]
    assert survey.first_pass(tokens)[2].any_giant
    assert survey.first_pass(tokens, of_directions=False)[0].directions.scatter is None


def test_a_dimension_is_still_where_only_rounding_moves_it():
    """By a millionth of a millionth of its mean."""
    mean, sigma = np.array([1e6, 1e6, 0.0, -1e-6, -4.0]), np.array([0.9e-6, 1.5e-6, 0.0, 1e-10, 0.0])
    found = survey.moments_lib.Moments(100, mean, 100 * sigma**2)
    assert survey.constant(survey.moments_lib.Severity(found, found, found)).tolist() == [0, 2, 4]


@pytest.mark.parametrize(("n_tokens", "d_model", "said"), [
    (256, 100, None), (255, 100, "these numbers rest on 255 tokens (rows), where 100 dimensions want at least 256: a "
                                 "feature that fires on 1 token in 86 may look dead"),
    (400, 200, None), (399, 200, "rest on 399 tokens (rows), where 200 dimensions want at least 400"),
])  # fmt: skip
def test_few_tokens_are_fewer_than_256_or_two_a_dimension(rng, n_tokens, d_model, said):
    """0.05^(1/255) = 1 − 1/85.6."""
    found = survey.warnings(survey.moments_lib.severity([rng.normal(size=(n_tokens, d_model))]), 24)
    assert found == [] if said is None else said in found[0]


@pytest.mark.parametrize(("mean", "told"), [(6 * np.ones(64), True), (6 * np.eye(64)[0], False), (np.zeros(64), False)])
def test_a_mean_that_layer_norm_removes_is_told(rng, mean, told):
    """Of 6 in all dimensions alike gamma is 0.0, and 97 % of 1024 features are dead."""
    found = survey.warnings(survey.moments_lib.severity([rng.normal(size=(2000, 64)) + mean]), 24)
    assert ["go by gamma_direction, 6.0" in warning for warning in found] == [True] * told


def test_sixteen_tokens_of_two_dimensions_can_be_diagnosed(rng):
    x = rng.normal(size=(16, 2)) + [1, 0]
    tokens = sources.Tokens(lambda: iter([x]), 2, {}, given=True)
    assert survey.first_pass(tokens)[0].raw.n_tokens == 16
    for few, d, said in ((x[:15], 2, "at least 16 tokens, not 15"), (x[:, :1], 1, "at least 2 dimensions")):
        with pytest.raises(Refused, match=said):
            survey.first_pass(sources.Tokens(lambda few=few: iter([few]), d, {}, given=True))


def test_the_summary_is_in_units_of_the_variation(rng):
    """A bias learns nine tenths of a mean in one dimension by that much learning rate, where ‖sigma‖ = √d."""
    x = rng.normal(size=(500, 5))
    x = np.hstack([x - x.mean(axis=0), np.ones((500, 1))]) * 7 * np.arange(1, 7)
    found = survey.summary(survey.moments_lib.severity([x], covariance=True))
    size = np.linalg.norm(x.std(axis=0))
    assert found["bias_learning_time"] == pytest.approx(0.9 * 42 * np.sqrt(6) / size)
    kurtosis = [np.mean((x[:, j] / x[:, j].std()) ** 4) - 3 for j in range(5)]
    assert found["kurtosis"] == pytest.approx({"median": np.median(kurtosis), "max": max(kurtosis)})
    assert (found["n_tokens"], found["d_model"]) == (500, 6)
    assert found["n_outlier_dimensions"] == len(found["outlier_dimensions"])


def test_each_law_has_its_own_gamma_and_rank(rng):
    x = (rng.normal(size=(2000, 8)) * np.geomspace(3, 0.3, 8) + [2, 0, 0, 0, 1, 0, 0, 3]) * rng.uniform(1, 3, (2000, 1))
    normed = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    gamma, raw, one = (np.linalg.norm(y.mean(axis=0)) / np.linalg.norm(y.std(axis=0)) for y in (normed, x, unit))

    def rank(y):
        share = np.linalg.eigvalsh(np.cov(y.T, ddof=0))
        share = share[share > 1e-12] / share.sum()
        return np.exp(-share @ np.log(share))

    size = (2000, 512, 8)
    found = diagnosis.predictions(survey.moments_lib.severity([x], covariance=True), np.float32(x[:500]), 512, 8)
    t, c, median = norm.isf(8 / 512), norm.isf(1 / 2000), norm.ppf(0.5 ** (1 / 2000))
    axis = unit.mean(axis=0) / np.linalg.norm(unit.mean(axis=0))
    across = np.linalg.svd(axis[None])[2][1:]
    values = np.linalg.eigvalsh(across @ np.cov(unit.T, ddof=0) @ across.T)
    laws = {
        "paper": {"dead_by_relu": norm.cdf(-c / gamma), "dead_total": norm.cdf(t - c / gamma)},
        "finite_gamma": {"dead_by_relu": norm.cdf(-median / one),
                         "dead_total": norm.cdf(t * np.sqrt(1 + one**-2) - median / one)},
        "token_integral": theory.token_integral(one, rank(unit), 8, *size),
        "two_gammas": theory.two_gammas(gamma, raw, rank(normed), 8, *size),
        "spectrum": theory.spectrum_law(values[::-1], unit[:500] @ axis, *size),
    }  # fmt: skip
    assert found.keys() == laws.keys()
    for name, law in laws.items():
        assert found[name] == pytest.approx(law, rel=1e-5), name


def test_what_is_asked_where_nothing_is_said(activations):
    found = sae_jax.diagnose(activations[:300])
    asked = ("n_features", "k", "selection", "threshold", "n_probes", "seed", "after_training", "scale")
    assert [found[key] for key in asked] == [8192, 64, "topk", None, 512, 0, None, 1.0]
    assert found["remedies"]["none"]["measured"] is None


@pytest.mark.parametrize(("n_features", "k", "n_probes", "seed"), [
    (1, 1, 16, 0), (2**31 - 1, 2**31 - 1, 2**20, 2**31 - 1),
])  # fmt: skip
def test_the_ends_of_what_can_be_asked_are_allowed(n_features, k, n_probes, seed):
    diagnosis.check(n_features, k, n_probes, seed, None)


def test_a_damaged_shard_is_named_as_such(tmp_path, rng):
    np.save(tmp_path / "x.npy", rng.normal(size=(3000, 8)).astype(np.float32))
    folder = store.import_file(str(tmp_path / "x.npy"), str(tmp_path / "data"))
    shard = next(Path(folder).glob("*.array_record*"))
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(bytes(4000))
    with pytest.raises(Refused, match="activations = .*: whole shards; .*is damaged"):
        diagnosis.diagnose(folder, n_features=32, k=4)
