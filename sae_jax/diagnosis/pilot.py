"""What will be dead after training, before it: a pilot, which is the same run in an eighth of its steps.

What kills is the competition of features, and how far it has come hangs on the sum of the learning rates, as Adam moves
a weight by about the learning rate a step. So a pilot takes SHORTER times fewer steps at as many times the rate, on
batches of the same size, and its held-out tokens are those of the run: a share of dead features means little without
their number.
"""

from typing import Any

from ml_collections import ConfigDict

from sae_jax import config as config_lib

SHORTER = 8


def shortened(config: ConfigDict, shorter: int = SHORTER) -> ConfigDict:
    """The configuration of the pilot of a run."""
    pilot = ConfigDict(config.to_dict())
    train, every = pilot.train, config_lib.checkpoint_every(config)
    train.steps, train.learning_rate = max(1, round(train.steps / shorter)), train.learning_rate * shorter
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
