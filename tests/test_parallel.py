from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from sae_jax.autoencoder import kept, objective, topk
from sae_jax.config import base, members
from sae_jax.errors import Refused
from sae_jax.runtime import checkpoint
from sae_jax.runtime import devices as devices_lib
from sae_jax.training import run as run_lib
from sae_jax.training import step as step_lib

B, D = 16, 6


@pytest.fixture(params=[False, True], ids=["plain", "balanced"])
def group(request):
    """(static part, state of two members): features that miss one batch count as dead, so AuxK is at work."""
    config = base()
    config.sae.balance = request.param
    config.sae.n_features, config.sae.k, config.train.steps, config.data.signal = 24, 2, 40, "gaussian"
    config.auxk.dead_after_tokens = B
    config.members = {"one": {"seed": 1}, "other": {"seed": 2, "train": {"learning_rate": 1e-2}}}
    configs = list(members(config).values())
    with jax.enable_x64(True):
        state = step_lib.init_group(configs, jnp.zeros((2, D)))
        yield step_lib.Static.of(configs[0]), state


def batches(n):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=(B, D)) + 1) for _ in range(n)]


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


def plain(state, static, n=5):
    step = jax.jit(lambda s, x: step_lib.group_step(s, x, static=static, allsum=lambda tree: tree))
    for x in batches(n):
        state, metrics = step(state, x)
    return jax.device_get((state, metrics))


@pytest.mark.usefixtures("x64")
@pytest.mark.two_devices
@pytest.mark.parametrize("counts", [(52, 51), (64, 64), (1, 0), (0, 40), (3, 8), (9, 33), (0, 0)])
def test_shards_of_a_large_sae_are_one(monkeypatch, counts):
    """Compressed rows on each device, tokens in pieces, and AuxK of as many features as all devices have; however many
    are dead on each, both make room for the same number."""
    monkeypatch.setattr(kept, "LARGE", 1)
    monkeypatch.setattr(topk, "CHUNK", 4)
    assert kept.form(2, 64, D) == "compressed"
    config = base({"sae.n_features": 128, "sae.k": 2, "data.signal": "gaussian", "auxk.preset": "openai"})
    static = step_lib.Static.of(config)
    state = step_lib.init_group([config], jnp.zeros((1, D)))
    dead = jnp.arange(128) % 5 < 4 if counts == (52, 51) else jnp.arange(128) % 64 < jnp.repeat(jnp.asarray(counts), 64)
    assert (int(dead[:64].sum()), int(dead[64:].sum())) == counts
    state = state.replace(tokens_since_fired=jnp.where(dead, 2**30, 0)[None])
    expected = plain(state, static, n=1)
    mesh = devices_lib.make_mesh(jax.devices(), feature=2)
    step = devices_lib.mesh_step(mesh, partial(step_lib.group_step, static=static), state)
    found = step(jax.device_put(state, devices_lib.layout(mesh, state)), batches(1)[0])
    assert_equal(jax.device_get(found), expected)


@pytest.mark.parametrize("axes", [{"data": 2}, {"feature": 2}, {"member": 2}])
def test_a_mesh_computes_what_one_device_does(group, axes):
    static, state = group
    expected = plain(state, static)
    assert expected[1]["dead"][1] > 0  # AuxK was at work
    mesh = devices_lib.make_mesh(jax.devices(), **axes)
    step = devices_lib.mesh_step(mesh, partial(step_lib.group_step, static=static), state)
    state = jax.device_put(state, devices_lib.layout(mesh, state))
    for x in batches(5):
        state, metrics = step(state, x)
    assert_equal(jax.device_get((state, metrics)), expected)


def test_pmap_computes_what_one_device_does(group):
    static, state = group
    expected = plain(state, static)
    step = devices_lib.Devices(2).compile(
        lambda allsum, _, s, x: step_lib.group_step(s, x, static=static, allsum=allsum), split=(None, 0)
    )
    for x in batches(5):
        state, metrics = step(state, x)
    assert_equal(jax.device_get((state, metrics)), expected)


def test_ties_across_shards_go_to_the_lowest_feature(group):
    static, state = group
    sae = state.sae.replace(W_enc=jnp.tile(state.sae.W_enc[:, :6], (1, 4, 1)))  # every row four times, in both shards
    state = state.replace(sae=sae)
    expected = plain(state, static, n=1)
    mesh = devices_lib.make_mesh(jax.devices(), feature=2)
    step = devices_lib.mesh_step(mesh, partial(step_lib.group_step, static=static), state)
    found = step(jax.device_put(state, devices_lib.layout(mesh, state)), batches(1)[0])
    assert_equal(jax.device_get(found), expected)


def test_no_preactivations_are_gathered_over_features(group):
    static, state = group
    mesh = devices_lib.make_mesh(jax.devices(), feature=2)
    step = devices_lib.mesh_step(mesh, partial(step_lib.group_step, static=static), state)
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
        return step_lib.group_step(s, x, static=static, allsum=lambda tree: tree)

    step = jax.jit(once, donate_argnums=0)
    given = batches(4)
    state, _ = step(state, given[0])
    with jax.transfer_guard("disallow"):
        for x in given[1:]:
            state, metrics = step(state, x)
    assert len(traces) == 1
    assert np.isfinite(jax.device_get(metrics)["loss"]).all()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_same_step_is_exported_for_every_platform(platform):
    config = base()
    config.data.signal = "gaussian"
    static = step_lib.Static.of(config)  # n 8192, k 64: the shape for which a CPU takes its own kernels
    abstract = jax.eval_shape(lambda: step_lib.init_group([config], jnp.zeros((1, 768))))
    x = jax.ShapeDtypeStruct((2048, 768), jnp.float32)
    step = jax.jit(lambda s, x: step_lib.group_step(s, x, static=static, allsum=lambda tree: tree))
    own = jax.export.DisabledSafetyCheck.custom_call("cpu_csr_sparse_dense_ffi")  # it is the same JAX that runs it
    exported = jax.export.export(step, platforms=[platform], disabled_checks=[own])(abstract, x)
    assert exported.platforms == (platform,)
    program = exported.mlir_module()
    assert ("cpu_csr_sparse_dense" in program) == (platform == "cpu")
    # Left to itself a TPU multiplies float32 matrices in bfloat16.
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    # A GPU multiplies no matrix of all codes, and takes no top-k of all n at once: what is left are encoders', one of
    # the gradient without AuxK, two, alike, of that with it where all are dead, and one in each smaller room.
    wide = [line for line in products if "2048x8192x" in line]
    whole = [line for line in program.splitlines() if "top_k" in line and "2048x8192x" in line]
    if platform == "cuda":
        assert len(wide) == 3 + len(objective.rooms(8192, 768)[1:-1]) == 5
    assert bool(whole) == (platform == "tpu")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mesh", [pytest.param("member=2", marks=pytest.mark.long), "feature=2"])
def test_a_run_on_a_mesh_cut_short_and_continued_equals_one_device(tiny, tmp_path, monkeypatch, mesh):
    """Two programs of two members each: one with gammas of their own, one behind whitening and balanced."""
    tiny.train.steps, tiny.train.steps_per_dispatch = 50, 5
    tiny.auxk.dead_after_tokens = 64  # AuxK is at work from the third step
    tiny.members = ConfigDict({
        "centred": {"sae": {"center": "mean"}}, "white": {"sae": {"whiten": True, "balance": True}},
        "far": {"data": {"gamma": 9.0}}, "white_too": {"sae": {"whiten": True, "balance": True}, "seed": 1},
    })  # fmt: skip
    one = sae_jax.train(tiny, str(tmp_path / "one"))
    tiny.train.devices, tiny.train.mesh = 2, mesh
    given, shapes = run_lib.Run._next_inputs, []

    def cut_short(self, count):
        shapes.append(self.states[0].sae.W_enc.addressable_shards[0].data.shape)
        if self.step == 25:
            raise KeyboardInterrupt
        return given(self, count)

    monkeypatch.setattr(run_lib.Run, "_next_inputs", cut_short)
    with pytest.raises(KeyboardInterrupt):
        sae_jax.train(tiny, str(tmp_path / "two"))
    monkeypatch.undo()
    two = sae_jax.train(tiny, str(tmp_path / "two"))
    assert set(shapes) == {(1, 64, 16) if mesh == "member=2" else (2, 32, 16)}  # of (2, 64, 16)
    assert (one["devices"], two["devices"]) == (1, 2)
    for ours, theirs in zip(two["members"], one["members"], strict=True):
        for when in ("init", "final"):
            for key, value in theirs[when].items():
                wanted = value if value is None else pytest.approx(np.asarray(value), rel=1e-9, abs=1e-12)
                assert ours[when][key] == wanted, (ours["name"], when, key)
    a, b = (checkpoint.saved(str(tmp_path / name)).groups for name in ("one", "two"))
    assert max(group["tokens_since_fired"].max() for group in a) >= 64
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left["tokens_since_fired"], right["tokens_since_fired"])
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-9)
    assert (tmp_path / "two" / "fates.csv").read_text() == (tmp_path / "one" / "fates.csv").read_text()


@pytest.mark.parametrize(("key", "value", "said"), [
    ("train.mesh", "rows=2", "empty, member=N, feature=N, or member=N,feature=N"),
    ("train.mesh", "member=0", "empty, member=N"),
    ("train.mesh", "member=2,member=2", "empty, member=N"),
    ("train.mesh", "feature=-1", "empty, member=N"),
    ("train.mesh", "member=2,feature=2", "numbers whose product divides the 2 devices"),
    ("train.mesh", "member=4", "numbers whose product divides the 2 devices"),
    ("sae.n_features", 63, "a multiple of 2, as of train.mesh"),
    ("members", {"a": {}, "b": {}, "c": {}}, "divides members of a program: 3 (a, b, c) are one program"),
    ("members", {"a": {}, "b": {"train": {"mesh": "member=2"}}}, "a setting of"),
])  # fmt: skip
def test_a_mesh_that_cannot_be_is_refused_and_nothing_is_written(tiny, tmp_path, key, value, said):
    tiny.train.devices, tiny.train.mesh = 2, "feature=2" if key == "sae.n_features" else "member=2"
    if key == "members":
        tiny.members = ConfigDict(value)
    else:
        tiny.update_from_flattened_dict({key: value})
    with pytest.raises(Refused) as refused:
        sae_jax.train(tiny, str(tmp_path / "w"))
    assert said in str(refused.value)
    assert not (tmp_path / "w").exists()


def test_large_members_are_grouped_so_that_each_device_has_one():
    config = base()
    config.members = ConfigDict({name: {"seed": i} for i, name in enumerate("abcd")})
    assert [group.names for group in step_lib.group_members(members(config), 768)] == [["a"], ["b"], ["c"], ["d"]]
    config.train.mesh = "member=2"
    assert [group.names for group in step_lib.group_members(members(config), 768)] == [["a", "b"], ["c", "d"]]


@pytest.mark.two_devices
def test_a_mesh_has_the_devices_that_were_asked_for_and_no_others():
    asked = devices_lib.Devices(1)
    assert asked._everywhere() == jax.local_devices()[:1]
    assert devices_lib.Devices(2)._everywhere() == jax.local_devices()[:2]


def test_a_part_is_a_stretch_of_its_own_of_every_batch():
    for of in (1, 2, 3):
        rows = [list(range(12))[devices_lib.Part(number, of).rows(12)] for number in range(of)]
        assert sum(rows, []) == list(range(12))
        assert {len(part) for part in rows} == {12 // of}


@pytest.mark.parametrize(("processes", "each"), [(1, 4), (2, 1), (2, 2), (2, 4), (3, 2), (4, 2), (4, 1), (2, 6)])
def test_processes_read_the_rows_that_their_devices_have_or_are_refused(monkeypatch, processes, each):
    """Every way to share out members, batch and features, by brute force: of 24 rows, those of each device."""
    count = processes * each
    numbered = np.array([SimpleNamespace(process_index=i // each) for i in range(count)])
    for member, data in ((m, b) for m in range(1, count + 1) for b in range(1, count + 1) if count % (m * b) == 0):
        shape = (member, data, count // member // data)
        mesh = SimpleNamespace(devices=numbered.reshape(shape), size=count, shape={devices_lib.DATA: data})
        needs = [set() for _ in range(processes)]
        for (_, place, _), device in np.ndenumerate(mesh.devices):
            needs[device.process_index].add(place)
        size = len(needs[0])
        parts = {frozenset(range(start, start + size)) for start in range(0, data, size)}
        fine = data % size == 0 and all(need in parts for need in needs)
        for number, need in enumerate(needs):
            monkeypatch.setattr(devices_lib.jax, "process_index", lambda number=number: number)
            if not fine:
                with pytest.raises(Refused, match=f"{processes} processes of {each} devices each"):
                    devices_lib._part(mesh, "asked")
                continue
            found = devices_lib._part(mesh, "asked")
            assert found.of == data // size
            assert set(range(data)[found.rows(data)]) == need


@pytest.mark.two_devices
def test_memories_of_a_run_are_those_of_the_machine_or_of_each_device():
    """Two processors are in one memory, which has two copies or two shards; accelerators have one each."""
    for feature, shares in ((1, 2), (2, 1)):
        here = devices_lib.Devices(2, feature=feature)
        assert here.memories() == devices_lib.Memories(is_host=True, copies=shares, parts=1, batch_parts=1)
        here.local = [SimpleNamespace(platform="gpu")] * 2
        expected = devices_lib.Memories(is_host=False, copies=1, parts=2 // shares, batch_parts=shares)
        assert here.memories() == expected
        assert isinstance(here.memories().parts, int)
        assert here.shards == ("feature" if feature > 1 else None)
        here.check_batch("train.batch_size", 6)
        if shares == 2:
            with pytest.raises(Refused, match="a multiple of 2, the devices that share it"):
                here.check_batch("train.batch_size", 7)
    with pytest.raises(Refused, match=r"train.devices = 3: 0 \(all\) to 2"):
        devices_lib.Devices(3)


@pytest.mark.two_devices
@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 0), ((2, 6, 3), 1), ((3, 2, 4), 2)])
def test_a_batch_is_folded_along_its_axis(rng, shape, axis):
    x = rng.normal(size=shape)
    found = devices_lib.Devices(2)._fold(x, axis)
    for device, part in enumerate(np.split(x, 2, axis=axis)):
        np.testing.assert_array_equal(np.take(found, device, axis=axis), part)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("counts", [(0, 3), (8, 9), (40, 64), (33, 0)])
def test_large_members_with_other_numbers_of_dead_features_are_trained_as_each_alone(monkeypatch, counts):
    monkeypatch.setattr(kept, "LARGE", 1)
    configs = [base({"sae.n_features": 64, "sae.k": 2, "data.signal": "gaussian", "seed": seed}) for seed in (0, 1)]
    static = step_lib.Static.of(configs[0])
    assert objective.rooms(64, D) == (0, 8, 32, 64)
    silent = jnp.where(jnp.arange(64) < jnp.asarray(counts)[:, None], 2**30, 0)
    together = step_lib.init_group(configs, jnp.zeros((2, D))).replace(tokens_since_fired=silent)
    found = plain(together, static, n=1)
    for i in range(2):
        alone = plain(jax.tree.map(lambda a, i=i: a[i : i + 1], together), static, n=1)
        assert_equal(jax.tree.map(lambda a, i=i: a[i : i + 1], found), alone)
