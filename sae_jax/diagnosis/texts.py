"""The tokens on which each feature fires most, in their context, where it is known which tokens activations are of.

Of each stretch of tokens a feature has one best token at most, so that those of one place in a text are not the only
ones. A dead feature that centring revives has those of the centred SAE, another dead one those on which it comes
nearest to firing.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sae_jax.activations import files
from sae_jax.activations import tokens as tokens_lib
from sae_jax.exchange.sightings import Best
from sae_jax.models.words import words

MOST, SHOWN = 400_000, 5  # tokens looked at, and tokens of each feature: a page of 32k features stays below 10 MB


class Texts:
    """Collects the best tokens batch by batch.

    Args:
      token_id, sequence_id: of the first tokens; −1 where a sequence is not known.
    """

    def __init__(self, token_id: Int[np.ndarray, "N"], sequence_id: Int[np.ndarray, "N"], model: str):
        self._ids, self._model = token_id, model
        self._breaks = np.flatnonzero(np.diff(sequence_id)) + 1
        self._held: tuple[Best, ...] = ()

    def wants(self, start: int) -> bool:
        """Whether a batch that begins at that token still counts."""
        return start < len(self._ids)

    def add(self, start: int, tops: tuple[Best, ...]) -> None:
        """The best of the stretches of a batch, at each place."""
        new = [Best(np.where(start + top.row < len(self._ids), top.score, -np.inf), start + top.row) for top in tops]
        joined = [Best(*map(np.concatenate, zip(a, b, strict=True))) for a, b in zip(self._held, new, strict=True)
                  ] if self._held else new  # fmt: skip
        kept = [np.argsort(-one.score, axis=0, kind="stable")[:SHOWN] for one in joined]
        self._held = tuple(
            Best(*(np.take_along_axis(part, order, axis=0) for part in one))
            for one, order in zip(joined, kept, strict=True)
        )

    def found(self, revived: Bool[np.ndarray, "n"]) -> dict[str, Any]:
        """What `reports.feature_table` shows of them."""
        here, moved = self._held
        score, row = (np.where(revived, b, a).T for a, b in zip(here, moved, strict=True))
        fires = np.where((score > 0).any(axis=1, keepdims=True), score > 0, np.isfinite(score))
        used, numbers = np.unique(self._ids, return_inverse=True)
        text = words(self._model, used.tolist()) if self._model else None
        return {
            "vocabulary": text or [f" {one}" for one in used.tolist()], "tokens": numbers.tolist(),
            "breaks": self._breaks.tolist(), "best": [r[f].tolist() for r, f in zip(row, fires, strict=True)],
        }  # fmt: skip


def opened(activations: Any, identity: dict[str, Any], metadata: dict[str, Any]) -> Texts | None:
    """Where the tokens of a path are known; of an array or a configuration they are not.

    Args:
      identity: of the activations, which may name the model they are of.
      metadata: of the SAE, in its place.
    """
    if not isinstance(activations, str):
        return None
    array = files.open_array(activations)
    token_id, _, _ = tokens_lib.places(array, 0, 1)
    if token_id[0] == tokens_lib.UNKNOWN:
        return None
    token_id, sequence_id, _ = tokens_lib.places(array, 0, min(len(array), MOST))
    return Texts(token_id, sequence_id, str(identity.get("id") or metadata.get("model_name") or ""))
