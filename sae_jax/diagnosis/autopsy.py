"""`dissect`: an SAE that exists, ours or anybody's, and some activations: who is dead in it, and what they died of.

Two passes over the tokens: moments, then the SAE as it is beside the same SAE with its bias moved to the mean, and the
probes that say what an untrained SAE of that size would lose. A feature's mean pre-activation, W_enc (mu − b_dec) +
b_enc, and its standard deviation, √(w·Σ·w), follow from the moments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from sae_jax.autoencoder import death
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE
from sae_jax.diagnosis import diagnosis, remedies
from sae_jax.diagnosis.diagnosis import Report
from sae_jax.errors import Refused
from sae_jax.exchange import formats, sharing
from sae_jax.exchange.formats import Packed
from sae_jax.models.sources import Tokens, open_tokens
from sae_jax.outliers import giants
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.moments import Severity
from sae_jax.outliers.preprocess import per_token
from sae_jax.reports import figures, tables
from sae_jax.training import evaluation, fates

FATES = ("alive", "dead_by_topk", "dead_by_relu")
CENTRINGS = ("none", "mean", "geometric_median")


def dissect(
    sae: str | SAE | Packed,
    activations: np.ndarray | str | ConfigDict,
    workdir: str | None = None,
    *,
    member: str | None = None,
    n_probes: int = 512,
    seed: int = 0,
) -> Report:
    """Which features of an SAE are dead on these activations, by which pathway, and what the mean has to do with it.

    Args:
      sae: what `sae_jax.load` takes (a run, a folder of SAELens, dictionary_learning or sparsify, hf://…) or returns,
        or an SAE.
      activations: as for `sae_jax.diagnose`; of the same width, and as the SAE takes them.
      workdir: where tables.json, features.csv and the figures go; None writes nothing.
      member: which SAE of a run.
      n_probes, seed: of the forecast for an untrained SAE.

    Returns:
      The report: `dead_by_relu`, `dead_by_topk`, `dead_total` (fractions), `dead_features` (which), `fve`, `l0`, the
      bias against mu, `gamma_left` = ‖mu − b_dec‖ / ‖sigma‖ (what the encoder still sees of the mean), `if_centred`
      (the same SAE with its bias at mu), `at_init` (forecast for an untrained one). Behind a norm of each token, all of
      it is of the normed tokens.

    Raises:
      Refused: the SAE or the activations cannot be read, or their widths differ; nothing was written.
    """
    packed = sharing.packed_of(sae, member)
    folded, norm, name = formats.folded(packed), packed.before.norm, sae if isinstance(sae, str) else "sae"
    n_features, d_model = folded.W_enc.shape
    diagnosis.check(n_features, folded.k, n_probes, seed, workdir)
    tokens, scale = diagnosis.rescaled(_normed(open_tokens(activations), norm))
    if tokens.d_model != d_model:
        raise Refused("--sae", name, f"an SAE of the activations' width {tokens.d_model}, not {d_model}")
    severity, sample, counts = diagnosis.first_pass(tokens)
    ordinary = giants.without(tokens.batches, counts.giant_norm, covariance=True) if counts.any_giant else severity
    mu = severity.raw.mean / scale
    as_is = folded.replace(b_enc=folded.b_enc * scale, b_dec=folded.b_dec * scale)
    centred = as_is.replace(b_dec=np.asarray(severity.raw.mean, np.float32))
    seen, curve = _see((as_is, centred), tokens, counts.giant_norm)
    here, moved = (_look(one, severity, ordinary, found) for one, found in zip((as_is, centred), seen, strict=True))
    median = moments_lib.geometric_median(lambda: [sample], severity.raw.mean, tolerance=1e-5)
    choices = {key: choice for key, choice in remedies.preprocessings(severity, median).items() if key in CENTRINGS}
    forecast = remedies.forecast(tokens, choices, severity.raw.mean, n_probes, seed)
    cosines = fates.alignment(folded.W_enc.astype(np.float64), mu)
    left = mu - folded.b_dec
    share = left**2 / max(float(left @ left), np.finfo(np.float64).tiny)

    result = Report(diagnosis.summary(severity), n_features=n_features, k=folded.k, sae=name, norm=norm)
    result |= here.numbers | evaluation.bias_state(folded.b_dec, mu)
    result["gamma_left"] = float(np.linalg.norm(left)) / (float(np.linalg.norm(severity.raw.sigma)) / scale)
    result["bias_missing"] = [
        {"dimension": int(j), "mean": float(mu[j]), "bias": float(folded.b_dec[j]), "share_of_missing": float(share[j])}
        for j in np.argsort(-share)[:10]
    ]
    result["dead_features"] = {key: np.flatnonzero(here.fates == key).tolist() for key in FATES[1:]}
    result["alignment_with_mean"] = {
        key: {"n": int((here.fates == key).sum()), "cosine": _quartiles(cosines[here.fates == key])} for key in FATES
    }
    revived = (here.fates != "alive") & (moved.fates == "alive")
    result["if_centred"] = {**moved.numbers, "revived": int(revived.sum())}
    result["at_init"] = {key: found.deaths(n_features, folded.k) for key, found in forecast.items()}
    result["advice"] = _verdict(result)
    result |= {"dead_over_tokens": curve, "n_giant_tokens": severity.raw.n_tokens - ordinary.raw.n_tokens}
    result |= {"without_giants": ordinary.gammas()}
    result["warnings"] = diagnosis.warnings(severity)
    result["highest_rate_of_dead"] = evaluation.highest_rate_of_dead(severity.raw.n_tokens)
    result |= {"n_zero_tokens": counts.n_zero, "n_probes": n_probes, "seed": seed, "data": tokens.identity}
    result |= {"sae_metadata": packed.metadata, "versions": tables.versions()}
    result.figures = {
        "shifts": figures.shifts({"SAE": [("as it is", here.shift), ("bias moved to the mean", moved.shift)]}),
        "alignment": figures.alignment(cosines, here.shift),
        "landscape": diagnosis.landscape(sample, result),
    }
    if workdir:
        columns = {
            "fate": here.fates, "n_fired": here.n_fired, "cosine_with_mean": cosines,
            "mean_preactivation": here.shift.mean / scale, "std_preactivation": here.shift.std / scale,
        }  # fmt: skip
        rows = [{"feature": i, **{key: column[i] for key, column in columns.items()}} for i in range(n_features)]
        tables.write_csv(epath.Path(workdir) / "features.csv", rows)
        for key, figure in result.figures.items():
            figures.save(figure, epath.Path(workdir) / f"{key}.png")
        tables.write_json(workdir, result)
    return result


def _normed(tokens: Tokens, norm: str) -> Tokens:
    if norm == "none":
        return tokens
    return tokens._replace(
        batches=lambda: (np.asarray(per_token(jnp.asarray(x, jnp.float32), norm)) for x in tokens.batches())
    )


class Seen(NamedTuple):
    """What passed through one SAE."""

    sightings: Any
    n_fired: Any  # (n,) tokens each feature fired on
    error_square: Any  # Σ ‖x − x̂‖²
    ordinary_error: Any  # the same over tokens that are no giants


@jax.jit
def _pass(saes: SAE, x: Float[Array, "B d"], valid: Bool[Array, "B"], giant_norm: Float[Array, ""]) -> Seen:
    ordinary = valid & (jnp.linalg.norm(x, axis=1) <= giant_norm)

    def one(sae: SAE) -> Seen:
        seen, codes = death.sight(sae, x, valid)
        square = jnp.sum((x - sae_lib.decode(sae, codes)) ** 2, axis=1)
        error_square, ordinary_error = (jnp.sum(jnp.where(rows, square, 0.0)) for rows in (valid, ordinary))
        return Seen(seen, sae_lib.fired(codes, seen.fired.shape[0]), error_square, ordinary_error)

    found: Seen = sae_lib.each_member(one, saes)
    return found


def _see(saes: tuple[SAE, ...], tokens: Tokens, giant_norm: float) -> tuple[list[Seen], list[list[float]]]:
    """All tokens through all of the SAEs, which are of one size; and the deaths of the first over tokens seen."""
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *saes)
    total: Any = None
    count, curve = 0, evaluation.DeathCurve()
    for x, valid in remedies.padded(tokens, "autopsy"):
        part = jax.device_get(_pass(stacked, x, valid, jnp.float32(giant_norm)))
        part = Seen(part.sightings, *(np.asarray(sums, np.float64) for sums in part[1:]))
        total = part if total is None else Seen(
            total.sightings | part.sightings, *map(np.add, total[1:], part[1:])
        )  # fmt: skip
        count += int(valid.sum())
        curve.add(count, jax.tree.map(lambda a: a[0], total.sightings))
    curve.add(count, jax.tree.map(lambda a: a[0], total.sightings), last=True)
    return [jax.tree.map(lambda a, i=i: a[i], total) for i in range(len(saes))], curve.points


class Look(NamedTuple):
    """One SAE's features and numbers."""

    fates: np.ndarray  # (n,) of FATES
    n_fired: np.ndarray
    shift: evaluation.Shift
    numbers: dict[str, Any]


def _look(sae: SAE, severity: Severity, ordinary: Severity, seen: Seen) -> Look:
    moments, W = severity.raw, np.asarray(sae.W_enc, np.float64)
    mean = W @ (moments.mean - sae.b_dec) + sae.b_enc
    std = np.sqrt(np.maximum(np.einsum("nd,nd->n", W @ moments.covariance, W), 0))
    relu, fired = ~seen.sightings.positive, seen.sightings.fired
    fates = np.where(fired, FATES[0], np.where(relu, FATES[2], FATES[1]))
    numbers = {
        **death.pathways(seen.sightings),
        "fve": evaluation.explained(seen.error_square, float(moments.square.sum())),
        "fve_without_giants": evaluation.explained(seen.ordinary_error, float(ordinary.raw.square.sum())),
        "l0": float(seen.n_fired.sum()) / moments.n_tokens,
    }
    shift = evaluation.Shift(mean, std, relu, ~relu & ~fired, moments.n_tokens)
    return Look(fates, seen.n_fired.astype(np.int64), shift, numbers)


def _quartiles(values: np.ndarray) -> list[float] | None:
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist() if len(values) else None


def _verdict(result: dict[str, Any]) -> str:
    """The autopsy in a few sentences."""

    def percent(found: dict[str, Any], key: str = "dead_total") -> str:
        return tables.cell(key, found[key])

    n_dead = sum(len(found) for found in result["dead_features"].values())
    lines = [
        f"{percent(result)} of the features ({n_dead} of {result['n_features']}) never fire on these tokens: "
        f"{percent(result, 'dead_by_relu')} by ReLU, {percent(result, 'dead_by_topk')} by TopK."
    ]
    if result["bias_projection"] is not None:
        lines.append(
            f"The bias has {100 * result['bias_projection']:.0f} % of the mean (b·mu/‖mu‖²); what it lacks of it is "
            f"{result['gamma_left']:.2f} times as long as the variation, where a bias of zero would lack "
            f"{result['gamma_raw']:.2f}."
        )
    moved, start = result["if_centred"], result["at_init"]
    if n_dead:
        lines.append(
            f"With the bias moved to the mean and nothing else changed, {moved['revived']} of the {n_dead} dead "
            f"features fire, and {percent(moved)} are dead."
        )
    lines.append(
        f"An untrained SAE of this size is forecast to start with {percent(start['none'])} dead, with its bias at the "
        f"mean {percent(start['mean'])}, at the geometric median {percent(start['geometric_median'])}."
    )
    return " ".join(lines)
