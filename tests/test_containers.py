"""Activations as people have them: every container gives the rows that NumPy counts, and where each comes from."""

import gc
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import tensorstore
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

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
    parquet,
    rows,
)  # fmt: skip
from sae_jax.activations import arrow, files, store, tokens
from sae_jax.activations import containers as containers_lib
from sae_jax.config import base
from sae_jax.errors import Refused
from sae_jax.models import sources


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
    ("lengths", "a length from 0 to 20 for each of 12 sequences"), ("ids", "token ids of the shape"),
    ("widths", "4 of float32, 6 of float32"), ("kinds", "shards of one kind, not .npy, .npz"),
    ("split", "PATH::train; it has train, test"), ("missing", "1 rows are missing"),
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
    ("first=1", "first, id=N or norm=X"), ("norm=1.2.3", "first, id=N or norm=X, .* not norm=1.2.3"),
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


def test_of_a_folder_of_parquet_files_no_more_is_held_than_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "DECODED", 250_000)
    x = np.random.default_rng(0).normal(size=(16_000, 16))
    for number, part in enumerate(np.split(x, 16)):
        table = pyarrow.table({"acts": pyarrow.FixedSizeListArray.from_arrays(part.ravel(), 16)})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=250)
    held, most = pyarrow.total_allocated_bytes(), 0
    array = files.open_array(str(tmp_path))
    for start in np.random.default_rng(0).permutation(len(x) // 100) * 100:
        np.testing.assert_array_equal(array[start : start + 100], x[start : start + 100])
        most = max(most, pyarrow.total_allocated_bytes() - held)
    assert most < x.nbytes / 5
    del array
    gc.collect()
    assert pyarrow.total_allocated_bytes() <= held  # others may have let go of theirs


def test_small_parquet_files_are_each_unpacked_once(tmp_path, monkeypatch):
    for number in range(12):
        parquet(tmp_path / f"{number}.parquet", {"acts": list(np.full((50, 4), float(number)))})
    array, made = files.open_array(str(tmp_path)), []
    column = arrow._column
    monkeypatch.setattr(arrow, "_column", lambda *given, **named: made.append(1) or column(*given, **named))
    for start in np.random.default_rng(0).integers(0, 590, 100):
        np.testing.assert_array_equal(array[start : start + 10][:, 0], np.arange(start, start + 10) // 50)
    assert len(made) <= 12


def test_training_on_what_is_unpacked_whole_says_what_is_faster(tmp_path, monkeypatch, capsys):
    parquet(tmp_path / "x.parquet", {"acts": list(np.random.default_rng(0).normal(size=(4000, 4)))})
    config = base({"data.path": str(tmp_path / "x.parquet"), "train.batch_size": 64, "eval.n_tokens": 500})
    sources.open_source(config)
    assert not capsys.readouterr().err
    monkeypatch.setattr(arrow, "DECODED", 1000)
    sources.open_source(config)
    assert f"beware: of {config.data.path} every batch unpacks whole row groups" in capsys.readouterr().err


class Read:
    """An array that counts the numbers that are read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim, self.read = array, array.shape, array.dtype, array.ndim, 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        found = self.array[rows]
        self.read += found.size
        return found


@given(st.integers(1, 4), st.integers(1, 40), st.data())
def test_of_long_sequences_only_what_is_asked_for_is_read(count, context, data):
    x = np.random.default_rng(0).normal(size=(count, context, 3))
    start = data.draw(st.integers(0, count * context))
    stop = data.draw(st.integers(start, count * context))
    array = Read(x)
    np.testing.assert_array_equal(tokens.Flat(array)[start:stop], x.reshape(-1, 3)[start:stop])
    assert array.read <= 3 * (stop - start) * 3  # whole sequences, where there are some


def test_a_long_sequence_in_a_file_is_read_in_slices(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 50, 6)).astype(np.float32)
    safetensors.numpy.save_file({"acts": x}, tmp_path / "x.safetensors")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "z")}}
    whole = tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=x.shape).result()
    whole.write(x).result()
    for name in ("x.safetensors", "z"):
        array = files.open_array(str(tmp_path / name))
        for start, stop in ((0, 7), (43, 57), (50, 60), (99, 100), (5, 5), (0, 100)):
            np.testing.assert_array_equal(array[start:stop], x.reshape(-1, 6)[start:stop])


def test_rows_far_apart_are_read_without_what_lies_between():
    x, kept = np.random.default_rng(0).normal(size=(10_000, 2)), np.array([0, 3, 40, 4000, 4002, 9999])
    array = Read(x)
    found = tokens.Selected(array, kept)
    np.testing.assert_array_equal(found[:], x[kept])
    assert array.read < 100 * 2
    np.testing.assert_array_equal(found.places(1, 6).position, kept[1:])


def test_more_shards_than_a_shell_lets_one_open(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 3, 4)).astype(np.float32)
    for number, part in enumerate(x):
        np.save(tmp_path / f"{number}.npy", part)
        np.save(tmp_path / f"{number}.token_ids.npy", np.arange(3))
    code = (
        f"import numpy as np; from sae_jax.activations import files; a = files.open_array({str(tmp_path)!r}); "
        "print(a.shape, float(np.abs(a[:]).sum()))"
    )
    run = partial(subprocess.run, capture_output=True, text=True, timeout=120, env=os.environ)
    soft = run(["bash", "-c", f'ulimit -Sn 128; {sys.executable} -c "{code}"'])
    assert soft.stdout == f"(600, 4) {float(np.abs(x.reshape(-1, 4)).sum())}\n", soft.stderr
    hard = run(["bash", "-c", f'ulimit -n 128; {sys.executable} -c "{code}"'])
    assert "of 200 could be opened, under the limit of open files" in hard.stderr


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


def assert_rows(array, x, known):
    """Any stretch of rows, with its places."""
    for start, stop in itertools.combinations(range(len(x) + 1), 2):
        np.testing.assert_array_equal(array[start:stop], x[start:stop])
        for found, wanted in zip(tokens.places(array, start, stop), known, strict=True):
            np.testing.assert_array_equal(found, wanted[start:stop])
    assert array[3:3].shape == array[5:2].shape == (0, x.shape[1])
    assert array[3:3].dtype == x.dtype


def test_sequences_are_counted_on_from_shard_to_shard():
    """The last of a shard is one token long, a mask leaves nothing of another, the last shard begins with one token."""
    x, ids = np.random.default_rng(0).normal(size=(15, 2)), np.arange(50, 65)
    parts = [
        tokens.Matrix(x[:4], ids[:4], [3, 1]), tokens.Selected(tokens.Matrix(x[:2], ids[:2], [2]), np.zeros(0, int)),
        tokens.Flat(x[4:10].reshape(2, 3, 2), ids[4:10]), tokens.Matrix(x[10:], ids[10:], [1, 4]),
    ]  # fmt: skip
    array = tokens.Joined(parts)
    assert array.known
    sequence = np.array([0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 5, 5, 5, 5])
    assert_rows(array, x, (ids, sequence, np.array([0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 3])))
    chosen = np.array([1, 3, 4, 9, 10, 14])
    assert_rows(tokens.Selected(array, chosen), x[chosen], (ids[chosen], sequence[chosen], [1, 0, 0, 2, 0, 3]))


@pytest.mark.parametrize(("beside", "said"), [
    ({"lengths": [4, 6]}, "lengths that add up to 9 tokens, not to 10"),
    ({"token_ids": np.arange(8)}, "a token id for each of 9 tokens, not 8"),
    ({"lengths": [4, 5], "token_ids": np.arange(10)}, "a token id for each of 9 tokens, not 10"),
])
def test_what_is_beside_a_matrix_is_as_long_as_it_is(beside, said):
    with pytest.raises(tokens.Unfit, match=said):
        tokens.Matrix(np.zeros((9, 2)), **beside)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_where_one_shard_knows_no_sequences_rows_are_counted_through(first):
    x, ids = np.random.default_rng(0).normal(size=(12, 2)), np.arange(50, 55)
    parts = [tokens.Matrix(x[:5], ids, [2, 3]), x[5:9], x[9:]]
    parts = parts[first:] + parts[:first]
    whole = np.concatenate([part[:] for part in parts])
    kept = np.concatenate([ids if isinstance(part, tokens.Matrix) else np.full(len(part), -1) for part in parts])
    array = tokens.Joined(parts)
    assert not array.known
    assert_rows(array, whole, (kept, np.full(12, -1), np.arange(12)))
    with pytest.raises(tokens.Unfit, match="token ids beside"):
        tokens.without(array, "id=52")


@pytest.mark.parametrize(("multiple", "left"), [("0.5", [0, 4]), ("1", [0, 1, 4, 5]), ("1.5", [0, 1, 2, 4, 5])])
def test_a_norm_just_as_large_as_the_multiple_is_kept(multiple, left):
    """The median is 2: zeros do not count."""
    x = np.array([[0, 1], [2, 0], [3, 0], [0, 4000], [0, 0], [2, 0]], np.float32)
    chosen = tokens.without(x, f"norm={multiple}")
    np.testing.assert_array_equal(chosen[:], x[left])
    np.testing.assert_array_equal(chosen.places(0, len(left)).position, left)


@pytest.mark.parametrize("lengths", [[20, 0, 7], [0, 1, 20], [0, 0, 1]])
@pytest.mark.parametrize("masked", [False, True])
def test_sequences_may_be_empty_and_have_a_mask_as_well(tmp_path, x, lengths, masked):
    mask = np.arange(T) % 3 != 1 if masked else np.ones(T, bool)
    beside = {"mask": 2 * np.tile(mask, (3, 1))} if masked else {}
    np.savez(tmp_path / "x.npz", acts=x[:3], lengths=lengths, **beside)
    left = (np.arange(T) < np.array(lengths)[:, None]) & mask
    found, places = opened(tmp_path / "x.npz")
    np.testing.assert_array_equal(found, x[:3][left])
    np.testing.assert_array_equal(places["sequence_id"], np.nonzero(left)[0])
    np.testing.assert_array_equal(places["position"], np.nonzero(left)[1])


def test_one_sequence_one_number_and_nothing_are_arrays_too(tmp_path, x):
    np.savez(tmp_path / "x.npz", acts=x[:1], lengths=[7], nothing=np.zeros(0), scale=np.float64(3))
    np.testing.assert_array_equal(opened(tmp_path / "x.npz")[0], x[0, :7])
    np.save(tmp_path / "thin.npy", x[0, :, :1])
    np.testing.assert_array_equal(opened(tmp_path / "thin.npy")[0], x[0, :, :1])


@pytest.mark.parametrize(("name", "there", "beside"), [
    ("x_mask.npy", ["x.npy"], True), ("x.token_ids.npy", ["x.npy"], True), ("x_mask.npy", [], False),
    ("x.npy", ["x_mask.npy"], False), ("x_mask.npz", ["x.npy"], False), ("xmask.npy", ["x.npy"], False),
    ("x_y_lengths.npy", ["x.npy"], False), ("x_y_lengths.npy", ["x_y.npy"], True),
])  # fmt: skip
def test_a_file_is_beside_another_by_its_whole_name(tmp_path, name, there, beside):
    for one in there:
        (tmp_path / one).touch()
    assert containers_lib.is_beside(tmp_path / name) == beside


@pytest.mark.parametrize(("count", "fits"), [(409_600 - 128, True), (409_601 - 128, False)])
def test_a_packed_file_may_grow_a_hundredfold_and_a_small_one_as_if_it_had_4096_bytes(tmp_path, count, fits):
    np.savez_compressed(tmp_path / "x.npz", np.zeros((count, 1), np.int8))
    found = containers_lib._members(tmp_path / "x.npz")
    if fits:
        assert next(found)[1].shape == (count, 1)
    else:
        with pytest.raises(tokens.Unfit, match="arr_0 is 409601 bytes packed into"):
            next(found)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", ["packed.npz", "x.npy", "x_mask.npy"])
def test_nothing_is_unpickled_wherever_it_lies(tmp_path, x, name):
    np.save(tmp_path / "x.npy", x)
    if name == "packed.npz":
        np.savez_compressed(tmp_path / name, np.array([[Trap(), 1.0]], dtype=object))
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Refused, match="without objects"):
        files.open_array(str(tmp_path / (name if name == "packed.npz" else "x.npy")))


def test_eight_arrays_of_many_are_listed(tmp_path):
    np.savez(tmp_path / "x.npz", **{f"a{i}": np.zeros((3, 2 + i)) for i in range(10)})
    with pytest.raises(Refused) as error:
        files.open_array(str(tmp_path / "x.npz"))
    assert str(error.value).endswith("it holds " + ", ".join(f"a{i} (3, {2 + i})" for i in range(8)))


@pytest.mark.parametrize("write", [
    lambda f, columns: arrow_folder(f / "a", columns, parts=(1, 3, 2)),
    lambda f, columns: parquet(f / "x.parquet", columns, row_group_size=2),
])
@pytest.mark.parametrize("lengths", [[1, 4, 3, 2, 1, 2], [1, 4, 0, 0, 6, 2], [0, 0, 4, 6, 3, 0]])
def test_any_stretch_of_a_table_is_read_and_other_columns_are_let_be(tmp_path, write, lengths):
    """Structures, lists of them, encoded text, and a mask of booleans; one batch is one token, another none."""
    x = np.random.default_rng(0).normal(size=(13, 3))
    ends = np.cumsum(lengths)[:-1]
    some = {"a": 1, "b": "text"}
    mask = np.arange(13) % 5 != 2
    array = files.open_array(str(write(tmp_path, {
        "about": [some] * 6, "all": [[some]] * 6, "label": pyarrow.array(["x", "y"] * 3).dictionary_encode(),
        "acts": pyarrow.array([part.tolist() for part in np.split(x, ends)]),
        "mask": pyarrow.array([part.tolist() for part in np.split(mask, ends)]),
    })))  # fmt: skip
    assert array.facts == {"hook": "acts"}
    sequence, position = np.repeat(np.arange(6), lengths), np.concatenate([np.arange(n) for n in lengths])
    assert_rows(array, x[mask], (np.full(mask.sum(), -1), sequence[mask], position[mask]))
    inner = array._array
    assert_rows(inner, x, (np.full(13, -1), sequence, position))
    assert inner[0:0].shape == inner[13:13].shape == (0, 3)


@pytest.mark.parametrize(("count", "length", "context"), [(6, 4, {"context": 4}), (1, 9, {"context": 9})])
def test_the_length_that_all_sequences_have_is_a_fact(tmp_path, count, length, context):
    columns = {"resid": np.ones((count, length, 2)).tolist(), "text": ["x"] * count}
    assert files.open_array(str(arrow_folder(tmp_path / "a", columns, (count,)))).facts == {"hook": "resid", **context}
    columns = {"resid": np.ones((count, 2)).tolist()}
    assert files.open_array(str(arrow_folder(tmp_path / "b", columns, (count,)))).facts == {"hook": "resid"}


@pytest.mark.parametrize(("columns", "said"), [
    ({"a": [[[1.0]] * 2, [[1.0]] * 3], "ids": [[1, 2, 3], [1, 2]]}, "as many ids as tokens in every row"),
    ({"a": [[[1.0]] * 2, [[1.0]] * 3], "mask": [[1, 1, 1], [1, 1]]}, "as many mask as tokens in every row"),
    ({"a": [[1.0], [2.0]], "ids": [[1], [2]]}, "as many ids as tokens in every row"),
    ({"a": [[[1.0, 2.0]]] * 2 + [[[1.0, 2.0, 3.0]]] * 2}, "tokens of one width, not of 2 and 3"),
    ({"a": [[[1.0]] * 2] * 2, "ids": [[1, None]] * 2}, "1 numbers are missing"),
])  # fmt: skip
def test_rows_of_a_table_that_do_not_fit_together_are_refused(tmp_path, columns, said):
    path = arrow_folder(tmp_path / "a", columns, parts=[1] * len(columns["a"]))
    with pytest.raises(Refused) as error:
        files.open_array(str(path))
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["", "::acts", "::train", "::train/acts"])
def test_the_only_split_need_not_be_named(tmp_path, x, name):
    arrow_folder(tmp_path / "d" / "train", {"acts": x.tolist(), "other": (-x).tolist()} if "acts" in name else
                 {"acts": x.tolist()})  # fmt: skip
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    np.testing.assert_array_equal(files.open_array(f"{tmp_path}/d{name}")[:], rows(x))


def test_a_split_lies_in_its_folder(tmp_path, x):
    arrow_folder(tmp_path / "other", {"acts": x.tolist()})
    arrow_folder(tmp_path / "d" / "train", {"acts": x.tolist()})
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["../other", "train"]}))
    with pytest.raises(Refused, match="one of its splits"):
        files.open_array(f"{tmp_path}/d::../other/acts")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_places_in_a_dataset_are_those_of_any_rows(tmp_path, dtype):
    """In chunks of two rows."""
    x, lengths = np.random.default_rng(0).normal(size=(2050, 3)).astype(np.float32), [1, 1023, 1025, 1]
    np.savez(tmp_path / "x.npz", a=x, lengths=lengths, ids=np.arange(2050) % 97)
    array = files.Dataset(store.import_file(str(tmp_path / "x.npz"), str(tmp_path / "data"), dtype))
    assert array.known
    sequence, position = np.repeat(np.arange(4), lengths), np.concatenate([np.arange(n) for n in lengths])
    for start, stop in ((0, 1), (0, 2050), (1, 2), (3, 8), (4, 7), (1023, 1026), (2047, 2050), (2049, 2050)):
        found = array.places(start, stop)
        for one, wanted in zip(found, (np.arange(2050) % 97, sequence, position), strict=True):
            np.testing.assert_array_equal(one, wanted[start:stop])
    np.save(tmp_path / "y.npy", x)
    assert not files.Dataset(store.import_file(str(tmp_path / "y.npy"), str(tmp_path / "data"))).known


@pytest.mark.parametrize(("count", "width", "blocks"), [
    (700, 5, [(0, 700)]), (70, 20_000, [(i * 69 // 63, 1) for i in range(64)]), (100, 300, [(0, 54), (46, 54)]),
])  # fmt: skip
def test_a_small_file_is_known_again_by_all_of_it_and_a_wide_one_by_single_rows(tmp_path, count, width, blocks):
    x = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    digest = hashlib.sha256(b"".join(x[start : start + rows].tobytes() for start, rows in blocks))
    assert files.open_chunks(str(tmp_path / "x.npy")).identity["sampled_sha256"] == digest.hexdigest()


@pytest.mark.parametrize(("count", "said"), [
    (0, ""), (1, "; there is 0"), (5, "; there is 0, 1, 2, 3, 4"), (6, "; there is 0, 1, 2, 3, 4, …"),
])
def test_up_to_five_files_that_could_be_meant_are_named(tmp_path, count, said):
    for number in range(count):
        np.save(tmp_path / f"{number}.npy", np.ones((2, 2)))
    (tmp_path / "notes.txt").touch()
    found = files.there(epath.Path(tmp_path) / "none" / "x.npy")
    assert found.replace(f"{tmp_path}/", "").replace(".npy", "") == said
    assert files.there(epath.Path(tmp_path) / "notes.txt" / "x.npy") == ""


def test_two_shards_beside_notes_and_a_name_with_colons_are_read(tmp_path, x):
    folder = tmp_path / "a::b"
    folder.mkdir()
    for number, part in enumerate((rows(x)[:100], rows(x)[100:])):
        np.save(folder / f"{number}.npy", part)
    (folder / "notes.txt").write_text("of no matter")
    np.testing.assert_array_equal(opened(folder)[0], rows(x))
    np.testing.assert_array_equal(opened(folder / "1.npy")[0], rows(x)[100:])
