"""The training step against `reference.py`, sizes at which other branches are taken, counts of what is on the edge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ml_collections import ConfigDict

import sae_jax
from sae_jax import config as config_lib
from sae_jax.autoencoder import death, dense, kept
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.runtime import checkpoint
from sae_jax.runtime import devices as devices_lib
from sae_jax.training import evaluation
from sae_jax.training import step as step_lib

STEPS = 8  # of which the schedule's factors are exact in float32, as optax computes them
CLIP = {"none": 10.0, "openai": 2.0, "dictionary_learning": 10.0, "saelens": 20.0, "sparsify": 10.0}


def configured(preset, unit_decoder=True, freeze_bias=False, n=700, k=3):
    return config_lib.base({
        "sae.n_features": n, "sae.k": k, "sae.unit_decoder": unit_decoder, "sae.freeze_bias": freeze_bias,
        "auxk.preset": preset, "auxk.dead_after_tokens": 40, "train.steps": STEPS, "train.learning_rate": 0.01,
        "train.warmup_steps": 1, "train.decay_fraction": 0.5, "train.beta1": 0.8, "train.beta2": 0.95,
        "train.clip_norm": CLIP[preset], "data.signal": "gaussian",
    })  # fmt: skip


def rules_of(config):
    """The same settings under the reference's own names."""
    return reference.Rules(
        preset=config.auxk.preset, k=config.sae.k, dead_after=40, learning_rate=0.01, steps=STEPS, warmup=1, decay=0.5,
        betas=(0.8, 0.95), clip=CLIP[config.auxk.preset], unit_decoder=config.sae.unit_decoder,
        learn_bias=not config.sae.freeze_bias,
    )  # fmt: skip


def beginnings(rng, config, d, silent):
    """The same state for both: every parameter away from a special value."""
    n, static = config.sae.n_features, step_lib.Static.of(config)
    rows = rng.normal(size=(2, n, d)) / np.sqrt(d)
    if config.sae.unit_decoder:
        rows[1] /= np.linalg.norm(rows[1], axis=1)[:, None]
    p = {"W_enc": rows[0], "b_enc": 0.02 * rng.normal(size=n), "W_dec": rows[1], "b_dec": 0.02 * rng.normal(size=d)}
    state = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(config), jnp.zeros(d))
    state = state.replace(
        sae=state.sae.replace(**jax.tree.map(jnp.asarray, p)), tokens_since_fired=jnp.asarray(silent, jnp.int32)
    )
    return state, reference.State(p, silent)


@functools.cache
def compiled(static):
    return jax.jit(functools.partial(step_lib.train_step, static=static))


def assert_alike(config, state, known, batches):
    """Metrics, parameters, moments and counters of every step; returns what the reference reported."""
    step, rules = compiled(step_lib.Static.of(config)), rules_of(config)
    reports = []
    for x in batches:
        state, metrics = step(state, jnp.asarray(x))
        known, expected = reference.train_step(known, x, rules)
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-9, err_msg=f"{key} of step {known.step}")
        np.testing.assert_array_equal(state.tokens_since_fired, known.silent)
        for name in reference.PARAMETERS:
            for mine, theirs in ((state.sae, known.parameters), (state.moments.mean, known.mean),
                                 (state.moments.square, known.square)):  # fmt: skip
                np.testing.assert_allclose(
                    getattr(mine, name), theirs[name], rtol=1e-7, atol=1e-10, err_msg=f"{name} of step {known.step}"
                )
        reports.append(expected)
    return reports


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("unit_decoder", [True, False])
@pytest.mark.parametrize("preset", reference.LIBRARIES)
def test_steps_are_those_of_the_reference(rng, preset, unit_decoder):
    """Clipped and not, counters on both sides of the limit and on it, more dead features than any k_aux, or two."""
    d = 6
    most = np.array([0, 32, 39, 40, 48, *13 * [400]])[rng.integers(18, size=700)]
    two = np.where(np.arange(700) < 2, 40, np.arange(700) % 8)
    # The norm of the gradient follows that of the tokens, from one side of the clip to the other.
    batches = [s * rng.normal(size=(8, d)) for s in np.geomspace(0.05, 4, STEPS)]
    for silent in (most, two):
        for freeze_bias in (False, True):
            config = configured(preset, unit_decoder, freeze_bias)
            state, known = beginnings(rng, config, d, silent)
            reports = assert_alike(config, state, known, batches)
            norms = [report["grad_norm"] for report in reports]
            assert min(norms) < 0.9 * CLIP[preset]
            assert max(norms) > 1.1 * CLIP[preset]


@pytest.mark.usefixtures("x64")
def test_steps_of_a_large_sae_are_those_of_the_reference(rng):
    """n · d = 2^20: compressed rows, tokens in pieces, the update in blocks."""
    n, d = 4096, 256
    assert (kept.form(8, n, d), kept.form(d // 2, n, d)) == ("compressed", "compressed")
    config = configured("dictionary_learning", n=n, k=8)
    silent = np.where(rng.random(n) < 0.5, 400, 0)
    state, known = beginnings(rng, config, d, silent)
    assert_alike(config, state, known, [s * rng.normal(size=(256, d)) for s in (0.5, 2.0)])


@pytest.mark.usefixtures("x64")
def test_one_dead_feature_is_enough_for_auxk(rng):
    config, silent = configured("dictionary_learning"), np.where(np.arange(700) == 3, 40, 0)
    state, known = beginnings(rng, config, 6, silent)
    known.parameters["b_enc"][3] = 1.0  # positive on tokens, and not among the k
    state = state.replace(sae=state.sae.replace(b_enc=jnp.asarray(known.parameters["b_enc"])))
    assert_alike(config, state, known, [0.1 * rng.normal(size=(8, 6))])


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2**15, 2**15 + 1, 2**16])  # a key of 32 bits holds the first and not the others
def test_kept_entries_are_sorted_and_summed_right_where_one_key_would_not_hold_them(rng, n):
    batch, k, d = 2048, 64, 2**20 // n + 1
    assert kept.form(k, n, d) == "compressed"
    indices = rng.integers(n, size=(batch, k)).astype(np.int32)
    indices[:2] = n - 1 - np.arange(2 * k).reshape(2, k)
    features, order = jax.jit(lambda i: kept._sorted(i, n))(indices.ravel())
    expected = np.argsort(indices.ravel(), kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(features, indices.ravel()[expected])

    values = rng.integers(-3, 4, size=(batch, k)).astype(np.float32)  # sums of small integers are exact in any order
    tokens = rng.integers(-3, 4, size=(batch, d)).astype(np.float32)
    (found,) = jax.jit(lambda v, i, t: kept.scatter((v,), i, (t,), n))(values, indices, tokens)
    sums = np.zeros((n, d))
    np.add.at(sums, indices.ravel(), (values[:, :, None] * tokens[:, None]).reshape(-1, d))
    np.testing.assert_array_equal(found, sums)


@pytest.mark.parametrize(("k", "n", "d", "cpu", "gpu"), [
    (128, 4096, 256, "compressed", "sorted"), (129, 4096, 256, "dense", "sorted"),  # one in 32
    (128, 4096, 255, "rows", "sorted"), (256, 4096, 256, "dense", "sorted"),  # 2^20 entries
    (257, 4096, 256, "dense", "dense"), (4, 128, 6, "rows", "sorted"), (5, 128, 6, "dense", "sorted"),  # one in 16
])  # fmt: skip
def test_products_take_the_form_that_was_cheapest_where_it_was_measured(k, n, d, cpu, gpu):
    assert (kept.form(k, n, d), kept.form_on_gpu(k, n)) == (cpu, gpu)
    assert kept.is_large(n, d) == (n * d >= 1_048_576)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33])  # positions of one bit more or less
def test_any_number_of_kept_entries_is_sorted(rng, count):
    features = rng.integers(6, size=count).astype(np.int32)
    features[-1] = 1
    ordered, order = kept._sorted(jnp.asarray(features), 6)
    expected = np.argsort(features, kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(ordered, features[expected])


def test_counters_go_on_past_ten_million_and_stop_at_the_largest_integer():
    silent = jnp.asarray([9_999_990, 10_000_000, 2_147_483_600, 2_147_483_640, 2_147_483_647], jnp.int32)
    after = death.count_tokens(silent, jnp.zeros(5, bool), 20)
    np.testing.assert_array_equal(after, [10_000_010, 10_000_020, 2_147_483_620, 2_147_483_647, 2_147_483_647])


# -- on the edge -------------------------------------------------------------------------------------------------------


def untrained(n, d, W_enc):
    config = configured("none", n=n)
    state = step_lib.init_state(
        jax.random.key(0), step_lib.Static.of(config), step_lib.hyper(config), jnp.zeros(d)
    )
    return state.sae.replace(W_enc=jnp.asarray(W_enc, jnp.float32))


def test_a_zero_token_revives_nobody(rng):
    """On a token equal to b_dec all pre-activations are 0: no feature is positive, and none fires."""
    W = rng.normal(size=(12, 4))
    W[:5, 0] = -np.abs(W[:5]).sum(axis=1) - 1  # negative wherever the first coordinate leads
    x = np.clip(rng.normal(size=(30, 4)), -1, 1).astype(np.float32)
    x[:, 0] = 1 + np.abs(x[:, 0])
    x[7] = 0
    seen, codes = death.sight(untrained(12, 4, W), jnp.asarray(x), jnp.ones(30, bool))
    np.testing.assert_array_equal(seen.positive, (x @ W.T > 0).any(axis=0))
    assert not np.asarray(seen.positive)[:5].any()
    assert not np.asarray(codes.values)[7].any()


def test_where_all_that_is_positive_fires_a_zero_token_counts_for_nothing_either(rng):
    W, x = rng.normal(size=(12, 4)) / 20, rng.normal(size=(30, 4)).astype(np.float32)
    W[:5, 0], x[:, 0] = -1, 1 + np.abs(x[:, 0])
    x[7], valid = 0, np.arange(30) < 28
    x[28:] = [-9, 0, 0, 0]
    sae = dense.of(untrained(12, 4, W), "relu", 0.0)
    seen, acts = death.sight(sae, jnp.asarray(x), jnp.asarray(valid))
    z = (x @ W.T)[:28]
    np.testing.assert_array_equal(seen.positive, (z > 0).any(axis=0))
    np.testing.assert_array_equal(seen.n_fired, (z > 0).sum(axis=0))
    np.testing.assert_allclose(acts[:28], np.maximum(z, 0), atol=1e-6)
    assert not np.asarray(seen.positive)[:5].any()


def test_the_figure_of_shifts_leaves_padding_out(rng):
    W, x = rng.normal(size=(12, 4)), rng.normal(size=(50, 4)).astype(np.float32)
    W[:3, 0], x[:, 0] = -9, np.abs(x[:, 0]) + 1
    padded = np.concatenate([x, np.full((14, 4), -50, np.float32)])  # where those are positive that never are else
    valid = np.arange(64) < 50
    group = jax.tree.map(lambda a: a[None], untrained(12, 4, W))
    batches = iter([(padded[:32], valid[:32]), (padded[32:], valid[32:])])
    run = jax.jit(lambda *given: evaluation.shift_batch(*given, allsum=lambda tree: tree))
    ((found,),) = evaluation.shifts(run, (group,), batches, 50)
    z = x @ W.T
    np.testing.assert_allclose(found.mean, z.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.std, z.std(axis=0), rtol=1e-4)
    np.testing.assert_array_equal(found.dead_by_relu, (z <= 0).all(axis=0))
    assert found.dead_by_relu[:3].all()
    assert found.n_tokens == 50


def test_the_curve_of_deaths_has_a_point_where_the_tokens_have_doubled_and_one_at_the_end():
    curve, seen = evaluation.DeathCurve(first=10), death.Sightings(np.array([True, False]), np.array([0, 0]))
    for n_tokens in (4, 8, 12, 16, 20, 90):
        curve.add(n_tokens, seen)
    curve.add(95, seen, last=True)
    assert curve.points == [[12, 0.5, 1.0], [20, 0.5, 1.0], [90, 0.5, 1.0], [95, 0.5, 1.0]]
    even = evaluation.DeathCurve(first=10)
    for n_tokens in range(5, 90, 5):
        even.add(n_tokens, seen)
    assert [tokens for tokens, *_ in even.points] == [10, 20, 40, 80]


def evaluated(x, W, padded, **points):
    """Held-out metrics of two members in float64: in batches of 32, each with four rows of padding."""
    groups = (jax.tree.map(lambda *a: jnp.stack(a), *(untrained(12, 4, w).replace(b_dec=b) for w, b in W)),)
    valid = np.arange(32) % 8 != 3
    batches = []
    for part in np.array_split(x, len(x) // valid.sum()):
        rows = np.full((32, 4), padded)
        rows[valid] = part
        batches.append((rows, valid))
    run = jax.jit(lambda groups, x, valid: evaluation.evaluate_batch(
        groups, x, valid, jnp.full(4, 5.0), *[lambda tree: tree] * 2, ordinary_shift=jnp.full(4, 2.0), **points
    ))  # fmt: skip
    moved = np.array([np.zeros(4), [1.0, -2.0, 0.5, 3.0]])
    return evaluation.evaluate(run, groups, iter(batches), len(x), np.full(4, 5.0), [moved])[0], moved


def test_held_out_metrics_are_those_of_numpy_with_padding_and_giants(rng, x64):
    x = rng.normal(size=(84, 4)) + 3.0
    x[[5, 40, 83]] *= [[40.0], [-70.0], [55.0]]
    W = [(rng.normal(size=(12, 4)).astype(np.float32), rng.normal(size=4)) for _ in range(2)]
    W[0][0][:4] = -np.abs(W[0][0][:4])  # on one giant alone
    found, moved = evaluated(x, W, padded=-30.0, giant_norm=60.0)
    ordinary = np.linalg.norm(x, axis=1) <= 60
    assert ordinary.sum() == 81
    about_mean = lambda rows: np.sum((rows - rows.mean(axis=0)) ** 2)  # noqa: E731
    for member, (W_enc, b_dec), by in zip(found, W, moved, strict=True):
        z = (x - b_dec) @ W_enc.T
        codes = np.where(z >= np.sort(z, axis=1)[:, -3:-2], np.maximum(z, 0), 0)
        decoder = np.asarray(untrained(12, 4, W_enc).W_dec, np.float64)
        error = np.sum((x - codes @ decoder - b_dec) ** 2, axis=1)
        fired = (codes > 0).sum(axis=0)
        expected = {
            "dead_by_relu": np.mean((z <= 0).all(axis=0)), "dead_total": np.mean(fired == 0),
            "dead_by_topk": np.mean((z > 0).any(axis=0) & (fired == 0)), "fired_once": np.mean(fired == 1),
            "fve": 1 - error.sum() / about_mean(x), "n_giant_tokens": 3, "l0": fired.sum() / 84,
            "fve_without_giants": 1 - error[ordinary].sum() / about_mean(x[ordinary]),
            "fve_about_zero": 1 - error.sum() / np.sum((x + by) ** 2),
        }  # fmt: skip
        for key, value in expected.items():
            assert member[key] == pytest.approx(value, rel=1e-9), key
        np.testing.assert_array_equal(member["seen"].n_fired, fired)
        assert member["dead_over_tokens"] == [[84, expected["dead_by_relu"], expected["dead_total"]]]


def test_where_all_tokens_are_giants_nothing_is_left_to_explain(rng, x64):
    x, W = rng.normal(size=(56, 4)), rng.normal(size=(12, 4)).astype(np.float32)
    for giant_norm, giants in ((0.0, 56), (float("inf"), 0)):
        for member in evaluated(x, [(W, jnp.zeros(4))] * 2, padded=0.0, giant_norm=giant_norm)[0]:
            assert member["n_giant_tokens"] == giants
            assert member["fve_without_giants"] == (None if giants else member["fve"])


def test_a_pre_activation_that_never_changes_has_no_spread(rng):
    W = rng.normal(size=(12, 4)) / 100
    W[3] = 0
    sae = untrained(12, 4, W).replace(b_enc=jnp.full(12, 0.3))
    x, group = rng.normal(size=(50, 4)).astype(np.float32), jax.tree.map(lambda a: a[None], sae)
    run = jax.jit(lambda *given: evaluation.shift_batch(*given, allsum=lambda tree: tree))
    ((found,),) = evaluation.shifts(run, (group,), iter([(x, np.ones(50, bool))]), 50)
    np.testing.assert_allclose(found.std, (x @ W.T).std(axis=0), atol=1e-3)
    np.testing.assert_allclose(found.mean, 0.3 + (x @ W.T).mean(axis=0), rtol=1e-5)


@pytest.mark.two_devices
def test_shifts_and_deaths_of_features_on_two_devices_are_those_on_one(rng):
    W, x = rng.normal(size=(128, 4)), rng.normal(size=(40, 4)).astype(np.float32)
    W[:9, 0], x[:, 0] = -9, np.abs(x[:, 0]) + 1
    group, valid = jax.tree.map(lambda a: a[None], untrained(128, 4, W)), np.arange(40) < 33
    x[33:] = -50
    found = []
    for devices in (devices_lib.Devices(1), devices_lib.Devices(2, feature=2)):
        run = devices.compile(
            lambda allsum, _, groups, x, valid, shards=devices.shards: evaluation.shift_batch(
                groups, x, valid, allsum, shards
            ), split=(None, 0, 0), out=lambda *_: sae_lib.FEATURES,
        )  # fmt: skip
        found += evaluation.shifts(run, (group,), iter([(x, valid)]), 33)
    for one, two in zip(*(shift[:-1] for (shift,) in found), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5)
    assert found[0][0].dead_by_relu[:9].all()
    assert found[0][0].dead_by_topk.any()


@pytest.mark.parametrize(("b", "error", "projection", "cosine"), [
    ((3, 4), 13**0.5 / 2, 2.0, 0.8), ((0.06, -0.08), 4.3300**0.5 / 2, -0.04, -0.8), ((0, 2), 0.0, 1.0, 1.0),
    ((0, 0), 1.0, 0.0, None),
])  # fmt: skip
def test_how_far_a_bias_has_come_is_told_by_length_and_direction(b, error, projection, cosine):
    found = evaluation.bias_state(np.array(b, float), np.array([0.0, 2.0]))
    assert found["bias_relative_error"] == pytest.approx(error, rel=1e-4)
    assert found["bias_projection"] == pytest.approx(projection)
    assert found["bias_cosine"] == (None if cosine is None else pytest.approx(cosine))


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_what_is_explained_does_not_hang_on_the_point_that_sums_are_taken_about(rng, x64, shift):
    x, W = rng.normal(size=(60, 4)) + 3.0, rng.normal(size=(12, 4))
    group = jax.tree.map(lambda a: a[None], untrained(12, 4, W))
    point = np.full(4, shift)
    run = jax.jit(lambda *given: evaluation.evaluate_batch(*given, jnp.asarray(point), *[lambda tree: tree] * 2))
    batches = iter([(x[:30], np.ones(30, bool)), (x[30:], np.ones(30, bool))])
    ((found,),) = evaluation.evaluate(run, (group,), batches, 60, point, [np.zeros((1, 4))])
    _, codes = death.sight(untrained(12, 4, W), jnp.asarray(x), jnp.ones(60, bool))
    error = np.sum((x - np.asarray(sae_lib.decode(untrained(12, 4, W), codes))) ** 2)
    assert found["fve_about_zero"] == pytest.approx(1 - error / np.sum(x**2), rel=1e-6)
    assert found["fve"] == pytest.approx(1 - error / np.sum((x - x.mean(axis=0)) ** 2), rel=1e-6)


def test_where_nothing_varies_nothing_is_explained():
    assert evaluation.explained(1.0, 0.0) is None
    assert evaluation.explained(1.0, 4.0) == 0.75
    assert evaluation.explained(0.1, 0.4) == 0.75


def test_the_interval_of_a_firing_rate_is_the_exact_one():
    from scipy.stats import binomtest

    fired, n = np.array([0, 1, 3, 250, 999, 1000]), 1000
    expected = [binomtest(int(k), n).proportion_ci(0.95, "exact") for k in fired]
    found = evaluation.frequency_band(fired, n)
    expected[0] = binomtest(0, n, alternative="less").proportion_ci(0.95, "exact")  # none at all: on one side
    np.testing.assert_allclose(found, np.transpose([(one.low, one.high) for one in expected]), rtol=1e-9, atol=1e-15)


def test_fates_have_the_cosine_with_the_mean_at_both_ends(tiny, tmp_path):
    tiny.train.steps, tiny.train.learning_rate, tiny.members = 4, 0.05, ConfigDict()
    (final,) = (member["final"] for member in sae_jax.train(tiny, str(tmp_path))["members"])
    mu = checkpoint.saved(str(tmp_path)).statistics["mu"]
    first = sae_lib.init(jax.random.key(tiny.seed), 64, 4, jnp.zeros(16)).W_enc
    last = sae_jax.load(str(tmp_path)).sae.W_enc
    table = np.genfromtxt(tmp_path / "fates.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    for end, rows in (("init", np.asarray(first)), ("final", np.asarray(last))):
        cosines = rows @ mu / np.linalg.norm(rows, axis=1) / np.linalg.norm(mu)
        np.testing.assert_allclose(table[f"mu_cosine_{end}"], cosines, atol=1e-3)
    assert np.abs(table["mu_cosine_init"] - table["mu_cosine_final"]).max() > 0.05
    frequency = table["frequency"] * tiny.eval.n_tokens
    np.testing.assert_allclose(frequency, np.round(frequency), rtol=1e-3)
    np.testing.assert_array_equal(frequency > 0, table["final"] == "A")
    assert frequency.sum() == pytest.approx(final["l0"] * tiny.eval.n_tokens, rel=1e-3)
    again = tmp_path / "fates.csv"
    before = again.read_bytes()
    sae_jax.train(tiny, str(tmp_path))  # which has come to its end
    assert again.read_bytes() == before
    silent = table["tokens_since_fired"]
    assert set(silent) <= {batch * tiny.train.batch_size for batch in range(5)}  # last fired in one of them
    assert 0 in silent
