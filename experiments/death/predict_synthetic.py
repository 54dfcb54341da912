"""Every predictor of death at initialisation against the count, over gamma, effective rank and tail weight.

    python -m experiments.death.predict_synthetic --workdir=runs/predict_synthetic

d 256, n 4096, k 32, N = 30,000 tokens, 512 probes. The signal is normal or Student-t with 3 degrees of freedom, of
equal variance in `rank` dimensions; three seeds of data, mean, probes and rows. Writes predict_synthetic.csv and prints
each predictor's error; about fifteen minutes on 2 CPU cores.
"""

import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import command
from sae_jax import config as config_lib
from sae_jax.diagnosis import diagnosis, remedies, survey
from sae_jax.models import sources
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.preprocess import Preprocessing
from sae_jax.reports import tables

N_PROBES = flags.DEFINE_integer("n_probes", 512, "probes")
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
RANKS = (4, 8, 16, 64, 256)
TAILS = (0.0, 3.0)
SEEDS = (0, 1, 2)
D, N, SIZE, K = 256, 30_000, 4096, 32
LAWS = ("paper", "finite_gamma", "token_integral", "two_gammas", "spectrum", "probe")


def cell(signal: np.ndarray, mu: np.ndarray, seed: int) -> dict[str, Any]:
    """All predictions and the count for tokens mu + signal."""
    tokens = sources.open_tokens((signal + mu).astype(np.float32))
    severity, sample, _ = survey.first_pass(tokens)
    summary = diagnosis.predictions(severity, sample, SIZE, K)
    plain = {"none": Preprocessing(shift=jnp.zeros(D, jnp.float32))}
    probes = remedies.forecast(tokens, plain, severity.raw.mean, N_PROBES.value, seed)["none"]
    band = probes.curve(np.array([K / SIZE]), SIZE)
    found = remedies.measured_deaths(tokens, plain, SIZE, K, seed + 1)["none"]
    summary["probe"] = probes.deaths(SIZE, K)
    row: dict[str, Any] = {**severity.gammas(), "rank_measured": moments_lib.effective_rank(severity.raw.eigenvalues)}
    for law in LAWS:
        row[law] = summary[law]["dead_total"]
        row[f"{law}_relu"] = summary[law]["dead_by_relu"]
    return {**row, "low": float(band.low[0]), "high": float(band.high[0]), "measured": found["dead_total"],
            "measured_relu": found["dead_by_relu"]}  # fmt: skip


def main(workdir: Path) -> None:
    """Goes through the grid and writes the table."""
    rows = []
    for seed, rank, tail in itertools.product(SEEDS, RANKS, TAILS):
        config = config_lib.base()
        config.data.update(signal="gaussian", gamma=1.0, d_model=D, rank=rank, tail_df=tail, statistics_tokens=N)
        config.seed = seed
        x = np.concatenate(list(sources.open_source(config).statistics())).astype(np.float64)
        signal = x - x.mean(axis=0)
        length = np.linalg.norm(signal) / np.sqrt(N)
        direction = np.random.default_rng(seed + 1).normal(size=D)
        for gamma in GAMMAS:
            mu = direction * (gamma * length / np.linalg.norm(direction))
            row = {"rank": rank, "tail": tail, "gamma_set": gamma, "seed": seed,
                   **cell(signal, mu, seed=1000 * seed + rank + int(tail))}  # fmt: skip
            rows.append(row)
            print(f"seed {seed} rank {rank:3d} tail {tail:.0f} gamma {gamma:4.1f}  "
                  f"measured {100 * row['measured']:5.1f}  "
                  + "  ".join(f"{law} {100 * row[law]:5.1f}" for law in LAWS), flush=True)  # fmt: skip
    tables.write_csv(workdir / "predict_synthetic.csv", rows)
    print("\n" + errors(rows))


def errors(rows: list[dict[str, Any]]) -> str:
    """Mean and largest error of every predictor, in points, by tail and rank; and how the band of the probes does."""
    lines = []
    for name, keep in (
        ("all", lambda row: True), ("normal", lambda row: row["tail"] == 0), ("Student-t", lambda row: row["tail"] > 0),
        ("rank 4, 8", lambda row: row["rank"] <= 8), ("gamma ≤ 1", lambda row: row["gamma_set"] <= 1),
    ):  # fmt: skip
        kept = [row for row in rows if keep(row)]
        found = [100 * np.array([abs(row[law] - row["measured"]) for row in kept]) for law in LAWS]
        lines.append(f"{name:10s} " + "  ".join(f"{law} {e.mean():.1f} (max {e.max():.1f})"
                                               for law, e in zip(LAWS, found, strict=True)))  # fmt: skip
    p = np.array([row["measured"] for row in rows])
    miss = np.abs(np.array([row["probe"] for row in rows]) - p)
    allowed = 0.03 + 2 * np.sqrt(p * (1 - p) * (1 / SIZE + 1 / N_PROBES.value))
    inside = np.mean([row["low"] <= row["measured"] <= row["high"] for row in rows])
    bias = np.mean([row["probe"] - row["measured"] for row in rows])
    lines.append(f"probe: mean of (forecast − count) {100 * bias:+.2f} points; within 3 points + 2 sd of both counts "
                 f"in {np.sum(miss <= allowed)} of {len(rows)}; 95 % band covers {100 * inside:.0f} %")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main, "runs/predict_synthetic")
