"""Whatever is given: it works, or it is refused in one line. Generated settings and files, and bad command lines.

FUZZ=20 in the environment makes twenty times as many examples, each time others.
"""

import os
import pickle
import resource
import shutil
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from safetensors.flax import save_file

import sae_jax
from sae_jax import cli
from sae_jax import config as config_lib
from sae_jax.activations import files, store
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import Refused, RunFailed
from sae_jax.exchange import formats
from sae_jax.outliers.preprocess import Preprocessing

ROOT = Path(__file__).parents[1]
TIMES = int(os.environ.get("FUZZ", "0"))


def examples(n):
    return settings(
        max_examples=n * max(1, TIMES), derandomize=not TIMES, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# -- settings ----------------------------------------------------------------------------------------------------------

DEFAULTS = config_lib.flatten(config_lib.base())
INTEGERS = st.one_of(st.integers(-3, 40), st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30]))
FLOATS = st.one_of(st.floats(), st.sampled_from([0.0, -1.0, 0.5, 1.0, 3.0]))
NAMES = st.sampled_from(["", "none", "mean", "sparse", "gaussian", "one", "spread", "saelens", "float16", "x/y"])
ANYTHING = st.one_of(INTEGERS, FLOATS, st.booleans(), st.text(max_size=5), st.none(), st.just([1]), st.just({"a": 1}))


def value_of(key):
    kind = {bool: st.booleans(), int: INTEGERS, float: FLOATS, str: st.one_of(NAMES, st.text(max_size=5))}
    return st.one_of(kind[type(DEFAULTS[key])], kind[type(DEFAULTS[key])], ANYTHING)


KEYS = st.sampled_from(sorted(DEFAULTS)).flatmap(lambda key: st.tuples(st.just(key), value_of(key)))
MEMBERS = st.dictionaries(st.text(max_size=3), st.one_of(ANYTHING, st.lists(KEYS, max_size=2).map(dict)), max_size=2)


def nested(flat):
    found = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


@examples(800)
@given(st.lists(KEYS, min_size=1, max_size=4).map(dict), MEMBERS)
def test_any_settings_pass_or_are_refused_with_the_field_at_fault(changes, members):
    members = {name: nested(over) if isinstance(over, dict) else over for name, over in members.items()}
    try:
        config = ConfigDict({**nested({**DEFAULTS, "data.signal": "sparse", **changes}), "members": members})
    except (TypeError, ValueError, AttributeError):  # no such ConfigDict: a name with a dot in it, say
        return
    refused = refusal(lambda: config_lib.check(config))
    assert refused is None or refused.field.split(".")[0] in config_lib.base()


def refusal(work):
    """What was refused, or failed in the run, with one line; None if all went well. Anything else is raised."""
    try:
        work()
    except (Refused, RunFailed) as error:
        return error
    return None


@st.composite
def runnable(draw):
    """Small but otherwise arbitrary settings that are all within what is allowed."""
    config = config_lib.base()
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    choice = lambda *of: draw(st.sampled_from(of))  # noqa: E731
    config.seed = choice(0, 1, 2**31 - 1)
    config.sae.n_features = number(1, 40)
    config.sae.k = number(1, config.sae.n_features)
    config.sae.center = choice("none", "mean", "geometric_median")
    config.sae.freeze_bias, config.sae.unit_decoder = choice(True, False), choice(True, False)
    config.data.signal, config.data.gamma = choice("sparse", "gaussian"), choice(0.0, 0.5, 30.0, 1000.0)
    config.data.d_model, config.data.mean_direction = number(1, 20), choice("one", "few", "spread")
    config.data.n_true_features = number(2, 30)
    config.data.n_active = number(1, config.data.n_true_features)
    config.data.rank, config.data.tail_df = number(0, config.data.d_model), choice(0.0, 2.5)
    config.data.statistics_tokens = number(2, 3000)
    config.train.batch_size, config.train.steps, config.train.devices = 2 * number(1, 20), number(0, 3), number(0, 2)
    config.train.steps_per_dispatch, config.train.warmup_steps = number(1, 3), number(0, 5)
    config.train.learning_rate, config.train.decay_fraction = choice(1e-8, 1e-3, 0.1), choice(0.0, 0.3, 1.0)
    config.train.beta1, config.train.beta2 = choice(0.0, 0.9), choice(0.0, 0.999)
    config.train.clip_norm = choice(1e-6, 1e6)
    config.auxk.preset = choice("none", "openai", "dictionary_learning", "saelens", "sparsify")
    config.auxk.weight, config.auxk.dead_after_tokens = choice(-1.0, 0.0, 2.0), choice(0, 1, 40)
    config.eval.n_tokens, config.eval.batch_size = number(1, 500), 2 * number(1, 100)
    config.checkpoint.every, config.checkpoint.keep = number(0, 3), number(1, 3)
    return config


@pytest.mark.long
@pytest.mark.drawn
@examples(10)
@given(runnable())
def test_any_settings_that_are_allowed_train(tmp_path_factory, config):
    report = sae_jax.train(config, str(tmp_path_factory.mktemp("run")))
    assert report["step"] == config.train.steps
    assert all(0 <= report["members"][0][when]["dead_total"] <= 1 for when in ("init", "final"))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A good file of every kind, and a dataset."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("originals")
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    np.save(folder / "a.npy", x)
    np.savez(folder / "plain.npz", x, token_id=np.arange(300))
    np.savez_compressed(folder / "packed.npz", x)
    save_file({"x": jnp.asarray(x), "y": jnp.arange(3)}, folder / "a.safetensors")
    torch.save({"x": torch.from_numpy(x), "ids": torch.arange(300)}, folder / "a.pt")
    store.import_file(str(folder / "a.npy"), str(folder / "data"), "float16")
    return folder


@st.composite
def harm(draw):
    """A function that damages bytes: bits, runs of bytes, ends, numbers blown up, or something else altogether."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "overwrite", "insert", "grow", "other"]))
    at, width = draw(st.floats(0, 0.999)), draw(st.integers(1, 64))
    early = draw(st.booleans())  # headers are at one end or the other
    new = draw(st.binary(min_size=width, max_size=width))

    def apply(data):
        position = int(at * (min(len(data), 300) if early else len(data)))
        head, tail = data[:position], data[position:]
        if kind == "flip":
            return head + bytes([tail[0] ^ (1 << width % 8)]) + tail[1:] if tail else data
        if kind == "grow":  # digits in headers
            return data.replace(b"300", b"9" * (width % 12 + 1), 1)
        return {"cut": head, "overwrite": head + new + tail[width:], "insert": head + new + tail, "other": new}[kind]

    return apply


def read_all(path):
    """Reads a file as training does; the line if it is refused, or nothing."""

    def work():
        chunks = files.open_chunks(str(path))
        for start in range(0, min(chunks.n_tokens, 1000), 100):
            assert chunks.tokens(start, start + 100).shape[1] == chunks.d_model

    return str(refusal(work) or "")


@pytest.mark.parametrize("name", ["a.npy", "plain.npz", "packed.npz", "a.safetensors", "a.pt"])
def test_a_damaged_file_is_read_or_refused_and_memory_stays_small(originals, tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = (originals / name).read_bytes()
    assert read_all(originals / name) == ""

    @examples(220)
    @given(st.lists(harm(), min_size=1, max_size=3))
    def check(harms):
        data = whole
        for apply in harms:
            data = apply(data)
        (tmp_path / name).write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # readers are free to warn of what they then refuse
            read_all(tmp_path / name)

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


def test_a_dataset_with_a_damaged_file_is_read_or_refused(originals, tmp_path):
    folder = next((originals / "data").glob("*/*/*"))
    names = sorted(path.name for path in folder.iterdir())
    whole = files.open_chunks(str(folder)).tokens(0, 300)

    @examples(150)
    @given(st.sampled_from(names), harm())
    def check(name, apply):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "d")
        (tmp_path / "d" / name).write_bytes(apply((folder / name).read_bytes()))
        if not read_all(tmp_path / "d"):  # then nothing that matters was hit
            np.testing.assert_array_equal(files.open_chunks(str(tmp_path / "d")).tokens(0, 300), whole)

    check()


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_a_damaged_sae_of_another_library_is_read_or_refused(tmp_path, format):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (9, 4), "W_dec": (9, 4), "b_enc": (9,), "b_dec": (4,)}
    sae = SAE(**{key: np.float32(rng.normal(size=shape)) for key, shape in shapes.items()}, k=3)
    good = formats.encode(formats.Packed(sae, Preprocessing(shift=np.zeros(4)), {"layer": 300}), format)

    @examples(100)
    @given(st.sampled_from(sorted(good)), harm())
    def check(name, apply):
        for each, data in good.items():
            (tmp_path / each).write_bytes(apply(data) if each == name else data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refusal(lambda: formats.decode(epath.Path(tmp_path)))

    check()


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("ending", ["npy", "npz", "pt", "pth", "safetensors", "bin"])
def test_nothing_in_a_file_is_ever_run(tmp_path, ending):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"x.{ending}"
    path.write_bytes(pickle.dumps(Trap()))
    assert "data.path" in read_all(path)
    if ending.startswith("pt"):
        torch.save({"x": Trap()}, path)
        assert "data.path" in read_all(path)


def test_a_file_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((4_000_000, 8), np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**20
    assert "packed into" in read_all(tmp_path / "bomb.npz")


# -- command lines -----------------------------------------------------------------------------------------------------

TRAIN = ["train", "--config={configs}/synthetic.py", "--workdir={tmp}/w"]
DIAGNOSE = ["diagnose", "--activations={tmp}/good.npy", "--workdir={tmp}/w", "--n_features=64", "--k=4"]
EXTRACT = ["extract", "--from={tmp}/good.npy", "--out={tmp}/w"]
MODEL = ["extract", "--config={configs}/default.py", "--out={tmp}/w"]
BAD = [
    # settings of a run, one wrong
    *([*TRAIN, f"--config.{setting}"] for setting in (
        "sae.n_features=-1", "sae.n_features=2147483648", "sae.n_features=1e6", "sae.k=-4", "sae.k=1025", "sae.k=",
        "sae.center=Mean", "sae.freeze_bias=perhaps", "sae.unit_decoder=2", "seed=-1", "seed=99999999999", "seed=x",
        "data.gamma=-0.1", "data.gamma=-inf", "data.gamma=much", "data.d_model=0", "data.d_model=-7", "data.rank=-1",
        "data.mean_direction=", "data.n_active=0", "data.n_true_features=0", "data.n_true_features=1",
        "data.tail_df=2", "data.tail_df=nan", "data.tail_df=inf", "data.statistics_tokens=0", "data.signal=SPARSE",
        "data.path={tmp}", "data.path={tmp}/none", "data.path={tmp}/text.txt", "data.path={tmp}/empty.npy",
        "data.path={tmp}/integers.npy", "data.path={tmp}/flat.npy", "data.path={tmp}/cube.npy",
        "data.path={tmp}/three_rows.npy", "data.path={tmp}/cut.npz", "data.path={tmp}/text.safetensors",
        "data.path={tmp}/text.pt", "data.path={tmp}/objects.npy", "data.path=" + "x" * 300, "data.model.layer=-1",
        "data.model.context=1", "data.model.dtype=float64", "data.model.n_tokens=0", "data.model.batch_size=-1",
        "train.steps=4294967296", "train.steps=ten", "train.batch_size=-2", "train.batch_size=7", "train.devices=-1",
        "train.devices=99", "train.learning_rate=-1e-3", "train.learning_rate=nan", "train.learning_rate=inf",
        "train.beta1=-0.1", "train.beta2=1", "train.beta2=nan", "train.clip_norm=0", "train.warmup_steps=-1",
        "train.decay_fraction=-0.5", "train.decay_fraction=nan", "train.steps_per_dispatch=0", "auxk.preset=auxk",
        "auxk.weight=-0.5", "auxk.weight=nan", "auxk.dead_after_tokens=-1", "auxk.dead_after_tokens=2147483648",
        "eval.n_tokens=-1", "eval.batch_size=0", "eval.batch_size=3", "checkpoint.every=-1", "checkpoint.keep=0",
        "members=3", "members.centred.sae.k=0", "members.centred.train.steps=3", "members.other.sae.k=3", "sae=1",
        "nothing=1", "train.lr=1", "sae.k", "data.gamma=1=2",
    )),
    # flags
    ["trian"], ["--config=x"], [*TRAIN, "--steps=3"], [*TRAIN, "more"], TRAIN[:2], [TRAIN[0], TRAIN[2]],
    ["train", "--config={tmp}/none.py", TRAIN[2]], ["train", "--config={tmp}/text.txt", TRAIN[2]],
    ["train", "--config={tmp}/raises.py", TRAIN[2]], ["train", "--config={tmp}/leaves.py", TRAIN[2]],
    ["train", "--config={tmp}/number.py", TRAIN[2]],
    ["train", "--config={tmp}/extra.py", TRAIN[2]], ["train", "--config={tmp}/fewer.py", TRAIN[2]],
    [*TRAIN[:2], "--workdir={tmp}/good.npy"], [*TRAIN[:2], "--workdir={tmp}/good.npy/w"],
    [*TRAIN[:2], "--workdir={tmp}/" + "w" * 300], [*TRAIN[:2], "--workdir="],
    # schemes that are none, or that need a package
    [*TRAIN[:2], "--workdir=foo://b/w"], [*TRAIN, "--config.data.path=foo://b/x.npy"], [*EXTRACT, "--out=foo://b"],
    [*EXTRACT, "--from=foo://b/x"], [*DIAGNOSE, "--activations=foo://b/x"], [*DIAGNOSE, "--sae=foo://b/x"],
    ["export", "--workdir=foo://b/w", "--out={tmp}/w"], ["export", "--from={tmp}", "--out=foo://b/w"],
    ["sweep", "--config={configs}/sweep.py", "--workdir=foo://b/w"],
    # diagnose
    *([*DIAGNOSE, flag] for flag in (
        "--k=0", "--k=65", "--k=four", "--n_features=0", "--n_features=" + "9" * 30, "--n_probes=3", "--seed=-1",
        "--config={configs}/synthetic.py", "--activations={tmp}/none.npy", "--activations={tmp}/three_rows.npy",
        "--activations={tmp}/nan.npy", "--activations={tmp}/same.npy", "--activations={tmp}",
        "--workdir={tmp}/good.npy", "--measure=perhaps", "--activations={tmp}/pipe.npy", "--member=a",
        "--n_probes=" + "9" * 30,
    )),
    ["diagnose", DIAGNOSE[2]], DIAGNOSE[:2],
    # extract
    *([*EXTRACT, flag] for flag in (
        "--dtype=int8", "--from={tmp}/none.npy", "--from={tmp}/flat.npy", "--from={tmp}/text.txt", "--from={tmp}",
        "--config={configs}/default.py", "--out=",
    )),
    [*MODEL, "--layers=one"], [*MODEL, "--layers=-1", "--config.data.model.id=x/y"], MODEL, MODEL[:2], EXTRACT[:2],
    [*MODEL, "--config.data.model.id={tmp}/none"], [*MODEL, "--config.data.model.id=no model"],
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with good and bad inputs."""
    folder, x = tmp_path_factory.mktemp("place"), np.random.default_rng(0).normal(size=(600, 4))
    arrays = {
        "good": x, "empty": x[:0], "integers": x.astype(int), "flat": x[:, 0], "cube": x[None, None],
        "three_rows": x[:3], "nan": np.where(np.arange(600)[:, None] == 7, np.nan, x), "same": 0 * x + 1,
        "objects": np.array([[None]]),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    np.savez(folder / "cut.npz", x)
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:-40])
    for name in ("text.txt", "text.safetensors", "text.pt"):
        (folder / name).write_text("not at all")
    start = "from sae_jax.config import base\ndef get_config():\n  config = base(); config.data.signal = 'sparse'\n  "
    os.mkfifo(folder / "pipe.npy")
    (folder / "raises.py").write_text(start + "raise KeyError('x')")
    (folder / "leaves.py").write_text(start + "raise SystemExit(0)")
    (folder / "number.py").write_text("def get_config():\n  return 3")
    (folder / "extra.py").write_text(start + "config.unlock(); config.sae.colour = 'red'; return config")
    (folder / "fewer.py").write_text(start + "config.unlock(); del config.sae.k; return config")
    return folder


@pytest.mark.parametrize("argv", BAD, ids=lambda argv: " ".join(argv)[:90])
def test_bad_command_lines_are_one_line_and_write_nothing(place, capsys, monkeypatch, argv):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(place.rglob("*"))
    code = cli.main([word.format(tmp=place, configs=ROOT / "configs") for word in argv])
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert "Traceback" not in said.err
    assert sorted(place.rglob("*")) == before


def test_there_are_many_bad_command_lines():
    assert len({tuple(argv) for argv in BAD}) >= 60
