"""BatchTopK, JumpReLU, ReLU and Matryoshka: the libraries' own losses, counts in NumPy, and the way through a run."""

import json
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import sae_jax
from experiments.trust import peer_losses
from sae_jax import cli
from sae_jax import config as config_lib
from sae_jax.autoencoder import batch_topk, death, dense, jumprelu, objective, relu
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.errors import Refused
from sae_jax.exchange import sharing
from sae_jax.models import sources
from sae_jax.training import run as run_lib
from sae_jax.training import step as step_lib
from sae_jax.training.run import train

N, D, K = 48, 16, 4
KINDS = {
    "topk": {"sae": {"groups": "12,48"}},
    "batch": {"sae": {"activation": "batch_topk"}},
    "matryoshka": {"sae": {"activation": "batch_topk", "groups": "12,48"}, "auxk": {"preset": "dictionary_learning"}},
    "relu": {"sae": {"activation": "relu", "k": 0}, "sparsity": {"preset": "saelens", "weight": 0.5}},
    "jump": {"sae": {"activation": "jumprelu", "k": 0},
             "sparsity": {"preset": "saelens_quadratic", "target_l0": 4.0, "weight": 0.3, "warmup_steps": 10}},
}  # fmt: skip


def configured(steps=60, **more):
    config = config_lib.base({
        "data.signal": "sparse", "data.gamma": 3.0, "data.d_model": D, "data.n_true_features": 32, "data.n_active": 3,
        "sae.n_features": N, "sae.k": K, "sae.center": "mean", "auxk.preset": "none", "train.steps": steps,
        "train.batch_size": 64, "train.learning_rate": 3e-3, "train.steps_per_dispatch": 10, "train.devices": 1,
        "eval.n_tokens": 1500, "eval.batch_size": 400, "checkpoint.every": 30, "data.statistics_tokens": 2000, **more,
    })  # fmt: skip
    config.members = ConfigDict(KINDS)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "all"
    return str(folder), train(configured(), str(folder))


@pytest.mark.parametrize("seed", peer_losses.SEEDS)
def test_losses_and_gradients_are_those_of_saelens(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens' own
        cases = list(peer_losses.saelens_cases(peer_losses.Setting(seed)))
    assert len(cases) == 8
    for name, theirs, mine in cases:
        off = peer_losses.differences(theirs, mine)
        assert max(off.values()) < 1e-12, (name, off)


def test_the_presets_of_jumprelu_start_where_their_libraries_do():
    """SAELens' own defaults; dictionary_learning 0.1.0, trainers/jumprelu.py; Anthropic's goes to the input too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import JumpReLUTrainingSAEConfig
    theirs = JumpReLUTrainingSAEConfig(d_in=4, d_sae=8)
    for name in ("saelens", "saelens_quadratic"):
        ours = jumprelu.PENALTIES[name]
        assert (ours.weight, ours.bandwidth, ours.threshold, ours.to_input) == (
            theirs.l0_coefficient, theirs.jumprelu_bandwidth, theirs.jumprelu_init_threshold,
            theirs.jumprelu_ste_to_input,
        )  # fmt: skip
    assert jumprelu.PENALTIES["saelens_tanh"].to_input
    assert jumprelu.PENALTIES["saelens_tanh"][:3] == jumprelu.PENALTIES["saelens"][:3] == (1.0, 0.05, 0.01)
    assert jumprelu.PENALTIES["dictionary_learning"] == (1.0, 0.001, 0.001, True, False)
    assert [name for name, of in jumprelu.PENALTIES.items() if of.has_target] == [
        "saelens_quadratic", "dictionary_learning"
    ]  # fmt: skip


def test_the_presets_of_relu_have_the_weights_of_their_libraries():
    """SAELens 6.54.12, saes/standard_sae.py: l1_coefficient; dictionary_learning 0.1.0, standard.py: l1_penalty."""
    assert relu.PENALTIES == {"saelens": (1.0, False), "dictionary_learning": (0.1, False)}


def selected(kind, rng, lifted):
    """An SAE, a batch and its head start, with the activations that NumPy selects and the least of them in use."""
    n, d, k, n_tokens = 14, 5, 3, 30
    arrays = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in
              (("W_enc", (n, d)), ("b_enc", n), ("W_dec", (n, d)), ("b_dec", d))}  # fmt: skip
    theta, lift = rng.uniform(0.2, 2, n), rng.exponential(size=n) if lifted else np.zeros(n)
    sae = sae_lib.SAE(**arrays, k=k)
    if kind != "topk":
        start = jnp.asarray(theta) if kind == "jumprelu" else jnp.asarray(-1.0)
        sae = dense.DenseSAE(**arrays, k=0 if kind == "jumprelu" else k, threshold=start, activation=kind)
    x = rng.normal(size=(n_tokens, d))
    z = (x - sae.b_dec) @ np.asarray(sae.W_enc).T + sae.b_enc
    ranked = np.where(z > 0, z + lift, z)
    bar = {"topk": np.sort(ranked, axis=1)[:, -k, None], "batch_topk": np.sort(ranked.ravel())[-k * n_tokens],
           "jumprelu": np.nextafter(theta, 9)}[kind]  # fmt: skip
    least = np.sort(np.ravel(z))[-k * n_tokens] if kind == "batch_topk" else None
    return sae, x, jnp.asarray(lift) if lifted else None, (ranked >= bar) & (z > 0), least


def square_of(sae, x, mask, groups):
    """Σ_g ‖x − x̂_g‖², of what a mask keeps of ReLU(z_pre)."""
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    acts = jnp.where(mask, z, 0.0)
    return sum(jnp.sum((x - sae.b_dec - acts[:, :end] @ sae.W_dec[:end]) ** 2) for end in groups)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("kind", ["topk", "batch_topk", "jumprelu"])
def test_what_is_selected_and_how_it_is_trained_are_a_mask_in_numpy(rng, x64, kind, lifted):
    """With a head start and without, of nested prefixes."""
    sae, x, lift, mask, least = selected(kind, rng, lifted)
    groups, x = (3, 8, 14), jnp.asarray(x)

    def mine(sae):
        found = dense.square_error(sae, x, groups, jnp.asarray(30.0), lambda tree: tree, 1e-9, "saelens", lift)
        return found.square, found

    (square, found), grads = jax.jit(jax.value_and_grad(mine, has_aux=True))(sae)
    expected, slopes = jax.jit(jax.value_and_grad(lambda s: square_of(s, x, mask, groups)))(sae)
    z = np.asarray((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    np.testing.assert_allclose(found.acts, np.where(mask, z, 0), atol=1e-12)
    assert square == pytest.approx(float(expected), rel=1e-12)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_allclose(getattr(grads, name), getattr(slopes, name), rtol=1e-9, atol=1e-9, err_msg=name)
    x_hat = np.where(mask, z, 0) @ np.asarray(sae.W_dec) + sae.b_dec
    np.testing.assert_allclose(found.e, x - x_hat, atol=1e-12)
    if least is not None:
        assert found.least == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize(("preset", "of_three", "of_one"), [
    ("none", 30, 30), ("dictionary_learning", 30 * 9, 30), ("openai", 30 * 5, 30 * 5)
])  # fmt: skip
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_nested_prefixes_count_in_the_loss_as_their_library_counts_them(rng, x64, kind, preset, of_three, of_one):
    """A sum over G prefixes; dictionary_learning: over G². No penalty where none is asked for."""
    sae, x, _, mask, _ = selected(kind, rng, lifted=False)
    for groups, divisor in (((3, 8, 14), of_three), ((14,), of_one)):
        loss = partial(objective.loss, preset=preset, sparsity=objective.Sparsity(groups=groups))
        value, _ = jax.jit(loss)(sae, jnp.asarray(x), jnp.zeros(14, bool), jnp.asarray(1.0))
        assert value == pytest.approx(float(square_of(sae, x, mask, groups)) / divisor, rel=1e-12)


def test_no_gradient_trains_the_threshold_of_batch_topk_and_jumprelu_keeps_its_own_above_zero(rng):
    for kind, before, after in (
        ("jumprelu", np.linspace(-0.6, 0.7, 14), np.maximum(np.linspace(-0.6, 0.7, 14), 0)),
        ("batch_topk", 0.4, 0.402), ("batch_topk", -1.0, 0.6), ("relu", None, None),
    ):  # fmt: skip
        sae = selected("jumprelu", rng, lifted=False)[0].replace(activation=kind, threshold=before)
        found = dense.after_step(sae, jnp.asarray(0.6)).threshold
        assert found is None if after is None else np.allclose(found, after)
    sae = selected("topk", rng, lifted=False)[0]
    assert dense.after_step(sae, jnp.asarray(0.6)) is sae


def test_a_penalty_counts_for_nothing_unless_it_is_given_a_weight(rng):
    sae, x, *_ = selected("jumprelu", rng, lifted=False)
    sae = sae.replace(activation="relu", threshold=None)
    loss = jax.jit(partial(objective.loss, preset="none", sparsity=objective.Sparsity("saelens")))
    mask = x @ np.asarray(sae.W_enc).T + sae.b_enc - sae.W_enc @ sae.b_dec > 0
    value, _ = loss(sae, jnp.asarray(x), jnp.zeros(14, bool), jnp.asarray(0.0))
    assert value == pytest.approx(float(square_of(sae, x, mask, (14,))) / 30, rel=1e-5)


def test_thresholds_lie_where_what_they_are_of_lies():
    spread = {kind: dense.DenseSAE(*"EeDd", k=1, threshold="t", activation=kind).spread().threshold
              for kind in ("batch_topk", "jumprelu")}  # fmt: skip
    assert spread == {"batch_topk": sae_lib.MEMBERS, "jumprelu": sae_lib.FEATURES}
    assert dense.DenseSAE(*"EeDd", k=0, activation="relu").spread().threshold is None


@pytest.mark.parametrize(("name", "weights"), [("jump", [0, 0.03, 0.15, 0.3, 0.3]), ("relu", [0.5] * 5)])
def test_the_penalty_grows_over_its_warm_up_and_stays(name, weights):
    config = config_lib.members(configured())[name]
    static = step_lib.Static.of(config)
    state = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(config), jnp.zeros(D))
    found = [float(step_lib.sparsity_weight(state.replace(step=jnp.int32(t)), static)) for t in (0, 1, 5, 10, 40)]
    np.testing.assert_allclose(found, weights, rtol=1e-6)


def test_a_pre_activation_on_its_threshold_does_not_fire():
    z, theta = jnp.asarray([[0.0, 0.3, 0.3]]), jnp.asarray([0.0, 0.3, 0.2])
    np.testing.assert_array_equal(jumprelu.jump(z, theta, 0.1, False), np.float32([[0, 0, 0.3]]))
    np.testing.assert_array_equal(jumprelu.step(z, theta, 0.1, False), np.float32([[0, 0, 1]]))


@pytest.mark.parametrize(("kind", "threshold"), [
    ("batch_topk", 0.4), ("batch_topk", 0.0), ("jumprelu", [0.0, 0.4, 2.0]), ("relu", None)
])  # fmt: skip
def test_in_use_what_is_over_the_threshold_fires_whatever_the_batch(rng, kind, threshold):
    z = rng.normal(size=(9, 3)).astype(np.float32)
    z[0] = 0.4
    sae = dense.DenseSAE(*"EeDd", k=1, activation=kind,
                         threshold=None if threshold is None else jnp.asarray(threshold, jnp.float32))  # fmt: skip
    found = dense.select(sae, jnp.asarray(z), jnp.asarray(2), lambda tree: tree)
    np.testing.assert_array_equal(found, np.where(z > np.float32(threshold or 0), np.maximum(z, 0), 0))


@pytest.mark.parametrize(("kind", "threshold"), [
    ("topk", None), ("batch_topk", batch_topk.UNSET), ("batch_topk", 0.1), ("jumprelu", 0.1), ("relu", None)
])  # fmt: skip
def test_what_is_no_number_stays_none_in_training_and_in_use(rng, kind, threshold):
    """A bar or a threshold would else leave it out, and the loss be finite."""
    x, W, W_dec = (rng.normal(size=(rows, D)).astype(np.float32) for rows in (9, N, N))
    W[5, 3] = np.nan
    plain = sae_lib.SAE(*map(jnp.asarray, (W, np.zeros(N, np.float32), W_dec, np.zeros(D, np.float32))), k=K)
    sae = dense.of(plain, kind, threshold)
    if kind == "batch_topk":
        sae = sae.replace(threshold=jnp.full((), threshold))
    found = dense.square_error(sae, x, (12, N), jnp.asarray(9.0), lambda tree: tree, 0.01, "saelens", None)
    assert np.isnan(found.acts[:, 5]).all()
    assert np.isnan(found.square)
    if kind != "topk":
        acts = dense.select(sae, found.z, jnp.asarray(9), lambda tree: tree)
        np.testing.assert_array_equal(np.isnan(acts), np.arange(N)[None] == np.full((9, 1), 5))


@pytest.mark.parametrize("target", [0.5, 3.0])
def test_the_target_of_dictionary_learning_pulls_at_theta_as_its_formula_says(rng, x64, target):
    """(mean L0 / L0* − 1)² of the batch, in two shares, and its slope by θ: −2 (mean L0 / L0* − 1) / L0* · K / ε."""
    theta, width, n_tokens = np.full(6, 0.3), 0.4, 20
    z = rng.normal(size=(n_tokens, 6))
    acts = np.where(z > theta, z, 0)
    total = (acts > theta).sum() / n_tokens

    def penalty(theta, z, share):
        return jumprelu.penalty(
            "dictionary_learning", z, share, theta, jnp.ones(6), jnp.zeros(6, bool), weight=jnp.asarray(0.7),
            target=target, bandwidth=width, n_tokens=n_tokens, allsum=lambda _: total,
        )  # fmt: skip

    found = [jax.value_and_grad(penalty)(jnp.asarray(theta), jnp.asarray(z[rows]), jnp.asarray(acts[rows]))
             for rows in (slice(8), slice(8, None))]  # fmt: skip
    assert sum(value for value, _ in found) == pytest.approx(0.7 * (total / target - 1) ** 2)
    near = (np.abs(acts - theta) < width / 2).sum(axis=0) / width / n_tokens
    slope = sum(np.asarray(gradient) for _, gradient in found)
    np.testing.assert_allclose(slope, -0.7 * 2 * (total / target - 1) / target * near, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.booleans())
def test_the_bar_is_the_one_that_a_sort_finds(seed, count, exact):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(exact):
        z = (rng.normal(size=(5, 9)) - rng.uniform(-1, 2)).astype(np.float64 if exact else np.float32)
        positive = np.sort(z[z > 0])[::-1]
        expected = positive[min(count, len(positive)) - 1] if len(positive) else 0
        assert jax.jit(batch_topk.bar)(jnp.asarray(z), jnp.asarray(count)) == expected


@pytest.mark.parametrize(("z", "count", "expected"), [
    ([[-1, 0.7], [0, -3]], 3, 0.7), ([[0, 0], [0, 2]], 2, 2), ([[3, 0, 0, 1]], 3, 1), ([[0, -1]], 1, 0),
])  # fmt: skip
def test_where_fewer_are_positive_than_the_budget_the_bar_is_the_least_of_them(z, count, expected):
    assert batch_topk.bar(jnp.asarray(z, jnp.float32), jnp.asarray(count)) == np.float32(expected)


def test_the_threshold_follows_the_least_activation():
    threshold, seen = jnp.asarray(-1.0), []
    for least in (0.0, 0.5, 0.7, 0.0, 0.2):
        threshold = batch_topk.follow(threshold, jnp.asarray(least))
        seen.append(float(threshold))
    np.testing.assert_allclose(seen, [-1, 0.5, 0.502, 0.502, 0.49898], rtol=1e-6)


def activations_of(encoder, x):
    """What fires, in float64, from the arrays alone."""
    z = (np.float64(x) - encoder.b_in) @ np.float64(encoder.W_enc).T + encoder.b_enc
    if encoder.rule == "topk":
        bar = np.sort(z, axis=1)[:, -encoder.k][:, None]
        return z, np.where((z >= bar) & (z > 0), z, 0)
    return z, np.where(z > (0 if encoder.threshold is None else encoder.threshold), np.maximum(z, 0), 0)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_counts_deaths_and_what_is_explained_as_numpy_does(run, name):
    folder, report = run
    final = next(member["final"] for member in report["members"] if member["name"] == name)
    x, encoder = held_out_tokens(), sharing.opened(folder, name).encoder
    z, acts = activations_of(encoder, x)
    fired, positive = (acts > 0).any(axis=0), (z > 0).any(axis=0)
    assert final["dead_by_relu"] == pytest.approx(np.mean(~positive), abs=1.01 / N)
    assert final["dead_total"] == pytest.approx(np.mean(~fired), abs=1.01 / N)
    assert final["l0"] == pytest.approx((acts > 0).sum() / len(acts), rel=2e-3)
    error = x - acts @ encoder.W_dec - encoder.b_dec
    assert final["fve"] == pytest.approx(1 - (error**2).sum() / ((x - x.mean(axis=0)) ** 2).sum(), abs=1e-4)
    assert (report["pathway"], report["k"]) == ("selection", K)  # of those that have one


def test_training_keeps_the_budget_and_the_threshold_follows(rng):
    config = config_lib.members(configured())["batch"]
    config.sae.balance = True
    static = step_lib.Static.of(config)
    state = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(config), jnp.zeros(D))
    x = rng.normal(size=(64, D))
    z = np.maximum(x @ np.asarray(state.sae.W_enc).T, 0)
    state = state.replace(beta=jnp.where(jnp.arange(N) < 3, 10.0, 0.0))
    state, metrics = jax.jit(partial(step_lib.train_step, static=static))(state, jnp.asarray(x))
    assert metrics["l0"] == K
    ranked = np.where((z > 0) & (np.arange(N) < 3), z + 10, z)
    fired = (ranked >= np.sort(ranked.ravel())[-64 * K]).any(axis=0)  # those lifted, wherever they are positive
    np.testing.assert_array_equal(np.asarray(state.tokens_since_fired) == 0, fired)
    assert state.sae.threshold == pytest.approx(np.sort(z.ravel())[-64 * K], rel=1e-5)  # as they are in use


def test_before_a_threshold_is_known_the_batch_has_the_budget(rng):
    x, valid = rng.normal(size=(40, D)), np.arange(40) < 30
    config = config_lib.members(configured())["batch"]
    state = step_lib.init_state(
        jax.random.key(0), step_lib.Static.of(config), step_lib.hyper(config), jnp.zeros(D)
    )
    seen, acts = death.sight(state.sae, jnp.asarray(x), jnp.asarray(valid))
    z = np.maximum((x @ np.asarray(state.sae.W_enc).T)[:30], 0)
    bar = np.sort(z.ravel())[-30 * K]
    np.testing.assert_array_equal(seen.n_fired, (z >= bar).sum(axis=0))
    assert not np.asarray(acts)[30:].any()


def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path, monkeypatch):
    config = configured()
    config.members = ConfigDict({name: {**KINDS[name], "sae": {**KINDS[name]["sae"], "balance": True}}
                                 for name in ("matryoshka", "jump")})  # fmt: skip
    train(config, str(tmp_path / "whole"))

    def after_the_first(self, count):
        if self.step >= 30:
            raise KeyboardInterrupt
        return ahead(self, count)

    ahead = run_lib.Run._next_inputs
    with monkeypatch.context() as patch:
        patch.setattr(run_lib.Run, "_next_inputs", after_the_first)
        with pytest.raises(KeyboardInterrupt):
            train(config, str(tmp_path / "parts"))
    train(config, str(tmp_path / "parts"))
    for name in config.members:
        expected, found = (sharing.opened(str(tmp_path / part), name).encoder for part in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, expected, found)


@pytest.mark.two_devices
def test_two_devices_are_one(tmp_path):
    encoders = []
    for devices in (1, 2):
        config = configured(steps=20, **{"train.devices": devices})
        config.members = ConfigDict({name: KINDS[name] for name in ("matryoshka", "jump")})
        train(config, str(tmp_path / str(devices)))
        encoders.append([sharing.opened(str(tmp_path / str(devices)), name).encoder for name in config.members])
    for one, two in zip(*encoders, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two)


def test_members_of_a_group_are_as_each_alone(tmp_path):
    config = configured(steps=20)
    config.members = ConfigDict({str(seed): {**KINDS["batch"], "seed": seed} for seed in range(2)})
    assert len(step_lib.group_members(config_lib.members(config), D)) == 1
    train(config, str(tmp_path / "both"))
    config.members = ConfigDict({"1": {**KINDS["batch"], "seed": 1}})
    train(config, str(tmp_path / "alone"))
    both, alone = (sharing.opened(str(tmp_path / name), "1").encoder for name in ("both", "alone"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both, alone)


@pytest.mark.parametrize("name", ["batch", "relu", "jump"])
def test_exports_are_saelens_own(run, tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it is built on
        from sae_lens import SAE
    import torch

    sharing.export(run[0], str(tmp_path / "out"), member=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SAE.load_from_disk(str(tmp_path / "out"), device="cpu")
    assert type(theirs).__name__ == {"relu": "StandardSAE"}.get(name, "JumpReLUSAE")
    x = held_out_tokens()
    with torch.no_grad():
        acts = theirs.encode(torch.tensor(np.float32(x))).numpy()
        x_hat = theirs(torch.tensor(np.float32(x))).numpy()
    _, mine = activations_of(sharing.opened(run[0], name).encoder, x)
    assert np.mean((acts > 0) != (mine > 0)) < 1e-4  # ties in float32
    np.testing.assert_allclose(x_hat, sae_jax.reconstruct(run[0], np.float32(x), member=name), atol=1e-3)
    card = (tmp_path / "out/README.md").read_text()
    assert {"batch": "BatchTopK", "relu": "ReLU", "jump": "JumpReLU"}[name] + " sparse autoencoder" in card


@pytest.mark.parametrize("name", KINDS)
def test_exports_are_classes_of_dictionary_learning(run, tmp_path, name):
    sharing.export(run[0], str(tmp_path / "out"), "dictionary_learning", member=name)
    kind = json.loads((tmp_path / "out/config.json").read_text())["trainer"]["dict_class"]
    assert kind == {"topk": "AutoEncoderTopK", "batch": "BatchTopKSAE", "matryoshka": "MatryoshkaBatchTopKSAE",
                    "relu": "AutoEncoder", "jump": "JumpReluAutoEncoder"}[name]  # fmt: skip
    x = np.float32(held_out_tokens())
    np.testing.assert_allclose(
        sae_jax.reconstruct(str(tmp_path / "out"), x), sae_jax.reconstruct(run[0], x, member=name), atol=2e-3
    )
    assert f"import {kind}" in (tmp_path / "out/README.md").read_text()


def test_sparsify_has_topk_alone(run, tmp_path):
    with pytest.raises(Refused, match="sparsify has no relu"):
        sharing.export(run[0], str(tmp_path / "out"), "sparsify", member="relu")
    assert not (tmp_path / "out").exists()


RELU = {"sae.activation": "relu", "sae.k": 0, "sparsity.preset": "saelens", "auxk.preset": "none"}
JUMP = RELU | {"sae.activation": "jumprelu"}


@pytest.mark.parametrize(("given_keys", "field", "allowed"), [
    ({"sae.activation": "gelu"}, "sae.activation", "one of topk, batch_topk, jumprelu, relu"),
    (RELU | {"sae.k": 8}, "sae.k", "0 with sae.activation = relu"),
    ({"sae.activation": "batch_topk", "sae.k": 0}, "sae.k", "1 to sae.n_features"),
    (RELU | {"sparsity.preset": "none"}, "sparsity.preset", "one of saelens, dictionary_learning, with"),
    (RELU | {"sparsity.preset": "saelens_tanh"}, "sparsity.preset", "one of saelens, dictionary_learning, with"),
    ({"sparsity.preset": "saelens"}, "sparsity.preset", "none, with sae.activation = topk"),
    (JUMP | {"sparsity.threshold": -0.1}, "sparsity.threshold", "a finite number ≥ 0, or -1"),
    (JUMP | {"sparsity.bandwidth": 0.0}, "sparsity.bandwidth", "a finite number > 0, or -1"),
    (JUMP | {"sparsity.weight": float("nan")}, "sparsity.weight", "a finite number ≥ 0, or -1"),
    (JUMP | {"sparsity.target_l0": 8.0}, "sparsity.target_l0", "0, with sae.activation = jumprelu"),
    (JUMP | {"sparsity.preset": "saelens_quadratic"}, "sparsity.target_l0", "over 0, up to sae.n_features"),
    (JUMP | {"sparsity.warmup_steps": -1}, "sparsity.warmup_steps", "an integer ≥ 0"),
    (RELU | {"auxk.preset": "openai"}, "auxk.preset", "none with sae.activation = relu"),
    (RELU | {"sae.balance": True}, "sae.balance", "False with sae.activation = relu"),
    ({"sae.init_norm": 0.1}, "sae.init_norm", "1 with sae.unit_decoder"),
    ({"sae.init_norm": 0.0, "sae.unit_decoder": False}, "sae.init_norm", "a finite number > 0"),
    ({"sae.groups": "16,64,100"}, "sae.groups", "rising widths without spaces that end at sae.n_features, as 32,128"),
    ({"sae.groups": "64,16,128"}, "sae.groups", "rising widths"),
    ({"sae.groups": "0,128"}, "sae.groups", "rising widths"),
    ({"sae.groups": "a,128"}, "sae.groups", "rising widths"),
    ({"sparsity.weight": 2.0}, "sparsity.weight", "-1 with sae.activation = topk"),
    ({"sae.activation": "batch_topk", "sparsity.warmup_steps": 9}, "sparsity.warmup_steps", "0 with sae.activation"),
    (RELU | {"sparsity.threshold": 0.1}, "sparsity.threshold", "-1 with sae.activation = relu"),
    (RELU | {"sparsity.warmup_steps": 10**6}, "sparsity.warmup_steps", "up to train.steps = 10000"),
    ({"sae.activation": "batch_topk", "train.mesh": "feature=2"}, "sae.activation", "topk without groups where"),
    ({"sae.groups": "64,128", "train.mesh": "feature=2"}, "sae.groups", "topk without groups where"),
    ({"sae.activation": "batch_topk", "train.precision": "bfloat16"}, "train.precision", "float32, but for topk"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(capsys, tmp_path, given_keys, field, allowed):
    words = [f"--config.{key}={value}" for key, value in
             {"data.signal": "sparse", "sae.n_features": 128, "sae.k": 8, **given_keys}.items()]  # fmt: skip
    code = cli.main(["train", "--config=configs/single.py", f"--workdir={tmp_path / 'run'}", *words])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert field in error
    assert allowed in error
    assert not (tmp_path / "run").exists()


def test_a_pilot_of_another_activation_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"sae.activation.*topk, where a pilot"):
        sae_jax.diagnose(configured(), str(tmp_path / "out"), pilot=True)


def held_out_tokens():
    source = sources.open_source(configured())
    rows = jnp.arange(400)
    parts = [np.asarray(source.tokens("eval", jnp.asarray(g), rows))[valid] for g, valid in source.held_out()]
    return np.concatenate(parts).astype(np.float64)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_batch_has_the_same_bar(rng, seed, monkeypatch):
    """Also where one token has more above it than is looked at first."""
    monkeypatch.setattr(batch_topk, "LARGE", 0)
    z = np.float32(np.random.default_rng(seed).normal(size=(12, 200)))
    z[0] += 3 * seed
    for budget in (12 * 3, 12 * 8, 3000):
        found = jax.jit(partial(batch_topk.bar, a_token=3))(jnp.asarray(z), jnp.asarray(budget))
        positive = np.sort(z[z > 0])[::-1]
        assert found == positive[min(budget, len(positive)) - 1]


@pytest.mark.parametrize(("shape", "more", "looked_at"), [
    ((12, 200), {"a_token": 3}, [(12, 12), (12, 200)]),  # four times as many, and all where that was too few
    ((10, 240), {"a_token": 15}, [(10, 60), (10, 240)]), ((10, 240), {"a_token": 16}, [(10, 240)]),  # a fourth of n
    ((1, 2399), {"a_token": 3}, [(1, 2399)]), ((12, 200), {"a_token": 0}, [(12, 200)]), ((12, 200), {}, [(12, 200)]),
])  # fmt: skip
def test_of_a_large_batch_a_few_entries_of_each_token_are_looked_at(monkeypatch, shape, more, looked_at):
    """About work: that the bar is the same is tested elsewhere."""
    monkeypatch.setattr(batch_topk, "LARGE", 2400)
    seen, kth_largest = [], batch_topk.kth_largest
    monkeypatch.setattr(
        batch_topk, "kth_largest", lambda z, *rest, **axis: seen.append(z.shape) or kth_largest(z, *rest, **axis)
    )
    jax.eval_shape(partial(batch_topk.bar, **more), jnp.zeros(shape), jnp.asarray(5))
    assert seen == looked_at


def test_rows_start_at_the_norm_that_was_asked_for():
    config = config_lib.members(configured(**{"sae.unit_decoder": False, "sae.init_norm": 0.1}))["relu"]
    static = step_lib.Static.of(config)
    state = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(config), jnp.zeros(D))
    np.testing.assert_allclose(np.linalg.norm(state.sae.W_dec, axis=1), 0.1, rtol=1e-5)
    state, _ = jax.jit(partial(step_lib.train_step, static=static))(state, jnp.ones((8, D)))
    assert np.linalg.norm(state.sae.W_dec, axis=1).max() < 0.2


def test_balance_starts_where_nothing_fires():
    config = config_lib.members(configured())["jump"]
    config.sae.balance = True
    static = step_lib.Static.of(config)
    state = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(config), jnp.zeros(D))
    state = state.replace(
        sae=state.sae.replace(threshold=jnp.full(N, 1e3)), tokens_since_fired=jnp.full(N, 10_000, jnp.int32)
    )
    after, metrics = jax.jit(partial(step_lib.train_step, static=static))(state, jnp.ones((8, D)))
    assert metrics["l0"] == 0
    assert (np.asarray(after.beta) > 0).all()


def test_where_nothing_fires_features_starve_as_if_one_did():
    """T = 2 n / L0 tokens, with L0 at least 1."""
    config = config_lib.members(configured())["jump"]
    config.sae.balance = True
    static = step_lib.Static.of(config)
    state = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(config), jnp.zeros(D))
    silent = np.arange(N) * 4
    state = state.replace(
        sae=state.sae.replace(threshold=jnp.full(N, 1e3)), tokens_since_fired=jnp.asarray(silent, jnp.int32),
        beta=jnp.full(N, 0.5),
    )  # fmt: skip
    after, _ = jax.jit(partial(step_lib.train_step, static=static))(state, jnp.ones((8, D)))
    np.testing.assert_array_equal(np.asarray(after.beta) > 0.5, silent + 8 >= 2 * N)


def test_an_sae_of_another_kind_is_not_taken_for_topk(run):
    exported = sharing.packed_of(run[0], "jump")
    with pytest.raises(Refused, match=r"jumprelu.*sae_jax\.features takes"):
        sae_jax.encode(exported.sae, np.ones((2, D), np.float32))


@pytest.mark.parametrize("norm", ["layer_norm", "unit"])
def test_what_was_loaded_is_exported_again_behind_a_norm_too(tmp_path, norm):
    config = configured(steps=10, **{"data.norm": norm})
    train(config, str(tmp_path / "run"))
    x = np.float32(held_out_tokens())
    for name in ("matryoshka", "jump"):
        loaded = sae_jax.load(str(tmp_path / "run"), name)
        sharing.export(loaded, str(tmp_path / name))
        np.testing.assert_allclose(
            sae_jax.reconstruct(str(tmp_path / name), x), sae_jax.reconstruct(loaded, x), atol=1e-2
        )
        again = sharing.packed_of(loaded).sae
        assert (again.activation, again.k) == {"matryoshka": ("batch_topk", K), "jump": ("jumprelu", 0)}[name]


def test_an_untrained_threshold_is_not_exported(tmp_path):
    config = configured(steps=0)
    config.members = ConfigDict({"batch": KINDS["batch"]})
    train(config, str(tmp_path / "run"))
    with pytest.raises(Refused, match="threshold.*not set"):
        sharing.export(str(tmp_path / "run"), str(tmp_path / "out"), member="batch")
    assert "never set" in sharing.opened(str(tmp_path / "run")).notes[0]
    assert not (tmp_path / "out").exists()


def test_a_jumprelu_configuration_is_forecast_where_it_starts(tmp_path, capsys):
    settings = JUMP | {
        "data.signal": "sparse", "data.gamma": 2.0, "data.d_model": D, "data.n_true_features": 32, "train.steps": 0,
        "data.statistics_tokens": 2000, "sae.n_features": 256, "sparsity.threshold": 2.0, "eval.n_tokens": 2000,
        "train.devices": 1,
    }  # fmt: skip
    words = ["diagnose", "--config=configs/single.py", f"--workdir={tmp_path / 'out'}", "--measure"]
    assert cli.main([*words, *(f"--config.{key}={value}" for key, value in settings.items())]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["selection"] == "jumprelu"
    probe, measured = (report["remedies"]["none"][key] for key in ("probe", "measured"))
    counted = train(config_lib.base(settings), str(tmp_path / "run"))["members"][0]["init"]
    assert probe["dead_total"] == pytest.approx(counted["dead_total"], abs=0.06)
    assert measured["dead_total"] == pytest.approx(counted["dead_total"], abs=0.06)
    assert 0.2 < counted["dead_total"] < 0.9
