"""The first look at activations: moments, a sample, giants, zeros; what cannot be diagnosed, and what it rests on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sae_jax.errors import Refused, RunFailed
from sae_jax.models.sources import Tokens
from sae_jax.outliers import giants, rounding, theory
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.moments import Severity
from sae_jax.runtime import progress
from sae_jax.training import evaluation

SAMPLE = 4096  # tokens kept aside: for the median, the cosines and the pictures
MIN_TOKENS = 256  # with fewer, or fewer than 2 a dimension, the report warns
FEWEST = 16


def rescaled(tokens: Tokens) -> tuple[Tokens, float]:
    """The tokens times a power of two that brings their size near 1 where float32 could not square it.

    No cosine changes, so no feature's fate does. Returns the factor too: 1 for all ordinary activations.
    """
    first = np.asarray(next(tokens.batches(), np.ones((1, 1))), np.float64)
    size = np.abs(first[np.isfinite(first)]).max(initial=0.0)
    if not size > 0 or 1e-3 < size < 1e6:
        return tokens, 1.0
    scale = float(2.0 ** -np.round(np.log2(size)))

    def batches() -> Iterator[np.ndarray]:
        return (np.asarray(x, np.float64) * scale for x in tokens.batches())

    return tokens._replace(batches=batches), scale


class Counts(NamedTuple):
    """What the first pass counts."""

    n_zero: int  # tokens that are zero in every dimension
    giant_norm: float  # tokens of a larger norm are giants
    any_giant: bool
    bits: int  # that numbers were rounded to, see `rounding`


def first_pass(tokens: Tokens, of_directions: bool = True) -> tuple[Severity, np.ndarray, Counts]:
    """Moments of all tokens, a random choice of them kept aside, and what was counted on the way.

    The covariance `of_directions` costs a third of it, and an autopsy has no use for it. Refuses what cannot be
    diagnosed.
    """
    kept, norms = giants.Sample(2 * SAMPLE), giants.Sample(giants.MOST)
    seen, n_bad, n_zero, longest, first_bad, bits = 0, 0, 0, 0.0, "", rounding.Bits()

    def watched() -> Iterator[np.ndarray]:
        nonlocal seen, n_bad, n_zero, longest, first_bad
        for x in bits.watching(progress.counted(tokens.batches(), "moments")):
            finite = np.isfinite(x)
            if not finite.all():
                if not n_bad:
                    row, dimension = np.argwhere(~finite)[0]
                    first_bad = f"row {seen + row}, dimension {dimension} is {x[row, dimension]}"
                n_bad += int((~finite).sum())
            if not n_bad:
                n_zero += int((~x.any(axis=1)).sum())
                kept.add(x)
                norms.add(lengths := giants.norms(x))
                longest = max(longest, float(lengths.max(initial=0.0)))
                yield x
            seen += len(x)

    try:
        severity = moments_lib.severity(watched(), True, of_directions)
    except Refused:  # what cannot be read is not what is too little
        raise
    except ValueError:
        severity = None
    name = tokens.identity.get("path", "activations")
    if n_bad:
        message = f"values that are not finite: {n_bad}; the first: {first_bad}"
        raise Refused("activations", name, message) if tokens.given else RunFailed(message)
    if severity is None or severity.raw.n_tokens < FEWEST:
        raise Refused("activations", name, f"at least {FEWEST} tokens, not {seen}")
    if tokens.d_model < 2:
        raise Refused("activations", name, "at least 2 dimensions")
    if len(constant(severity)) == tokens.d_model:
        raise Refused("activations", name, "activations that vary; these are the same on every token")
    giant_norm = giants.giant_norm(norms.rows)
    return severity, kept.rows, Counts(n_zero, giant_norm, longest > giant_norm, bits.kept)


COMMON, LITTLE = 2.0, 0.5  # gamma_direction over gamma from which it is told, and up to which it kills next to nothing


def constant(severity: Severity) -> np.ndarray:
    """Dimensions that do not move: rounding leaves them a deviation of about 1e-16 of the mean."""
    return np.flatnonzero(severity.raw.sigma <= 1e-12 * np.abs(severity.raw.mean))


def warnings(severity: Severity, bits: int) -> list[str]:
    """What the numbers of a report rest on, where that is little; `bits` as `Counts` has them."""
    n_tokens, d_model, still = severity.raw.n_tokens, len(severity.raw.mean), constant(severity)
    found = []
    if n_tokens < (needed := max(MIN_TOKENS, 2 * d_model)):
        rate = evaluation.highest_rate_of_dead(n_tokens)
        found.append(f"these numbers rest on {n_tokens} tokens (rows), where {d_model} dimensions want at least "
                     f"{needed}: a feature that fires on 1 token in {1 / rate:.0f} may look dead, and whitening learns "
                     "the tokens by heart")  # fmt: skip
    if len(still):
        which = ", ".join(map(str, still[:5])) + (", …" if len(still) > 5 else "")
        found.append(f"{len(still)} of {d_model} dimensions are the same on every token: {which}")
    gamma, _, of_directions = severity.gammas().values()
    if of_directions > max(COMMON * gamma, LITTLE):
        found.append(f"gamma, {gamma:.2f}, does not see the part of the mean that all dimensions share, which "
                     "LayerNorm removes, and an SAE of these activations does: go by gamma_direction, "
                     f"{of_directions:.2f}, and the probes")  # fmt: skip
    return found + rounding.warnings(severity.raw, bits)


def summary(severity: Severity) -> dict[str, Any]:
    """What the moments say: the gammas, rank, kurtosis, outlier dimensions, how long a bias takes to learn the mean."""
    raw, normed, _ = severity
    kurtosis, d_model = raw.kurtosis, len(raw.mean)
    return {
        **severity.gammas(),
        "effective_rank": moments_lib.effective_rank(normed.eigenvalues),
        # Dimensions that do not vary have none.
        "kurtosis": {"median": float(np.nanmedian(kurtosis)), "max": float(np.nanmax(kurtosis))},
        "n_outlier_dimensions": len(normed.outlier_dimensions), "outlier_dimensions": moments_lib.standing_out(normed),
        "bias_learning_time": theory.bias_learning_time(raw.mean * np.sqrt(d_model) / np.linalg.norm(raw.sigma)),
        "n_tokens": raw.n_tokens, "d_model": d_model,
    }
