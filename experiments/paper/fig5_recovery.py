"""Figure 5: two phases of recovery and the bias that crawls, over gamma and five conditions; bands over seeds.

    python -m experiments.paper.fig5_recovery --workdir=runs/fig5 --scale=cpu [--part=0_plain]

Sparse signal with its mean in one dimension (`toys.Toy`), gamma_raw 5, 20 and 40: the bias learned or frozen at zero,
without AuxK and with it, and balanced selection; each seed has true features, tokens and initial rows of its own. A
part is one seed without AuxK, or with it: 18 and 39 minutes of one core. Parts can be trained side by side, and killed,
one goes on from its last evaluation. Without --part those of three seeds are trained, one after another. Writes, of the
parts there are, as far as all of a kind have come, fig5_recovery.csv (means over seeds, least and most),
fig5_claims.csv (the numbers behind the claims) and fig5_recovery.png. Expect dead-by-TopK to fall early whatever the
condition, dead-by-ReLU only as b comes to mu, later the larger gamma.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import command
from experiments.paper import toys
from experiments.paper.toys import Member, Toy
from sae_jax.errors import Refused
from sae_jax.reports import figures, tables

GAMMAS, RATE, SEEDS = (5.0, 20.0, 40.0), 3e-4, (0, 1, 2, 3, 4)
HALVES = {"plain": ("baseline", "frozen bias", "balanced"), "auxk": ("AuxK", "AuxK, frozen bias")}
CONDITIONS = ("baseline", "AuxK", "frozen bias", "AuxK, frozen bias", "balanced")
PARTS = tuple(f"{seed}_{half}" for seed in SEEDS for half in HALVES)
FIRST = PARTS[:6]  # three seeds: what one command trains, in three hours
STEPS = {"smoke": 200, "cpu": 2_000_000, "paper": 2_000_000}
Curves = dict[tuple[str, float], tuple[np.ndarray, dict[str, np.ndarray]]]


def members(part: str) -> list[Member]:
    """The SAEs of one part."""
    seed, half = part.split("_")
    return [Member(gamma, RATE, condition=condition, seed=int(seed)) for condition in HALVES[half] for gamma in GAMMAS]


def curves(workdir: Path) -> Curves:
    """(condition, gamma) → steps, and of every measure the values of each seed there is (seeds, evaluations).

    Raises:
      Refused: the parts are of different scales.
    """
    found: dict[tuple[str, float], tuple[np.ndarray, dict[str, list[list[float]]]]] = {}
    for part in PARTS:
        if not (workdir / f"{part}.json").exists():
            continue
        of, history = toys.read(workdir / part)
        steps = np.array([entry["step"] for entry in history])
        for i, member in enumerate(of):
            values = {key: [entry[key][i] for entry in history] for key in toys.MEASURES}
            values["dead_total"] = [a + b for a, b in zip(values["dead_by_relu"], values["dead_by_topk"], strict=True)]
            seen, so_far = found.setdefault((member.condition, member.gamma), (steps, {key: [] for key in values}))
            shorter = min(len(seen), len(steps))  # where a part is still on its way
            if (seen[:shorter] != steps[:shorter]).any():
                raise Refused("--workdir", str(workdir), "a folder whose parts are of one scale")
            found[member.condition, member.gamma] = seen[:shorter], {
                key: [row[:shorter] for row in [*so_far[key], values[key]]] for key in values
            }
    return {key: (steps, {k: np.array(v) for k, v in values.items()}) for key, (steps, values) in found.items()}


def table(found: Curves) -> list[dict[str, Any]]:
    """A row for each condition, gamma and evaluation: mean over seeds, least and most."""
    rows = []
    for (condition, gamma), (steps, values) in found.items():
        for at, step in enumerate(steps):
            row = {"condition": condition, "gamma": f"{gamma:g}", "step": int(step), "seeds": len(values["mmcs"])}
            for key, seen in values.items():
                row |= {key: f"{seen[:, at].mean():.4g}", f"{key}_low": f"{seen[:, at].min():.4g}",
                        f"{key}_high": f"{seen[:, at].max():.4g}"}  # fmt: skip
            rows.append(row)
    return rows


def first(steps: np.ndarray, there: np.ndarray) -> list[int | None]:
    """The step of the first evaluation at which each seed is there; None where it never is."""
    return [int(steps[seed.argmax()]) if seed.any() else None for seed in there]


def told(values: list[int | None], earliest: int) -> str:
    """Least to most; – where a seed has not come there. ≤ marks the earliest step at which anybody looked."""
    if None in values:
        return "–"
    ends = sorted({min(values), max(values)})  # type: ignore[type-var]
    return " to ".join(f"{'≤' if value == earliest else ''}{value:,}" for value in ends)


def claims(found: Curves) -> list[dict[str, Any]]:
    """The numbers behind the paper's claims: percent of features at the start, at a tenth (`tenth`: which step), at the
    end (`steps`); `half`: by when half of the fall of dead-by-TopK to its lowest has happened, if it is a tenth of all.
    """
    rows = []
    for gamma in GAMMAS:
        for condition in CONDITIONS:
            if (condition, gamma) not in found:
                continue
            steps, values = found[condition, gamma]
            marks = [0, int(np.flatnonzero(steps <= steps[-1] / 10)[-1]), len(steps) - 1]
            topk, bias = values["dead_by_topk"], values["bias_projection"]
            start, lowest = topk[:, :1], topk.min(axis=1, keepdims=True)
            fallen = (topk <= (start + lowest) / 2) & (start - lowest >= 0.1)
            row: dict[str, Any] = {"gamma": f"{gamma:g}", "condition": condition, "seeds": str(len(topk)),
                                   "tenth": str(steps[marks[1]]), "steps": str(steps[-1])}  # fmt: skip
            for key in ("dead_by_topk", "dead_by_relu"):
                last = 100 * values[key][:, -1]
                row[key] = " → ".join(f"{100 * values[key][:, at].mean():.0f}" for at in marks)
                row[f"{key}_end"] = f"{last.min():.0f} to {last.max():.0f}"
            rows.append(row | {
                "lowest": f"{100 * lowest.mean():.0f}",
                "half": told(first(steps, fallen), steps[1]),
                **{key: f"{100 * values[key][:, -1].mean():.0f}" for key in ("collateral", "revived")},
                "bias_projection": f"{bias[:, -1].mean():.2f} ({bias[:, -1].min():.2f} to {bias[:, -1].max():.2f})",
                **{f"steps_{share}": told(first(steps, bias >= share / 100), steps[1]) for share in (50, 90)},
                "mmcs": f"{values['mmcs'][:, -1].mean():.3f}",
            })  # fmt: skip
    return rows


def picture(found: Curves) -> Figure:
    """a, b, c: baseline over gamma; d, e, f: each pathway across the conditions. Bands: least to most over seeds."""
    colours = dict(zip(GAMMAS, ("#1b7837", "#e69f00", "#67001f"), strict=False))
    looks = dict(zip(CONDITIONS, figures.MEMBER_COLOURS, strict=False))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDE, 5.4), layout="constrained")
        axes = figure.subplots(2, 3)
        top = (("dead_total", "dead in total (%)", 100), ("bias_projection", "b·mu / ‖mu‖²", 1), ("mmcs", "MMCS", 1))
        for axis, (key, title, factor) in zip(axes[0], top, strict=True):
            for gamma, colour in colours.items():
                band(axis, found.get(("baseline", gamma)), key, factor, f"gamma {gamma:g}", color=colour)
            axis.set(title="baseline", ylabel=title)
        bottom = (("dead_by_topk", 20.0, "dead by TopK"), ("dead_by_relu", 20.0, "dead by ReLU"),
                  ("dead_by_relu", 40.0, "dead by ReLU"))  # fmt: skip
        for axis, (key, gamma, title) in zip(axes[1], bottom, strict=True):
            for condition, colour in looks.items():
                ls = "--" if "frozen" in condition else "-"
                band(axis, found.get((condition, gamma)), key, 100, condition, color=colour, ls=ls)
            axis.set(title=f"gamma {gamma:g}", ylabel=f"{title} (%)", xlabel="step", ylim=(-2, None))
        upper, lower = (row[0].get_legend_handles_labels() for row in axes)
        figure.legend(*upper, loc="outside upper center", ncols=3)
        figure.legend(*lower, loc="outside lower center", ncols=3)
        earliest, end = (max(steps[at] for steps, _ in found.values()) for at in (1, -1))
        for axis, letter in zip(axes.ravel(), "abcdef", strict=True):
            axis.set_title(letter, loc="left", weight="bold")
            axis.set(xscale="log", xlim=(earliest, end))
    return figure


def band(axis: Axes, curve: Any, key: str, factor: float, label: str, **look: Any) -> None:
    """The mean over seeds, on a band from the least to the most."""
    if curve is None:
        return
    steps, seen = curve[0][1:], factor * curve[1][key][:, 1:]
    axis.fill_between(steps, seen.min(axis=0), seen.max(axis=0), color=look["color"], alpha=0.2, lw=0)
    axis.plot(steps, seen.mean(axis=0), lw=1.4, label=label, **look)


def main(workdir: Path, scale: str, part: str = "") -> None:
    """Trains the parts that are asked for, one after another; then the tables and the picture."""
    toy = Toy(steps=STEPS[scale], held_out=1000 if scale == "smoke" else 20_000)
    for name in [part] if part else FIRST:
        toys.train(toy, members(name), workdir / name, points=60)
    found = curves(workdir)
    tables.write_csv(workdir / "fig5_recovery.csv", table(found))
    tables.write_csv(workdir / "fig5_claims.csv", claims(found))
    figures.save(picture(found), epath.Path(workdir) / "fig5_recovery.png")
    for row in claims(found):
        print(tables.one_line(row))


if __name__ == "__main__":
    command.start(main, "fig5", part=PARTS)
