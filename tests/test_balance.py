"""Balanced selection: beta takes part in the choice of the k and in nothing else, and is gone at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from sae_jax.autoencoder import balance, kept
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.config import base
from sae_jax.runtime import checkpoint
from sae_jax.training import run as run_lib
from sae_jax.training import step as step_lib

B, D, N, K = 32, 6, 24, 3


@pytest.fixture
def drawn(rng, x64):
    sae = sae_lib.init(jax.random.key(0), N, K, jnp.asarray(rng.normal(size=D)))
    sae = sae.replace(b_enc=jnp.asarray(rng.normal(size=N) - 1))  # many tokens with fewer than k positive
    return sae, jnp.asarray(rng.normal(size=(B, D))), jnp.asarray(rng.exponential(size=N))


def masked(sae, x, mask):
    """Σ‖x − x̂‖² with the entries of a mask."""
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    return jnp.sum((x - jnp.where(mask, z, 0.0) @ sae.W_dec - sae.b_dec) ** 2)


def naive(sae, x, lift):
    """Σ‖x − x̂‖² with a mask that an independent sort makes."""
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    score = np.asarray(jnp.where(z > 0, z + lift, -jnp.inf))
    mask = np.zeros(z.shape, bool)
    for row, order in enumerate(np.argsort(-score, axis=1)):
        mask[row, [i for i in order[:K] if score[row, i] > -np.inf]] = True
    return masked(sae, x, mask), mask


def dense(codes):
    z = np.zeros((B, N))
    np.put_along_axis(z, np.asarray(codes.indices), np.asarray(codes.values), axis=1)
    return z


def test_the_lift_chooses_and_leaves_values_alone(drawn):
    sae, x, lift = drawn
    square, _, codes = sae_lib.square_error(sae, x, lift=lift)
    wanted, mask = naive(sae, x, lift)
    z = np.asarray((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    found = dense(codes._replace(values=jnp.maximum(codes.values, 0)))
    np.testing.assert_allclose(found, np.where(mask, z, 0), atol=1e-12)
    assert float(square) == pytest.approx(float(wanted), rel=1e-12)
    plain = dense(sae_lib.square_error(sae, x)[2])
    assert ((found > 0) != (plain > 0)).any(axis=1).mean() > 0.2  # it did choose otherwise
    assert (mask.sum(axis=1) < K).any()


def test_the_gradient_is_that_of_what_was_chosen(drawn):
    sae, x, lift = drawn
    ours = jax.grad(lambda s: sae_lib.square_error(s, x, lift=lift)[0])(sae)
    mask = naive(sae, x, lift)[1]
    plain = jax.grad(lambda s: masked(s, x, mask))(sae)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_without_lift_nothing_changes_to_the_bit(drawn):
    sae, x, _ = drawn
    for a, b in zip(
        jax.tree.leaves(sae_lib.square_error(sae, x)),
        jax.tree.leaves(sae_lib.square_error(sae, x, lift=jnp.zeros(N))), strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("large", [False, True])
def test_a_large_sae_on_a_cpu_chooses_alike(monkeypatch, drawn, large):
    """In pieces and in compressed rows as in one."""
    monkeypatch.setattr(kept, "LARGE", 1 if large else 2**20)
    sae, x, lift = drawn
    x = jnp.tile(x, (8, 1))
    square, e, codes = sae_lib.square_error(sae, x, lift=lift)
    wanted, _ = naive(sae, x[:B], lift)
    assert float(square) == pytest.approx(8 * float(wanted), rel=1e-9)


def reference(beta, fired, since, tokens, patience, pace):
    """Feature by feature, in words of its own: once in `patience` tokens is enough."""
    found = []
    for b, f, s in zip(beta, fired, since, strict=True):
        starved = s >= patience if tokens < patience else f / tokens < 1 / patience
        found.append(max(0.0, b + (pace if starved else -pace)))
    return found


@pytest.mark.parametrize("tokens", [16, 20, 90])
def test_beta_rises_while_a_feature_starves_and_falls_otherwise(rng, tokens):
    beta, fired, since = rng.exponential(size=50), rng.integers(0, 9, 50), rng.integers(0, 60, 50)
    found = balance.update(
        *map(jnp.asarray, (beta, fired, since, tokens)), n_features=50, k=5, d_model=16, rate=jnp.asarray(0.01)
    )
    wanted = reference(beta, fired, since, tokens, 2 * 10, 4.0 * 4 * 0.01)  # typed: twice n/k, four times √d
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert 0 < (np.asarray(found) > beta).sum() < 50


def test_it_is_gone_at_the_last_step():
    shares = [float(balance.fading(jnp.asarray(step), 100)) for step in range(100)]
    assert shares[-1] == 0
    assert shares[0] == 1
    assert all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    assert all(float(balance.fading(jnp.asarray(step), 1)) == 0 for step in range(1))


@pytest.mark.parametrize(("steps", "last"), [(100, 20), (12, 2), (7, 1), (1, 1)])  # a fifth of the run, at least one
def test_it_fades_linearly_over_the_last_fifth(steps, last):
    shares = [float(balance.fading(jnp.asarray(step), steps)) for step in range(steps)]
    np.testing.assert_allclose(shares, [min(1.0, (steps - 1 - step) / last) for step in range(steps)], rtol=1e-6)


@pytest.mark.parametrize(("step", "share"), [(79, 1.0), (89, 0.5), (98, 0.05), (99, 0.0)])
def test_a_step_chooses_by_the_share_of_beta_that_is_left(x64, step, share):
    config = base({"sae.n_features": N, "sae.k": K, "sae.balance": True, "train.steps": 100, "data.signal": "gaussian",
                   "auxk.preset": "none"})  # fmt: skip
    static = step_lib.Static.of(config)
    state = step_lib.init_state(jax.random.key(0), static, step_lib.hyper(config), jnp.zeros(D))
    beta, x = jnp.arange(N) / 4.0, jax.random.normal(jax.random.key(1), (B, D))
    state = state.replace(beta=beta, step=jnp.int32(step))
    _, found = jax.jit(lambda s: step_lib.train_step(s, x, static=static))(state)
    expected, _ = naive(state.sae, x, share * beta)
    assert float(found["loss"]) == pytest.approx(float(expected) / B, rel=1e-9)


def test_a_step_moves_beta_by_the_formula(x64):
    config = base({"sae.n_features": N, "sae.k": K, "sae.balance": True, "train.steps": 100, "data.signal": "gaussian",
                   "train.learning_rate": 1e-2, "train.warmup_steps": 4, "auxk.preset": "none"})  # fmt: skip
    static = step_lib.Static.of(config)
    state = step_lib.init_group([config], jnp.zeros((1, D)))
    silenced = state.sae.replace(b_enc=jnp.where(jnp.arange(N) < N // 2, -99.0, 0.0)[None])
    state = state.replace(sae=silenced, tokens_since_fired=jnp.arange(N)[None] * 20)
    x = jax.random.normal(jax.random.key(1), (B, D))
    step = jax.jit(lambda s, x: step_lib.group_step(s, x, static=static, allsum=lambda tree: tree)[0])
    after = step(state, x)
    pace = balance.PACE * np.sqrt(D) * 1e-2 / 5  # of the first of five steps of warm-up
    fired = np.asarray(sae_lib.fired(sae_lib.encode(jax.tree.map(lambda a: a[0], state.sae), x), N))
    wanted = reference(np.zeros(N), fired, np.asarray(after.tokens_since_fired[0]), B, 2 * N / K, pace)
    np.testing.assert_allclose(after.beta[0], wanted, rtol=1e-6)
    assert 0 < (np.asarray(after.beta[0]) > 0).sum() < N


@pytest.mark.repeats
def test_a_balanced_run_stopped_goes_on_and_is_exported_as_an_ordinary_sae(tiny, tmp_path, monkeypatch):
    tiny.members = ConfigDict({"balanced": {"sae": {"center": "mean", "balance": True}}})
    tiny.sae.n_features = 256
    whole = sae_jax.train(tiny, str(tmp_path / "whole"))
    beta = checkpoint.saved(str(tmp_path / "whole")).groups[0]["beta"]
    assert (beta > 0).any()
    given = run_lib.Run._next_inputs

    def cut(self, count):
        if self.step == 20:
            raise KeyboardInterrupt
        return given(self, count)

    monkeypatch.setattr(run_lib.Run, "_next_inputs", cut)
    with pytest.raises(KeyboardInterrupt):
        sae_jax.train(tiny, str(tmp_path / "cut"))
    monkeypatch.undo()
    again = sae_jax.train(tiny, str(tmp_path / "cut"))
    assert again["members"] == whole["members"]
    left, right = (jax.tree.leaves(checkpoint.saved(str(tmp_path / name)).groups) for name in ("whole", "cut"))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)
    packed = sae_jax.export(str(tmp_path / "whole"), str(tmp_path / "out"))
    assert packed.sae.k == tiny.sae.k
