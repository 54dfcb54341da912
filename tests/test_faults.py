"""What may befall a run: damaged files, a workdir in use, numbers that blow up. Nothing is lost, nothing lies."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from sae_jax import cli
from sae_jax.activations import stored
from sae_jax.errors import Refused, RunFailed
from sae_jax.outliers import moments as moments_lib
from sae_jax.runtime import checkpoint, disk
from sae_jax.runtime import workdir as workdir_lib
from sae_jax.training import step as step_lib

ROOT = Path(__file__).parents[1]


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Where the one finished run that all tests of damage copy is kept."""
    return tmp_path_factory.mktemp("finished") / "w"


@pytest.fixture
def run(shelf, tiny, tmp_path):
    """(workdir, configuration) of a finished run with the checkpoints 10 and 20, to be damaged."""
    tiny.train.steps, tiny.members = 20, ConfigDict()
    if not shelf.exists():
        sae_jax.train(tiny, str(shelf))
    shutil.copytree(shelf, tmp_path / "w")
    return tmp_path / "w", tiny


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt")


def flip(path, bit=None):
    data = bytearray(path.read_bytes())
    position = len(data) * 4 if bit is None else bit
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def test_one_bit_in_any_file_of_a_checkpoint_is_noticed_and_the_file_named(run, tmp_path):
    whole = run[0] / "checkpoints" / "20"
    assert checkpoint.damage(checkpoint.epath.Path(whole)) is None
    for number, path in enumerate(files_in(whole)):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        damaged = copy / path.relative_to(whole)
        flip(damaged)
        assert checkpoint.damage(checkpoint.epath.Path(copy)) == str(path.relative_to(whole))
        damaged.unlink()
        assert checkpoint.damage(checkpoint.epath.Path(copy)) == str(path.relative_to(whole))
    assert number > 10


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, capsys, how):
    workdir, config = run
    report = (workdir / "report.json").read_text()
    victim = max(files_in(workdir / "checkpoints" / "20"), key=lambda path: path.stat().st_size)
    if how == "flip":
        flip(victim)
    elif how == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.unlink()
    sae_jax.train(config, str(workdir))
    said = capsys.readouterr().err
    assert "checkpoint 20 is damaged" in said
    assert str(victim) in said
    assert "going on from step 10" in said
    assert (workdir / "report.json").read_text() == report  # the same steps again, bit by bit
    assert (workdir / "damaged" / "20").is_dir()
    assert checkpoint.damage(checkpoint.epath.Path(workdir / "checkpoints" / "20")) is None


def test_on_a_disk_a_folder_is_a_checkpoint_by_its_name(tmp_path):
    for name in ("10", "9", "9.tmp", "removed.partial"):
        (tmp_path / "a:" / name).mkdir(parents=True)
    assert checkpoint.steps(checkpoint.epath.Path(tmp_path / "a:")) == [9, 10]
    assert checkpoint.steps(checkpoint.epath.Path(tmp_path / "b")) == []


def test_two_damaged_checkpoints_are_both_put_aside_in_place_of_older_ones(run, capsys):
    workdir, config = run
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    shutil.copytree(workdir / "checkpoints" / "20", workdir / "checkpoints" / "30")
    (workdir / "damaged" / "30").mkdir(parents=True)
    (workdir / "damaged" / "30" / "older").write_text("")
    for step in ("20", "30"):
        flip(max(files_in(workdir / "checkpoints" / step), key=lambda path: path.stat().st_size))
    checkpoint.Checkpoints(str(workdir), 3).close()
    said = capsys.readouterr().err.splitlines()
    assert "checkpoint 30 is damaged" in said[0]
    assert "checkpoint 20 is damaged" in said[1]
    assert all(line.endswith("going on from step 10") for line in said)
    assert checkpoint.steps(checkpoint.epath.Path(workdir / "checkpoints")) == [step for step in kept if step < 20]
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["20", "30"]
    assert not (workdir / "damaged" / "30" / "older").exists()


DELETED: list[str] | None = None  # what is being deleted, while it is a list


def _note_deletions(event, given):
    if DELETED is not None and event in ("os.remove", "os.rmdir", "shutil.rmtree"):
        DELETED.append(os.path.abspath(given[0]) if isinstance(given[0], str | os.PathLike) else "")


def test_an_old_checkpoint_is_out_of_sight_before_it_is_deleted(tiny, tmp_path, monkeypatch):
    sys.addaudithook(_note_deletions)  # there is no taking it off
    monkeypatch.setattr(sys.modules[__name__], "DELETED", [])
    tiny.checkpoint.keep = 1
    sae_jax.train(tiny, str(tmp_path))
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["40"]
    inside = {Path(path).relative_to(folder).parts[0] for path in DELETED if path.startswith(f"{folder}/")}
    assert checkpoint.REMOVED in inside
    assert not any(name.isdecimal() for name in inside), inside


def test_without_a_good_checkpoint_the_run_is_refused_and_never_begun_again(run):
    workdir, config = run
    for step in ("10", "20"):
        flip(max(files_in(workdir / "checkpoints" / step), key=lambda path: path.stat().st_size))
    before = {path: path.read_bytes() for path in files_in(workdir / "checkpoints")}
    with pytest.raises(Refused, match=r"an intact checkpoint.*checkpoint 20 is damaged.*checkpoint 10 is damaged"):
        sae_jax.train(config, str(workdir))
    assert before == {path: path.read_bytes() for path in files_in(workdir / "checkpoints")}
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(Refused, match="a report, but no checkpoints"):
        sae_jax.train(config, str(workdir))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\udcff", '{"seed": '])
def test_a_damaged_config_is_one_line(run, content):
    workdir, config = run
    (workdir / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(Refused, match=r"config.json.*damaged"):
        sae_jax.train(config, str(workdir))


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    workdir, _ = run
    largest = lambda step: max(files_in(workdir / "checkpoints" / step), key=lambda path: path.stat().st_size)  # noqa: E731
    newest, before = largest("20"), largest("10")
    assert checkpoint.saved(str(workdir)).step == 20
    flip(newest)
    assert checkpoint.saved(str(workdir)).step == 10
    flip(before)
    assert cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path}/o"]) == 2
    assert not (tmp_path / "o").exists()


def test_a_damaged_report_is_written_again(run):
    workdir, config = run
    report = (workdir / "report.json").read_text()
    flip(workdir / "report.json")
    sae_jax.train(config, str(workdir))
    assert (workdir / "report.json").read_text() == report


@pytest.fixture
def dataset(tmp_path, monkeypatch, capsys):
    """A small dataset whose manifest is the same bytes wherever it lies."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(1100, 2)).astype(np.float32))
    assert cli.main(["extract", "--from=x.npy", "--out=data", "--dtype=float16"]) == 0
    return Path(capsys.readouterr().out.strip())


def test_every_bit_of_a_manifest_is_noticed_and_the_file_named(dataset, tmp_path):
    whole, root = (dataset / stored.MANIFEST).read_bytes(), checkpoint.epath.Path(tmp_path / "copy")
    root.mkdir()
    copy = tmp_path / "copy" / stored.MANIFEST
    copy.write_bytes(whole)
    assert stored.read_manifest("--out", root)["n_tokens"] == 1100
    for bit in range(8 * len(whole)):
        flip(copy, bit)
        with pytest.raises(Refused, match=re.escape(str(copy))):
            stored.read_manifest("--out", root)
        copy.write_bytes(whole)


def test_a_damaged_manifest_is_one_line(dataset, capsys):
    manifest = dataset / stored.MANIFEST
    whole = manifest.read_bytes()
    places = [whole.index(b'"mean"') + 25, whole.index(b'"checksum"') + 3, len(whole) - 10, 0]  # the 18th decimal, say
    for place in places:
        flip(manifest, 8 * place)
        code = cli.main(["diagnose", f"--activations={dataset}", "--workdir=w", "--n_features=64", "--k=4"])
        error = capsys.readouterr().err.strip()
        assert (code, len(error.splitlines())) == (2, 1), error
        assert str(manifest) in error
        manifest.write_bytes(whole)


@pytest.mark.parametrize("sealed", ["by what it means", "not at all"])
def test_manifests_of_before_are_read_and_their_damage_is_noticed(dataset, sealed):
    path, root = dataset / stored.MANIFEST, checkpoint.epath.Path(dataset)
    known = stored.read_manifest("--out", root)
    meant = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**known, "checksum": meant} if sealed == "by what it means" else known))
    assert stored.read_manifest("--out", root) == known
    damaged = path.read_text().replace('"checksum"', '"checksun"').replace('"n_tokens": 1100', '"n_tokenz": 1100')
    path.write_text(damaged)
    with pytest.raises(Refused, match="another"):
        stored.read_manifest("--out", root)


# -- one at a time -----------------------------------------------------------------------------------------------------


HOLDS = """
    import sys, time
    from sae_jax.runtime import disk
    with disk.sole_user(sys.argv[1], "--workdir"):
        print("holding", flush=True)
        time.sleep(600)
"""


def test_a_workdir_in_use_is_refused_with_its_holder_and_a_killed_holder_lets_go(tmp_path, tiny):
    command = [sys.executable, "-c", textwrap.dedent(HOLDS), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout.readline() == b"holding\n"
        held = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(Refused, match=f"nobody works in: process {holder.pid} on {os.uname().nodename}"):
            sae_jax.train(tiny, str(tmp_path))
        assert held == {path: path.read_bytes() for path in tmp_path.iterdir()}
        holder.kill()
    tiny.train.steps = 0
    assert sae_jax.train(tiny, str(tmp_path))["step"] == 0


def test_object_stores_are_not_locked():
    with disk.sole_user("gs://bucket/run", "--workdir"), disk.sole_user("gs://bucket/run", "--workdir"):
        pass


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a file in the way", "a name too long"])
def test_a_workdir_that_cannot_be_made_is_refused(tmp_path, tiny, where):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "w" if where == "a file in the way" else tmp_path / ("w" * 300)
    with pytest.raises(Refused, match="--workdir"):
        sae_jax.train(tiny, str(workdir))


HELD = {"path": "x.npy", "shape": [5, 2], "dtype": "float32", disk.SAMPLED: "a"}


@pytest.mark.parametrize(("held", "now", "said"), [
    (HELD, HELD, None), (HELD, HELD | {"path": "elsewhere.npy"}, None), (HELD, HELD | {"shape": (5, 2)}, None),
    (HELD, HELD | {disk.SAMPLED: "b"}, "sampled_sha256 = 'a', not 'b'"),
    (HELD, HELD | {disk.SAMPLED: "b", "shape": [6, 2]}, "shape = [5, 2], not [6, 2]"),
    (HELD, {"path": "x.npy", "shape": [5, 2], disk.SAMPLED: "a"}, "dtype = 'float32', not None"),
    (HELD, HELD | {"more": 1}, "more = None, not 1"),
    ({key: value for key, value in HELD.items() if key != disk.SAMPLED}, HELD, None),  # a run of before
])  # fmt: skip
def test_a_run_goes_on_with_the_data_it_was_started_on(tmp_path, held, now, said):
    """The folder may be new, and in folders that are; which data they are is written down while it is in use."""
    workdir = str(tmp_path / "a" / "b")
    workdir_lib.check_data(workdir, now)
    for _ in range(2):
        with workdir_lib.claimed(workdir, {"seed": 1}, held):
            assert json.loads((tmp_path / "a/b/data.json").read_text()) == held | {"started_in": os.getcwd()}
    if said is None:
        workdir_lib.check_data(workdir, now)
        return
    with pytest.raises(Refused) as refused:
        workdir_lib.check_data(workdir, now)
    assert str(refused.value).endswith(f"a new folder: this one is of data with {said}")


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, tiny, monkeypatch):
    """The writer of the third checkpoint meets a full disk; the next start goes on from the second."""
    whole = sae_jax.train(tiny, str(tmp_path / "whole"))
    seal, sealed = checkpoint.Checkpoints._seal, []

    def full(self):
        sealed.append(self._saving)
        if len(sealed) == 3:
            raise OSError(28, "No space left on device")
        seal(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "_seal", full)
    with pytest.raises(RunFailed, match=r"step 20: .*No space left.*last good checkpoint is that of step 10"):
        sae_jax.train(tiny, str(tmp_path / "cut"))
    monkeypatch.undo()
    assert sae_jax.train(tiny, str(tmp_path / "cut")) == whole


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_blows_up_names_step_batch_and_member_and_keeps_a_good_checkpoint(tmp_path, tiny):
    tiny.members = ConfigDict({"calm": {}, "wild": {"train": {"learning_rate": 1e30}}})
    tiny.auxk.preset = "none"
    with pytest.raises(RunFailed, match=r"step \d+, batch \d+: .*not finite in wild: .*last good checkpoint is .* 0$"):
        sae_jax.train(tiny, str(tmp_path))
    kept = checkpoint.history(str(tmp_path))
    assert [entry["step"] for entry in kept] == [0]
    numbers = [value for values in kept[0]["members"].values() for value in values.values() if value is not None]
    assert all(np.isfinite(np.asarray(value)).all() for value in numbers)


@pytest.mark.parametrize("center", ["none", "mean"])
def test_float32_at_gamma_1000_trains_like_float64(tiny, rng, center):
    """The same start, the same 60 batches, a mean a thousand times the signal: metrics, counters, and the bias."""
    d, n_steps = 16, 60
    mean = rng.normal(size=d)
    mu = (1000 * np.sqrt(d) * mean / np.linalg.norm(mean)).astype(np.float32)
    batches = (rng.normal(size=(n_steps, 64, d)) + mu).astype(np.float32)
    tiny.train.steps, tiny.train.learning_rate = n_steps, 3e-3
    static, hyper = step_lib.Static.of(tiny), step_lib.hyper(tiny)
    start = step_lib.init_state(jax.random.key(0), static, hyper, jnp.asarray(mu if center == "mean" else 0 * mu))
    start = jax.tree.map(np.asarray, start)

    def trained(dtype):
        with jax.enable_x64(dtype == np.float64):
            floats = lambda a: jnp.asarray(a, dtype if a.dtype == np.float32 else a.dtype)  # noqa: E731
            state, step = jax.tree.map(floats, start), jax.jit(partial(step_lib.train_step, static=static))
            metrics = []
            for x in batches:
                state, found = step(state, jnp.asarray(x, dtype))
                metrics.append(jax.device_get(found))
            return jax.device_get(state), metrics

    (single, metrics32), (double, metrics64) = trained(np.float32), trained(np.float64)
    assert double.sae.W_enc.dtype == np.float64
    np.testing.assert_array_equal(single.tokens_since_fired, double.tokens_since_fired)
    for a, b in zip(metrics32, metrics64, strict=True):
        assert a["l0"] == pytest.approx(b["l0"], abs=0.05)
        # Without centring the reconstruction misses by a thousand deviations, and FVE is −10^6.
        assert float(a["fve"]) == pytest.approx(float(b["fve"]), rel=1e-3, abs=5e-3)
    assert np.linalg.norm(single.sae.b_dec - double.sae.b_dec) < 1e-3 * np.sqrt(d)
    assert (metrics64[-1]["fve"] > 0) == (center == "mean")


def test_moments_of_float32_rows_at_gamma_a_million_are_those_of_float64(rng):
    x = (rng.normal(size=(4000, 8)) + 1e6).astype(np.float32)
    found = moments_lib.severity([x]).raw
    np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, x.std(axis=0, dtype=float), rtol=1e-6)


def test_a_token_of_the_hub_is_written_nowhere(tmp_path, tiny, monkeypatch, capsys):
    token = "hf_" + "abcdefgh" * 4
    monkeypatch.setenv("HF_TOKEN", token)
    tiny.train.steps = 0
    sae_jax.train(tiny, str(tmp_path / "w"))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(600, 4)))
    assert cli.main(["extract", f"--from={tmp_path}/x.npy", f"--out={tmp_path}/data"]) == 0
    assert len(files_in(tmp_path)) > 20
    assert not [path for path in files_in(tmp_path) if token.encode() in path.read_bytes()]
    assert token not in "".join(capsys.readouterr())


# -- asked to stop -----------------------------------------------------------------------------------------------------


def test_sigterm_stops_an_extraction_after_a_batch_and_the_next_run_ends_alike(tmp_path, rng, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", rng.normal(size=(20_000, 8)).astype(np.float32))
    from sae_jax.activations import store

    monkeypatch.setattr(store, "SHARD_BYTES", 256 * 8 * 4 * 4)
    command = ["extract", f"--from={tmp_path}/x.npy"]
    assert cli.main([*command, f"--out={tmp_path}/whole"]) == 0
    add, calls = store.Writer.add, []

    def asked(self, start, rows):
        calls.append(start)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        add(self, start, rows)

    monkeypatch.setattr(store.Writer, "add", asked)
    assert cli.main([*command, f"--out={tmp_path}/cut"]) == 143
    assert len(calls) == 3
    assert "run again" in capsys.readouterr().err
    assert cli.main([*command, f"--out={tmp_path}/cut"]) == 0
    relative = lambda name: {p.relative_to(tmp_path / name): p.read_bytes() for p in files_in(tmp_path / name)}  # noqa: E731
    whole, cut = relative("whole"), relative("cut")
    assert whole.keys() == cut.keys()
    assert {p for p in whole if whole[p] != cut[p]} <= {p for p in whole if p.name == "dataset_info.json"}


def test_a_bar_of_progress_starts_no_devices():
    """A model in torch may want them for itself."""
    source = """
        from jax._src import xla_bridge
        from sae_jax.runtime.progress import Progress
        with Progress(3, 0, "steps", "training") as bar:
            bar.update(3)
        print(xla_bridge.backends_are_initialized())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


ENDS = """
    import signal, sys
    import sae_jax.__main__, sae_jax.cli, sae_jax.runtime.checkpoint, sae_jax.training.run
    import sae_jax.exchange.sharing, sae_jax.sweeps.jobs
    from jax._src import xla_bridge
    print(xla_bridge.backends_are_initialized(), flush=True)
    sae_jax.cli.VERBS["diagnose"] = lambda argv: signal.raise_signal(signal.SIGTERM)
    sys.argv[1:] = ["diagnose"]
    sae_jax.__main__.run()
"""


def test_importing_starts_no_devices_and_sigterm_ends_every_verb_with_143():
    """With devices started it would be too late for jax.distributed.initialize."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(ENDS)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (143, "False\n"), done.stderr
    assert done.stderr == "sae_jax: stopped on request; run again to go on\n"


ENDS_BY_ANOTHER_THREAD = """
    import os, signal, threading, time
    from sae_jax.runtime import stopping
    write = os.write
    os.write = lambda *line: (time.sleep(0.5), write(*line))
    threading.Thread(target=stopping.end, args=(signal.SIGTERM,), daemon=True).start()
    while not stopping._begun:
        time.sleep(0.01)
    stopping.end(signal.SIGTERM)
    print("went on")
"""


def test_the_work_does_not_go_on_while_another_thread_ends_it():
    """Else a command that was asked to stop could come to its end first, and say 0."""
    code = textwrap.dedent(ENDS_BY_ANOTHER_THREAD)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "sae_jax: stopped on request; run again to go on\n"


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
