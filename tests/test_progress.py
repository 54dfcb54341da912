"""How far a run is, told where there is no terminal; its curves on boards; which settings a run may go on with."""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from sae_jax import checks, cli
from sae_jax import config as config_lib
from sae_jax.errors import Refused
from sae_jax.reports import boards, tables
from sae_jax.runtime import progress
from sae_jax.training import step as step_lib
from sae_jax.training import watching

ROOT = Path(__file__).parents[1]
SINGLE, DEFAULT = (f"--config={ROOT}/configs/{name}.py" for name in ("single", "default"))
LINE = re.compile(
    r"training: (\d+) of (\d+) steps \(\d+ %\), [\d.]+[kM]? steps/s, \d+:\d\d:\d\d left; [\d.]+[kM]? tokens/s; "
    r"baseline loss [-\d.e+]+, FVE -?[\d.]+, dead (–|[\d.]+ %); centred loss .*, dead (–|[\d.]+ %)"
)
SMALL = (
    "--config.sae.n_features=32", "--config.sae.k=2", "--config.train.batch_size=32", "--config.eval.n_tokens=100",
    "--config.eval.batch_size=50", "--config.train.devices=1",
)  # fmt: skip


@pytest.fixture
def tokens(tmp_path, rng, monkeypatch):
    """x.npy in the folder that the test works in."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", (rng.normal(size=(2000, 8)) + 2).astype(np.float32))


def command(*flags, environment=None):
    """`python -m sae_jax` with warnings as errors, as a process without a terminal."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:the load_module:DeprecationWarning", "-m", "sae_jax", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tokens")
def test_without_a_terminal_lines_say_how_far_a_training_is():
    flags = ("--config.train.steps=200", "--config.report.every_seconds=0.05", "--config.auxk.dead_after_tokens=1600")
    done = command("train", DEFAULT, "--config.data.path=x.npy", "--workdir=w", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), done.stderr
    steps = [int(match[1]) for match in found]
    assert steps == sorted(set(steps))
    assert {int(match[2]) for match in found} == {200}
    for step, match in zip(steps, found, strict=True):  # nothing can be dead before it was silent for 50 steps
        assert (match[3] == "–") == (step < 50)
    assert done.stdout.startswith("n = 32")  # what programs read is as it was


@pytest.mark.usefixtures("tokens")
def test_lines_can_be_switched_off_when_a_run_goes_on(capsys):
    flags = ["train", DEFAULT, "--config.data.path=x.npy", "--workdir=w", *SMALL, "--config.train.steps=2"]
    assert cli.main([*flags, "--config.report.every_seconds=3"]) == 0
    assert cli.main([*flags, "--config.report.every_seconds=0", "--config.data.model.cache=elsewhere"]) == 0
    assert capsys.readouterr().err == ""


def test_a_count_speaks_every_so_many_seconds_and_with_the_rate_since_it_last_did(monkeypatch):
    now, said = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with contextlib.redirect_stderr(said), progress.Progress(100, 10, "steps", "training", every=10) as shown:
        for count, seconds in ((10, 0), (10, 1), (20, 1), (10, 9), (10, 1), (30, 10)):
            now[0] += seconds
            shown.update(count, lambda rate: f"{rate:.1f}")
    assert said.getvalue().splitlines() == [
        "training: 50 of 100 steps (50 %), 15 steps/s, 0:00:03 left; 15.0",
        "training: 70 of 100 steps (70 %), 2 steps/s, 0:00:07 left; 2.0",
        "training: 100 of 100 steps (100 %), 3 steps/s, 0:00:00 left; 3.0",
    ]


def test_batches_are_counted_where_nobody_knows_how_many_there_are(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(progress, "FIRST", 0.0)
    with contextlib.redirect_stderr(said):
        batches = progress.counted(iter(range(3)), "moments")
        seen = [next(batches), next(batches)]
        time.sleep(0.01)
        seen += list(batches)
    assert seen == [0, 1, 2]
    assert re.fullmatch(r"moments: [23] batches, [\d.]+k? batches/s\n", said.getvalue())


@pytest.mark.parametrize(("value", "said"), [
    (0, "0"), (0.25149, "0.251"), (1, "1"), (17.34, "17.3"), (999.4, "999"), (1000, "1k"), (1236, "1.24k"),
    (999_400, "999k"), (1e6, "1M"), (3.049e6, "3.05M"), (2.5e9, "2.5e+03M"), (-1500, "-1.5k"),
])  # fmt: skip
def test_a_rate_has_three_digits(value, said):
    assert progress.short(value) == said


def test_what_is_done_beyond_the_end_leaves_nothing_and_what_stands_still_no_time(monkeypatch):
    now, said = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with contextlib.redirect_stderr(said), progress.Progress(10, 0, "steps", "training", every=1) as shown:
        for count in (5, 0, 10):
            now[0] += 2
            shown.update(count)
    assert said.getvalue().splitlines() == [
        "training: 5 of 10 steps (50 %), 0 steps/s", "training: 15 of 10 steps (150 %), 5 steps/s, 0:00:00 left",
    ]  # fmt: skip


def test_what_takes_longer_than_a_second_each_has_a_time_left(monkeypatch):
    now, said = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with contextlib.redirect_stderr(said), progress.Progress(10, 0, "steps", "training", every=1) as shown:
        for _ in range(2):
            now[0] += 4
            shown.update(1)
    assert said.getvalue() == "training: 2 of 10 steps (20 %), 0.25 steps/s, 0:00:32 left\n"


@pytest.mark.parametrize(("initialized", "number", "speaks"), [
    (False, 0, True), (True, 0, True), (True, 1, False), (False, 1, True),
])  # fmt: skip
@pytest.mark.parametrize("terminal", [True, False])
def test_of_several_processes_the_first_one_speaks(monkeypatch, initialized, number, speaks, terminal):
    """One that is no part of a run is never asked for its number: devices would start."""
    monkeypatch.setattr(progress.jax.distributed, "is_initialized", lambda: initialized)
    monkeypatch.setattr(progress.jax, "process_index", lambda: number)
    monkeypatch.setattr(progress, "FIRST", 0.0)
    said = io.StringIO()
    said.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", said)
    clock = itertools.count(1.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.Progress(10, 0, "steps", "training") as shown:
        for _ in range(3):
            shown.update(1)
    assert bool(said.getvalue()) == speaks


def test_a_terminal_gets_a_bar_with_the_same_values(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    with progress.Progress(10, 0, "steps", "training") as shown:
        shown.update(10, lambda rate: "baseline loss 3.2")
    assert "training: 100%" in said.getvalue()
    assert "baseline loss 3.2" in said.getvalue()


def test_many_members_are_shown_as_ranges():
    members = {f"m{i}": {"loss": 1.0 + i, "fve": 0.1 * i, "dead": None} for i in range(5)}
    assert tables.standing(members) == "5 members, loss 1 to 5, FVE 0.000 to 0.400, dead –"
    members["m1"]["dead"], members["m2"]["dead"] = 0.25, 0.5
    assert tables.standing(members).endswith("dead 25.0 % to 50.0 %")
    one = {"sae": {"loss": 12.345, "fve": 0.5, "dead": 0.125}}
    assert tables.standing(one) == "sae loss 12.35, FVE 0.500, dead 12.5 %"


# -- Weights & Biases --------------------------------------------------------------------------------------------------


def parts_of(log, block=2**15, header=7):
    """Records of a log in blocks, of LevelDB's kind: checksum (4 bytes), length (2), whole or first, middle, last."""
    at, part = header, b""
    while at + header <= len(log):
        if block - at % block < header:
            at += block - at % block
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        part += log[at + header : at + header + size]
        at += header + size
        if kind in (1, 4):
            yield part
            part = b""


def records(folder):
    """Of the runs that are kept under a workdir: metrics logged, summary, settings, as Weights & Biases keeps them."""
    from wandb.proto import wandb_internal_pb2 as proto

    ids, logged, summary, settings, raw = set(), [], {}, {}, b""
    for path in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
        raw += path.read_bytes()
        for data in parts_of(path.read_bytes()):
            record = proto.Record()
            record.ParseFromString(data)
            as_json = lambda items: {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}  # noqa: E731
            if record.WhichOneof("record_type") == "history":
                logged.append(as_json(record.history.item))
            elif record.WhichOneof("record_type") == "summary":
                summary |= as_json(record.summary.update)
            elif record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                settings |= as_json(record.run.config.update)
    return ids, logged, summary, settings, raw


@pytest.mark.usefixtures("tokens")
def test_weights_and_biases_gets_the_curves_the_settings_and_the_report_and_goes_on(tmp_path):
    pytest.importorskip("wandb")
    path = f"--config.data.path={tmp_path}/x.npy"
    flags = ("train", DEFAULT, path, "--workdir=w", *SMALL, "--config.train.steps=6", "--config.report.wandb=dead",
             "--config.report.every_seconds=3600")  # fmt: skip
    for _ in range(2):  # the second goes on with what has ended: it reports again
        done = command(*flags, environment={"WANDB_MODE": "offline"})
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    report = json.loads(Path("w/report.json").read_text())
    ids, logged, summary, settings, raw = records("w")
    assert ids == {json.loads(Path("w/wandb.json").read_text())["dead"]}
    losses = {row["step"]: row["centred/loss"] for row in logged if "centred/loss" in row}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    last = [row for row in logged if row.get("centred/held_out/fve") is not None][-1]
    assert last["centred/held_out/fve"] == report["members"][1]["final"]["fve"]
    assert summary["baseline/final/dead_total"] == report["members"][0]["final"]["dead_total"]
    assert summary["gamma_raw"] == report["gamma_raw"]
    assert settings["sae.k"] == 2
    assert settings["data.path"] == "x.npy"
    for private in (str(tmp_path), str(ROOT), os.uname().nodename + "."):
        assert private.encode() not in raw


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(("environment", "said"), [
    ({"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": "."}, "report.wandb = 'dead': somebody logged in"),
    ({"PYTHONPATH": f"no_wandb:{ROOT}"}, 'pip install "sae-jax[wandb]"'),
])  # fmt: skip
def test_weights_and_biases_that_cannot_be_had_is_refused_before_anything_is_written(environment, said):
    pytest.importorskip("wandb")
    Path("no_wandb").mkdir()
    Path("no_wandb/wandb.py").write_text("raise ImportError")
    flags = ("--config.data.path=x.npy", "--workdir=w", "--config.report.wandb=dead")
    done = command("train", SINGLE, *flags, *SMALL, environment=environment)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not Path("w").exists()


def test_weights_and_biases_that_fails_is_named_once_and_the_training_goes_on(tiny, tmp_path, capsys, monkeypatch):
    class Failing:
        """A package whose service is gone after the beginning."""

        def __init__(self, **_): ...

        Settings = dict

        def init(self, **_):
            return self

        def define_metric(self, *_, **__): ...

        def log(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(boards, "check", lambda config: None)
    monkeypatch.setattr(boards.optional, "module", lambda *_: Failing())
    tiny.report.wandb = "dead"
    report = sae_jax.train(tiny, str(tmp_path / "w"))
    assert report["step"] == 40
    said = capsys.readouterr().err.splitlines()
    assert said == ["sae_jax: Weights & Biases: [Errno 28] No space left on device; going on without it"]


@pytest.mark.parametrize("name", ["a/b", "x" * 129, "a:b"])
def test_names_that_no_project_can_have_are_refused(tiny, name):
    tiny.report.wandb = name
    with pytest.raises(Refused, match=r"report.wandb"):
        config_lib.check(tiny)


def test_what_is_shown_to_others_names_no_folder(tmp_path):
    config = config_lib.base({"data.path": "/a/x.npy", "data.model.text": "hf:o/d", "data.model.dna": "a/b.fasta"})
    config.data.model.id = str(tmp_path)
    shown = boards.without_folders(config)
    found = [shown[f"data.{key}"] for key in ("path", "model.text", "model.dna", "model.id")]
    assert found == ["x.npy", "hf:o/d", "b.fasta", tmp_path.name]
    assert "data.model.cache" not in shown


# -- members on the command line ---------------------------------------------------------------------------------------


def settings_of(monkeypatch, *flags):
    """The configuration that `train` gets."""
    seen = []
    monkeypatch.setattr("sae_jax.training.run.train", lambda config, _: seen.append(config))
    monkeypatch.setattr("sae_jax.reports.tables.table", lambda _: "")
    assert cli.main(["train", *flags, "--workdir=w", "--config.data.path=x.npy"]) == 0
    config_lib.check(seen[0])
    return seen[0]


def test_a_member_takes_any_setting_that_members_may_have(monkeypatch):
    flags = ("whiten=True", "center=mean", "n_features=128")
    config = settings_of(
        monkeypatch, DEFAULT, *(f"--config.members.centred.sae.{flag}" for flag in flags),
        "--config.members.baseline.seed=7", "--config.members.centred.train.learning_rate=1e-2", "--config.sae.k=3",
    )  # fmt: skip
    found = config_lib.members(config)
    assert list(found) == ["baseline", "centred"]
    centred, baseline = found["centred"], found["baseline"]
    assert (centred.sae.whiten, centred.sae.center, centred.sae.n_features) == (True, "mean", 128)
    assert (centred.train.learning_rate, centred.seed, centred.sae.k) == (1e-2, 0, 3)
    assert (baseline.seed, baseline.sae.whiten, baseline.sae.n_features, baseline.sae.k) == (7, False, 8192, 3)


def test_members_are_made_where_a_configuration_names_none(monkeypatch):
    config = settings_of(monkeypatch, SINGLE, "--config.members.a.sae.k=3", "--config.members.b.sae.whiten=True")
    assert config.members.to_dict() == {"a": {"sae": {"k": 3}}, "b": {"sae": {"whiten": True}}}
    assert list(config_lib.members(settings_of(monkeypatch, SINGLE))) == ["sae"]


@pytest.mark.parametrize(("config", "flag", "said"), [
    (DEFAULT, "members.centered.sae.whiten=True", "members.centered.sae.whiten"),  # a slip, not a third member
    (DEFAULT, "members.centred.sae.white=True", "members.centred.sae.white = 'True': there is no such setting"),
    (DEFAULT, "members.centred.sae.k=many", "members.centred.sae.k = 'many': a value of type int"),
    (DEFAULT, "members.centred.train.steps=3", "members.centred.train.steps = 3"),
    (SINGLE, "members..sae.k=3", "members"),
    (SINGLE, "members.a.k=3", "members.a.k"),
])  # fmt: skip
@pytest.mark.usefixtures("tokens")
def test_wrong_settings_of_members_are_one_line(capsys, config, flag, said):
    assert cli.main(["train", config, "--workdir=w", "--config.data.path=x.npy", f"--config.{flag}"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("w").exists()


@pytest.mark.parametrize("name", [0, ""])
def test_names_of_members_that_cannot_stand_in_a_key_are_refused(tiny, tmp_path, name):
    tiny.members = ConfigDict({name: {"sae": {"k": 3}}, "b": {"seed": 1}} if name == "" else {name: {"sae": {"k": 3}}})
    with pytest.raises(Refused, match=r"members = .*: names"):
        sae_jax.train(tiny, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    with pytest.raises(Refused, match="without dots"):
        checks.member_name("a.b")


# -- the same run ------------------------------------------------------------------------------------------------------


def test_a_file_named_in_another_way_is_the_same_run_and_another_file_is_not(tiny, tmp_path, rng, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x.npy", rng.normal(size=(1000, 16)).astype(np.float32))
    tiny.train.steps, tiny.data.signal, tiny.data.path, workdir = 0, "", "x.npy", str(tmp_path / "w")
    monkeypatch.chdir(tmp_path / "here")
    sae_jax.train(tiny, workdir)
    os.symlink(tmp_path / "here/x.npy", tmp_path / "there/link.npy")
    for cwd, path in (
        ("here", str(tmp_path / "here/x.npy")), ("there", "../here/x.npy"), (".", "here/x.npy"), ("there", "link.npy"),
        ("here", "./x.npy"),
    ):  # fmt: skip
        monkeypatch.chdir(tmp_path / cwd)
        tiny.data.path = path
        sae_jax.train(tiny, workdir)
    tiny.data.path = "../there/x.npy"
    with pytest.raises(Refused, match=r"data.path = './x.npy', not '../there/x.npy'"):
        sae_jax.train(tiny, workdir)
    exported = json.loads((tmp_path / "w/report.json").read_text())
    assert str(tmp_path) not in json.dumps(exported)


def test_a_key_that_a_run_did_not_have_counts_as_its_default(tiny, tmp_path):
    held = config_lib.identity(tiny)
    del held["data.norm"]
    assert config_lib.changed(tiny, held, "") is None
    tiny.data.norm = "unit"
    assert config_lib.changed(tiny, held, "") == ("data.norm", "none", "unit")
    assert config_lib.changed(tiny, {**held, "gone": 1, "data.norm": "unit"}, "") == ("gone", 1, None)
    assert config_lib.changed(tiny, {**held, "data.norm": "unit", "data.model.cache": "x"}, "") is None


@pytest.mark.parametrize(("then", "now"), [
    ({"b": {"seed": 5}}, {"a": {}, "b": {"seed": 5}}), ({"a": {}, "b": {"seed": 5}}, {"b": {"seed": 5}}),
    ({}, {"a": {}}), ({"a": {}}, {}), ({"a": {}}, {"b": {}}),
])  # fmt: skip
def test_members_that_set_nothing_are_members_of_a_run(tiny, then, now):
    tiny.members = ConfigDict(then)
    held = json.loads(json.dumps(config_lib.identity(tiny)))
    assert list(config_lib.from_identity(held).members) == list(then)
    assert config_lib.changed(tiny, held, "") is None
    tiny.members = ConfigDict(now)
    assert config_lib.changed(tiny, held, "") == ("members", list(then), list(now))
    del held["members"]  # as runs of before have it
    assert config_lib.changed(tiny, held, "") is None


class Recorded(list):
    """A board that remembers."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def scalars(self, step, values):
        self.append((step, values))


@pytest.mark.parametrize(("steps", "shown"), [(40, [4, 5, 6, 7]), (999, [4, 5, 6, 7]), (2500, [5, 7]), (4000, [5])])
def test_boards_get_about_a_thousand_of_the_steps_each_with_its_own_numbers(tiny, tmp_path, monkeypatch, steps, shown):
    board, lines = Recorded(), []
    monkeypatch.setattr(boards, "opened", lambda *_: [board])
    tiny.train.steps, tiny.auxk.dead_after_tokens = steps, 7 * 32
    groups = step_lib.group_members(config_lib.members(tiny), 16)
    loss = np.array([[3, 30], [4, 40], [5, 50], [6, 60], [0, 0]]) / 4  # of steps 4 to 7, and what nobody looks at
    metrics = [{"loss": loss, "dead": np.full((5, 2), 0.25), "fve": np.zeros((5, 2))}]
    with watching.Watch(tiny, str(tmp_path), groups, 3) as watch:
        monkeypatch.setattr(watch._shown, "update", lambda count, text: lines.append((count, text(2.0))))
        watch.steps(3, 4, metrics)
        watch.steps(3, 3, metrics)
    assert [step for step, _ in board][: len(shown)] == shown
    for step, values in board[: len(shown)]:
        assert [values[name]["loss"] for name in ("baseline", "centred")] == [(step - 1) / 4, 10 * (step - 1) / 4]
    (count, whole), (_, shorter) = lines
    assert count == 4
    assert whole.startswith("64 tokens/s; ")
    assert "loss 1.5" in whole
    assert "dead 25.0 %" in whole  # 7 · 32 tokens: what was silent all along is dead
    assert "loss 1.25" in shorter
    assert "dead –" in shorter
    assert "25.0 %" not in shorter


@pytest.mark.two_devices
def test_all_the_tokens_that_there_are_may_be_one_batch(tiny, tmp_path, rng):
    """What is refused then is what is looked at next."""
    np.save(tmp_path / "x.npy", rng.normal(size=(50, 16)).astype(np.float32))
    tiny.data.signal, tiny.data.path, tiny.train.batch_size = "", str(tmp_path / "x.npy"), 40
    tiny.train.devices, tiny.train.mesh, tiny.members = 2, "member=2", ConfigDict()
    with pytest.raises(Refused, match="train.mesh = 'member=2'"):
        sae_jax.train(tiny, str(tmp_path / "w"))


def test_a_batch_that_is_larger_than_the_data_is_refused_with_the_numbers(tiny, tmp_path, rng):
    np.save(tmp_path / "x.npy", rng.normal(size=(50, 16)).astype(np.float32))
    tiny.data.signal, tiny.data.path, tiny.train.batch_size = "", str(tmp_path / "x.npy"), 64
    with pytest.raises(Refused, match=r"train.batch_size = 64: up to 40, the tokens there are to train on"):
        sae_jax.train(tiny, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_every_key_has_its_comment():
    """Beside it; keys of one kind may share one above them."""
    text = (ROOT / "sae_jax/config.py").read_text()
    body = text[text.index("def base(") : text.index("for key, value in (overrides")]
    lines = [line.strip() for line in body.splitlines()]
    keys = [line for line in lines if re.match(r"\w+(\.\w+)+ = (?!.*ConfigDict\(\)$)", line)]
    assert len(keys) == len(config_lib.flatten(config_lib.base())) + 1  # members are empty
    assert [line for line in keys if "  # " not in line] == []
