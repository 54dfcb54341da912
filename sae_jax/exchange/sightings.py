"""What tokens show of every feature of anybody's SAE: is it ever positive, how often it fires, how near it comes.

A feature fires where what it is ranked by passes a bar: the k-th largest of that token, its own threshold, the largest
of its group, 0. Its margin is the distance above that bar.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax.autoencoder import topk
from sae_jax.exchange.encoders import Acts, Encoder, decode, in_rows, magnitude_bias, select


class Seen(NamedTuple):
    """What some tokens showed of every feature."""

    positive: Any  # (n,) bool: z_pre > 0 on some token
    n_fired: Any  # (n,) tokens each feature fired on
    largest: Any  # (n,) its largest activation, in absolute value
    margin: Any  # (n,) its largest margin: below 0 where it never passed the bar
    error_square: Any  # Σ ‖x − x̂‖²; of a transcoder that of its target, and nothing where that is not known
    ordinary_error: Any  # the same over tokens that are no giants

    def __or__(self, other: "Seen") -> "Seen":
        return Seen(
            self.positive | other.positive, self.n_fired + other.n_fired, np.maximum(self.largest, other.largest),
            np.maximum(self.margin, other.margin), self.error_square + other.error_square,
            self.ordinary_error + other.ordinary_error,
        )  # fmt: skip


class Goal(NamedTuple):
    """What a transcoder is to reconstruct of a batch."""

    rows: Any  # (B, d_out)
    ordinary: Any  # (B,) bool: no giant


class Best(NamedTuple):
    """Of each of some stretches of a batch, the token on which each feature fires most, or comes nearest to it."""

    score: Any  # (stretches, n): its activation there, or, below 0, its margin
    row: Any  # (stretches, n) of the batch


class Place(NamedTuple):
    """Where an encoder stands against a point that tokens are measured from: a bias moved is another place."""

    offset: Any  # (n,): W_enc (point − b_in), in float64 before it is rounded
    b_dec: Any  # (d_out,)


def place(encoder: Encoder, point: np.ndarray, moved: bool) -> Place:
    """As the encoder is, or with its bias `moved` to the point (a transcoder's bias of its output stays)."""
    if moved:
        b_dec = encoder.b_dec if encoder.transcodes else np.float32(point)
        return Place(np.zeros(len(encoder.b_enc), np.float32), b_dec)
    left = np.asarray(point, np.float64) - np.asarray(encoder.b_in, np.float64)
    return Place(np.float32(in_rows(encoder.W_enc, lambda W: W @ left)), encoder.b_dec)


# Pre-activations at a time, and pieces side by side: top-k has one thread on a CPU, so it works on one piece while the
# other cores multiply the next.
PIECE, ABREAST = 2**23, 4
STRETCH = 256  # tokens, of which a feature has one best


@partial(jax.jit, static_argnames="best")
def see(
    encoder: Encoder, places: tuple[Place, ...], point: Float[Array, "d"], x: Float[Array, "B d"],
    valid: Bool[Array, "B"], giant_norm: Float[Array, ""], goal: Goal | None = None, best: bool = False,
) -> tuple[tuple[Seen, ...], tuple[Best, ...]]:  # fmt: skip
    """One batch of normed tokens through the encoder at several places, with one product for all of them.

    W_enc (x − b_in) = W_enc (x − point) + W_enc (point − b_in): with the mean as the point neither term cancels.

    Args:
      giant_norm: of a token that is no longer ordinary.
      goal: of a transcoder, where it is known.
      best: also find the best tokens, which takes another look at all pre-activations.
    """
    with topk.exact():
        n = len(encoder.b_enc)
        rows = max(1, min(len(x), 2 ** ((PIECE // n).bit_length() - 1) if n < PIECE else 1))
        pad = -len(x) % rows
        pieces = partial(jax.tree.map, lambda a: jnp.pad(a, ((0, pad), *((0, 0),) * (a.ndim - 1))).reshape(
            -1, rows, *a.shape[1:]))  # fmt: skip
        b_mag = magnitude_bias(encoder)

        def one(total: tuple[Seen, ...], batch: tuple[Any, ...]) -> tuple[tuple[Seen, ...], tuple[Best, ...]]:
            x, valid, goal, row = batch
            u = (x - point) @ encoder.W_enc.T
            found = tuple(_see(encoder, place, b_mag, u, x, valid, goal, giant_norm, best) for place in places)
            tops = tuple(_best(score, row) for _, score in found if score is not None)
            return tuple(_join(a, b) for a, (b, _) in zip(total, found, strict=True)), tops

        zero = jnp.zeros(())
        start = Seen(jnp.zeros(n, bool), jnp.zeros(n, jnp.int32), jnp.zeros(n), jnp.full(n, -jnp.inf), zero, zero)
        batches = (*pieces((x, valid, goal)), jnp.arange(len(x) + pad).reshape(-1, rows))
        total: tuple[Seen, ...]
        total, tops = jax.lax.scan(one, (start,) * len(places), batches, unroll=ABREAST)
        return total, jax.tree.map(lambda a: a.reshape(-1, n), tops)


def _best(score: Float[Array, "B n"], row: Array) -> Best:
    """Of each stretch of rows."""
    size = STRETCH if len(row) % STRETCH == 0 else len(row)
    parts = score.reshape(-1, size, score.shape[1])
    largest = parts.max(axis=1)
    # On a CPU two plain reductions take a fraction of XLA's argmax.
    at = jnp.where(parts == largest[:, None], jnp.arange(size)[:, None], size - 1).min(axis=1)
    return Best(largest, row[0] + at + size * jnp.arange(len(parts))[:, None])


def _see(
    encoder: Encoder, place: Place, b_mag: Array | None, u: Array, x: Array, valid: Array, goal: Goal | None,
    giant_norm: Array, best: bool,
) -> tuple[Seen, Array | None]:  # fmt: skip
    z_pre = jnp.where(valid[:, None], u + (place.offset + encoder.b_enc), 0.0)
    positive, acts = select(encoder, z_pre, b_mag)
    kept, dense = acts
    if goal is None and not encoder.transcodes:
        goal = Goal(x, jnp.linalg.norm(x, axis=1) <= giant_norm)
    error, ordinary = jnp.zeros(len(x)), valid
    if goal is not None:
        error = jnp.sum((goal.rows - decode(encoder, acts, x, place.b_dec)) ** 2, axis=1)
        ordinary = valid & goal.ordinary
    sums = tuple(jnp.sum(jnp.where(rows, error, 0.0)) for rows in (valid, ordinary))
    if kept is not None:
        size = jnp.where(valid[:, None], jnp.abs(kept.values), 0.0)
        none = jnp.zeros(len(encoder.b_enc))
        n_fired = none.astype(jnp.int32).at[kept.indices].add((size > 0).astype(jnp.int32))
        largest = none.at[kept.indices].max(size)
    else:
        assert dense is not None
        size = jnp.where(valid[:, None], dense, 0.0)
        n_fired, largest = (size > 0).sum(axis=0, dtype=jnp.int32), size.max(axis=0)
    ranked, margin = margins(encoder, z_pre, acts)
    margin = jnp.where(valid[:, None], margin, -jnp.inf)
    seen = Seen((positive & valid[:, None]).any(axis=0), n_fired, largest, margin.max(axis=0), *sums)
    return seen, jnp.where(margin >= 0, ranked, margin) if best else None


def margins(encoder: Encoder, z_pre: Float[Array, "B n"], acts: Acts) -> tuple[Array, Array]:
    """What features are ranked by, and how far that is above the bar that it has to pass; both (B, n).

    Of a gated SAE both are of its gate.
    """
    ranked = z_pre if encoder.ranked_by is None else z_pre * encoder.ranked_by
    if encoder.rule == "threshold":
        return ranked, ranked - jnp.maximum(encoder.threshold, 0)
    if acts.kept is None:
        return z_pre, z_pre
    if encoder.rule == "abstopk":
        ranked = jnp.abs(ranked)
    bar = jnp.abs(acts.kept.values)
    if encoder.rule == "groupmax":  # one value a group, in the order of the groups
        return ranked, ranked - jnp.repeat(bar, ranked.shape[1] // bar.shape[1], axis=1)
    return ranked, ranked - bar.min(axis=1, keepdims=True)


def _join(a: Seen, b: Seen) -> Seen:
    return Seen(
        a.positive | b.positive, a.n_fired + b.n_fired, jnp.maximum(a.largest, b.largest),
        jnp.maximum(a.margin, b.margin), a.error_square + b.error_square, a.ordinary_error + b.ordinary_error,
    )  # fmt: skip
