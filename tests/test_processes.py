"""Several processes are one run: they compute what one does, stop together, and none waits for one that is gone."""

import json
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from processes import Processes
from test_running import final_states

import sae_jax
from sae_jax.errors import Preempted, Refused, RunFailed
from sae_jax.runtime import checkpoint, processes

TRAIN = """
    import json, os, signal
    from ml_collections import ConfigDict
    import sae_jax
    from sae_jax.training import run as run_lib
    from sae_jax.errors import Preempted
    from sae_jax.runtime import processes

    jax.config.update("jax_enable_x64", True)
    config, disturb = ConfigDict(json.loads({config!r})), {disturb!r}
    advance = run_lib.Run._next_inputs

    def disturbed(self, count):
        if self.step == {{"kill": 45}}.get(disturb, 15) and number == 1:
            os.kill(os.getpid(), signal.SIGKILL if disturb == "kill" else signal.SIGTERM)
        return advance(self, count)

    run_lib.Run._next_inputs = disturbed if disturb else advance
    fetched = processes.fetched

    def watched(tree):
        found = fetched(tree)
        if config.train.mesh:  # not a matrix of all features, (members, n, d), on any host
            assert all(x.ndim < 3 for x in jax.tree.leaves(found)), [x.shape for x in jax.tree.leaves(found)]
        return found

    processes.fetched = watched
    try:
        sae_jax.train(config, "w")
    except Preempted as error:
        print(error, error.exit_code)
        run_lib.Run._next_inputs = advance
        if disturb != "leave":
            sae_jax.train(config, "w")
"""


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n", "from_file", "disturb"), [
    (2, False, "ask"), pytest.param(4, True, "", marks=pytest.mark.long),
])
def test_several_processes_equal_one_in_float64(tiny, tmp_path, rng, n, from_file, disturb):
    """50 steps; two of them are stopped on the way, by a signal that one alone gets, and go on together."""
    tiny.train.steps, tiny.train.steps_per_dispatch = 50, 5
    tiny.members = ConfigDict({"a": {"sae": {"center": "mean"}}, "b": {"auxk": {"dead_after_tokens": 64}}})
    if from_file:
        np.save(tmp_path / "x.npy", rng.normal(size=(4000, 16)) + 3)
        tiny.data.path = str(tmp_path / "x.npy")
    started = Processes(TRAIN.format(config=tiny.to_json(), disturb=disturb), n, tmp_path / "several")
    one = sae_jax.train(tiny, str(tmp_path / "one"))
    for code, said in started.wait():
        assert code == 0, said
        assert ("stopped on request at step" in said) == bool(disturb), said
    assert (json.loads((tmp_path / "several" / "w" / "report.json").read_text())["devices"], one["devices"]) == (n, 1)
    assert_alike(tiny, tmp_path / "one", tmp_path / "several" / "w")


def assert_alike(config, one, other):
    """Two runs of 50 steps have come to the same."""
    a, b = (final_states(config, folder) for folder in (one, other))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left.tokens_since_fired, right.tokens_since_fired)
        assert set(right.step.tolist()) == {50}
        for x, y in zip(jax.tree.leaves(left.sae), jax.tree.leaves(right.sae), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-9)
    figures = [json.loads((folder / "report.json").read_text())["members"] for folder in (one, other)]
    for theirs, ours in zip(*figures, strict=True):
        for when in ("init", "final"):
            for key, value in theirs[when].items():
                wanted = value if value is None else pytest.approx(np.asarray(value), rel=1e-9)
                assert ours[when][key] == wanted, (when, key)
    assert (other / "fates.csv").read_text() == (one / "fates.csv").read_text()


def spread_out(tiny, tmp_path, rng):
    """Two programs, of a file: one with AuxK at work, one behind whitening and balanced as well."""
    np.save(tmp_path / "x.npy", rng.normal(size=(4000, 16)) + 3)
    tiny.data.path, tiny.data.signal = str(tmp_path / "x.npy"), ""
    tiny.train.steps, tiny.train.steps_per_dispatch, tiny.auxk.dead_after_tokens = 50, 5, 64
    balanced = {"sae": {"whiten": True, "balance": True}}
    tiny.members = ConfigDict({"a": {"seed": 1}, "b": {"seed": 2}, "c": {**balanced}, "d": {**balanced, "seed": 3}})
    sae_jax.train(tiny, str(tmp_path / "one"))
    tiny.train.devices = 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n", "mesh"), [
    (2, "feature=2"), (2, ""), pytest.param(2, "feature=4", marks=pytest.mark.long),
    pytest.param(2, "member=2,feature=2", marks=pytest.mark.long),
    pytest.param(4, "member=2,feature=2", marks=pytest.mark.long),
    pytest.param(4, "feature=8", marks=pytest.mark.long), pytest.param(4, "feature=4", marks=pytest.mark.long),
])
def test_a_mesh_over_several_processes_equals_one_device_and_goes_on_anywhere(tiny, tmp_path, rng, n, mesh):
    """Cut short, then continued by another mesh of as many processes, by one device, and by four of one process."""
    spread_out(tiny, tmp_path, rng)
    started, ways = ConfigDict(tiny.to_dict()), {}
    started.train.mesh = mesh
    source = TRAIN.format(config=started.to_json(), disturb="leave")
    for code, said in Processes(source, n, tmp_path / "first", devices=2).wait():
        assert code == 0, said
        assert "stopped on request at step" in said
    written = tmp_path / "first" / "w" / "checkpoints"
    for step in written.iterdir():
        assert {path.name for path in (step / "state").glob("ocdbt.process_*")} == {
            f"ocdbt.process_{number}" for number in range(n)
        }
    for name, again, devices, how in (("meshed", n, 2, "feature=4"), ("four", 1, 4, "member=2,feature=2")):
        shutil.copytree(tmp_path / "first" / "w", tmp_path / name / "w")
        goes_on = ConfigDict(tiny.to_dict())
        goes_on.train.mesh = how
        ways[name] = Processes(TRAIN.format(config=goes_on.to_json(), disturb=""), again, tmp_path / name, devices)
    tiny.train.devices = 1
    sae_jax.train(tiny, str(tmp_path / "first" / "w"))
    assert_alike(tiny, tmp_path / "one", tmp_path / "first" / "w")
    for name, running in ways.items():
        for code, said in running.wait():
            assert code == 0, said
        assert_alike(tiny, tmp_path / "one", tmp_path / name / "w")


@pytest.mark.parametrize(("change", "said"), [
    ("config.sae.k -= 4 * number", "--config = 'processes 0 and 1 differ': one and the same configuration in all"),
    ("config.seed += number", "--config = 'processes 0 and 1 differ': one and the same configuration in all"),
    ("config.train.mesh = f'feature={1 + number}'", "--config = 'processes 0 and 1 differ': one and the same"),
    ("config.train.mesh, config.sae.n_features = 'feature=3', 63", "numbers whose product divides the 4 devices"),
])
def test_processes_that_cannot_be_one_run_say_so_and_write_nothing(tiny, tmp_path, change, said):
    tiny.train.devices = 0
    source = TRAIN.format(config=tiny.to_json(), disturb="").replace("    advance =", f"    {change}\n    advance =")
    for code, lines in Processes(source, 2, tmp_path / "w", devices=2).wait(120):
        assert code == 2, lines
        assert [said in line for line in lines.splitlines() if line.startswith("sae_jax: ")] == [True], lines
    assert not (tmp_path / "w" / "w").exists()


@pytest.mark.parametrize(("rows", "workdir", "said"), [
    (1001, "shared", "data.path = 'processes 0 and 1 differ': one and the same activations in all"),
    (1000, "shared", "data.path = 'processes 0 and 1 differ': one and the same activations in all"),
    (0, "own", "--workdir = 'processes 0 and 1 differ': one and the same folder, which they share, in all"),
])
def test_processes_that_read_or_write_something_else_say_so(tiny, tmp_path, rng, rows, workdir, said):
    """Other activations in a file of the same name, of another length or of this; a workdir of one's own."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        if not rows:
            rng = np.random.default_rng(0)
        np.save(tmp_path / str(number) / "x.npy", rng.normal(size=(rows if number and rows else 1000, 16)))
    tiny.data.signal, tiny.data.path, tiny.train.devices = "", "x.npy", 0
    before = f"os.chdir(f'{tmp_path}/{{number}}'); from sae_jax.runtime import workdir; workdir.SEEN_WITHIN = 1.0"
    source = TRAIN.format(config=tiny.to_json(), disturb="").replace("    advance =", f"    {before}\n    advance =")
    if workdir == "shared":
        source = source.replace('"w")', f'"{tmp_path}/w")')
    for code, lines in Processes(source, 2, tmp_path / "logs", devices=2).wait(120):
        assert code == 2, lines
        assert said in lines
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("by", "center"), [(1e-12, "geometric_median"), (1e-2, "geometric_median"), (1e-2, "mean")])
def test_statistics_are_the_first_ones_to_the_bit_and_refused_where_they_are_others(tiny, tmp_path, by, center):
    """Processors round as they like; what is more than that comes of other activations.

    Without a member that starts at it there is no geometric median: all have NaN in its place.
    """
    tiny.train.steps, tiny.train.devices, tiny.train.mesh = 5, 0, "feature=2"
    tiny.members.centred.sae.center = center
    before = f"""
    from sae_jax.training.ensemble import Ensemble
    own = Ensemble._statistics
    Ensemble._statistics = lambda self: {{key: x * (1 + {by} * number) for key, x in own(self).items()}}
    init = Ensemble.__init__

    def seen(self, *given):
        init(self, *given)
        print("scale", repr(self.scale))

    Ensemble.__init__ = seen
    advance ="""
    source = TRAIN.format(config=tiny.to_json(), disturb="").replace("    advance =", before)
    ended = Processes(source, 2, tmp_path / "w").wait(120)
    if by > 1e-4:
        assert [code for code, _ in ended] == [2, 2], ended
        assert all("data.path = 'processes 0 and 1 differ': one and the same activations" in said for _, said in ended)
        return
    assert [code for code, _ in ended] == [0, 0], ended
    scales = {line for _, said in ended for line in said.splitlines() if line.startswith("scale")}
    assert len(scales) == 1


def test_commands_that_differ_are_refused(tmp_path):
    """Before they are read: what one alone refused would leave the other waiting."""
    source = """
    from sae_jax.cli import main
    sys.exit(main(["train", "--config=nope.py", *["--config.sae.kk=3"] * number]))
    """
    for code, lines in Processes(source, 2, tmp_path).wait(120):
        assert code == 2, lines
        assert "sae_jax: command line = 'processes 0 and 1 differ': one and the same" in lines


@pytest.mark.parametrize(("error", "code", "said"), [
    (Refused("a", 1, "b"), 2, "a = 1: b"), (RunFailed("broke\noff"), 3, "broke off"),
    (jax.errors.JaxRuntimeError("gone"), 3, "another process of this run has ended or cannot be reached, so all stop"),
    (KeyError("x"), 1, "process 0 has failed, so all stop"),
], ids=str)  # fmt: skip
def test_one_that_fails_among_several_ends_at_once_with_a_line(monkeypatch, capfd, error, code, said):
    """And a little later where it coordinates; what is asked to stop, or is alone, ends as it always does."""
    slept = []
    monkeypatch.setattr(processes.os, "_exit", sys.exit)
    monkeypatch.setattr(processes, "time", SimpleNamespace(sleep=slept.append))
    for alone, raised in ((True, error), (False, Preempted("stopped"))):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda alone=alone: not alone)
        with pytest.raises(type(raised)), processes.together():
            raise raised
    for number in range(2):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with pytest.raises(SystemExit) as ended, processes.together():
            raise error
        assert ended.value.code == code
        assert f"sae_jax: {said.replace('process 0', f'process {number}')}" in capfd.readouterr().err
        assert slept == [2]  # by the first one alone


@pytest.mark.parametrize(("devices", "said"), [
    ([0, 0, 1], "processes = '1 to 2 devices each': equally many in all processes"), ([0, 0, 1, 1], ""),
    ([0, 1, 1, 1, 2], "processes = '1 to 3 devices each': equally many in all processes"),
])  # fmt: skip
def test_processes_have_equally_many_devices(monkeypatch, devices, said):
    monkeypatch.setattr(jax, "process_count", lambda: 1 + max(devices))
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(process_index=number) for number in devices])
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda own: np.stack([own, own]))
    if not said:
        processes.check_alike("--config", "configuration", {"seed": 1})
        return
    with pytest.raises(Refused) as refused:
        processes.check_alike("--config", "configuration", {"seed": 1})
    assert str(refused.value) == said


@pytest.mark.parametrize(("off", "alike"), [
    ([0, 0, 0], True), ([0.015, 0, 0], True), ([0, 0.009, 0], True), ([0, 0, 0.009], True), ([0, 0, 0.015], False),
    ([0, 0.05, 0], False), ([0.025, 0, 0], False), ([np.nan, 0, 0], False),
])  # fmt: skip
def test_what_rounding_explains_is_a_share_of_the_largest_number(monkeypatch, off, alike):
    """One part in 10⁴ of it, and as much of a number itself: this process has what the first has but for `off`."""
    first = {"n": np.array([7, 8]), "x": np.array([100.0, -1.0, 0.0]), "none": np.full(2, np.nan, np.float32)}
    own = first | {"x": first["x"] + off}
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "check_alike", lambda field, what, value: asked.append((field, what, value)))
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", lambda given: {
        key: np.frombuffer(first[key].tobytes(), np.uint8).astype(np.int32) for key in given
    })  # fmt: skip
    found = processes.of_the_first(own, "data.path", "activations")
    for key, value in first.items():
        np.testing.assert_array_equal(found[key], value)
        assert found[key].dtype == value.dtype
    shapes = {"n": ["int64", 2], "x": ["float64", 3], "none": ["float32", 2]}
    assert asked == [("data.path", "activations", shapes), ("data.path", "activations", alike)]


@pytest.mark.long
def test_a_mesh_that_cuts_through_processes_is_refused(tiny, tmp_path):
    tiny.train.mesh, tiny.sae.n_features, tiny.train.devices = "feature=3", 63, 0
    source = TRAIN.format(config=tiny.to_json(), disturb="")
    for code, lines in Processes(source, 3, tmp_path / "w", devices=2).wait(120):
        assert code == 2, lines
        assert "3 processes of 2 devices each" in lines


@pytest.mark.long
def test_one_process_killed_stops_the_other_with_a_line_and_not_with_a_hang(tiny, tmp_path):
    tiny.train.steps, tiny.train.steps_per_dispatch = 100_000, 5
    (code, said), (victim, _) = Processes(TRAIN.format(config=tiny.to_json(), disturb="kill"), 2, tmp_path).wait()
    assert victim == -9
    assert code == 3, said
    assert "sae_jax: another process of this run has ended or cannot be reached, so all stop" in said
    assert checkpoint.steps(checkpoint.epath.Path(tmp_path / "w" / "checkpoints"))


ON_DEVICES = """
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from sae_jax.runtime import devices
    mesh = jax.make_mesh((2 * n,), ("data",))
    for spec, axis in ((PartitionSpec("data"), 0), (PartitionSpec(None, "data"), 1)):
        whole = np.arange(16.0 * n * n).reshape(4 * n, 4 * n)
        own = np.split(whole, n, axis)[number]
        laid = devices._laid(NamedSharding(mesh, spec), jnp.asarray(own), axis, devices.Part(number, n))
        assert laid.shape == whole.shape, laid.shape
        for shard in laid.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
"""


def test_what_a_process_has_on_a_device_becomes_its_part_of_the_whole(tmp_path):
    for code, log in Processes(ON_DEVICES, 2, tmp_path, devices=2).wait():
        assert code == 0, log
