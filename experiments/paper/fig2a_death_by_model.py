"""The paper's figure 2a: features dead after training, model by model, TopK and with AuxK.

    python -m experiments.paper.fig2a_death_by_model --table=runs/sweep_bundled/results.csv

A bar is the mean over a model's trained layers, a dot a layer. Draws fig2a_death_by_model.png beside the table.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import command
from sae_jax.reports import figures
from sae_jax.sweeps import jobs as jobs_lib

TABLE = flags.DEFINE_string("table", None, "results.csv of a sweep", required=True)
BARS = (("topk", "TopK", figures.MEMBER_COLOURS[0]), ("auxk", "TopK + AuxK", figures.MEMBER_COLOURS[4]))


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Models in the order of what TopK alone leaves dead."""
    dead = {
        (model, condition): [100 * r["dead_total"] for r in rows if r["model"] == model and r["condition"] == condition]
        for model in dict.fromkeys(r["model"] for r in rows) for condition, *_ in BARS
    }  # fmt: skip
    models = sorted({model for model, _ in dead}, key=lambda model: -np.mean(dead[model, "topk"]))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(1.6 + 0.95 * len(models), 2.9), layout="constrained")
        axis = figure.subplots()
        for j, (condition, label, colour) in enumerate(BARS):
            at = np.arange(len(models)) + 0.36 * (j - 0.5)
            axis.bar(at, [np.mean(dead[model, condition]) for model in models], 0.32, color=colour, label=label)
            for x, model in zip(at, models, strict=True):
                axis.plot([x] * len(dead[model, condition]), dead[model, condition], "o", ms=3.5, mec="white", mew=0.4,
                          color="black")  # fmt: skip
        axis.set_xticks(range(len(models)), models, rotation=20, ha="right")
        axis.grid(visible=False, axis="x")
        axis.set(ylabel="features dead after training (%)", ylim=(0, 100))
        axis.plot([], [], "o", ms=3.5, color="black", label="one layer")
        figures.legend_below(figure, axis)
    return figure


def main() -> None:
    """The figure."""
    rows = jobs_lib.read_table(TABLE.value, "trained layers", lambda r: r["steps"])
    (Path(TABLE.value).parent / "fig2a_death_by_model.png").write_bytes(figures.png(picture(rows)))


if __name__ == "__main__":
    command.run(main)
