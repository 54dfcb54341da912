"""Forecasts of what is dead after training, from pilots.csv, against the runs of race.csv: alive.md's table and errors.

    python -m experiments.death.pilots_scored

A pair of pilots differs in the learning rate alone; the forecast is that of `diagnose --pilot`. Means over seeds.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from sae_jax.diagnosis import pilot

HERE = Path(__file__).parent
LARGE = 4096
SEEN = ("2", "9", "13", "17", "minilm-l6-3")  # at n 1024 one seed of these led to the geometric mean; no other did
ARMS = ("plain", "balance", "auxk")
Key = tuple[str, int, str]  # layer, n, arm


def dead(name: str) -> dict[Key, dict[str, list[float]]]:
    """Shares dead in total by seed, lowest learning rate first."""
    found: dict[Key, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with open(HERE / name, newline="") as file:
        for row in csv.DictReader(file):
            key = row["layer"], int(row["n"]), row["arm"]
            found[key][row["seed"]].append((float(row["learning_rate"]), float(row["dead_total"])))
    return {key: {seed: [share for _, share in sorted(pair)] for seed, pair in seeds.items()}
            for key, seeds in found.items()}  # fmt: skip


def scored() -> dict[Key, dict[str, float]]:
    """What the low and the high pilot, the forecast and the run leave dead, of each that has all, in percent."""
    runs, rows = dead("race.csv"), {}
    for (layer, n, arm), pairs in dead("pilots.csv").items():
        run = runs.get((layer, n, arm))
        if run and all(len(pair) == 2 for pair in pairs.values()):
            forecast = np.mean([pilot.between(low, high, n) for low, high in pairs.values()])
            low, high = np.mean(list(pairs.values()), axis=0)
            rows[layer, n, arm] = {"low": 100 * low, "high": 100 * high, "forecast": 100 * float(forecast),
                                   "run": 100 * float(np.mean(list(run.values())))}  # fmt: skip
    return rows


def errors(rows: dict[Key, dict[str, float]], which: str = "forecast") -> dict[str, tuple[float, float]]:
    """Mean and largest distance from the run, in points, of each arm and of all."""
    off = {key: abs(row[which] - row["run"]) for key, row in rows.items()}
    parts = {arm: [error for key, error in off.items() if key[2] == arm] for arm in ARMS} | {"all": list(off.values())}
    return {arm: (float(np.mean(part)), float(np.max(part))) for arm, part in parts.items() if part}


def main() -> None:
    """Prints the table, and the errors of each size."""
    rows = scored()
    for (layer, n, arm), row in rows.items():
        print(f"{layer:22s} n {n:<5d} {arm:8s} " + "  ".join(f"{key} {value:5.1f} %" for key, value in row.items()))
    for name, mine in {
        "n 4096": {key: row for key, row in rows.items() if key[1] == LARGE},
        "n 1024 and less": {key: row for key, row in rows.items() if key[1] < LARGE},
        "n 1024 and less, not seen": {key: row for key, row in rows.items() if key[1] < LARGE and key[0] not in SEEN},
        "all": rows,
        "all not seen": {key: row for key, row in rows.items() if key[1] == LARGE or key[0] not in SEEN},
    }.items():  # fmt: skip
        for which in ("low", "high", "forecast") if mine else ():
            found = ", ".join(f"{arm} {mean:.1f} ({most:.1f})" for arm, (mean, most) in errors(mine, which).items())
            print(f"{name}: {which}: mean error in points (largest): {found}")


if __name__ == "__main__":
    main()
