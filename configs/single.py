"""One SAE on your own activations; or several, named on the command line.

    python -m sae_jax train --config=configs/single.py --config.data.path=activations.npy --workdir=runs/one \\
        --config.sae.center=geometric_median

Settings are the SAE's own. Members are made by naming them, each with what it has of its own:

    python -m sae_jax train --config=configs/single.py --config.data.path=activations.npy --workdir=runs/two \\
        --config.members.plain.sae.center=none --config.members.white.sae.whiten=True

Cost: about 1 s a step and SAE at n 8192, d 768 on 2 CPU cores, milliseconds on an accelerator.
"""

from ml_collections import ConfigDict

from sae_jax.config import base


def get_config() -> ConfigDict:
    return base()
