"""Every figure. Functions take plain data and return a matplotlib Figure; `save` writes it."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.figure import Figure

from sae_jax.disk import write_bytes
from sae_jax.evaluation import Shift
from sae_jax.outliers import effective_rank
from sae_jax.probes import Band

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


def _series(history: list[dict[str, Any]], name: str, key: str) -> Float[np.ndarray, "T"]:
    """A member's number at every entry; nan where it is not defined."""
    return np.array([entry["members"][name][key] for entry in history], float)


def _look(i: int) -> dict[str, Any]:
    return {"marker": "o", "ms": 2.5, "lw": 1.2, "color": MEMBER_COLOURS[i % len(MEMBER_COLOURS)]}


def bias_convergence(history: list[dict[str, Any]]) -> Figure:
    """How b_dec comes to mu: projection on mu and relative error over steps, and deaths against the projection left."""
    names = list(history[0]["members"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.7), layout="constrained")
        axes = figure.subplots(1, 3)
        steps = [entry["step"] for entry in history]
        for i, name in enumerate(names):
            share, missing, relu = (
                _series(history, name, key) for key in ("bias_projection", "bias_relative_error", "dead_by_relu")
            )
            for axis, x, y in zip(axes, (steps, steps, share), (share, missing, 100 * relu), strict=True):
                axis.plot(x, y, label=name, **_look(i))
        axes[0].axhline(1, color="black", lw=0.6, ls=":")
        axes[0].set(xlabel="step", ylabel="b·mu / ‖mu‖²", title="how much of the mean the bias has learned")
        axes[1].set(xlabel="step", ylabel="‖b − mu‖ / ‖mu‖", title="what is missing", ylim=(0, None))
        axes[2].set(xlabel="b·mu / ‖mu‖²", ylabel="dead by ReLU (%)", title="deaths as the bias moves", ylim=(-2, 100))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 6))
    return figure


def comparison(members: list[dict[str, Any]]) -> Figure:
    """Conditions side by side: dead by pathway at the start (pale) and at the end, one pair of bars a member."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.0 + 0.5 * len(members)), layout="constrained")
        axis = figure.subplots()
        y = np.arange(len(members))[::-1]
        for when, offset, alpha in (("init", 0.2, 0.45), ("final", -0.2, 1.0)):
            relu = np.array([100 * member[when]["dead_by_relu"] for member in members])
            topk = np.array([100 * member[when]["dead_by_topk"] for member in members])
            label = "at init" if when == "init" else "at the end"
            axis.barh(y + offset, relu, 0.36, color=RELU, alpha=alpha, label=f"by ReLU, {label}")
            axis.barh(y + offset, topk, 0.36, left=relu, color=TOPK, alpha=alpha, label=f"by TopK, {label}")
            for place, total in zip(y + offset, relu + topk, strict=True):
                axis.text(total + 1, place, f"{total:.1f} %", va="center", fontsize=8)
        axis.set_yticks(y, [member["name"] for member in members])
        axis.grid(visible=False, axis="y")
        axis.set(xlabel="features dead (%)", xlim=(0, 112))
        axis.set_xticks(range(0, 101, 20))
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def curves(history: list[dict[str, Any]]) -> Figure:
    """Reconstruction and sparsity on the held-out tokens over steps."""
    names = list(history[0]["members"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.7), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, key, label in ((axes[0], "fve", "FVE about the mean"), (axes[1], "l0", "features active per token")):
            for i, name in enumerate(names):
                axis.plot([entry["step"] for entry in history], _series(history, name, key), label=name, **_look(i))
            axis.set(xlabel="step", ylabel=label)
        axes[0].set_ylim(max(-0.5, axes[0].get_ylim()[0]), 1)  # an untrained SAE far below zero would flatten the rest
        axes[1].set_ylim(0, None)
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
                finite = np.isfinite(ratio)
                limit = max(1.0, float(np.percentile(np.abs(ratio[finite]), 99.5))) if finite.any() else 1.0
                parts = [np.clip(ratio[mask & finite], -limit, limit)
                         for mask in (shift.dead_by_relu, shift.dead_by_topk, alive)]  # fmt: skip
                axis.hist(
                    parts, bins=np.linspace(-limit, limit, 61), stacked=True, color=(RELU, TOPK, ALIVE),
                    label=("dead by ReLU", "dead by TopK", "alive"),
                )  # fmt: skip
                axis.set(title=f"{name}, {when}: {100 * np.mean(~alive):.1f} % dead", ylabel="features")
        for axis in axes[-1]:
            axis.set_xlabel(f"mean of z_pre / its standard deviation, over {shift.n_tokens:,d} tokens")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
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
            bins=61, range=(-limit, limit), stacked=True, color=(RELU, TOPK, ALIVE),
            label=("dead by ReLU", "dead by TopK", "alive"),
        )  # fmt: skip
        axis.axvline(0, color="black", lw=0.6, ls=":")
        axis.set(xlabel="cosine of the encoder row with the mean", ylabel="features")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


# -- diagnosis -------------------------------------------------------------------------------------------------------


def landscape(tokens: Float[np.ndarray, "T d"], outlier_dimensions: Sequence[dict[str, Any]], count: int) -> Figure:
    """Magnitudes of layer-normed tokens over dimensions: dimensions that stand out on every token are vertical lines.

    The paper's figure 2b. Of the `count` outlier dimensions those with at least 1 % of ‖mu‖² are marked, eight at most.
    """
    marked = [o for o in outlier_dimensions if o["share_of_mean_square"] >= 0.01][:8]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axis = figure.subplots()
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
        listed = f"; {', '.join(str(o['dimension']) for o in marked)} make {share:.0f} % of ‖mu‖²" if marked else ""
        axis.set_title(f"{count} outlier dimensions (|mean| ≥ 3 σ){listed}", pad=12)
        figure.colorbar(image, ax=axis, label="|activation| after LayerNorm", pad=0.01)
    return figure


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
        laws.legend(loc="center right")
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
        axis.set(xlabel="shift: mean of w·x/‖x‖", ylabel="signal: σ of w·x/‖x‖")
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
