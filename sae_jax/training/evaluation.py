"""The held-out set, streamed: deaths by pathway and reconstruction of every member, in memory that does not grow."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax.autoencoder import death, topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.death import Shift, Sightings
from sae_jax.autoencoder.objective import AllSum
from sae_jax.autoencoder.sae import SAE
from sae_jax.errors import RunFailed


class Sums(NamedTuple):
    """What one batch adds to the held-out totals of one SAE."""

    error_square: Any  # Σ ‖x − x̂‖²
    n_fired: Any  # Σ over tokens of features fired


def evaluate_batch(
    groups: tuple[SAE, ...],
    x: Float[Array, "B d"],
    valid: Bool[Array, "B"],
    shift: Float[Array, "d"],
    allsum: AllSum,
    shards: str | None = None,
) -> Any:
    """Sightings and sums of all members (each group stacked), and the sums about `shift` that they share.

    `shards` names the mesh axis over which the features are split, where they are.
    """

    def one(sae: SAE) -> tuple[Sightings, Sums]:
        if shards is None:
            seen, codes = death.sight(sae, x, valid)
            error = x - sae_lib.decode(sae, codes)
        else:
            _, error, codes = sae_lib.square_error(sae, x, shards)
            codes = codes._replace(values=jnp.where(valid[:, None], codes.values, 0.0))
            positive = (sae_lib.preactivations(sae, x) > 0) & valid[:, None]
            fired = sae_lib.fired(codes, sae.W_enc.shape[0]) > 0
            seen = Sightings(positive.any(axis=0) | fired, fired)  # two products, which may round apart
        error = jnp.where(valid[:, None], error, 0.0)
        n_fired = topk.over_shards(jnp.sum(codes.values > 0, dtype=x.dtype), shards)
        return seen, Sums(jnp.sum(error**2), n_fired)

    about = jnp.where(valid[:, None], x - shift, 0.0)
    data = (about.sum(axis=0), jnp.sum(about**2))
    members = tuple(sae_lib.each_member(one, sae) for sae in groups)
    seen = tuple(jax.tree.map(lambda flag: allsum(flag.astype(jnp.int32)) > 0, s) for s, _ in members)
    return seen, allsum((tuple(sums for _, sums in members), data))


def evaluate(
    run: Callable[..., Any],
    groups: tuple[SAE, ...],
    batches: Iterator[tuple[Any, np.ndarray]],
    n_tokens: int,
    shift: Float[np.ndarray, "d"],
    mean_shifts: list[Float[np.ndarray, "_ d"]],
) -> list[list[dict[str, Any]]]:
    """Held-out metrics of every member of every group: deaths, `fve`, `fve_about_zero`, `l0`; and its `Sightings`.

    Args:
      run: the compiled `evaluate_batch` as run(groups, input, valid).
      groups: stacked SAEs, in the frame of the tokens that all share.
      batches: inputs and valid-row masks.
      n_tokens: tokens in all batches together.
      shift: a point near the mean; sums of squares are taken about it, so that float32 keeps the variance at any gamma.
      mean_shifts: what each member of each group had its own tokens moved by.

    Raises:
      RunFailed: an activation is not finite.
    """
    seen: Any = None
    total: Any = None
    for number, (given, valid) in enumerate(batches):
        part_seen, sums = jax.device_get(run(groups, given, valid))
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        if not np.isfinite(sums[1][1]):
            raise RunFailed(f"held-out batch {number}: activations that are not finite")
        seen = part_seen if seen is None else tuple(a | b for a, b in zip(seen, part_seen, strict=True))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    member_sums, (about_sum, about_square) = total
    variance = float(about_square - np.sum(about_sum**2) / n_tokens)
    mean = shift + about_sum / n_tokens
    results = []
    for group_seen, sums, moved in zip(seen, member_sums, mean_shifts, strict=True):
        group: list[dict[str, Any]] = []
        for i, error in enumerate(sums.error_square):
            sightings = Sightings(group_seen.positive[i], group_seen.fired[i])
            square = variance + n_tokens * float(np.sum((mean + moved[i]) ** 2))
            group.append({
                **death.pathways(sightings),
                "fve": 1 - float(error) / variance if variance > 0 else None,
                "fve_about_zero": 1 - float(error) / float(square) if square > 0 else None,
                "l0": float(sums.n_fired[i]) / n_tokens,
                "seen": sightings,
            })
        results.append(group)
    return results


def bias_state(b_dec: Float[np.ndarray, "d"], mu: Float[np.ndarray, "d"]) -> dict[str, float | None]:
    """How far b_dec has come towards mu: relative error, projection b·mu/‖mu‖², cosine; None where mu is zero."""
    b, m = np.asarray(b_dec, np.float64), np.asarray(mu, np.float64)
    norm, b_norm = float(np.linalg.norm(m)), float(np.linalg.norm(b))
    if norm == 0:
        return {"bias_relative_error": None, "bias_projection": None, "bias_cosine": None}
    return {
        "bias_relative_error": float(np.linalg.norm(b - m)) / norm,
        "bias_projection": float(b @ m) / norm**2,
        "bias_cosine": float(b @ m) / (b_norm * norm) if b_norm > 0 else None,
    }


SHIFT_BATCHES = 10  # held-out batches that the picture of shifts is made from


@jax.jit
def _shift_sums(group: SAE, x: Float[Array, "B d"], valid: Bool[Array, "B"]) -> Any:
    def one(sae: SAE) -> Any:
        seen, _ = death.sight(sae, x, valid)
        z_pre = jnp.where(valid[:, None], sae_lib.preactivations(sae, x), 0.0)
        return seen, (z_pre.sum(axis=0), (z_pre**2).sum(axis=0))

    return sae_lib.each_member(one, group)


def shifts(
    group: SAE, tokens: Callable[[Any], Array], batches: Iterator[tuple[Any, np.ndarray]]
) -> list[Shift]:
    """Pre-activation mean and spread of every feature of every member of a group, over a few held-out batches."""
    seen: Any = None
    total: Any = None
    count = 0
    for _, (given, valid) in zip(range(SHIFT_BATCHES), batches, strict=False):
        part, sums = jax.device_get(_shift_sums(group, tokens(given), valid))
        sums = [np.asarray(s, np.float64) for s in sums]
        seen = part if seen is None else seen | part
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
        count += int(valid.sum())
    mean = total[0] / count
    std = np.sqrt(np.maximum(total[1] / count - mean**2, 0))
    relu, topk = ~seen.positive, seen.positive & ~seen.fired
    return [Shift(*of_member, count) for of_member in zip(mean, std, relu, topk, strict=True)]
