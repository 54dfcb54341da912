"""Death and recovery against the learning rate, baseline and centred, at gamma = 20.

    python -m experiments.paper.lr_sensitivity --workdir=runs/lr_sensitivity --scale=cpu

Five learning rates, two arms, three initialisations: thirty SAEs in one program on the same batches. Writes
lr_sensitivity.csv and .png. Expect the baseline's death to vary with the rate, the centred one's to stay low until the
rate itself kills. About three minutes on 2 CPU cores.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import command
from sae_jax import config as config_lib
from sae_jax.reports import figures, tables
from sae_jax.training import run as run_lib

ARMS = {"baseline": "none", "centred": "mean"}
SEEDS = range(3)
# d, true features, n, k, batch, steps, learning rates
SCALES: dict[str, tuple[Any, ...]] = {
    "smoke": (16, 32, 64, 3, 32, 100, (1e-3, 1e-2)),
    "cpu": (32, 64, 128, 3, 32, 20_000, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "paper": (256, 1024, 8192, 64, 2048, 200_000, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
}
SHOWN = (("dead_total", "dead in total (%)", 100), ("dead_by_relu", "dead by ReLU (%)", 100), ("mmcs", "MMCS", 1))


def rows_of(workdir: Path, scale: str) -> list[dict[str, Any]]:
    """A row for each arm, learning rate and seed, at the end."""
    d, n_true, n, k, batch, steps, rates = SCALES[scale]
    c = config_lib.base()
    c.sae.n_features, c.sae.k = n, k
    c.data.update(signal="sparse", gamma=20.0, d_model=d, n_true_features=n_true, n_active=2)
    c.data.statistics_tokens = c.eval.n_tokens = min(20_000, 20 * steps)
    c.train.update(steps=steps, batch_size=batch, steps_per_dispatch=min(1000, steps // 2))
    c.auxk.preset, c.checkpoint.every = "none", steps
    keys = [(arm, rate, seed) for arm in ARMS for rate in rates for seed in SEEDS]
    c.members = ConfigDict({
        f"{i}": {"seed": seed, "sae": {"center": ARMS[arm]}, "train": {"learning_rate": rate}}
        for i, (arm, rate, seed) in enumerate(keys)
    })  # fmt: skip
    found = {member["name"]: member["final"] for member in run_lib.train(c, str(workdir / "run"))["members"]}
    return [{"arm": arm, "learning_rate": rate, "seed": seed,
             **{key: found[f"{i}"][key]
                for key in ("dead_by_relu", "dead_total", "mmcs", "mmcs_alive", "fve", "bias_projection")}}
            for i, (arm, rate, seed) in enumerate(keys)]  # fmt: skip


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Mean and range over seeds against the learning rate."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7.6, 2.6), layout="constrained")
        for axis, (key, label, factor) in zip(figure.subplots(1, 3), SHOWN, strict=True):
            for arm, colour in zip(ARMS, (figures.MEMBER_COLOURS[0], figures.MEMBER_COLOURS[3]), strict=True):
                rates = sorted({row["learning_rate"] for row in rows})
                values = factor * np.array([[row[key] for row in rows if (row["arm"], row["learning_rate"]) == (arm, r)]
                                            for r in rates])  # fmt: skip
                axis.plot(rates, values.mean(axis=1), color=colour, marker="o", ms=3, lw=1.3, label=arm)
                axis.fill_between(rates, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.2, lw=0)
            axis.set(xscale="log", xlabel="learning rate", title=label)
            axis.set_ylim((-3, 103) if factor == 100 else (0.2, 1.03))
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def main(workdir: Path, scale: str) -> None:
    """Trains, writes the table and the picture."""
    rows = rows_of(workdir, scale)
    tables.write_csv(workdir / "lr_sensitivity.csv", rows)
    (workdir / "lr_sensitivity.png").write_bytes(figures.png(picture(rows)))


if __name__ == "__main__":
    command.start(main, "lr_sensitivity")
