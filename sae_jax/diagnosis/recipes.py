"""What to train with on activations that were diagnosed: each remedy as settings, and a whole recipe."""

from typing import Any

from sae_jax.diagnosis.remedies import HARMLESS
from sae_jax.outliers import theory

SETTINGS: dict[str, dict[str, Any]] = {  # of a training run
    "none": {}, "mean": {"sae.center": "mean"}, "geometric_median": {"sae.center": "geometric_median"},
    "layer_norm_centred": {"data.norm": "layer_norm", "sae.center": "mean"},
    "unit_norm_centred": {"data.norm": "unit", "sae.center": "mean"}, "whitening": {"sae.whiten": True},
}  # fmt: skip


def recipe(probe: dict[str, theory.Deaths], chosen: str) -> dict[str, Any]:
    """The settings of a training run that is to keep its features to the end: where it starts, and balance.

    It keeps nearly all where there is something for each to find. Where rows outnumber what the data are made of, about
    one row for each of those is left, and without balance there are more (experiments/death/README.md).

    Balance lifts features over the bar that training raises, and those that start dead by TopK with them. It cannot
    reach what is never positive. So the cheapest start that leaves next to none dead by ReLU will do, and the geometric
    median is it nearly always; where it is not, it is the remedy that was `chosen`. AuxK would pull at the same rows.
    """
    start = "geometric_median" if probe["geometric_median"]["dead_by_relu"] < HARMLESS else chosen
    return {**SETTINGS[start], "sae.balance": True, "auxk.preset": "none"}
