"""Forecasts of what is dead after training, from pilots.csv, against the runs of race.csv: alive.md's table and errors.

    python -m experiments.death.pilots_scored

A pair of pilots differs in the learning rate alone; the forecast is that of `diagnose --pilot`. Means over seeds. In
brackets, of each forecast: the pilot with the run's noise, and that with its drift.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from experiments import command
from sae_jax.diagnosis import pilot
from sae_jax.errors import Refused
from sae_jax.runtime import disk

HERE = Path(__file__).parent
LARGE = 4096
SEEN = ("2", "9", "13", "17", "minilm-l6-3")  # at n 1024 one seed of these led to the geometric mean; no other did
ARMS = ("plain", "balance", "auxk")
NAMES = {
    "2": "Gemma 2", "5": "Gemma 5", "9": "Gemma 9", "13": "Gemma 13", "17": "Gemma 17", "minilm-l6-3": "MiniLM 3",
    "antiberty-4": "AntiBERTy 4", "efficientnet-lite0-8": "EfficientNet 8", "efficientnet-lite0-16": "EfficientNet 16",
}  # fmt: skip
Key = tuple[str, int, str]  # layer, n, arm


def dead(name: str, each: int) -> dict[Key, list[list[float]]]:
    """Shares dead in total, a list for each seed, lowest learning rate first.

    Raises:
      Refused: a seed has not `each` of them.
    """
    found: dict[Key, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    columns = {"layer": str, "arm": str, "seed": str, "n": int, "learning_rate": float, "dead_total": float}
    for row in disk.read_csv("", HERE / name, columns):
        found[row["layer"], row["n"], row["arm"]][row["seed"]].append((row["learning_rate"], row["dead_total"]))
    for key, seeds in found.items():
        for seed, rows in seeds.items():
            if len(rows) != each:
                raise Refused(name, len(rows), f"{each} rows for seed {seed} of {key}")
    return {key: [[share for _, share in sorted(rows)] for rows in seeds.values()] for key, seeds in found.items()}


def scored() -> dict[Key, dict[str, float]]:
    """What the pilots leave dead, the forecast and the run, of each that has both, in percent."""
    runs, found = dead("race.csv", 1), {}
    for key, pairs in dead("pilots.csv", 2).items():
        if key in runs:
            low, high = np.mean(pairs, axis=0)
            forecast = np.mean([pilot.between(one, other, key[1]) for one, other in pairs])
            shares = {"low": low, "high": high, "forecast": forecast, "run": np.mean(runs[key])}
            found[key] = {name: 100 * float(share) for name, share in shares.items()}
    return found


def table(rows: dict[Key, dict[str, float]]) -> list[str]:
    """The lines of alive.md."""
    lines = []
    for layer, n in dict.fromkeys(key[:2] for key in rows):
        cells = [NAMES[layer] + (f", n {n}" if n == LARGE else "")]
        for arm in ARMS:
            cells.append("{forecast:.1f} ({low:.1f}, {high:.1f}), {run:.1f}".format(**rows[layer, n, arm]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def errors(rows: dict[Key, dict[str, float]], which: str = "forecast") -> dict[str, tuple[float, float]]:
    """Mean and largest distance from the run, in points, of each arm and of all."""
    off = {key: abs(row[which] - row["run"]) for key, row in rows.items()}
    parts = {arm: [error for key, error in off.items() if key[2] == arm] for arm in ARMS} | {"all": list(off.values())}
    return {arm: (float(np.mean(part)), float(np.max(part))) for arm, part in parts.items() if part}


def main() -> None:
    """Prints the table, and the errors of each size."""
    rows = scored()
    print("\n".join(table(rows)))
    large = {key: row for key, row in rows.items() if key[1] == LARGE}
    small = {key: row for key, row in rows.items() if key not in large}
    new = {key: row for key, row in small.items() if key[0] not in SEEN}
    for name, mine in {
        "n 4096": large, "n 1024 and less": small, "n 1024 and less, not seen": new,
        "all": rows, "all not seen": large | new,
    }.items():  # fmt: skip
        for which in ("low", "high", "forecast"):
            found = ", ".join(f"{arm} {mean:.1f} ({most:.1f})" for arm, (mean, most) in errors(mine, which).items())
            print(f"{name}: {which}: mean error in points (largest): {found}")


if __name__ == "__main__":
    command.run(main)
