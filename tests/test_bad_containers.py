"""Bad files and folders of activations, through every verb that takes them: one line, exit code 2, nothing written."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from safetensors.flax import save_file

from experiments.trust.containers import (
    FLOATS,
    IDS,
    LENGTHS,
    MASK,
    D,
    N,
    T,
    arrow_folder,
    bits,
    parquet,
    rows,
    zarr,
    zarr_group,
)  # fmt: skip
from sae_jax import cli
from sae_jax.activations import store

X = np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32)


def nan(x, value=np.nan):
    return np.where(np.arange(x.size).reshape(x.shape) == 7 * D + 2, np.float32(value), x)


def npy(x, **beside):
    """x.npy, and arrays beside it by their names."""
    def make(folder):
        np.save(folder / "x.npy", x)
        for name, values in beside.items():
            np.save(folder / f"x_{name}.npy", values)
        return folder / "x.npy"

    return make


def npz(name="", **arrays):
    def make(folder):
        np.savez(folder / "x.npz", **arrays)
        return f"{folder}/x.npz{name}"

    return make


def tensors(**arrays):
    def make(folder):
        save_file({name: jnp.asarray(array) for name, array in arrays.items()}, folder / "x.safetensors")
        return folder / "x.safetensors"

    return make


def text(name, content="not at all", path=""):
    """A folder with a file that holds something else; the path is that of the file, or as given."""
    def make(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
        return folder / (path or name)

    return make


def cut(make, by):
    def made(folder):
        path = make(folder)
        path.write_bytes(path.read_bytes()[:-by])
        return path

    return made


def table(columns, **options):
    return lambda folder: arrow_folder(folder / "a", columns, **options)


def pq(columns):
    return lambda folder: parquet(folder / "x.parquet", columns)


def several(**files):
    """A folder of several files."""
    def make(folder):
        for name, array in files.items():
            save = np.savez if name.startswith("npz") else np.save
            save(folder / f"{name}.{'npz' if name.startswith('npz') else 'npy'}", array)
        return folder

    return make


def splits(folder):
    arrow_folder(folder / "d" / "train", {"acts": X.tolist()})
    arrow_folder(folder / "d" / "test", {"acts": X.tolist()})
    (folder / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder / "d"


def elsewhere(folder):
    """A folder whose list of files leads out of it."""
    arrow_folder(folder / "other", {"acts": X.tolist()})
    inside = arrow_folder(folder / "a", {"acts": X.tolist()})
    (inside / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../other/data-00000.arrow"}]}))
    return inside


def without(part):
    def make(folder):
        inside = arrow_folder(folder / "a", {"acts": X.tolist()})
        (inside / part).unlink()
        return inside

    return make


def damaged(how):
    """A dataset of ours."""
    def make(folder):
        np.save(folder / "x.npy", rows(X))
        made = Path(store.import_file(str(folder / "x.npy"), str(folder / "data")))
        shard = next(made.glob("*array_record*"))
        if how == "shard missing":
            shard.unlink()
        elif how == "shard cut":
            shard.write_bytes(shard.read_bytes()[:-9])
        elif how == "shard of other data":
            shard.write_bytes(b"x" * shard.stat().st_size)
        else:
            path = made / store.MANIFEST
            path.write_text(path.read_text().replace('"d_model": 6', '"d_model": 7'))
        return made

    return make


def a_pipe(folder):
    os.mkfifo(folder / "x.safetensors")
    return folder / "x.safetensors"


ROWS, FLAT_IDS = rows(X), IDS.ravel()
# What is foreign to all verbs is called by its name.
FOREIGN = {
    "an empty folder": lambda f: f, "a folder of notes": text("d/notes.txt", path="d"),
    "a folder of five notes": lambda f: [text(f"d/{i}.txt")(f) for i in range(5)] and f / "d",
    "a folder of four notes": lambda f: [text(f"d/{i}.txt")(f) for i in range(4)] and f / "d",
    "a folder of three notes": lambda f: [text(f"d/{i}.txt")(f) for i in range(3)] and f / "d",
    "a model": text("d/config.json", '{"model_type": "gpt2"}', "d"), "a report": text("d/report.json", "{}", "d"),
    "a model by its architecture": text("d/config.json", '{"architectures": ["GPT2LMHeadModel"]}', "d"),
    "a model with weights": lambda f: text("config.json", '{"model_type": "gpt2"}')(f) and tensors(a=ROWS, b=ROWS)(f)
    and f,
    "a run": lambda f: text("d/checkpoints/5/x")(f) and f / "d",
    "an SAE": lambda f: text("d/cfg.json", "{}")(f) and text("d/sae_weights.safetensors")(f) and f / "d",
    "an SAE of dictionary_learning": text("d/ae.pt", path="d"),
}  # fmt: skip
CALLED = {
    "an empty folder": "is empty", "a folder of notes": "holds notes.txt", "a model": "is a model, gpt2",
    "a folder of five notes": "holds 0.txt, 1.txt, 2.txt and 2 more, none of them activations",
    "a folder of four notes": "holds 0.txt, 1.txt, 2.txt and 1 more, none of them activations",
    "a folder of three notes": "holds 0.txt, 1.txt, 2.txt, none of them activations",
    "a model by its architecture": "is a model, GPT2LMHeadModel",
    "a report": "is what a verb reported", "a model with weights": "is a model, gpt2", "a run": "is a run of train",
    "an SAE": "is an SAE", "an SAE of dictionary_learning": "is an SAE",
}  # fmt: skip


def zarr_with(name, content):
    """A zarr one of whose chunks is something else, or gone."""
    def make(folder):
        chunk = zarr(folder / "d", ROWS) / name
        chunk.write_text(content) if content else chunk.unlink()
        return folder / "d"

    return make


BAD = {
    # zarr
    "a zarr without a shape": text("d/.zarray", "{}", "d"), "a zarr of no kind": text("d/zarr.json", "{}", "d"),
    "a zarr that is no JSON": text("d/zarr.json", "{", "d"), "a zarr with a chunk missing": zarr_with("1.0", ""),
    "an empty group": text("d/.zgroup", '{"zarr_format": 2}', "d"),
    "a zarr of several": lambda f: zarr_group(f / "g", a=ROWS, b=ROWS),
    "a zarr with a short chunk": zarr_with("2.0", "abc"),
    # arrays that are none of activations
    "0-D": npy(np.float32(3)), "1-D": npy(ROWS[:, 0]), "4-D": npy(X[None]), "empty": npy(ROWS[:0]),
    "no width": npy(ROWS[:, :0]), "integers": npy(IDS), "booleans": npy(MASK), "complex": npy(ROWS.astype(complex)),
    "strings": npy(ROWS[:20].astype(str)), "dates": npy(IDS.astype("datetime64[s]")), "bits": npy(bits(ROWS)),
    "records": npy(np.zeros(9, [("a", "f4"), ("b", "i4")])), "3-D, empty": npy(X[:, :0]),
    # numbers
    "nan": npy(nan(ROWS)), "nan 3-D": npy(nan(X)), "infinity": npz(a=nan(ROWS, np.inf)),
    "infinity, float16": npy(nan(ROWS, np.inf).astype(np.float16)), "nan in safetensors": tensors(a=nan(ROWS)),
    "nan in Parquet": pq({"v": nan(ROWS).tolist()}), "nan in a table": table({"v": nan(ROWS).tolist()}, parts=(240,)),
    "constant": npy(0 * ROWS + 1), "zeros": tensors(a=0 * ROWS), "constant 3-D": npz(a=0 * X + 2),
    # what lies beside does not fit
    "mask of another shape": npy(X, mask=MASK[:3]), "mask that leaves nothing": npy(X, mask=0 * MASK),
    "lengths that are too long": npy(X, lengths=LENGTHS + 5), "lengths below zero": npy(X, lengths=LENGTHS - 5),
    "lengths that do not add up": npz(a=ROWS, lengths=LENGTHS), "ids of another shape": npz(a=ROWS, token_ids=IDS),
    "too few ids": npz(a=ROWS, token_ids=FLAT_IDS[:-1]), "too few ids in safetensors": tensors(a=X, ids=IDS[:, 1:]),
    # several, or none of that name
    "several in npz": npz(a=X, b=X), "several in safetensors": tensors(a=X, b=X), "only integers": npz(a=IDS),
    "no such name": npz("::c", a=X, b=X), "a name that is an integer array": npz("::ids", a=X, ids=IDS),
    "left out: nothing known": npz("::?without=last", a=X), "left out: no ids": npz("::?without=id=3", a=X),
    "left out: no sequences": npz("::?without=first", a=ROWS), "left out: everything": npz(
        "::?without=id=5", a=X, ids=0 * IDS + 5), "left out: norm of 0": npz("::?without=norm=0", a=X),
    # files that are not what they say
    "text as npy": text("x.npy"), "text as npz": text("x.npz"), "text as safetensors": text("x.safetensors"),
    "text as pt": text("x.pt"), "text as Parquet": text("x.parquet"), "text": text("x.txt"),
    "JSON": text("x.json", "{}"), "no ending": text("x"), "nothing in it": text("x.npy", ""),
    "cut npy": cut(npy(ROWS), 40), "cut safetensors": cut(tensors(a=ROWS), 40),
    "cut npz": cut(lambda f: Path(npz(a=ROWS)(f)), 40),
    "cut Parquet": cut(pq({"v": ROWS.tolist()}), 40), "a pipe": a_pipe, "not there": lambda f: f / "none.npy",
    "objects": npz(a=np.array([[None]])), "an archive": text("x.zip"), "HDF5": text("x.h5"),
    "CSV": text("x.csv", "1,2"),
    # tables
    "column missing": pq({"text": ["a", "b"]}), "integers in Parquet": pq({"ids": IDS.tolist()}),
    "several columns": pq({"a": ROWS.tolist(), "b": ROWS.tolist()}), "no rows": pq({"v": pyarrow.array([], FLOATS)}),
    "rows missing": table({"acts": [None, *X[1:].tolist()]}),
    "numbers missing": table({"acts": [[[None] * D]] + X[1:].tolist()}),
    "ragged widths": table({"acts": [part[:, : 2 + i % 2].tolist() for i, part in enumerate(X)]}),
    "ids of other lengths": table({"acts": X.tolist(), "input_ids": IDS[:, 1:].tolist()}),
    "state.json missing its file": without("data-00001.arrow"), "state.json gone": without("state.json"),
    "state.json damaged": text("a/state.json", "{", "a"),
    "state.json of another kind": text("a/state.json", "[1]", "a"), "files elsewhere": elsewhere,
    "a split is not named": splits, "no such split": lambda f: f"{splits(f)}::validation",
    "no such column": lambda f: f"{splits(f)}::train/x",
    # folders
    **FOREIGN,
    "shards of several widths": several(a=ROWS, b=ROWS[:, :4]), "shards of two kinds": several(a=ROWS, npz=ROWS),
    "shards of two types": several(a=ROWS, b=ROWS.astype(np.float16)), "a shard of integers": several(a=ROWS, b=IDS),
    "a bad shard": lambda f: text("b.npy")(f) and several(a=ROWS)(f), "a pattern of nothing": lambda f: f / "*.npy",
    "a shard missing": damaged("shard missing"), "a shard cut": damaged("shard cut"),
    "a shard of other data": damaged("shard of other data"), "a damaged manifest": damaged("manifest"),
}  # fmt: skip
VERBS = {
    "train": ["train", "--config={config}", "--workdir={out}", "--config.data.path={path}", "--config.data.signal="],
    "diagnose": ["diagnose", "--activations={path}", "--workdir={out}", "--n_features=64", "--k=4"],
    "extract": ["extract", "--from={path}", "--out={out}"],
}
IN_THE_FILE = "row 7, dimension 2 is "


@pytest.mark.parametrize("name", BAD)
def test_a_bad_container_is_one_line_and_nothing_is_written(tmp_path, capsys, name):
    (tmp_path / "in").mkdir()
    path, before = BAD[name](tmp_path / "in"), sorted(tmp_path.rglob("*"))
    config = Path(__file__).parents[1] / "configs" / "synthetic.py"
    for verb, words in VERBS.items():
        code = cli.main([word.format(path=path, out=tmp_path / "out", config=config) for word in words])
        said = capsys.readouterr()
        assert code == 2, (verb, said.err)
        assert len(said.err.strip().splitlines()) == 1, (verb, said.err)
        assert said.out == "", verb
        assert sorted(tmp_path.rglob("*")) == before, verb
        assert CALLED.get(name, "") in said.err, (verb, said.err)
        if name.startswith(("nan", "infinity")):
            assert IN_THE_FILE in said.err, (verb, said.err)


def test_there_are_many():
    assert len(BAD) * len(VERBS) >= 200
