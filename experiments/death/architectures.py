"""Does the mean kill features in BatchTopK, Matryoshka, JumpReLU and ReLU SAEs as well, and do the cures hold?

    python -m experiments.death.architectures --workdir=runs/architectures --scale=cpu --on=synthetic,9

`synthetic`: 256 true features in 64 dimensions, 5 active a token, one row each (n 256), a mean of gamma times the
signal; 4,000 steps of 128 at 1e-3. A number is a block of Gemma 3 270M, MODEL-NUMBER one of another model (n 1024, or 4
d_model where that is fewer; 2,000 steps of 256 at 3e-4, of JumpReLU and ReLU at 1e-3; `--activations=9=PATH` takes one
from a file). Three initialisations. All are held to the same L0 of 8, within 5 % where they can be: of JumpReLU and
ReLU the weight of the penalty is sought for each arm, by runs over a grid and up to five more, secants within and
doublings beyond. Where none brings a baseline there, the other arms are trained at the baseline's L0 as well. Losses
are SAELens' (`autoencoder/jumprelu.py`, `autoencoder/relu.py`), with decoder rows of unit norm throughout.

Every arm is a run of its own under the workdir: what is stopped goes on, what has ended is read. Writes
architectures.csv, and architectures.png of gammas, architectures_layers.png of layers.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
from absl import flags
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import synthetic as synthetic_config
from experiments import command, layers
from experiments.command import said
from sae_jax.config import base
from sae_jax.models import facts
from sae_jax.outliers import selections
from sae_jax.reports import figures, tables
from sae_jax.training import run as run_lib

SEEDS = (0, 1, 2)
GAMMAS = {"baseline": (0.0, 2.0, 5.0, 10.0, 20.0, 40.0), "auxk": (5.0, 20.0), "centred": (20.0,), "balance": (20.0,)}
L0, TOLERANCE = 8, 0.05
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {},
    "batch_topk": {"sae.activation": "batch_topk"},
    "matryoshka": {"sae.activation": "batch_topk", "sae.groups": "a quarter"},
    "jumprelu": {"sae.activation": "jumprelu", "sae.k": 0, "sparsity.preset": "saelens"},
    "relu": {"sae.activation": "relu", "sae.k": 0, "sparsity.preset": "saelens"},
}
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "auxk": {"auxk.preset": "dictionary_learning"},
    "centred": {"sae.center": "geometric_median"},
    "balance": {"sae.center": "geometric_median", "sae.balance": True},
}
WEIGHTS = np.geomspace(0.06, 1, 5)  # of the penalty, times √d, in which tokens are as long
AROUND = (0.8, 1.0, 1.25)  # times the weight of the first initialisation
AGAIN = 5  # more weights, one after another
ON = flags.DEFINE_list("on", ["synthetic"], "synthetic, blocks of Gemma 3 270M, or MODEL-BLOCK")
CHOSEN = flags.DEFINE_list("kinds", [], "architectures; all, if none is named")
SHOWN = {"baseline": "baseline", "auxk": "AuxK", "centred": "centred", "balance": "balanced"}
PATHWAYS = ("dead by ReLU", "dead by selection")
NAMES = selections.NAMES | {"matryoshka": "Matryoshka BatchTopK"}
KEYS = ("dead_by_relu", "dead_by_topk", "dead_total", "fve", "fve_without_giants", "l0", "mmcs")
Pairs = list[tuple[float, float]]  # log weight of the penalty, log L0 at the end


def arms_of(architecture: str) -> list[str]:
    """AuxK is no part of a library's JumpReLU or ReLU, and a ReLU selects nothing that could be balanced."""
    without = {"jumprelu": {"auxk"}, "relu": {"auxk", "balance"}}.get(architecture, set())
    return [arm for arm in ARMS if arm not in without]


def settings(on: str, scale: str, architecture: str, arm: str) -> ConfigDict:
    """The configuration that members share."""
    if on == "synthetic":
        c = synthetic_config.get_config()
        c.sae.n_features, c.sae.k, c.train.steps = 256, L0, 4000
        c.data.statistics_tokens, c.eval.n_tokens = 20_000, 20_000  # which are made anew each time they are needed
    else:
        c = base()
        c.train.batch_size = 256
        c.data.model.id, c.data.model.layer = layers.model_of(on, "--on")
        c.data.model.n_tokens, c.eval.n_tokens = 520_000, 104_000
        c.sae.n_features, c.sae.k, c.train.steps = min(1024, 4 * (facts.width(c.data.model) or 1024)), L0, 2000
    c.train.devices, c.auxk.preset, c.train.steps_per_dispatch = 1, "none", 100
    if scale == "smoke":
        c.data.model.id, c.data.signal, c.data.d_model, c.data.statistics_tokens = "", "sparse", 16, 1000
        c.sae.n_features, c.sae.k, c.train.steps = 32, 4, 40
        c.eval.n_tokens, c.eval.batch_size, c.train.steps_per_dispatch = 1000, 500, 20
    c.checkpoint.every = c.train.steps
    c.auxk.dead_after_tokens = c.train.batch_size * max(1, c.train.steps // 20)
    layers.give(c, on)
    own = {**ARCHITECTURES[architecture], **ARMS[arm]}
    if "sae.groups" in own:
        own["sae.groups"] = f"{c.sae.n_features // 4},{c.sae.n_features}"
    c.members = ConfigDict()
    c.update_from_flattened_dict(own)
    if c.sparsity.preset != "none":
        c.train.learning_rate = 1e-3  # in so few steps of 3e-4 thresholds and biases move by 0.6 at most
    return c


def trained(c: ConfigDict, members: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """A run of these members: name → its report."""
    config = ConfigDict(c.to_dict())
    config.members = ConfigDict(members)
    with mock.patch.object(run_lib.Run, "_draw"):  # no pages of runs that nobody looks at
        return {member["name"]: member for member in run_lib.train(config, str(folder))["members"]}


def member(point: str, seed: int, weight: float | None = None) -> dict[str, Any]:
    """One SAE: of synthetic data a point is a gamma."""
    found: dict[str, Any] = {"seed": seed}
    if point.startswith("gamma "):
        found["data"] = {"gamma": float(point.removeprefix("gamma "))}
    return found | ({} if weight is None else {"sparsity": {"weight": weight}})


def looked(c: ConfigDict, tries: dict[str, list[float]], folder: Path, seeds: tuple[int, ...]) -> dict[str, Pairs]:
    """What each point's weights lead to, in the mean of these seeds."""
    members = {f"{point}, {i}, {seed}": member(point, seed, weight)
               for point, weights in tries.items() for i, weight in enumerate(weights) for seed in seeds}  # fmt: skip
    found = trained(c, members, folder)
    return {
        point: [(float(np.log(weight)),
                 float(np.log(max(mean([found[f"{point}, {i}, {seed}"] for seed in seeds], "l0"), 1e-3))))
                for i, weight in enumerate(weights)]
        for point, weights in tries.items()
    }  # fmt: skip


def matched(
    c: ConfigDict, known: dict[str, Pairs], target: float, folder: Path, seeds: tuple[int, ...]
) -> dict[str, float]:
    """The weight of the penalty at which each point ends with this L0 in the mean of these seeds, or comes nearest.

    `known` is what `looked` has found at some weights.
    """
    tried = {point: list(pairs) for point, pairs in known.items()}
    for again in range(1, 1 + AGAIN):
        tries = {point: [float(np.exp(nearer(pairs, np.log(target))))] for point, pairs in tried.items()
                 if min(abs(l0 - np.log(target)) for _, l0 in pairs) > TOLERANCE / 2}  # fmt: skip
        if not tries:
            break
        for point, pairs in looked(c, tries, folder.with_name(f"{folder.name}_{again}"), seeds).items():
            tried[point] += pairs
    nearest = {point: min(pairs, key=lambda pair: abs(pair[1] - np.log(target))) for point, pairs in tried.items()}
    return {point: float(np.exp(weight)) for point, (weight, _) in nearest.items()}


def nearer(pairs: Pairs, target: float) -> float:
    """log weight to try for a log L0, which falls with the weight: between its neighbours, beyond all 2 times or 1/8.

    Downwards the steps are larger: a small weight changes L0 little.
    """
    pairs = sorted(pairs)
    for (a, high), (b, low) in zip(pairs, pairs[1:], strict=False):
        if low <= target <= high and high > low:
            return a + (b - a) * (high - target) / (high - low)
    return pairs[-1][0] + np.log(2) if pairs[0][1] > target else pairs[0][0] - np.log(8)


def ends(c: ConfigDict, weights: dict[str, Any], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Point → the reports of its initialisations, trained with these weights."""
    report = trained(c, {f"{point} seed {seed}": member(point, seed, weight)
                         for point, weight in weights.items() for seed in SEEDS}, folder)  # fmt: skip
    return {point: [report[f"{point} seed {seed}"] for seed in SEEDS] for point in weights}


def grid(c: ConfigDict, points: list[str]) -> dict[str, list[float]]:
    """The weights that are tried first."""
    root = (c.data.d_model if c.data.signal else facts.width(c.data.model) or 1) ** 0.5
    return {point: [float(root * weight) for weight in WEIGHTS] for point in points}


def held(
    c: ConfigDict, known: dict[str, Pairs], target: float, folder: Path, seeds: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Point → the weight that brings it to this L0, and the reports of its initialisations.

    It is sought on `seeds`. Where these come to the target and the mean of all initialisations does not, it is sought
    again on all.
    """
    weights = matched(c, known, target, folder.with_name(f"{folder.name}_weights"), seeds)
    found = ends(c, weights, folder)
    again = {point: [weight * by for by in AROUND] for point, weight in weights.items()
             if off(found[point], target) and not off(found[point][: len(seeds)], target)}  # fmt: skip
    if again:
        of_all = folder.with_name(f"{folder.name}_weights_of_all")
        pairs = looked(c, again, of_all.with_name(f"{of_all.name}_0"), SEEDS)
        weights |= matched(c, pairs, target, of_all, SEEDS)
        found |= ends(c, {point: weights[point] for point in again}, folder.with_name(f"{folder.name}_of_all"))
    return weights, found


def off(reports: list[dict[str, Any]], target: float) -> bool:
    """Whether their mean L0 is further from the target than is allowed."""
    return abs(mean(reports, "l0") / target - 1) > TOLERANCE


def mean(reports: list[dict[str, Any]], key: str) -> float:
    """Of a measure at the end; nan where there is none."""
    return float(np.mean([np.nan if one["final"].get(key) is None else one["final"][key] for one in reports]))


def main(workdir: Path, scale: str) -> None:
    """Trains, prints, writes the table and draws it."""
    rows: list[dict[str, Any]] = []
    for on in said(ON):
        for architecture in said(CHOSEN) or list(ARCHITECTURES):
            astray: dict[str, float] = {}  # points whose baseline no weight brings to the target → its L0
            for arm in arms_of(architecture):
                c = settings(on, scale, architecture, arm)
                target = float(settings(on, scale, "topk", arm).sae.k)
                points = [f"gamma {gamma:g}" for gamma in GAMMAS[arm]] if on == "synthetic" else [on]
                points = points[:1] if scale == "smoke" else points
                also = [point for point in points if point in astray]
                folder = workdir / f"{on}_{architecture}_{arm}"
                if c.sparsity.preset == "none":
                    runs = [(target, dict.fromkeys(points), ends(c, dict.fromkeys(points), folder))]
                else:
                    seeds = SEEDS if c.data.signal else SEEDS[:1]
                    known = looked(c, grid(c, points), folder.with_name(f"{folder.name}_weights_0"), seeds)
                    runs = [(target, *held(c, known, target, folder, seeds))]
                    if arm == "baseline":
                        astray = {point: mean(of, "l0") for point, of in runs[0][2].items() if off(of, target)}
                    for point in also:
                        at, there = astray[point], folder.with_name(f"{folder.name}_at_{astray[point]:.3g}")
                        runs.append((at, *held(c, {point: known[point]}, at, there, seeds)))
                for at, weights, found in runs:
                    for point, reports in found.items():
                        rows += [{
                            "on": point, "architecture": architecture, "arm": arm, "seed": str(seed),
                            "n": str(c.sae.n_features), "target_l0": f"{at:.3g}", "steps": str(c.train.steps),
                            "weight": "" if weights[point] is None else f"{weights[point]:.4g}",
                            "init_dead_by_relu": one["init"]["dead_by_relu"],
                            "init_dead_total": one["init"]["dead_total"],
                            **{key: one["final"].get(key) for key in KEYS},
                        } for seed, one in zip(SEEDS, reports, strict=True)]  # fmt: skip
                        final = tables.one_line({key: mean(reports, key) for key in KEYS})
                        print(f"{point:10s} {architecture:11s} {arm:9s} at {at:.3g}  {final}", flush=True)
                tables.write_csv(workdir / "architectures.csv", rows)
    for name, synthetic, draw in (("architectures", True, of_gammas), ("architectures_layers", False, of_layers)):
        mine = [row for row in rows if on_synthetic(row) == synthetic]
        if mine:
            figures.save(draw(at_one_l0(mine)), epath.Path(workdir) / f"{name}.png")


def at_one_l0(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each arm those at its baseline's L0, which stand last, where it was trained at two."""
    arms = [tuple(row[key] for key in ("on", "architecture", "arm")) for row in rows]
    last = {arm: row["target_l0"] for arm, row in zip(arms, rows, strict=True)}
    return [row for arm, row in zip(arms, rows, strict=True) if row["target_l0"] == last[arm]]


def on_synthetic(row: dict[str, Any]) -> bool:
    """Whether its point is a gamma."""
    return str(row["on"]).startswith("gamma ")


def of_gammas(rows: list[dict[str, Any]]) -> Figure:
    """Dead at the end, a panel an architecture: the baselines, then the arms at the largest of their gammas."""
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = figures.panels(len(names), 3, 2.4, False, sharey=True)
        for axis, name in zip(axes, names, strict=True):
            mine = [row for row in rows if row["architecture"] == name]
            last = {row["arm"]: row["on"] for row in mine if row["arm"] != "baseline"}
            kinds = [("baseline", on) for on in dict.fromkeys(r["on"] for r in mine if r["arm"] == "baseline")]
            kinds += list(last.items())
            bars(axis, [[row for row in mine if (row["arm"], row["on"]) == kind] for kind in kinds],
                 [on.removeprefix("gamma ") if arm == "baseline" else SHOWN[arm] for arm, on in kinds])  # fmt: skip
            axis.set(title=NAMES.get(name, name), xlabel=f"gamma; the rest at {kinds[-1][1].removeprefix('gamma ')}")
        for axis in axes[::3]:
            axis.set_ylabel("features dead (%)")
        figure.legend(axes[0].patches[:2], PATHWAYS, loc="lower right")
    return figure


def of_layers(rows: list[dict[str, Any]]) -> Figure:
    """Dead at the end, a row of panels an architecture, a column a layer: the arms side by side."""
    names, shown = (list(dict.fromkeys(row[key] for row in rows)) for key in ("architecture", "on"))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDE, 1.1 * len(names) + 1.2), layout="constrained")
        axes = figure.subplots(len(names), len(shown), squeeze=False, sharex=True, sharey=True)
        for name, across in zip(names, axes, strict=True):
            for layer, axis in zip(shown, across, strict=True):
                mine = [row for row in rows if (row["architecture"], row["on"]) == (name, layer)]
                bars(axis, [[row for row in mine if row["arm"] == arm] for arm in ARMS], list(SHOWN.values()))
            across[0].set_ylabel(NAMES.get(name, name).replace(" ", "\n"))
        for layer, axis in zip(shown, axes[0], strict=True):
            model, block = layers.model_of(layer)
            axis.set_title(f"{model}\nblock {block}")
        figure.supylabel("features dead (%)", size=9)
        figure.legend(axes[0][0].patches[:2], PATHWAYS, loc="outside lower center", ncols=2)
    return figure


def bars(axis: Axes, kinds: list[list[dict[str, Any]]], ticks: list[str]) -> None:
    """Dead by pathway at the end: means over a kind's rows, whiskers in total; L0 where it is not 8."""
    for place, found in enumerate(kinds):
        if not found:
            axis.text(place, 2, "–", ha="center", color="0.5")  # the library has no such arm
            continue
        relu, other, total = (100 * np.array([float(row[key]) for row in found]) for key in KEYS[:3])
        axis.bar(place, relu.mean(), 0.75, color=figures.RELU)
        axis.bar(place, other.mean(), 0.75, bottom=relu.mean(), color=figures.TOPK)
        ends = [[total.mean() - total.min()], [total.max() - total.mean()]]
        axis.errorbar(place, total.mean(), ends, color="black", lw=0.8, capsize=2)
        l0 = np.mean([float(row["l0"]) for row in found])
        if abs(l0 / L0 - 1) > TOLERANCE:
            axis.text(place, min(total.max() + 3, 92), f"L0 {l0:.2g}", ha="center", va="bottom", size=5.5)
    axis.set_xticks(range(len(ticks)), ticks, rotation=90 if len(ticks) > 3 else 0)
    axis.set(ylim=(0, 102))
    axis.grid(visible=False, axis="x")


if __name__ == "__main__":
    command.start(main, "architectures")
