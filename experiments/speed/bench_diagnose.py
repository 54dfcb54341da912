"""What a diagnosis costs: time of a forecast against the measurement it replaces, and memory, on a large file.

    python -m experiments.speed.bench_diagnose --workdir=runs/bench_diagnose

Writes 1,000,000 × 768 synthetic activations (3 GB), then goes through them as `diagnose` does: moments, forecast of all
remedies with 512 probes. Then, on one twentieth of the tokens after another, the forecast again and the measurement of
all remedies at n = 8192; --n_parts says how many of them (20 is the whole, and every part costs the same). Prints
seconds, the median of the ratios, and the largest anonymous memory of the process (the file itself is mapped). Linux;
about 4 minutes on 2 CPU cores with 3 parts, 15 with all.
"""

import threading
import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments import command
from sae_jax.diagnosis import remedies, survey
from sae_jax.models import sources
from sae_jax.outliers import moments as moments_lib

N_PARTS = flags.DEFINE_integer("n_parts", 3, "twentieths of the tokens to measure on")
TOKENS = flags.DEFINE_integer("n_tokens", 1_000_000, "tokens")
D, SIZE, K, PROBES = 768, 8192, 64, 512


class Memory(threading.Thread):
    """Watches the anonymous memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.1):
            status = Path("/proc/self/status").read_text()
            kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
            self.largest = max(self.largest, int(kilobytes) * 1024)


def write(path: Path) -> None:
    """Correlated tokens with a mean in three dimensions, gamma 5, made chunk by chunk."""
    rng = np.random.default_rng(0)
    scale = np.linspace(1, 0.1, D, dtype=np.float32)
    mu = np.zeros(D, np.float32)
    mu[[7, 100, 500]] = 5 * np.linalg.norm(scale) * np.array([0.8, 0.5, -0.33])
    out = np.lib.format.open_memmap(path, "w+", np.float32, (TOKENS.value, D))
    for start in range(0, TOKENS.value, 10_000):
        part = out[start : start + 10_000]
        part[:] = rng.standard_normal(part.shape, np.float32) * scale + mu
    out.flush()


def main(workdir: Path) -> None:
    """Makes the file, times the passes, prints the comparison."""
    path = workdir / "x.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write(path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    memory = Memory()
    memory.start()
    tokens = sources.open_tokens(str(path))
    seconds = {}
    start = time.perf_counter()
    severity, sample, _ = survey.first_pass(tokens)
    median = moments_lib.geometric_median(lambda: [sample], severity.raw.mean)
    choices = remedies.preprocessings(severity, median)
    seconds["moments"] = time.perf_counter() - start
    start = time.perf_counter()
    found = remedies.forecast_closely(tokens, choices, severity.raw.mean, SIZE, K, PROBES, seed=0)
    seconds["forecast"] = time.perf_counter() - start
    print(f"moments {seconds['moments']:.0f} s, forecast {seconds['forecast']:.0f} s, largest anonymous memory so far "
          f"{memory.largest / 1e9:.2f} GB", flush=True)  # fmt: skip
    ratios, counted = [], {}
    for part in range(N_PARTS.value):
        x = np.load(path, mmap_mode="r")[part * TOKENS.value // 20 : (part + 1) * TOKENS.value // 20]
        some = sources.open_tokens(x)
        took = {}
        for name, run in {
            "forecast": lambda some=some: remedies.forecast(some, choices, severity.raw.mean, PROBES, seed=0),
            "measurement": lambda some=some: remedies.measured_deaths(some, choices, SIZE, K, seed=1),
        }.items():
            start = time.perf_counter()
            counted = run()
            took[name] = time.perf_counter() - start
        ratios.append(took["measurement"] / took["forecast"])
        print(f"part {part}: forecast {took['forecast']:.1f} s, measurement {took['measurement']:.1f} s, "
              f"{ratios[-1]:.1f} times as long", flush=True)  # fmt: skip
    memory.done.set()
    cost = seconds["forecast"] / (seconds["moments"] + seconds["forecast"])
    print(f"a measurement takes {np.median(ratios):.1f} times as long as the forecast (median of {len(ratios)} parts), "
          f"{np.median(ratios) * cost:.1f} times as long as moments and forecast together; "
          f"largest anonymous memory {memory.largest / 1e9:.2f} GB")  # fmt: skip
    for name in choices:
        print(f"  {name:20s} forecast on all {100 * found[name].deaths(SIZE, K)['dead_total']:5.1f} %, "
              f"measured on the last part {100 * counted[name]['dead_total']:5.1f} %")  # fmt: skip


if __name__ == "__main__":
    command.run(main, "runs/bench_diagnose")
