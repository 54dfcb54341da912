"""`diagnose`: how severe the outliers are, what an untrained SAE would lose to them, and what to do about it.

Two passes over the tokens: moments, then probes under every remedy at once. Measuring, with a real untrained SAE for
every remedy, is a third pass and costs what the first two save.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from sae_jax import config as config_lib
from sae_jax import death, figures, outliers, report, theory
from sae_jax import sae as sae_lib
from sae_jax.activations import files, pipeline
from sae_jax.errors import Refused, RunFailed
from sae_jax.outliers import Severity
from sae_jax.preprocess import Preprocessing, whitening
from sae_jax.sae import SAE
from sae_jax.sources import open_source

BATCH = 4096  # tokens at a time
SAMPLE = 4096  # tokens kept aside in the first pass: for the median, the norms and the pictures
MIN_TOKENS = 256
HARMLESS = 0.01  # a remedy that leaves fewer features dead at initialisation is good enough
# In the order of what they cost: nothing; a bias that starts elsewhere; an operation per token that no SAE can absorb;
# another loss (every direction counts alike) and a matrix folded into the weights.
REMEDIES = {
    "none": "leaving the activations as they are",
    "mean": "starting the bias at the arithmetic mean",
    "geometric_median": "starting the bias at the geometric median",
    "layer_norm_centred": "a LayerNorm of each token, then centring",
    "unit_norm_centred": "scaling each token to unit length, then centring",
    "whitening": "PCA whitening",
}


class Report(dict[str, Any]):
    """The report as a dictionary, as in report.json, with `figures`: name → matplotlib Figure."""

    figures: dict[str, Figure]


class Tokens(NamedTuple):
    """Activations that can be gone through more than once."""

    batches: Callable[[], Iterator[np.ndarray]]
    d_model: int
    identity: dict[str, Any]
    given: bool  # a file or an array of the user's, as against one made or extracted on the way


def diagnose(
    activations: np.ndarray | str | ConfigDict,
    workdir: str | None = None,
    *,
    n_features: int = 8192,
    k: int = 64,
    measure: bool = False,
    n_probes: int = 512,
    seed: int = 0,
) -> Report:
    """Outlier severity, predicted death at initialisation by every law, and the cheapest remedy.

    Args:
      activations: an array (tokens, d_model); the path of a .npy, .npz, .safetensors file or of a dataset folder; or a
        configuration, whose training tokens are taken (`data.statistics_tokens` of them).
      workdir: where report.json and the figures go; None writes nothing.
      n_features, k: of the SAE in question.
      measure: also count deaths in an untrained SAE of that size under every remedy.
      n_probes: random directions to forecast with; the error of a forecast falls as 1/√n_probes.
      seed: of probes and measured SAEs.

    Returns:
      The report; its `figures` are the pictures.

    Raises:
      Refused: the activations cannot be diagnosed; nothing was written.
      RunFailed: activations made or extracted on the way are not finite.
    """
    _check(n_features, k, n_probes, workdir)
    tokens = open_tokens(activations)
    severity, sample = first_pass(tokens)
    median = outliers.geometric_median(lambda: [sample], severity.raw.mean, tolerance=1e-5)
    remedies = preprocessings(severity, median)
    best = forecast(tokens, remedies, _means(severity, median), n_probes, seed)
    measured = measured_deaths(tokens, remedies, n_features, k, seed + 1) if measure else {}
    result = Report(_summary(severity), n_features=n_features, k=k)
    result["predicted"] = predictions(severity, sample, n_features, k)
    d_after = {name: _width(before, tokens.d_model) for name, before in remedies.items()}
    probe = {name: theory.probe_deaths(best[name][1], d_after[name], n_features, k) for name in remedies}
    band = theory.death_curve(best["none"][1], tokens.d_model, _shares(n_features, k))
    here = int(np.argmin(np.abs(np.log(band.share * n_features / k))))
    result["predicted"]["probe"] = {**probe["none"], "low": float(band.low[here]), "high": float(band.high[here])}
    result["death_curve"] = {repr(float(s)): float(dead) for s, dead in zip(band.share, band.dead, strict=True)}
    result["death_curve_band"] = {
        repr(float(s)): [float(low), float(high)]
        for s, low, high in zip(band.share, band.low, band.high, strict=True)
    }
    result["remedies"] = {name: {"probe": probe[name], "measured": measured.get(name)} for name in remedies}
    result["recommended"] = recommended(probe)
    result["advice"] = advice(probe, result["recommended"])
    result |= {"n_probes": n_probes, "seed": seed, "data": tokens.identity, "versions": report.versions()}
    result.figures = _figures(severity, sample, result, band, best["none"], measured)
    if workdir:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in result.figures.items():
            figures.save(figure, folder / f"{name}.png")
        report.write_json(workdir, result)
    return result


def _check(n_features: int, k: int, n_probes: int, workdir: str | None) -> None:
    if n_features < 1:
        raise Refused("n_features", n_features, "an integer ≥ 1")
    if not 1 <= k <= n_features:
        raise Refused("k", k, f"1 to n_features = {n_features}")
    if n_probes < 16:
        raise Refused("n_probes", n_probes, "an integer ≥ 16")
    if workdir and epath.Path(workdir).exists() and not epath.Path(workdir).is_dir():
        raise Refused("--workdir", workdir, "a folder")


# -- the tokens ------------------------------------------------------------------------------------------------------


def open_tokens(activations: np.ndarray | str | ConfigDict) -> Tokens:
    """Whatever the user points at, as batches that can be read again."""
    if isinstance(activations, ConfigDict):
        config_lib.check(activations)
        source = open_source(activations)
        return Tokens(source.statistics, source.d_model, source.identity, given=bool(activations.data.path))
    try:
        chunks: Any = (
            files.open_chunks(activations) if isinstance(activations, str)
            else pipeline.ArrayChunks(np.asarray(activations), "array")
        )  # fmt: skip
    except Refused as error:
        raise Refused("activations", error.value, error.allowed) from error

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, chunks.n_tokens, BATCH):
            yield chunks.tokens(start, start + BATCH)

    return Tokens(batches, chunks.d_model, chunks.identity, given=True)


def first_pass(tokens: Tokens) -> tuple[Severity, np.ndarray]:
    """Moments of all tokens, and evenly spaced ones of them kept aside. Refuses what cannot be diagnosed."""
    kept: list[np.ndarray] = []
    stride, seen, n_bad, first_bad = 1, 0, 0, ""

    def watched() -> Iterator[np.ndarray]:
        nonlocal kept, stride, seen, n_bad, first_bad
        for x in _progress(tokens.batches(), "moments"):
            finite = np.isfinite(x)
            if not finite.all():
                if not n_bad:
                    row, dimension = np.argwhere(~finite)[0]
                    first_bad = f"row {seen + row}, dimension {dimension} is {x[row, dimension]}"
                n_bad += int((~finite).sum())
            if not n_bad:
                kept.append(np.asarray(x[-seen % stride :: stride], np.float32))
                if sum(map(len, kept)) > 2 * SAMPLE:
                    kept, stride = [np.concatenate(kept)[::2].copy()], 2 * stride
                yield x
            seen += len(x)

    try:
        severity = outliers.severity(watched(), covariance=True)
    except ValueError:
        severity = None
    if n_bad:
        message = f"{n_bad} values are not finite; the first: {first_bad}"
        raise Refused("activations", "not finite", message) if tokens.given else RunFailed(message)
    if severity is None or severity.raw.n_tokens < MIN_TOKENS:
        raise Refused("activations", f"{seen} tokens", f"at least {MIN_TOKENS} tokens")
    # Rounding leaves a variance of about 1e-14 of the mean's square where a dimension does not move.
    constant = np.flatnonzero(severity.raw.sigma <= 1e-7 * np.abs(severity.raw.mean))
    if len(constant):
        which = ", ".join(map(str, constant[:5])) + (", …" if len(constant) > 5 else "")
        raise Refused(
            "activations", f"{len(constant)} constant dimensions ({which})", "dimensions that vary: leave these out"
        )
    return severity, np.concatenate(kept)


def _progress(batches: Iterable[np.ndarray], what: str) -> Iterable[np.ndarray]:
    return tqdm(batches, desc=what, unit=f" × {BATCH} tokens", disable=None)


# -- remedies and what they leave ------------------------------------------------------------------------------------


def preprocessings(severity: Severity, median: Float[np.ndarray, "d"]) -> dict[str, Preprocessing]:
    """Every remedy, in the order of cost."""

    def shifted(shift: np.ndarray, norm: str = "none") -> Preprocessing:
        return Preprocessing(shift=jnp.asarray(shift, jnp.float32), norm=norm)

    return {
        "none": shifted(np.zeros_like(median)),
        "mean": shifted(severity.raw.mean),
        "geometric_median": shifted(median),
        "layer_norm_centred": shifted(severity.layer_normed.mean, "layer_norm"),
        "unit_norm_centred": shifted(severity.directions.mean, "unit"),
        "whitening": whitening(severity.raw),
    }


def _means(severity: Severity, median: np.ndarray) -> dict[str, np.ndarray]:
    """The mean that a remedy leaves, along which its probes are stratified."""
    return {"none": severity.raw.mean, "geometric_median": severity.raw.mean - median}


def _width(before: Preprocessing, d_model: int) -> int:
    return d_model if before.matrix is None else before.matrix.shape[0]


@jax.jit
def _improve(
    best: dict[str, Array], remedies: dict[str, Preprocessing], probes: dict[str, Array],
    x: Float[Array, "B d"], valid: Bool[Array, "B"],
) -> dict[str, Array]:  # fmt: skip
    def one(best: Array, before: Preprocessing, w: Array) -> Array:
        y = before(x)
        length = jnp.linalg.norm(y, axis=1, keepdims=True)
        cosines = (y @ w.T) / jnp.where(length > 0, length, 1)
        return jnp.maximum(best, jnp.max(jnp.where(valid[:, None], cosines, -1.0), axis=0))

    return {name: one(best[name], before, probes[name]) for name, before in remedies.items()}


def forecast(
    tokens: Tokens, remedies: dict[str, Preprocessing], means: dict[str, np.ndarray], n_probes: int, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Under every remedy, its probes (n_probes, r) and for each the largest √r·cos with any token.

    Args:
      means: the mean that a remedy leaves, if it leaves one.
    """
    rng = np.random.default_rng(seed)
    widths = {name: _width(before, tokens.d_model) for name, before in remedies.items()}
    rows = {name: theory.stratified_rows(n_probes, means.get(name, np.zeros(r)), rng) for name, r in widths.items()}
    probes = {name: jnp.asarray(w, jnp.float32) for name, w in rows.items()}
    best = {name: jnp.full(n_probes, -1.0, jnp.float32) for name in remedies}
    for x, valid in _padded(tokens, "forecast"):
        best = _improve(best, remedies, probes, x, valid)
    return {name: (rows[name], np.asarray(best[name], np.float64) * np.sqrt(r)) for name, r in widths.items()}


@jax.jit
def _sight(sae: SAE, before: Preprocessing, x: Float[Array, "B d"], valid: Bool[Array, "B"]) -> death.Sightings:
    return death.sight(sae, before(x), valid)[0]


def measured_deaths(
    tokens: Tokens, remedies: dict[str, Preprocessing], n_features: int, k: int, seed: int
) -> dict[str, theory.Deaths]:
    """Deaths counted in an untrained SAE behind every remedy, on all tokens."""
    saes = {
        name: sae_lib.init(jax.random.key(seed), n_features, k, jnp.zeros(_width(before, tokens.d_model), jnp.float32))
        for name, before in remedies.items()
    }
    seen: dict[str, death.Sightings] = {}
    for x, valid in _padded(tokens, "measure"):
        for name, before in remedies.items():
            part = _sight(saes[name], before, x, valid)
            seen[name] = seen[name] | part if name in seen else part
    return {name: death.pathways(found) for name, found in seen.items()}


def _padded(tokens: Tokens, what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape, with the mask of the rows that are tokens."""
    for x in _progress(tokens.batches(), what):
        for start in range(0, len(x), BATCH):
            part = np.asarray(x[start : start + BATCH], np.float32)
            yield np.pad(part, ((0, BATCH - len(part)), (0, 0))), np.arange(BATCH) < len(part)


# -- the report ------------------------------------------------------------------------------------------------------


def _shares(n_features: int, k: int) -> np.ndarray:
    """k/n to draw the death curve at: four an octave from 1/n to 1/2, and the one asked about."""
    steps = np.arange(0, 4 * np.log2(max(n_features, 4)) - 3)
    return np.unique(np.append(0.5 * 2 ** (-steps / 4), k / n_features))


def _summary(severity: Severity) -> dict[str, Any]:
    raw, normed, _ = severity
    kurtosis, standing = raw.kurtosis, normed.outlier_dimensions
    share = normed.mean**2 / max(float(normed.mean @ normed.mean), np.finfo(np.float64).tiny)
    d_model = len(raw.mean)
    return {
        **severity.gammas(),
        "effective_rank": outliers.effective_rank(normed.spectrum()[0]),
        "kurtosis": {"median": float(np.median(kurtosis)), "max": float(np.max(kurtosis))},
        "n_outlier_dimensions": len(standing),
        "outlier_dimensions": [
            {
                "dimension": int(j),
                "mean_over_sigma": float(abs(normed.mean[j]) / normed.sigma[j]),
                "share_of_mean_square": float(share[j]),
            }
            for j in standing[:50]
        ],
        "bias_learning_time": theory.bias_learning_time(raw.mean * np.sqrt(d_model) / np.linalg.norm(raw.sigma)),
        "n_tokens": raw.n_tokens,
        "d_model": d_model,
    }


def predictions(severity: Severity, sample: Float[np.ndarray, "m d"], n_features: int, k: int) -> dict[str, Any]:
    """What each law in closed form says of these activations; `sample` is some of the tokens."""
    d_model = len(severity.raw.mean)
    size = (severity.raw.n_tokens, n_features, k)
    gamma, gamma_raw, one = severity.gammas().values()
    rank_normed = outliers.effective_rank(severity.layer_normed.spectrum()[0])
    eigenvalues, vectors = severity.raw.spectrum()
    square_norms = np.square(sample.astype(np.float64) - severity.raw.mean).sum(axis=1)
    rank = outliers.effective_rank(severity.directions.spectrum()[0])
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
        "spectrum": theory.spectrum_law(eigenvalues, vectors @ severity.raw.mean, square_norms, *size),
    }


def recommended(probe: dict[str, theory.Deaths]) -> str:
    """The cheapest remedy forecast to leave under 1 % dead; failing that, the one with the fewest dead by ReLU, then
    in total."""
    for name, deaths in probe.items():
        if deaths["dead_total"] < HARMLESS:
            return name
    return min(probe, key=lambda name: (round(probe[name]["dead_by_relu"], 2), probe[name]["dead_total"]))


def advice(probe: dict[str, theory.Deaths], chosen: str) -> str:
    """The report in a few sentences."""
    none, then = probe["none"], probe[chosen]
    lines = [
        f"Untreated, {_percent(none['dead_total'])} of the features are forecast to be dead at initialisation, "
        f"{_percent(none['dead_by_relu'])} by ReLU."
    ]
    if chosen == "none":
        return lines[0] + " No remedy is needed."
    lines.append(
        "Death by ReLU stays until the bias has learned the mean; death by TopK mostly recovers in training: "
        "this is a risk, not a verdict."
    )
    verb = "is forecast to leave" if then["dead_total"] < HARMLESS else "is the best found, and still leaves"
    lines.append(
        f"{REMEDIES[chosen].capitalize().replace('Pca', 'PCA')} {verb} {_percent(then['dead_total'])} dead."
    )
    if probe["mean"]["dead_total"] > max(none["dead_total"], HARMLESS):
        lines.append(
            f"Beware of the arithmetic mean: centring by it makes things worse, {_percent(probe['mean']['dead_total'])}"
            " dead, because tokens of very large norm pull it away from the others."
        )
    return " ".join(lines)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _figures(
    severity: Severity,
    sample: np.ndarray,
    result: Report,
    band: theory.Band,
    probes: tuple[np.ndarray, np.ndarray],
    measured: dict[str, theory.Deaths],
) -> dict[str, Figure]:
    rows, best = probes
    values, vectors = severity.raw.spectrum()
    unit = np.sqrt(values.sum() / len(values))
    spread = np.sqrt((rows @ vectors.T) ** 2 @ values)
    bar = float(theory.alignment_threshold(result["k"] / result["n_features"], result["d_model"]))
    spectra = {"as they are": values, "after LayerNorm": severity.layer_normed.spectrum()[0]}
    return {
        "landscape": figures.landscape(
            outliers.layer_norm(sample[np.linspace(0, len(sample) - 1, 200).astype(int)].astype(np.float64)),
            severity.layer_normed.outlier_dimensions,
        ),
        "spectrum": figures.spectrum(spectra),
        "death_curve": figures.death_curve(
            band, result["k"] / result["n_features"], result["predicted"], measured.get("none")
        ),
        "shift_signal": figures.shift_signal(
            rows @ severity.raw.mean / unit, spread / unit, best, bar, theory.median_extreme(result["n_tokens"])
        ),
        "remedies": figures.remedies(result["remedies"]),
    }
