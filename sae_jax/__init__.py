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
