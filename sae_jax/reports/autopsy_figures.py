"""The figures of an autopsy. Functions take plain data and return a matplotlib Figure; `narrow` is for a phone."""

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from sae_jax.autoencoder.death import Shift
from sae_jax.reports.figures import ALIVE, FATES, RELU, STYLE, TOPK, by_fate, fates, legend_below, panels, plain


def density(n_fired: Int[np.ndarray, "n"], shift: Shift, narrow: bool = False) -> Figure:
    """How many features fire how often, both on logarithmic axes; those that never do stand apart, to the left."""
    fired = n_fired > 0
    rarest = np.log10(0.7 / shift.n_tokens)
    width = -rarest / 44
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 2.4, narrow)
        frequency = np.log10(n_fired[fired] / shift.n_tokens)
        axis.hist(frequency, np.linspace(rarest, 0, 45), color=ALIVE, lw=0, label=FATES[2])
        names = fates(shift.pathway)
        dead = (shift.dead_by_relu, shift.dead_by_topk)
        for at, mask, colour, name in zip((-5.4, -3.4), dead, (RELU, TOPK), names, strict=False):
            count = int(mask.sum())
            axis.bar(rarest + at * width, count, 1.8 * width, color=colour, label=name)
            axis.annotate(f"{count}", (rarest + at * width, max(count, 0.6)), xytext=(0, 2), va="bottom", ha="center",
                          textcoords="offset points", rotation=90)  # fmt: skip
        decades = range(int(np.ceil(rarest)), 1)
        step = 1 if len(decades) <= (4 if narrow else 8) else 2
        shown = [decade for decade in decades if decade % step == 0]
        axis.set_xticks([rarest - 4.4 * width, *shown], ["never", *(f"{10.0**decade:g}" for decade in shown)])
        axis.set(yscale="log", ylim=(0.6, 6 * max(int((~fired).sum()), *np.histogram(frequency, 44)[0], 1)))
        axis.set(xlabel=f"share of {shift.n_tokens:,d} tokens on which a feature fires", ylabel="features")
        axis.set_xlim(rarest - 7 * width, 0.5 * width)
        plain(axis.yaxis)
        legend_below(figure, axis)
    return figure


def dead_over_tokens(
    curve: list[list[float]], fired_once: float, pathway: str = "TopK", narrow: bool = False
) -> Figure:
    """What has not fired yet is dead so far; as many tokens again may wake as many as `fired_once` (`death.py`)."""
    tokens, relu, total = np.array(curve, float).T
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 2.2, narrow)
        axis.fill_between(tokens, 0, 100 * relu, color=RELU, lw=0, label=fates(pathway)[0])
        axis.fill_between(tokens, 100 * relu, 100 * total, color=TOPK, lw=0, label=fates(pathway)[1])
        axis.plot(tokens, 100 * total, "o-", ms=3, lw=1, color="black", label="dead in total", clip_on=False)
        least, now = 100 * max(total[-1] - fired_once, 0), 100 * total[-1]
        ahead = f"as many tokens again: {least:.1f} to {now:.1f} %"
        axis.fill_between([tokens[-1], 2 * tokens[-1]], [now, least], now, color="black", alpha=0.25, lw=1, label=ahead)
        said = [f"{100 * share:.1f} % after {count:,.0f}" for count, share in zip(tokens[-2:], total[-2:], strict=True)]
        axis.set(xscale="log", xlabel="tokens seen", ylabel="dead so far (%)", title=", ".join(said), ylim=(0, 100))
        if len(tokens) < 2:
            axis.set_xlim(tokens[0] / 2, 2 * tokens[0])
        apart = (tokens[-1] / tokens[0]) ** (0.25 if narrow else 0.12)  # the factor that labels need between them
        ticks = [tokens[-1]]
        for count in tokens[-2::-1]:
            ticks += [count] if count * apart <= ticks[-1] else []
        axis.set_xticks(ticks, [f"{count:,.0f}" for count in ticks])
        axis.minorticks_off()
        legend_below(figure, axis)
    return figure


def alignment(cosines: Float[np.ndarray, "n"], shift: Shift, narrow: bool = False) -> Figure:
    """Cosine of every feature's encoder row with the mean, coloured by fate."""
    limit = max(0.05, 1.05 * float(np.abs(cosines).max()))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 2.4, narrow)
        by_fate(axis, cosines, shift, np.linspace(-limit, limit, 62))
        axis.set(xlabel="cosine of the encoder row with the mean", ylabel="features")
        legend_below(figure, axis, reverse=True)
    return figure
