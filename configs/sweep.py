"""Gamma and death at initialisation on each of the paper's 454 model-layers, at its size: n 8192, k 64, N 100,000.

    pip install -e ".[models]"
    python -m sae_jax sweep --config=configs/sweep.py --workdir=runs/sweep --dry_run
    python -m sae_jax sweep --config=configs/sweep.py --workdir=runs/sweep --filter=model=gpt2

Layers are the interior ones: layer L is the residual stream after L blocks, 1 to blocks − 1, and AlphaFold3's layer 0
(sae_jax/models/facts.py). The larger models want an accelerator; gated ones their terms accepted and HF_TOKEN;
ESM3 an environment of its own (extra esm3); ProGen2, Evo and gLM2 the commit of the code that you let run, as
--config.data.model.remote_code=evo=COMMIT; AlphaFold3 a file, --config.data.model.activations=PATH. What cannot be
had becomes a row that says so. Inputs are the small built-in ones until you name your own: data.model.text, images,
proteins, dna. To train as well, --config.train.steps=20000: the members below, the paper's conditions.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from sae_jax.config import base
from sae_jax.models.facts import PAPER
from sae_jax.sweeps.combinations import CONDITIONS


def get_config() -> ConfigDict:
    config = base()
    config.data.model.id = "gpt2"
    config.data.model.n_tokens = 100_000
    config.train.steps = 0
    config.auxk.preset = "none"
    config.members = ConfigDict(CONDITIONS)
    return config


def sweep(add: Callable[..., Any]) -> None:
    for name, facts in PAPER.items():
        for layer in facts.interior:
            add({"data.model.id": name, "data.model.layer": layer})
