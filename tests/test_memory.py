"""What does not fit in memory is refused in a line that says what would, before anything is read or written."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

import sae_jax
from sae_jax import cli
from sae_jax import config as config_lib
from sae_jax.autoencoder import topk
from sae_jax.config import base
from sae_jax.diagnosis import autopsy
from sae_jax.errors import Refused
from sae_jax.exchange import encoders
from sae_jax.runtime import devices as devices_lib
from sae_jax.runtime import memory
from sae_jax.training import footprint
from sae_jax.training import step as step_lib

GIGABYTE = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 8 GB, in whose control groups there is no limit; returns what writes a file of them."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))

    write("meminfo", f"MemTotal: 1 kB\nMemAvailable: {8 * GIGABYTE // 1024} kB\n")
    write("cgroup/memory.max", "max")
    return write


@pytest.mark.parametrize(("files", "there"), [
    ({}, 8 * GIGABYTE // 1024 * 1024),
    ({"cgroup/memory.max": 3000, "cgroup/memory.current": 1000}, 2000),  # a container
    ({"cgroup/memory.max": 3000, "cgroup/memory.current": 1000, "cgroup/memory.stat": "file 9\ninactive_file 500"},
     2500),
    ({"own": "0::/job/step", "cgroup/job/memory.max": 700, "cgroup/job/memory.current": 100}, 600),  # of a scheduler
    ({"own": "0::/job/step", "cgroup/job/step/memory.max": 50, "cgroup/job/step/memory.current": 70}, 0),
    ({"own": "0::/pod:1/step", "cgroup/pod:1/memory.max": 700, "cgroup/pod:1/memory.current": 100}, 600),
    ({"own": "4:cpu:/a\n9:memory:/a", "cgroup/memory/a/memory.limit_in_bytes": 900,
      "cgroup/memory/a/memory.usage_in_bytes": 1}, 899),  # the first version of control groups
])  # fmt: skip
def test_the_least_of_all_limits_counts(machine, files, there):
    for name, text in files.items():
        machine(name, text)
    assert memory.of_the_machine() == there


@pytest.mark.parametrize(("stats", "there"), [
    ({"bytes_limit": 100, "bytes_in_use": 30}, 70), ({"bytes_limit": 100}, 100), ({"bytes_in_use": 30}, None),
    (None, None), ("cpu", 8 * GIGABYTE // 1024 * 1024),
])  # fmt: skip
def test_a_device_can_still_give_what_is_not_in_use(machine, monkeypatch, stats, there):
    """The first one's; a processor has the machine's."""
    device = SimpleNamespace(platform="cpu" if stats == "cpu" else "gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device])
    assert memory.available() == there


def test_what_needs_all_there_is_fits_and_what_nobody_knows_too(monkeypatch):
    need = memory.Choice("n", 10, lambda n: 10 * n)
    for there, fits in ((100, True), (101, True), (99, False), (None, True)):
        monkeypatch.setattr(memory, "available", lambda there=there: there)
        assert memory.fits(100) == fits
        if fits:
            memory.check("arrays", need)
            continue
        with pytest.raises(Refused):
            memory.check("arrays", need)


@pytest.mark.parametrize(("there", "said"), [
    (100 * GIGABYTE, "n = 100: at most about 50, or batch of at most about 4: arrays take 200.0 GB, and 100.0 GB are "
                     "free"),
    (2 * GIGABYTE, "n = 100: at most about 1: arrays take 200.0 GB, and 2.0 GB are free"),
    (GIGABYTE, "n = 100: less, on a machine with more memory: arrays take 200.0 GB, and 1.0 GB are free"),
    (199.5 * GIGABYTE, "n = 100: at most about 99, or batch of at most about 7: arrays take 200.0 GB, and 199.5 GB "
                       "are free"),
])  # fmt: skip
def test_a_refusal_names_what_would_fit_of_each_or_that_nothing_does(monkeypatch, there, said):
    """100 features of 2 GB each, or a batch of 8 of 25 GB each; what does not fit even once is not named."""
    monkeypatch.setattr(memory, "available", lambda: there)
    with pytest.raises(Refused) as refused:
        memory.check("arrays", memory.Choice("n", 100, lambda n: 2 * GIGABYTE * n),
                     memory.Choice("batch", 8, lambda batch: 25 * GIGABYTE * batch))  # fmt: skip
    assert str(refused.value) == said


def test_the_line_says_how_many_would_fit(machine):
    machine("cgroup/memory.max", 10**6 + 500)
    machine("cgroup/memory.current", 500)
    need = lambda n, batch: 40 * n + 4 * n * batch + 1000  # noqa: E731
    choices = [memory.Choice("n", 10**4, lambda n: need(n, 64)), memory.Choice("batch", 64, lambda b: need(10**4, b))]
    memory.check("arrays", memory.Choice("n", 3371, lambda n: need(n, 64)))  # fits
    with pytest.raises(Refused) as error:
        memory.check("arrays", *choices)
    said = re.match(r"at most about (\d+), or batch of at most about (\d+):", error.value.allowed)
    most, batch = map(int, said.groups())
    assert need(most, 64) <= 10**6 < need(most + 1, 64)
    assert need(10**4, batch) <= 10**6 < need(10**4, batch + 1)


def test_an_examination_takes_the_weights_twice_and_3000_bytes_a_feature(monkeypatch):
    """Beside 16 covariances in float64; of one probe nearly nothing."""
    n, d = 65_536, 512
    rows = np.broadcast_to(np.float32(0), (n, d))
    sae = encoders.Encoder(W_enc=rows, W_dec=rows, b_enc=rows[:, 0], b_dec=rows[0], b_in=rows[0], k=8)
    expected = 2 * 2 * 4 * n * d + 3000 * n + 16 * 8 * d**2
    monkeypatch.setattr(memory, "available", lambda: 1.01 * expected)
    autopsy._check_memory(sae, "sae", d, 1)
    monkeypatch.setattr(memory, "available", lambda: 0.99 * expected)
    with pytest.raises(Refused, match="n_probes = 1: "):
        autopsy._check_memory(sae, "sae", d, 1)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_takes_what_its_first_and_its_last_states_and_its_table_take(monkeypatch, devices):
    """Of small batches the end is dearest: twice three arrays of all parameters on each device, 5,000 bytes a line."""
    config = base({"sae.n_features": 4096, "sae.k": 4, "train.batch_size": 2, "eval.batch_size": 2,
                   "train.devices": devices, "data.signal": "gaussian"})  # fmt: skip
    expected = 2 * 3 * 4 * (2 * 16 + 1) * 4096 * devices + 5000 * 4096
    monkeypatch.setattr(memory, "available", lambda: 1.001 * expected)
    footprint.check_run(config, 16)
    monkeypatch.setattr(memory, "available", lambda: 0.999 * expected)
    with pytest.raises(Refused, match=r"sae.n_features = 4096: at most about 40\d\d"):
        footprint.check_run(config, 16)


@pytest.mark.parametrize(("activation", "arrays"), [("topk", 3), ("relu", 9)])
def test_of_large_batches_the_pre_activations_are_dearest(monkeypatch, activation, arrays):
    """Seven arrays of all parameters on the way, a batch read eleven times, and so many arrays of (tokens, n)."""
    config = base({"sae.n_features": 4096, "train.batch_size": 8000, "eval.batch_size": 2, "train.devices": 1,
                   "data.signal": "gaussian", "sae.activation": activation})  # fmt: skip
    if activation == "relu":
        config.sae.k, config.sparsity.preset = 0, "saelens"
    expected = 7 * 4 * (2 * 16 + 1) * 4096 + arrays * 4 * 8000 * 4096 + 4 * 16 * (8000 * 11 + 2)
    monkeypatch.setattr(memory, "available", lambda: 1.001 * expected)
    footprint.check_run(config, 16)
    monkeypatch.setattr(memory, "available", lambda: 0.999 * expected)
    with pytest.raises(Refused, match=r"train.batch_size of at most about 79\d\d"):
        footprint.check_run(config, 16)


def test_groups_take_turns_with_their_pre_activations(monkeypatch):
    """Two that are no one program: parameters of both, the larger gradient and the more of the pre-activations."""
    config = base({"sae.n_features": 4096, "train.batch_size": 8000, "eval.batch_size": 2, "train.devices": 1,
                   "data.signal": "gaussian"})  # fmt: skip
    relu = {"sae": {"activation": "relu", "k": 0}, "sparsity": {"preset": "saelens"}}
    config.members = ConfigDict({"a": {}, "b": relu})
    weights = 4 * (2 * 16 + 1) * 4096
    expected = (3 * 2 + 1 + 3 * 2) * weights + 9 * 4 * 8000 * 4096 + 4 * 16 * (8000 * 11 + 2)
    monkeypatch.setattr(memory, "available", lambda: 1.001 * expected)
    footprint.check_run(config, 16)
    monkeypatch.setattr(memory, "available", lambda: 0.999 * expected)
    with pytest.raises(Refused):
        footprint.check_run(config, 16)


CONFIG = """
from sae_jax.config import base

def get_config():
    return base({"data.signal": "sparse", "data.d_model": 32, "data.n_true_features": 64})

def sweep(add):
    add({"seed": 1}, "small")
    add({"sae.n_features": 2_000_000_000, "train.steps": STEPS}, "large")
"""


@pytest.fixture
def inputs(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(600, 32)).astype(np.float32))
    for name, steps in (("train", 5), ("count", 0)):
        (tmp_path / f"{name}.py").write_text(CONFIG.replace("STEPS", str(steps)))
    return tmp_path


TRAIN = ["train", "--config={tmp}/train.py", "--workdir={tmp}/w"]
ON_FILE = [*TRAIN, "--config.data.path={tmp}/x.npy"]
DIAGNOSE = ["diagnose", "--activations={tmp}/x.npy", "--workdir={tmp}/w", "--k=4"]


@pytest.mark.parametrize(("argv", "said"), [
    ([*TRAIN, "--config.sae.n_features=20000000"], "sae.n_features = 20000000"),
    ([*TRAIN, "--config.sae.n_features=2000000000"], "sae.n_features = 2000000000"),
    ([*ON_FILE, "--config.sae.n_features=2000000000"], "sae.n_features = 2000000000"),
    ([*TRAIN, "--config.train.batch_size=2000000000"], "at most about"),
    ([*TRAIN, "--config.eval.batch_size=200000000"], "eval.batch_size of at most about"),
    ([*TRAIN, "--config.data.n_true_features=2000000000"], "data.n_true_features = 2000000000"),
    ([*DIAGNOSE, "--measure", "--n_features=100000000"], "--n_features = 100000000"),
    ([*DIAGNOSE, "--measure", "--n_features=2000000000"], "--n_features = 2000000000"),
    (["sweep", "--config={tmp}/train.py", "--workdir={tmp}/w"], "combination sparse_large"),
    (["sweep", "--config={tmp}/count.py", "--workdir={tmp}/w"], "combination sparse_large"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(machine, inputs, capsys, argv, said):
    before = sorted(inputs.rglob("*"))
    assert cli.main([word.format(tmp=inputs) for word in argv]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert "at most about" in line
    assert " GB are free" in line
    assert len(line.splitlines()) == 1
    assert sorted(inputs.rglob("*")) == before


def test_an_sae_that_is_too_large_to_examine_is_not_read(machine, tmp_path):
    path = Path(tmp_path / "sae_weights.safetensors")
    with path.open("wb") as file:
        file.truncate(3 * GIGABYTE)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(Refused, match="at most about 2.0 GB") as refused:
        sae_jax.load(str(tmp_path))
    assert "= '3.0 GB': " in str(refused.value)
    assert "it takes 4 times its size to examine it, and 8.0 GB are free" in str(refused.value)


def needed(groups, d, laid, batch, held_out, in_dispatch, least):
    """Bytes, by the words of the module: `groups` are (members, n, whether activations are dense)."""
    weights = [4 * members * (d * n + n + n * d) for members, n, _ in groups]  # W_enc, b_enc, W_dec
    rows = [batch / laid.batch_parts, held_out / laid.batch_parts]
    pieces = [r / min(16, r // 128) if laid.is_host and least * d >= 2**20 and r >= 128 else r for r in rows]
    scores = [(9 * max(rows) if dense else 3 * max(pieces)) * 4 * members * n for members, n, dense in groups]
    trained = (3 * sum(weights) + max(weights)) * laid.copies / laid.parts + max(scores) / laid.parts
    trained += 4 * d * (batch * (10 + in_dispatch) + held_out) / laid.batch_parts
    at_the_end = 2 * 3 * sum(weights) * laid.copies / laid.parts
    if laid.is_host:
        trained += 3 * sum(weights) / laid.parts
        at_the_end += 5000 * sum(members * n for members, n, _ in groups)
    return max(trained, at_the_end)


HOST, ACCELERATORS = devices_lib.Memories(True, 2, 3, 1), devices_lib.Memories(False, 1, 2, 4)


@pytest.mark.parametrize("laid", [HOST, ACCELERATORS])
@pytest.mark.parametrize(("batch", "held_out"), [(2000, 100), (100, 3000), (4, 4)])
@pytest.mark.parametrize(("members", "groups"), [
    ({"a": {}, "b": {"seed": 1}, "relu": {"sae": {"activation": "relu", "k": 0, "n_features": 1024},
      "sparsity": {"preset": "saelens"}}, "nested": {"sae": {"n_features": 2048, "groups": "64,2048"}}},
     [(1, 4096, False), (1, 4096, False), (1, 1024, True), (1, 2048, True)]),
    ({"a": {}, "small": {"sae": {"n_features": 512}}}, [(1, 4096, False), (1, 512, False)]),
    ({"a": {"sae": {"n_features": 512}}, "b": {"sae": {"n_features": 512}, "seed": 1}}, [(2, 512, False)]),
])  # fmt: skip
def test_every_byte_is_accounted_for_however_a_run_is_laid(monkeypatch, laid, batch, held_out, members, groups):
    config = base({"sae.n_features": 4096, "sae.k": 8, "train.batch_size": batch, "eval.batch_size": held_out,
                   "train.steps_per_dispatch": 3, "data.signal": "gaussian"})  # fmt: skip
    config.members = ConfigDict(members)
    said = []
    monkeypatch.setattr(memory, "check", lambda *given: said.extend(given))
    devices = SimpleNamespace(memories=lambda: laid)
    footprint.check(step_lib.group_members(config_lib.members(config), 256), 256, config, devices)
    what, features, tokens, evaluated = said
    assert f"of {len(members)} SAEs of width 256" in what
    largest = max(n for _, n, _ in groups)
    assert [(choice.field, choice.value) for choice in said[1:]] == [
        ("sae.n_features", largest), ("train.batch_size", batch), ("eval.batch_size", held_out)
    ]  # fmt: skip
    for n in (largest, largest // 2):  # the others in proportion
        own = [(count, m * n / largest, dense) for count, m, dense in groups]
        assert features.need(n) == pytest.approx(needed(own, 256, laid, batch, held_out, 3, n), rel=1e-12)
    for rows in (batch, 7):
        assert tokens.need(rows) == pytest.approx(needed(groups, 256, laid, rows, held_out, 3, largest), rel=1e-12)
    for rows in (held_out, 5000):
        assert evaluated.need(rows) == pytest.approx(needed(groups, 256, laid, batch, rows, 3, largest), rel=1e-12)


@pytest.mark.parametrize(("rows", "together"), [
    (100, 100), (128, 128), (300, 150), (1000, 1000 / 7), (2048, 128), (40_000, 2500), (0.5, 0.5)
])  # fmt: skip
def test_large_saes_take_the_rows_of_a_batch_in_up_to_sixteen_pieces_of_at_least_128(rows, together):
    assert topk.rows_at_a_time(rows, 4096, 256) == together
    assert topk.rows_at_a_time(rows, 4096, 255) == rows
