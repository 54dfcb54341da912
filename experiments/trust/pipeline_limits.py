"""What the pipeline withstands: twenty kills while writing, a full disk, and datasets larger than memory should be.

    python -m experiments.trust.pipeline_limits --workdir=runs/pipeline_limits

1. kill -9 at random moments of writing two layers in one pass, until 20 processes have died; the next run ends it.
   Every byte of every file is then compared with a dataset that was written without a break.
2. Writing to a file system that is too small (a tmpfs of 8 MB; needs root, left out without): exit code, what is left
   of it, and the same comparison after it has been made larger.
3. Peak anonymous memory (RssAnon, Linux) of a process that reads a whole epoch in batches of 2,048 × 768 float32, for a
   dataset of 1, 3 and 10 GB, whose shards are hard links to those of the first, and a sparse .npy file of 10 GB.

Prints one line for each. About 3 minutes on 2 CPU cores, 1.1 GB of disk.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from experiments import command
from sae_jax.activations import files, pipeline, store
from sae_jax.errors import RunFailed

KILLS = flags.DEFINE_integer("kills", 20, "processes to kill")
GIGABYTES = flags.DEFINE_list("gigabytes", ["1", "3", "10"], "sizes to read; the first one is written")
READ = flags.DEFINE_string("read", "", "read this once and print the peak of memory (used by the script itself)")
TOKENS, WIDTH, LAYERS = 200_000, 64, (1, 2)
D, BATCH = 768, 2048


def rows(start: int) -> Iterator[tuple[int, dict[int, store.Rows]]]:
    """An extraction: the same activations from any token on."""
    for first in range(start // 1000 * 1000, TOKENS, 1000):
        x = np.random.default_rng(first).standard_normal((1000, WIDTH), np.float32)
        ids = np.arange(first, first + 1000, dtype=np.int32)
        yield first, {layer: store.Rows(layer * x, ids, ids // 100, ids % 100) for layer in LAYERS}


def written(root: Path) -> int:
    """Writes what is missing in a process of its own, started by fork; its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX has been imported but not started
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        store.SHARD_BYTES = 2**20
        folders = {layer: store.folder_of(str(root), f"layer{layer}") for layer in LAYERS}
        missing = [layer for layer, folder in folders.items() if not (folder / store.MANIFEST).exists()]
        writers = {layer: store.Writer(folders[layer], WIDTH, {"layer": layer}) for layer in missing}
        if writers:
            store.write(writers, lambda start: ((at, {n: part[n] for n in missing}) for at, part in rows(start)))
        code = 0
    except RunFailed as error:
        print(f"  {error}", flush=True)
        code = error.exit_code
    finally:
        os._exit(code)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def exit_code(process: int) -> int:
    """Waits for a child: its code, or the number of the signal that ended it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kills(root: Path, whole: dict[str, bytes], took: float) -> None:
    """Kills until enough have died; a dataset that gets finished in between is compared and begun anew."""
    died, finished, rng = 0, 0, random.Random(0)
    while True:
        process = written(root / f"cut{finished}")
        if died < KILLS.value:
            time.sleep(rng.uniform(0, took / 4))
            os.kill(process, signal.SIGKILL)
        code = exit_code(process)
        died += code == -signal.SIGKILL
        if code == 0:
            assert contents(root / f"cut{finished}") == whole, f"cut{finished} differs"
            finished += 1
            if died >= KILLS.value:
                break
    print(f"kill -9: {died} processes died while writing, {finished} datasets were finished, each identical to one "
          f"that was not interrupted ({len(whole)} files, {sum(map(len, whole.values())):,d} bytes)")  # fmt: skip


def full_disk(root: Path, whole: dict[str, bytes]) -> None:
    """A tmpfs that holds some of the shards."""
    root.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", root], capture_output=True).returncode:
        print("disk full: left out, no tmpfs can be mounted")
        return
    try:
        code = exit_code(written(root))
        whole_shards = [len(json.loads(path.read_text())["shards"]) for path in sorted(root.rglob(store.MANIFEST))]
        subprocess.run(["mount", "-o", "remount,size=1g", root], check=True)
        again = exit_code(written(root))
        same = contents(root) == whole
        print(f"disk full: exit code {code} with {whole_shards} whole shards; with more room exit code {again}, "
              f"{'identical' if same else 'DIFFERENT'}")  # fmt: skip
    finally:
        subprocess.run(["umount", root], check=True)


def large(root: Path, gigabytes: float, of: Path | None) -> Path:
    """A dataset of a size: written, or made of hard links to another one's shards."""
    folder = Path(store.folder_of(str(root), f"{gigabytes:g}GB"))
    if (folder / store.MANIFEST).exists():
        return folder
    if of is None:
        writer = store.Writer(store.epath.Path(folder), D, {"made": "standard normal"})
        rng = np.random.default_rng(0)
        for start in range(0, int(gigabytes * 1e9 / 4 / D), 8192):
            ids = np.arange(start, start + 8192, dtype=np.int32)
            writer.add(start, store.Rows(rng.standard_normal((8192, D), np.float32), ids, ids, ids))
        return Path(writer.finish())
    folder.mkdir(parents=True)
    manifest = json.loads((of / store.MANIFEST).read_text())
    del manifest["checksum"]
    shards = [
        (path, shard) for path, shard in zip(sorted(of.glob("*array_record*")), manifest["shards"], strict=True)
    ]
    chosen = [shards[i % len(shards)] for i in range(int(gigabytes * 1e9 / shards[0][1]["bytes"]))]
    for number, (path, _) in enumerate(chosen):
        os.link(path, folder / f"{path.name.rpartition('-')[0]}-{number:05d}")
    manifest["shards"] = [shard for _, shard in chosen]
    manifest["n_tokens"] = sum(shard["chunks"] for _, shard in chosen) * manifest["facts"]["chunk"]
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    return folder


def read(path: str) -> None:
    """One epoch; prints rows and the largest RssAnon seen."""
    largest = 0

    def look() -> None:
        nonlocal largest
        status = Path("/proc/self/status").read_text()
        kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
        largest = max(largest, int(kilobytes) * 1024)

    look()
    before = largest
    chunks = files.open_chunks(path)
    iterator = pipeline.batches(chunks, np.arange(len(chunks)), BATCH, seed=0)
    n_batches = len(chunks) * chunks.rows // BATCH
    for number in range(n_batches):
        next(iterator)
        if number % 20 == 0:
            look()
    iterator.close()
    print(f"{n_batches * BATCH:,d} rows, {n_batches * BATCH * D * 4 / 1e9:.1f} GB: largest anonymous memory "
          f"{largest / 1e6:.0f} MB, {(largest - before) / 1e6:.0f} MB of it for reading")  # fmt: skip


def main(workdir: Path) -> None:
    """All three, one after the other."""
    if READ.value:
        read(READ.value)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    assert exit_code(written(workdir / "whole")) == 0
    whole, took = contents(workdir / "whole"), time.perf_counter() - start
    kills(workdir, whole, took)
    full_disk(workdir / "small", whole)
    first: Path | None = None
    for gigabytes in map(float, GIGABYTES.value):
        folder = large(workdir, gigabytes, first)
        first = first or folder
        subprocess.run([sys.executable, "-m", "experiments.trust.pipeline_limits", f"--read={folder}"], check=True)
    sparse = workdir / "sparse.npy"
    np.lib.format.open_memmap(sparse, "w+", np.float32, (int(float(GIGABYTES.value[-1]) * 1e9 / 4 / D), D))
    subprocess.run([sys.executable, "-m", "experiments.trust.pipeline_limits", f"--read={sparse}"], check=True)


if __name__ == "__main__":
    command.run(main, "runs/pipeline_limits")
