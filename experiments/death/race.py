"""Alive to the end: balanced selection against its rivals, on the same batches of real layers.

    python -m experiments.death.race --workdir=runs/race --scale=cpu --layers=9,minilm-l6-3 --arms=plain,balance

n 1024 (at most 4 d_model where d_model is under 256), k 8 (`--size`), 5,000 steps of 256 at 3e-4 (`--learning_rate`),
three initialisations (`--seeds`); b_dec starts at the geometric median but where an arm says uncentred. Counted on a
fifth, held out, of 520,000 tokens; models of text are shown the docstrings of the packages that this one needs. A layer
is a number, of Gemma 3 270M, MODEL-NUMBER, or `synthetic` (configs/synthetic.py); `--activations=9=PATH` takes one from
a file or a dataset. Every arm of a layer is a run of its own under the workdir: what is stopped goes on, what has ended
is read. Writes race.csv. An arm takes 3 to 8 minutes on 2 CPU cores, the extraction of a layer up to 40. `--shorter=8`
runs the pilots of `diagnose --pilot` in their place, two rows each; pilots_scored.py holds them against the runs.
"""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import synthetic as synthetic_config
from experiments import command, layers
from experiments.command import said
from experiments.death import rivals
from sae_jax import config as config_lib
from sae_jax.activations import synthetic
from sae_jax.config import base
from sae_jax.diagnosis import pilot
from sae_jax.errors import Refused
from sae_jax.exchange import sharing
from sae_jax.models import facts
from sae_jax.reports import tables
from sae_jax.training import recovery
from sae_jax.training import run as run_lib
from sae_jax.training import step as step_lib

AUXK = {"auxk.preset": "dictionary_learning"}
UNCENTRED = {"sae.center": "none"}
BALANCE = {"sae.balance": True}
WHITENING = {"sae.whiten": True, "sae.center": "mean"}  # it subtracts the mean itself
ARMS: dict[str, dict[str, Any]] = {  # settings, and `step` in place of the package's own
    "plain": {},
    "balance": BALANCE,
    "auxk": AUXK,
    "auxk_saelens": {"auxk.preset": "saelens"},
    "auxk_balance": AUXK | BALANCE,
    "annealed_d": {"step": rivals.annealed("d_model", 0.1)},
    "annealed_4k": {"step": rivals.annealed("4k", 0.5)},
    "multi_topk": {"step": rivals.multi_topk},
    "resampling": {"step": rivals.resampling},
    "ghost_gradients": {"step": rivals.ghost_gradients},
    "whitening": WHITENING,
    "whitening_balance": WHITENING | BALANCE,
    "uncentred": UNCENTRED,
    "uncentred_auxk": UNCENTRED | AUXK,
    "uncentred_balance": UNCENTRED | BALANCE,
}
CHOSEN = flags.DEFINE_list("arms", [], "which of them; all, if none is named")
SIZE = flags.DEFINE_list("size", ["1024", "8", "5000"], "n, k, steps")
SEEDS = flags.DEFINE_integer("seeds", 3, "initialisations of each arm", 1)
RATE = flags.DEFINE_float("learning_rate", 3e-4, "of real layers", 1e-9)
SHORTER = flags.DEFINE_integer("shorter", 1, "pilots in place of the runs: so many times fewer steps", 1)
NARROW = 256  # a layer whose SAE has no more than four features a dimension
KEYS = ("dead_by_relu", "dead_total", "fve", "fve_without_giants", "l0", "mmcs", "mcc")


def settings(layer: str, scale: str, arm: dict[str, Any], folder: Path) -> ConfigDict:
    """Members that differ in the seed alone."""
    n, k, steps = map(int, said(SIZE))
    if layer == layers.SYNTHETIC:
        c, width = synthetic_config.get_config(), n
    else:
        c = base()
        c.train.batch_size, c.train.learning_rate = 256, said(RATE)
        c.data.model.id, c.data.model.layer = layers.model_of(layer)
        c.data.model.n_tokens, c.eval.n_tokens = 520_000, 104_000  # a fifth is held out
        width = facts.width(c.data.model) or n
    c.sae.n_features = min(n, 4 * width) if width < NARROW else n
    c.sae.k, c.sae.center, c.auxk.preset = k, "geometric_median", "none"
    c.train.steps, c.train.devices, c.checkpoint.every = steps, 1, max(1, steps // 5)
    c.train.steps_per_dispatch = min(50, steps)
    c.auxk.dead_after_tokens = c.train.batch_size * max(1, steps // 20)
    if scale == "smoke":
        c.data.model.id, c.data.signal, c.data.d_model, c.data.statistics_tokens = "", "sparse", 16, 1000
        c.sae.n_features, c.train.steps, c.eval.n_tokens, c.eval.batch_size = 64, 20, 1000, 500
        c.checkpoint.every, c.auxk.dead_after_tokens = 20, 256
    layers.point(c, layer, folder)
    c.update_from_flattened_dict({key: value for key, value in arm.items() if key != "step"})
    c.members = ConfigDict({f"seed{seed}": {"seed": seed} for seed in range(said(SEEDS))})
    return pilot.shortened(c, said(SHORTER)) if said(SHORTER) > 1 else c


def found_again(config: ConfigDict, folder: str, member: str) -> dict[str, float]:
    """Mean correlation coefficient with the true features, one row each, where they are known."""
    if not config.data.signal or config.data.path or config.data.model.id:
        return {}
    truth = synthetic.build(config.data, config.seed).rows
    return {"mcc": recovery.mcc(truth, sharing.packed_of(folder, member).sae.W_dec)}


def main(workdir: Path, scale: str) -> None:
    """Trains, prints and writes the table."""
    rows: list[dict[str, Any]] = []
    unknown = [name for name in said(CHOSEN) if name not in ARMS]
    if unknown:
        raise Refused("--arms", unknown[0], ", ".join(ARMS))
    chosen = layers.named("2", "9", "13", synthetic=True)
    for layer in chosen[: 1 if scale == "smoke" else None]:
        for name in said(CHOSEN) or ARMS:
            own, config = ARMS[name].get("step"), settings(layer, scale, ARMS[name], workdir)
            folder = str(workdir / f"{layer}_{name}")
            with mock.patch.object(step_lib, "group_step", own) if own else contextlib.nullcontext():
                report = run_lib.train(config, folder)
            members = config_lib.members(config)
            for member in report["members"]:
                end = member["final"] | found_again(config, folder, member["name"])
                rows.append({
                    "layer": layer, "arm": name, "seed": member["name"].removeprefix("seed").partition(" ")[0],
                    "n": str(config.sae.n_features), "k": str(config.sae.k), "steps": str(report["step"]),
                    "learning_rate": f"{members[member['name']].train.learning_rate:g}",
                    "tokens": str(report["n_eval_tokens"]), "dead_at_init": member["init"]["dead_total"],
                    **{key: end.get(key) for key in KEYS},
                })  # fmt: skip
            mine = rows[-len(members) :]
            for rate in dict.fromkeys(row["learning_rate"] for row in mine):  # two, of pilots
                same = [row for row in mine if row["learning_rate"] == rate]
                means = {key: np.mean([np.nan if row[key] is None else row[key] for row in same]) for key in KEYS}
                print(f"layer {layer}  {name:18s} at {rate}  {tables.one_line(means)}", flush=True)
            tables.write_csv(workdir / "race.csv", rows)


if __name__ == "__main__":
    command.start(main, "race")
