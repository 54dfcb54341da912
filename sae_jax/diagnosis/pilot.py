"""What will be dead after training, before it: a pilot, which is the same run in an eighth of its steps, or in 500.

What kills is the competition of features, and how far it has come hangs on the sum of the learning rates, as Adam moves
a weight by about the learning rate a step. So a pilot takes SHORTER times fewer steps at as many times the rate, on
batches of the same size; Adam forgets old squares of gradients, and AuxK counts as dead, after the same part of the
run. Its held-out tokens are those of the run: a share of dead features means little without their number. How near it
comes, and where it does not: experiments/death/alive.md. Reconstruction it says little of.
"""

from typing import Any

from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.errors import Refused
from sae_jax.training import run as run_lib

SHORTER, LEAST = 8, 500  # and so many steps it has at least: at first Adam's own start is most of what happens
FOLDER = "pilot"  # its run, in the workdir


def forecast(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """What each member of a run is forecast to end with; the pilot is a run in WORKDIR/pilot, which goes on if stopped.

    Returns:
      `steps` of the pilot, `of`: those of the run, `n_tokens` that deaths are counted on, and `members`: name →
      `dead_by_relu`, `dead_by_topk`, `dead_total`.

    Raises:
      Refused: an SAE is not TopK; and as `training.run.train`.
    """
    for name, member in config_lib.members(config).items():
        if member.sae.activation != "topk":
            prefix = f"members.{name}." if config.members else ""
            allowed = "topk, where a pilot is to forecast what is dead after training"
            raise Refused(f"{prefix}sae.activation", member.sae.activation, allowed)
    found = run_lib.train(shortened(config), f"{workdir}/{FOLDER}")
    keys = ("dead_by_relu", "dead_by_topk", "dead_total")
    members = {member["name"]: {key: member["final"][key] for key in keys} for member in found["members"]}
    return {"steps": found["step"], "of": config.train.steps, "n_tokens": found["n_eval_tokens"], "members": members}


def shortened(config: ConfigDict, most: int = SHORTER) -> ConfigDict:
    """The configuration of the pilot of a run; a run of few steps is its own pilot."""
    pilot = ConfigDict(config.to_dict())
    steps = min(config.train.steps, max(LEAST, round(config.train.steps / most)))
    shorter = config.train.steps / steps if steps else 1.0
    pilot.train.steps, pilot.report.wandb = steps, ""
    pilot.checkpoint.every = max(1, round(config_lib.checkpoint_every(config) / shorter))
    for name, member in config_lib.members(config).items():
        own = pilot.members[name] if config.members else pilot
        for section, values in {
            "train": {"learning_rate": member.train.learning_rate * shorter,
                      "warmup_steps": round(member.train.warmup_steps / shorter),
                      "beta2": member.train.beta2**shorter},
            "auxk": {"dead_after_tokens": max(1, round(config_lib.dead_after_tokens(member) / shorter))},
        }.items():  # fmt: skip
            own[section] = ConfigDict({**own.get(section, {}), **values})
    return pilot
