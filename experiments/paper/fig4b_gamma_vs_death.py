"""The paper's figure 4b: gamma against death at initialisation, a point a layer, with honest statistics.

    python -m experiments.paper.fig4b_gamma_vs_death --table=runs/sweep_bundled/results.csv

Draws fig4b_gamma_vs_death.png beside the table and prints Spearman's rho over all layers and by domain: its 95 %
interval when whole models are drawn again (layers of one model are not independent) and its range when each model is
left out in turn. --authors=PATH lays the table that the authors of arXiv:2605.31518 publish over it (columns model,
layer, domain, gamma, dead_pct_init_topk, dead_pct_init_relu; theirs is at N 100,000, n 8192, k 64). Seconds.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import command
from sae_jax.models.facts import DOMAINS
from sae_jax.outliers import statistics, theory
from sae_jax.reports import figures
from sae_jax.runtime import disk
from sae_jax.sweeps import jobs as jobs_lib

TABLE = flags.DEFINE_string("table", None, "results.csv of a sweep", required=True)
AUTHORS = flags.DEFINE_string("authors", None, "the authors' table, to lay over it")
AUTHORS_NUMBERS = ("gamma", "dead_pct_init_topk", "dead_pct_init_relu")
MARKERS = dict(zip(DOMAINS, "os^", strict=True))


def plain_rows(path: str) -> list[dict[str, Any]]:
    """Untreated layers at initialisation."""
    return jobs_lib.read_table(
        path, "untreated layers at initialisation", lambda r: r["condition"] == "none" and r["steps"] == 0
    )


def authors_rows(path: str) -> list[dict[str, Any]]:
    """The authors' table in the same columns."""
    columns = {"model": str, "domain": str, "layer": int} | dict.fromkeys(AUTHORS_NUMBERS, float)
    return [
        {
            **{key: r[key] for key in ("model", "layer", "domain", "gamma")},
            "dead_total": r["dead_pct_init_topk"] / 100, "dead_by_relu": r["dead_pct_init_relu"] / 100,
        } for r in disk.read_csv("--authors", path, columns) if None not in [r[key] for key in AUTHORS_NUMBERS]
    ]  # fmt: skip


def correlation(rows: list[dict[str, Any]], key: str) -> statistics.Correlation:
    """Of gamma with a column."""
    return statistics.correlation(*(np.array([r[name] for r in rows]) for name in ("gamma", key, "model")))


def print_statistics(title: str, rows: list[dict[str, Any]]) -> None:
    """Spearman's rho over all rows and by domain."""
    print(title)
    for domain in ("all", *sorted({r["domain"] for r in rows})):
        mine = [r for r in rows if domain in ("all", r["domain"])]
        for key in ("dead_total", "dead_by_relu"):
            print(f"  {domain:9s} gamma, {key:13s} {correlation(mine, key)}")


def picture(rows: list[dict[str, Any]], authors: list[dict[str, Any]]) -> Figure:
    """Total and ReLU deaths against gamma, with the laws for the table's own N, n and k."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7.6, 3.5), layout="constrained")
        axes = figure.subplots(1, 2)
        every = [r["gamma"] for r in [*rows, *authors]]
        gamma = np.geomspace(min(every) / 1.2, max(every) * 1.2, 200)
        size = rows[0]["n_tokens"], rows[0]["n_features"], rows[0]["k"]
        laws = {
            "dead_total": {"finite gamma": theory.dead_total_finite_gamma(gamma, *size),
                           "paper": theory.dead_total_paper(gamma, *size)},
            "dead_by_relu": {"paper": theory.dead_by_relu_paper(gamma, size[0])},
        }  # fmt: skip
        pathways = (("dead_total", "dead in total"), ("dead_by_relu", "dead by ReLU"))
        for axis, (key, what) in zip(axes, pathways, strict=True):
            for (law, values), style in zip(laws[key].items(), ("-", "--"), strict=False):
                axis.plot(gamma, 100 * np.asarray(values), style if law != "paper" else "--", color="0.35", lw=1,
                          label=f"law: {law}")  # fmt: skip
            if authors:
                axis.plot([r["gamma"] for r in authors], [100 * r[key] for r in authors], ".", ms=3, color="0.7",
                          label=f"authors' table, {len(authors)} layers", zorder=1)  # fmt: skip
            for i, model in enumerate(models):
                mine = [r for r in rows if r["model"] == model]
                axis.plot(
                    [r["gamma"] for r in mine], [100 * r[key] for r in mine], MARKERS.get(mine[0]["domain"], "o"),
                    ms=4.5, mew=0.9, mfc="none", zorder=3, label=f"{model} ({mine[0]['domain']})",
                    color=figures.MEMBER_COLOURS[(i + 1) % len(figures.MEMBER_COLOURS)],
                )  # fmt: skip
            found = correlation(rows, key)
            axis.set_title(f"Spearman {found.rho:.2f} ({found.low:.2f} to {found.high:.2f}, models drawn)")
            axis.set(xscale="log", xlabel="gamma", ylabel=f"{what} at initialisation (%)", ylim=(-3, 103))
            ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if gamma[0] <= t <= gamma[-1]]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.set_xticks([], minor=True)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if len(models) < 8 else 4, fontsize=8)
    return figure


def main() -> None:
    """Statistics, then the figure."""
    rows, authors = plain_rows(TABLE.value), authors_rows(AUTHORS.value) if AUTHORS.value else []
    print_statistics(str(TABLE.value), rows)
    if authors:
        print_statistics(str(AUTHORS.value), authors)
    (Path(TABLE.value).parent / "fig4b_gamma_vs_death.png").write_bytes(figures.png(picture(rows, authors)))


if __name__ == "__main__":
    command.run(main)
