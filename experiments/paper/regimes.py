"""Under which conditions the paper's numbers appear: death by pathway, and the bias, over what its text leaves open.

    python -m experiments.paper.regimes --workdir=runs/regimes --scale=cpu [--part=base]

Sparse signal (d 64, 128 true features, 5 active; n 256, k 5; batches of 32), 200,000 steps of Adam without decay, three
seeds, each with true features, tokens and initial rows of its own. Members differ in gamma_raw, learning rate,
condition, and in the size of the data: ‖sigma‖ = √d, as this package scales them, or 2, as in the paper's notebook (to
which a bias has a quarter of the way). Parts: `base`, mean in one dimension; `decoder`, with decoder rows of any norm; `clip`, without
clipping; `k_aux`, an AuxK of few features a token; `spread`, mean in all dimensions. Each part writes what it has found
after every evaluation; killed, it goes on from there. Writes regimes.csv and regimes.png of the parts there are.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from experiments import command
from experiments.paper import toys
from experiments.paper.toys import Member, Toy
from sae_jax.reports import tables

GAMMAS, RATES, SIZES, SEEDS = (5.0, 20.0, 40.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1.0, 0.25), (0, 1, 2)
PARTS = ("base", "decoder", "clip", "k_aux", "spread")
OTHER: dict[str, Any] = {"decoder": {"unit": False}, "clip": {"clip": toys.FREE}, "spread": {"direction": "spread"}}
STEPS = {"smoke": 200, "cpu": 200_000, "paper": 2_000_000}
AT = (0, 1 / 10, 1)  # of the run: what the table shows


def members(part: str, scale: str) -> list[Member]:
    """The SAEs of one part."""
    rates = RATES if part == "base" else RATES[1:4]
    grid = list(itertools.product(GAMMAS, rates, SIZES, SEEDS))
    if scale == "smoke":
        grid = [(gamma, 1e-3, size, 0) for gamma in GAMMAS[1:] for size in SIZES]
    conditions = {"base": ("baseline", "AuxK", "frozen bias"), "k_aux": ("AuxK of 5",)}.get(part, ("baseline", "AuxK"))
    return [
        Member(g, rate, size, condition=condition, seed=seed, **OTHER.get(part, {}))
        for condition in conditions for g, rate, size, seed in grid if condition != "frozen bias" or size == 1
    ]  # fmt: skip


def rows(part: str, of: list[Member], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over seeds of what is measured at the start, after a tenth and at the end."""
    end = history[-1]["step"]
    entries = [max((e for e in history if e["step"] <= share * end), key=lambda e: e["step"]) for share in AT]
    found = []
    for kind in dict.fromkeys(member._replace(seed=0) for member in of):
        which = [i for i, member in enumerate(of) if member._replace(seed=0) == kind]
        row = {"part": part, **{k: v for k, v in kind._asdict().items() if k not in ("seed", "clip", "unit")}}
        for key in toys.MEASURES:
            for entry in entries if key.startswith("dead") or key == "bias_projection" else entries[-1:]:
                values = np.asarray([entry[key][i] for i in which])
                row[f"{key} {entry['step']}"] = f"{values.mean():.3f} [{values.min():.3f}, {values.max():.3f}]"
        found.append(row)
    return found


def main(workdir: Path, scale: str, part: str = "") -> None:
    """Trains the parts that are asked for, one after another; then the table."""
    toy = Toy(steps=STEPS[scale], held_out=1000 if scale == "smoke" else 20_000)
    for name in [part] if part else PARTS:
        toys.train(toy, members(name, scale), workdir / name)
    summarise(workdir)


def summarise(workdir: Path) -> None:
    """The table of what is trained so far."""
    found = []
    for name in PARTS:
        if (workdir / f"{name}.json").exists():
            found += rows(name, *toys.read(workdir / name))
    tables.write_csv(workdir / "regimes.csv", found)


if __name__ == "__main__":
    command.start(main, "regimes", part=PARTS)
