import numpy as np
import pytest
from processes import Processes

import sae_jax
from sae_jax.activations import files, pipeline, store
from sae_jax.activations.chunks import ArrayChunks, read, split_chunks
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
    assert [list(split_chunks(12, count, evenly=True)[1]) for count in (1, 2, 3)] == [[6], [3, 9], [2, 6, 10]]
    counts = np.bincount(split_chunks(1600, 100)[1] % 4, minlength=4)
    assert ((counts > 12) & (counts < 38)).all()  # three deviations about 25


def test_rows_are_read_in_order(chunks):
    rows = np.concatenate(list(read(chunks.__getitem__, np.arange(100), 32, 290)))
    np.testing.assert_array_equal(rows[:, 0], np.arange(290))


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(Refused, match="existing"):
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
