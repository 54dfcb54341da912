"""Under which conditions the paper's numbers appear: death by pathway, and the bias, over what its text leaves open.

    python -m experiments.paper.regimes --workdir=runs/regimes --scale=cpu [--part=base]

Sparse signal (d 64, 128 true features, 5 active; n 256, k 5; batches of 32), 200,000 steps of Adam without decay, three
seeds, each with true features, tokens and initial rows of its own. Members differ in gamma_raw, learning rate,
condition, and in the size of the data: ‖sigma‖ = √d, as this package scales them, or 2, as in the paper's notebook (to
which a bias has a quarter of the way). Parts: `base`, mean in one dimension; `decoder`, with decoder rows of any norm;
`clip`, without clipping; `k_aux`, an AuxK of few features a token; `spread`, mean in all dimensions; `frozen`, AuxK
with the bias frozen; `long_20` and `long_40`, trained only where named, ten times as many steps for biases that have
not arrived. On a CPU one command trains one part, `base` if none is named, in at most some 85 minutes of one core; on
an accelerator all but the long ones. Each part writes what it has found after every evaluation; killed, it goes on from
there. Writes regimes.csv and regimes.png of the parts there are, and regimes_auxk.csv: what AuxK does to its baseline
by how much of the variance that explains. The first five took six and a half minutes on an H200.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from experiments import command
from experiments.paper import toys
from experiments.paper.toys import Member, Toy
from sae_jax.reports import figures, tables

GAMMAS, RATES, SIZES, SEEDS = (5.0, 20.0, 40.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1.0, 0.25), (0, 1, 2)
PARTS = ("base", "decoder", "clip", "k_aux", "spread", "frozen", "long_20", "long_40")
# Learning rate, size, direction of the mean: of the baselines whose bias is on its way after 200,000 steps.
LONG = ((3e-4, 1.0, "one"), (3e-4, 0.25, "one"), (1e-3, 1.0, "one"), (3e-4, 0.25, "spread"), (1e-3, 0.25, "spread"))
OTHER: dict[str, Any] = {"decoder": {"unit": False}, "clip": {"clip": toys.FREE}, "spread": {"direction": "spread"}}
STEPS = {"smoke": 200, "cpu": 200_000, "paper": 2_000_000}
CURVES = ("dead_by_relu", "dead_by_topk", "bias_projection")  # what the table has of the start and on the way too
BIAS = (0.5, 0.6, 0.7)  # where the paper's bias is when it has features stuck
EDGES = (-np.inf, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)  # of the baseline's FVE
PANELS = (
    (("baseline, mean in one dimension", "base", "baseline"), ("AuxK", "base", "AuxK"),
     ("frozen bias (√d alone)", "base", "frozen bias")),
    (("mean spread", "spread", "baseline"), ("spread, AuxK", "spread", "AuxK"), ("decoder free", "decoder", "baseline"),
     ("no clipping", "clip", "baseline"), ("AuxK, 5 a token", "k_aux", "AuxK of 5")),
)  # fmt: skip


def members(part: str, scale: str) -> list[Member]:
    """The SAEs of one part."""
    if part.startswith("long"):
        gamma = float(part.removeprefix("long_"))
        kinds, seeds = (LONG[:2], SEEDS[:1]) if scale == "smoke" else (LONG, SEEDS)
        return [Member(gamma, rate, size, direction, seed=seed) for rate, size, direction in kinds for seed in seeds]
    rates = RATES if part == "base" else RATES[1:4]
    grid = list(itertools.product(GAMMAS, rates, SIZES, SEEDS))
    if scale == "smoke":
        grid = [(gamma, 1e-3, size, 0) for gamma in GAMMAS[1:] for size in SIZES]
    conditions = {
        "base": ("baseline", "AuxK", "frozen bias"), "k_aux": ("AuxK of 5",), "frozen": ("AuxK, frozen bias",)
    }.get(part, ("baseline", "AuxK"))  # fmt: skip
    return [
        Member(g, rate, size, condition=condition, seed=seed, **OTHER.get(part, {}))
        for condition in conditions for g, rate, size, seed in grid if size == 1 or "frozen" not in condition
    ]  # fmt: skip


def rows(part: str, of: list[Member], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds at the start, about a tenth and at the end; ranges at the end; and what came when.

    `half`: the evaluation by which half of the fall of dead in total has happened, where it falls by a tenth of all.
    `relu_at_b`: dead by ReLU when the bias is first seen this far, where every seed's comes there.
    """
    end = history[-1]["step"]
    start, tenth = history[0], max((e for e in history if e["step"] <= end / 10), key=lambda e: e["step"])
    found = []
    for kind in dict.fromkeys(member._replace(seed=0) for member in of):
        which = [i for i, member in enumerate(of) if member._replace(seed=0) == kind]
        row = {"part": part, **{k: v for k, v in kind._asdict().items() if k not in ("seed", "clip", "unit")}}
        row |= {"seeds": len(which), "steps": end}
        for key in toys.MEASURES:
            if key in CURVES:
                row |= {f"{key}_start": mean(start, key, which), f"{key}_{tenth['step']}": mean(tenth, key, which)}
            last = [history[-1][key][i] for i in which]
            row |= {f"{key}_end": mean(history[-1], key, which), f"{key}_low": min(last), f"{key}_high": max(last)}
        totals = [[e["dead_by_relu"][i] + e["dead_by_topk"][i] for e in history] for i in which]
        halves = [half(curve) for curve in totals]
        fallen = [history[at]["step"] for at in halves if at is not None]
        row |= {"half_low": min(fallen), "half_high": max(fallen)} if len(fallen) == len(which) else {}
        for level in BIAS:
            there = [next((e for e in history if e["bias_projection"][i] >= level), None) for i in which]
            if all(there):
                relu = [e["dead_by_relu"][i] for e, i in zip(there, which, strict=True) if e]
                row[f"relu_at_b_{level}"] = round(float(np.mean(relu)), 4)
        found.append(row)
    return found


def by_fve(parts: list[tuple[list[Member], list[dict[str, Any]]]], wakes: int) -> list[dict[str, Any]]:
    """What AuxK has more than its baseline, in points, by the baseline's FVE: at evaluations later than step `wakes`.

    A pair counts once in each row: as the mean of its evaluations there. `fewer`, `more`: percent of the pairs that
    have fewer, and more, dead in total with AuxK by a point and over.
    """
    seen: dict[float, dict[Any, list[tuple[float, ...]]]] = {low: {} for low, _ in itertools.pairwise(EDGES)}
    for part, (of, history) in enumerate(parts):
        place = {member: i for i, member in enumerate(of)}
        for member, i in place.items():
            j = place.get(member._replace(condition="AuxK"))
            if member.condition != "baseline" or j is None:
                continue
            for entry in history:
                if entry["step"] > wakes:
                    relu, by_topk, mmcs = (entry[k][j] - entry[k][i] for k in ("dead_by_relu", "dead_by_topk", "mmcs"))
                    low = max(edge for edge in EDGES[:-1] if edge <= entry["fve"][i])
                    seen[low].setdefault((part, member), []).append((100 * (relu + by_topk), 100 * relu, mmcs))
    rows = []
    for low, high in itertools.pairwise(EDGES):
        if seen[low]:
            more, relu, mmcs = np.array([np.mean(pair, axis=0) for pair in seen[low].values()]).T
            rows.append({
                "fve_from": low if low > -1 else "", "fve_to": high, "pairs": len(more),
                "evaluations": sum(map(len, seen[low].values())), "fewer": f"{100 * np.mean(more <= -1):.0f}",
                "more": f"{100 * np.mean(more >= 1):.0f}", "dead_total": f"{more.mean():.1f}",
                "dead_by_relu": f"{relu.mean():.1f}", "mmcs": f"{mmcs.mean():.3f}",
            })  # fmt: skip
    return rows


def mean(entry: dict[str, Any], key: str, which: list[int]) -> float:
    """Of a measure over some members."""
    return round(float(np.mean([entry[key][i] for i in which])), 4)


def half(curve: list[float]) -> int | None:
    """The place by which half of a curve's whole fall has happened; None where it falls by less than a tenth."""
    if curve[0] - min(curve) < 0.1:
        return None
    return next(i for i, value in enumerate(curve) if value <= (curve[0] + min(curve)) / 2)


def picture(table: list[dict[str, Any]]) -> Figure:
    """Dead by ReLU at the end, in colour, over learning rate, gamma and size; beside it in total; below it the bias."""
    kinds = sorted({(row["gamma"], -row["size"]) for row in table})
    names = [f"gamma {gamma:g}\n‖sigma‖ {'√d' if size == -1 else '2'}" for gamma, size in kinds]
    with matplotlib.rc_context({**figures.STYLE, "axes.grid": False}):
        figure = Figure(figsize=(figures.WIDE, 5.6), layout="constrained")
        places: Any = figure.subfigures(2)
        for place, panels in zip(places, PANELS, strict=True):
            axes = place.subplots(1, len(panels), sharey=True)
            for axis, (title, part, condition) in zip(axes, panels, strict=True):
                those = [row for row in table if row["part"] == part and row["condition"] == condition]
                drawn = fill(axis, those, kinds)
                axis.set_yticks(range(len(kinds)), names, size=6.5)
                axis.set_title(title, size=8)
            place.supxlabel("learning rate", size=8)
        bar = figure.colorbar(drawn, ax=axes)
        bar.set_label("dead by ReLU (%), which each cell has\nabove, / in total; below: b·mu / ‖mu‖²", size=7)
    return figure


def fill(axis: Axes, those: list[dict[str, Any]], kinds: list[tuple[float, float]]) -> AxesImage:
    """One panel: a cell for each rate and kind, grey where there is no SAE."""
    rates = sorted({row["rate"] for row in those})
    shown = np.full((len(kinds), len(rates) or 1), np.nan)
    for row in those:
        y, x = kinds.index((row["gamma"], -row["size"])), rates.index(row["rate"])
        shown[y, x] = 100 * row["dead_by_relu_end"]
        total = 100 * (row["dead_by_relu_end"] + row["dead_by_topk_end"])
        look: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if shown[y, x] > 55 else "black"}
        axis.text(x, y - 0.13, f"{shown[y, x]:.0f} / {total:.0f}", size=6, **look)
        axis.text(x, y + 0.27, f"{max(row['bias_projection_end'], 0):.2f}", size=5, **look)
    axis.set_facecolor("0.93")
    axis.set_xticks(range(len(rates)), [f"{rate:.0e}".replace("e-0", "e-") for rate in rates], size=6.5)
    axis.tick_params(length=0)
    return axis.imshow(shown, vmin=0, vmax=100, cmap="Reds", aspect="auto")


def main(workdir: Path, scale: str, part: str = "") -> None:
    """Trains the parts that are asked for, one after another; then the table."""
    whole = scale == "smoke" or jax.default_backend() != "cpu"
    several = [name for name in PARTS if not name.startswith("long")] if whole else PARTS[:1]
    for name in [part] if part else several:
        steps = STEPS[scale] * (10 if name.startswith("long") else 1)
        toy = Toy(steps=steps, held_out=1000 if scale == "smoke" else 20_000)
        toys.train(toy, members(name, scale), workdir / name)
    summarise(workdir, scale)


def summarise(workdir: Path, scale: str) -> None:
    """The table of what is trained so far."""
    found, told = [], []
    for name in PARTS:
        if (workdir / f"{name}.json").exists():
            of, history = toys.read(workdir / name)
            found += rows(name, of, history)
            told.append((of, history))
    columns = list(dict.fromkeys(key for row in found for key in row))
    tables.write_csv(workdir / "regimes.csv", [{key: row.get(key, "") for key in columns} for row in found])
    figures.save(picture(found), epath.Path(workdir) / "regimes.png")
    pairs = by_fve(told, Toy(steps=STEPS[scale]).wakes)
    if pairs:
        tables.write_csv(workdir / "regimes_auxk.csv", pairs)


if __name__ == "__main__":
    command.start(main, "regimes", part=PARTS)
