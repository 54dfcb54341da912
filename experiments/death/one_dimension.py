"""The baseline of configs/synthetic.py with its mean in one dimension: over initialisations, and what it hangs on.

    python -m experiments.death.one_dimension --workdir=runs/one_dimension --scale=cpu

gamma 20, d 64, 256 true features (5 active), n 1024, k 8, 4000 steps of 128, Adam at 1e-3 without decay; ten
initialisations on the same data, and variants of the first. Prints and writes one_dimension.csv; a few minutes on 2 CPU
cores. Expect as many features dead by ReLU as at the start, and MMCS far above the untrained floor of 0.40.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import synthetic
from experiments import command
from sae_jax.reports import tables
from sae_jax.training import run as run_lib

SEEDS = {"smoke": 2, "cpu": 10, "paper": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "clipped at 1/100": {"train": {"clip_norm": 0.01}},
    "clipped at 10": {"train": {"clip_norm": 10.0}},
    "hardly clipped": {"train": {"clip_norm": 1e9}},
    "warm-up of 1000 steps": {"train": {"warmup_steps": 1000}},
    "beta2 of 9 tenths": {"train": {"beta2": 0.9}},
    "beta2 of 99 hundredths": {"train": {"beta2": 0.99}},
    "decoder rows of any length": {"sae": {"unit_decoder": False}},
    "AuxK of SAELens": {"auxk": {"preset": "saelens"}},
    "AuxK of dictionary_learning": {"auxk": {"preset": "dictionary_learning"}},
}
KEYS = ("mmcs", "dead_by_relu", "dead_total", "fve", "bias_projection")


def main(workdir: Path, scale: str) -> None:
    """Trains all members on the same batches; writes the table."""
    c = synthetic.get_config()
    c.data.mean_direction, c.train.decay_fraction = "one", 0.0
    c.eval.n_tokens, c.checkpoint.every = 20_000, c.train.steps
    if scale == "smoke":
        c.train.steps, c.train.steps_per_dispatch, c.eval.n_tokens, c.data.statistics_tokens = 10, 10, 500, 1000
        c.eval.batch_size = 500
    seeds = {f"seed {seed}": {"seed": seed} for seed in range(SEEDS[scale])}
    c.members = ConfigDict({**seeds, **VARIANTS})
    rows = [
        {"member": member["name"], "dead_by_relu_at_init": member["init"]["dead_by_relu"],
         "mmcs_at_init": member["init"]["mmcs"], **{key: member["final"][key] for key in KEYS}}
        for member in run_lib.train(c, str(workdir / "run"))["members"]
    ]  # fmt: skip
    for row in rows:
        print(tables.one_line(row), flush=True)
    for key in ("dead_by_relu_at_init", *KEYS):
        of_seeds = np.array([row[key] for row in rows if row["member"] in seeds])
        spread = f"{of_seeds.std(ddof=1):.3f}, {of_seeds.min():.3f} to {of_seeds.max():.3f}"
        print(f"{key}: {of_seeds.mean():.3f} ± {spread}", flush=True)
    tables.write_csv(workdir / "one_dimension.csv", rows)


if __name__ == "__main__":
    command.start(main, "one_dimension")
