"""The figures of runs and SAEs. Functions take plain data and return a matplotlib Figure; `save` writes it.

Those of a run's page also come `narrow`, for a phone: their panels one below the other.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.figure import Figure

from sae_jax.autoencoder.death import Shift
from sae_jax.runtime.disk import write_bytes

RELU, TOPK, ALIVE = "#b2182b", "#ef8a62", "#4393c3"
MEMBER_COLOURS = ("#4d4d4d", "#2166ac", "#1b7837", "#b35806", "#762a83", "#c51b7d", "#01665e", "#8c510a")
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.titlesize": 9, "figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5,
}  # fmt: skip


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: epath.Path) -> None:
    """Writes a PNG, wherever the path leads."""
    write_bytes(path, png(figure))


WIDE, NARROW = 8.4, 3.9  # inches


def _panels(count: int, across: int, height: float, narrow: bool, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure of `count` axes, each `height` inches tall, `across` of them side by side, and a legend below."""
    across = 1 if narrow else across
    rows = -(-count // across)
    figure = Figure(figsize=(NARROW if narrow else WIDE, height * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, across, squeeze=False, **shared).ravel())
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _legend(figure: Figure, axis: Any, reverse: bool = False) -> None:
    """Below the axes, in as many columns as there is room for."""
    handles, labels = axis.get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() / (0.45 + 0.065 * max(map(len, labels))))))
    figure.set_figheight(figure.get_figheight() + 0.17 * (-(-len(labels) // columns) - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, reverse=reverse)


def deaths(history: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """Dead-by-ReLU and dead-by-TopK over steps, stacked to the total; one panel a member."""
    names = list(history[0]["members"])
    across = min(len(names), 3)
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(names), across, 1.9 if narrow else 2.3, narrow, sharey=True)
        steps = [entry["step"] for entry in history]
        for axis, name in zip(axes, names, strict=True):
            relu = np.array([100 * entry["members"][name]["dead_by_relu"] for entry in history])
            topk = np.array([100 * entry["members"][name]["dead_by_topk"] for entry in history])
            axis.stackplot(steps, relu, topk, colors=(RELU, TOPK), labels=("dead by ReLU", "dead by TopK"), lw=0)
            axis.plot(steps, relu + topk, color="black", lw=1, marker="o" if len(steps) == 1 else None, label="total")
            total = relu + topk
            change = f"{total[0]:.1f} % → {total[-1]:.1f} %"
            axis.set(title=f"{textwrap.fill(name, 32)}\n{change}", xlabel="step", ylim=(0, 100))
            axis.margins(x=0.02)
        for axis in axes[:: 1 if narrow else across]:
            axis.set_ylabel("features dead (%)")
        _legend(figure, axes[0])
    return figure


def _series(history: list[dict[str, Any]], name: str, key: str) -> Float[np.ndarray, "T"]:
    """A member's number at every entry; nan where it is not defined."""
    return np.array([entry["members"][name][key] for entry in history], float)


def _look(i: int) -> dict[str, Any]:
    again, colour = divmod(i, len(MEMBER_COLOURS))
    return {"marker": "o", "ms": 2.5, "lw": 1.2, "color": MEMBER_COLOURS[colour], "ls": "--" if again else "-"}


def bias_convergence(history: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """How b_dec comes to mu: projection on mu and relative error over steps, and deaths against the projection left."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(3, 3, 2.1 if narrow else 2.3, narrow)
        steps = [entry["step"] for entry in history]
        for i, name in enumerate(history[0]["members"]):
            share, missing, relu = (
                _series(history, name, key) for key in ("bias_projection", "bias_relative_error", "dead_by_relu")
            )
            for axis, x, y in zip(axes, (steps, steps, share), (share, missing, 100 * relu), strict=True):
                axis.plot(x, y, label=name, **_look(i))
        axes[0].axhline(1, color="black", lw=0.6, ls=":")
        axes[0].set(xlabel="step", ylabel="b·mu / ‖mu‖²", title="share of the mean in the bias")
        axes[1].set(xlabel="step", ylabel="‖b − mu‖ / ‖mu‖", title="distance left", ylim=(0, None))
        axes[2].set(xlabel="b·mu / ‖mu‖²", ylabel="dead by ReLU (%)", title="deaths as the bias moves", ylim=(-2, 100))
        _legend(figure, axes[0])
    return figure


def comparison(members: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """Conditions side by side: dead by pathway at the start (pale) and at the end, one pair of bars a member."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _panels(1, 1, 0.6 + 0.5 * len(members), narrow)
        y = np.arange(len(members))[::-1]
        for when, offset, alpha in (("init", 0.2, 0.45), ("final", -0.2, 1.0)):
            relu = np.array([100 * member[when]["dead_by_relu"] for member in members])
            topk = np.array([100 * member[when]["dead_by_topk"] for member in members])
            label = "at init" if when == "init" else "at the end"
            axis.barh(y + offset, relu, 0.36, color=RELU, alpha=alpha, label=f"by ReLU, {label}")
            axis.barh(y + offset, topk, 0.36, left=relu, color=TOPK, alpha=alpha, label=f"by TopK, {label}")
            for place, total in zip(y + offset, relu + topk, strict=True):
                axis.text(total + 1, place, f"{total:.1f} %", va="center", fontsize=8)
        axis.set_yticks(y, [textwrap.fill(member["name"], 16 if narrow else 40) for member in members])
        axis.grid(visible=False, axis="y")
        axis.set(xlabel="features dead (%)", xlim=(0, 124 if narrow else 110))
        axis.set_xticks(range(0, 101, 20))
        _legend(figure, axis)
    return figure


def curves(history: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """Reconstruction and sparsity on the held-out tokens over steps."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(2, 2, 2.1 if narrow else 2.3, narrow)
        for axis, key, label in ((axes[0], "fve", "FVE about the mean"), (axes[1], "l0", "features active per token")):
            for i, name in enumerate(history[0]["members"]):
                axis.plot([entry["step"] for entry in history], _series(history, name, key), label=name, **_look(i))
            axis.set(xlabel="step", ylabel=label)
        axes[0].set_ylim(max(-0.5, axes[0].get_ylim()[0]), 1)  # an untrained SAE far below zero would flatten the rest
        axes[1].set_ylim(0, None)
        _legend(figure, axes[0])
    return figure


def shifts(members: dict[str, list[tuple[str, Shift]]], narrow: bool = False) -> Figure:
    """The mechanism: each feature's mean pre-activation over its standard deviation, coloured by its fate.

    Where the mean is large against the variation, the shift decides: far left never fires, middle never wins.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(2 * len(members), 2, 1.9, narrow)
        panels = [(name, when, shift) for name, moments in members.items() for when, shift in moments]
        for axis, (name, when, shift) in zip(axes, panels, strict=True):
            alive = ~(shift.dead_by_relu | shift.dead_by_topk)
            ratio = shift.mean / np.where(shift.std > 0, shift.std, np.nan)
            finite = np.isfinite(ratio)
            limit = max(1.0, float(np.percentile(np.abs(ratio[finite]), 99.5))) if finite.any() else 1.0
            parts = [np.clip(ratio[mask & finite], -limit, limit)
                     for mask in (shift.dead_by_relu, shift.dead_by_topk, alive)]  # fmt: skip
            axis.hist(
                parts, bins=np.linspace(-limit, limit, 61), stacked=True, histtype="stepfilled", lw=0,
                color=(RELU, TOPK, ALIVE), label=("dead by ReLU", "dead by TopK", "alive"),
            )  # fmt: skip
            title = f"{name}, {when}: {100 * np.mean(~alive):.1f}\u00a0%\u00a0dead"
            axis.set(title=textwrap.fill(title, 46), ylabel="features")
        for axis in axes[-1 if narrow else -2 :]:
            axis.set_xlabel(f"mean of z_pre / its standard deviation\nover {shift.n_tokens:,d} tokens")
        _legend(figure, axes[0], reverse=True)  # stacked outlines come last first
    return figure


def alignment(cosines: Float[np.ndarray, "n"], shift: Shift) -> Figure:
    """Cosine of every feature's encoder row with the mean, coloured by fate."""
    alive = ~(shift.dead_by_relu | shift.dead_by_topk)
    limit = max(0.05, 1.05 * float(np.abs(cosines).max()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axis = figure.subplots()
        axis.hist(
            [cosines[mask] for mask in (shift.dead_by_relu, shift.dead_by_topk, alive)],
            bins=61, range=(-limit, limit), stacked=True, histtype="stepfilled", lw=0, color=(RELU, TOPK, ALIVE),
            label=("dead by ReLU", "dead by TopK", "alive"),
        )  # fmt: skip
        axis.axvline(0, color="black", lw=0.6, ls=":")
        axis.set(xlabel="cosine of the encoder row with the mean", ylabel="features")
        _legend(figure, axis, reverse=True)
    return figure


def landscape(
    tokens: Float[np.ndarray, "T d"], outlier_dimensions: Sequence[dict[str, Any]], count: int, narrow: bool = False
) -> Figure:
    """Magnitudes of layer-normed tokens over dimensions: dimensions that stand out on every token are vertical lines.

    The paper's figure 2b. Of the `count` outlier dimensions those with at least 1 % of ‖mu‖² are marked, eight at most.
    """
    marked = [o for o in outlier_dimensions if o["share_of_mean_square"] >= 0.01][:8]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, (axis,) = _panels(1, 1, 3.2, narrow)
        # A dimension is narrower than a pixel where there are many, so the largest of neighbours is shown.
        width = max(1, tokens.shape[1] // 640)
        columns = -(-tokens.shape[1] // width)
        padded = np.pad(np.abs(tokens), ((0, 0), (0, columns * width - tokens.shape[1])))
        shown = padded.reshape(len(tokens), columns, width).max(axis=2)
        image = axis.imshow(
            shown, aspect="auto", cmap="magma_r",
            norm=matplotlib.colors.LogNorm(vmin=max(0.01, float(np.median(shown))), vmax=max(3.0, float(shown.max()))),
            extent=(-0.5, tokens.shape[1] - 0.5, len(tokens), 0), interpolation="nearest",
        )  # fmt: skip
        axis.set(xlabel="dimension", ylabel="token")
        for o in marked:
            axis.plot([o["dimension"]], [0], marker="v", ms=6, color=RELU, clip_on=False, zorder=5)
        share = 100 * sum(o["share_of_mean_square"] for o in marked)
        title = f"{count} outlier dimension{'' if count == 1 else 's'} (|mean| ≥ 3 σ)"
        if marked:
            title += f"; {', '.join(str(o['dimension']) for o in marked)} make {share:.0f} % of ‖mu‖²"
        axis.set_title(textwrap.fill(title, 50 if narrow else 100), pad=12)
        beside: dict[str, Any] = {"location": "bottom"} if narrow else {"pad": 0.01}
        figure.colorbar(image, ax=axis, label="|activation| after LayerNorm", **beside)
    return figure
