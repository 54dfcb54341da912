"""JumpReLU: a threshold of its own for every feature, trained through a pseudo-derivative.

    acts = z_pre · H(z_pre − θ),   ∂acts/∂θ ≈ −(θ/ε) · K((z_pre − θ)/ε),   ∂H/∂θ ≈ −(1/ε) · K((z_pre − θ)/ε)

K is 1 on (−½, ½), ε the bandwidth, and θ ≥ 0. With `to_input` the encoder gets the negative of what θ gets, as well.
The penalty of a token, with L0 = Σ H(z_pre − θ), and its source:

    saelens              L0                               Rajamanoharan et al., arXiv:2407.14435
    saelens_tanh         Σ tanh(4 · acts · ‖W_dec‖)       Anthropic, January 2025; and, of what is dead,
                           + 3e-6 · Σ ReLU(θ − z_pre) · ‖W_dec‖, which is not under the weight
    saelens_quadratic    (2 / L0*) · (L0 − L0*)²          Gemma Scope 2; L0* is the target
    dictionary_learning  (mean L0 / L0* − 1)²             of the batch; its H looks at acts, not at z_pre

As in SAELens 6.54.12 (saes/jumprelu_sae.py) and dictionary_learning 0.1.0 (trainers/jumprelu.py), which differs in that
its encoder does not subtract b_dec and its θ may fall below 0. Its trainer also ships a warm-up of the penalty over
2,000 steps, a target of 20, and Adam with beta1 = 0: `sparsity.warmup_steps`, `sparsity.target_l0`, `train.beta1`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sae_jax.autoencoder.sae import AllSum

TANH, PRE_ACT = 4.0, 3e-6


class Penalty(NamedTuple):
    """What a preset is made of, beside its formula."""

    weight: float
    bandwidth: float
    threshold: float  # θ at the start
    has_target: bool = False
    to_input: bool = False


PENALTIES = {
    "saelens": Penalty(1.0, 0.05, 0.01),
    "saelens_tanh": Penalty(1.0, 0.05, 0.01, to_input=True),
    "saelens_quadratic": Penalty(1.0, 0.05, 0.01, has_target=True),
    "dictionary_learning": Penalty(1.0, 0.001, 0.001, has_target=True),
}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump(z: Float[Array, "B n"], theta: Float[Array, "n"], bandwidth: float, to_input: bool) -> Float[Array, "B n"]:
    """z where it is above theta; NaN where either is."""
    return jnp.where(z > theta, z, jnp.where(z <= theta, 0.0, jnp.nan))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def step(z: Float[Array, "B n"], theta: Float[Array, "n"], bandwidth: float, to_input: bool) -> Float[Array, "B n"]:
    """1 where z is above theta."""
    return (z > theta).astype(z.dtype)


def _near(z: Array, theta: Array, bandwidth: float) -> Array:
    return (jnp.abs((z - theta) / bandwidth) < 0.5).astype(z.dtype) / bandwidth


def _jump_bwd(bandwidth: float, to_input: bool, held: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    z, theta = held
    pseudo = theta * _near(z, theta, bandwidth) * g
    return jnp.where(z > theta, g, 0.0) + (pseudo if to_input else 0.0), -pseudo.sum(axis=0)


def _step_bwd(bandwidth: float, to_input: bool, held: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    z, theta = held
    pseudo = _near(z, theta, bandwidth) * g
    return pseudo if to_input else jnp.zeros_like(z), -pseudo.sum(axis=0)


jump.defvjp(lambda z, theta, bandwidth, to_input: (jump(z, theta, bandwidth, to_input), (z, theta)), _jump_bwd)
step.defvjp(lambda z, theta, bandwidth, to_input: (step(z, theta, bandwidth, to_input), (z, theta)), _step_bwd)


def penalty(
    preset: str, z: Float[Array, "B n"], acts: Float[Array, "B n"], theta: Float[Array, "n"],
    row_norms: Float[Array, "n"], dead: Bool[Array, "n"], *, weight: Float[Array, ""], target: float,
    bandwidth: float, n_tokens: Float[Array, ""], allsum: AllSum,
) -> Float[Array, ""]:  # fmt: skip
    """This device's share of the penalty of a batch of n_tokens tokens over all devices."""
    to_input = PENALTIES[preset].to_input
    if preset == "saelens_tanh":
        silent = jnp.sum(jax.nn.relu(theta - z) * dead * row_norms)
        return (weight * jnp.sum(jnp.tanh(TANH * acts * row_norms)) + PRE_ACT * silent) / n_tokens
    if preset == "dictionary_learning":
        # The square is of the whole batch: each device has its share of the value, and the whole slope.
        own = jnp.sum(step(acts, theta, bandwidth, to_input)) / n_tokens
        off = allsum(jax.lax.stop_gradient(own)) / target - 1
        slope = 2 * off / target * own
        return weight * (slope + jax.lax.stop_gradient(off**2 * len(z) / n_tokens - slope))
    l0 = step(z, theta, bandwidth, to_input).sum(axis=1)
    if preset == "saelens_quadratic":
        l0 = 2 / target * (l0 - target) ** 2
    return weight * jnp.sum(l0) / n_tokens
