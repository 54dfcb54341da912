"""What a transcoder is to reconstruct: the activations of its target, row by row beside those that it reads."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sae_jax.diagnosis import remedies, survey
from sae_jax.errors import Refused
from sae_jax.exchange.encoders import Encoder
from sae_jax.exchange.sightings import Goal
from sae_jax.models.sources import Tokens, open_tokens
from sae_jax.outliers import giants
from sae_jax.outliers.moments import Moments


class Target(NamedTuple):
    """The target's tokens times `scale`, a power of two, and their moments."""

    tokens: Tokens
    scale: float
    moments: Moments
    ordinary: Moments  # of those that are no giants among them
    giant_norm: float
    reads: Tokens  # what a skip connection sees: the tokens that the transcoder reads, as they are

    def summary(self) -> dict[str, Any]:
        """As the report has it."""
        return {"d_out": self.tokens.d_model, "n_giant_tokens": self.moments.n_tokens - self.ordinary.n_tokens,
                "data": self.tokens.identity}  # fmt: skip

    def encoder(self, encoder: Encoder, scale: float) -> Encoder:
        """The transcoder of scale · x whose x̂ is in the target's units here, without its skip connection."""
        units = np.float32(self.scale / scale)
        found = encoder.in_units(scale).replace(W_skip=None)
        return found if units == 1 else found.replace(W_dec=found.W_dec * units, b_dec=found.b_dec * units)

    def goals(self, W_skip: Any) -> Iterator[Goal]:
        """In batches as `remedies.padded` has them: the target less what the skip connection makes of x."""
        reads = itertools.repeat(None) if W_skip is None else (x for x, _ in remedies.padded(self.reads))
        for (rows, _), x in zip(remedies.padded(self.tokens), reads, strict=False):
            ordinary = giants.norms(rows) <= self.giant_norm
            if x is not None:
                skipped = x.astype(np.float64) @ np.asarray(W_skip, np.float64).T
                rows = np.asarray(rows - self.scale * skipped, np.float32)
            yield Goal(rows, ordinary)


def check(target: Any, activations: Any, encoder: Encoder, name: str) -> None:
    """Refuses a target where there can be none."""
    said = target if isinstance(target, str) else "array"
    if not encoder.transcodes:
        raise Refused("target", said, f"leave it out: {name} is no transcoder, it reconstructs what it reads")
    if isinstance(activations, ConfigDict):
        raise Refused("target", said, "--activations beside it: a configuration chooses among its tokens")


def opened(target: np.ndarray | str, encoder: Encoder, reads: Tokens, n_tokens: int) -> Target:
    """The target of a transcoder; one pass over it, two where it has giants.

    Raises:
      Refused: it cannot be read, has another number of tokens, or another width than d_out.
    """
    said = target if isinstance(target, str) else "array"
    try:
        tokens, scale = survey.rescaled(open_tokens(target))
        d_out = encoder.W_dec.shape[1]
        if tokens.d_model != d_out:
            raise Refused("target", said, f"activations of the transcoder's d_out {d_out}, not {tokens.d_model}")
        severity, _, counts = survey.first_pass(tokens, of_directions=False)
    except Refused as error:
        raise Refused("target", error.value, error.allowed) from error
    if severity.raw.n_tokens != n_tokens:
        raise Refused("target", said, f"the {n_tokens} tokens of the activations, not {severity.raw.n_tokens}")
    ordinary = giants.without(tokens.batches, counts.giant_norm) if counts.any_giant else severity
    return Target(tokens, scale, severity.raw, ordinary.raw, counts.giant_norm, reads)
