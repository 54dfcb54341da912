from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_jax.autoencoder import death, kept, objective, threshold, topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.kept import Kept


def a_sae(rng, n=24, d=6, k=3, dtype=np.float64):
    """Every parameter away from its initial value, so that no gradient is zero by accident."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return sae_lib.SAE(W_enc=draw(n, d), b_enc=0.3 * draw(n), W_dec=draw(n, d), b_dec=draw(d), k=k)


def numpy_codes(sae, x):
    """Dense codes (B, n), by sorting, without the code under test."""
    z = np.maximum((x - np.asarray(sae.b_dec)) @ np.asarray(sae.W_enc).T + np.asarray(sae.b_enc), 0)
    codes = np.zeros_like(z)
    for row, values in enumerate(z):
        for j in sorted(range(len(values)), key=lambda j: -values[j])[: sae.k]:
            codes[row, j] = values[j]
    return codes


@pytest.mark.usefixtures("x64")
@settings(max_examples=8, deadline=None)  # each compiles anew
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), k=st.integers(1, 30), d=st.integers(1, 8))
def test_encode_and_decode_are_the_dense_formula(seed, n, k, d):
    rng = np.random.default_rng(seed)
    sae = a_sae(rng, n=n, d=d, k=min(k, n))
    x = rng.normal(size=(7, d))
    codes = sae_lib.encode(sae, jnp.asarray(x))
    dense = numpy_codes(sae, x)
    mine = np.zeros_like(dense)
    np.add.at(mine, (np.arange(7)[:, None], np.asarray(codes.indices)), np.asarray(codes.values))
    np.testing.assert_allclose(mine, dense, atol=1e-12)
    expected = dense @ np.asarray(sae.W_dec) + np.asarray(sae.b_dec)
    np.testing.assert_allclose(sae_lib.decode(sae, codes), expected, atol=1e-12)
    np.testing.assert_array_equal(sae_lib.fired(codes, n), (dense > 0).sum(axis=0))


def test_an_index_kept_with_value_zero_has_not_fired():
    codes = Kept(jnp.asarray([[2.0, 0.0]]), jnp.asarray([[3, 1]]))
    np.testing.assert_array_equal(sae_lib.fired(codes, 4), [0, 0, 0, 1])


def test_init_is_tied_with_unit_rows_and_starts_at_the_center():
    sae = sae_lib.init(jax.random.key(0), 50, 3, jnp.arange(8.0))
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(sae.W_enc, sae.W_dec)
    np.testing.assert_array_equal(sae.b_dec, np.arange(8.0))
    assert not sae.b_enc.any()


@pytest.mark.parametrize("gamma", [100.0, 1000.0])
def test_float32_keeps_the_signal_at_high_gamma(rng, gamma):
    d = 64
    mu = np.full(d, gamma)
    x = mu + rng.normal(size=(32, d))
    sae = sae_lib.init(jax.random.key(1), 256, 8, jnp.asarray(mu, jnp.float32))
    rows = np.asarray(sae.W_enc, np.float64)
    exact = (x - mu) @ rows.T
    got = sae_lib.preactivations(sae, jnp.asarray(x, jnp.float32))
    # x itself is rounded to gamma · 2^-24; nothing beyond that may be lost.
    np.testing.assert_allclose(got, exact, atol=gamma * d**0.5 * 2e-7)


def test_bfloat16_rounds_the_operands_and_nothing_else(rng):
    import ml_dtypes

    x, w = rng.normal(size=(40, 300)).astype(np.float32), rng.normal(size=(70, 300)).astype(np.float32)
    low = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, w)]
    np.testing.assert_allclose(topk.product(jnp.asarray(x), jnp.asarray(w, jnp.bfloat16)), low[0] @ low[1].T, atol=1e-4)
    sae = sae_lib.SAE(W_enc=jnp.asarray(w), b_enc=jnp.zeros(70), W_dec=jnp.asarray(w), b_dec=jnp.zeros(300), k=5)
    _, rounded, codes = sae_lib.square_error(sae, jnp.asarray(x), precision="bfloat16")
    np.testing.assert_allclose(codes.values[:, 0], (low[0] @ low[1].T).max(axis=1), rtol=1e-5)
    exact = sae_lib.square_error(sae, jnp.asarray(x))[1]
    assert 0 < float(jnp.linalg.norm(rounded - exact)) < 0.1 * float(jnp.linalg.norm(exact))


# -- death by pathway ------------------------------------------------------------------------------------------------


def test_pathways_equal_an_independent_count(rng):
    sae = a_sae(rng, n=40, d=5, k=2, dtype=np.float32).replace(b_enc=jnp.asarray(rng.normal(size=40) - 3, jnp.float32))
    x = rng.normal(size=(60, 5)).astype(np.float32)
    seen = None
    for start in range(0, 60, 16):
        part = np.zeros((16, 5), np.float32)
        batch = x[start : start + 16]
        part[: len(batch)] = batch
        part[len(batch) :] = 100.0  # padding must not count
        new, _ = death.sight(sae, jnp.asarray(part), jnp.arange(16) < len(batch))
        seen = new if seen is None else seen | new
    z = (x - np.asarray(sae.b_dec)) @ np.asarray(sae.W_enc).T + np.asarray(sae.b_enc)
    fired = (numpy_codes(sae, x) > 0).any(axis=0)
    relu_dead = (z <= 0).all(axis=0)
    assert relu_dead.any()
    assert (~relu_dead & ~fired).any()
    assert fired.any()
    assert death.pathways(seen) == {
        "dead_by_relu": relu_dead.mean(),
        "dead_by_topk": (~relu_dead & ~fired).mean(),
        "dead_total": (~fired).mean(),
    }
    times = (numpy_codes(sae, x) > 0).sum(axis=0)
    np.testing.assert_array_equal(seen.n_fired, times)
    assert death.fired_once(seen) == (times == 1).mean()


def test_as_many_tokens_again_wake_no_more_than_fired_once(rng):
    rates = np.concatenate([np.logspace(-6, -1, 4000), np.full(1000, 1 / 5000), np.zeros(500)])
    first, second = rng.binomial(5000, rates, (2, len(rates)))
    woken = np.mean((first == 0) & (second > 0))
    once = death.fired_once(death.Sightings(positive=first > 0, n_fired=first))
    assert 0.5 * once < woken < once + 3 * np.sqrt(once / len(rates))
    assert death.fired_once(death.Sightings(positive=second > 0, n_fired=np.minimum(second, 1) * 2)) == 0


def test_counters_count_tokens_and_saturate():
    silent = jnp.asarray([5, 5, death.MAX_TOKENS - 3], jnp.int32)
    after = death.count_tokens(silent, jnp.asarray([True, False, False]), 10)
    np.testing.assert_array_equal(after, [0, 15, death.MAX_TOKENS])


# -- gradients and the objective -------------------------------------------------------------------------------------


def naive_loss(sae, x, dead, weight, preset):
    """Reconstruction plus AuxK in plain jnp, dense masks and autodiff through everything; the formulae of the four
    libraries, each written out."""
    d, n = x.shape[1], sae.W_enc.shape[0]
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    order = jnp.argsort(-jnp.maximum(z, 0), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    x_hat = jnp.where(rank < sae.k, jnp.maximum(z, 0), 0) @ sae.W_dec + sae.b_dec
    e = jax.lax.stop_gradient(x - x_hat)
    variance = jnp.sum((x - x.mean(0)) ** 2)
    e_variance = jnp.sum((e - e.mean(0)) ** 2)
    square = jnp.sum((x - x_hat) ** 2)
    k_aux = min(256 if preset == "openai" else d // 2, n)
    source = z if preset == "saelens" else jnp.maximum(z, 0)
    aux_rank = jnp.argsort(jnp.argsort(jnp.where(dead, -source, jnp.inf), axis=1, stable=True), axis=1)
    aux = jnp.sum((jnp.where(dead & (aux_rank < k_aux), source, 0) @ sae.W_dec - e) ** 2)
    weight = weight * dead.any()  # with nothing dead all four leave the term out
    gradual = jnp.minimum(dead.sum() / (d // 2), 1)
    match preset:
        case "openai":
            return square / x.size + weight * aux / e_variance
        case "dictionary_learning":
            return square / len(x) + weight * aux / e_variance
        case "saelens":
            return square / len(x) + weight * gradual * aux / len(x)
        case "sparsify":
            return square / variance + weight * gradual * aux / variance
    return square / len(x)


PRESETS = tuple(objective.PRESETS)
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def assert_naive(mine, sae, x, dead, weight, preset):
    """Value and gradient of every parameter are those of the naive formula; returns the gradients."""
    value, grads = jax.jit(jax.value_and_grad(mine))(sae)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda s: naive_loss(s, x, dead, weight, preset)))(sae)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name in PARAMETERS:
        np.testing.assert_allclose(getattr(grads, name), getattr(expected_grads, name), atol=1e-10, err_msg=name)
    return grads


def assert_slopes(fn, grads, sae, rng, step=1e-6):
    """The gradient of every parameter is the central difference of fn along a random direction."""
    for name in PARAMETERS:
        direction = jnp.asarray(rng.normal(size=getattr(sae, name).shape))
        ahead, behind = (fn(sae.replace(**{name: getattr(sae, name) + s * direction})) for s in (step, -step))
        slope = jnp.vdot(getattr(grads, name), direction)
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("n_dead", [0, 1, 2, 15])
def test_loss_and_gradients_agree_with_the_naive_formula_and_finite_differences(rng, preset, n_dead):
    sae, x = a_sae(rng), jnp.asarray(rng.normal(size=(10, 6)) + 1)
    dead = jnp.arange(24) < n_dead
    weight = jnp.asarray(0.7)
    mine = lambda sae: objective.loss(sae, x, dead, weight, preset=preset)[0]  # noqa: E731
    grads = assert_naive(mine, sae, x, dead, weight, preset)

    if n_dead == 0 or preset == "none":  # no stop-gradient at work: finite differences of the value are the gradient
        assert_slopes(mine, grads, sae, rng)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
@pytest.mark.parametrize(("n_dead", "room", "sparse"), [
    *[(*case, kept.SPARSE) for case in ((0, 3), (1, 1), (1, 4), (2, 3), (15, 15), (15, 23), (15, 24), (24, 24))],
    (1, 4, 1), (15, 23, 1), (24, 24, 1),
])  # fmt: skip
def test_auxk_in_a_room_for_the_dead_is_auxk(rng, monkeypatch, preset, n_dead, room, sparse):
    """By threshold and by top-k: the same features wherever they lie, and no gradient to the room that is left."""
    monkeypatch.setattr(kept, "SPARSE", sparse)
    sae, x = a_sae(rng), jnp.asarray(rng.normal(size=(10, 6)) + 1)
    dead, weight = jnp.asarray(rng.permutation(24) < n_dead), jnp.asarray(0.7)
    mine = lambda sae: objective.loss(sae, x, dead, weight, preset=preset, room=room)[0]  # noqa: E731
    assert_naive(mine, sae, x, dead, weight, preset)


@pytest.mark.parametrize(("n", "d", "found"), [
    (8192, 768, (0, 1024, 4096, 8192)), (2**20, 1, (0, 2**17, 2**19, 2**20)), (1, 2**20, (0, 1)), (3, 2**20, (0, 1, 3)),
    (512, 64, (0, 512)),
])  # fmt: skip
def test_a_large_sae_has_a_few_rooms_of_which_the_last_holds_all(n, d, found):
    assert objective.rooms(n, d) == found


@pytest.mark.parametrize(("n_dead", "which"), [
    (0, 0), (1, 1), (1024, 1), (1025, 2), (4096, 2), (4097, 3), (8192, 3),
])  # fmt: skip
def test_auxk_takes_the_least_room_that_holds_the_dead(n_dead, which):
    assert objective.room_for(jnp.asarray(n_dead), objective.rooms(8192, 768)) == which


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("k", [1, 2, 40, 41])
def test_the_kth_largest_is_found_bit_for_bit(rng, dtype, rectified, k):
    """Of values over the whole range of floats, of equal ones, and where fewer than k are there to be chosen."""
    scale = 10.0 ** rng.uniform(*((-36, 36) if dtype == np.float32 else (-300, 300)), size=(150, 41))
    z = (np.where(rng.random((150, 41)) < 0.8, 1, scale) * rng.normal(size=(150, 41))).astype(dtype)
    z[:40, ::2] = z[:40, 1::2].max(axis=1, keepdims=True)[:, :1]
    z[:20, :30], z[20:30] = -np.inf, 0
    expected = np.sort(z, axis=1)[:, -k]
    found = threshold.kth_largest(jnp.asarray(z), k, rectified=rectified)
    np.testing.assert_array_equal(found, np.maximum(expected, 0) if rectified else expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_auxk_gradient_agrees_with_finite_differences_of_the_frozen_error(rng, preset):
    """AuxK alone: the error held fixed by hand, as stop-gradient does it."""
    sae, x = a_sae(rng), jnp.asarray(rng.normal(size=(10, 6)) + 1)
    dead, one, zero = jnp.arange(24) < 15, jnp.asarray(1.0), jnp.asarray(0.0)
    total = lambda s, w: objective.loss(s, x, dead, w, preset=preset)[0]  # noqa: E731
    grads = jax.tree.map(jnp.subtract, jax.grad(total)(sae, one), jax.grad(total)(sae, zero))

    def auxiliary(s):
        e = x - sae_lib.decode(sae, sae_lib.encode(sae, x))  # of the unperturbed SAE
        square = objective._auxiliary_square(s, x, e, dead, objective.PRESETS[preset], None)
        divisor = {"saelens": 10.0, "sparsify": jnp.sum((x - x.mean(0)) ** 2)}.get(
            preset, jnp.sum((e - e.mean(0)) ** 2)
        )
        return square / divisor  # 15 dead ≥ d/2, so the gradual factor is 1

    assert_slopes(auxiliary, grads, sae, rng)


@pytest.mark.usefixtures("x64")
def test_ties_and_few_positive_entries_keep_gradients_finite_and_right(rng):
    sae, x = a_sae(rng, k=24), jnp.asarray(rng.normal(size=(10, 6)))  # k = n: many kept zeros
    none_dead, weight = jnp.zeros(24, bool), jnp.asarray(0.0)
    mine = lambda sae: objective.loss(sae, x, none_dead, weight, preset="none")[0]  # noqa: E731
    assert_naive(mine, sae, x, none_dead, weight, "none")


@pytest.mark.usefixtures("x64")
def test_gradients_that_training_does_not_take_are_right(rng):
    """Of the tokens, and of `preactivations` and `decode`, on which the remedies of experiments/ stand."""
    sae, x = a_sae(rng, k=3), jnp.asarray(rng.normal(size=(10, 6)))

    def kept(sae, x):
        z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        return jnp.where(jnp.argsort(jnp.argsort(-z, axis=1), axis=1) < sae.k, jnp.maximum(z, 0), 0)

    pairs = (
        (lambda s, x: sae_lib.square_error(s, x)[0], lambda s, x: jnp.sum((x - kept(s, x) @ s.W_dec - s.b_dec) ** 2)),
        (lambda s, x: jnp.sum(sae_lib.preactivations(s, x) ** 3),
         lambda s, x: jnp.sum(((x - s.b_dec) @ s.W_enc.T + s.b_enc) ** 3)),
    )  # fmt: skip
    for mine, plain in pairs:
        found, expected = (jax.grad(f, argnums=(0, 1))(sae, x) for f in (mine, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)
    codes, dense = sae_lib.encode(sae, x), kept(sae, x)
    found = jax.grad(lambda s: jnp.sum((x - sae_lib.decode(s, codes)) ** 3))(sae)
    expected = jax.grad(lambda s: jnp.sum((x - dense @ s.W_dec - s.b_dec) ** 3))(sae)
    np.testing.assert_allclose(found.W_dec, expected.W_dec, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_dimension_and_a_batch_of_equal_tokens_stay_finite(rng, preset):
    dead, weight = jnp.arange(24) < 15, jnp.asarray(1.0)
    narrow, x = a_sae(rng, d=1, k=2, dtype=np.float32), rng.normal(size=(10, 1)).astype(np.float32)
    grad = jax.value_and_grad(lambda s, x: objective.loss(s, x, dead, weight, preset=preset)[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad(narrow, jnp.asarray(x))))
    if preset != "sparsify":  # whose first term is over the batch's variance
        alike = jnp.tile(jnp.asarray(rng.normal(size=6).astype(np.float32)), (3, 1))
        value, _ = grad(a_sae(rng, k=3, dtype=np.float32), alike)
        assert 0 < value < 10_000


@pytest.mark.parametrize("preset", ["openai", "dictionary_learning"])  # which divide by the variance of the error
@pytest.mark.parametrize("scale", [1, 1e3])
def test_of_tokens_that_are_all_alike_auxk_explains_nothing(rng, preset, scale):
    sae, dead = a_sae(rng, k=3, dtype=np.float32), jnp.arange(24) < 15
    x = jnp.tile(jnp.asarray(scale * rng.normal(size=6), jnp.float32), (7, 1))
    loss = jax.jit(jax.value_and_grad(lambda s, w: objective.loss(s, x, dead, w, preset=preset)[0]))
    without, with_it = (loss(sae, jnp.asarray(w)) for w in (0.0, 1.0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), with_it, without)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(with_it))


def test_tokens_on_which_nothing_is_positive_train_no_feature(rng):
    """ReLU does not let a pre-activation of exactly 0 through, nor its gradient."""
    sae, silent = a_sae(rng, dtype=np.float32), jnp.arange(24) < 12
    sae = sae.replace(W_enc=jnp.where(silent[:, None], 0.0, sae.W_enc), b_enc=jnp.where(silent, 0.0, -100.0))
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    grads = jax.jit(jax.grad(lambda s: sae_lib.square_error(s, x)[0]))(sae)
    assert not any(getattr(grads, name).any() for name in ("W_enc", "b_enc", "W_dec"))
    assert grads.b_dec.all()


@pytest.mark.parametrize("preset", PRESETS[1:])
@pytest.mark.parametrize("gamma", [0, 1000])
def test_auxk_counts_however_large_the_error_is(rng, preset, gamma):
    sae, dead = a_sae(rng, k=3, dtype=np.float32), jnp.arange(24) < 15
    x = jnp.asarray((rng.normal(size=(200, 6)) + gamma).astype(np.float32)) * 100
    without, with_it = (objective.loss(sae, x, dead, jnp.asarray(w), preset=preset)[0] for w in (0.0, 1.0))
    assert with_it > without


def test_measuring_asks_for_whole_products(rng):
    """Left to itself a TPU would multiply float32 matrices in bfloat16."""
    sae, x = a_sae(rng, dtype=np.float32), jnp.ones((10, 6))

    def measure(*leaves):
        sae = sae_lib.SAE(*leaves, k=3)
        seen, codes = death.sight(sae, x, jnp.ones(10, bool))
        grads = jax.grad(lambda sae: jnp.sum(sae_lib.preactivations(sae, x)) + jnp.sum(sae_lib.decode(sae, codes)))(sae)
        return seen.fired, sae_lib.reconstruct(sae, x)[0], grads.W_enc, grads.W_dec, grads.b_dec

    leaves = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    program = jax.export.export(jax.jit(measure), platforms=["tpu"])(*leaves).mlir_module()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 5
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_nan_row_shows_in_the_loss(rng):
    sae, x = a_sae(rng, k=3, dtype=np.float32), jnp.asarray(rng.normal(size=(10, 6)).astype(np.float32))
    sae = sae.replace(W_enc=sae.W_enc.at[4].set(jnp.nan))
    assert np.isnan(objective.loss(sae, x, jnp.zeros(24, bool), jnp.asarray(0.0), preset="none")[0])


def test_fve_is_about_the_mean_and_exact_at_high_gamma(rng):
    x = (rng.normal(size=(200, 8)) + 50).astype(np.float32)
    sae = a_sae(rng, n=16, d=8, k=2, dtype=np.float32).replace(b_dec=jnp.full(8, 50.0))
    batch = objective.loss(sae, jnp.asarray(x), jnp.zeros(16, bool), jnp.asarray(0.0), preset="none")[1]
    x64 = x.astype(np.float64)
    error = x64 - (numpy_codes(sae, x) @ np.asarray(sae.W_dec, np.float64) + 50)
    expected = 1 - (error**2).sum() / ((x64 - x64.mean(0)) ** 2).sum()
    np.testing.assert_allclose(batch.fve, expected, rtol=1e-4)
    np.testing.assert_allclose(batch.l0, (numpy_codes(sae, x) > 0).sum() / 200, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["dense", "rows", "sorted", "compressed"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 24), k=st.sampled_from([1, 3, 24]), d=st.integers(2, 8),
    tied=st.booleans(), preset=st.sampled_from(["none", "dictionary_learning"]),
)  # fmt: skip
def test_every_form_has_the_gradients_of_the_naive_formula(monkeypatch, form, seed, n, k, d, tied, preset):
    """Any shape, k = 1 and k = n; ties between features; tokens with fewer than k positive pre-activations."""
    for module in (kept, topk):
        monkeypatch.setattr(module, "form", lambda k, n, d: form)
    rng = np.random.default_rng(seed)
    sae, x = a_sae(rng, n=n, d=d, k=min(k, n)), jnp.asarray(rng.normal(size=(10, d)))
    if tied:  # every feature has a twin: equal pre-activations, of which the first is kept
        twin = lambda a: a.at[n // 2 : 2 * (n // 2)].set(a[: n // 2])  # noqa: E731
        sae = sae.replace(W_enc=twin(sae.W_enc), b_enc=twin(sae.b_enc))
    dead, weight = jnp.arange(n) < n // 4, jnp.asarray(0.7)
    mine = lambda sae: objective.loss(sae, x, dead, weight, preset=preset)[0]  # noqa: E731
    assert_naive(mine, sae, x, dead, weight, preset)


def test_in_pieces_everything_is_as_at_once(rng, monkeypatch):
    sae = a_sae(rng, n=40, d=5, k=3, dtype=np.float32)
    x, valid = jnp.asarray(rng.normal(size=(52, 5)), jnp.float32), jnp.arange(52) < 45
    look = lambda: jax.jit(lambda s: (death.sight(s, x, valid), sae_lib.encode(s, x)))(sae)  # noqa: E731
    expected = look()
    monkeypatch.setattr(kept, "LARGE", 1)
    monkeypatch.setattr(topk, "CHUNK", 8)
    pieces = []
    split = jnp.array_split
    monkeypatch.setattr(jnp, "array_split", lambda a, n: pieces.append(n) or split(a, n))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), look(), expected)
    assert set(pieces) == {6}


@pytest.mark.parametrize("n_tokens", [1, 5, 9, 17])
def test_a_large_sae_takes_few_tokens_too(rng, monkeypatch, n_tokens):
    monkeypatch.setattr(kept, "LARGE", 1)
    monkeypatch.setattr(topk, "CHUNK", 8)
    sae, x = a_sae(rng, n=40, d=5, k=3, dtype=np.float32), rng.normal(size=(n_tokens, 5)).astype(np.float32)
    codes = sae_lib.encode(sae, x)
    dense = np.zeros((n_tokens, 40))
    np.put_along_axis(dense, np.asarray(codes.indices), np.asarray(codes.values), axis=1)
    np.testing.assert_allclose(dense, numpy_codes(sae, x), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 700), k=st.sampled_from([1, 2, 5, 30]), levels=st.sampled_from([0, 3]),
    kind=st.sampled_from(["", "few", "NaN"]), size=st.sampled_from([2, 8, 16]),
)  # fmt: skip
def test_the_largest_found_in_groups_are_those_of_top_k(seed, n, k, levels, kind, size):
    """Of equal values the first; also where fewer than k can be chosen, and where a NaN must come through."""
    rng, k = np.random.default_rng(seed), min(k, n)
    z = rng.normal(size=(3, n)).astype(np.float32)
    if levels:
        z = np.round(levels * z) / levels + 0.0
    if kind == "few":
        z[:, rng.random(n) > k / (2 * n)] = -np.inf
    if kind == "NaN":
        z[1, rng.integers(n)] = np.nan
    found = jax.jit(kept.in_groups, static_argnums=(1, 2))(z, k, size)
    order = np.argsort(np.where(np.isnan(z), -np.inf, -z), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found[1], order)
    np.testing.assert_array_equal(found[0], np.take_along_axis(z, order, axis=1))
