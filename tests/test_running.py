import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from sae_jax import config as config_lib
from sae_jax.activations import chunks
from sae_jax.autoencoder import objective
from sae_jax.errors import Preempted, Refused, RunFailed
from sae_jax.models.sources import open_source
from sae_jax.reports import figures, page
from sae_jax.runtime import checkpoint
from sae_jax.runtime import devices as devices_lib
from sae_jax.training import evaluation
from sae_jax.training import run as run_lib
from sae_jax.training import step as step_lib

METRICS = {
    "dead_by_relu", "dead_by_topk", "dead_total", "fve", "fve_about_zero", "l0", "bias_relative_error",
    "bias_projection", "mmcs",
}  # fmt: skip


def final_states(config, workdir):
    """The states in the newest checkpoint, as NumPy arrays."""
    run = run_lib.Run(config, str(workdir), devices_lib.Devices(1), open_source(config))
    states = jax.device_get(run.states)
    run.data.close()
    run.checkpoints.close()
    return states


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.drawn
def test_a_run_leaves_its_report_figures_history_and_table(tiny, tmp_path):
    result = sae_jax.train(tiny, str(tmp_path))
    on_disk = json.loads((tmp_path / "report.json").read_text())
    assert on_disk == json.loads(json.dumps(result))
    assert on_disk["step"] == 40
    assert on_disk["gamma_raw"] == pytest.approx(4, rel=0.1)
    assert [member["name"] for member in on_disk["members"]] == ["baseline", "centred"]
    for member in on_disk["members"]:
        for when in ("init", "final"):
            assert set(member[when]) >= METRICS
            by_pathway = member[when]["dead_by_relu"] + member[when]["dead_by_topk"]
            assert member[when]["dead_total"] == pytest.approx(by_pathway)
    baseline, centred = on_disk["members"]
    assert baseline["init"]["bias_projection"] == 0
    assert centred["init"]["bias_projection"] == pytest.approx(1, abs=0.05)
    assert baseline["init"]["dead_total"] > 0.5 > 0.1 > centred["init"]["dead_total"]
    for name in ("deaths.png", "bias.png", "shifts.png", "config.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert list((tmp_path / "tensorboard").iterdir())
    assert [entry["step"] for entry in checkpoint.history(str(tmp_path))] == [0, 10, 20, 30, 40]
    assert "dead by ReLU" in run_lib.tables.table(result)


@pytest.mark.drawn
def test_of_many_members_the_first_are_drawn(tiny, tmp_path, monkeypatch):
    """In every picture; landscapes are of 200 tokens, and shifts of the first batches."""
    seen, counted, narrow = {}, [], []

    def watched(name, names):
        given = getattr(figures, name)

        def draw(*args, **more):
            seen[name] = names(args[0])
            narrow.append((name, more.get("narrow", False)))
            return given(*args, **more)

        monkeypatch.setattr(figures, name, draw)

    for name in ("deaths", "bias_convergence", "curves"):
        watched(name, lambda history: [list(entry["members"]) for entry in history])
    watched("comparison", lambda members: [member["name"] for member in members])
    watched("shifts", lambda shifts: counted.extend(shifts.values()) or list(shifts))
    watched("landscape", len)
    monkeypatch.setattr(page, "DRAWN", 1)
    monkeypatch.setattr(evaluation, "SHIFT_BATCHES", 2)  # of 200 tokens, where three are held out
    tiny.train.steps = 10
    sae_jax.train(tiny, str(tmp_path))
    of_two = {(when, shift.n_tokens) for pairs in counted for when, shift in pairs}
    assert of_two == {("at init", 400), ("step 10", 400)}
    for name in ("deaths", "bias_convergence", "curves"):
        assert seen.pop(name) == [["baseline"]] * 2
    assert seen == {"comparison": ["baseline"], "shifts": ["baseline"], "landscape": 200}
    assert len(narrow) == len(set(narrow)) == 12  # for a wide page, and for a narrow one


def test_a_model_beside_a_file_is_said_not_to_be_run(tiny, tmp_path, rng, capsys):
    np.save(tmp_path / "x.npy", rng.normal(size=(2000, 16)).astype(np.float32))
    tiny.data.path, tiny.data.model.id, tiny.train.steps = str(tmp_path / "x.npy"), "gpt2", 0
    run_lib.train(tiny, str(tmp_path / "w"))
    assert "beware: data.path is read; data.model.id = 'gpt2' is not run\n" in capsys.readouterr().err


def test_no_steps_is_an_evaluation_at_init(tiny, tmp_path):
    tiny.train.steps = 0
    result = sae_jax.train(tiny, str(tmp_path))
    assert result["step"] == 0
    assert result["members"][0]["init"] == result["members"][0]["final"]


def test_mean_zero_leaves_bias_metrics_undefined(tiny, tmp_path):
    assert run_lib.evaluation.bias_state(np.ones(3), np.zeros(3))["bias_projection"] is None


def test_interrupted_equals_uninterrupted(tiny, tmp_path, monkeypatch):
    sae_jax.train(tiny, str(tmp_path / "whole"))
    advance = run_lib.Run._next_inputs
    calls = []

    def dies(self, count):
        calls.append(count)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return advance(self, count)

    monkeypatch.setattr(run_lib.Run, "_next_inputs", dies)
    with pytest.raises(KeyboardInterrupt):
        sae_jax.train(tiny, str(tmp_path / "cut"))
    monkeypatch.undo()
    sae_jax.train(tiny, str(tmp_path / "cut"))
    assert_equal(final_states(tiny, tmp_path / "whole"), final_states(tiny, tmp_path / "cut"))
    assert checkpoint.history(str(tmp_path / "whole")) == checkpoint.history(str(tmp_path / "cut"))


def test_a_finished_run_reports_again_without_training(tiny, tmp_path, monkeypatch):
    first = sae_jax.train(tiny, str(tmp_path))
    monkeypatch.setattr(run_lib.Run, "_next_inputs", lambda *_: pytest.fail("trained again"))
    assert sae_jax.train(tiny, str(tmp_path)) == first


def test_sigterm_saves_and_the_next_start_goes_on(tiny, tmp_path, monkeypatch):
    sae_jax.train(tiny, str(tmp_path / "whole"))
    advance = run_lib.Run._next_inputs

    def asked_to_stop(self, count):
        if self.step == 14:
            signal.raise_signal(signal.SIGTERM)
        return advance(self, count)

    monkeypatch.setattr(run_lib.Run, "_next_inputs", asked_to_stop)
    with pytest.raises(Preempted, match="step 18"):
        sae_jax.train(tiny, str(tmp_path / "cut"))
    sae_jax.train(tiny, str(tmp_path / "cut"))
    assert_equal(final_states(tiny, tmp_path / "whole"), final_states(tiny, tmp_path / "cut"))


@pytest.mark.long
def test_the_command_stopped_and_killed_ends_as_if_nothing_had_been(tiny, tmp_path, rng):
    """On a file of activations: SIGTERM, then SIGKILL; parameters, counters and data order end bit-identical."""
    np.save(tmp_path / "x.npy", (rng.normal(size=(4000, 16)) + 2).astype(np.float32))
    tiny.data.signal, tiny.data.path = "", str(tmp_path / "x.npy")
    tiny.train.steps, tiny.train.steps_per_dispatch = 400, 1
    (tmp_path / "c.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({tiny.to_json()!r}))\n"
    )
    command = [sys.executable, "-m", "sae_jax", "train", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/cut"]
    saved = tmp_path / "cut" / "checkpoints"

    def newest():
        return max((int(path.name) for path in saved.glob("[0-9]*") if path.name.isdecimal()), default=0)

    def disturbed(by):
        kept, deadline = newest(), time.monotonic() + 120
        with subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True) as process:
            while newest() < kept + 30 and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(by)
            return process.communicate(timeout=60)[1], process.returncode

    said, code = disturbed(signal.SIGTERM)
    assert code == 143, said
    assert f"stopped on request at step {newest()} of 400; run again to go on" in said
    said, code = disturbed(signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert 60 <= newest() < 400
    for name in ("whole", "cut"):
        sae_jax.train(tiny, str(tmp_path / name))
    assert_equal(final_states(tiny, tmp_path / "whole"), final_states(tiny, tmp_path / "cut"))
    assert checkpoint.history(str(tmp_path / "whole")) == checkpoint.history(str(tmp_path / "cut"))


def test_what_a_killed_run_was_just_writing_is_cleared_away(tmp_path):
    half = tmp_path / checkpoint.FOLDER / "7.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (half / "x").write_text("half")
    checkpoints = checkpoint.Checkpoints(str(tmp_path), 2)
    deadline = time.monotonic() + 60  # a thread of orbax does it
    while half.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert checkpoints.latest is None
    checkpoints.close()
    assert not half.exists()


def test_another_configuration_in_the_workdir_is_refused_and_nothing_is_lost(tiny, tmp_path):
    sae_jax.train(tiny, str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    tiny.sae.k = 5
    with pytest.raises(Refused, match="sae.k = 4, not 5"):
        sae_jax.train(tiny, str(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_one_compilation_for_the_whole_run(tiny, tmp_path, monkeypatch):
    tiny.train.steps = 37  # ends within a dispatch and within a checkpoint interval
    traced = []
    step = step_lib.train_step
    monkeypatch.setattr(step_lib, "train_step", lambda *a, **k: traced.append(1) or step(*a, **k))
    sae_jax.train(tiny, str(tmp_path))
    baseline_and_shape_pass = len(traced)
    tiny.train.steps, tiny.checkpoint.every = 4, 4  # a single dispatch
    traced.clear()
    sae_jax.train(tiny, str(tmp_path / "short"))
    assert len(traced) == baseline_and_shape_pass


def test_members_side_by_side_equal_each_alone(tiny, tmp_path):
    tiny.members = ConfigDict({
        "a": {"sae": {"center": "mean"}, "train": {"learning_rate": 2e-3}},
        "b": {"sae": {"freeze_bias": True}, "seed": 5},
        "c": {"sae": {"k": 3}, "auxk": {"preset": "none"}},
    })
    together = sae_jax.train(tiny, str(tmp_path / "all"))
    states = final_states(tiny, tmp_path / "all")
    assert len(states) == 2  # c differs statically
    for i, name in enumerate("abc"):
        alone = ConfigDict(tiny.to_dict())
        alone.members = ConfigDict({name: tiny.members[name].to_dict()})
        report = sae_jax.train(alone, str(tmp_path / name))
        for key, value in report["members"][0]["final"].items():
            expected = None if value is None else pytest.approx(np.asarray(value), rel=1e-3, abs=2e-2)
            assert together["members"][i]["final"][key] == expected, key
    frozen = states[0].sae.b_dec[1]
    assert not frozen.any()
    assert states[0].sae.b_dec[0].any()


def test_a_run_begins_with_the_first_batch(tiny, tmp_path):
    run = run_lib.Run(tiny, str(tmp_path), devices_lib.Devices(1), open_source(tiny))
    given = np.asarray(run._next_inputs(3))
    run.data.close()
    run.checkpoints.close()
    expected = open_source(tiny).train(0)
    assert len(given) == 4  # as many as a dispatch takes
    np.testing.assert_array_equal(given[:3], [np.asarray(next(expected)) for _ in range(3)])
    expected.close()
    assert run.step == 0


@pytest.mark.parametrize("what", ["W_dec", "b_dec"])
def test_what_no_longer_reconstructs_anything_finite_is_named(tiny, tmp_path, what):
    run = run_lib.Run(tiny, str(tmp_path), devices_lib.Devices(1), open_source(tiny))
    (state,) = run.states
    wrong = getattr(state.sae, what).at[1].set(np.nan)
    run.states = (state.replace(sae=state.sae.replace(**{what: wrong})),)
    with pytest.raises(RunFailed, match="step 0, centred no longer reconstructs anything finite"):
        run._record()
    run.data.close()
    run.checkpoints.close()


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_is_named_with_its_members_and_what_was_not_computed_is_not_looked_at(what):
    groups = [SimpleNamespace(names=["a", "b"]), SimpleNamespace(names=["c"])]
    metrics = [{key: np.ones((6, len(group.names))) for key in ("loss", "grad_norm")} for group in groups]
    metrics[0][what][5], metrics[1][what][4] = np.nan, np.inf
    run, shown = SimpleNamespace(groups=groups, _failure=lambda *found: RunFailed(str(found))), []
    watch = SimpleNamespace(steps=lambda *given: shown.append(given[:2]))
    run_lib.Run._settle(run, (20, 4, metrics), watch)
    assert shown == [(20, 4)]
    metrics[0][what][2, 1] = np.nan
    with pytest.raises(RunFailed, match=r"\(22, \['b'\]\)"):
        run_lib.Run._settle(run, (20, 4, metrics), watch)
    metrics[1][what][1] = -np.inf
    with pytest.raises(RunFailed, match=r"\(21, \['c'\]\)"):
        run_lib.Run._settle(run, (20, 4, metrics), watch)
    assert shown == [(20, 4)]


# -- one device, several devices ---------------------------------------------------------------------------------------


def trained(config, workdir, n_devices, steps):
    """(states, losses) after `steps` steps on n_devices."""
    config = ConfigDict(config.to_dict())
    config.train.steps, config.train.devices = steps, n_devices
    run = run_lib.Run(config, str(workdir), devices_lib.Devices(n_devices), open_source(config))
    losses, t = [], config.train.steps_per_dispatch
    for _ in range(steps // t):
        run.states, metrics = run._advance(run.states, run._next_inputs(t), np.int32(t))
        losses.append(np.concatenate([np.asarray(group["loss"]) for group in metrics], axis=1))
    record = run._record()
    run.checkpoints.close()
    run.data.close()
    return jax.device_get(run.states), np.concatenate(losses), record


def all_presets(tiny):
    tiny.auxk.dead_after_tokens = 64  # AuxK is at work from the third step
    tiny.auxk.weight = 0.5
    # Rounding grows a millionfold in 50 steps, and with some seeds past the 1e-9 that one and two devices are held to.
    tiny.data.gamma, tiny.seed = 8.0, 1
    tiny.members = ConfigDict({name: {"auxk": {"preset": name}} for name in objective.PRESETS})
    return tiny


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("from_file", [False, True])
def test_one_device_and_two_are_equal_in_float64(tiny, tmp_path, rng, from_file):
    config = all_presets(tiny)
    config.train.steps_per_dispatch = 5
    if from_file:  # where rows go is what differs: not for each preset again
        config.members = ConfigDict({name: config.members[name].to_dict() for name in ("none", "saelens")})
        np.save(tmp_path / "x.npy", rng.normal(size=(4000, 16)) + 3)
        config.data.path = str(tmp_path / "x.npy")
    one, losses_one, record_one = trained(config, tmp_path / "1", 1, 50)
    two, losses_two, record_two = trained(config, tmp_path / "2", 2, 50)
    assert len(losses_one) == 50
    np.testing.assert_allclose(losses_two, losses_one, rtol=1e-9)
    for a, b in zip(one, two, strict=True):
        assert (a.tokens_since_fired >= 64).any()  # something was dead
        np.testing.assert_array_equal(a.tokens_since_fired, b.tokens_since_fired)
        for left, right in zip(jax.tree.leaves(a.sae), jax.tree.leaves(b.sae), strict=True):
            np.testing.assert_allclose(right, left, rtol=1e-9, atol=1e-9)
    for name, values in record_one["members"].items():
        for key, value in values.items():
            assert record_two["members"][name][key] == pytest.approx(np.asarray(value), rel=1e-9), (name, key)


def test_one_device_and_two_agree_in_float32(tiny, tmp_path):
    config = all_presets(tiny)
    config.members = ConfigDict({name: config.members[name].to_dict() for name in ("openai", "sparsify")})
    config.train.steps_per_dispatch = 5
    _, one, _ = trained(config, tmp_path / "1", 1, 50)
    _, two, _ = trained(config, tmp_path / "2", 2, 50)
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_a_batch_that_devices_cannot_share_is_refused(tiny, tmp_path):
    tiny.train.devices, tiny.train.batch_size = 2, 33
    with pytest.raises(Refused, match="train.batch_size = 33: a multiple of 2, the devices that share it"):
        sae_jax.train(tiny, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


# -- data that turns out bad -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(tiny, tmp_path, rng, bad, monkeypatch):
    x = rng.normal(size=(4096, 16)).astype(np.float32)
    tiny.data.path, tiny.data.statistics_tokens, tiny.eval.n_tokens = str(tmp_path / "x.npy"), 64, 64
    np.save(tmp_path / "x.npy", x)
    source = open_source(tiny)
    iterator = source.train(0)
    batches = [next(iterator) for _ in range(24)]
    iterator.close()
    seen_at_start = np.concatenate([*source.statistics(), *(given for given, _ in source.held_out())])
    step, row = next(
        (t, row) for t in range(23, 12, -1) for row in batches[t]
        if not (seen_at_start == row).all(axis=1).any()
    )  # fmt: skip
    x[(x == row).all(axis=1), 5] = bad
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(chunks.ArrayChunks, "check", lambda self: None)  # a file that goes bad while it is read
    kept = 10 * (step // 10)
    said = rf"step {step}, batch {step}: .*dimension 5.*checkpoint is that of step {kept}"
    with pytest.raises(RunFailed, match=said):
        sae_jax.train(tiny, str(tmp_path / "w"))
    assert checkpoint.history(str(tmp_path / "w"))[-1]["step"] == kept
    assert not (tmp_path / "w" / "report.json").exists()


def test_statistics_that_are_not_finite_are_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks.ArrayChunks, "check", lambda self: None)
    np.save(tmp_path / "x.npy", np.full((500, 4), np.nan))
    tiny.data.path = str(tmp_path / "x.npy")
    with pytest.raises(RunFailed, match=r"step 0, statistics batch 0"):
        sae_jax.train(tiny, str(tmp_path / "w"))


# -- shipped configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "synthetic", "quickstart"])
def test_shipped_configurations_pass_the_checks_and_run_when_shrunken(name, tmp_path, rng, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    config = importlib.import_module(f"configs.{name}").get_config()
    np.save(tmp_path / "x.npy", (rng.normal(size=(2000, 16)) + 1).astype(np.float16))
    if name != "synthetic":
        config.data.path = str(tmp_path / "x.npy")
    config.sae.n_features, config.sae.k = 128, 2
    config.train.steps, config.train.batch_size, config.eval.n_tokens, config.eval.batch_size = 6, 64, 300, 100
    config.data.statistics_tokens = 1000
    config.checkpoint.every = 3
    config_lib.check(config)
    result = sae_jax.train(config, str(tmp_path / "w"))
    assert [member["name"] for member in result["members"]] == ["baseline", "centred"]
