"""Measure, predict, reproduce and cure feature death in sparse autoencoders."""

from sae_jax.diagnosis import diagnose
from sae_jax.running import train

__all__ = ["diagnose", "train"]
