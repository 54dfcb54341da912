"""Wrong input: one line on stderr with the field, the value and what is allowed; exit code 2; nothing written."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax import cli, flags

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
    ("--config.data.path=nowhere.npy", "data.path = 'nowhere.npy': nothing is there"),
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


DIAGNOSE = ["diagnose", "--activations={in}/x.npy", "--workdir={in}/w"]
TRAIN = ["train", SYNTHETIC, "--workdir={in}/w"]
SWEEP = ["sweep", f"--config={ROOT}/configs/sweep.py", "--workdir={in}/w"]
EXTRACT = ["extract", "--from={in}/x.npy", "--out={in}/w"]


@pytest.mark.parametrize(("argv", "said"), [
    (["trian"], "(the nearest is train)"),
    (["train", "--config={in}/nope.py", "--workdir={in}/w"], "--config = '{in}/nope.py': an existing file"),
    (["train", "--config={in}/raises.py", "--workdir={in}/w"], "runs; KeyError: 'x' ({in}/raises.py, line 3)"),
    (["train", "--config={in}/syntax.py", "--workdir={in}/w"], "({in}/syntax.py, line 2)"),
    (["train", "--config={in}/empty.py", "--workdir={in}/w"], "a file with get_config()"),
    (["train", "--config={in}/number.py", "--workdir={in}/w"], "returns a ConfigDict, not int"),
    ([*TRAIN, "--layers=1"], "--layers = '1': leave it out: a flag of extract, not of train"),
    ([*TRAIN, "--member=x"], "a flag of diagnose and export, not of train"),
    ([*DIAGNOSE[:2], "--k=4", "--workdir={in}/" + 300 * "a"], "a folder that can be written (File name too long)"),
    ([*DIAGNOSE, "--n_probe=3"], "--n_probe = '3': diagnose has no such flag; the nearest is --n_probes"),
    ([*DIAGNOSE, "--k=many"], "--k = 'many': an integer"),
    ([*DIAGNOSE, "--k", "many"], "--k = 'many': an integer"),
    ([*DIAGNOSE, "--k"], "--k = '': a value, as --k=VALUE"),
    ([*DIAGNOSE, "--k=0"], "--k = 0: 1 to n_features"),
    ([*DIAGNOSE, "--activations={in}/y.npy"], "--activations = '{in}/y.npy': nothing is there"),
    ([*DIAGNOSE, SYNTHETIC], "--activations and --config"),
    ([*DIAGNOSE, "--config.sae.k=3"], "--config.sae.k = '3': --config=FILE beside it"),
    ([*DIAGNOSE, "--sae={in}/s", "--measure"], "--measure = True: leave it out"),
    ([*DIAGNOSE, "--sae={in}/s", "--k=3"], "--k = 3: leave it out: the SAE has its own"),
    ([*DIAGNOSE, "--member=a"], "--member = 'a': --sae=RUN beside it"),
    ([*TRAIN, "--config.sae.k", "many"], "sae.k = 'many': a value of type int"),
    ([*TRAIN, "--config.sae.k", "2000"], "sae.k = 2000: 1 to"),
    ([*TRAIN, "--config.sae.k", "--config.seed=1"], "--config.sae.k = '': a value, as --config.sae.k=VALUE"),
    ([*EXTRACT, "--layers=1"], "--layers = ['1']: leave it out: a file has one layer"),
    ([*EXTRACT, "--from={in}/number.py"], "--from = "),
    ([*EXTRACT, SYNTHETIC], "--from and --config"),
    ([*EXTRACT, "--dtype=int8"], "--dtype = 'int8': one of float32"),
    (["export", "--workdir={in}/s", "--out={in}/w"], "--workdir = '{in}/s': a folder with one of"),
    (["export", "--from={in}/s", "--out={in}/w"], "--from = '{in}/s': a folder with one of"),
    (["export", "--from={in}/s", "--out={in}/w", "--member=a"], "--member = 'a': leave it out: {in}/s is no run"),
    (["export", "--workdir={in}/nope", "--out={in}/w", "--member=a"], "--workdir = '{in}/nope': a folder or file"),
    (["export", "--from={in}/s", "--workdir={in}/s", "--out={in}/w"], "--workdir and --from"),
    (["export", "--from={in}/s", "--out={in}/w", SYNTHETIC], "leave it out: a flag of train"),
    ([*SWEEP, "--cpus=2"], "--cpus = 2.0: leave it out, or give --launcher=ray beside it"),
    ([*SWEEP, "--gpus=many"], "--gpus = 'many': a number"),
    ([*SWEEP, "--merge", "--shard=0/2"], "--shard = '0/2': leave it out with --merge"),
    ([*SWEEP, "--merge"], "--workdir = '{in}/w': the folder of a sweep that has begun"),
    ([*EXTRACT[:2], "--out={in}/x.npy"], "--out = '{in}/x.npy': a folder to write to; this is a file"),
    ([*TRAIN[:2], "--workdir={in}/x.npy"], "--workdir = '{in}/x.npy': a folder to write to; this is a file"),
    ([*SWEEP, "--merge", "--dry_run"], "--dry_run = True: leave it out with --merge"),
    ([*SWEEP, "--dry_run=perhaps"], "--dry_run = 'perhaps': true or false"),
])  # fmt: skip
def test_what_is_wrong_is_named_as_it_was_typed(capsys, tmp_path, argv, said):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
    (tmp_path / "raises.py").write_text("def get_config():\n  found = {}\n  return found['x']\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef get_config(:\n")
    (tmp_path / "number.py").write_text("def get_config():\n  return 3\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "s").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([word.replace("{in}", str(tmp_path)) for word in argv]) == 2
    streams = capsys.readouterr()
    assert said.replace("{in}", str(tmp_path)) in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_values_may_be_words_of_their_own():
    given = flags.read("diagnose", ["--k", "3", "-seed=-1", "--nomeasure", "--config.sae.k", "5", "--config", "a.py"])
    assert (given["k"], given["seed"], given["measure"], given["config"]) == (3, -1, False, "a.py")
    assert given.overrides == [("sae.k", "5")]
    assert flags.read("sweep", ["--grid=seed=0,1", "--grid", "sae.k=2"])["grid"] == ("seed=0,1", "sae.k=2")


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
    (np.ones((1, 8)), "more than one token"),
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


@pytest.mark.parametrize("verb", flags.VERBS)
def test_a_verb_has_help_with_its_flags_and_an_example_that_they_fit(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m sae_jax {verb} ")
    assert max(map(len, said.splitlines())) <= 120
    for name, flag in flags.VERBS[verb].flags.items():
        assert f"  --{name}" in said
        if isinstance(flag.default, int | float) and flag.kind is not bool:
            assert f"(default: {flag.default})" in said
    first, *words = flags.VERBS[verb].example.split()
    assert first == verb
    assert flags.read(verb, words).typed


def test_the_defaults_that_help_names_are_those_of_the_configuration():
    said, sae = flags.usage_of("diagnose"), sae_jax.base().sae
    for flag, value in (("n of the SAE in question", sae.n_features), ("its k", sae.k)):
        assert f"{flag}; not given: that of the configuration, or {value}" in said


LIGHT = """
import sys
from sae_jax import cli, flags
codes = [cli.main(argv) for argv in (["--help"], ["--version"], ["sweep", "--help"], [])]
heavy = {"jax", "numpy", "absl", "ml_collections", "etils"} & set(sys.modules)
print(codes, heavy)
import sae_jax
print(sorted(set(sae_jax.__all__) - set(dir(sae_jax))), "jax" in sys.modules)
sae_jax.diagnose
print({"grain", "orbax", "torch", "tensorboardX", "scipy.stats", "tensorflow_datasets"} & set(sys.modules))
from sae_jax.reports import boards
boards.TensorBoard(sys.argv[1]).scalars(1, {"member": {"loss": 1.0}})
import sae_jax.training.run
print({"torch", "scipy.optimize", "tensorflow_datasets"} & set(sys.modules))
"""


def test_help_imports_nothing_heavy_and_a_verb_not_what_another_needs(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIGHT, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-4:] == ["[0, 0, 0, 2] set()", "[] False", "set()", "set()"], done.stderr


def test_every_name_is_there_and_no_other():
    from sae_jax import train  # noqa: F401

    assert all(getattr(sae_jax, name) is not None for name in sae_jax.__all__)
    assert pickle.loads(pickle.dumps(sae_jax.diagnose)) is sae_jax.diagnose
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        sae_jax.fly  # noqa: B018


def test_a_report_is_not_mixed_with_another_and_a_strangers_is_kept(capsys, tmp_path, rng):
    np.save(tmp_path / "x.npy", rng.normal(size=(500, 16)).astype(np.float32))
    rows = np.eye(64, 16, dtype=np.float32)
    sae = sae_jax.SAE(W_enc=rows, b_enc=np.zeros(64, np.float32), W_dec=rows, b_dec=np.zeros(16, np.float32), k=4)
    sae_jax.export(sae, f"{tmp_path}/sae")
    words = ["diagnose", f"--activations={tmp_path}/x.npy"]
    kinds = {"diagnosis": ["--n_features=64", "--k=4"], "autopsy": [f"--sae={tmp_path}/sae"]}
    for own, other in (("diagnosis", "autopsy"), ("autopsy", "diagnosis")):
        workdir = tmp_path / own
        for _ in range(2):  # the same again is allowed
            assert cli.main([*words, *kinds[own], f"--workdir={workdir}"]) == 0
        before = {path.name: path.read_bytes() for path in workdir.iterdir()}
        capsys.readouterr()
        assert cli.main([*words, *kinds[other], f"--workdir={workdir}"]) == 2
        assert "a folder of its own: this one holds the report of something else" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in workdir.iterdir()} == before
    (tmp_path / "autopsy/report.json").unlink()  # as if it had been stopped before its last file
    assert cli.main([*words, *kinds["diagnosis"], f"--workdir={tmp_path}/autopsy"]) == 2
    assert cli.main([*words, *kinds["autopsy"], f"--workdir={tmp_path}/autopsy"]) == 0
    for stranger in ("5", '["recommended"]', "{", 10**5 * "[", '{"recommended": 1}'):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine/report.json").write_text(stranger)
        assert cli.main([*words, *kinds["diagnosis"], f"--workdir={tmp_path}/mine"]) == 2
        assert (tmp_path / "mine/report.json").read_text() == stranger


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
