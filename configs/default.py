"""Train on your own activations: all defaults, at the paper's n = 8192 and k = 64.

    python -m sae_jax train --config=configs/default.py --config.data.path=activations.npy --workdir=runs/mine

`activations.npy` is a floating point array of shape (tokens, d_model); it is memory-mapped, so it may be larger than
memory. Expect two SAEs, side by side on the same batches: one as usual, with AuxK, and one by the recipe that
`diagnose` gives for most activations: its bias starts at the geometric median, its selection is balanced, and it has no
AuxK. Each takes settings of its own on the command line, as --config.members.centred.sae.center=mean. Cost: about 2 s a
step at d 768 on 2 CPU cores, milliseconds on an accelerator.
"""

from ml_collections import ConfigDict

from sae_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.members = ConfigDict({
        "baseline": {"sae": {"center": "none"}},
        "centred": {"sae": {"center": "geometric_median", "balance": True}, "auxk": {"preset": "none"}},
    })
    return config
