"""What will be dead after training, before it: two pilots, each the run in an eighth of its steps, or in 500.

What kills is the competition of features. How far it comes hangs on the drift of weights, which in Adam goes as the sum
of the learning rates, and on their noise, whose square goes as the sum of the squares. Fewer steps cannot have both. So
there are two pilots, on batches of the run's size. With s times fewer steps one has s times its rate: its drift, and
more noise. The other has √s times: its noise, and less drift. What the run leaves dead often lies between, and the
forecast is their geometric mean. Adam forgets old squares of gradients, and AuxK counts as dead, after the same part of
the run. Held-out tokens are those of the run: a share of dead features means little without their number. How near it
comes, and where it does not: experiments/death/alive.md. Reconstruction it says little of.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.errors import Refused
from sae_jax.training import run as run_lib

SHORTER, LEAST = 8, 500  # and so many steps it has at least: at first Adam's own start is most of what happens
FOLDER = "pilots"  # their run, in the workdir
LOW, HIGH = " low", " high"  # what the two pilots of a member are called, behind its name


def forecast(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """What each member of a run is forecast to end with; pilots are a run in WORKDIR/pilots, which goes on if stopped.

    Returns:
      `steps` of a pilot, `of`: those of the run, `n_tokens` that deaths are counted on, and `members`: name →
      `dead_by_relu`, `dead_by_topk`, `dead_total`, and `pilots`, `dead_total` of the low and the high one.

    Raises:
      Refused: an SAE is not TopK; and as `training.run.train`.
    """
    config_lib.check(config)
    for name, member in config_lib.members(config).items():
        if member.sae.activation != "topk":
            prefix = f"members.{name}." if config.members else ""
            allowed = "topk, where a pilot is to forecast what is dead after training"
            raise Refused(f"{prefix}sae.activation", member.sae.activation, allowed)
    found = run_lib.train(shortened(config), f"{workdir}/{FOLDER}")
    final = {member["name"]: member["final"] for member in found["members"]}
    members, kinds = {}, (LOW, HIGH) if found["step"] < config.train.steps else ("", "")
    for name, member in config_lib.members(config).items():
        pair = [final[name + kind] for kind in kinds]
        relu, total = (
            between(pair[0][key], pair[1][key], member.sae.n_features) for key in ("dead_by_relu", "dead_total")
        )
        members[name] = {
            "dead_by_relu": relu, "dead_by_topk": total - relu, "dead_total": total,
            "pilots": [one["dead_total"] for one in pair],
        }  # fmt: skip
    return {"steps": found["step"], "of": config.train.steps, "n_tokens": found["n_eval_tokens"], "members": members}


def between(low: float, high: float, n_features: int) -> float:
    """The geometric mean of two shares of dead features; none counts as half a feature."""
    half = 0.5 / n_features
    return float(np.sqrt((low + half) * (high + half)) - half)


def shortened(config: ConfigDict, most: int = SHORTER) -> ConfigDict:
    """The configuration of the pilots of a run, two members for each of its; where they cost as much, it is its own."""
    pilot = ConfigDict(config.to_dict())
    steps = min(config.train.steps, max(LEAST, round(config.train.steps / most)))
    pilot.report.wandb = ""
    if 2 * steps >= config.train.steps:
        return pilot
    shorter = config.train.steps / steps
    pilot.train.steps, pilot.members = steps, ConfigDict()
    pilot.checkpoint.every = max(1, round(config_lib.checkpoint_every(config) / shorter))
    for name, member in config_lib.members(config).items():
        own = config.members[name].to_dict() if config.members else {}
        own["auxk"] = {**own.get("auxk", {}),
                       "dead_after_tokens": max(1, round(config_lib.dead_after_tokens(member) / shorter))}  # fmt: skip
        for kind, faster in ((LOW, shorter**0.5), (HIGH, shorter)):
            train = {"learning_rate": member.train.learning_rate * faster, "beta2": member.train.beta2**shorter,
                     "warmup_steps": round(member.train.warmup_steps / shorter)}  # fmt: skip
            pilot.members[name + kind] = ConfigDict({**own, "train": {**own.get("train", {}), **train}})
    return pilot
