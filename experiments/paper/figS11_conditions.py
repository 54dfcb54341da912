"""The paper's figure S11: what training and its remedies leave dead, layer by layer.

    python -m experiments.paper.figS11_conditions --table=runs/sweep_bundled/results.csv

Four bars a trained layer: at initialisation, TopK, with AuxK, with centring; by pathway. Draws figS11_conditions.png
beside the table and prints it. Layers are those of the sweep with `train.steps` > 0. Seconds.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from sae_jax.reports import figures
from sae_jax.sweeps import jobs as jobs_lib

TABLE = flags.DEFINE_string("table", None, "results.csv of a sweep", required=True)
CONDITIONS = (
    ("at init", "topk", False), ("TopK", "topk", True), ("+ AuxK", "auxk", True), ("centred", "centred", True),
)  # fmt: skip


def layers(path: str) -> dict[str, list[dict[str, Any]]]:
    """Trained jobs: "model, layer" → a row for each of the four conditions."""
    rows = jobs_lib.read_table(path)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(r["name"] for r in rows if r["steps"]):
        mine = [r for r in rows if r["name"] == name]
        found[f"{mine[0]['model']}, {mine[0]['layer']}"] = [
            next(r for r in mine if r["condition"] == condition and bool(r["steps"]) == trained)
            for _, condition, trained in CONDITIONS
        ]
    return found


def picture(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Bars by pathway, a group a layer, in the order of gamma."""
    names = sorted(found, key=lambda name: found[name][0]["gamma"])
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(1.6 + 1.05 * len(names), 3.2), layout="constrained")
        axis = figure.subplots()
        for i, name in enumerate(names):
            for j, row in enumerate(found[name]):
                at, relu, total = i + 0.2 * (j - 1.5), 100 * row["dead_by_relu"], 100 * row["dead_total"]
                labels = ("dead by ReLU", "dead by TopK") if i == j == 0 else (None, None)
                axis.bar(at, relu, 0.17, color=figures.RELU, label=labels[0])
                axis.bar(at, total - relu, 0.17, bottom=relu, color=figures.TOPK, label=labels[1])
                axis.annotate(f"{total:.0f}", (at, total), ha="center", va="bottom", fontsize=6.5)
                axis.annotate(CONDITIONS[j][0], (at, -2), ha="right", va="top", rotation=55, fontsize=6.5,
                              annotation_clip=False)  # fmt: skip
        axis.set_xticks(range(len(names)), [f"{name}\n$\\gamma$ = {found[name][0]['gamma']:.2f}" for name in names])
        axis.tick_params(axis="x", pad=36, length=0, labelsize=7.5)
        axis.grid(visible=False, axis="x")
        axis.set(ylabel="features dead (%)", ylim=(0, 105), xlim=(-0.6, len(names) - 0.4))
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def main(_: list[str]) -> None:
    """The table, then the figure."""
    found = layers(TABLE.value)
    for name, rows in found.items():
        print(f"{name:24s} gamma {rows[0]['gamma']:.2f}  " + "  ".join(
            f"{label} {100 * np.round(row['dead_total'], 3):.1f} % (ReLU {100 * row['dead_by_relu']:.1f})"
            for (label, *_), row in zip(CONDITIONS, rows, strict=True)))  # fmt: skip
    (Path(TABLE.value).parent / "figS11_conditions.png").write_bytes(figures.png(picture(found)))


if __name__ == "__main__":
    app.run(main)
