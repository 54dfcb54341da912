"""Figure 4a: death at initialisation against gamma, measured and predicted, for the normal and the sparse signal.

    python -m experiments.paper.fig4a_theory --workdir=runs/fig4a --scale=cpu

N = 100,000 tokens, n = 4096, k = 32, d = 256; means of three seeds of data and rows, `_low` and `_high` over them.
Writes fig4a_theory.csv and .png and prints Spearman's rho of gamma with death; about six minutes on 2 CPU cores. The
normal signal meets the theory's assumptions, so measured and predicted agree; the sparse one does not: five active
features a token in a wide space give signals with heavier tails and a lower effective rank.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from experiments import command
from sae_jax import config as config_lib
from sae_jax.outliers import theory
from sae_jax.reports import figures, tables
from sae_jax.training import run as run_lib

# n, k, d, held-out tokens, gammas
SCALES = {
    "smoke": (128, 2, 16, 2000, (0.5, 20.0)),
    "cpu": (4096, 32, 256, 100_000, (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0)),
    "paper": (8192, 64, 1024, 100_000, (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 40.0)),
}


SEEDS = (0, 1, 2)


def measured(workdir: Path, scale: str) -> list[dict[str, Any]]:
    """A row for each signal and gamma: what an untrained SAE loses and what the laws say."""
    n, k, d, tokens, gammas = SCALES[scale]
    rows = []
    for signal in ("gaussian", "sparse"):
        config = config_lib.base()
        config.sae.n_features, config.sae.k = n, k
        config.data.update(signal=signal, gamma=gammas[0], d_model=d, statistics_tokens=min(20_000, tokens))
        config.train.steps, config.eval.n_tokens = 0, tokens
        for gamma in gammas:
            config.data.gamma = gamma
            found = []
            for config.seed in SEEDS:  # of the data and of the rows
                report = run_lib.train(config, f"{workdir}/{signal}_{gamma}_{config.seed}")
                found.append(report["members"][0]["init"])
            counted: dict[str, float] = {}
            for key in ("dead_by_relu", "dead_total"):
                values = [deaths[key] for deaths in found]
                counted |= {key: float(np.mean(values)), f"{key}_low": min(values), f"{key}_high": max(values)}
            rows.append({
                "signal": signal,
                "gamma": gamma,
                "seeds": str(len(SEEDS)),
                **counted,
                "paper_relu": float(theory.dead_by_relu_paper(gamma, tokens)),
                "finite_gamma": float(theory.dead_total_finite_gamma(gamma, tokens, n, k)),
                "paper_total": float(theory.dead_total_paper(gamma, tokens, n, k)),
            })
            print(tables.one_line(rows[-1]), flush=True)
    return rows


def picture(rows: list[dict[str, Any]], scale: str) -> Figure:
    """The laws as lines, the counts as marks; by ReLU on the left, the total on the right."""
    n, k, _, tokens, gammas = SCALES[scale]
    fine = np.geomspace(min(gammas), max(gammas), 200)
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        relu, total = figure.subplots(1, 2, sharey=True)
        relu.plot(fine, 100 * theory.dead_by_relu_paper(fine, tokens), color=figures.RELU, lw=1.3, label="Φ(−C/γ)")
        finite = [100 * float(theory.dead_total_finite_gamma(gamma, tokens, n, k)) for gamma in fine]
        total.plot(fine, finite, color=figures.TOPK, lw=1.3, label="finite γ")
        paper = 100 * theory.dead_total_paper(fine, tokens, n, k)
        total.plot(fine, paper, color=figures.TOPK, lw=1, ls="--", label="Φ(t − C/γ)")
        for signal, mark in (("gaussian", "o"), ("sparse", "x")):
            mine = [row for row in rows if row["signal"] == signal]
            for axis, key in ((relu, "dead_by_relu"), (total, "dead_total")):
                axis.plot([row["gamma"] for row in mine], [100 * row[key] for row in mine], mark, color="black", ms=5,
                          mfc="none", label=f"{signal} signal, counted")  # fmt: skip
        relu.set(ylabel="dead at initialisation (%)", title="dead by ReLU", ylim=(-3, 103))
        total.set(title="dead in total")
        for axis in (relu, total):
            axis.set(xscale="log", xlabel="gamma")
            axis.set_xticks([0.5, 1, 2, 5, 10, 20, 40], ["0.5", "1", "2", "5", "10", "20", "40"])
            axis.minorticks_off()
        relu.legend(loc="upper left")
        total.legend(loc="lower right")
    return figure


def main(workdir: Path, scale: str) -> None:
    """Counts, writes the table and the picture."""
    rows = measured(workdir, scale)
    tables.write_csv(workdir / "fig4a_theory.csv", rows)
    (workdir / "fig4a_theory.png").write_bytes(figures.png(picture(rows, scale)))
    for signal in ("gaussian", "sparse"):
        mine = [row for row in rows if row["signal"] == signal]
        for key in ("dead_by_relu", "dead_total"):
            rho = spearmanr([row["gamma"] for row in mine], [row[key] for row in mine]).statistic
            print(f"Spearman of gamma with {key}, {signal}: {rho:.3f}")


if __name__ == "__main__":
    command.start(main, "fig4a")
