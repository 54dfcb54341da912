"""Each closed form against a published table of death at initialisation on real models.

    python -m experiments.death.published_table --table=init_stats.csv

The table has a row a model and layer with the columns model, layer, hidden_dim, gamma, gamma_raw, effective_rank,
dead_pct_init_topk (the total), dead_pct_init_relu: the format in which the authors of arXiv:2605.31518 publish theirs
(N = 100,000, n = 8192, k = 64). Prints for every law Spearman's rho with a 95 % interval from a bootstrap over models
(layers of one model are not independent) and the mean absolute error, then the error model by model. Nothing is fitted.
About a minute for 200 rows on 2 CPU cores.
"""

import csv
from pathlib import Path

import numpy as np
from absl import flags

from experiments import command
from sae_jax.errors import Refused
from sae_jax.outliers import theory
from sae_jax.outliers.statistics import interval, spearman
from sae_jax.runtime import disk

TABLE = flags.DEFINE_string("table", None, "path of the table", required=True)
OUT = flags.DEFINE_string("out", None, "where to write the predictions, as a .csv")
N, SIZE, K = 100_000, 8192, 64
COLUMNS = ("gamma", "gamma_raw", "effective_rank", "hidden_dim", "dead_pct_init_topk", "dead_pct_init_relu")


def predictions(column: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Law → (dead in total, dead by ReLU), fractions."""
    gamma, gamma_raw = column["gamma"], column["gamma_raw"]
    # The table has no gamma over directions; the larger of the two stands in for it.
    larger = np.fmax(gamma, gamma_raw)
    width = column["hidden_dim"].astype(int)
    rank = np.minimum(column["effective_rank"], width)
    integral = [theory.token_integral(g, r, d, N, SIZE, K) for g, r, d in zip(larger, rank, width, strict=True)]
    two = [theory.two_gammas(g, raw, r, d, N, SIZE, K)
           for g, raw, r, d in zip(gamma, gamma_raw, rank, width, strict=True)]  # fmt: skip
    return {
        "paper": (theory.dead_total_paper(gamma, N, SIZE, K), theory.dead_by_relu_paper(gamma, N)),
        "paper, larger gamma": (theory.dead_total_paper(larger, N, SIZE, K), theory.dead_by_relu_paper(larger, N)),
        "finite gamma, larger": (
            theory.dead_total_finite_gamma(larger, N, SIZE, K), theory.dead_by_relu_finite_gamma(larger, N),
        ),
        "token integral, larger": (_column(integral, "dead_total"), _column(integral, "dead_by_relu")),
        "two gammas": (_column(two, "dead_total"), _column(two, "dead_by_relu")),
    }  # fmt: skip


def _column(found: list[theory.Deaths], key: str) -> np.ndarray:
    return np.array([deaths[key] for deaths in found])


def main() -> None:
    """Reads the table, prints the comparison."""
    rows = disk.read_csv("--table", TABLE.value, {"model": str, "layer": str} | dict.fromkeys(COLUMNS, float))
    rows = [row for row in rows if all(np.isfinite(np.nan if row[c] is None else row[c]) for c in COLUMNS)]
    if not rows:
        raise Refused("--table", TABLE.value, f"lines with {', '.join(COLUMNS)}")
    models = np.array([row["model"] for row in rows])
    column = {name: np.array([row[name] for row in rows]) for name in COLUMNS}
    laws = predictions(column)
    print(f"{len(rows)} layers of {len(set(models))} models")
    for which, (name, counted) in enumerate((("total", "dead_pct_init_topk"), ("by ReLU", "dead_pct_init_relu"))):
        print(f"\ndead {name}: Spearman (95 %, models drawn again), mean absolute error and bias in points")
        for law, predicted in laws.items():
            p, counts = 100 * predicted[which], column[counted]
            low, high = interval(p, counts, models)
            print(f"  {law:24s} {spearman(p, counts):6.3f} ({low:.2f} to {high:.2f})  "
                  f"{np.mean(np.abs(p - counts)):5.2f}  {np.mean(p - counts):+5.2f}")  # fmt: skip
    print("\ndead total, mean error in points, model by model: " + ", ".join(laws))
    for model in dict.fromkeys(models):
        mine = models == model
        errors = [np.mean((100 * p - column["dead_pct_init_topk"])[mine]) for p, _ in laws.values()]
        print(f"  {model:28s} {mine.sum():3d} layers  " + "  ".join(f"{e:+6.1f}" for e in errors))
    if OUT.value:
        with Path(OUT.value).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "layer", *laws])
            for i, row in enumerate(rows):
                writer.writerow([row["model"], row["layer"], *(round(float(p[i]), 5) for p, _ in laws.values())])


if __name__ == "__main__":
    command.run(main)
