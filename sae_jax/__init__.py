"""Measure, predict, reproduce and cure feature death in sparse autoencoders.

    train      a configuration → a workdir with SAEs, report and figures
    diagnose   activations → outlier severity, predicted death, the remedy
    dissect    an SAE of any format, and activations → who is dead, by which pathway
    load       an SAE of a run, of SAELens, dictionary_learning or sparsify, or of the hub
    features, reconstruct  an SAE, and activations → what is kept of each token, and x̂
    export     the same, written in one of those formats
    base       the default configuration
    SAE, encode, decode    the autoencoder as a pytree of four arrays, and what it does
    Refused    what all of them raise where the input is wrong
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_jax.autoencoder.sae import SAE, decode, encode
    from sae_jax.config import base
    from sae_jax.diagnosis.autopsy import dissect
    from sae_jax.diagnosis.diagnosis import diagnose
    from sae_jax.errors import Refused
    from sae_jax.exchange.features import features, reconstruct
    from sae_jax.exchange.sharing import export, load
    from sae_jax.training.run import train

__all__ = [
    "SAE", "Refused", "base", "decode", "diagnose", "dissect", "encode", "export", "features", "load", "reconstruct",
    "train",
]  # fmt: skip

# Each is imported when it is first asked for: the command's --help needs none, a diagnosis not what training needs.
_ROOMS = {
    "SAE": "autoencoder.sae", "decode": "autoencoder.sae", "encode": "autoencoder.sae", "base": "config",
    "dissect": "diagnosis.autopsy", "diagnose": "diagnosis.diagnosis", "Refused": "errors",
    "features": "exchange.features", "reconstruct": "exchange.features", "export": "exchange.sharing",
    "load": "exchange.sharing", "train": "training.run",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
