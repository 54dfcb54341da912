"""Figure 1: the mechanism. A large mean shifts each feature's pre-activations by w·mu, and the shift decides its fate.

    python -m experiments.paper.fig1_mechanism --workdir=runs/fig1 --scale=cpu

Normal data of full rank at a small and a large gamma; an untrained SAE. Left of each pair: pre-activations of one
feature of each fate, against zero and the bar that the k-th largest sets; right: the shifts of all features.
Writes fig1_mechanism.csv (a row a feature) and .png; half a minute on 2 CPU cores.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import command
from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.autoencoder import death
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.reports import figures, tables
from sae_jax.training import fates

GAMMAS = (0.5, 5.0)
SCALES = {"smoke": (16, 64, 2, 500), "cpu": (256, 2048, 16, 20_000), "paper": (1024, 8192, 64, 100_000)}  # d, n, k, N
COLOURS = (figures.ALIVE, figures.TOPK, figures.RELU)
NAMES = ("alive", "dead by TopK", "dead by ReLU")


def seen(scale: str, gamma: float) -> tuple[list[dict[str, Any]], np.ndarray, float]:
    """A row for each feature, all pre-activations (N, n), and the mean bar to be passed."""
    d, n, k, n_tokens = SCALES[scale]
    data = config_lib.base().data
    data.update(signal="gaussian", gamma=gamma, d_model=d)
    x = synthetic.sample(synthetic.build(data, seed=0), synthetic.SPLITS["eval"], 0, jnp.arange(n_tokens))
    sae = sae_lib.init(jax.random.key(0), n, k, jnp.zeros(d))
    found, _ = death.sight(sae, x, jnp.ones(n_tokens, bool))
    z_pre = np.asarray(sae_lib.preactivations(sae, x))
    bar = float(np.mean(np.partition(z_pre, n - k, axis=1)[:, n - k]))
    rows = [{"gamma": gamma, "feature": i, "fate": letter, "shift": float(z_pre[:, i].mean()),
             "signal": float(z_pre[:, i].std()), "largest": float(z_pre[:, i].max())}
            for i, letter in enumerate(fates.letters(found))]  # fmt: skip
    return rows, z_pre, bar


def examples(axis: Axes, rows: list[dict[str, Any]], z_pre: np.ndarray, bar: float) -> None:
    """The pre-activations of the feature of median shift of each fate."""
    for letter, colour, name in zip(fates.LETTERS, COLOURS, NAMES, strict=True):
        mine = sorted((row for row in rows if row["fate"] == letter), key=lambda row: row["shift"])
        if mine:
            values = z_pre[:, mine[len(mine) // 2]["feature"]]
            axis.hist(values, bins=60, density=True, color=colour, alpha=0.75, label=name)
    axis.axvline(0, color="black", lw=0.8)
    axis.axvline(bar, color="black", lw=0.8, ls="--", label="bar of the k-th largest")
    axis.set(xlabel="pre-activation", ylabel="density of tokens", yticks=[])


def shifts(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """The shift of every feature, coloured by fate; its signal is nearly the same for all."""
    parts = [[row["shift"] for row in rows if row["fate"] == letter] for letter in fates.LETTERS]
    labels = [f"{name}: {100 * len(part) / len(rows):.0f} %" for name, part in zip(NAMES, parts, strict=True)]
    axis.hist(parts, bins=60, stacked=True, histtype="stepfilled", lw=0, color=COLOURS, label=labels)
    axis.set(xlabel="shift: mean pre-activation", ylabel="features")
    axis.set_ylim(0, 1.45 * axis.get_ylim()[1])
    axis.legend(loc="upper left", fontsize=7)


def main(workdir: Path, scale: str) -> None:
    """Counts, writes the table and the picture."""
    table = []
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        axes = figure.subplots(1, 4)
        for pair, gamma in zip((axes[:2], axes[2:]), GAMMAS, strict=True):
            rows, z_pre, bar = seen(scale, gamma)
            examples(pair[0], rows, z_pre, bar)
            shifts(pair[1], rows)
            pair[0].set_title(f"gamma = {gamma:g}, one of each fate")
            pair[1].set_title(f"gamma = {gamma:g}, all features")
            table += rows
        handles, labels = axes[2].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    tables.write_csv(workdir / "fig1_mechanism.csv", table)
    (workdir / "fig1_mechanism.png").write_bytes(figures.png(figure))


if __name__ == "__main__":
    command.start(main, "fig1")
