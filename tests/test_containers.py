"""Activations as people have them: every container gives the rows that NumPy counts, and where each comes from."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.flax import save_file

import sae_jax
from sae_jax.activations import files, store, tokens
from sae_jax.errors import Refused

N, T, D = 12, 20, 6
LENGTHS = np.array([10, 20, 7, 5, 1, 20, 13, 2, 19, 20, 11, 3])
MASK = np.arange(T) < LENGTHS[:, None]


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32)


IDS = np.arange(N * T).reshape(N, T) % 97
FLAT = {"token_id": IDS.ravel(), "sequence_id": np.repeat(np.arange(N), T), "position": np.tile(np.arange(T), N)}
REAL = {name: values[MASK.ravel()] for name, values in FLAT.items()}
NO_IDS = REAL | {"token_id": np.full(MASK.sum(), -1)}
UNKNOWN = {"token_id": np.full(N * T, -1)}


def opened(path):
    array = files.open_array(str(path))
    x = np.concatenate([np.asarray(array[start : start + 17], np.float32) for start in range(0, len(array), 17)])
    whole = np.asarray(files.open_chunks(str(path)).tokens(0, len(array)), np.float32)
    np.testing.assert_array_equal(x, whole)
    return x, tokens.places(array, 0, len(array))._asdict()


def rows(x):
    return x.reshape(-1, D)


def torch_save(value, path):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in value.items()} if isinstance(value, dict)
               else torch.from_numpy(value), path)  # fmt: skip


def shards(save, ending):
    def make(folder, x):
        (folder / "s").mkdir()
        for number, part in enumerate(np.split(rows(x), [50, 60, 61, 200])):
            save(folder / "s" / f"part_{number * 3}{ending}", part)
        return folder / "s"

    return make


def arrow_folder(folder, columns, parts=(5, 4, 3)):
    folder.mkdir(parents=True)
    names, start = [], 0
    table = pyarrow.table(columns)
    for number, count in enumerate(parts):
        names.append({"filename": f"data-{number:05d}.arrow"})
        with pyarrow.ipc.new_stream(folder / names[-1]["filename"], table.schema) as writer:
            writer.write_table(table.slice(start, count), max_chunksize=2)
        start += count
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    return folder


def sequences(x, lengths=LENGTHS):
    return [part[:length].tolist() for part, length in zip(x, lengths, strict=True)]


FLOATS = pyarrow.list_(pyarrow.list_(pyarrow.float32()))


def ragged(x):
    return {"acts": pyarrow.array(sequences(x), FLOATS), "input_ids": pyarrow.array(sequences(IDS))}


def parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def saved(save, name):
    def make(folder, x):
        save(folder / name, x)
        return folder / name

    return make


def npz(**beside):
    return lambda path, x: np.savez(path, acts=x, **beside)


def beside(name, values):
    def make(folder, x):
        np.save(folder / "x.npy", x)
        np.save(folder / f"x{name}.npy", values)
        return folder / "x.npy"

    return make


def dictionary(folder, x):
    for split in ("train", "test"):
        arrow_folder(folder / "d" / split, ragged(x if split == "train" else -x))
    (folder / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return f"{folder}/d::train"


def named(path, name):
    return lambda folder, x: f"{path(folder, x)}::{name}"


def bits(x):
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)


HALF = "bfloat16"
# name → how it is made, the tokens that are there (all, or those of the mask), what is known of them.
TABLE = {
    "npy": (saved(lambda p, x: np.save(p, rows(x)), "x.npy"), None, UNKNOWN),
    "npy float64": (saved(lambda p, x: np.save(p, rows(x).astype(np.float64)), "x.npy"), None, UNKNOWN),
    "npy big-endian": (saved(lambda p, x: np.save(p, rows(x).astype(">f4")), "x.npy"), None, UNKNOWN),
    "npy Fortran": (saved(lambda p, x: np.save(p, np.asfortranarray(rows(x))), "x.npy"), None, UNKNOWN),
    "npy bfloat16": (saved(lambda p, x: np.save(p, np.asarray(jnp.asarray(rows(x), HALF))), "x.npy"), HALF, UNKNOWN),
    "npy bits": (named(saved(lambda p, x: np.save(p, bits(rows(x))), "x.npy"), "@bfloat16"), HALF, UNKNOWN),
    "npy 3-D": (saved(np.save, "x.npy"), None, FLAT | UNKNOWN),
    "npy 3-D Fortran": (saved(lambda p, x: np.save(p, np.asfortranarray(x)), "x.npy"), None, FLAT | UNKNOWN),
    "npy 3-D bfloat16": (saved(lambda p, x: np.save(p, x.astype(HALF)), "x.npy"), HALF, FLAT | UNKNOWN),
    "npy 3-D, a mask beside": (beside(".mask", MASK), MASK, NO_IDS),
    "npy 3-D, an attention mask": (beside("_attention_mask", MASK.astype(int)), MASK, NO_IDS),
    "npy 3-D, lengths beside": (beside("_lengths", LENGTHS), MASK, NO_IDS),
    "npy 3-D, token ids beside": (beside(".token_ids", IDS), None, FLAT),
    "npz": (saved(lambda p, x: np.savez(p, rows(x)), "x.npz"), None, UNKNOWN),
    "npz 3-D, token ids": (saved(npz(token_ids=IDS), "x.npz"), None, FLAT),
    "npz 3-D, ids and mask": (saved(npz(input_ids=IDS, attention_mask=MASK), "x.npz"), MASK, REAL),
    "npz 3-D, ids and lengths": (saved(npz(tokens=IDS, lengths=LENGTHS), "x.npz"), MASK, REAL),
    "npz compressed": (saved(lambda p, x: np.savez_compressed(p, acts=x, ids=IDS), "x.npz"), None, FLAT),
    "npz one of several": (
        named(saved(lambda p, x: np.savez(p, resid=x, mlp=-x, input_ids=IDS), "x.npz"), "resid"), None, FLAT),
    "npz 2-D, token ids": (saved(lambda p, x: np.savez(p, a=rows(x), token_ids=IDS.ravel()), "x.npz"), None,
                           {"token_id": FLAT["token_id"]}),
    "npz 2-D, lengths": (
        saved(lambda p, x: np.savez(p, a=x[MASK], lengths=LENGTHS, token_ids=IDS[MASK]), "x.npz"), MASK, REAL),
    "npz bits": (named(saved(lambda p, x: np.savez(p, a=bits(x), b=IDS), "x.npz"), "a@bfloat16"), HALF, FLAT | UNKNOWN),
    "safetensors": (saved(lambda p, x: save_file({"a": jnp.asarray(rows(x))}, p), "x.safetensors"), None, UNKNOWN),
    "safetensors bfloat16": (
        saved(lambda p, x: save_file({"a": jnp.asarray(rows(x), HALF)}, p), "x.safetensors"), HALF, UNKNOWN),
    "safetensors 3-D, ids and mask": (
        saved(lambda p, x: save_file(
            {"a": jnp.asarray(x), "input_ids": jnp.asarray(IDS), "mask": jnp.asarray(MASK)}, p
        ), "x.safetensors"), MASK, REAL),
    "safetensors one of several": (named(
        saved(lambda p, x: save_file({"a": jnp.asarray(x), "b": -jnp.asarray(x)}, p), "x.safetensors"), "a"),
        None, FLAT | UNKNOWN),
    "pt": (saved(lambda p, x: torch_save(rows(x), p), "x.pt"), None, UNKNOWN),
    "pt 3-D": (saved(lambda p, x: torch_save(x, p), "x.pt"), None, FLAT | UNKNOWN),
    "pt 3-D, ids and mask": (
        saved(lambda p, x: torch_save({"acts": x, "input_ids": IDS, "attention_mask": MASK}, p), "x.pt"), MASK, REAL),
    "pt one of several": (
        named(saved(lambda p, x: torch_save({"a": x, "b": -x}, p), "x.pt"), "a"), None, FLAT | UNKNOWN),
    "folder of npy": (shards(lambda p, x: np.save(p, x), ".npy"), None, UNKNOWN),
    "folder of safetensors": (
        shards(lambda p, x: save_file({"a": jnp.asarray(x)}, p), ".safetensors"), None, UNKNOWN),
    "folder of pt": (shards(lambda p, x: torch_save(np.array(x), p), ".pt"), None, UNKNOWN),
    "folder of parquet": (shards(lambda p, x: parquet(p, {"x": x.tolist()}), ".parquet"), None, UNKNOWN),
    "pattern of npy": (lambda f, x: shards(lambda p, x: np.save(p, x), ".npy")(f, x) / "part_*.npy", None, UNKNOWN),
    "save_to_disk": (lambda f, x: arrow_folder(f / "a", ragged(x)), MASK, REAL),
    "save_to_disk, vectors": (
        lambda f, x: arrow_folder(f / "a", {"v": rows(x).tolist(), "input_ids": IDS.ravel()}, (100, 140)), None,
        {"token_id": FLAT["token_id"]}),
    "save_to_disk, padded": (
        lambda f, x: arrow_folder(f / "a", {"v": pyarrow.array(x.tolist(), FLOATS), "ids": IDS.tolist(),
                                            "attention_mask": MASK.astype(int).tolist()}), MASK, REAL),
    "save_to_disk, a column of several": (
        named(lambda f, x: arrow_folder(f / "a", {**ragged(x), "other": pyarrow.array(sequences(-x))}), "acts"),
        MASK, REAL),
    "DatasetDict": (dictionary, MASK, REAL),
    "parquet": (lambda f, x: parquet(f / "x.parquet", ragged(x), row_group_size=5), MASK, REAL),
    "parquet, vectors": (
        lambda f, x: parquet(
            f / "x.parquet", {"v": pyarrow.array(rows(x).tolist(), pyarrow.list_(pyarrow.float32(), D)),
                              "token_id": IDS.ravel()}, row_group_size=64), None,
        {"token_id": FLAT["token_id"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_rows_and_places_are_those_of_numpy(tmp_path, x, name):
    make, which, known = TABLE[name]
    found, places = opened(make(tmp_path, x))
    expected = x[which] if isinstance(which, np.ndarray) else rows(x)
    np.testing.assert_array_equal(found, expected.astype(HALF).astype(np.float32) if which is HALF else expected)
    for key, values in known.items():
        np.testing.assert_array_equal(places[key], values, err_msg=key)


def test_row_ten_of_sequences_of_different_lengths(tmp_path):
    """Lengths 10, 64, 33, 5: row 10 is the first of sequence 1, whatever the mean length."""
    lengths = [10, 64, 33, 5]
    x = np.random.default_rng(1).normal(size=(sum(lengths), 3)).astype(np.float32)
    parts = np.split(x, np.cumsum(lengths)[:-1])
    folder = arrow_folder(tmp_path / "a", {"acts": pyarrow.array([p.tolist() for p in parts], FLOATS)}, parts=(3, 1))
    data = files.open_chunks(store.import_file(str(folder), str(tmp_path / "data")))
    read = [data.example(i) for i in range(len(data))]
    np.testing.assert_array_equal(np.concatenate([r.x for r in read]), x)
    sequence, position = (np.concatenate([getattr(r, key) for r in read]) for key in ("sequence_id", "position"))
    assert (sequence[10], position[10]) == (1, 0)
    np.testing.assert_array_equal(sequence, np.repeat(np.arange(4), lengths))
    np.testing.assert_array_equal(position, np.concatenate([np.arange(n) for n in lengths]))


def bad(name):
    def make(folder, x):
        if name == "several":
            np.savez(folder / "x.npz", a=x, b=x)
            return folder / "x.npz"
        if name == "bits":
            np.save(folder / "x.npy", bits(x))
        if name == "mask":
            return beside(".mask", MASK[:3])(folder, x)
        if name == "lengths":
            return beside(".lengths", LENGTHS + 5)(folder, x)
        if name == "ids":
            np.savez(folder / "x.npz", a=rows(x), token_ids=IDS)
            return folder / "x.npz"
        if name == "widths":
            np.save(folder / "y.npy", rows(x)[:, :4])
            np.save(folder / "z.npy", rows(x))
            return folder
        if name == "kinds":
            np.save(folder / "y.npy", rows(x))
            np.savez(folder / "z.npz", rows(x))
            return folder
        if name == "split":
            return str(dictionary(folder, x)).removesuffix("::train")
        if name == "missing":
            return arrow_folder(folder / "a", {"acts": [None, *x[1:].tolist()]})
        if name == "ragged width":
            return arrow_folder(folder / "a", {"acts": [part[:, : 2 + i % 2].tolist() for i, part in enumerate(x)]})
        return folder / "x.npy"

    return make


@pytest.mark.parametrize(("name", "said"), [
    ("several", "PATH::NAME"), ("bits", "PATH::x@bfloat16"), ("mask", "a mask of the shape"),
    ("lengths", "a length from 0 to 20"), ("ids", "token ids of the shape"), ("widths", "4 of float32, 6 of float32"),
    ("kinds", "shards of one kind"), ("split", "PATH::train; it has train, test"), ("missing", "1 rows are missing"),
    ("ragged width", "one width"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(tmp_path, x, name, said):
    with pytest.raises(Refused, match="data.path") as error:
        files.open_chunks(str(bad(name)(tmp_path, x)))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["npz 3-D, ids and mask", "parquet", "folder of npy"])
def test_the_verbs_take_them(tmp_path, tiny, name):
    """`diagnose`, `extract --from` and `train` on one container of each kind."""
    x = np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32)
    make, which, _ = TABLE[name]
    path = str(make(tmp_path, x))
    expected = (x[which] if isinstance(which, np.ndarray) else rows(x)).astype(np.float64)
    folder = store.import_file(path, str(tmp_path / "data"))
    np.testing.assert_array_equal(files.open_chunks(folder).tokens(0, len(expected)), expected)
    tiny.data.signal, tiny.data.path, tiny.members, tiny.train.steps = "", path, {}, 2
    assert sae_jax.train(tiny, str(tmp_path / "run"))["d_model"] == D
    found = sae_jax.diagnose(path, n_features=64, k=4)
    gamma = np.linalg.norm(expected.mean(0)) / np.linalg.norm(expected.std(0))
    assert found["gamma_raw"] == pytest.approx(gamma, rel=1e-6)
    assert found["n_tokens"] == len(expected)


LEFT = {
    "first": lambda x, ids, first: ~first,
    "id=3,id=17": lambda x, ids, first: ~np.isin(ids, (3, 17)),
    "norm=1.3": lambda x, ids, first: np.linalg.norm(x, axis=1) <= 1.3 * np.median(np.linalg.norm(x, axis=1)),
    "first,id=3,norm=1.3": None,
}


@pytest.mark.parametrize("spec", LEFT)
@pytest.mark.parametrize("dataset", [False, True])
def test_tokens_are_left_out_by_place_by_id_and_by_norm(tmp_path, x, spec, dataset):
    """Padded on the left, so that the first token of a sequence is not the one at position 0."""
    mask = MASK[:, ::-1]
    np.savez(tmp_path / "x.npz", acts=x, token_ids=IDS, mask=mask)
    path = str(tmp_path / "x.npz")
    if dataset:
        path = store.import_file(path, str(tmp_path / "data"))
    kept, ids = x[mask].astype(np.float64), IDS[mask]
    sequence = np.repeat(np.arange(N), LENGTHS)
    first = np.r_[True, np.diff(sequence) > 0]
    if spec in ("first", "id=3,id=17", "norm=1.3"):
        left = LEFT[spec](kept, ids, first)
    else:
        left = LEFT["first"](kept, ids, first) & (ids != 3) & LEFT["norm=1.3"](kept, ids, first)
    found, places = opened(f"{path}::?without={spec}")
    np.testing.assert_array_equal(found, kept[left].astype(np.float32))
    np.testing.assert_array_equal(places["token_id"], ids[left])
    np.testing.assert_array_equal(places["sequence_id"], sequence[left])


@pytest.mark.parametrize(("spec", "said"), [
    ("last", "first, id=N or norm=X"), ("id=x", "first, id=N or norm=X"), ("norm=0", "tokens that are left"),
    ("first", "sequences beside"), ("id=3", "token ids beside"),
])  # fmt: skip
def test_what_cannot_be_left_out_is_refused(tmp_path, x, spec, said):
    np.save(tmp_path / "x.npy", rows(x))
    with pytest.raises(Refused, match=said):
        files.open_chunks(f"{tmp_path}/x.npy::?without={spec}")


def test_a_folder_that_holds_no_activations_is_said_to(tmp_path):
    (tmp_path / "notes.txt").write_text("not at all")
    with pytest.raises(Refused, match="a dataset folder"):
        store.import_file(str(tmp_path), str(tmp_path / "data"))
