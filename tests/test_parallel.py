import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import parallel, training
from sae_jax.config import base, members

B, D = 16, 6


@pytest.fixture
def group():
    """(static part, state of two members): features that miss one batch count as dead, so AuxK is at work."""
    config = base()
    config.sae.n_features, config.sae.k, config.train.steps, config.data.signal = 24, 2, 40, "gaussian"
    config.auxk.dead_after_tokens = B
    config.members = {"one": {"seed": 1}, "other": {"seed": 2, "train": {"learning_rate": 1e-2}}}
    configs = list(members(config).values())
    with jax.enable_x64(True):
        state = training.init_group(configs, jnp.zeros((2, D)))
        yield training.Static.of(configs[0]), state


def batches(n):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=(B, D)) + 1) for _ in range(n)]


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


def plain(state, static, n=5):
    step = jax.jit(lambda s, x: training.group_step(s, x, static=static, allsum=lambda tree: tree))
    for x in batches(n):
        state, metrics = step(state, x)
    return jax.device_get((state, metrics))


@pytest.mark.parametrize("axes", [{"data": 2}, {"feature": 2}, {"member": 2}])
def test_a_mesh_computes_what_one_device_does(group, axes):
    static, state = group
    expected = plain(state, static)
    assert expected[1]["dead"][1] > 0  # AuxK was at work
    mesh = parallel.make_mesh(jax.devices(), **axes)
    step = parallel.mesh_step(mesh, static, state)
    state = jax.device_put(state, parallel.layout(mesh, state))
    for x in batches(5):
        state, metrics = step(state, x)
    assert_equal(jax.device_get((state, metrics)), expected)


def test_pmap_computes_what_one_device_does(group):
    static, state = group
    expected = plain(state, static)
    step = parallel.Devices(2).compile(
        lambda allsum, _, s, x: training.group_step(s, x, static=static, allsum=allsum), split=(None, 0)
    )
    for x in batches(5):
        state, metrics = step(state, x)
    assert_equal(jax.device_get((state, metrics)), expected)


def test_ties_across_shards_go_to_the_lowest_feature(group):
    static, state = group
    sae = state.sae.replace(W_enc=jnp.tile(state.sae.W_enc[:, :6], (1, 4, 1)))  # every row four times, in both shards
    state = state.replace(sae=sae)
    expected = plain(state, static, n=1)
    mesh = parallel.make_mesh(jax.devices(), feature=2)
    found = parallel.mesh_step(mesh, static, state)(jax.device_put(state, parallel.layout(mesh, state)), batches(1)[0])
    assert_equal(jax.device_get(found), expected)


def test_no_preactivations_are_gathered_over_features(group):
    static, state = group
    mesh = parallel.make_mesh(jax.devices(), feature=2)
    step = parallel.mesh_step(mesh, static, state)
    hlo = step.lower(state, batches(1)[0]).compile().as_text()
    gathered = [line.split(" = ")[1].split(" ")[0] for line in hlo.splitlines() if " all-gather(" in line]
    assert gathered
    sizes = [np.prod([int(n) for n in shape.split("[")[1].split("]")[0].split(",")]) for shape in gathered]
    most = B * D // 2 * 2 * 2  # AuxK: k_aux = d/2 candidates of 2 shards, 2 members
    assert max(sizes) <= most < B * 24 * 2


def test_no_recompilation_and_no_transfer_in_the_loop(group):
    static, state = group
    traces = []

    def once(s, x):
        traces.append(0)
        return training.group_step(s, x, static=static, allsum=lambda tree: tree)

    step = jax.jit(once, donate_argnums=0)
    given = batches(4)
    state, _ = step(state, given[0])
    with jax.transfer_guard("disallow"):
        for x in given[1:]:
            state, metrics = step(state, x)
    assert len(traces) == 1
    assert np.isfinite(jax.device_get(metrics)["loss"]).all()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_same_step_lowers_for_every_platform(platform):
    config = base()
    config.data.signal = "gaussian"
    static = training.Static.of(config)  # n 8192, k 64: the shape for which a CPU takes its own kernels
    abstract = jax.eval_shape(lambda: training.init_group([config], jnp.zeros((1, 768))))
    x = jax.ShapeDtypeStruct((2048, 768), jnp.float32)
    step = jax.jit(lambda s, x: training.group_step(s, x, static=static, allsum=lambda tree: tree))
    text = step.trace(abstract, x).lower(lowering_platforms=(platform,)).as_text()
    assert ("cpu_csr_sparse_dense" in text) == (platform == "cpu")
