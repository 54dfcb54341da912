"""Anonymous memory of the verbs on a file of 3 GB: mapped pages are the system's to take back, these are not.

    python -m experiments.trust.large_files --workdir=runs/large_files

A sparse .npy file (zeros, with a block of random rows here and there, so that every dimension varies) is diagnosed,
extracted and trained on for a few steps, each by the command in a process of its own whose RssAnon (Linux) is sampled
from outside. Prints a line for each and writes large_files.csv; what was written is deleted.
"""

import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments import command

GIGABYTES = flags.DEFINE_float("gigabytes", 3.0, "size of the file")
VERBS = flags.DEFINE_list("verbs", ["diagnose", "train", "extract"], "which to measure")
D, BLOCK, SPACING = 512, 64, 8192  # width; random rows together; rows from one such block to the next
MOST = 1e9  # bytes of anonymous memory


def sparse(path: Path, n_bytes: float) -> int:
    """Writes the file; its rows."""
    n_rows, rng = int(n_bytes / 4 / D), np.random.default_rng(0)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n_rows, D)})
        start = file.tell()
        for row in range(0, n_rows - BLOCK, SPACING):
            file.seek(start + 4 * D * row)
            file.write((rng.standard_normal((BLOCK, D), np.float32) + 1).tobytes())
        file.truncate(start + 4 * D * n_rows)
    return n_rows


def run(words: list[str]) -> tuple[int, float, float]:
    """Exit code, the largest RssAnon in bytes, and seconds."""
    started, largest = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "sae_jax", *words], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        largest = max([largest, *(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))])
        time.sleep(0.02)
    return process.returncode, largest, time.perf_counter() - started


def main(workdir: Path) -> None:
    """Every verb once."""
    workdir.mkdir(parents=True, exist_ok=True)
    path, out = workdir / "sparse.npy", workdir / "out"
    n_rows = sparse(path, GIGABYTES.value * 1e9)
    (workdir / "config.py").write_text(
        "from sae_jax.config import base\n\n\ndef get_config():\n"
        f"    return base({{'data.path': {str(path)!r}, 'sae.n_features': 2048, 'sae.k': 32, 'train.steps': 4,\n"
        "                 'train.batch_size': 512, 'train.devices': 1, 'eval.n_tokens': 20000,\n"
        "                 'eval.batch_size': 500, 'data.statistics_tokens': 50000})\n"
    )
    commands = {
        "diagnose": ["diagnose", f"--activations={path}", f"--workdir={out}", "--n_features=128", "--k=8",
                     "--n_probes=128"],
        "train": ["train", f"--config={workdir}/config.py", f"--workdir={out}"],
        "extract": ["extract", f"--from={path}", f"--out={out}"],
    }
    rows = []
    for verb in VERBS.value:
        shutil.rmtree(out, ignore_errors=True)
        code, largest, seconds = run(commands[verb])
        rows.append({"verb": verb, "rows": n_rows, "d_model": D, "exit_code": code,
                     "anonymous_mb": round(largest / 1e6), "seconds": round(seconds)})  # fmt: skip
        print(f"{verb}: exit code {code}, {largest / 1e6:.0f} MB of anonymous memory, {seconds:.0f} s", flush=True)
        shutil.rmtree(out, ignore_errors=True)
    path.unlink()
    with (workdir / "large_files.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert all(row["exit_code"] == 0 and row["anonymous_mb"] * 1e6 < MOST for row in rows)


if __name__ == "__main__":
    command.run(main, "runs/large_files")
