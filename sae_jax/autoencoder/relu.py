"""ReLU with an L1 penalty: acts = ReLU(z_pre), and of a token

    saelens              Σ acts · ‖W_dec row‖     Anthropic, April 2024; SAELens 6.54.12, saes/standard_sae.py
    dictionary_learning  Σ acts                   Bricken et al. 2023; dictionary_learning 0.1.0, trainers/standard.py,
                                                  whose decoder rows have unit norm
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Penalty(NamedTuple):
    """What a preset is made of, beside its formula."""

    weight: float
    has_target: bool = False


PENALTIES = {"saelens": Penalty(1.0), "dictionary_learning": Penalty(0.1)}


def penalty(
    preset: str, acts: Float[Array, "B n"], row_norms: Float[Array, "n"], *, weight: Float[Array, ""],
    n_tokens: Float[Array, ""],
) -> Float[Array, ""]:  # fmt: skip
    """This device's share of the penalty of a batch of n_tokens tokens over all devices."""
    return weight * jnp.sum(acts * row_norms if preset == "saelens" else acts) / n_tokens
