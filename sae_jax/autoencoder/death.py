"""Dead features: which firing counts, by which pathway a feature died, and how long ago it last fired.

    dead-by-ReLU   z_pre ≤ 0 on every token seen
    dead-by-TopK   positive on some token, yet never among the k kept with a value > 0
    dead in total  never fired: the two together

Definitions: Simon, Adams and Zou, arXiv:2605.31518 (their `dead_pct_init_topk` is the total).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from sae_jax.autoencoder import dense, topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.kept import Kept
from sae_jax.autoencoder.sae import SAE, AllSum

MAX_TOKENS = 2**31 - 1  # the counters saturate here instead of wrapping round


class Sightings(struct.PyTreeNode):
    """What has been seen of every feature over the tokens so far, in memory that does not grow with them."""

    positive: Any  # (n,) bool: z_pre > 0 on some token
    n_fired: Any  # (n,) int: tokens on which it was kept with a value > 0
    largest: Any = None  # (n,) its largest activation, 0 where it never fired; None where nobody asks

    @property
    def fired(self) -> Any:
        """(n,) bool: on some token."""
        return self.n_fired > 0

    def __or__(self, other: "Sightings") -> "Sightings":
        largest = None if self.largest is None else np.maximum(self.largest, other.largest)
        return Sightings(self.positive | other.positive, self.n_fired + other.n_fired, largest)


def sight(
    sae: SAE, x: Float[Array, "B d"], valid: Bool[Array, "B"], allsum: AllSum = lambda tree: tree
) -> tuple[Sightings, Any]:
    """Sightings on one batch (rows that are not `valid` are padding), and its codes: Kept, or dense activations.

    `allsum` adds up over the devices that share the batch, as the budget of BatchTopK is shared by all.
    """
    if isinstance(sae, dense.DenseSAE):
        z = jnp.where(valid[:, None], sae_lib.preactivations(sae, x), -1.0)
        acts = dense.select(sae, z, allsum(valid.sum()), allsum)
        return Sightings((z > 0).any(axis=0), sae_lib.fired(acts, z.shape[1]), acts.max(axis=0)), acts
    positive, codes = topk.seen(x, valid, sae.W_enc, sae.b_enc, sae.b_dec, sae.k)
    return kept_by(codes, positive), codes


def kept_by(codes: Kept, positive: Bool[Array, "n"]) -> Sightings:
    """Sightings of features that are `positive` somewhere, from what top-k kept of them."""
    largest = jnp.zeros(len(positive), codes.values.dtype).at[codes.indices].max(codes.values)
    return Sightings(positive, sae_lib.fired(codes, len(positive)), largest)


def pathways(seen: Sightings) -> dict[str, float]:
    """Fractions of the n features that are dead: `dead_by_relu`, `dead_by_topk`, `dead_total`."""
    positive, fired = np.asarray(seen.positive), np.asarray(seen.fired)
    return {
        "dead_by_relu": float(np.mean(~positive)),
        "dead_by_topk": float(np.mean(positive & ~fired)),
        "dead_total": float(np.mean(~fired)),
    }


def fetched(seen: Sightings) -> Sightings:
    """From the device, with counts wide enough for any number of tokens."""
    seen = jax.device_get(seen)
    return seen.replace(n_fired=np.asarray(seen.n_fired, np.int64))


def fired_once(seen: Sightings) -> float:
    """Share of the n features that fired on one token alone.

    As many tokens again are expected to wake at most so many of the dead, if tokens are independent: a feature of rate
    λ per N tokens is dead to the first N and not to the next with e^(−λ)·(1 − e^(−λ)), and fires once with λ·e^(−λ).
    The first sum over features is that of Good and Toulmin, Biometrika 43 (1956).
    """
    return float(np.mean(np.asarray(seen.n_fired) == 1))


class Shift(NamedTuple):
    """Every feature's pre-activation over some held-out tokens, and its fate on them."""

    mean: np.ndarray  # (n,)
    std: np.ndarray  # (n,)
    dead_by_relu: np.ndarray  # (n,) bool
    dead_by_topk: np.ndarray  # (n,) bool
    n_tokens: int  # those it was seen on: the fewer, the more features look dead
    pathway: str = "TopK"  # by what those die that are positive somewhere


def pathway(rule: str) -> str:
    """What reports call the death of a feature that is positive somewhere, where this rule selects."""
    return "TopK" if rule == "topk" else "selection"


def count_tokens(
    tokens_since_fired: Int[Array, "n"], fired: Bool[Array, "n"], n_tokens: Int[Array, ""] | int
) -> Int[Array, "n"]:
    """Tokens since each feature last fired, after a batch of n_tokens tokens."""
    longer = jnp.minimum(tokens_since_fired, MAX_TOKENS - n_tokens) + n_tokens
    return jnp.where(fired, 0, longer)
