"""What will be dead after training, before it: a pilot, which is the same run in an eighth of its steps.

What kills is the competition of features, and how far it has come hangs on the sum of the learning rates, as Adam moves
a weight by about the learning rate a step. So a pilot takes SHORTER times fewer steps at as many times the rate, on
batches of the same size, and its held-out tokens are those of the run: a share of dead features means little without
their number.
"""

from typing import Any

from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.training import run as run_lib

SHORTER, LEAST = 8, 500  # and so many steps it has at least: at first Adam's own start is most of what happens
FOLDER = "pilot"  # its run, in the workdir


def forecast(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """What each member of a run is forecast to end with; the pilot is a run in WORKDIR/pilot, which goes on if stopped.

    Returns:
      `steps` of the pilot, `of`: those of the run, `n_tokens` that deaths are counted on, and `members`: name →
      `dead_by_relu`, `dead_by_topk`, `dead_total`, `fve`.

    Raises:
      as `training.run.train`.
    """
    found = run_lib.train(shortened(config), f"{workdir}/{FOLDER}")
    keys = ("dead_by_relu", "dead_by_topk", "dead_total", "fve")
    members = {member["name"]: {key: member["final"][key] for key in keys} for member in found["members"]}
    return {"steps": found["step"], "of": config.train.steps, "n_tokens": found["n_eval_tokens"], "members": members}


def shortened(config: ConfigDict, most: int = SHORTER) -> ConfigDict:
    """The configuration of the pilot of a run; a run of few steps is its own pilot."""
    pilot = ConfigDict(config.to_dict())
    train, every = pilot.train, config_lib.checkpoint_every(config)
    steps = min(train.steps, max(LEAST, round(train.steps / most)))
    shorter = train.steps / max(1, steps)
    train.steps, train.learning_rate = steps, train.learning_rate * shorter
    train.warmup_steps = round(train.warmup_steps / shorter)
    pilot.checkpoint.every = max(1, round(every / shorter))
    pilot.auxk.dead_after_tokens = max(1, round(config_lib.dead_after_tokens(config) / shorter))
    for overrides in pilot.members.values():
        for section, key, factor in (("train", "learning_rate", shorter), ("train", "warmup_steps", 1 / shorter),
                                     ("auxk", "dead_after_tokens", 1 / shorter)):  # fmt: skip
            if key in overrides.get(section, {}):
                kind: Any = type(overrides[section][key])
                overrides[section][key] = kind(overrides[section][key] * factor)
    return pilot
