"""Every figure. Functions take plain data and return a matplotlib Figure; `save` writes it."""

import io
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from sae_jax.evaluation import Shift

RELU, TOPK, ALIVE = "#b2182b", "#ef8a62", "#4393c3"
MEMBER_COLOURS = ("#4d4d4d", "#2166ac", "#1b7837", "#b35806", "#762a83", "#c51b7d", "#01665e", "#8c510a")
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.titlesize": 9, "figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5,
}  # fmt: skip


def save(figure: Figure, path: epath.Path) -> None:
    """Writes a PNG, wherever the path leads."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.write_bytes(buffer.getvalue())


def deaths(history: list[dict[str, Any]]) -> Figure:
    """Dead-by-ReLU and dead-by-TopK over steps, stacked to the total; one panel a member."""
    names = list(history[0]["members"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 2.7 * len(names), 2.7), layout="constrained")
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        steps = [entry["step"] for entry in history]
        for axis, name in zip(axes, names, strict=True):
            relu = np.array([100 * entry["members"][name]["dead_by_relu"] for entry in history])
            topk = np.array([100 * entry["members"][name]["dead_by_topk"] for entry in history])
            axis.stackplot(steps, relu, topk, colors=(RELU, TOPK), labels=("dead by ReLU", "dead by TopK"), lw=0)
            axis.plot(steps, relu + topk, color="black", lw=1, marker="o" if len(steps) == 1 else None, label="total")
            total = relu + topk
            axis.set(title=f"{name}: {total[0]:.1f} % → {total[-1]:.1f} %", xlabel="step", ylim=(0, 100))
            axis.margins(x=0.02)
        axes[0].set_ylabel("features dead (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def bias_convergence(history: list[dict[str, Any]]) -> Figure:
    """How b_dec comes to mu: projection on mu and relative error over steps, and deaths against the projection left."""
    names = list(history[0]["members"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.7), layout="constrained")
        axes = figure.subplots(1, 3)
        for i, name in enumerate(names):
            entries = [entry["members"][name] for entry in history]
            steps = [entry["step"] for entry in history]
            look = {"color": MEMBER_COLOURS[i % len(MEMBER_COLOURS)], "label": name}
            for axis, key in ((axes[0], "bias_projection"), (axes[1], "bias_relative_error")):
                values = [np.nan if entry[key] is None else entry[key] for entry in entries]
                axis.plot(steps, values, marker="o", ms=2.5, lw=1.2, **look)
            shares = [np.nan if entry["bias_projection"] is None else entry["bias_projection"] for entry in entries]
            axes[2].plot(shares, [100 * entry["dead_by_relu"] for entry in entries], marker="o", ms=2.5, lw=1.2, **look)
        axes[0].axhline(1, color="black", lw=0.6, ls=":")
        axes[0].set(xlabel="step", ylabel="b·mu / ‖mu‖²", title="how much of the mean the bias has learned")
        axes[1].set(xlabel="step", ylabel="‖b − mu‖ / ‖mu‖", title="what is missing", ylim=(0, None))
        axes[2].set(xlabel="b·mu / ‖mu‖²", ylabel="dead by ReLU (%)", title="deaths as the bias moves", ylim=(-2, 100))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 6))
    return figure


def shifts(members: dict[str, list[tuple[str, Shift]]]) -> Figure:
    """The mechanism: each feature's mean pre-activation over its standard deviation, coloured by its fate.

    Where the mean is large against the variation, the shift decides: far left never fires, middle never wins.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 3.3 * 2, 0.7 + 1.9 * len(members)), layout="constrained")
        axes = figure.subplots(len(members), 2, squeeze=False)
        for row, (name, moments) in zip(axes, members.items(), strict=True):
            for axis, (when, shift) in zip(row, moments, strict=True):
                alive = ~(shift.dead_by_relu | shift.dead_by_topk)
                ratio = shift.mean / np.where(shift.std > 0, shift.std, np.nan)
                limit = max(1.0, float(np.nanpercentile(np.abs(ratio), 99.5)))
                parts = [np.clip(ratio[mask & np.isfinite(ratio)], -limit, limit)
                         for mask in (shift.dead_by_relu, shift.dead_by_topk, alive)]  # fmt: skip
                axis.hist(
                    parts, bins=np.linspace(-limit, limit, 61), stacked=True, color=(RELU, TOPK, ALIVE),
                    label=("dead by ReLU", "dead by TopK", "alive"),
                )  # fmt: skip
                axis.set(title=f"{name}, {when}: {100 * np.mean(~alive):.1f} % dead", ylabel="features")
        for axis in axes[-1]:
            axis.set_xlabel("mean of z_pre / its standard deviation")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
