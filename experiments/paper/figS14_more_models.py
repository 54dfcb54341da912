"""The paper's figure S14, at initialisation: death through the depth of every model of a sweep, and what helps where.

    python -m experiments.paper.figS14_more_models --table=runs/sweep_bundled/results.csv

A panel a model: gamma, and death untreated, centred, after LayerNorm + centring, whitened, over layers. Draws
figS14_more_models.png beside the table. Seconds.
"""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import command
from sae_jax.reports import figures
from sae_jax.sweeps import jobs as jobs_lib

TABLE = flags.DEFINE_string("table", None, "results.csv of a sweep", required=True)
LOOK = {
    "none": ("o-", "#4d4d4d", "untreated"), "mean": ("s-", "#b35806", "mean"),
    "geometric_median": ("^-", "#2166ac", "geometric median"),
    "layer_norm_centred": ("v-", "#1b7837", "LayerNorm + centring"), "whitening": ("P-", "#c51b7d", "whitened"),
}  # fmt: skip


def picture(rows: list[dict[str, Any]]) -> Figure:
    """A panel a model, up to four in a row."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    columns = min(4, len(models))
    lines = -(-len(models) // columns)
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(2.3 * columns, 0.6 + 2.3 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axis, model in zip(axes, models, strict=False):
            for condition, (style, colour, label) in LOOK.items():
                mine = sorted((r["layer"], r["dead_total"]) for r in rows
                              if r["model"] == model and r["condition"] == condition)  # fmt: skip
                axis.plot([layer for layer, _ in mine], [100 * dead for _, dead in mine], style, ms=3, lw=1, mfc="none",
                          clip_on=False,
                          color=colour, label=label)  # fmt: skip
            gammas = sorted((r["layer"], r["gamma"]) for r in rows if r["model"] == model and r["condition"] == "none")
            low, high = min(g for _, g in gammas), max(g for _, g in gammas)
            axis.set_title(f"{model}\n$\\gamma$ {low:.2f} to {high:.2f}")
            axis.set_yscale("function", functions=(np.sqrt, np.square))  # keeps the small ones apart
            axis.set(xlabel="layer", ylim=(0, 104), yticks=[0, 1, 5, 20, 50, 100], yticklabels=[0, 1, 5, 20, 50, 100])
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        for axis in axes[len(models) :]:
            axis.set_visible(False)
        for axis in axes[::columns]:
            axis.set_ylabel("dead at initialisation (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def main() -> None:
    """The figure."""
    rows = jobs_lib.read_table(
        TABLE.value, "layers at initialisation", lambda r: r["condition"] in LOOK and r["steps"] == 0
    )
    (Path(TABLE.value).parent / "figS14_more_models.png").write_bytes(figures.png(picture(rows)))


if __name__ == "__main__":
    command.run(main)
