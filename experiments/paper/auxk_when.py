"""When AuxK helps and when it kills: woken before the SAE explains most of the variance, and after.

    pip install -e ".[bundled]"
    python -m experiments.paper.auxk_when --workdir=runs/auxk_when --scale=cpu --layers=13

The runs of figure S7, 3,000 steps of them: without AuxK, and with that of dictionary_learning, which takes up features
that were silent for 50 steps, or for 1,000; three seeds. On synthetic data AuxK has more dead than its baseline where
that has an FVE below 0.4, and fewer above 0.6 (regimes_auxk.csv). A layer takes some 15 minutes of one core; what is
stopped goes on, what has ended is read. Writes auxk_when.csv, where rows of other layers stay: of each evaluation after
waking the baseline's FVE, and what is dead without and with AuxK.
"""

from pathlib import Path
from typing import Any

from experiments import command, layers
from experiments.paper import figS7_real_dynamics
from sae_jax.reports import tables
from sae_jax.runtime import disk
from sae_jax.training import run as run_lib

STEPS = {"smoke": 20, "cpu": 3000, "paper": 20_000}
WAKES = {"smoke": (2, 10), "cpu": (50, 1000), "paper": (50, 1000)}  # steps of silence


def train(workdir: Path, scale: str, on: str, wake: int) -> list[dict[str, Any]]:
    """The run of one layer with AuxK that wakes so late; 0: without it."""
    condition = "AuxK" if wake else "baseline"
    c = figS7_real_dynamics.settings(on, scale, condition, workdir)
    c.train.steps, c.checkpoint.every = STEPS[scale], STEPS[scale] // 2
    c.auxk.dead_after_tokens = c.train.batch_size * max(1, wake)
    folder = workdir / (f"{on}_{condition}_{wake}" if wake else f"{on}_{condition}")
    run_lib.train(c, str(folder))
    return figS7_real_dynamics.told(on, condition, folder)


def compared(wake: int, base: list[dict[str, Any]], auxk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each evaluation after waking: the baseline's FVE, and percent dead without and with AuxK.

    `more`: with AuxK than without; `apart`: no seed of one lies within the range of the other.
    """
    rows = []
    for without, with_it in zip(base, auxk, strict=True):
        if without["step"] <= wake:
            continue
        more = 100 * (with_it["dead_total"] - without["dead_total"])
        rows.append({
            "on": without["on"], "wakes": str(wake), "step": str(without["step"]), "fve": f"{without['fve']:.3f}",
            **{f"{key}{end}": f"{100 * row[key]:.1f}" for key in ("dead_total", "dead_by_relu")
               for end, row in (("", without), ("_auxk", with_it))},
            "more": f"{more:.1f}",
            "apart": "yes" if with_it["dead_total_low"] > without["dead_total_high"]
            or with_it["dead_total_high"] < without["dead_total_low"] else "no",
        })  # fmt: skip
    return rows


def main(workdir: Path, scale: str) -> None:
    """Trains, prints and writes the table."""
    path = workdir / "auxk_when.csv"
    for on in layers.named("13"):
        base = train(workdir, scale, on, 0)
        rows = [row for wake in WAKES[scale] for row in compared(wake, base, train(workdir, scale, on, wake))]
        others = disk.read_csv("--workdir", path, dict.fromkeys(rows[0], str)) if path.exists() else []
        tables.write_csv(path, [row for row in others if row["on"] != on] + rows)
        for row in rows:
            print(tables.one_line(row))


if __name__ == "__main__":
    command.start(main, "auxk_when")
