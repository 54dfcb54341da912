"""`diagnose`: how severe the outliers are, what an untrained SAE would lose to them, and what to do about it.

Two passes over the tokens: moments, then probes under every remedy at once; more for what is not known well enough by
then. Measuring, with a real untrained SAE for
every remedy, is a third pass and costs what the first two save.
"""

import contextlib
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.activations import tokens
from sae_jax.diagnosis import recipes, remedies, survey
from sae_jax.errors import Refused
from sae_jax.models.sources import open_tokens
from sae_jax.outliers import giants, selections, theory
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.moments import Severity
from sae_jax.outliers.probes import places
from sae_jax.reports import tables
from sae_jax.runtime import disk
from sae_jax.training import evaluation

N_PROBES = 512
AUTOPSY = "dead_features"  # a key that its report has, and that of a diagnosis has not
RUN = "config.json"  # checkpoint.CONFIG, without orbax: it takes as long to import as a small diagnosis


class Report(dict[str, Any]):
    """The report as a dictionary, as in report.json, with `figures`: name → matplotlib Figure.

    That of an autopsy also has `features`: `fate`, `n_fired` and `distance_to_threshold` of each, as in features.csv.
    """

    figures: dict[str, Any]
    features: dict[str, np.ndarray]


def diagnose(
    activations: np.ndarray | tokens.Rows | str | ConfigDict, workdir: str | None = None, *, n_features: int = 8192,
    k: int = 64, selection: str = "topk", threshold: float | None = None, measure: bool = False,
    n_probes: int | None = None, seed: int = 0, pilot: bool = False,
) -> Report:  # fmt: skip
    """Outlier severity, predicted death at initialisation by every law, and the cheapest remedy.

    Args:
      activations: an array (tokens, d_model); the path of a .npy, .npz, .safetensors file or of a dataset folder; or a
        configuration, whose training tokens are taken (`data.statistics_tokens` of them).
      workdir: where report.json and the figures go; None writes nothing.
      n_features, k: of the SAE in question; k is that of topk and batch_topk.
      selection: how the SAE selects: topk | batch_topk (k of each token on average) | jumprelu | relu; the laws in
        closed form know topk.
      threshold: of jumprelu, in the units of the activations; behind a remedy that gives tokens another size it is as
        many of their ‖sigma‖. Of a configuration of such SAEs it is where they start, if left out.
      measure: also count deaths in an untrained SAE of that size under every remedy.
      n_probes: random directions to forecast with; a forecast errs by 1/√n_probes. Remedies that may be on either side
        of 1 % are looked at again with more, up to about n_features. Not given: 512, and more too where a share is not
        known to 1.5 points, if that takes no more than some 20 seconds on 2 CPU cores.
      seed: of probes and measured SAEs.
      pilot: also forecast what is dead after training, for every member of a configuration, by two pilots of an eighth
        of its steps, at least 500, side by side in WORKDIR/pilots, with the memory of twice as many SAEs; n_features
        and k are then the configuration's.

    Returns:
      The report: `gamma` (after LayerNorm), `gamma_raw`, `gamma_direction`, `predicted` (law → shares of features dead
      at initialisation), `death_curve` (k/n → share; of jumprelu threshold → share), `remedies` (name → forecast, and
      count where measured), `recommended` (the name of one), `recipe` (settings of a run that is to keep its features,
      see `recipes.recipe`; none but for topk), `after_training` (by pilots), `advice` (a few sentences). `undecided`
      names the remedies that may be on either side of 1 % even so, `.figures` are the pictures by their names.

    Raises:
      Refused: the activations cannot be diagnosed; nothing was written.
      RunFailed: activations made or extracted on the way are not finite.
    """
    closer, n_probes = n_probes is None, N_PROBES if n_probes is None else n_probes
    check(n_features, k, n_probes, seed, workdir)
    theta = None  # where a run of a configuration starts its thresholds, of tokens with ‖sigma‖ = √d
    if threshold is None and isinstance(activations, ConfigDict) and activations.sae.activation == selection:
        theta = config_lib.of_penalty(activations, "threshold") or None
    how = selections.named(selection, theta or threshold)
    planned = activations if pilot and isinstance(activations, ConfigDict) and workdir else None
    if pilot and (planned is None or selection != "topk"):
        raise Refused("pilot", pilot, "of a configuration of TopK SAEs, with a workdir for its run")
    after_training = None
    if planned:  # first: it has more to refuse
        from sae_jax.diagnosis import pilot as pilot_lib  # and with it orbax, which takes as long as a small diagnosis

        n_features, k = planned.sae.n_features, planned.sae.k
        after_training = pilot_lib.forecast(planned, str(workdir))
    fits = partial(remedies.check_memory, n_features=n_features, n_probes=n_probes, measure=measure, rule=selection)
    tokens, scale = survey.rescaled(open_tokens(activations, fits))
    Thread(target=_import_early).start()
    severity, sample, counts = survey.first_pass(tokens)
    ordinary = giants.without(tokens.batches, counts.giant_norm, covariance=True) if counts.any_giant else severity
    median = moments_lib.geometric_median(lambda: [sample], severity.raw.mean, tolerance=1e-5)
    choices = remedies.preprocessings(severity, median, ordinary)
    if theta:
        how = how._replace(threshold=selections.in_activations(theta, severity, scale))
        threshold = how.threshold
    each = selections.behind(how, choices, severity, scale)
    with ThreadPoolExecutor(1) as beside:  # XLA leaves the interpreter to the laws, and to what can be drawn by now
        laws = beside.submit(predictions, severity, sample, n_features, k)
        early = beside.submit(_of_tokens, severity, sample, workdir is not None)
        found = remedies.forecast_closely(
            tokens, choices, severity.raw.mean, n_features, k, n_probes, seed, each,
            severity.raw.n_tokens if closer else 0,
        )  # fmt: skip
    from sae_jax.diagnosis import pictures
    from sae_jax.reports import figures

    predicted, (of_tokens, files) = laws.result(), early.result()
    measured, over = remedies.measured(tokens, choices, n_features, k, seed + 1, each) if measure else ({}, {})
    probe = {name: forecast.deaths(n_features, k) for name, forecast in found.items()}
    band = found["none"].curve(places(each["none"], n_features, k), n_features)
    here = int(np.searchsorted(band.share, found["none"].at(n_features, k)))
    if threshold is not None:
        band = band._replace(share=band.share / scale)

    result = Report(survey.summary(severity), n_features=n_features, k=k if selection in selections.COUNTED else None)
    result |= {"selection": selection, "threshold": threshold}
    result["predicted"] = selections.known(predicted, selection)
    result["predicted"]["probe"] = {**probe["none"], "low": float(band.low[here]), "high": float(band.high[here])}
    result["death_curve"] = {repr(float(s)): float(dead) for s, dead in zip(band.share, band.dead, strict=True)}
    ends = zip(band.share, band.low, band.high, strict=True)
    result["death_curve_band"] = {repr(float(s)): [float(low), float(high)] for s, low, high in ends}
    result["remedies"] = {
        name: {
            "probe": probe[name], "n_probes": len(found[name].best), "dimensions": found[name].rows.shape[1],
            "measured": measured.get(name), "dead_over_tokens": over.get(name),
        } for name in choices
    }
    result["recommended"] = remedies.recommended(probe)
    result["undecided"] = remedies.undecided(found, n_features, k)
    result["recipe"] = recipes.recipe(probe, result["recommended"]) if selection == "topk" else None
    result["advice"] = remedies.advice(probe, result["recommended"], result["undecided"], selection)
    if result["remedies"]["whitening"]["dimensions"] < tokens.d_model:
        result["advice"] += " " + remedies.dropped(result["remedies"]["whitening"]["dimensions"], tokens.d_model)
    result |= {"warnings": survey.warnings(severity, counts.bits)}
    result |= {"constant_dimensions": survey.constant(severity).tolist()}
    result["highest_rate_of_dead"] = evaluation.highest_rate_of_dead(severity.raw.n_tokens)
    result["n_giant_tokens"] = severity.raw.n_tokens - ordinary.raw.n_tokens
    result["without_giants"] = ordinary.gammas()
    result |= {"n_zero_tokens": counts.n_zero, "scale": scale, "n_probes": n_probes, "seed": seed}
    result |= {"after_training": after_training, "data": tokens.identity, "versions": tables.versions()}
    result.figures = of_tokens | pictures.of_death(severity, result, band, found["none"], measured)
    if workdir:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in result.figures.items():
            disk.write_bytes(folder / f"{name}.png", files.get(name) or figures.png(figure))
        tables.write_json(workdir, result)
    return result


def _import_early() -> None:
    """Matplotlib, while others work; what is wrong with it is told where it is used."""
    with contextlib.suppress(Exception):
        importlib.import_module("matplotlib.figure")


def _of_tokens(severity: Severity, sample: np.ndarray, render: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The pictures that need no forecast; and as files, if they are to be written."""
    from sae_jax.diagnosis import pictures
    from sae_jax.reports import figures

    found = pictures.of_tokens(severity, sample)
    return found, {name: figures.png(figure) for name, figure in found.items()} if render else {}


def check(
    n_features: int, k: int, n_probes: int, seed: int, workdir: str | None, own: str = "recommended"
) -> None:  # fmt: skip
    """Refuses settings that cannot be run, a workdir that cannot be written, and one with files of something else,
    which would lie beside ours. Writes nothing.

    Args:
      own: a key that the report has.
    """
    for field, value, good, allowed in (
        ("n_features", n_features, 1 <= n_features < 2**31, "1 to 2^31 - 1"),
        ("k", k, 1 <= k <= n_features, f"1 to n_features = {n_features}"),
        ("n_probes", n_probes, 16 <= n_probes <= 2**20, "16 to 2^20"),
        ("seed", seed, 0 <= seed < 2**31, "0 to 2^31 - 1"),
    ):
        if not good:
            raise Refused(field, value, allowed)
    if workdir and (epath.Path(workdir) / RUN).exists():
        raise Refused("--workdir", workdir, "a folder of its own: this one holds a run")
    if workdir and not _is_ours(epath.Path(workdir), own):
        raise Refused("--workdir", workdir, "a folder of its own: this one holds the report of something else")
    if workdir and "://" not in workdir:
        there = Path(workdir).absolute()
        try:
            while not there.exists():
                there = there.parent
        except OSError as error:  # as a name that is too long
            raise disk.unwritable("--workdir", workdir, error) from error
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise Refused("--workdir", workdir, f"a folder that can be written: {there} cannot")


def _is_ours(folder: epath.Path, own: str) -> bool:
    """Whether the report in a folder, if there is one, is of the kind with the key `own`."""
    report = folder / "report.json"
    if not report.exists():  # the last file that an autopsy writes
        return own == AUTOPSY or not (folder / "features.csv").exists()
    try:
        found = json.loads(report.read_text())
    except (OSError, ValueError, RecursionError):  # no JSON
        return False
    return isinstance(found, dict) and {own, "gamma", "versions"} <= found.keys()


def predictions(severity: Severity, sample: Float[np.ndarray, "m d"], n_features: int, k: int) -> dict[str, Any]:
    """What each law in closed form says of these activations; `sample` is some of the tokens."""
    d_model = len(severity.raw.mean)
    size = (severity.raw.n_tokens, n_features, k)
    gamma, gamma_raw, one = severity.gammas().values()
    rank_normed = moments_lib.effective_rank(severity.layer_normed.eigenvalues)
    rank = moments_lib.effective_rank(severity.directions.eigenvalues)
    cosines = moments_lib.direction(sample.astype(np.float64)) @ severity.directions.axis
    return {
        "paper": {
            "dead_by_relu": float(theory.dead_by_relu_paper(gamma, size[0])),
            "dead_total": float(theory.dead_total_paper(gamma, *size)),
        },
        "finite_gamma": {
            "dead_by_relu": float(theory.dead_by_relu_finite_gamma(one, size[0])),
            "dead_total": float(theory.dead_total_finite_gamma(one, *size)),
        },
        "token_integral": theory.token_integral(one, rank, d_model, *size),
        "two_gammas": theory.two_gammas(gamma, gamma_raw, rank_normed, d_model, *size),
        "spectrum": theory.spectrum_law(severity.directions.across_mean, cosines, *size),
    }
