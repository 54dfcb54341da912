from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.death import Sightings
from sae_jax.errors import Refused, RunFailed
from sae_jax.models.sources import open_source
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.preprocess import Preprocessing
from sae_jax.runtime import devices as devices_lib
from sae_jax.training import fates
from sae_jax.training import run as run_lib
from sae_jax.training import step as step_lib
from sae_jax.training.ensemble import Ensemble


@pytest.mark.usefixtures("x64")
def test_eight_members_equal_eight_alone_over_fifty_steps(tiny):
    """Seeds, gammas, learning rates, AuxK weights, frozen and centred biases, all in one program."""
    tiny.auxk.dead_after_tokens = 64  # AuxK is at work from the third step
    tiny.data.gamma = 1.0
    tiny.members = ConfigDict({
        "plain": {}, "seed": {"seed": 3}, "rate": {"train": {"learning_rate": 3e-3}}, "off": {"auxk": {"weight": 0.0}},
        "far": {"data": {"gamma": 40.0}}, "far_off": {"data": {"gamma": 40.0}, "auxk": {"weight": 0.0}},
        "frozen": {"data": {"gamma": 5.0}, "sae": {"freeze_bias": True}}, "near": {"data": {"gamma": 0.0}},
    })  # fmt: skip
    configs = list(config_lib.members(tiny).values())
    static = step_lib.Static.of(tiny)
    spec = synthetic.build(tiny.data, seed=0)
    moved = jnp.stack([(c.data.gamma - 1.0) * 4.0 * spec.direction for c in configs])  # √d = 4

    @jax.jit
    def step(state, x):
        return step_lib.group_step(state, x, static=static, allsum=lambda tree: tree)

    together = step_lib.init_group(configs, jnp.zeros((8, 16)), Preprocessing(shift=-moved, scale=jnp.ones(8)))
    alone = [step_lib.init_group([c], jnp.zeros((1, 16))) for c in configs]
    for t in range(50):
        x = synthetic.sample(spec, 0, t, jnp.arange(32))
        together, metrics = step(together, x)
        for i, state in enumerate(alone):
            alone[i], one = step(state, x + moved[i])  # the single run sees tokens of its own gamma
            np.testing.assert_allclose(metrics["loss"][i], one["loss"][0], rtol=1e-9)
    assert together.tokens_since_fired.max() >= 64  # something was dead
    for i, state in enumerate(alone):
        np.testing.assert_array_equal(together.tokens_since_fired[i], state.tokens_since_fired[0])
        for a, b in zip(jax.tree.leaves(together.sae), jax.tree.leaves(state.sae), strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-9, atol=1e-9)


def record_after(config, workdir, steps):
    run = run_lib.Run(config, str(workdir), devices_lib.Devices(1), open_source(config))
    for _ in range(0, steps, config.train.steps_per_dispatch):
        run.states, _ = run._advance(run.states, run._next_inputs(4), np.int32(4))
    record = run._record()
    run.data.close()
    run.checkpoints.close()
    return record, run.ensemble


@pytest.mark.usefixtures("x64")
def test_a_member_of_another_gamma_is_a_run_at_that_gamma(tiny, tmp_path):
    tiny.members = ConfigDict({"own": {"data": {"gamma": 9.0}}, "base": {}, "centred": {"sae": {"center": "mean"}}})
    shared, ensemble = record_after(tiny, tmp_path / "shared", 12)
    tiny.data.gamma = 9.0
    tiny.members = ConfigDict({"own": {}, "centred": {"sae": {"center": "mean"}}})
    alone, _ = record_after(tiny, tmp_path / "alone", 12)
    for key, value in alone["members"]["own"].items():
        assert shared["members"]["own"][key] == pytest.approx(np.asarray(value), rel=1e-7), key
    assert shared["fates"]["own"] == alone["fates"]["own"]
    assert shared["members"]["own"]["fve_about_zero"] > shared["members"]["base"]["fve_about_zero"]
    assert ensemble.gamma_raw("own") == pytest.approx(9.0, rel=0.05)
    # What is centred does not know how far the mean was.
    for key in ("dead_total", "fve", "mmcs"):
        expected = alone["members"]["centred"][key]
        assert shared["members"]["centred"][key] == pytest.approx(expected, rel=1e-7), key


def test_gamma_of_stored_activations_cannot_be_overridden(tiny):
    tiny.data.path = "x.npy"
    tiny.members = ConfigDict({"far": {"data": {"gamma": 9.0}}})
    with pytest.raises(Refused, match=r"members.far.data.gamma = 9.0.*the mean that they have"):
        config_lib.members(tiny)


def test_evaluations_come_at_checkpoints_and_evenly_in_log(tiny):
    tiny.train.steps, tiny.checkpoint.every = 1000, 400
    assert config_lib.evaluation_steps(tiny) == [0, 400, 800, 1000]
    tiny.eval.points = 4
    assert config_lib.evaluation_steps(tiny) == [0, 1, 10, 100, 400, 800, 1000]


def test_ledger_counts_births_deaths_and_revivals():
    seen = [Sightings(positive=np.array(p, bool), n_fired=np.array(f)) for p, f in (
        ([1, 1, 0, 0], [1, 0, 0, 0]), ([1, 1, 1, 0], [0, 1, 0, 0]), ([0, 1, 1, 0], [0, 1, 1, 0]),
        ([1, 1, 0, 0], [1, 0, 0, 0]),
    )]  # fmt: skip
    history = [{"step": 10 * i, "fates": {"sae": fates.letters(s)}} for i, s in enumerate(seen)]
    assert [entry["fates"]["sae"] for entry in history] == ["ATRR", "TATR", "RAAR", "ATRR"]
    found = fates.ledger(history, "sae")
    assert found.born() == [0, 10, 20, None]
    assert found.deaths() == [1, 1, 1, 0]
    assert found.revivals() == [1, 1, 1, 0]
    line = fates.rows("sae", found, np.zeros(4), np.ones(4), np.arange(4), np.array([9, 0, 50, 1]),
                      np.array([1.0, 0.0, 2.34567, 3.0]), 200)[2]  # fmt: skip
    assert (line["init"], line["final"], line["born"], line["tokens_since_fired"]) == ("R", "R", 20, 2)
    assert line["largest_activation"] == 2.346
    assert (line["frequency"], line["frequency_low"], line["frequency_high"]) == (0.25, 0.1916, 0.316)
    cosine = fates.alignment(np.array([[3.0, 0.0], [0.0, -2.0]]), np.array([0.0, 5.0]))
    np.testing.assert_allclose(cosine, [0, -1])


def test_alignment_knows_no_length_and_is_nothing_where_there_is_no_mean():
    rows, mu = np.array([[0.3, 0.4], [-0.05, 0.0], [0.0, 0.0]]), np.array([0.2, 0.0])
    np.testing.assert_allclose(fates.alignment(rows, mu), [0.6, -1, 0], rtol=1e-6)
    np.testing.assert_array_equal(fates.alignment(rows, np.zeros(2)), np.zeros(3))


def test_a_table_of_fates_has_cosines_of_four_decimals():
    found = fates.Ledger(np.array([0, 7]), np.array([[fates.ALIVE], [fates.BY_RELU]]))
    cosines = np.array([0.123456]), np.array([-0.98765])
    (line,) = fates.rows("sae", found, *cosines, np.array([3]), np.array([0]), np.zeros(1), 50)
    assert (line["mu_cosine_init"], line["mu_cosine_final"]) == (0.1235, -0.9877)
    assert (line["init"], line["final"], line["born"], line["deaths"], line["revivals"]) == ("A", "R", 0, 1, 0)


def test_the_first_value_that_is_not_finite_is_named(rng):
    good, bad = rng.normal(size=(2, 6, 4))
    bad[4, 1], bad[3, 2] = np.nan, -np.inf
    source = SimpleNamespace(statistics=lambda: [good, bad, good])
    with pytest.raises(RunFailed, match=r"step 0, statistics batch 1: .*\(row 3, dimension 2 is -inf\)"):
        list(Ensemble._batches(SimpleNamespace(source=source)))


def correlated(rng, n_tokens=4000, d=16):
    """Tokens with a mean, whose variances span two decades."""
    return rng.normal(size=(n_tokens, d)) * np.logspace(0, -1, d) @ rng.normal(size=(d, d)) + 3 * rng.normal(size=d)


def after_training(config, workdir, x):
    path = workdir.with_suffix(".npy")
    np.save(path, x)
    config = ConfigDict(config.to_dict())
    config.data.path = str(path)
    run = run_lib.Run(config, str(workdir), devices_lib.Devices(1), open_source(config))
    run.states, metrics = run._advance(run.states, run._next_inputs(4), np.int32(4))
    record = run._record()
    run.data.close()
    run.checkpoints.close()
    return run, metrics, record


@pytest.mark.usefixtures("x64")
def test_behind_whitening_an_sae_trains_as_on_whitened_activations_and_is_judged_on_x(tiny, tmp_path, rng, capsys):
    x = correlated(rng)
    tiny.data.signal, tiny.members = "", ConfigDict({"one": {}, "two": {"seed": 1}})
    tiny.sae.whiten = True
    run, metrics, record = after_training(tiny, tmp_path / "whiten", x)
    assert "sae.whiten keeps" not in capsys.readouterr().err  # it has kept all dimensions
    assert not any(state.sae.b_dec.any() for state in run.ensemble.initial_states())
    before = run.ensemble._whitening()
    y = np.asarray(before(jnp.asarray(x * run.ensemble.scale)))
    np.testing.assert_allclose(np.cov(y.T), np.eye(16), atol=0.3)  # whitened by the training tokens alone

    tiny.sae.whiten = False
    plain, expected, judged = after_training(tiny, tmp_path / "plain", y)
    np.testing.assert_allclose(plain.ensemble.scale, 1, rtol=1e-5)
    for key in ("loss", "fve", "l0"):
        np.testing.assert_allclose(metrics[0][key], expected[0][key], rtol=1e-4)
    assert record["fates"] == judged["fates"]

    held_out = np.concatenate([x[valid] for x, valid in run.source.held_out()])  # x itself, in NumPy
    state = jax.tree.map(lambda a: a[0], run.states[0])
    codes = sae_lib.encode(state.sae, before(held_out * run.ensemble.scale))
    x_hat = before.invert(sae_lib.decode(state.sae, codes))
    largest = np.zeros(64)
    np.maximum.at(largest, np.asarray(codes.indices), np.asarray(codes.values))
    np.testing.assert_allclose(run.ensemble.seen["one"].largest, largest, rtol=1e-5)
    error = held_out - np.asarray(x_hat) / run.ensemble.scale
    fve = 1 - np.sum(error**2) / np.sum((held_out - held_out.mean(axis=0)) ** 2)
    assert record["members"]["one"]["fve"] == pytest.approx(fve, abs=1e-5)
    assert record["members"]["one"]["bias_projection"] == pytest.approx(1, abs=0.05)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm", ["layer_norm", "unit"])
def test_a_norm_of_tokens_is_as_good_as_normed_activations(tiny, tmp_path, rng, norm):
    x = correlated(rng)
    normed = {"layer_norm": moments_lib.layer_norm, "unit": moments_lib.direction}[norm](x)
    tiny.data.signal, tiny.members = "", ConfigDict({"centred": {"sae": {"center": "geometric_median"}}})
    tiny.data.norm = norm
    run, metrics, record = after_training(tiny, tmp_path / "norm", x)
    tiny.data.norm = "none"
    plain, expected, judged = after_training(tiny, tmp_path / "plain", normed)
    np.testing.assert_allclose(metrics[0]["loss"], expected[0]["loss"], rtol=1e-6)
    for key, value in record["members"]["centred"].items():
        assert judged["members"]["centred"][key] == pytest.approx(np.asarray(value), rel=1e-6), key
    gammas = moments_lib.severity(run.source.statistics()).gammas()
    np.testing.assert_allclose(run.ensemble.statistics["gammas"], list(gammas.values()))  # of x as it comes


def test_whitening_and_another_centre_exclude_each_other(tiny):
    tiny.members = ConfigDict({"white": {"sae": {"whiten": True, "center": "geometric_median"}}})
    with pytest.raises(Refused, match=r"members.white.sae.center = 'geometric_median': none or mean"):
        config_lib.check(tiny)
