import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae_jax.autoencoder import kept, optimizer
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.config import base
from sae_jax.training import step as step_lib

CLIP, BETAS, RATE = 1.5, (0.9, 0.99), 0.03


def by_optax(sae, grads):
    """Projection, clip, Adam and unit rows as separate steps, over all gradients."""
    chain = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE, *BETAS, eps=optimizer.EPSILON))
    state = chain.init(sae)
    for g in grads:
        along = jnp.sum(g.W_dec * sae.W_dec, axis=1, keepdims=True)
        updates, state = chain.update(g.replace(W_dec=g.W_dec - along * sae.W_dec), state)
        sae = optax.apply_updates(sae, updates)
        sae = sae.replace(W_dec=sae_lib.unit_rows(sae.W_dec))
    return sae


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n", "block"), [(40, 0), (96, 32), (90, 32), (34, 32), (31, 32)])
def test_an_update_is_that_of_optax_whole_or_in_blocks_of_rows(monkeypatch, n, block):
    if block:
        monkeypatch.setattr(kept, "LARGE", 1)
        monkeypatch.setattr(optimizer, "BLOCK", block)
    sae = sae_lib.init(jax.random.key(0), n, 3, jnp.arange(5.0))
    draw = lambda key: jax.tree.map(lambda a: jax.random.normal(key, a.shape, a.dtype), sae)  # noqa: E731
    # Norms from well under the clip to well over it.
    grads = [jax.tree.map(lambda g, s=10.0**i: s * g, draw(jax.random.key(i + 7))) for i in (-3, -1, 0, 1)]
    expected, moments = by_optax(sae, grads), optimizer.init(sae)
    step = jax.jit(lambda s, m, g, count: optimizer.update(
        s, m, g, count=count, rate=jnp.asarray(RATE), betas=BETAS, clip_norm=CLIP, unit_decoder=True
    ))  # fmt: skip
    for count, g in enumerate(grads, start=1):
        sae, moments, norm = step(sae, moments, g, jnp.int32(count))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), sae, expected)
    before = by_optax(sae_lib.init(jax.random.key(0), n, 3, jnp.arange(5.0)), grads[:-1])
    along = np.sum(np.asarray(g.W_dec * before.W_dec), axis=1)
    square = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(g)) - float(np.sum(along**2))
    np.testing.assert_allclose(norm, np.sqrt(square), rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_a_gradient_as_small_as_epsilon_moves_half_as_far():
    """Of the first step: rate · g / (|g| + 1e-8)."""
    sae = sae_lib.init(jax.random.key(0), 8, 3, jnp.zeros(5))
    small = np.array([1e-8, -1e-8, 3e-8, 1e-6, 0.0])
    grads = jax.tree.map(jnp.zeros_like, sae).replace(b_dec=jnp.asarray(small))
    after, _, norm = jax.jit(lambda s, g: optimizer.update(
        s, optimizer.init(s), g, count=jnp.int32(1), rate=jnp.asarray(RATE), betas=BETAS, clip_norm=CLIP,
        unit_decoder=False,
    ))(sae, grads)  # fmt: skip
    np.testing.assert_allclose(after.b_dec, -RATE * small / (np.abs(small) + 1e-8), rtol=1e-9)
    assert norm == pytest.approx(np.linalg.norm(small), rel=1e-9)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0.2), (10, 0.5), (90, 0.5), (0, 0.0), (100, 1.0)])
def test_the_learning_rate_rises_stays_and_ends_near_zero(warmup, decay):
    static = step_lib.Static.of(base({"train.steps": 100, "train.warmup_steps": warmup, "train.decay_fraction": decay,
                                      "data.signal": "gaussian"}))  # fmt: skip
    factors = np.array([step_lib.schedule(static, jnp.int32(step)) for step in range(100)])
    start = max(warmup, round(100 - 100 * decay))
    rise = np.linspace(1 / (warmup + 1), 1, warmup, endpoint=False)
    np.testing.assert_allclose(factors[:warmup], rise, rtol=1e-5)
    np.testing.assert_allclose(factors[warmup:start], 1.0, rtol=1e-6)
    np.testing.assert_allclose(factors[start:], 1 - np.arange(100 - start) / max(100 - start, 1), atol=1e-6)
