"""The figures of a diagnosis. Functions take plain data and return a matplotlib Figure."""

from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from sae_jax.outliers.moments import effective_rank
from sae_jax.outliers.probes import Band
from sae_jax.outliers.selections import COUNTED, Selection
from sae_jax.reports.figures import ALIVE, MEMBER_COLOURS, RELU, STYLE, TOPK, WIDE, legend_below, plain

TOP_K = Selection()


def spectrum(spectra: dict[str, Float[np.ndarray, "d"]]) -> Figure:
    """Eigenvalues of the covariance as shares of the variance, largest first, with the effective rank of each."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axis = figure.subplots()
        looks: list[dict[str, Any]] = [{"color": MEMBER_COLOURS[0], "lw": 2}, {"color": MEMBER_COLOURS[1], "ls": "--"}]
        for (name, values), look in zip(spectra.items(), looks, strict=False):
            share = values[values > 1e-9 * values[0]] / max(float(values.sum()), 1e-300)  # what is below is rounding
            if not len(share):
                continue
            rank = effective_rank(values)
            axis.plot(np.arange(1, len(share) + 1), share, **look, label=f"{name}: {rank:.0f}")
        axis.set(
            xscale="log", yscale="log", xlabel="eigenvalue number", ylabel="share of the variance",
        )  # fmt: skip
        axis.margins(y=0.1)
        for each in (axis.xaxis, axis.yaxis):
            plain(each)
        figure.legend(title="effective rank", loc="outside right upper")
    return figure


def death_curve(
    band: Band, share: float, predicted: dict[str, dict[str, Any]], measured: dict[str, float] | None,
    selection: Selection = TOP_K,
) -> Figure:  # fmt: skip
    """Left: death at initialisation forecast for every k/n. Right: what each law says at the one asked about.

    Of a JumpReLU SAE thresholds are in the place of k/n; a ReLU SAE has neither, and only the right side.
    """
    what = "k / n" if selection.rule in COUNTED else "threshold"
    rows = {name.replace("_", " "): found for name, found in predicted.items()}
    rows |= {"measured": measured} if measured else {}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 2.9), layout="constrained")
        if selection.rule == "relu":
            laws = figure.subplots()
            stacked(laws, rows, pathway=selection.pathway)
            laws.set(xlabel="features dead at initialisation (%)", xlim=(0, 128))
            legend_below(figure, laws)
            return figure
        axis, laws = figure.subplots(1, 2, width_ratios=(1.2, 1))
        axis.axvline(share, color="black", lw=0.6, ls=":")
        axis.fill_between(band.share, 100 * band.low, 100 * band.high, color=ALIVE, alpha=0.3, lw=0,
                          label="95 % of the forecast")  # fmt: skip
        axis.plot(band.share, 100 * band.dead, color=ALIVE, lw=1.5, label="dead in total, by probes")
        axis.set(xscale="log", xlabel=what, ylabel="features dead at initialisation (%)", ylim=(-4, 104))
        axis.set_title(f"at every {what}")
        plain(axis.xaxis)
        if measured:
            axis.plot(share, 100 * measured["dead_total"], "*", ms=9, color="black", label="measured", zorder=5)
        stacked(laws, rows, pathway=selection.pathway)
        laws.set(title=f"at {what} = {share:.2g}", xlabel="features dead at initialisation (%)", xlim=(0, 128))
        axis.plot([], [], "s", ms=7, color=RELU, label="dead by ReLU")
        axis.plot([], [], "s", ms=7, color=TOPK, label=f"dead by {selection.pathway}")
        legend_below(figure, axis)
    return figure


def stacked(
    axis: Any, rows: dict[str, dict[str, Any]], measured: dict[str, float] | None = None, pathway: str = "TopK"
) -> None:
    """Horizontal bars by pathway, the first row on top, the total beside each; a star where something was measured.

    A law that does not know the total has no bar.
    """
    rows = {name: found for name, found in rows.items() if found["dead_total"] is not None}
    y = np.arange(len(rows))[::-1]
    relu, total = (np.array([100 * found[key] for found in rows.values()]) for key in ("dead_by_relu", "dead_total"))
    axis.barh(y, relu, color=RELU, height=0.62, label="dead by ReLU")
    axis.barh(y, total - relu, left=relu, color=TOPK, height=0.62, label=f"dead by {pathway}")
    stars = {name: 100 * value for name, value in (measured or {}).items()}
    if stars:
        at = [place for place, name in zip(y, rows, strict=True) if name in stars]
        axis.plot(list(stars.values()), at, "k*", ms=8, label="measured in total", clip_on=False, zorder=5)
    for at, name, value in zip(y, rows, total, strict=True):
        said = f"{value:.1f} %" + (f", measured {stars[name]:.1f} %" if name in stars else "")
        right = max(value, stars.get(name, 0))
        axis.annotate(said, (right, at), xytext=(8, 0), textcoords="offset points", va="center")
    axis.set_yticks(y, list(rows))
    axis.set_xticks(range(0, 101, 25))
    axis.grid(visible=False, axis="y")


def shift_signal(
    shift: Float[np.ndarray, "P"], signal: Float[np.ndarray, "P"], best: Float[np.ndarray, "P"], bar: float,
    reach: float, pathway: str = "TopK",
) -> Figure:  # fmt: skip
    """Each probe's mean on the directions of the tokens against its standard deviation, coloured by fate.

    A feature whose shift is further below zero than its signal reaches is dead by ReLU. No token's length changes
    that, so both are taken over x/‖x‖, in units of the signal of an average feature.
    """
    relu, topk = best <= 0, (best > 0) & (best < bar)
    low, high = float(signal.min()), float(signal.max())
    low, high = low - 0.08 * max(high - low, 0.1), high + 0.08 * max(high - low, 0.1)
    left, right = min(float(shift.min()), -reach * high), max(float(shift.max()), 1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = figure.subplots()
        for mask, colour, label in (
            (relu, RELU, "dead by ReLU"), (topk, TOPK, f"dead by {pathway}"), (~relu & ~topk, ALIVE, "alive"),
        ):  # fmt: skip
            if mask.any():
                axis.plot(shift[mask], signal[mask], "o", ms=3, mew=0, alpha=0.7, color=colour, label=label)
        line = f"shift = −{reach:.1f} × signal"
        axis.plot([-reach * low, -reach * high], [low, high], color="black", lw=0.8, ls="--", label=line)
        axis.axvline(0, color="black", lw=0.6, ls=":")
        axis.set(xlabel="shift: mean of w·x/‖x‖ (average σ)", ylabel="signal: σ of w·x/‖x‖ (average σ)")
        axis.set(xlim=(left - 0.04 * (right - left), right + 0.04 * (right - left)), ylim=(low, high))
        legend_below(figure, axis)
    return figure


def remedies(found: dict[str, dict[str, Any]], pathway: str = "TopK") -> Figure:
    """What each remedy is forecast to leave dead at initialisation, by pathway, with the measurement beside it."""
    forecast = {name.replace("_", " "): one["probe"] for name, one in found.items()}
    counted = {name.replace("_", " "): one["measured"]["dead_total"] for name, one in found.items() if one["measured"]}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 0.9 + 0.33 * len(found)), layout="constrained")
        axis = figure.subplots()
        stacked(axis, forecast, counted, pathway)
        axis.set(xlabel="features dead at initialisation (%), forecast", xlim=(0, 165 if counted else 115))
        legend_below(figure, axis)
    return figure
