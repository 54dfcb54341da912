"""The paper's figure S11: what training and its remedies leave dead, layer by layer.

    python -m experiments.paper.figS11_conditions --table=runs/sweep_bundled/results.csv

Four bars a trained layer: at initialisation, TopK, with AuxK, with centring; by pathway. Draws figS11_conditions.png
beside the table and prints it. Layers are those of the sweep with `train.steps` > 0. Seconds.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import command
from sae_jax.errors import Refused
from sae_jax.reports import figures
from sae_jax.sweeps import jobs as jobs_lib

TABLE = flags.DEFINE_string("table", None, "results.csv of a sweep", required=True)
CONDITIONS = (
    ("at init", "topk", False), ("TopK", "topk", True), ("+ AuxK", "auxk", True), ("centred", "centred", True),
)  # fmt: skip


def layers(path: str) -> dict[str, list[dict[str, Any]]]:
    """Trained jobs: "model, layer" → a row for each of the four conditions."""
    wanted = [(condition, trained) for _, condition, trained in CONDITIONS]
    rows = jobs_lib.read_table(path, "trained layers", lambda r: (r["condition"], bool(r["steps"])) in wanted)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(r["name"] for r in rows if r["steps"]):
        mine = {(r["condition"], bool(r["steps"])): r for r in rows if r["name"] == name}
        if len(mine) < len(wanted):
            raise Refused("--table", path, f"{name} in the conditions {', '.join(dict(wanted))}")
        first = mine[wanted[0]]
        found[f"{first['model']}, {first['layer']}"] = [mine[key] for key in wanted]
    return found


def picture(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Bars by pathway, a group a layer, in the order of gamma; two rows of groups, so that text can be read."""
    names = sorted(found, key=lambda name: found[name][0]["gamma"])
    with matplotlib.rc_context(figures.STYLE):
        across = -(-len(names) // 2) if len(names) > 3 else len(names)
        rows = -(-len(names) // across)
        figure = Figure(figsize=(figures.WIDE, 2.5 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False).ravel()
        for i, name in enumerate(names):
            axis = axes[i // across]
            for j, row in enumerate(found[name]):
                at, relu, total = i % across + 0.2 * (j - 1.5), 100 * row["dead_by_relu"], 100 * row["dead_total"]
                labels = ("dead by ReLU", "dead by TopK") if i == j == 0 else (None, None)
                axis.bar(at, relu, 0.17, color=figures.RELU, label=labels[0])
                axis.bar(at, total - relu, 0.17, bottom=relu, color=figures.TOPK, label=labels[1])
                axis.annotate(f"{total:.0f}", (at, total), ha="center", va="bottom")
        places = [(g + 0.2 * (j - 1.5), label) for g in range(across) for j, (label, *_) in enumerate(CONDITIONS)]
        for i, axis in enumerate(axes):
            those = names[i * across : (i + 1) * across]
            for g, name in enumerate(those):
                axis.text(g, 112, f"{name}, $\\gamma$ = {found[name][0]['gamma']:.2f}", ha="center", va="bottom")
            kept = places[: len(CONDITIONS) * len(those)]
            axis.set_xticks([at for at, _ in kept], [label for _, label in kept], rotation=40, ha="right",
                            rotation_mode="anchor")  # fmt: skip
            axis.tick_params(axis="x", length=0)
            axis.grid(visible=False, axis="x")
            axis.set(ylabel="features dead (%)", ylim=(0, 112), xlim=(-0.55, across - 0.45), yticks=range(0, 101, 25))
        figures.legend_below(figure, axes[0])
    return figure


def main() -> None:
    """The table, then the figure."""
    found = layers(TABLE.value)
    for name, rows in found.items():
        print(f"{name:24s} gamma {rows[0]['gamma']:.2f}  " + "  ".join(
            f"{label} {100 * np.round(row['dead_total'], 3):.1f} % (ReLU {100 * row['dead_by_relu']:.1f})"
            for (label, *_), row in zip(CONDITIONS, rows, strict=True)))  # fmt: skip
    (Path(TABLE.value).parent / "figS11_conditions.png").write_bytes(figures.png(picture(found)))


if __name__ == "__main__":
    command.run(main)
