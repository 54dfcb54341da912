"""How much of a dictionary a process of a pod holds: a whole run on a mesh, by one process and by several.

    python -m experiments.speed.bench_pod --workdir=runs/bench_pod

The same four CPU devices, `train.mesh=feature=4`, in one process, in two and in four on the loopback: evaluation,
training, a checkpoint, fates and report. Peak memory is that of each process, less that of one that trains the same
with 1,024 features. Beside it the state: parameters and two moments. Writes bench_pod.csv; two minutes on 2 cores.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from sae_jax import config as config_lib
from sae_jax.reports import tables

DEVICES, D = 4, 256
RUN = """
import json, sys
port, n, number = map(int, sys.argv[1:4])
import jax
if n > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", n, number)
from ml_collections import ConfigDict
import sae_jax
sae_jax.train(ConfigDict(json.loads(sys.argv[4])), sys.argv[5])
status = open("/proc/self/status").read()
print("peak", status.split("VmHWM:")[1].split()[0], flush=True)
"""


def configured(n_features: int) -> str:
    """Of a short run, as JSON."""
    config = config_lib.base()
    config.sae.n_features, config.sae.k, config.data.d_model, config.data.signal = n_features, 32, D, "gaussian"
    config.train.update(steps=4, batch_size=64, mesh=f"feature={DEVICES}", learning_rate=1e-4)
    config.eval.n_tokens, config.eval.batch_size, config.checkpoint.every = 256, 64, 2
    config.report.every_seconds = 0.0
    return str(config.to_json())


def peaks(n_features: int, processes: int, workdir: Path) -> list[float]:
    """Peak memory of every process, in GB."""
    shutil.rmtree(workdir, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
    given = [configured(n_features), str(workdir)]
    running = [
        subprocess.Popen([sys.executable, "-c", RUN, str(port), str(processes), str(number), *given], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for number in range(processes)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{processes} processes ended with {[process.returncode for process in running]}")
    report = json.loads((workdir / "report.json").read_text())
    assert report["step"] == 4
    return [int(text.split("peak")[1]) / 1e6 for text in said]


def main() -> None:
    """One, two and four processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench_pod"))
    parser.add_argument("--n", type=int, default=2**18)
    given = parser.parse_args()
    state = 3 * 2 * 4 * given.n * D / 1e9
    rows = []
    for processes in (1, 2, 4):
        floor = max(peaks(1024, processes, given.workdir / "run"))
        found = [peak - floor for peak in peaks(given.n, processes, given.workdir / "run")]
        rows.append({
            "processes": processes, "devices_each": DEVICES // processes, "n": given.n, "d": D,
            "state_gb": round(state, 2), "share_gb": round(state / processes, 2),
            "largest_peak_gb": round(max(found), 2), "smallest_peak_gb": round(min(found), 2),
        })  # fmt: skip
        print(tables.one_line(rows[-1]), flush=True)
    tables.write_csv(given.workdir / "bench_pod.csv", rows)


if __name__ == "__main__":
    main()
