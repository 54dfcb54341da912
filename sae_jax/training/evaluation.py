"""The held-out set, streamed: deaths by pathway and reconstruction of every member, in memory that does not grow."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import betaincinv

from sae_jax.autoencoder import death
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.death import Shift, Sightings
from sae_jax.autoencoder.sae import SAE, AllSum
from sae_jax.errors import RunFailed
from sae_jax.runtime import processes


class Sums(NamedTuple):
    """What one batch adds to the held-out totals of one SAE."""

    error_square: Any  # Σ ‖x − x̂‖²
    ordinary_error: Any  # the same over tokens that are no giants


class Totals(NamedTuple):
    """What one batch adds of the tokens themselves, about a point near their mean."""

    count: Any
    total: Any  # (d,) Σ (x − shift)
    square: Any  # Σ ‖x − shift‖²

    def variance(self) -> float:
        """Σ ‖x − mean‖²."""
        return float(self.square - np.sum(self.total**2) / self.count) if self.count else 0.0


def evaluate_batch(
    groups: tuple[SAE, ...],
    x: Float[Array, "B d"],
    valid: Bool[Array, "B"],
    shift: Float[Array, "d"],
    allsum: AllSum,
    allmax: AllSum,
    shards: str | None = None,
    ordinary_shift: Float[Array, "d"] | None = None,
    giant_norm: float = float("inf"),
) -> Any:
    """Sightings and sums of all members (each group stacked), and the sums of the tokens that they share.

    Args:
      allsum, allmax: add up, and take the largest, over the devices that share the batch.
      shift, ordinary_shift: points near the mean of all tokens, and of those that are no giants, which can be far
        apart: sums of squares are taken about them.
      shards: names the mesh axis over which the features are split, where they are.
      giant_norm: tokens of a larger norm are giants.
    """
    ordinary = valid & (jnp.linalg.norm(x, axis=1) <= giant_norm)

    def one(sae: SAE) -> tuple[Sightings, Sums]:
        if shards is None:
            seen, codes = death.sight(sae, x, valid, allsum)
            error = x - sae_lib.decode(sae, codes)
        else:
            seen, error = _sight_shard(sae, x, valid, shards)
        square = jnp.sum(error**2, axis=1)
        error_square, ordinary_error = (jnp.sum(jnp.where(rows, square, 0.0)) for rows in (valid, ordinary))
        return seen, Sums(error_square, ordinary_error)

    def totals(rows: Bool[Array, "B"], point: Float[Array, "d"]) -> Totals:
        about = jnp.where(rows[:, None], x - point, 0.0)
        return Totals(rows.sum(dtype=x.dtype), about.sum(axis=0), jnp.sum(about**2))

    data = (totals(valid, shift), totals(ordinary, shift if ordinary_shift is None else ordinary_shift))
    members = tuple(sae_lib.each_member(one, sae) for sae in groups)
    largest = allmax(tuple(seen.largest for seen, _ in members))
    seen = [s.replace(largest=most) for s, most in zip(_added([s for s, _ in members], allsum), largest, strict=True)]
    return tuple(seen), allsum((tuple(sums for _, sums in members), data))


def _sight_shard(
    sae: SAE, x: Float[Array, "B d"], valid: Bool[Array, "B"], shards: str
) -> tuple[Sightings, Float[Array, "B d"]]:
    """`death.sight` of the features on this device, and x − x̂ of all."""
    _, error, codes = sae_lib.square_error(sae, x, shards)
    codes = codes._replace(values=jnp.where(valid[:, None], codes.values, 0.0))
    positive = (sae_lib.preactivations(sae, x) > 0) & valid[:, None]
    seen = death.kept_by(codes, positive.any(axis=0))
    return seen.replace(positive=seen.positive | seen.fired), error  # two products, which may round apart


def _added(seen: list[Sightings], allsum: AllSum) -> tuple[Sightings, ...]:
    added = allsum(tuple((s.positive.astype(jnp.int32), s.n_fired) for s in seen))
    return tuple(Sightings(positive > 0, n_fired) for positive, n_fired in added)


class DeathCurve:
    """Dead shares over the tokens seen so far, at about 1k, 2k, 4k, … and at the end: [[tokens, by ReLU, total]].

    What has not fired yet is dead so far: the more tokens, the fewer.
    """

    def __init__(self, first: int = 1000):
        self.points: list[list[float]] = []
        self._next = first

    def add(self, n_tokens: int, seen: Sightings, last: bool = False) -> None:
        """After n_tokens tokens; the last time, whatever their number."""
        if n_tokens < self._next and not last:
            return
        while self._next <= n_tokens:
            self._next *= 2
        if not self.points or self.points[-1][0] != n_tokens:
            deaths = death.pathways(seen)
            self.points.append([n_tokens, deaths["dead_by_relu"], deaths["dead_total"]])


def highest_rate_of_dead(n_tokens: int) -> float:
    """The highest firing rate (95 %) of a feature that fired on none of n_tokens tokens: about 3 / n_tokens.

    (1 − rate)^n = 0.05, for tokens that are independent.
    """
    return float(-np.expm1(np.log(0.05) / n_tokens))


def frequency_band(n_fired: Int[np.ndarray, "n"], n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest firing rate (95 %) of features that fired on n_fired of n_tokens tokens, if independent.

    Clopper and Pearson, Biometrika 26 (1934): exact, so rather too wide than too narrow. Of what never fired the
    highest is that of `highest_rate_of_dead`: there is only one side to err on.
    """
    fired = np.asarray(n_fired, np.float64)
    low = np.where(fired > 0, betaincinv(np.maximum(fired, 1), n_tokens - fired + 1, 0.025), 0.0)
    high = np.where(fired < n_tokens, betaincinv(fired + 1, np.maximum(n_tokens - fired, 1), 0.975), 1.0)
    return low, np.where(fired > 0, high, highest_rate_of_dead(n_tokens))


def _one(seen: Sightings, member: int) -> Sightings:
    own: Sightings = jax.tree.map(lambda of_group: of_group[member], seen)
    return own


def evaluate(
    run: Callable[..., Any],
    groups: tuple[SAE, ...],
    batches: Iterator[tuple[Any, np.ndarray]],
    n_tokens: int,
    shift: Float[np.ndarray, "d"],
    mean_shifts: list[Float[np.ndarray, "_ d"]],
) -> list[list[dict[str, Any]]]:
    """Held-out metrics of every member of every group: deaths, `fve`, `fve_about_zero`, `l0`; and its `Sightings`.

    `fve_without_giants` leaves out `n_giant_tokens` tokens whose norm is many times the median's: they make most of
    the variance, and an SAE that explains them and nothing else has a high `fve`. `dead_over_tokens` is a `DeathCurve`,
    and `fired_once` bounds how far it is expected to fall over as many tokens again.

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
    curves = [[DeathCurve() for _ in moved] for moved in mean_shifts]
    for number, (given, valid) in enumerate(batches):
        part_seen, sums = processes.fetched(run(groups, given, valid))
        part_seen = tuple(map(death.fetched, part_seen))
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        if not np.isfinite(sums[1][0].square):
            raise RunFailed(f"held-out batch {number}: activations that are not finite")
        seen = part_seen if seen is None else tuple(a | b for a, b in zip(seen, part_seen, strict=True))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        count = int(total[1][0].count)
        for group_seen, those in zip(seen, curves, strict=True):
            for i, curve in enumerate(those):
                curve.add(count, _one(group_seen, i), last=count == n_tokens)
    member_sums, (data, ordinary) = total
    n_giants, variance = int(data.count - ordinary.count), data.variance()
    mean = shift + data.total / n_tokens
    ordinary_variance = ordinary.variance() if n_giants else variance
    results = []
    for group_seen, sums, moved, those in zip(seen, member_sums, mean_shifts, curves, strict=True):
        group: list[dict[str, Any]] = []
        for i, error in enumerate(sums.error_square):
            sightings = _one(group_seen, i)
            square = variance + n_tokens * float(np.sum((mean + moved[i]) ** 2))
            group.append({
                **death.pathways(sightings),
                "fired_once": death.fired_once(sightings),
                "fve": explained(error, variance),
                "fve_without_giants": explained(sums.ordinary_error[i], ordinary_variance),
                "n_giant_tokens": n_giants,
                "fve_about_zero": explained(error, square),
                "l0": float(sightings.n_fired.sum(dtype=np.int64)) / n_tokens,
                "dead_over_tokens": those[i].points,
                "seen": sightings,
            })
        results.append(group)
    return results


def explained(error: float, square: float) -> float | None:
    """1 − error / square; None where there is nothing to explain."""
    return 1 - float(error) / float(square) if square > 0 else None


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


def shift_batch(
    groups: tuple[SAE, ...], x: Float[Array, "B d"], valid: Bool[Array, "B"], allsum: AllSum, shards: str | None = None
) -> Any:
    """What one batch shows of every pre-activation: sightings of each group, and sums of z_pre and of its square."""

    def one(sae: SAE) -> tuple[Sightings, tuple[Array, Array]]:
        seen = death.sight(sae, x, valid)[0] if shards is None else _sight_shard(sae, x, valid, shards)[0]
        z_pre = jnp.where(valid[:, None], sae_lib.preactivations(sae, x), 0.0)
        return seen, (z_pre.sum(axis=0), (z_pre**2).sum(axis=0))

    members = [sae_lib.each_member(one, sae) for sae in groups]
    return _added([seen for seen, _ in members], allsum), allsum(tuple(sums for _, sums in members))


def shifts(
    run: Callable[..., Any], groups: tuple[SAE, ...], batches: Iterator[tuple[Any, np.ndarray]], n_tokens: int
) -> list[list[Shift]]:
    """Pre-activation mean and spread of every feature of every member of every group, over a few held-out batches.

    Args:
      run: the compiled `shift_batch` as run(groups, input, valid).
      n_tokens: tokens in these batches, of all processes.
    """
    seen: Any = None
    total: Any = None
    for given, valid in batches:
        part, sums = processes.fetched(run(groups, given, valid))
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        seen = part if seen is None else tuple(a | b for a, b in zip(seen, part, strict=True))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    found = []
    for saw, (plain, squared) in zip(seen, total, strict=True):
        mean = plain / n_tokens
        std = np.sqrt(np.maximum(squared / n_tokens - mean**2, 0))
        fates = (~saw.positive, saw.positive & ~saw.fired)
        found.append([Shift(*of_member, n_tokens) for of_member in zip(mean, std, *fates, strict=True)])
    return found
