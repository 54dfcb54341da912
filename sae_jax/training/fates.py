"""The fate of every feature over a run: alive or dead, by which pathway, when it changed, and where it points.

At every evaluation a feature gets one letter, by what the held-out tokens saw of it (`death.py` has the definitions):
A alive, T dead by TopK (or by what else selects), R dead by ReLU. A string of n letters is what a run keeps; everything
else follows from those.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae_jax.autoencoder import topk
from sae_jax.autoencoder.death import Sightings
from sae_jax.training import evaluation

LETTERS = "ATR"
ALIVE, BY_TOPK, BY_RELU = range(3)


def letters(seen: Sightings) -> str:
    """One letter for each of the n features."""
    code = np.where(seen.fired, ALIVE, np.where(seen.positive, BY_TOPK, BY_RELU))
    return "".join(np.array(list(LETTERS))[code])


class Ledger(NamedTuple):
    """The fates of one member's n features at R evaluations."""

    steps: np.ndarray  # (R,)
    fates: np.ndarray  # (R, n), ALIVE, BY_TOPK or BY_RELU

    def born(self) -> list[int | None]:
        """The step of the first evaluation at which each feature was alive; None: never."""
        alive = self.fates == ALIVE
        first = self.steps[alive.argmax(axis=0)]
        return [int(step) if ever else None for step, ever in zip(first, alive.any(axis=0), strict=True)]

    def deaths(self) -> list[int]:
        """How often each feature was seen alive and, at the next evaluation, dead."""
        alive = self.fates == ALIVE
        return (alive[:-1] & ~alive[1:]).sum(axis=0).tolist()

    def revivals(self) -> list[int]:
        """How often each feature was seen dead and, at the next evaluation, alive."""
        alive = self.fates == ALIVE
        return (~alive[:-1] & alive[1:]).sum(axis=0).tolist()


def ledger(history: list[dict[str, Any]], name: str) -> Ledger:
    """The ledger of one member from the history of a run."""
    fates = np.array([np.frombuffer(entry["fates"][name].encode(), np.uint8) for entry in history])
    codes = np.zeros_like(fates)
    for code, letter in enumerate(LETTERS):
        codes[fates == ord(letter)] = code
    return Ledger(np.array([entry["step"] for entry in history]), codes)


@jax.jit
def alignment(
    W_enc: Float[Array | np.ndarray, "n d"], mu: Float[Array | np.ndarray, "d"]
) -> Float[Array, "n"]:
    """Cosine of each encoder row with mu; zeros where mu is zero."""
    length = jnp.linalg.norm(W_enc, axis=1) * jnp.linalg.norm(mu)
    with topk.exact():
        return jnp.where(length > 0, W_enc @ mu / jnp.where(length > 0, length, 1.0), 0.0)


def rows(
    name: str, found: Ledger, at_init: Float[np.ndarray, "n"], at_end: Float[np.ndarray, "n"],
    silent: Int[np.ndarray, "n"], n_fired: Int[np.ndarray, "n"], largest: Float[np.ndarray, "n"], n_tokens: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The ledger as a table: one line a feature, with its alignment with mu at initialisation and at the end, the share
    of the held-out tokens on which it fires with its 95 % interval, its largest activation on them in the units of the
    normed tokens, and the training tokens since it last fired: one that is dead to held-out tokens may fire seldom."""
    low, high = evaluation.frequency_band(n_fired, n_tokens)
    return [
        {
            "member": name, "feature": i, "init": LETTERS[found.fates[0, i]], "final": LETTERS[found.fates[-1, i]],
            "born": born, "deaths": deaths, "revivals": revivals,
            "mu_cosine_init": round(float(at_init[i]), 4), "mu_cosine_final": round(float(at_end[i]), 4),
            "frequency": float(f"{n_fired[i] / n_tokens:.4g}"), "frequency_low": float(f"{low[i]:.4g}"),
            "frequency_high": float(f"{high[i]:.4g}"), "largest_activation": float(f"{largest[i]:.4g}"),
            "tokens_since_fired": int(silent[i]),
        }
        for i, (born, deaths, revivals) in enumerate(zip(found.born(), found.deaths(), found.revivals(), strict=True))
    ]  # fmt: skip
