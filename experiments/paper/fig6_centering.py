"""Figure 6: what centring does, at gamma = 40 on known true features and on a real layer.

    pip install -e ".[demo]"
    python -m experiments.paper.fig6_centering --workdir=runs/fig6 --scale=cpu

Synthetic: sparse signal, mean in one dimension and spread over all; baseline and centred, each at the learning rate
that gives it the largest MMCS on two seeds of its own, then ten seeds (two data sets, five initialisations each). The
real layer is the run of `figS7_real_dynamics.py`, trained under WORKDIR/real unless it is there. Writes
fig6_rates.csv, fig6_synthetic.csv, fig6_centering.png. Expect MMCS above 0.95 centred and near the untrained floor
without; about ten minutes on 2 CPU cores beside the real layer.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import command
from experiments.paper import figS7_real_dynamics as real
from sae_jax import config as config_lib
from sae_jax.reports import figures, tables
from sae_jax.runtime import checkpoint
from sae_jax.training import run as run_lib

GAMMA = 40.0
ARMS = {"baseline": "none", "centred": "mean"}
DIRECTIONS = ("one", "spread")
# d, true features, n, k, batch, steps, learning rates, data seeds, initialisations of each
SCALES: dict[str, tuple[Any, ...]] = {
    "smoke": (16, 32, 64, 3, 32, 100, (1e-3,), 1, 2),
    "cpu": (32, 64, 128, 3, 32, 20_000, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 2, 5),
    "paper": (256, 1024, 8192, 64, 2048, 200_000, (1e-4, 3e-4, 1e-3, 3e-3), 2, 5),
}


def run(workdir: Path, scale: str, direction: str, seed: int, members: dict[str, Any]) -> list[dict[str, Any]]:
    """One ensemble on one data set; its history."""
    d, n_true, n, k, batch, steps, *_ = SCALES[scale]
    c = config_lib.base()
    c.seed, c.sae.n_features, c.sae.k = seed, n, k
    c.data.update(signal="sparse", gamma=GAMMA, d_model=d, n_true_features=n_true, n_active=2,
                  mean_direction=direction, statistics_tokens=min(20_000, 20 * steps))  # fmt: skip
    c.train.update(steps=steps, batch_size=batch, steps_per_dispatch=min(1000, steps // 2))
    c.auxk.preset = "none"
    c.eval.n_tokens, c.eval.points, c.checkpoint.every = min(20_000, 20 * steps), 20, steps
    c.members = ConfigDict(members)
    folder = workdir / f"{direction}_{seed}"
    run_lib.train(c, str(folder))
    return checkpoint.history(str(folder))


def best_rates(workdir: Path, scale: str, direction: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """For each arm the learning rate of largest MMCS, over two seeds that are not used again; and the grid."""
    rates = SCALES[scale][6]
    grid = {f"{arm} {i} {seed}": {"seed": seed, "sae": {"center": center}, "train": {"learning_rate": rate}}
            for arm, center in ARMS.items() for i, rate in enumerate(rates) for seed in (101, 102)}  # fmt: skip
    last = run(workdir, scale, direction, 100, grid)[-1]["members"]
    rows = [{"direction": direction, "arm": arm, "learning_rate": rate,
             **{key: float(np.mean([last[f"{arm} {i} {seed}"][key] for seed in (101, 102)]))
                for key in ("mmcs", "mmcs_alive", "dead_by_relu", "dead_total", "fve")}}
            for arm in ARMS for i, rate in enumerate(rates)]  # fmt: skip
    best = {arm: max((r for r in rows if r["arm"] == arm), key=lambda r: r["mmcs"])["learning_rate"] for arm in ARMS}
    return best, rows


def synthetic_rows(workdir: Path, scale: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the grid of learning rates, a row for each direction, arm, seed and evaluation)."""
    *_, n_data, n_init = SCALES[scale]
    tuning, rows = [], []
    for direction in DIRECTIONS:
        best, grid = best_rates(workdir, scale, direction)
        tuning += grid
        members = {f"{arm} {seed}": {"seed": seed, "sae": {"center": center}, "train": {"learning_rate": best[arm]}}
                   for arm, center in ARMS.items() for seed in range(n_init)}  # fmt: skip
        for data_seed in range(n_data):
            for entry in run(workdir, scale, direction, data_seed, members):
                for name, found in entry["members"].items():
                    arm, seed = name.split()
                    rows.append({"direction": direction, "arm": arm, "learning_rate": best[arm], "data_seed": data_seed,
                                 "seed": int(seed), "step": entry["step"],
                                 **{key: found[key] for key in ("mmcs", "mmcs_alive", "dead_by_relu", "dead_total",
                                                                "fve", "bias_projection")}})  # fmt: skip
    return tuning, rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds at the end, and the untrained floor, as Markdown."""
    lines = ["| mean | SAE | learning rate | MMCS | of live features | untrained | dead by ReLU | dead | FVE |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    end = max(row["step"] for row in rows)
    for direction in DIRECTIONS:
        for arm in ARMS:
            mine = [r for r in rows if (r["direction"], r["arm"]) == (direction, arm)]
            at = {key: np.array([r[key] for r in mine if r["step"] == end])
                  for key in ("mmcs", "mmcs_alive", "dead_by_relu", "dead_total", "fve")}  # fmt: skip
            floor = np.mean([r["mmcs"] for r in mine if r["step"] == 0])
            scores = " | ".join(f"{at[key].mean():.3f} ± {at[key].std(ddof=1):.3f}" for key in ("mmcs", "mmcs_alive"))
            dead = " | ".join(f"{100 * at[key].mean():.1f} %" for key in ("dead_by_relu", "dead_total"))
            lines.append(f"| {direction} | {arm} | {mine[0]['learning_rate']:g} | {scores} | {floor:.3f} | {dead} | "
                         f"{at['fve'].mean():.3f} |")  # fmt: skip
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], real_rows: list[dict[str, Any]]) -> Figure:
    """MMCS and death over steps at gamma = 40 (a line a seed); death and FVE of six conditions on the real layer."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(10.4, 2.8), layout="constrained")
        axes = figure.subplots(1, 4)
        looks = {("baseline", "one"): ("#4d4d4d", "-"), ("baseline", "spread"): ("#bababa", "--"),
                 ("centred", "one"): ("#b35806", "-"), ("centred", "spread"): ("#fdb863", "--")}  # fmt: skip
        for (arm, direction), (colour, style) in looks.items():
            mine = [r for r in rows if (r["direction"], r["arm"]) == (direction, arm)]
            steps = sorted({r["step"] for r in mine})
            for axis, key, factor in ((axes[0], "mmcs", 1), (axes[1], "dead_total", 100)):
                values = factor * np.array([[r[key] for r in mine if r["step"] == step] for step in steps])
                at = np.maximum(steps, 0.5)
                if len(mine):
                    axis.plot(at, values.mean(axis=1), style, color=colour, lw=1.5, label=f"{arm}, {direction}")
                    axis.fill_between(at, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, lw=0)
        floor = np.mean([r["mmcs"] for r in rows if r["step"] == 0])
        axes[0].axhline(floor, color="black", lw=0.7, ls=":")
        axes[0].set(title=f"synthetic, gamma = {GAMMA:g}: MMCS", ylim=(0.2, 1.02))
        axes[1].set(title="synthetic: features dead (%)", ylim=(-2, 102))
        axes[0].text(0.5, floor - 0.02, "untrained", fontsize=7, va="top")
        axes[0].legend(loc="upper left", fontsize=7)
        for name, look in real.LOOKS.items():
            mine = [r for r in real_rows if r["condition"] == name]
            real.draw(axes[2], mine, "dead_total", 100, name, look)
            real.draw(axes[3], mine, "fve", 1, name, look)
        axes[2].set(title="Gemma 3, layer 9: dead (%)", ylim=(-2, 102))
        axes[3].set(title="Gemma 3, layer 9: FVE", ylim=(-0.05, 1.02))
        axes[2].legend(loc="center left", fontsize=7)
        for axis in axes:
            axis.set(xscale="log", xlabel="step (0 at the left edge)")
    return figure


def main(workdir: Path, scale: str) -> None:
    """Tunes, trains, prints the table, draws."""
    tuning, rows = synthetic_rows(workdir, scale)
    tables.write_csv(workdir / "fig6_rates.csv", tuning)
    tables.write_csv(workdir / "fig6_synthetic.csv", rows)
    print(table(rows), flush=True)
    real_rows = real.train(workdir / "real", scale, "9", list(real.CONDITIONS))
    (workdir / "fig6_centering.png").write_bytes(figures.png(picture(rows, real_rows)))


if __name__ == "__main__":
    command.start(main, "fig6")
