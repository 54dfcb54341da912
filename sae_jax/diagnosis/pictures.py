"""The pictures of a diagnosis, from what its passes found."""

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers import theory
from sae_jax.outliers.moments import Severity
from sae_jax.outliers.probes import Band, Forecast
from sae_jax.reports import diagnosis_figures, figures


def landscape(sample: Float[np.ndarray, "m d"], severity: Severity, narrow: bool = False) -> Figure:
    """The picture of some of the tokens, with the outlier dimensions marked."""
    normed = severity.layer_normed
    shown = moments_lib.layer_norm(sample[np.linspace(0, len(sample) - 1, 200).astype(int)].astype(np.float64))
    return figures.landscape(shown, moments_lib.standing_out(normed), len(normed.outlier_dimensions), narrow)


def of_tokens(severity: Severity, sample: np.ndarray) -> dict[str, Figure]:
    """Those that show the activations themselves, by their names."""
    spectra = {"as they are": severity.raw.eigen[0], "after LayerNorm": severity.layer_normed.eigenvalues}
    return {"landscape": landscape(sample, severity), "spectrum": diagnosis_figures.spectrum(spectra)}


def of_death(
    severity: Severity, result: dict[str, Any], band: Band, probes: Forecast, measured: dict[str, theory.Deaths]
) -> dict[str, Figure]:
    """Those that show who dies; `band` is the curve of the untreated activations, `probes` what it is drawn from."""
    unit = np.sqrt(severity.directions.square.mean() / severity.directions.n_tokens)
    spread = np.sqrt(np.einsum("pd,pd->p", probes.rows @ severity.directions.covariance, probes.rows))
    at = probes.at(result["n_features"], result["k"] or 1)
    bar, pathway = float(probes.bars(np.array([at]))[0]), probes.selection.pathway
    at = result["threshold"] or at
    return {
        "death_curve": diagnosis_figures.death_curve(
            band, at, result["predicted"], measured.get("none"), probes.selection),
        "shift_signal": diagnosis_figures.shift_signal(
            probes.rows @ severity.directions.mean / unit, spread / unit, probes.best, bar,
            theory.median_extreme(result["n_tokens"]), pathway,
        ),  # fmt: skip
        "remedies": diagnosis_figures.remedies(result["remedies"], pathway),
    }
