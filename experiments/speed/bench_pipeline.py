"""How fast stored activations become shuffled batches, against two floors measured in the same run.

    python -m experiments.speed.bench_pipeline --workdir=runs/bench_pipeline

Writes 409,600 × 768 float32 activations (1.26 GB) as a dataset, the same numbers into one plain file, and some of them
as a dataset of one token a record. Then, in rounds that take turns:

    pipeline     batches of 2,048 rows of the dataset, from open to the last batch of the epoch
    numpy        the first floor: the same chunks read by NumPy from the plain file in the same order into one buffer
                 that is used again and again, and the rows of every batch gathered from it by np.take into another one
    per token    the same batches, each row a record of its own

and the second floor, what a training step (n = 8192, k = 64, AuxK off) takes in. Everything is read from the page
cache: it was written just before, and its first reading is not counted. Prints medians and writes bench_pipeline.csv.
About 2 minutes on 2 CPU cores.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from array_record.python import array_record_data_source, array_record_module

from experiments import command
from sae_jax import config as config_lib
from sae_jax.activations import pipeline, store, stored
from sae_jax.activations.chunks import CHUNK
from sae_jax.reports import tables
from sae_jax.training import step as step_lib

CHUNKS = flags.DEFINE_integer("n_chunks", 1600, "chunks of 256 tokens")
ROUNDS = flags.DEFINE_integer("rounds", 5, "of each")
D, BATCH, PER_TOKEN = 768, 2048, 16_384


def write(root: Path) -> str:
    """The dataset, the plain file, and the first tokens one by one."""
    rng = np.random.default_rng(0)
    folder = store.folder_of(str(root), "normal")
    if not (folder / store.MANIFEST).exists():
        writer = store.Writer(folder, D, {"made": "standard normal"})
        records = array_record_module.ArrayRecordWriter(str(root / "tokens"), "group_size:1,uncompressed")
        with (root / "plain").open("wb") as plain:
            for start in range(0, CHUNKS.value * CHUNK, 32 * CHUNK):
                x = rng.standard_normal((min(32 * CHUNK, CHUNKS.value * CHUNK - start), D), np.float32)
                ids = np.arange(start, start + len(x), dtype=np.int32)
                writer.add(start, store.Rows(x, ids, ids, ids))
                plain.write(x.tobytes())
                for row in x[: max(0, PER_TOKEN - start)]:
                    records.write(row.tobytes())
        records.close()
        writer.finish()
    return str(folder)


def through_the_pipeline(folder: str) -> int:
    """One epoch of batches."""
    chunks = stored.StoredChunks(folder)
    iterator = pipeline.batches(chunks, np.arange(len(chunks)), BATCH, seed=0)
    n_batches = len(chunks) * chunks.rows // BATCH
    for _ in range(n_batches):
        next(iterator)
    iterator.close()
    return n_batches * BATCH


def through_numpy(path: Path) -> int:
    """The same chunks and gathers, and nothing else."""
    order = grain.MapDataset.range(CHUNKS.value).seed(0).shuffle()
    held, done = pipeline.LANES * pipeline.WINDOW // CHUNK, 0
    buffer, batch = np.empty((held * CHUNK, D), np.float32), np.empty((BATCH, D), np.float32)
    rng = np.random.default_rng(0)
    with path.open("rb", buffering=0) as file:
        for start in range(0, CHUNKS.value - held + 1, held):
            for place in range(held):
                file.seek(int(order[start + place]) * CHUNK * D * 4)
                chunk: Any = buffer[place * CHUNK : (place + 1) * CHUNK]
                file.readinto(memoryview(chunk).cast("B"))
            rows = rng.permutation(len(buffer))
            for first in range(0, len(rows), BATCH):
                np.take(buffer, rows[first : first + BATCH], axis=0, out=batch, mode="clip")
                done += BATCH
    return done


def one_by_one(path: Path) -> int:
    """Batches of which each row is a record, read as grain reads them."""
    records = array_record_data_source.ArrayRecordDataSource(str(path))
    rows = grain.MapDataset.source(records).seed(0).shuffle().map(lambda data: np.frombuffer(data, np.float32))
    for _ in iter(rows.batch(BATCH).to_iter_dataset(grain.ReadOptions(num_threads=2))):
        pass
    return PER_TOKEN


def trained() -> Callable[[], int]:
    """Steps of one SAE on a batch that is there."""
    config = config_lib.base()
    config.auxk.preset = "none"
    state = step_lib.init_group([config], jnp.zeros((1, D)))
    static = step_lib.Static.of(config)
    step = jax.jit(lambda s, x: step_lib.group_step(s, x, static=static, allsum=lambda tree: tree)[0])
    x = np.random.default_rng(0).standard_normal((BATCH, D), np.float32)
    held = [step(state, x)]

    def run() -> int:
        for _ in range(3):
            held[0] = step(held[0], x)
        jax.block_until_ready(held[0])
        return 3 * BATCH

    return run


def main(workdir: Path) -> None:
    """Writes, warms up, measures in turns, prints."""
    workdir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    folder = write(workdir)
    print(f"written in {time.perf_counter() - start:.0f} s")
    runs: dict[str, Callable[[], int]] = {
        "pipeline": lambda: through_the_pipeline(folder),
        "numpy": lambda: through_numpy(workdir / "plain"),
        "per token": lambda: one_by_one(workdir / "tokens"),
        "training step": trained(),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS.value + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            n_rows = run()
            if number:  # the first round warms the page cache and compiles
                rates[name].append(n_rows / (time.perf_counter() - start))
    floor = np.median(rates["numpy"])
    rows = [
        {"what": name, "rows_per_second": round(float(np.median(found))), "lowest": round(min(found)),
         "highest": round(max(found)), "of_the_numpy_floor": round(float(np.median(found) / floor), 3)}
        for name, found in rates.items()
    ]  # fmt: skip
    tables.write_csv(workdir / "bench_pipeline.csv", rows)
    for row in rows:
        print(f"{row['what']:14s} {row['rows_per_second']:9,d} rows/s ({row['lowest']:,d} to {row['highest']:,d}), "
              f"{100 * row['of_the_numpy_floor']:.1f} % of NumPy's")  # fmt: skip


if __name__ == "__main__":
    command.run(main, "runs/bench_pipeline")
