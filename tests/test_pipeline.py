import itertools

import ml_dtypes
import numpy as np
import pytest
from processes import Processes

import sae_jax
from sae_jax.activations import files, pipeline, store
from sae_jax.activations.chunks import ArrayChunks, read, rows_of, split_chunks, spread
from sae_jax.errors import Refused
from sae_jax.models.sources import open_source
from sae_jax.runtime import checkpoint
from sae_jax.runtime import devices as devices_lib
from sae_jax.training import run as run_lib


def numbered(n, d=3):
    """Row i holds the number i: rows can be recognised after any shuffle."""
    return np.repeat(np.arange(n, dtype=np.float32)[:, None], d, axis=1)


@pytest.fixture
def chunks(tmp_path):
    np.save(tmp_path / "x.npy", numbered(3072))
    return files.open_chunks(str(tmp_path / "x.npy"))


def taken(chunks, n_batches, batch_size=64, seed=0, start=0, **share):
    iterator = pipeline.batches(chunks, np.arange(len(chunks)), batch_size, seed, **share)
    iterator.set_state({"next_index": start})
    found = [next(iterator)[:, 0] for _ in range(n_batches)]
    iterator.close()
    return np.stack(found)


def test_every_row_once_an_epoch_in_an_order_that_the_seed_fixes(chunks):
    first, second = taken(chunks, 48).ravel(), taken(chunks, 96)[48:].ravel()
    np.testing.assert_array_equal(np.sort(first), np.arange(3072))
    np.testing.assert_array_equal(np.sort(second), np.arange(3072))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(taken(chunks, 48).ravel(), first)
    assert not np.array_equal(taken(chunks, 48, seed=1).ravel(), first)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1


def test_rows_of_a_chunk_do_not_follow_each_other_in_a_lane(chunks):
    """Chunks of three rows: unshuffled, two rows of three would be followed by their neighbour; by chance one in 48."""
    lanes = taken(chunks, 48)  # (48, 64), a lane a column
    assert chunks.rows == 3
    assert np.mean(np.diff(lanes, axis=0) == 1) < 0.06


def test_statistics_are_of_all_parts_of_an_ordered_file(tmp_path, tiny):
    np.save(tmp_path / "x.npy", numbered(20_000, 2))
    tiny.data.signal, tiny.data.path, tiny.data.statistics_tokens = "", str(tmp_path / "x.npy"), 2000
    seen = np.concatenate(list(open_source(tiny).statistics()))[:, 0]
    assert len(np.unique(seen)) == len(seen) == 2000
    assert np.bincount(seen.astype(int) // 2000, minlength=10).min() > 150  # of 200 that an even spread would take


@pytest.mark.parametrize(("n_rows", "batch_size"), [(3072, 96), (5000, 64), (12345, 100), (1100, 48), (70, 32)])
def test_epochs_end_to_the_row_whatever_divides_what(tmp_path, n_rows, batch_size):
    np.save(tmp_path / "x.npy", numbered(n_rows))
    chunks = files.open_chunks(str(tmp_path / "x.npy"))
    n = len(chunks) * chunks.rows
    seen = taken(chunks, 3 * n // batch_size + 1, batch_size).astype(int)
    for epoch in (1, 2, 3):
        full = np.bincount(seen[: epoch * n // batch_size].ravel(), minlength=n)
        assert set(full) <= {epoch - 1, epoch}
        assert np.bincount(seen[: -(-epoch * n // batch_size)].ravel(), minlength=n).min() == epoch


def test_long_chunks_are_held_in_fewer_lanes(rng):
    class Long(ArrayChunks):
        def __init__(self, x):
            super().__init__(x, "long")
            self.rows = 4096

    chunks = Long(numbered(40 * 4096, 1))
    order = pipeline.grain.MapDataset.range(40).seed(0).shuffle().repeat()
    batches = pipeline.Batches(chunks, order, np.arange(40), 256, 0)
    seen = np.concatenate([batches[i][:, 0] for i in range(640)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(40 * 4096))
    assert len(batches._rows) <= pipeline.LANES * pipeline.WINDOW


def in_chunks(n_chunks, size):
    chunks = ArrayChunks(numbered(n_chunks * size, 1), "x")
    chunks.rows = size
    return chunks


def read_by_lanes(order, train, size, lanes, window, seed, epochs):
    """The numbers of the rows that each lane reads, one after the other: pipeline.py's first lines, on whole epochs."""
    found, n = [[] for _ in range(lanes)], len(train) * size
    for epoch in range(epochs):
        numbers = [train[order[epoch * len(train) + place]] for place in range(len(train))]
        rows = np.concatenate([np.arange(number * size, (number + 1) * size) for number in numbers])
        begin = 0
        for lane in range(lanes):
            end = begin + ((epoch + 1) * n + lane) // lanes - (epoch * n + lane) // lanes
            edges = [begin, *range((begin // window + 1) * window, end, window), end]
            for low, high in itertools.pairwise(edges):
                shuffled = np.random.default_rng([seed, epoch, low]).permutation(high - low)
                found[lane].append(rows[low:high][shuffled])
            begin = end
    return [np.concatenate(parts) for parts in found]


@pytest.mark.parametrize(("n_chunks", "size", "batch_size", "lanes", "window"), [
    (60, 3, 96, 32, 1023), (700, 3, 10, 2, 1023), (9, 256, 64, 64, 1024), (11, 500, 48, 16, 1000),
    (5, 1025, 64, 32, 1025), (4, 3000, 48, 16, 3000), (3, 70_000, 4, 1, 70_000),
])  # fmt: skip
def test_rows_are_shuffled_within_windows_as_the_first_lines_say(n_chunks, size, batch_size, lanes, window):
    """A run goes on with the batches that it would have seen: on both sides of a change of window and of epoch."""
    chunks, train = in_chunks(n_chunks + 2, size), np.setdiff1d(np.arange(n_chunks + 2), [1, n_chunks])
    order = pipeline.order(n_chunks, 5)
    batches, share = pipeline.Batches(chunks, order, train, batch_size, 5), batch_size // lanes
    known = read_by_lanes(order, train, size, lanes, window, 5, 5)
    ends = [epoch * n_chunks * size // batch_size for epoch in (1, 2)]
    for i in sorted({*range(40), *(end + near for end in ends for near in range(-3, 4))} & set(range(ends[1] + 4))):
        wanted = np.concatenate([rows[i * share : (i + 1) * share] for rows in known])
        np.testing.assert_array_equal(batches[i][:, 0], wanted, err_msg=f"batch {i}")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_the_batches_that_one_sees(chunks, processes):
    alone = taken(chunks, 20)
    parts = [taken(chunks, 20, process=p, processes=processes) for p in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)


def test_the_state_is_the_position(chunks):
    np.testing.assert_array_equal(taken(chunks, 60)[41:], taken(chunks, 19, start=41))
    iterator = pipeline.batches(chunks, np.arange(len(chunks)), 64, 0)
    for _ in range(5):
        next(iterator)
    assert iterator.get_state()["next_index"] == 5
    iterator.close()


@pytest.mark.parametrize(("n_chunks", "n_held_out"), [(100, 7), (100, 1), (9, 4), (5, 0)])
def test_splits_never_overlap_and_the_held_out_chunks_are_spread(n_chunks, n_held_out):
    train, held_out = split_chunks(n_chunks, n_held_out)
    assert sorted([*train, *held_out]) == list(range(n_chunks))
    for part, number in enumerate(held_out):  # one in each stretch
        assert part * n_chunks // n_held_out <= number < (part + 1) * n_chunks // n_held_out


def test_held_out_chunks_favour_no_position_of_a_sequence():
    """Chunks that are a quarter of a context, one held out of 16: evenly spaced all of them would be first quarters."""
    assert set(split_chunks(1600, 100, evenly=True)[1] % 4) == {0}
    counts = np.bincount(split_chunks(1600, 100)[1] % 4, minlength=4)
    assert ((counts > 12) & (counts < 38)).all()  # three deviations about 25


def test_rows_are_read_in_order(chunks):
    rows = np.concatenate(list(read(chunks.__getitem__, np.arange(100), 32, 290)))
    np.testing.assert_array_equal(rows[:, 0], np.arange(290))


@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (3, 5), (4, 4), (7, 3)])
def test_so_many_rows_are_read_and_no_chunk_more(size, batch_size):
    for n_rows in range(8 * size + 1):
        asked, x = [], numbered(8 * size)

        def chunk(number, asked=asked, x=x):
            asked.append(number)
            return x[number * size : (number + 1) * size]

        found = list(read(chunk, np.arange(8), batch_size, n_rows))
        np.testing.assert_array_equal(np.concatenate([x[:0], *found]), x[:n_rows])
        assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
        assert not found or 0 < len(found[-1]) <= batch_size
        assert asked == list(range(-(-n_rows // size)))


def test_rows_of_whole_chunks_are_cut_at_any_row():
    chunks, x = in_chunks(5, 7), numbered(35, 1)
    for start, stop in itertools.combinations(range(36), 2):
        np.testing.assert_array_equal(rows_of(chunks, start, stop), x[start:stop])
    np.testing.assert_array_equal(rows_of(chunks, 30, 99), x[30:])


@pytest.mark.parametrize(("n", "rows"), [
    (1, 1), (2047, 1), (2048, 2), (262_143, 255), (262_144, 256), (10**6, 256),
])  # fmt: skip
def test_a_chunk_is_a_1024th_of_a_file_and_at_most_256_rows(n, rows):
    chunks = ArrayChunks(np.broadcast_to(np.float32(1), (n, 1)), "x")
    assert (chunks.rows, len(chunks), chunks.n_tokens) == (rows, n // rows, n)


@pytest.mark.parametrize(("kept", "given"), [
    ("f2", "f2"), ("f4", "f4"), ("f8", "f8"), ("f4", ">f4"), ("f4", ml_dtypes.bfloat16),
])  # fmt: skip
def test_numbers_keep_their_type_where_numpy_has_it(kept, given):
    chunks = ArrayChunks(numbered(9).astype(given), "x")
    assert chunks.dtype == chunks[0].dtype == np.dtype(kept)
    np.testing.assert_array_equal(chunks.tokens(2, 9), numbered(9)[2:])


@pytest.mark.parametrize(("row", "dimension"), [(0, 0), (4095, 1), (4096, 0), (4097, 1), (9999, 1)])
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(row, dimension):
    x = numbered(10_000, 2)
    x[row, dimension] = -np.inf
    with pytest.raises(Refused, match=f"row {row}, dimension {dimension} is -inf"):
        ArrayChunks(x, "x").check()


@pytest.mark.parametrize("row", [0, 1, 4096, 9999])
def test_one_number_that_differs_is_activations_that_vary(row):
    x = np.ones((10_000, 2))
    with pytest.raises(Refused, match="all rows are the same"):
        ArrayChunks(x, "x").check()
    x[row, 1] = 2
    ArrayChunks(x, "x").check()


def test_one_chunk_is_drawn_from_anywhere_and_evenly_from_the_middle():
    drawn = np.array([spread(n, 1)[0] / n for n in range(20, 120)])
    assert abs(np.mean(drawn) - 0.5) < 0.1
    assert drawn.max() > 0.9
    for (n_chunks, count), wanted in {(10, 1): [5], (10, 3): [1, 5, 8], (7, 2): [1, 5], (9, 0): []}.items():
        np.testing.assert_array_equal(spread(n_chunks, count, evenly=True), wanted)
    assert len(spread(9, 0)) == 0


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(Refused, match="nothing is there"):
        files.open_chunks(str(tmp_path / "y.npy"))
    with pytest.raises(Refused, match="dataset folder"):
        files.open_chunks(str(tmp_path))


TWO = """
    import json, os, signal
    import numpy as np
    from ml_collections import ConfigDict
    import sae_jax
    from sae_jax.training import run as run_lib
    from sae_jax.errors import Preempted
    from sae_jax.models.sources import open_source

    jax.config.update("jax_enable_x64", True)
    config = ConfigDict(json.loads({config!r}))
    data = open_source(config).train(0)
    np.save(f"batches{{number}}.npy", np.stack([next(data) for _ in range(40)]))
    data.close()
    advance = run_lib.Run._next_inputs

    def stops(self, count):
        if self.step == 14 and number == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, count)

    run_lib.Run._next_inputs = stops
    try:
        sae_jax.train(config, "w")
    except Preempted as error:
        print(error)
"""


@pytest.mark.usefixtures("x64")
def test_two_processes_see_what_one_sees_and_one_goes_on_where_two_stopped(tiny, tmp_path, rng):
    """Real processes under jax.distributed, a stored dataset, a checkpoint of two that is resumed by one."""
    np.save(tmp_path / "x.npy", rng.normal(size=(4000, 16)).astype(np.float32) + 3)
    tiny.data.signal, tiny.data.path = "", store.import_file(str(tmp_path / "x.npy"), str(tmp_path / "data"))
    started = Processes(TWO.format(config=tiny.to_json()), 2, tmp_path / "two")
    source = open_source(tiny)
    data = source.train(0)
    alone = np.stack([next(data) for _ in range(40)])
    data.close()
    whole = sae_jax.train(tiny, str(tmp_path / "whole"))
    for code, said in started.wait():
        assert code == 0, said
        assert "stopped on request at step" in said, said
    parts = [np.load(tmp_path / "two" / f"batches{number}.npy") for number in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)

    workdir = str(tmp_path / "two" / "w")
    run = run_lib.Run(tiny, workdir, devices_lib.Devices(1), source)
    assert 14 <= run.step < 40
    np.testing.assert_array_equal(next(run.data), alone[run.step])
    run.data.close()
    run.checkpoints.close()
    report = sae_jax.train(tiny, workdir)
    assert [entry["step"] for entry in checkpoint.history(workdir)] == [0, 10, 20, 30, 40]
    for ours, theirs in zip(report["members"], whole["members"], strict=True):
        for key, value in theirs["final"].items():
            wanted = value if value is None else pytest.approx(np.asarray(value), rel=1e-9)
            assert ours["final"][key] == wanted, key
