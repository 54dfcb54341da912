"""Figure S7: the two phases on real layers, six conditions, bands over three seeds.

    pip install -e ".[bundled]"
    python -m experiments.paper.figS7_real_dynamics --workdir=runs/real_dynamics --scale=cpu --layers=9

n 2048, k 16, 20,000 steps of 256 at 3e-4 without decay; 1.2M tokens of a layer, 100,000 of them held out; models of
text are shown the docstrings of the packages that this one needs. A number is a block of Gemma 3 270M, MODEL-NUMBER one
of another model; `--activations=9=PATH` takes one from a file. Death by pathway, bias and FVE (with LayerNorm of what
it leaves) at steps even in log. A layer takes some two hours of one core, half of them with AuxK. Every condition is a
run of its own under the workdir (`--condition` names one): what is stopped goes on, what has ended is read. Writes
figS7_real_dynamics.csv, where rows of other layers and conditions stay, and .png; `fig6_centering.py` draws layer 9.
`smoke` uses synthetic activations.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import command, layers
from sae_jax import config as config_lib
from sae_jax.reports import figures, tables
from sae_jax.runtime import checkpoint, disk
from sae_jax.training import run as run_lib

SEEDS = (0, 1, 2)
# steps, batch, n, k, learning rate, held-out tokens
SCALES = {
    "smoke": (20, 32, 64, 3, 1e-3, 200),
    "cpu": (20_000, 256, 2048, 16, 3e-4, 100_000),
    "paper": (200_000, 2048, 8192, 64, 3e-4, 100_000),
}
N_TOKENS = {"cpu": 1_200_000, "paper": 100_000_000}
AUXK, CENTRED = {"auxk.preset": "dictionary_learning"}, {"sae.center": "geometric_median"}
CONDITIONS: dict[str, dict[str, Any]] = {
    "baseline": {}, "AuxK": AUXK, "LayerNorm": {"data.norm": "layer_norm"}, "centred": CENTRED,
    "centred, AuxK": CENTRED | AUXK, "centred, balanced": CENTRED | {"sae.balance": True},
}  # fmt: skip
# Drawn in this order: a wide line first, so that those that lie on it are seen.
LOOKS: dict[str, dict[str, Any]] = {
    "baseline": {"color": "#9e9e9e", "lw": 3.0}, "AuxK": {"color": figures.MEMBER_COLOURS[1], "lw": 1.3},
    "LayerNorm": {"color": figures.MEMBER_COLOURS[2], "lw": 1.3, "ls": "--"},
    "centred": {"color": figures.MEMBER_COLOURS[3], "lw": 1.6},
    "centred, AuxK": {"color": figures.MEMBER_COLOURS[4], "lw": 1.3},
    "centred, balanced": {"color": figures.MEMBER_COLOURS[5], "lw": 1.6},
}  # fmt: skip
KEYS = ("dead_by_relu", "dead_by_topk", "dead_total", "bias_projection", "fve")


def settings(on: str, scale: str, condition: str, folder: Path) -> ConfigDict:
    """One run: members that differ in the seed alone."""
    steps, batch, n, k, rate, held_out = SCALES[scale]
    c = config_lib.base()
    c.sae.n_features, c.sae.k = n, k
    c.train.update(steps=steps, batch_size=batch, learning_rate=rate, decay_fraction=0.0)
    c.train.steps_per_dispatch = min(50, steps)
    c.auxk.preset, c.auxk.dead_after_tokens = "none", batch * max(1, steps // 20)
    c.eval.n_tokens, c.eval.points, c.checkpoint.every = held_out, 25, max(1, steps // 10)
    if scale == "smoke":
        c.data.update(signal="sparse", gamma=5.0, d_model=16, n_true_features=64, n_active=2, statistics_tokens=1000)
    else:
        model, block = layers.model_of(on)
        c.data.model.update(id=model, layer=block, n_tokens=N_TOKENS[scale])
        layers.point(c, on, folder)
    c.update_from_flattened_dict(CONDITIONS[condition])
    c.members = ConfigDict({f"seed{seed}": {"seed": seed} for seed in SEEDS})
    return c


def train(workdir: Path, scale: str, on: str, conditions: list[str]) -> list[dict[str, Any]]:
    """What is left of the runs of a layer; their rows."""
    rows = []
    for condition in conditions:
        folder = workdir / f"{on}_{condition.replace(', ', '_')}"
        run_lib.train(settings(on, scale, condition, workdir), str(folder))
        rows += told(on, condition, folder)
    return rows


def told(on: str, condition: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each evaluation of a run: mean over seeds, least and most."""
    rows = []
    for entry in checkpoint.history(str(folder)):
        row: dict[str, Any] = {"on": on, "condition": condition, "step": entry["step"], "seeds": len(SEEDS)}
        for key in KEYS:
            values = [float(entry["members"][f"seed{seed}"][key]) for seed in SEEDS]
            row |= {key: float(np.mean(values)), f"{key}_low": min(values), f"{key}_high": max(values)}
        rows.append(row)
    return rows


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Each pathway, the bias and the FVE over steps, a row of panels a layer."""
    panels = (("dead_by_topk", "dead by TopK (%)", 100), ("dead_by_relu", "dead by ReLU (%)", 100),
              ("bias_projection", "b·mu / ‖mu‖²", 1), ("fve", "FVE about the mean", 1))  # fmt: skip
    shown_layers = list(dict.fromkeys(row["on"] for row in rows))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.6, 2.1 * len(shown_layers) + 0.8), layout="constrained")
        axes = figure.subplots(len(shown_layers), len(panels), squeeze=False, sharex=True)
        for layer, across in zip(shown_layers, axes, strict=True):
            for axis, (key, label, factor) in zip(across, panels, strict=True):
                for name, look in LOOKS.items():
                    mine = [row for row in rows if (row["on"], row["condition"]) == (layer, name)]
                    if mine:
                        draw(axis, mine, key, factor, name, look)
                axis.set(xscale="log", title=label if layer == shown_layers[0] else "")
                if key == "fve":
                    axis.set_ylim(-0.05, 1.02)
            model, block = layers.model_of(layer)
            across[0].set_ylabel(f"{model}\nblock {block}")
        for axis in axes[-1]:
            axis.set_xlabel("step (0 at the left edge)")
        shown = {line.get_label(): line for across in axes for line in across[0].get_lines()}
        figure.legend([shown[name] for name in LOOKS if name in shown], [name for name in LOOKS if name in shown],
                      loc="outside lower center", ncols=6)  # fmt: skip
    return figure


def draw(axis: Any, mine: list[dict[str, Any]], key: str, factor: float, name: str, look: dict[str, Any]) -> None:
    """The mean over seeds, on a band from the least to the most."""
    at = [max(row["step"], 0.5) for row in mine]
    low, mean, high = (factor * np.array([row[f"{key}{end}"] for row in mine]) for end in ("_low", "", "_high"))
    axis.fill_between(at, low, high, color=look["color"], alpha=0.2, lw=0)
    axis.plot(at, mean, label=name, **look)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that a table has, if it is there."""
    columns = {"on": str, "condition": str, "step": int, "seeds": int} | {
        f"{key}{end}": float for key in KEYS for end in ("", "_low", "_high")
    }
    return disk.read_csv("--workdir", path, columns) if path.exists() else []


def main(workdir: Path, scale: str, condition: str = "") -> None:
    """Trains, writes the table, in which other layers and conditions stay, and the picture of all that it has."""
    path = workdir / "figS7_real_dynamics.csv"
    for on in layers.named("9"):  # one: several would take longer than three hours
        for name in [condition.replace("+", ", ")] if condition else CONDITIONS:
            found = train(workdir, scale, on, [name])
            others = [row for row in read(path) if (row["on"], row["condition"]) != (on, name)]
            tables.write_csv(path, others + found)
    path.with_suffix(".png").write_bytes(figures.png(picture(read(path))))


if __name__ == "__main__":
    command.start(main, "real_dynamics", condition=tuple(name.replace(", ", "+") for name in CONDITIONS))
