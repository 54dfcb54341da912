"""Activations as people have them: every container gives the rows that NumPy counts, and where each comes from."""

import hashlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from experiments.trust import containers
from experiments.trust.containers import (
    FLOATS,
    IDS,
    LENGTHS,
    MASK,
    TABLE,
    D,
    N,
    T,
    arrow_folder,
    beside,
    bits,
    dictionary,
    rows,
)  # fmt: skip
from sae_jax.activations import files, store, tokens
from sae_jax.errors import Refused


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32)


def opened(path):
    array = files.open_array(str(path))
    x = np.concatenate([np.asarray(array[start : start + 17], np.float32) for start in range(0, len(array), 17)])
    whole = np.asarray(files.open_chunks(str(path)).tokens(0, len(array)), np.float32)
    np.testing.assert_array_equal(x, whole)
    return x, tokens.places(array, 0, len(array))._asdict()


@pytest.mark.parametrize("name", TABLE)
def test_rows_and_places_are_those_of_numpy(tmp_path, x, name):
    make, _, known = TABLE[name]
    found, places = opened(make(tmp_path, x))
    np.testing.assert_array_equal(found, containers.expected(name, x))
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
        if name == "ragged tokens":  # whose numbers would make whole tokens of the first one's width
            token = [1.0, 2.0, 3.0, 4.0]
            return arrow_folder(folder / "a", {"acts": [[token[:3], token[:2], token] for _ in range(6)]})
        return folder / "x.npy"

    return make


@pytest.mark.parametrize(("name", "said"), [
    ("several", "PATH::NAME"), ("bits", "PATH::x@bfloat16"), ("mask", "a mask of the shape"),
    ("lengths", "a length from 0 to 20"), ("ids", "token ids of the shape"), ("widths", "4 of float32, 6 of float32"),
    ("kinds", "shards of one kind"), ("split", "PATH::train; it has train, test"), ("missing", "1 rows are missing"),
    ("ragged width", "one width"), ("ragged tokens", "tokens of one width, not of 2 to 4"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(tmp_path, x, name, said):
    with pytest.raises(Refused, match="data.path") as error:
        files.open_chunks(str(bad(name)(tmp_path, x)))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", TABLE)
def test_extracting_keeps_every_row_and_where_it_comes_from(tmp_path, name):
    assert containers.row(name, tmp_path / "made", ("extract",))["extract"] == "equal"


@pytest.mark.parametrize("name", ["npz 3-D, ids and mask", "parquet", "folder of npy", "npy bits"])
def test_the_verbs_count_what_numpy_counts(tmp_path, name):
    """One container of each kind; all of them in experiments/trust/containers.py."""
    found = containers.row(name, tmp_path / "made")
    assert {found[verb] for verb in ("extract", "diagnose", "train")} == {"equal"}


def test_there_are_many_containers():
    assert len(TABLE) >= 60


LEFT = {
    "first": lambda x, ids, first: ~first,
    "id=3,id=17": lambda x, ids, first: ~np.isin(ids, (3, 17)),
    "norm=1.3": lambda x, ids, first: np.linalg.norm(x, axis=1) <= 1.3 * np.median(np.linalg.norm(x, axis=1)),
    "first,id=3,norm=1.3": None,
}


@pytest.mark.parametrize("spec", LEFT)
@pytest.mark.parametrize("dataset", [False, True])
def test_tokens_are_left_out_by_place_by_id_and_by_norm(tmp_path, x, spec, dataset, monkeypatch):
    """Padded on the left, so that the first token of a sequence is not the one at position 0."""
    monkeypatch.setattr(tokens, "BLOCK", 7)  # sequences go over from one block to the next
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


def test_places_of_rows_in_the_middle():
    ids = np.arange(100, 112)
    array = tokens.Matrix(np.zeros((12, 2)), ids, [5, 4, 3])
    found = array.places(3, 10)
    np.testing.assert_array_equal(found.token_id, ids[3:10])
    np.testing.assert_array_equal(found.sequence_id, [0, 0, 1, 1, 1, 1, 2])
    np.testing.assert_array_equal(found.position, [3, 4, 0, 1, 2, 3, 0])


def test_of_a_parquet_file_no_more_is_held_than_is_being_read(tmp_path):
    x = np.random.default_rng(0).normal(size=(20_000, 16))
    table = pyarrow.table({"acts": pyarrow.FixedSizeListArray.from_arrays(x.ravel(), 16)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=200)
    held, most = pyarrow.total_allocated_bytes(), 0
    array = files.open_array(str(tmp_path / "x.parquet"))
    for start in range(0, len(x), 1_000):
        np.testing.assert_array_equal(array[start : start + 1_000], x[start : start + 1_000])
        most = max(most, pyarrow.total_allocated_bytes() - held)
    assert most < x.nbytes / 5


@pytest.mark.parametrize(("columns", "said"), [
    ({"a": [[1.0]], "b": [[2.0]]}, "not a, b of a, b"), ({"a": [1], "b": ["x"]}, "not none of a, b"),
])
def test_the_columns_there_are_are_named(tmp_path, columns, said):
    with pytest.raises(Refused, match=said):
        files.open_array(str(arrow_folder(tmp_path / "a", columns)))


def test_a_column_of_records_beside_the_activations_is_no_matrix(tmp_path):
    table = pyarrow.table({"messages": [[{"score": 1.0}]], "acts": [[1.0, 2.0]]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    np.testing.assert_array_equal(files.open_array(str(tmp_path / "x.parquet"))[:], [[1.0, 2.0]])


def test_no_rows_are_no_rows():
    chosen = tokens.Selected(np.zeros((9, 2)), np.array([1, 4, 5]))
    assert chosen[3:3].shape == chosen[5:9].shape == (0, 2)
    assert all(len(part) == 0 for part in chosen.places(3, 3))


def test_a_large_file_is_known_again_by_64_blocks_of_64_kilobytes(tmp_path):
    """And by the same ones in every version: a run of before goes on only with the file that it knows."""
    x = np.random.default_rng(0).normal(size=(20_000, 128)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    digest = hashlib.sha256()
    for start in np.linspace(0, 20_000 - 128, 64).astype(int):
        digest.update(x[start : start + 128].tobytes())
    assert files.open_chunks(str(tmp_path / "x.npy")).identity["sampled_sha256"] == digest.hexdigest()


def test_a_plain_array_knows_no_sequences():
    assert not tokens.sequences(np.zeros((3, 2)))
    assert tokens.sequences(tokens.Matrix(np.zeros((3, 2)), lengths=[1, 2]))
