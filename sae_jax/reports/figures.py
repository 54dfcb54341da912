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
from matplotlib import ticker
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sae_jax.autoencoder.death import Shift
from sae_jax.runtime.disk import write_bytes

# Pairs stay apart under every colour blindness (tests/test_figures.py); members differ by their markers too.
RELU, TOPK, ALIVE = "#b2182b", "#ef8a62", "#4393c3"
MEMBER_COLOURS = ("#4d4d4d", "#2166ac", "#1b7837", "#b35806", "#56b4e9", "#cc79a7", "#e69f00", "#332288")
MARKERS = "os^DvPX*"
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.titlesize": 9, "figure.dpi": 180, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5,
    "axes.axisbelow": True,
}  # fmt: skip
WIDE, NARROW = 7.0, 3.9  # inches: on a page's 5.5, text of 9 points is still 7
CHARACTER = 0.068  # inches that one takes, on average
FATES = ("dead by ReLU", "dead by TopK", "alive")


def fates(pathway: str) -> tuple[str, str, str]:
    """The same where another rule than TopK selects."""
    return FATES[0], f"dead by {pathway}", FATES[2]


LEAST = 1e-4  # a distance below is drawn as this
FLOOR = -0.5  # of FVE: an untrained SAE far below would flatten the rest


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # savefig draws twice
    return buffer.getvalue()


def save(figure: Figure, path: epath.Path) -> None:
    """Writes a PNG, wherever the path leads."""
    write_bytes(path, png(figure))


def wrapped(text: str, inches: float) -> str:
    """The text in lines that are no longer than that."""
    return textwrap.fill(text, max(8, int(inches / CHARACTER)))


def plain(axis: Axis, subs: tuple[int, ...] = (1,)) -> None:
    """Ticks of a logarithmic axis at powers of ten times `subs`, written out: 0.01, not 10⁻²."""
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def panels(count: int, across: int, height: float, narrow: bool, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure of `count` axes, each `height` inches tall, `across` of them side by side, and a legend below."""
    rows = -(-count // across)
    figure = Figure(figsize=(NARROW if narrow else WIDE, height * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, across, squeeze=False, **shared).ravel())
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count][-across:]:
        axis.tick_params(labelbottom=True)  # the lowest of its column, even where another was to come below it
    return figure, axes[:count]


def legend_below(figure: Figure, axis: Any, reverse: bool = False) -> None:
    """Below the axes, in as many columns as there is room for."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [wrapped(label, figure.get_figwidth() - 0.7) for label in labels]
    lines = [line for label in labels for line in label.split("\n")]
    width, widths = figure.get_figwidth(), [0.55 + CHARACTER * len(line) for line in lines]
    most = len(labels) if sum(widths) < width else min(len(labels), max(1, int(width / max(widths))))
    rows = -(-len(labels) // most)
    columns = -(-len(labels) // rows)
    figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1 + len(lines) - len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, reverse=reverse)


def _steps(axis: Any, steps: list[int]) -> None:
    """An x axis of steps: whole numbers, 50 k instead of 50000; a single evaluation in the middle."""
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    if len(steps) == 1:
        axis.set(xlim=(steps[0] - 1, steps[0] + 1), xticks=steps)


def _series(history: list[dict[str, Any]], name: str, key: str) -> Float[np.ndarray, "T"]:
    """A member's number at every entry; nan where it is not defined."""
    return np.array([entry["members"][name][key] for entry in history], float)


def deaths(history: list[dict[str, Any]], narrow: bool = False, pathway: str = "TopK") -> Figure:
    """Dead by ReLU and by the other pathway over steps, stacked to the total; one panel a member."""
    names = list(history[0]["members"])
    across = 1 if narrow else min(len(names), 3)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(names), across, 1.7 if narrow else 2.1, narrow, sharex=True, sharey=True)
        steps = [entry["step"] for entry in history]
        for axis, name in zip(axes, names, strict=True):
            relu, topk = (100 * _series(history, name, key) for key in ("dead_by_relu", "dead_by_topk"))
            total = relu + topk
            if len(steps) > 1:
                axis.stackplot(steps, relu, topk, colors=(RELU, TOPK), labels=fates(pathway)[:2], lw=0)
                axis.plot(steps, total, color="black", lw=1, label="dead in total")
            else:
                axis.bar(steps, relu, 0.5, color=RELU, label=FATES[0])
                axis.bar(steps, topk, 0.5, bottom=relu, color=TOPK, label=fates(pathway)[1])
            if not total.any():
                axis.text(0.5, 0.5, "none dead", transform=axis.transAxes, ha="center", va="center")
            change = " → ".join(f"{value:.1f}\u00a0%" for value in (total[0], total[-1])[: len(steps)])
            axis.set(title=f"{wrapped(name, figure.get_figwidth() / across - 0.5)}\n{change}", ylim=(0, 102))
            axis.margins(x=0.02)
            _steps(axis, steps)
        for axis in axes[-across:]:
            axis.set_xlabel("step")
        for axis in axes[::across]:
            axis.set_ylabel("features dead (%)")
        legend_below(figure, axes[0])
    return figure


def _look(i: int) -> dict[str, Any]:
    again, colour = divmod(i, len(MEMBER_COLOURS))
    look = {"marker": MARKERS[colour], "color": MEMBER_COLOURS[colour], "ls": "--" if again else "-"}
    return look | {"ms": 3.5, "mew": 0, "lw": 1.2, "clip_on": False}


def bias_convergence(history: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """How b_dec comes to mu: projection on mu and relative error over steps, and deaths against the projection left.

    Where all projections stay close to 1 that axis shows their neighbourhood alone; distances are on a logarithmic one.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(3, 1 if narrow else 3, 2.0 if narrow else 2.2, narrow)
        steps = [entry["step"] for entry in history]
        shares, distances, dead = [], [], []
        for i, name in enumerate(history[0]["members"]):
            shares.append(_series(history, name, "bias_projection"))
            distances.append(np.maximum(_series(history, name, "bias_relative_error"), LEAST))
            dead.append(100 * _series(history, name, "dead_by_relu"))
            for axis, x, y in zip(axes, (steps, steps, shares[-1]), (shares[-1], distances[-1], dead[-1]), strict=True):
                axis.plot(x, y, label=name, **_look(i))
            axes[2].plot(shares[-1][:1], dead[-1][:1], "o", ms=7, mfc="none", mew=0.8, color=_look(i)["color"])
        low, high = min(np.nanmin(shares), 1), max(np.nanmax(shares), 1)
        around = (low - max(0.08 * (high - low), 0.01), high + max(0.08 * (high - low), 0.01))
        axes[0].axhline(1, color="black", lw=0.6, ls=":")
        axes[0].set(xlabel="step", ylabel="b·mu / ‖mu‖²", title="share of the mean in the bias", ylim=around)
        axes[1].set(xlabel="step", ylabel="‖b − mu‖ / ‖mu‖", title="distance left", yscale="log")
        axes[1].set_ylim(min(0.08, 0.6 * np.nanmin(distances)), 1.6 * max(1, np.nanmax(distances)))
        plain(axes[1].yaxis)
        axes[2].set(xlabel="b·mu / ‖mu‖²", ylabel="dead by ReLU (%)", title="deaths, beginning at ○")
        axes[2].set(xlim=around, ylim=(-5, 105))
        for axis in axes[:2]:
            _steps(axis, steps)
        axes[2].xaxis.set_major_locator(ticker.MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
        if not np.any(dead):
            axes[2].text(0.5, 0.5, "none dead by ReLU", transform=axes[2].transAxes, ha="center", va="center")
        legend_below(figure, axes[0])
    return figure


def comparison(members: list[dict[str, Any]], narrow: bool = False, pathway: str = "TopK") -> Figure:
    """Conditions side by side: dead by pathway at the start (pale) and at the end, one pair of bars a member."""
    names = [wrapped(member["name"], 1.4 if narrow else 2.6) for member in members]
    with matplotlib.rc_context(STYLE):
        tall = max(0.5, *(0.16 * (1 + name.count("\n")) for name in names))
        figure, (axis,) = panels(1, 1, 0.6 + tall * len(members), narrow)
        y = np.arange(len(members))[::-1]
        for when, offset, alpha in (("init", 0.2, 0.45), ("final", -0.2, 1.0)):
            relu, topk = (np.array([100 * m[when][key] for m in members]) for key in ("dead_by_relu", "dead_by_topk"))
            label = "at init" if when == "init" else "at the end"
            axis.barh(y + offset, relu, 0.36, color=RELU, alpha=alpha, label=f"dead by ReLU, {label}")
            axis.barh(y + offset, topk, 0.36, left=relu, color=TOPK, alpha=alpha, label=f"dead by {pathway}, {label}")
            for place, total in zip(y + offset, relu + topk, strict=True):
                axis.text(total + 1, place, f"{total:.1f} %", va="center")
        axis.set_yticks(y, names)
        axis.grid(visible=False, axis="y")
        axis.set(xlabel="features dead (%)", xlim=(0, 130 if narrow else 112), ylim=(-0.5, len(members) - 0.5))
        axis.set_xticks(range(0, 101, 25))
        legend_below(figure, axis)
    return figure


def curves(history: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """Reconstruction and sparsity on the held-out tokens over steps."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2, 1 if narrow else 2, 2.0 if narrow else 2.2, narrow)
        steps = [entry["step"] for entry in history]
        for axis, key, label in ((axes[0], "fve", "FVE about the mean"), (axes[1], "l0", "features active per token")):
            for i, name in enumerate(history[0]["members"]):
                values = _series(history, name, key)
                axis.plot(steps, np.maximum(values, FLOOR), label=name, **_look(i))
            low, high = axis.get_ylim()
            low, high = (min(low, 0.9), 1) if key == "fve" else (0, max(high, 1))
            axis.set(xlabel="step", ylabel=label, ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
            _steps(axis, steps)
        axes[1].yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        legend_below(figure, axes[0])
    return figure


def by_fate(axis: Any, values: Float[np.ndarray, "n"], shift: Shift, bins: Float[np.ndarray, "b"]) -> None:
    """A stacked histogram of features, coloured by their fates; what lies outside counts in the outermost bins."""
    alive = ~(shift.dead_by_relu | shift.dead_by_topk)
    inside = np.clip(values, bins[0], bins[-1])
    parts = [inside[mask & np.isfinite(values)] for mask in (shift.dead_by_relu, shift.dead_by_topk, alive)]
    axis.hist(parts, bins=bins, stacked=True, histtype="stepfilled", lw=0, color=(RELU, TOPK, ALIVE),
              label=fates(shift.pathway))  # fmt: skip
    axis.axvline(0, color="black", lw=0.6, ls=":")


def shifts(members: dict[str, list[tuple[str, Shift]]], narrow: bool = False) -> Figure:
    """The mechanism: each feature's mean pre-activation over its standard deviation, coloured by its fate.

    Where the mean is large against the variation, the shift decides: far left never fires, middle never wins. All
    panels have one x axis.
    """
    across = 1 if narrow else 2
    with matplotlib.rc_context(STYLE):
        drawn = [(name, when, shift) for name, moments in members.items() for when, shift in moments]
        figure, axes = panels(len(drawn), across, 1.7, narrow, sharex=True)
        ratios = [shift.mean / np.where(shift.std > 0, shift.std, np.nan) for _, _, shift in drawn]
        ends = [np.percentile(r[np.isfinite(r)], (0.25, 99.75)) for r in ratios if np.isfinite(r).any()]
        bins = np.linspace(min([-1.0, *(low for low, _ in ends)]), max([1.0, *(high for _, high in ends)]), 81)
        for axis, ratio, (name, when, shift) in zip(axes, ratios, drawn, strict=True):
            by_fate(axis, ratio, shift, bins)
            dead = 100 * np.mean(shift.dead_by_relu | shift.dead_by_topk)
            title = f"{name}, {when}: {dead:.1f}\u00a0%\u00a0dead"
            axis.set(title=wrapped(title, figure.get_figwidth() / across - 0.4), xlim=(bins[0], bins[-1]))
            axis.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        for axis in axes[::across]:
            axis.set_ylabel("features")
        for axis in axes[-across:]:
            axis.set_xlabel(f"mean of z_pre / its standard deviation\nover {drawn[0][2].n_tokens:,d} tokens")
        legend_below(figure, axes[0], reverse=True)  # stacked outlines come last first
    return figure


def _standing(outliers: Sequence[dict[str, Any]], count: int) -> tuple[list[int], str]:
    """The dimensions to mark, and what is said of them: the fewest with 99 % of what all outlier dimensions carry."""
    if not outliers:
        return [], "no outlier dimension (|mean| ≥ 3 σ)"
    share = 100 * np.cumsum([o["share_of_mean_square"] for o in outliers])
    n = min(int(np.searchsorted(share, 0.99 * share[-1])) + 1, len(share))
    marked = [o["dimension"] for o in outliers[:n]]
    of = f"{n} of {count}" if n < count else f"{n}"
    said = f"{of} outlier dimension{'' if count == 1 else 's'} {'carries' if n == 1 else 'carry'}"
    said += f" {share[n - 1]:.{0 if share[n - 1] >= 1 else 2}f} % of ‖mu‖²\n(|mean| ≥ 3 σ; "
    return marked, said + ("the largest " if n > 5 else "") + ", ".join(map(str, marked[:5])) + ")"


def landscape(
    tokens: Float[np.ndarray, "T d"], outlier_dimensions: Sequence[dict[str, Any]], count: int, narrow: bool = False
) -> Figure:
    """Magnitudes of layer-normed tokens over dimensions: dimensions that stand out on every token are vertical lines.

    The paper's figure 2b. Marked are as many of the `count` outlier dimensions as the title counts.
    """
    marked, title = _standing(outlier_dimensions, count)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, (axis,) = panels(1, 1, 3.0, narrow)
        # A dimension is narrower than a pixel where there are many, so the largest of neighbours is shown.
        width = max(1, tokens.shape[1] // 640)
        columns = -(-tokens.shape[1] // width)
        padded = np.pad(np.abs(tokens), ((0, 0), (0, columns * width - tokens.shape[1])))
        shown = padded.reshape(len(tokens), columns, width).max(axis=2)
        low, high = max(0.01, float(np.median(shown))), max(3.0, float(shown.max()))
        image = axis.imshow(
            shown, aspect="auto", cmap="magma_r", norm=matplotlib.colors.LogNorm(vmin=low, vmax=high),
            extent=(-0.5, columns * width - 0.5, len(tokens), 0), interpolation="nearest",
        )  # fmt: skip
        axis.set(xlabel="dimension", ylabel="token", xlim=(-0.5, tokens.shape[1] - 0.5))
        if marked:  # a line of no points would take room all the same
            axis.plot(marked, [0] * len(marked), "v", ms=6 if len(marked) <= 20 else 4, mew=0, color=RELU,
                      clip_on=False, zorder=5, label="marked")  # fmt: skip
        axis.set_title(title, pad=8)
        beside: dict[str, Any] = {"location": "bottom"} if narrow else {"pad": 0.01}
        bar = figure.colorbar(image, ax=axis, label="|activation| after LayerNorm", **beside)
        plain(bar.ax.xaxis if narrow else bar.ax.yaxis, (1, 2, 5) if high < 30 * low else (1,))
    return figure
