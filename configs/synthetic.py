"""Synthetic activations with a chosen gamma, made on the device; baseline and centred side by side.

    python -m sae_jax train --config=configs/synthetic.py --workdir=runs/synthetic

256 true features in 64 dimensions, 5 of them active a token, and a mean 20 times as long as the signal, spread over
all dimensions. Expect, after about two minutes on 2 CPU cores: the centred SAE recovers the true features (MMCS above
0.95) and loses almost none of its own; the baseline stays near the untrained floor of 0.39 with nearly all dead.
With --config.data.mean_direction=one the baseline recovers far more (MMCS 0.72) with about 77 % of its features dead.

AuxK is off: with --config.auxk.preset=dictionary_learning some 60 % of the centred SAE's features end dead, at the same
MMCS. There are four rows for every true feature; experiments/death/README.md has the numbers and why.

Death at initialisation, on the assumptions of the theory (full-rank normal signal), without training:

    python -m sae_jax train --config=configs/synthetic.py --workdir=runs/gamma5 --config.data.signal=gaussian \\
        --config.data.gamma=5 --config.data.d_model=256 --config.sae.n_features=4096 --config.sae.k=32 \\
        --config.train.steps=0
"""

from ml_collections import ConfigDict

from sae_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.sae.n_features = 1024
    config.sae.k = 8
    config.data.signal = "sparse"
    config.data.gamma = 20.0
    config.data.d_model = 64
    config.data.n_true_features = 256
    config.data.n_active = 5
    config.train.steps = 4000
    config.train.batch_size = 128
    config.train.learning_rate = 1e-3
    config.train.steps_per_dispatch = 100
    config.checkpoint.every = 400
    config.auxk.preset = "none"
    config.members = ConfigDict({
        "baseline": {"sae": {"center": "none"}},
        "centred": {"sae": {"center": "geometric_median"}},
    })
    return config
