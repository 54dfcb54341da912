"""The loss: reconstruction plus AuxK, which lets dead features reconstruct what the live ones leave over.

With e = x − x̂, sg = stop-gradient, a = the k_aux largest codes among the dead features, and sums over the whole
batch of B tokens (all devices together), the presets are those of four libraries, as they stand in their code:

    openai               mean e²  + w · Σ(W_decᵀa − sg e)² / Σ(e − ē)²            k_aux = 256,  w = 1/32
    dictionary_learning  Σe² / B  + w · Σ(W_decᵀa − sg e)² / Σ(e − ē)²            k_aux = d//2, w = 1/32
    saelens              Σe² / B  + w · min(n_dead/(d//2), 1) · Σ(W_decᵀa − sg e)² / B          w = 1
    sparsify             Σe² / V  + w · min(n_dead/(d//2), 1) · Σ(W_decᵀa − sg e)² / V, V = Σ(x − x̄)², w = 1/32

a comes from ReLU(z_pre), except for saelens (z_pre itself, negative values too). sparsify ships with w = 0; 1/32 is
what its documentation suggests. b_dec is never added to the auxiliary reconstruction: openai's form does, on both
sides, which trains the bias a second time and confounds its convergence (its value is the same without).
openai's factor 1 / mean (x − x̄)² on the first term is 1 here, because the data is scaled to unit variance.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sae_jax.autoencoder import dense, kept, threshold, topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE, AllSum


class Preset(NamedTuple):
    """One library's AuxK. `k_aux` = 0 means d//2, and at least 1; `gradual` scales by min(n_dead / (d//2), 1)."""

    weight: float
    k_aux: int = 0
    rectified: bool = True
    gradual: bool = False


PRESETS = {
    "none": Preset(weight=0.0),
    "openai": Preset(weight=1 / 32, k_aux=256),
    "dictionary_learning": Preset(weight=1 / 32),
    "saelens": Preset(weight=1.0, rectified=False, gradual=True),
    "sparsify": Preset(weight=1 / 32, gradual=True),
}


class Sparsity(NamedTuple):
    """What fixes the part of the loss that asks for few activations, and how the reconstruction is counted."""

    preset: str = "none"  # a name in `dense.PENALTIES` of the activation
    target: float = 0.0  # L0, of presets that have one
    bandwidth: float = 0.0  # of JumpReLU's pseudo-derivative
    groups: tuple[int, ...] = ()  # prefixes of a Matryoshka SAE


PLAIN = Sparsity()


class Batch(NamedTuple):
    """What one batch tells, beyond its loss. Sums run over all devices."""

    codes: Any  # Kept of TopK, else dense activations
    least: Any  # of BatchTopK: the least activation that was selected
    fve: jax.Array  # fraction of the variance about the batch mean that is explained
    l0: jax.Array  # features fired per token


def loss(
    sae: SAE,
    x: Float[Array, "B d"],
    dead: Bool[Array, "n"],
    auxk_weight: Float[Array, ""],
    *,
    preset: str,
    room: int | None = None,
    allsum: AllSum = lambda tree: tree,
    shards: str | None = None,
    precision: str = "float32",
    lift: Float[Array, "n"] | None = None,
    sparsity: Sparsity = PLAIN,
    sparsity_weight: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, ""], Batch]:
    """This device's share of the loss (the shares add up to the loss of the whole batch), and what the batch tells.

    Args:
      sae: parameters.
      x: tokens, scaled to ‖sigma‖ = √d.
      dead: features that AuxK may use.
      auxk_weight: weight w of the auxiliary term.
      preset: a name in `PRESETS`.
      room: static; AuxK works on so many features, which is what it costs: at least as many as are dead (on this
        shard), unless w is 0. 0 leaves it out of the program: its value while nothing is dead, or w is 0. None: all.
      allsum: adds a pytree up over the devices that share the batch.
      shards: the mesh axis over which the features are split, where they are.
      precision: of the encoder's matmul: float32 | bfloat16.
      lift: what positive pre-activations have more in the choice of the k, see `balance`.
      sparsity: of SAEs that are not TopK, and of Matryoshka ones.
      sparsity_weight: of its penalty.
    """
    d = x.shape[1]
    n_tokens = allsum(jnp.asarray(x.shape[0], x.dtype))
    found: dense.Loss | None = None
    codes: Any
    if isinstance(sae, dense.DenseSAE) or sparsity.groups:
        found = dense.square_error(
            sae, x, sparsity.groups, n_tokens, allsum, sparsity.bandwidth, sparsity.preset, lift
        )  # fmt: skip
        square, e, codes = found.square, found.e, jax.lax.stop_gradient(found.acts)
    else:
        square, e, codes = sae_lib.square_error(sae, x, shards, precision, lift)
    fixed_e = jax.lax.stop_gradient(e)

    x_sum, e_sum = allsum((x.sum(0), fixed_e.sum(0)))
    variance, e_variance, e_square, n_fired = allsum((
        _square(x - x_sum / n_tokens),
        _square(fixed_e - e_sum / n_tokens),
        jax.lax.stop_gradient(square) if found is None else _square(fixed_e),
        topk.over_shards(((codes.values if found is None else codes) > 0).sum(dtype=x.dtype), shards),
    ))

    divisors = {"openai": n_tokens * d, "sparsify": variance}
    total = square / (divisors[preset] if preset in divisors else n_tokens)
    if sparsity.groups and preset == "dictionary_learning":
        total = total / len(sparsity.groups) ** 2
    if found is not None and sparsity.preset != "none":
        total = total + dense.penalty(
            sae, found, dead, sparsity.preset, weight=jnp.asarray(sparsity_weight), target=sparsity.target,
            bandwidth=sparsity.bandwidth, n_tokens=n_tokens, allsum=allsum,
        )  # fmt: skip
    if room != 0 and preset != "none":
        n_dead = topk.over_shards(dead.sum(), shards)
        aux = _auxiliary_square(sae, x, fixed_e, dead, PRESETS[preset], room, shards, precision)
        # Of tokens that are all alike only rounding is left of this variance.
        e_variance = jnp.where(e_variance > (4 * jnp.finfo(x.dtype).eps) ** 2 * e_square, e_variance, 0.0)
        aux_divisors = {"saelens": n_tokens, "sparsify": variance}
        aux_divisor = aux_divisors[preset] if preset in aux_divisors else e_variance
        scale = jnp.minimum(n_dead / _half(d), 1.0) if PRESETS[preset].gradual else 1.0
        term = jnp.where(aux_divisor > 0, scale * aux / jnp.where(aux_divisor > 0, aux_divisor, 1.0), 0.0)
        total = total + jnp.where((auxk_weight > 0) & (n_dead > 0), auxk_weight * term, 0.0)
    least = None if found is None else found.least
    return total, Batch(codes, least, fve=1 - e_square / variance, l0=n_fired / n_tokens)


def _auxiliary_square(
    sae: SAE, x: Float[Array, "B d"], e: Float[Array, "B d"], dead: Bool[Array, "n"], preset: Preset, room: int | None,
    shards: str | None = None, precision: str = "float32",
) -> Float[Array, ""]:  # fmt: skip
    """Σ(W_decᵀa − e)² over this device's tokens.

    In a room for all, the pre-activations are those of the main term: computed once.
    """
    W_enc, W_dec, b_enc = sae.W_enc, sae.W_dec, jnp.where(dead, sae.b_enc, -jnp.inf)  # −inf: never chosen
    n = len(b_enc)
    if room is not None and room < n:
        places = jnp.flatnonzero(dead, size=room, fill_value=n)
        rows = partial(jnp.take, indices=places, axis=0, mode="fill", unique_indices=True, indices_are_sorted=True)
        W_enc, W_dec = (rows(w, fill_value=0.0) for w in (W_enc, W_dec))
        b_enc = rows(b_enc, fill_value=-jnp.inf)
    k_aux = min(preset.k_aux or _half(x.shape[1]), len(b_enc) * topk.n_shards(shards))
    way = topk.Way(k_aux, rectified=preset.rectified, shards=shards, precision=precision)

    def few(*args: Array) -> Array:
        return topk.square_error(*args, None, way)[0]

    ways = dict.fromkeys(("rows", "sorted", "compressed"), few) | {"dense": partial(threshold.square_error, way=way)}
    square: Array = kept.in_form(ways, k_aux, *W_enc.shape, x, e, W_enc, b_enc, W_dec, sae.b_dec)
    return square


def rooms(n: int, d: int) -> tuple[int, ...]:
    """For how many dead features of n there are programs; 0 is for none. More of them would take long to compile."""
    return (0, *sorted({max(1, n // 8), max(1, n // 2), n})) if kept.is_large(n, d) else (0, n)


def room_for(n_dead: Int[Array, ""], rooms: tuple[int, ...]) -> Int[Array, ""]:
    """Which is the least that has room for so many."""
    return jnp.searchsorted(jnp.asarray(rooms), n_dead)


def _half(d: int) -> int:
    return max(1, d // 2)


def _square(a: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(a * a)
