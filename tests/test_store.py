"""Datasets of activations: written once and bit by bit, through kills and full disks; damage is named."""

import hashlib
import json
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

import sae_jax
from sae_jax import cli
from sae_jax.activations import files, store, stored
from sae_jax.errors import Refused, RunFailed

D = 12


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 256 * D * 4 * 2)  # two chunks a shard


def stream(x, size=300, layers=(3, 7)):
    """What an extraction yields: layer L holds L·x."""

    def rows(start):
        for first in range(0, len(x), size):
            ids = np.arange(first, min(first + size, len(x)), dtype=np.int32)
            if first + size > start:
                part = x[first : first + size]
                yield first, {layer: store.Rows(layer * part, ids, ids // 9, ids % 9) for layer in layers}

    return rows


def make(tmp_path, x, layers=(3, 7), dtype="float32", facts=None):
    writers = {
        layer: store.Writer(
            store.folder_of(str(tmp_path), f"m{layer}"), D, {"layer": layer, **(facts or {})}, dtype
        ) for layer in layers
    }  # fmt: skip
    return store.write(writers, stream(x, layers=layers))


def everything(folder):
    """Every byte of the data, by shard, and the manifest."""
    chunks = files.open_chunks(folder)
    assert not chunks.damaged()
    shards = {path.name: path.read_bytes() for path in chunks._root.iterdir() if "array_record" in path.name}
    return shards, (chunks._root / store.MANIFEST).read_text()


def test_many_layers_in_one_pass_come_back_bit_by_bit_with_where_they_are_from(tmp_path, rng, small_shards):
    x = rng.normal(size=(2000, D)).astype(np.float32)
    folders = make(tmp_path, x)
    for layer, folder in folders.items():
        chunks = files.open_chunks(folder)
        assert (len(chunks), chunks.rows, chunks.d_model, chunks.n_tokens) == (7, 256, D, 1792)
        got = [chunks.example(i) for i in range(7)]
        np.testing.assert_array_equal(np.concatenate([rows.x for rows in got]), layer * x[:1792])
        np.testing.assert_array_equal(np.concatenate([rows.token_id for rows in got]), np.arange(1792))
        np.testing.assert_array_equal(np.concatenate([rows.position for rows in got]), np.arange(1792) % 9)
        np.testing.assert_array_equal(chunks.tokens(200, 900), layer * x[200:900])
        manifest = json.loads((chunks._root / store.MANIFEST).read_text())
        assert manifest["dropped_tokens"] == 2000 - 1792
        np.testing.assert_allclose(manifest["moments"]["raw"]["mean"], (layer * x[:1792]).mean(axis=0), atol=1e-5)
        expected = np.linalg.norm(x[:1792].mean(0)) / np.linalg.norm(x[:1792].std(0))
        assert manifest["gamma_raw"] == pytest.approx(expected, rel=1e-5)
        assert chunks.identity["layer"] == layer
        assert store.find(str(tmp_path), f"m{layer}") == folder


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-10)])
def test_half_precision_keeps_the_signal_as_far_as_its_bits_go(tmp_path, rng, small_shards, dtype, tolerance):
    x = (rng.normal(size=(1024, D)) + 100 * (np.arange(D) == 2)).astype(np.float32)
    folder = make(tmp_path, x, layers=(1,), dtype=dtype)[1]
    got = files.open_chunks(folder).tokens(0, 1024)
    assert got.dtype == np.float32
    if dtype == "bfloat16":
        np.testing.assert_array_equal(got, x.astype(ml_dtypes.bfloat16).astype(np.float32))
    else:  # z-scored: the error is of the size of the deviation, not of the mean of 100
        assert np.abs(got - x).max() < 5 * tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n_tokens", [512, 768, 1023, 1024, 1025])
def test_shards_of_every_kind_keep_every_whole_chunk_of_drifting_data(tmp_path, rng, monkeypatch, dtype, n_tokens):
    """Two chunks a shard. A dimension that stands still in the first shard moves in the second; all drift away."""
    monkeypatch.setattr(store, "SHARD_BYTES", 256 * D * np.dtype(stored.STORED[dtype]).itemsize * 2)
    x = rng.normal(size=(n_tokens, D)).astype(np.float32)
    x[:512, 3] = 7
    x[512:] += 11
    folder = make(tmp_path, x, layers=(1,), dtype=dtype)[1]
    chunks, whole = files.open_chunks(folder), n_tokens // 256 * 256
    assert chunks.n_tokens == whole
    assert len(chunks._shards) == -(-whole // 512)
    got = chunks.tokens(0, n_tokens)
    if dtype == "float32":
        np.testing.assert_array_equal(got, x[:whole])
    elif dtype == "bfloat16":
        np.testing.assert_array_equal(got, x[:whole].astype(ml_dtypes.bfloat16).astype(np.float32))
    else:  # 11 bits of at most 20 deviations
        np.testing.assert_allclose(got, x[:whole], atol=20 * 2**-11)


@pytest.mark.parametrize(("early", "late"), [(1e-6, 0.95), (1e4, 1e-4)])
def test_float16_that_would_lose_a_dimension_is_refused_at_its_shard(tmp_path, rng, small_shards, early, late):
    """Z-scored by the first shard, a dimension that wakes up is clipped, and one that falls asleep rounded away."""
    x = rng.normal(size=(2048, D)).astype(np.float32)
    x[:1024, 5] *= early
    x[1024:, 5] *= late
    with pytest.raises(RunFailed, match=r"tokens 1024 to 2048: dimension 5 varies by .* bfloat16 or float32"):
        make(tmp_path, x, layers=(1,), dtype="float16")
    folder = make(tmp_path, x, layers=(1,), dtype="bfloat16")[1]
    found = files.open_chunks(folder).tokens(1024, 2048)[:, 5]
    assert found.std() == pytest.approx(x[1024:, 5].std(), rel=1e-2)


@pytest.mark.parametrize(("share", "lost"), [(0.8, True), (1.25, False)])
def test_float16_is_refused_below_64_times_its_rounding_where_it_loses_most(tmp_path, rng, monkeypatch, share, lost):
    """Near zero its numbers lie 2^-24 of the first shard's deviation apart: they err by that over √12.

    Dimension 3 errs by more than dimension 5, but by less of what it varies; dimension 0 is nothing but zeros.
    """
    monkeypatch.setattr(store, "SHARD_BYTES", 256 * D * 2 * 2)
    x = np.tile(np.array([[1], [-1]], np.float32), (512, D))
    x[:, 0], x[:, 5] = 0, x[:, 5] * 2**-5
    for dimension, spread in ((3, 1), (5, 2**-6 if lost else 2**-5)):
        x[512:, dimension] = share * spread * 64 * 2**-24 / 12**0.5 * rng.normal(size=512)
    if lost:
        with pytest.raises(RunFailed, match="tokens 512 to 1024: dimension 5 varies by"):
            make(tmp_path, x, layers=(1,), dtype="float16")
        return
    found = files.open_chunks(make(tmp_path, x, layers=(1,), dtype="float16")[1]).tokens(0, 1024)
    np.testing.assert_array_equal(found[:, :3], x[:, :3])
    np.testing.assert_allclose(found[:, 3:6], x[:, 3:6], atol=2**-25, rtol=0)


@pytest.mark.parametrize(("beyond", "lost"), [(60, False), (70, True)])
def test_float16_is_refused_where_it_clips_more_than_a_1024th_of_the_mean(tmp_path, monkeypatch, beyond, lost):
    monkeypatch.setattr(store, "SHARD_BYTES", 256 * D * 2 * 2)
    x = np.tile(np.array([[1], [-1]], np.float32), (512, D))
    x[512:, 7] = 65504 + beyond
    if lost:
        with pytest.raises(RunFailed, match="dimension 7 varies by"):
            make(tmp_path, x, layers=(1,), dtype="float16")
        return
    found = files.open_chunks(make(tmp_path, x, layers=(1,), dtype="float16")[1]).tokens(0, 1024)
    np.testing.assert_array_equal(found[512:, 7], 65504)
    np.testing.assert_array_equal(found[:, :7], x[:, :7])


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_stream_that_breaks_off_goes_on_where_it_was(tmp_path, rng, small_shards, after):
    x = rng.normal(size=(2300, D)).astype(np.float32)
    whole = {layer: everything(folder) for layer, folder in make(tmp_path / "whole", x).items()}

    def breaks(start):
        for number, part in enumerate(stream(x)(start)):
            if number == after:
                raise KeyboardInterrupt
            yield part

    writers = {
        layer: store.Writer(store.folder_of(str(tmp_path / "cut"), f"m{layer}"), D, {"layer": layer})
        for layer in (3, 7)
    }
    with pytest.raises(KeyboardInterrupt):
        store.write(writers, breaks)
    assert store.find(str(tmp_path / "cut"), "m3") is None
    assert {layer: everything(folder) for layer, folder in make(tmp_path / "cut", x).items()} == whole


def test_a_half_written_dataset_of_something_else_is_begun_anew(tmp_path, rng, small_shards):
    old, new = (rng.normal(size=(1100, D)).astype(np.float32) for _ in range(2))
    writer = store.Writer(store.folder_of(str(tmp_path), "m1"), D, {"layer": 1, "text": "old"})
    writer.add(0, store.Rows(old, *(np.zeros(1100, np.int32) for _ in range(3))))
    assert writer.n_tokens == 1024
    folder = make(tmp_path, new, layers=(1,), facts={"text": "new"})[1]
    np.testing.assert_array_equal(files.open_chunks(folder).tokens(0, 1024), new[:1024])


def test_a_layer_that_was_ahead_when_writing_broke_off_waits_for_the_other(tmp_path, rng, small_shards):
    x = rng.normal(size=(2300, D)).astype(np.float32)
    whole = {layer: everything(folder) for layer, folder in make(tmp_path / "whole", x).items()}
    ahead = store.Writer(store.folder_of(str(tmp_path / "cut"), "m3"), D, {"layer": 3})
    for start, parts in stream(x[:1300])(0):
        ahead.add(start, parts[3])
    assert ahead.n_tokens == 1024
    assert {layer: everything(folder) for layer, folder in make(tmp_path / "cut", x).items()} == whole


def test_a_shard_lies_there_as_soon_as_it_is_full_and_is_one_chunk_at_least(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    x = rng.normal(size=(1024, D)).astype(np.float32)
    writer = store.Writer(store.folder_of(str(tmp_path), "m1"), D, {"layer": 1})
    for number in range(4):
        writer.add(256 * number, store.Rows(x[256 * number :][:256], *(np.arange(256) for _ in range(3))))
        assert writer.n_tokens == 256 * (number + 1)
    chunks = files.open_chunks(writer.finish())  # which nobody else was kept from
    assert [shard["chunks"] for shard in chunks._shards] == [1, 1, 1, 1]
    np.testing.assert_array_equal(chunks.tokens(0, 1024), x)


@pytest.mark.parametrize(("d_model", "dtype", "count"), [
    (1024, "float32", 128), (1024, "bfloat16", 256), (768, "float16", 341), (2**18, "float32", 1),
])  # fmt: skip
def test_a_shard_has_128_megabytes_of_whole_chunks(tmp_path, d_model, dtype, count):
    writer = store.Writer(store.folder_of(str(tmp_path), "m1"), d_model, {}, dtype)
    assert writer._chunks_per_shard == count


def test_nothing_is_left_of_a_longer_dataset_that_was_begun_before(tmp_path, rng, small_shards):
    x = rng.normal(size=(2300, D)).astype(np.float32)
    store.Writer(store.folder_of(str(tmp_path), "m1"), D, {"text": "old"}).add(
        0, store.Rows(x, *(np.zeros(2300, np.int32) for _ in range(3)))
    )
    names = lambda folder: sorted(path.name for path in Path(folder).iterdir())  # noqa: E731
    folder = make(tmp_path, x[:1100], layers=(1,))[1]
    assert names(folder) == names(make(tmp_path / "alone", x[:1100], layers=(1,))[1])
    assert sum("array_record" in name for name in names(folder)) == 2


def test_a_dataset_is_one_of_tfds_too(tmp_path, rng, small_shards):
    x = rng.normal(size=(1400, D)).astype(np.float32)
    folder = make(tmp_path, x, layers=(1,))[1]
    info = tfds.builder_from_directory(folder).info
    split, shards = info.splits["tokens"], sorted(Path(folder).glob("*array_record*"))
    assert (split.shard_lengths, split.num_bytes) == ([2, 2, 1], sum(path.stat().st_size for path in shards))
    assert info.disable_shuffling
    assert (info.features["x"].shape, info.features["position"].shape) == ((256, D), (256,))


KILLED = """
    import sys, time
    import numpy as np
    from sae_jax.activations import store
    store.SHARD_BYTES = 256 * 12 * 4
    x = np.random.default_rng(0).normal(size=(5000, 12)).astype(np.float32)
    def rows(start):
        for first in range(0, 5000, 100):
            ids = np.arange(first, first + 100, dtype=np.int32)
            if first + 100 > start:
                time.sleep(0.01)
                yield first, {layer: store.Rows(layer * x[first : first + 100], ids, ids, ids) for layer in (1, 2)}
    missing = [n for n in (1, 2) if not store.find(sys.argv[1], f"m{n}")]
    print("writing", flush=True)
    if missing:
        writers = {n: store.Writer(store.folder_of(sys.argv[1], f"m{n}"), 12, {"layer": n}) for n in missing}
        store.write(writers, lambda start: ((at, {n: part[n] for n in missing}) for at, part in rows(start)))
"""


def test_kill_9_at_any_moment_leaves_what_the_next_run_finishes(tmp_path, rng):
    def start(name):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    killed = 0
    for _ in range(4):
        with start("cut") as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            killed += process.wait() != 0
    assert killed
    for name in ("whole", "cut"):
        with start(name) as process:
            assert process.wait() == 0
    for n in (1, 2):
        folders = [str(store.folder_of(str(tmp_path / name), f"m{n}")) for name in ("whole", "cut")]
        assert everything(folders[0]) == everything(folders[1])


def test_a_disk_that_takes_no_more_is_one_line_and_keeps_whole_shards(tmp_path, rng, small_shards):
    """The kernel itself refuses to write on (RLIMIT_FSIZE), from the fifth shard on."""
    x = rng.normal(size=(2300, D)).astype(np.float32)
    whole = {layer: everything(folder) for layer, folder in make(tmp_path / "whole", x).items()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(start):
        for first, parts in stream(x)(start):
            if first == 1500:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            yield first, parts

    writers = {
        layer: store.Writer(store.folder_of(str(tmp_path / "full"), f"m{layer}"), D, {"layer": layer})
        for layer in (3, 7)
    }
    try:
        with pytest.raises(RunFailed, match="cannot write activations"):
            store.write(writers, fills)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    partial = store.folder_of(str(tmp_path / "full"), "m3").parent / f"{store.VERSION}.partial"
    assert len(json.loads((partial / store.MANIFEST).read_text())["shards"]) == 2
    assert {layer: everything(folder) for layer, folder in make(tmp_path / "full", x).items()} == whole


def test_activations_that_are_not_finite_stop_the_writing_with_their_token(tmp_path, rng, small_shards):
    x = rng.normal(size=(2300, D)).astype(np.float32)
    x[1500, 4] = np.inf
    with pytest.raises(RunFailed, match="token 1500"):
        make(tmp_path, x)


@pytest.mark.parametrize(
    ("damage", "error"), [("truncate", Refused), ("remove", Refused), ("other", Refused), ("flip", RunFailed)]
)
def test_a_damaged_shard_is_named(tmp_path, rng, small_shards, monkeypatch, capsys, damage, error):
    monkeypatch.setattr(stored, "HEAD_BYTES", 1000)
    x = rng.normal(size=(2300, D)).astype(np.float32)
    folder = make(tmp_path, x, layers=(1,))[1]
    path = next(p for p in store.epath.Path(folder).iterdir() if p.name.endswith("00002"))
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-100])
    elif damage == "remove":
        path.unlink()
    elif damage == "other":  # as long as the right one, and nothing wrong with it
        other = make(tmp_path / "other", x + 1, layers=(1,))[1]
        path.write_bytes((store.epath.Path(other) / path.name).read_bytes())
    else:
        data[5000] ^= 1
        path.write_bytes(data)
    with pytest.raises(error, match="00002"):
        files.open_chunks(folder).tokens(0, 2300)
    shown = [f"--config={Path(__file__).parents[1]}/configs/synthetic.py", f"--config.data.path={folder}"]
    assert cli.main(["train", *shown, f"--workdir={tmp_path}/run"]) == error.exit_code
    assert "00002" in capsys.readouterr().err
    # Nothing has been written yet when a diagnosis meets it.
    assert cli.main(["diagnose", f"--activations={folder}", f"--workdir={tmp_path}/w"]) == 2
    assert "00002" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
    if damage == "flip":
        assert files.open_chunks(folder).damaged() == [str(path)]


def test_a_flipped_bit_anywhere_is_an_error_or_changes_nothing(tmp_path, rng, small_shards, monkeypatch):
    monkeypatch.setattr(stored, "HEAD_BYTES", 0)  # the reader alone
    x = rng.normal(size=(600, D)).astype(np.float32)
    folder = make(tmp_path, x, layers=(1,))[1]
    path = next(p for p in store.epath.Path(folder).iterdir() if p.name.endswith("00000"))
    data = path.read_bytes()
    errors = []
    for at in rng.integers(25_000, size=60):  # where the data lie; the rest is padding
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(files.open_chunks(folder).tokens(0, 512), x[:512])
        except (Refused, RunFailed) as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert all(path.name in error for error in errors)


def test_what_is_no_dataset_lists_what_is_there(tmp_path, rng, small_shards):
    make(tmp_path, rng.normal(size=(600, D)).astype(np.float32))
    for wrong in ("", "activations/m4", f"activations/m4/{store.VERSION}"):
        with pytest.raises(Refused, match=r"there is .*m3.*m7"):
            files.open_chunks(str(tmp_path / wrong))


def test_a_file_and_the_dataset_imported_from_it_train_alike(tmp_path, rng, tiny, capsys):
    x = (rng.normal(size=(3000, 16)) + 2).astype(np.float32)
    np.save(tmp_path / "mine.npy", x)
    assert cli.main(["extract", f"--from={tmp_path}/mine.npy", f"--out={tmp_path}/data"]) == 0
    folder = capsys.readouterr().out.strip()
    reports = []
    for number, path in enumerate((str(tmp_path / "mine.npy"), folder)):
        tiny.data.signal, tiny.data.path = "", path
        reports.append(sae_jax.train(tiny, str(tmp_path / f"run{number}")))
    assert reports[0]["members"] == reports[1]["members"]
    before = {path: path.read_bytes() for path in Path(folder).iterdir()}
    assert cli.main(["extract", f"--from={tmp_path}/mine.npy", f"--out={tmp_path}/data"]) == 0
    assert capsys.readouterr().out.strip() == folder
    np.save(tmp_path / "mine.npy", x + 1)
    assert cli.main(["extract", f"--from={tmp_path}/mine.npy", f"--out={tmp_path}/data"]) == 2
    assert "not there yet" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path(folder).iterdir()} == before


def test_a_long_file_is_imported_with_where_every_row_is_from(tmp_path, rng):
    x, ids = rng.normal(size=(2250, 4, 3)).astype(np.float32), np.arange(9000).reshape(2250, 4) % 97
    np.savez(tmp_path / "my file.npz", acts=x, more=x, ids=ids)
    folder = store.import_file(f"{tmp_path}/my file.npz::acts", str(tmp_path / "data"))
    assert folder == str(tmp_path / "data/activations/my_file_acts/2.0.0")
    chunks = files.open_chunks(folder)
    rows = [chunks.example(i) for i in range(len(chunks))]
    known = x.reshape(9000, 3), ids.ravel(), np.arange(9000) // 4, np.arange(9000) % 4
    for found, wanted in zip(zip(*rows, strict=True), known, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_manifests_of_before_are_read_and_a_word_that_is_none_of_theirs_is_not(tmp_path, rng, dtype):
    """At first they had no checksum, then that of their sorted words."""
    folder = make(tmp_path, rng.normal(size=(600, D)).astype(np.float32), layers=(1,), dtype=dtype)[1]
    path, known = Path(folder) / store.MANIFEST, files.open_chunks(folder).tokens(0, 512)
    manifest = json.loads(path.read_text())
    seal = manifest.pop("checksum")
    sorted_words = json.dumps({key: manifest[key] for key in sorted(manifest)}, sort_keys=True)
    mixed = dict(sorted(manifest.items(), key=lambda item: item[0][::-1]))
    for before in (mixed, {**mixed, "checksum": hashlib.sha256(sorted_words.encode()).hexdigest()}):
        path.write_text(json.dumps(before))
        np.testing.assert_array_equal(files.open_chunks(folder).tokens(0, 512), known)
    for wrong in ({**mixed, "checksun": seal}, {**mixed, "checksum": seal}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(Refused, match="checksum is another"):
            files.open_chunks(folder)


def test_a_shard_is_known_by_its_first_64_kilobytes():
    data = np.random.default_rng(0).bytes(200_000)
    assert stored.head_of(data) == hashlib.sha256(data[:65_536]).hexdigest()


def test_what_is_wrong_with_a_shard_is_said(tmp_path, rng, small_shards):
    folder = make(tmp_path, rng.normal(size=(1100, D)).astype(np.float32), layers=(1,))[1]
    path = next(Path(folder).glob("*00001"))
    data = path.read_bytes()
    for damaged, said in (
        (data[:-100], f"a shard of {len(data)} bytes, not {len(data) - 100}"),
        (b"", f"a shard of {len(data)} bytes, not none"), (None, f"a shard of {len(data)} bytes, not none"),
        (data[:-70_000] + bytes(70_000), rf"shards as they were written; damaged: \S*/{path.name} \("),
    ):  # fmt: skip
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(Refused, match=said):
            files.open_chunks(folder)


@pytest.mark.parametrize("count", [5, 6])
def test_five_datasets_of_many_are_named(tmp_path, count):
    for number in range(count):
        stored.folder_of(str(tmp_path), f"m{number}").mkdir(parents=True)
        (stored.folder_of(str(tmp_path), f"m{number}") / stored.MANIFEST).touch()
    with pytest.raises(Refused) as error:
        stored.StoredChunks(str(tmp_path))
    named = ", ".join(f"{tmp_path}/activations/m{number}/2.0.0" for number in range(5))
    assert str(error.value).endswith(f"there is {named}")


def test_a_run_is_not_gone_on_with_on_other_data(tmp_path, rng, tiny):
    tiny.data.signal, tiny.data.path, tiny.train.steps = "", str(tmp_path / "x.npy"), 0
    np.save(tmp_path / "x.npy", rng.normal(size=(1000, 16)).astype(np.float32))
    sae_jax.train(tiny, str(tmp_path / "w"))
    np.save(tmp_path / "x.npy", rng.normal(size=(1000, 12)).astype(np.float32))
    with pytest.raises(Refused, match=r"of data with shape = \[1000, 16\], not \[1000, 12\]"):
        sae_jax.train(tiny, str(tmp_path / "w"))


def test_nor_on_another_file_of_the_same_shape_unless_it_was_begun_before_files_had_checksums(tmp_path, rng, tiny):
    path, known = tmp_path / "x.npy", tmp_path / "w/data.json"
    tiny.data.signal, tiny.data.path, tiny.train.steps = "", str(path), 0
    x = rng.normal(size=(1000, 16)).astype(np.float32)
    np.save(path, x)
    sae_jax.train(tiny, str(tmp_path / "w"))
    whole = known.read_text()
    x[613, 5] += 1
    np.save(path, x)
    with pytest.raises(Refused, match="of data with sampled_sha256"):
        sae_jax.train(tiny, str(tmp_path / "w"))
    assert known.read_text() == whole
    before = json.loads(whole)
    del before["sampled_sha256"]
    known.write_text(json.dumps(before))
    sae_jax.train(tiny, str(tmp_path / "w"))
    assert json.loads(known.read_text())["sampled_sha256"] != json.loads(whole)["sampled_sha256"]


@pytest.mark.parametrize(("flags", "said"), [
    (["--out=o"], "--from"), (["--from=x.npy"], "--out"), (["--from=none.npy", "--out=o"], "none.npy"),
    (["--from=x.npy", "--out=o", "--dtype=int8"], "int8"),
])  # fmt: skip
def test_wrong_flags_of_extract_are_one_line(capsys, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((1000, 4)))
    assert cli.main(["extract", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_rows_alone_are_taken_from_where_they_lie(tmp_path, rng, small_shards, monkeypatch):
    """Parsing a record copies it twice."""
    x = rng.normal(size=(1024, D)).astype(np.float32)
    chunks = files.open_chunks(make(tmp_path, x, layers=(1,))[1])

    def parse(*_):
        raise AssertionError("parsed")

    monkeypatch.setattr(stored.tfds.features.FeaturesDict, "deserialize_example_np", parse)
    np.testing.assert_array_equal(chunks.tokens(0, len(x)), x)
