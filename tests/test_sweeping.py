"""Sweeps end to end, on small files of activations; kills are real."""

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.stats import spearmanr

from sae_jax import cli, flags
from sae_jax import config as config_lib
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.errors import Refused, RunFailed
from sae_jax.models.facts import MODELS, PAPER
from sae_jax.outliers import statistics
from sae_jax.sweeps import cluster, combinations
from sae_jax.sweeps import jobs as jobs_lib

ROOT = Path(__file__).parents[1]
# The paper's table: layers and width of each model.
PUBLISHED = {
    "gpt2": (1, 11, 768), "pythia_70m": (1, 5, 512), "pythia_410m": (1, 23, 1024), "modernbert": (1, 21, 768),
    "modernbert_large": (1, 27, 1024), "dinov2": (1, 11, 768), "dinov2_large": (1, 23, 1024),
    "dinov3_small": (1, 11, 768), "dinov3": (1, 39, 4096), "stable-diffusion-3-5-large": (1, 37, 2432),
    "esm2_35m": (1, 11, 480), "esm2_650m": (1, 32, 1280), "esm2_3B": (1, 35, 2560), "esm3": (1, 47, 1536),
    "progen_base": (1, 26, 1536), "progen_large": (1, 31, 2560), "evo": (1, 31, 4096), "glm2": (1, 32, 1280),
    "af3": (0, 0, 384),
}  # fmt: skip

# Four files of activations of rising gamma; the last is not there. Two are trained as well.
SMALL = '''
from ml_collections import ConfigDict
from sae_jax.config import base

def get_config():
    config = base()
    config.sae.n_features, config.sae.k = 64, 4
    config.train.steps, config.train.batch_size, config.train.devices = 0, 32, 1
    config.eval.n_tokens, config.eval.batch_size = 200, 100
    config.checkpoint.every = 10
    config.auxk.preset = "none"
    config.members = ConfigDict({"topk": {}, "centred": {"sae": {"center": "mean"}}})
    config.data.path = "x"
    return config

def sweep(add):
    for name in NAMES:
        add({"data.path": f"FOLDER/{name}.npy"}, label=name)
    for name in NAMES[:2]:
        add({"data.path": f"FOLDER/{name}.npy", "train.steps": 30}, label=f"{name}_trained")
'''
NAMES = ["low", "middle", "high", "missing"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for i, name in enumerate(NAMES[:3]):
        x = rng.normal(size=(1000, 16)) + 3.0**i * np.eye(16)[0]
        np.save(folder / f"{name}.npy", x.astype(np.float32))
    text = SMALL.replace("NAMES[", f"{NAMES}[").replace("in NAMES", f"in {NAMES}").replace("FOLDER", str(folder))
    (folder / "small.py").write_text(text)
    return folder / "small.py"


@pytest.fixture(scope="module")
def whole(small):
    """The workdir of the sweep, run once without interruption."""
    assert run(f"--config={small}", f"--workdir={small.parent}/w") == 4
    return small.parent / "w"


def run(*argv):
    return cli.main(["sweep", *map(str, argv)])


def table(workdir):
    with (workdir / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_sweep_is_the_papers_454_layers(capsys, tmp_path):
    config = f"{ROOT}/configs/sweep.py"
    assert run(f"--config={config}", f"--workdir={tmp_path}/w", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for line in lines[1:455]:
        name, layer, width, *_ = line.split()
        found.setdefault(name.rsplit("_L", 1)[0], []).append((int(layer), int(width)))
    assert {model: (min(rows)[0], max(rows)[0], rows[0][1]) for model, rows in found.items()} == PUBLISHED
    assert all([layer for layer, _ in rows] == list(range(rows[0][0], rows[-1][0] + 1)) for rows in found.values())
    assert all({width for _, width in rows} == {PUBLISHED[model][2]} for model, rows in found.items())
    assert lines[-1].startswith("454 combinations")
    assert not (tmp_path / "w").exists()


def test_the_layers_of_a_model_share_one_forward_pass():
    """24 d² FLOPs a token and block, up to the deepest layer; then moments and six remedies counted, of each layer."""
    found = combinations.selected(jobs("sweep"), ["model=gpt2", "layer=2-3"])
    tokens, n = found[0].config.data.model.n_tokens, found[0].config.sae.n_features
    each = 2 * tokens * 768 * (3 * 768 + 6 * (n + 512))
    of_model, whole = combinations.plan(found).splitlines()[-2:]
    said = f"{(24 * 768**2 * tokens * 3 + 2 * each) / 1e12:.1f} TFLOP, {2 * tokens * 768 * 4 / 1e9:.1f} GB"
    assert of_model.startswith(f"gpt2: 2 combinations, layers 2–3, d_model 768, {said}")
    assert whole.startswith("2 combinations")


def config_of(path):
    return flags.load(str(path))


def jobs(name, *grid):
    path = f"{ROOT}/configs/{name}.py"
    return combinations.jobs(path, config_of(path), grid)


def test_every_configuration_builds_and_names_are_unique_and_stable():
    every = jobs("sweep")
    assert len(every) == len({job.name for job in every}) == len({job.hash for job in every}) == 454
    for job in every:
        config_lib.check(job.config)
    assert [job.name for job in every[:2]] == ["gpt2_L01", "gpt2_L02"]
    assert [job.hash for job in every] == [job.hash for job in jobs("sweep")]
    bundled = jobs("sweep_bundled")
    assert len(bundled) == 18 + 6 + 8 + 16 + 6
    assert sum(job.config.train.steps > 0 for job in bundled) == 6
    assert {facts.domain for facts in MODELS.values()} == {"language", "vision", "biology"}


def test_a_sweep_of_before_goes_on_as_its_hashes_stay():
    config = config_lib.base({"data.model.id": "gpt2", "data.model.layer": 6, "sae.center": "mean"})
    assert combinations.Job("gpt2", config).hash == "cc78c8f8a9698d68"  # before there were other activations than TopK
    config.sae.activation, config.sae.k = "relu", 0
    assert combinations.Job("gpt2", config).hash != "cc78c8f8a9698d68"


def test_members_that_set_nothing_count_in_the_hash_of_a_job():
    config, found = config_lib.base({"data.signal": "sparse"}), set()
    for members in ({}, {"a": {}}, {"b": {}}, {"b": {"seed": 5}}, {"a": {}, "b": {"seed": 5}}):
        config.members = ConfigDict(members)
        found.add(combinations.Job("x", config).hash)
    assert len(found) == 5


def test_grids_filters_and_shares_choose_among_them():
    every = jobs("sweep", "seed=0,1", "sae.k=32,64")
    assert len(every) == 4 * 454
    assert every[3].name == "gpt2_L01_seed1_k64"
    assert (every[3].config.seed, every[3].config.sae.k) == (1, 64)
    every = jobs("sweep")
    vision = combinations.selected(every, ["domain=vision"])
    assert {job.model for job in vision} == {name for name, facts in PAPER.items() if facts.domain == "vision"}
    assert len(combinations.selected(every, ["model=gpt2,esm3", "layer=3-5,10"])) == 8
    parts = [combinations.share(every, f"{i}/8") for i in range(8)]
    assert [job.name for part in parts for job in part] == [job.name for job in every]
    assert all(parts)
    assert len(combinations.grouped(every)) == 19


def test_grids_read_true_and_false_however_they_are_written():
    found = jobs("sweep_bundled", "sae.freeze_bias=true,False")
    assert [job.config.sae.freeze_bias for job in found] == [True, False] * (len(found) // 2)
    values = combinations._axis(config_lib.base(), "sae.freeze_bias=true,True,TRUE,1,false,False,FALSE,0")
    assert values == [("sae.freeze_bias", value) for value in [True] * 4 + [False] * 4]


@pytest.mark.parametrize(("flag", "said"), [
    ("--filter=model=gpt9", "model one of gpt2, pythia_70m"),
    ("--filter=domain=audio", "domain one of language, vision, biology"),
    ("--filter=layer=99", "layers are 0 to 47"),
    ("--filter=width=3", "model=NAME"),
    ("--grid=sae.kk=3", "an existing key"),
    ("--grid=sae.k=three", "values of type int"),
    ("--grid=sae.whiten=yes", "values true or false"),
    ("--grid=sae.whiten=true,", "values true or false"),
    ("--shard=8/8", "0 ≤ i < N"),
    ("--config.data.model.layer=nine", "type int"),
])  # fmt: skip
def test_wrong_flags_are_one_line_and_nothing_is_written(flag, said, capsys, tmp_path):
    assert run(f"--config={ROOT}/configs/sweep.py", f"--workdir={tmp_path}/w", flag) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "w").exists()


def test_a_file_without_combinations_and_names_that_repeat_are_refused(capsys, tmp_path):
    assert run(f"--config={ROOT}/configs/default.py", f"--workdir={tmp_path}/w") == 2
    assert "sweep(add)" in capsys.readouterr().err
    with pytest.raises(Refused, match="names that are unique"):
        jobs("sweep", "seed=0,0")


def test_names_of_jobs_stay_in_the_workdir(small):
    config = flags.load(str(small))
    found = combinations.jobs(str(small), config, ["data.path=/up/../../x.npy,/y.npy"])
    assert {Path(job.name).name for job in found} == {job.name for job in found}
    assert "data_low_path-up-..-..-x.npy" in {job.name for job in found}


def test_a_sweep_that_raises_is_one_line(capsys, tmp_path, small):
    (tmp_path / "c.py").write_text(small.read_text() + "    add({'sae.k': 'many'})\n")
    assert run("--config", tmp_path / "c.py", f"--workdir={tmp_path}/w") == 2  # a flag may be two words
    message = capsys.readouterr().err.strip()
    assert "a sweep(add) that runs (TypeError" in message
    assert "\n" not in message
    assert not (tmp_path / "w").exists()


def test_one_table_with_a_row_for_what_failed(small, whole, tmp_path, capsys):
    workdir = tmp_path / "w"
    shutil.copytree(whole, workdir)
    assert run(f"--config={small}", f"--workdir={workdir}") == 4
    out = capsys.readouterr().out
    assert "data_missing: Refused: data.path" in out
    assert "5 of 6 combinations done, 1 failed, 0 not yet" in out
    rows = table(workdir)
    assert len(rows) == 3 * 6 + 1 + 2 * 4
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["name"] for row in failed] == ["data_missing"]
    assert "missing.npy" in failed[0]["error"]
    plain = {row["name"]: row for row in rows if row["condition"] == "none"}
    gammas = [float(plain[f"data_{name}"]["gamma_raw"]) for name in NAMES[:3]]
    np.testing.assert_allclose(gammas, [1 / 4, 3 / 4, 9 / 4], rtol=0.1)
    deaths = [float(plain[f"data_{name}"]["dead_total"]) for name in NAMES[:3]]
    assert deaths[0] < deaths[1] < deaths[2]
    for row in rows:
        if row["status"] == "done":
            assert float(row["dead_total"]) == pytest.approx(float(row["dead_by_relu"]) + float(row["dead_by_topk"]))
            assert len(row["config_hash"]) == 16
            assert "jax=" in row["versions"]
    trained = [row for row in rows if row["name"] == "data_middle_trained"]
    assert [(row["condition"], row["steps"]) for row in trained] == [
        ("centred", "0"), ("centred", "30"), ("topk", "0"), ("topk", "30"),
    ]  # fmt: skip
    read = jobs_lib.read_table(workdir / "results.csv")
    assert isinstance(read[0]["gamma"], float)
    assert read[0]["fve"] is None

    # Run again: what is done stays, what failed is tried again.
    before = {path.name: path.stat().st_mtime_ns for path in (workdir / "jobs").glob("*.json")}
    shutil.copy(small.parent / "low.npy", small.parent / "missing.npy")
    try:
        assert run(f"--config={small}", f"--workdir={workdir}") == 0
    finally:
        (small.parent / "missing.npy").unlink()
    after = {path.name: path.stat().st_mtime_ns for path in (workdir / "jobs").glob("*.json")}
    assert {name for name in before if before[name] != after[name]} == {"data_missing.json"}
    assert all(row["status"] == "done" for row in table(workdir))


def test_deaths_are_those_of_a_count_by_hand(small, whole):
    found = next(r for r in jobs_lib.read_table(whole / "results.csv")
                 if r["name"] == "data_high" and r["condition"] == "none")  # fmt: skip
    x = np.load(small.parent / "high.npy")
    weights = np.asarray(sae_lib.init(jax.random.key(1), 64, 4, jnp.zeros(16)).W_enc)
    z = x @ weights.T
    kept = np.zeros(64, bool)
    for token in z:
        best = np.argsort(-token)[:4]
        kept[best[token[best] > 0]] = True
    assert found["dead_total"] == pytest.approx(1 - kept.mean())
    assert found["dead_by_relu"] == pytest.approx((z <= 0).all(axis=0).mean())


def test_another_sweep_and_a_second_process_are_refused(small, whole, capsys):
    workdir = whole
    assert run(f"--config={small}", f"--workdir={workdir}", "--config.seed=1") == 2
    assert "it holds another (first difference: data_low)" in capsys.readouterr().err
    held = str(workdir / "shards/all")
    script = f"import time\nfrom sae_jax.runtime import disk\nwith disk.sole_user({held!r}, 'x'):\n" \
             "    print('in', flush=True)\n    time.sleep(60)"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment())
    assert other.stdout.readline() == b"in\n"
    try:
        assert run(f"--config={small}", f"--workdir={workdir}") == 2
        assert f"process {other.pid}" in capsys.readouterr().err
    finally:
        other.kill()
        other.communicate()


def test_shards_merge_to_the_same_table(small, whole, tmp_path):
    for shard in ("0/2", "1/2"):
        assert run(f"--config={small}", f"--workdir={tmp_path}", f"--shard={shard}") in (0, 4)
    assert not (tmp_path / "results.csv").exists()
    assert run(f"--config={small}", f"--workdir={tmp_path}", "--merge") == 4
    assert (tmp_path / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.long
def test_killed_five_times_the_table_is_the_same(small, whole, tmp_path):
    """SIGKILL as soon as another job is finished or another checkpoint saved, then again from the start."""
    def landmarks():
        return {str(p) for p in tmp_path.glob("jobs/*.json")} | {str(p) for p in tmp_path.glob("jobs/*/checkpoints/*")}

    kills = 0
    for _ in range(5):
        seen = landmarks()
        argv = [sys.executable, "-m", "sae_jax", "sweep", f"--config={small}", f"--workdir={tmp_path}"]
        process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL)
        while process.poll() is None and not landmarks() - seen:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 5
    assert run(f"--config={small}", f"--workdir={tmp_path}") == 4
    assert (tmp_path / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.long
def test_on_two_ray_workers_one_of_them_killed_in_a_job_the_table_is_the_same(small, whole, tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    argv = [sys.executable, "-m", "sae_jax", "sweep", f"--config={small}", f"--workdir={tmp_path}", "--launcher=ray"]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killed = 0
    while not killed and process.poll() is None:
        if (tmp_path / "jobs" / "data_low_trained").exists():  # somebody trains it
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    ours = f"PYTHONPATH={ROOT}".encode() in (entry.parent / "environ").read_bytes()
                    if ours and entry.read_bytes().startswith(b"ray::_work"):
                        os.kill(int(entry.parent.name), signal.SIGKILL)
                        killed += 1
                        break
        time.sleep(0.01)
    said = process.communicate()[1]
    assert process.returncode == 4, said
    assert killed == 1
    assert "os.fork" not in said  # the devices are the workers': the one who hands out jobs has not started them
    assert (tmp_path / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


def test_a_ray_worker_in_another_folder_finds_relative_paths(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where workers start
    job = next(job for job in combinations.jobs(str(small), config_of(small)) if job.name == "data_low")
    job.config.data.path = "low.npy"
    cluster._work(str(small.parent), "relative", [(job.name, job.config.to_json())])
    assert jobs_lib.finished(str(small.parent / "relative"), job)
    assert not (tmp_path / "relative").exists()


@pytest.mark.parametrize(("flag", "said"), [
    ("--cpus=0", "--cpus = 0.0: a finite number > 0"), ("--gpus=-1", "--gpus = -1.0: a finite number ≥ 0"),
    ("--cpus=inf", "--cpus = inf: a finite number > 0"), ("--address=nowhere", "a Ray cluster that answers"),
])  # fmt: skip
def test_what_ray_cannot_give_is_refused_and_nothing_is_written(flag, said, small, capsys, tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    assert run(f"--config={small}", f"--workdir={tmp_path}/w", "--launcher=ray", flag) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_correlation_draws_models_not_layers(rng):
    models = np.repeat(["a", "b", "c", "d"], 25)
    level = np.repeat([0.0, 1.0, 2.0, 3.0], 25)
    x, y = level + 0.1 * rng.normal(size=100), level + 0.1 * rng.normal(size=100)
    found = statistics.correlation(x, y, models)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic)
    without = [spearmanr(x[models != m], y[models != m]).statistic for m in "abcd"]
    assert (found.least, found.most) == (pytest.approx(min(without)), pytest.approx(max(without)))
    # Between models alone x and y go together: layers drawn one by one would give a far too narrow interval.
    single = [spearmanr(x[i], y[i]).statistic for i in (rng.integers(100, size=100) for _ in range(300))]
    assert found.high - found.low > 2 * (np.quantile(single, 0.975) - np.quantile(single, 0.025))
    assert np.isnan(statistics.correlation(x[:25], y[:25], models[:25]).low)


def test_the_interval_of_a_correlation_leaves_out_a_fortieth_on_either_side(rng):
    """Drawn again with other numbers."""
    models, x = np.repeat(np.arange(8), 5), rng.normal(size=40)
    y = 0.4 * x + rng.normal(size=40)
    low, high = statistics.interval(x, y, models)
    rows = [np.flatnonzero(models == i) for i in range(8)]
    drawn = np.array([spearmanr(x[i], y[i]).statistic for i in
                      (np.concatenate([rows[m] for m in rng.integers(8, size=8)]) for _ in range(4000))])  # fmt: skip
    assert [np.mean(drawn <= low), np.mean(drawn >= high)] == pytest.approx([0.025, 0.025], abs=0.012)


@pytest.mark.parametrize(("cache", "folder"), [("", "~/.cache/sae_jax"), ("~/mine", "~/mine")])
def test_a_layer_that_cannot_be_extracted_leaves_the_others_alone(monkeypatch, tmp_path, rng, cache, folder):
    np.save(tmp_path / "x.npy", rng.normal(size=(2000, 16)).astype(np.float32))
    folders = set()

    def extract(model, layers, cache):
        folders.add(cache)
        if 2 in layers:
            raise RunFailed("token 7: activations not finite")
        return dict.fromkeys(layers, str(tmp_path / "x.npy"))

    monkeypatch.setattr(jobs_lib.extraction, "extract", extract)
    every = combinations.selected(jobs("sweep", "sae.n_features=32", "sae.k=4"), ["model=gpt2", "layer=1-3"])
    for job in every:
        job.config.data.model.cache = cache
    jobs_lib.local(str(tmp_path), combinations.grouped(every))
    rows = jobs_lib.merge(str(tmp_path), every)
    assert {(r["layer"], r["status"]) for r in rows} == {(1, "done"), (2, "failed"), (3, "done")}
    assert next(r["error"] for r in rows if r["layer"] == 2) == "RunFailed: token 7: activations not finite"
    assert folders == {str(Path(folder).expanduser())}


def test_a_sweep_may_start_in_a_folder_of_folders_that_are_not_there(tmp_path):
    found = [combinations.Job("one", config_lib.base())]
    jobs_lib.check_workdir(str(tmp_path / "a" / "b"), found)
    jobs_lib.check_workdir(str(tmp_path / "a" / "b"), found)
    with pytest.raises(Refused, match=r"it holds another \(first difference: one\)"):
        jobs_lib.check_workdir(str(tmp_path / "a" / "b"), [])


@pytest.fixture
def ray_nowhere(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_DEDUP_LOGS"):
        monkeypatch.setenv(name, "")  # and back to what it was at the end
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("ray_nowhere")
@pytest.mark.parametrize(("address", "token"), [(None, "token"), ("ray://there:10001", None)])
def test_ports_that_ray_opens_here_are_not_open_to_everybody(monkeypatch, address, token):
    """Ray of this machine asks for a token; a cluster has its own ways."""
    seen = []
    fake = SimpleNamespace(
        init=lambda where, **more: seen.append((where, os.environ.get("RAY_AUTH_MODE"), more)),
        cluster_resources=lambda: {"CPU": 4}, remote=lambda **more: lambda work: work,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", fake)
    cluster.launcher(address, 1, 0)
    ((where, mode, more),) = seen
    assert (where, mode) == (address or "local", token)
    assert more.get("include_dashboard") is (False if address is None else None)
    with pytest.raises(Refused, match="--cpus = 5: at most 4") if address is None else contextlib.nullcontext():
        cluster.launcher(address, 5, 0)


# -- what combinations cost, and what is said of them ------------------------------------------------------------------


def costing():
    """Jobs of 10⁹ tokens each and what they cost by hand: name, model, layer, width, forward pass, the rest, bytes."""
    tokens = {"sae.n_features": 1000, "data.model.n_tokens": 10**9, "train.steps": 0}
    gpt2 = tokens | {"data.model.id": "gpt2"}
    trained = {"train.steps": 5000, "train.batch_size": 10**5, "members": ConfigDict({"a": {}, "b": {}})}
    sparse = tokens | {"data.signal": "sparse"}
    given = {
        "counted": (gpt2 | {"data.model.layer": 2}, 768, 24 * 768**2 * 2e9, 2e9 * 768 * (3 * 768 + 6 * 1512), 3.072e12),
        "trained": (gpt2 | {"data.model.layer": 3, "data.model.dtype": "bfloat16"} | trained, 768, 24 * 768**2 * 3e9,
                    12 * 1000 * 768 * 5e8 * 2, 1.536e12),
        "one": (sparse | {"data.model.layer": 1, "data.d_model": 16} | trained | {"members": ConfigDict({})}, 16, 0,
                12 * 1000 * 16 * 5e8, 6.4e10),
        "wide": (sparse | {"data.model.layer": 5, "data.d_model": 32}, 32, 0, 2e9 * 32 * (3 * 32 + 6 * 1512), 1.28e11),
    }  # fmt: skip
    found = []
    for name, (settings, *cost) in given.items():
        config = config_lib.base({key: value for key, value in settings.items() if key != "members"})
        config.members = settings.get("members", ConfigDict({}))
        found.append((combinations.Job(name, config), cost))
    return found


def test_costs_are_those_of_the_formulae():
    for job, (width, *cost) in costing():
        found = combinations.estimate(job)
        assert found.d_model == width
        np.testing.assert_allclose(found[1:], cost, rtol=1e-12, err_msg=job.name)


def test_a_plan_sums_up_what_its_combinations_cost(monkeypatch):
    """At 7 GFLOP/s; the layers of a model share the forward pass of the deepest."""
    monkeypatch.setattr(combinations, "_rate", lambda: 7e9)
    lines = [line.split() for line in combinations.plan([job for job, _ in costing()]).splitlines()]
    assert lines[0] == ["name", "layer", "d_model", "GFLOP", "MB", "minutes"]
    # GFLOP of both together, MB, minutes.
    assert lines[1:5] == [
        ["counted", "2", "768", "45785088", "3072000", "109012.1"],
        ["trained", "3", "768", "51683328", "1536000", "123055.5"],
        ["one", "1", "16", "96000", "64000", "228.6"],
        ["wide", "5", "32", "586752", "128000", "1397.0"],
    ]  # fmt: skip
    assert " ".join(lines[5]) == ("gpt2: 2 combinations, layers 2–3, d_model 768, 69156.9 TFLOP, 4608.0 GB, "
                                  "164659 min")  # fmt: skip
    assert " ".join(lines[6]) == ("sparse: 2 combinations, layers 1–5, d_model 16–32, 682.8 TFLOP, 192.0 GB, "
                                  "1626 min")  # fmt: skip
    assert " ".join(lines[7]) == ("4 combinations, 69840 TFLOP, 4800.0 GB of activations, 2771.4 hours at 7 GFLOP/s "
                                  "(a matmul here)")  # fmt: skip
    assert len(lines) == 8


def test_the_rate_is_that_of_the_fastest_of_five_products(monkeypatch):
    clock = iter([0, 3, 10, 12, 20, 24, 30, 35, 40, 46])
    monkeypatch.setattr(combinations, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert combinations._rate() == 2 * 1024**3 / 2
    assert next(clock, None) is None


@pytest.mark.parametrize("text", ["layer=x-3", "layer=3-x", "layer=-3", "layer=3-", "model=", "layers"])
def test_filters_that_cannot_be_read_are_refused(text):
    every = [job for job, _ in costing()]
    assert combinations.selected(every, ["domain=language,", "model=gpt2,sparse", "layer=0-3,5"]) == every
    assert combinations.selected(every, ["layer=3"]) == every[1:2]
    with pytest.raises(Refused, match=r"model=NAME|layers as 3 or 1-6"):
        combinations.selected(every, [text])


@pytest.mark.parametrize("shard", ["1", "a/8", "1/b", "2/2", "/2", "1/"])
def test_shares_that_are_none_are_refused(shard):
    with pytest.raises(Refused, match="i/N with 0 ≤ i < N"):
        combinations.share([job for job, _ in costing()], shard)


def test_a_grid_without_values_is_refused():
    with pytest.raises(Refused, match=r"KEY=VALUE,VALUE"):
        combinations._axis(config_lib.base(), "seed")


def test_a_sweep_that_sets_what_there_is_not_is_told_so(capsys, tmp_path, small):
    (tmp_path / "c.py").write_text(small.read_text() + "    add({'sae.kk': 3, 'data.path': 'x'})\n")
    assert run("--config", tmp_path / "c.py", f"--workdir={tmp_path}/w") == 2
    assert "--config = 'sae.kk': existing keys in the overrides of sweep(add)" in capsys.readouterr().err


def test_all_tokens_of_a_file_are_counted_and_none_is_trained_on(small, whole):
    rows = [r for r in jobs_lib.read_table(whole / "results.csv") if r["name"] == "data_low"]
    x = np.load(small.parent / "low.npy").astype(np.float64)
    for row in rows:
        assert (row["n_tokens"], row["steps"], row["k"]) == (1000, 0, 4)
        assert row["gamma_raw"] == pytest.approx(np.linalg.norm(x.mean(axis=0)) / np.linalg.norm(x.std(axis=0)), 1e-5)


@pytest.mark.parametrize("n_done", [2, 3])
def test_a_summary_correlates_what_is_untrained_of_three_models_or_more(tmp_path, n_done):
    every = [combinations.Job(f"job{i}", config_lib.base({"data.signal": "sparse", "seed": i})) for i in range(6)]
    gammas, dead, by_relu = [0.1, 0.7, 0.4, 2.0], [0.3, 0.2, 0.5, 0.1], [0.1, 0.2, 0.0, 0.4]
    for i in range(n_done):
        values = {"status": "done", "gamma": gammas[i], "model": f"m{i}"}
        rows = [jobs_lib.row(every[i], **values, condition=name, steps=steps, dead_total=total, dead_by_relu=relu)
                for name, steps, total, relu in (("none", 0, dead[i], by_relu[i]), ("none", 30, 0.9 - i / 10, 0.5),
                                                 ("centred", 0, 0.8 - i / 10, 0.6))]  # fmt: skip
        jobs_lib.record(str(tmp_path), every[i], rows)
    jobs_lib.record(str(tmp_path), every[4], [jobs_lib.failure(every[4], RunFailed("a  line\nof " + "x" * 600))])
    lines = jobs_lib.summary(str(tmp_path), every).splitlines()
    gamma, models = np.array(gammas[:n_done]), np.array(list("abcd")[:n_done])
    expected = [f"gamma and features {what} at initialisation: "
                f"{statistics.correlation(gamma, np.array(values[:n_done]), models)}"
                for what, values in (("dead in total", dead), ("dead by ReLU", by_relu)) if n_done > 2]  # fmt: skip
    assert lines == ["failed: job4 (why: column `error`)", *expected,
                     f"{n_done} of 6 combinations done, 1 failed, {5 - n_done} not yet"]  # fmt: skip
    (failed,) = jobs_lib.recorded(str(tmp_path), every[4])
    assert failed["error"] == "RunFailed: a line of " + "x" * 490
    assert jobs_lib._short([failed]) == failed["error"]


def test_a_finished_combination_is_one_line():
    rows = [{"status": "done", "gamma": gamma, "condition": name, "dead_total": dead}
            for gamma, name, dead in ((0.254, "none", 1.0), (0.9, "none", 0.125), (0.9, "centred", 0.5))]  # fmt: skip
    assert jobs_lib._short(rows) == "gamma 0.25, dead none 12.5 %, centred 50.0 %"


def test_a_combination_is_finished_once_all_its_rows_are_done(tmp_path):
    one, other = (combinations.Job("one", config_lib.base({"data.signal": "sparse", "seed": i})) for i in range(2))
    assert not jobs_lib.finished(str(tmp_path), one)
    for rows, done in (([], False), (["done"], True), (["done", "failed"], False), (["failed"], False)):
        jobs_lib.record(str(tmp_path), one, [jobs_lib.row(one, status=status) for status in rows])
        assert jobs_lib.finished(str(tmp_path), one) == done
        assert jobs_lib.recorded(str(tmp_path), other) == []  # of the same name, with other settings


class FakeRay(SimpleNamespace):
    """As much of Ray as a launcher asks for; tasks are done at once, in their order."""

    waits = 0

    class exceptions:
        class RayError(Exception): ...

    def init(self, *_, **__): ...

    def cluster_resources(self):
        return {"CPU": 4.0}

    def remote(self, **_):
        return lambda work: SimpleNamespace(remote=lambda folder, workdir, group: (folder, workdir, tuple(group)))

    def wait(self, waiting, timeout):
        self.waits += 1
        assert self.waits < 9, "one is done each time"
        return waiting[:1], waiting[1:]

    def get(self, done):
        return self.does(*done)

    def shutdown(self): ...


@pytest.fixture
def ray_here(monkeypatch, ray_nowhere):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(("cpus", "gpus", "said"), [
    (4, 0, ""), (0.5, 0, ""), (0, 0, "--cpus = 0: a finite"),
    (1, 1, "--gpus = 1: at most 0, what this machine has"), (-0.5, 0, "--cpus = -0.5: a finite"),
    (1, 0.5, "--gpus = 0.5: at most 0, what this machine has"), (1, float("nan"), "--gpus = nan: a finite number ≥ 0"),
])  # fmt: skip
def test_a_task_may_need_all_that_a_machine_has_and_no_more(cpus, gpus, said):
    if not said:
        assert cluster.launcher(None, cpus, gpus)
        return
    with pytest.raises(Refused) as refused:
        cluster.launcher(None, cpus, gpus)
    assert said in str(refused.value)


def test_what_workers_leave_undone_becomes_rows_that_say_why(ray_here, tmp_path):
    """Of three groups: one is done, one leaves nothing, the worker of one dies between its two jobs."""
    every = [combinations.Job(f"job{i}", config_lib.base({"data.signal": "sparse", "seed": i})) for i in range(4)]
    groups, seen = [every[:1], every[1:2], every[2:]], []

    def does(folder, workdir, group):
        seen.append((folder, workdir, [name for name, _ in group]))
        if len(seen) != 2:
            job = every[0 if len(seen) == 1 else 2]
            jobs_lib.record(workdir, job, [jobs_lib.row(job, status="done")])
        if len(seen) == 3:
            raise ray_here.exceptions.RayError("the worker has died")

    ray_here.does = does
    cluster.launcher(None, 1, 0)(str(tmp_path), groups)
    assert seen == [(os.getcwd(), str(tmp_path), names) for names in (["job0"], ["job1"], ["job2", "job3"])]
    rows = {row["name"]: (row["status"], row["error"]) for row in jobs_lib.merge(str(tmp_path), every)}
    assert rows == {
        "job0": ("done", None), "job2": ("done", None), "job3": ("failed", "RayError: the worker has died"),
        "job1": ("failed", "RunFailed: done, but nothing is there: all machines have to see the workdir"),
    }  # fmt: skip


def test_shares_cost_about_alike():
    """A job goes where the middle of its cost lies; a forward pass, which others share, counts a tenth."""
    found = [job for job, _ in costing()]
    cost = [forward / 10 + rest for _, (_, forward, rest, _) in costing()]
    for count in range(1, 60):
        places = [int(count * (sum(cost[:j]) + cost[j] / 2) / sum(cost)) for j in range(4)]
        for i in range(count):
            expected = [job.name for job, place in zip(found, places, strict=True) if place == i]
            assert [job.name for job in combinations.share(found, f"{i}/{count}")] == expected
