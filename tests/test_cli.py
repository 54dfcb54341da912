"""Wrong input: one line on stderr with the field, the value and what is allowed; exit code 2; nothing written."""

import sys
from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax import cli

ROOT = Path(__file__).parents[1]
SYNTHETIC = f"--config={ROOT}/configs/synthetic.py"


def run(capsys, tmp_path, *flags, config=SYNTHETIC):
    code = cli.main(["train", config, f"--workdir={tmp_path}/w", *flags])
    return code, capsys.readouterr()


@pytest.mark.parametrize(("flag", "said"), [
    ("--config.sae.k=2000", "sae.k = 2000: 1 to sae.n_features = 1024"),
    ("--config.sae.k=0", "sae.k = 0: 1 to"),
    ("--config.sae.n_features=0", "sae.n_features = 0"),
    ("--config.data.gamma=-1", "data.gamma = -1.0: a finite number ≥ 0"),
    ("--config.data.gamma=nan", "data.gamma = nan: a finite number ≥ 0"),
    ("--config.data.gamma=inf", "data.gamma = inf"),
    ("--config.data.signal=poisson", "data.signal = 'poisson': one of '', sparse, gaussian"),
    ("--config.data.mean_direction=up", "one, few, spread"),
    ("--config.data.rank=65", "data.rank = 65: 0 (all) to d_model = 64"),
    ("--config.data.tail_df=1.5", "data.tail_df = 1.5"),
    ("--config.data.n_active=300", "data.n_active = 300: at most"),
    ("--config.train.steps=-1", "train.steps = -1: an integer ≥ 0"),
    ("--config.train.batch_size=0", "train.batch_size = 0"),
    ("--config.train.batch_size=33", "train.batch_size = 33: a multiple of 2, the devices that share it"),
    ("--config.train.devices=9", "train.devices = 9: 0 (all) to 2"),
    ("--config.train.learning_rate=0", "train.learning_rate = 0.0: a finite number > 0"),
    ("--config.train.beta1=1", "train.beta1 = 1.0"),
    ("--config.train.decay_fraction=2", "train.decay_fraction = 2.0"),
    ("--config.auxk.preset=apple", "auxk.preset = 'apple': one of none, openai"),
    ("--config.auxk.weight=-3", "auxk.weight = -3.0"),
    ("--config.sae.center=median", "sae.center = 'median': one of none, mean, geometric_median"),
    ("--config.members.centred.sae.center=median", "sae.center = 'median'"),
    ("--config.sae.width=3", "sae.width"),
    ("--config.sae.k=many", "sae.k"),
    ("--config.sae.k=2.5", "sae.k"),
    ("--config.train.steps=1e3", "train.steps"),
    ("--config.data.path=nowhere.npy", "data.path = 'nowhere.npy': an existing path"),
    ("--config.eval.n_tokens=0", "eval.n_tokens = 0"),
    ("--nonsense=1", "nonsense"),
    ("stray", "stray"),
])  # fmt: skip
def test_one_line_exit_2_nothing_written(capsys, tmp_path, flag, said):
    code, streams = run(capsys, tmp_path, flag)
    assert code == 2
    assert streams.out == ""
    assert len(streams.err.strip().splitlines()) == 1
    assert said in streams.err
    assert "Traceback" not in streams.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argv", "said"), [
    ([], "usage"),
    (["fly"], "verb = 'fly': one of train"),
    (["train"], "--workdir"),
    (["train", "--workdir=w"], "--config"),
    (["train", SYNTHETIC], "--workdir"),
    (["train", "--config=none.py", "--workdir=w"], "none.py"),
    (["train", f"--config={ROOT}/setup.cfg", "--workdir=w"], "setup.cfg"),
])  # fmt: skip
def test_flags_that_are_missing_or_wrong(capsys, argv, said):
    assert cli.main(argv) == 2
    streams = capsys.readouterr()
    assert said in streams.err + streams.out
    assert "Traceback" not in streams.err


def test_a_wrong_override_is_named_when_the_file_is_given_as_a_word_of_its_own(capsys, tmp_path):
    flags = ["train", "--config", SYNTHETIC.removeprefix("--config="), "--workdir", f"{tmp_path}/w"]
    assert cli.main([*flags, "--config.train.steps=10", "--config.sae.k=0"]) == 2
    assert "sae.k = 0: 1 to sae.n_features" in capsys.readouterr().err


def test_unknown_override_of_a_member_is_refused(capsys, tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        "from ml_collections import ConfigDict\nfrom sae_jax.config import base\n"
        "def get_config():\n  c = base(); c.data.signal = 'sparse'\n"
        "  c.members = ConfigDict({'a': {'sae': {'colour': 1}}}); return c\n"
    )
    code, streams = run(capsys, tmp_path, config=f"--config={config}")
    assert code == 2
    assert "members.a.sae.colour = 1" in streams.err


def test_nothing_to_train_on_names_the_choices(capsys, tmp_path):
    code, streams = run(capsys, tmp_path, config=f"--config={ROOT}/configs/default.py")
    assert code == 2
    assert "set data.path" in streams.err


def test_a_missing_dependency_names_its_extra(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, streams = run(
        capsys, tmp_path, f"--config.data.model.cache={tmp_path}/cache", config=f"--config={ROOT}/configs/quickstart.py"
    )
    assert code == 2
    assert "sae-jax[demo]" in streams.err
    assert not (tmp_path / "w").exists()


def test_a_width_that_is_not_two_dimensional_is_refused(capsys, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(7))
    code, streams = run(capsys, tmp_path, f"--config.data.path={tmp_path}/x.npy")
    assert code == 2
    assert "tokens, d_model" in streams.err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("x", "said"), [
    (np.where(np.arange(16_000).reshape(2000, 8) == 12_005, np.nan, 1.0), "row 1500, dimension 5 is nan"),
    (np.ones((2000, 8)), "all rows are the same"),
])  # fmt: skip
def test_activations_that_cannot_be_trained_on_are_refused_at_the_start(capsys, tmp_path, x, said):
    np.save(tmp_path / "x.npy", x)
    code, streams = run(capsys, tmp_path, f"--config.data.path={tmp_path}/x.npy")
    assert code == 2
    assert len(streams.err.strip().splitlines()) == 1
    assert said in streams.err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("n", [2 * 10**8, 2 * 10**9])
def test_what_memory_cannot_hold_is_refused_with_what_would_fit(capsys, tmp_path, n):
    code, streams = run(capsys, tmp_path, f"--config.sae.n_features={n}", "--config.data.d_model=4096")
    assert code == 2
    assert len(streams.err.strip().splitlines()) == 1
    assert f"sae.n_features = {n}: at most about " in streams.err
    assert not (tmp_path / "w").exists()


def test_a_verb_has_help(capsys):
    assert cli.main(["train", "--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_a_run_keeps_its_folder_and_its_damaged_settings_are_named(capsys, tiny, tmp_path, rng):
    run, tokens = tmp_path / "run", tmp_path / "x.npy"
    tiny.train.steps = 0
    sae_jax.train(tiny, str(run))
    np.save(tokens, rng.normal(size=(500, tiny.data.d_model)).astype(np.float32))
    before = (run / "report.json").read_bytes()
    assert cli.main(["diagnose", f"--activations={tokens}", f"--workdir={run}", "--n_features=64", "--k=4"]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert (run / "report.json").read_bytes() == before
    (run / "config.json").write_text('{"a":')
    assert cli.main(["export", f"--workdir={run}", f"--out={tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert "config.json" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
