"""The figures of a diagnosis. Functions take plain data and return a matplotlib Figure."""

from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from sae_jax.outliers.moments import effective_rank
from sae_jax.outliers.probes import Band
from sae_jax.reports.figures import ALIVE, MEMBER_COLOURS, RELU, STYLE, TOPK


def spectrum(spectra: dict[str, Float[np.ndarray, "d"]]) -> Figure:
    """Eigenvalues of the covariance as shares of the variance, largest first, with the effective rank of each."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axis = figure.subplots()
        for (name, values), colour in zip(spectra.items(), (MEMBER_COLOURS[0], MEMBER_COLOURS[1]), strict=False):
            share = values[values > 1e-9 * values[0]] / max(float(values.sum()), 1e-300)  # what is below is rounding
            if not len(share):
                continue
            rank = effective_rank(values)
            axis.plot(np.arange(1, len(share) + 1), share, color=colour, lw=1.3, label=f"{name}: {rank:.0f}")
        axis.set(
            xscale="log", yscale="log", xlabel="eigenvalue number", ylabel="share of the variance",
        )  # fmt: skip
        axis.margins(y=0.1)
        figure.legend(title="effective rank", loc="outside right upper")
    return figure


def death_curve(
    band: Band, share: float, predicted: dict[str, dict[str, float]], measured: dict[str, float] | None
) -> Figure:
    """Left: death at initialisation forecast for every k/n. Right: what each law says at the one asked about."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.2), layout="constrained")
        axis, laws = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
        axis.fill_between(band.share, 100 * band.low, 100 * band.high, color=ALIVE, alpha=0.3, lw=0, label="95 %")
        axis.plot(band.share, 100 * band.dead, color=ALIVE, lw=1.5, label="probes")
        axis.axvline(share, color="black", lw=0.6, ls=":")
        if measured:
            axis.plot(share, 100 * measured["dead_total"], "*", ms=9, color="black", label="measured", zorder=5)
            for key, style in (("dead_total", "-"), ("dead_by_relu", "--")):
                laws.axhline(100 * measured[key], color="black", lw=0.8, ls=style)
        axis.set_xscale("log")
        axis.set(xlabel="k / n", ylabel="features dead at initialisation (%)", ylim=(-3, 103))
        axis.legend(loc="lower left")
        at = np.arange(len(predicted))
        for key, colour, label in (("dead_total", TOPK, "total"), ("dead_by_relu", RELU, "by ReLU")):
            laws.plot(at, [100 * found[key] for found in predicted.values()], "o", ms=6, color=colour, label=label)
        laws.set_xticks(at, [name.replace("_", " ") for name in predicted], rotation=40, ha="right")
        laws.set_xlim(-0.6, len(at) - 0.4)
        laws.set_title(f"laws at k/n = {share:.2g}" + (", lines: measured" if measured else ""))
        figure.legend(*laws.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def shift_signal(
    shift: Float[np.ndarray, "P"], signal: Float[np.ndarray, "P"], best: Float[np.ndarray, "P"], bar: float,
    reach: float,
) -> Figure:  # fmt: skip
    """Each probe's mean on the directions of the tokens against its standard deviation, coloured by fate.

    A feature whose shift is further below zero than its signal reaches is dead by ReLU. A token's length changes no
    feature's fate, so both are taken over x/‖x‖, in units of the signal of an average feature.
    """
    relu, topk = best <= 0, (best > 0) & (best < bar)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = figure.subplots()
        for mask, colour, label in (
            (relu, RELU, "dead by ReLU"), (topk, TOPK, "dead by TopK"), (~relu & ~topk, ALIVE, "alive"),
        ):  # fmt: skip
            if mask.any():
                axis.plot(shift[mask], signal[mask], "o", ms=3, mew=0, alpha=0.7, color=colour, label=label)
        top = 1.15 * float(signal.max())
        axis.plot([0, -reach * top], [0, top], color="black", lw=0.8, ls="--", label=f"shift = −{reach:.1f} signal")
        limit = 1.1 * max(float(np.abs(shift).max()), 1.0)
        axis.set(xlabel="shift: mean of w·x/‖x‖, in average σ", ylabel="signal: σ of w·x/‖x‖, in average σ")
        axis.set(xlim=(-limit, limit), ylim=(0, top))
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.3)
    return figure


def remedies(found: dict[str, dict[str, Any]]) -> Figure:
    """What each remedy is forecast to leave dead at initialisation, by pathway, with the measurement beside it."""
    names = list(found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 0.9 + 0.33 * len(names)), layout="constrained")
        axis = figure.subplots()
        y = np.arange(len(names))[::-1]
        relu = np.array([100 * found[name]["probe"]["dead_by_relu"] for name in names])
        total = np.array([100 * found[name]["probe"]["dead_total"] for name in names])
        axis.barh(y, relu, color=RELU, height=0.62, label="dead by ReLU")
        axis.barh(y, total - relu, left=relu, color=TOPK, height=0.62, label="dead by TopK")
        counted = [(at, found[name]["measured"]) for at, name in zip(y, names, strict=True) if found[name]["measured"]]
        if counted:
            stars = [100 * m["dead_total"] for _, m in counted]
            axis.plot(stars, [at for at, _ in counted], "k*", ms=8, label="measured", clip_on=False, zorder=5)
        for at, name, value in zip(y, names, total, strict=True):
            star = found[name]["measured"]
            said = f"{value:.1f} %" + (f", measured {100 * star['dead_total']:.1f} %" if star else "")
            right = max(value, 100 * star["dead_total"] if star else 0)
            axis.annotate(said, (right, at), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(y, [name.replace("_", " ") for name in names])
        axis.grid(visible=False, axis="y")
        axis.set(xlabel="features dead at initialisation (%), forecast", xlim=(0, 145 if counted else 115))
        axis.set_xticks(range(0, 101, 20))
        figure.legend(loc="outside lower center", ncols=3)
    return figure
