"""`dissect`: an SAE that exists, ours or anybody's, and some activations: who is dead in it, and what they died of.

Two passes over the tokens: moments, then the SAE as it is beside the same SAE with its bias moved to the mean, and the
probes that say what an untrained SAE of that size would lose. A feature's mean pre-activation, W_enc (mu − b_in) +
b_enc, and its standard deviation, √(w·Σ·w), follow from the moments. b_in is b_dec where the encoder subtracts it, else
zero; moving the bias puts both at the mean (a transcoder's b_dec is of other activations, and stays).
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sae_jax.autoencoder import death
from sae_jax.autoencoder.sae import SAE
from sae_jax.diagnosis import columns, diagnosis, pictures, remedies, survey, targets, texts
from sae_jax.diagnosis.diagnosis import Report
from sae_jax.diagnosis.targets import Target
from sae_jax.errors import Refused
from sae_jax.exchange import encoders, sharing, sightings
from sae_jax.exchange.encoders import Encoder, Opened
from sae_jax.exchange.formats import Packed
from sae_jax.exchange.sightings import Seen
from sae_jax.models.sources import Tokens, open_tokens
from sae_jax.outliers import giants
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.moments import Moments, Severity
from sae_jax.reports import autopsy_figures, autopsy_page, figures, page, tables
from sae_jax.reports.feature_table import FATES
from sae_jax.runtime import memory
from sae_jax.training import evaluation, fates

CENTRINGS = ("none", "mean", "geometric_median")


def dissect(
    sae: str | SAE | Packed | Opened,
    activations: np.ndarray | str | ConfigDict,
    workdir: str | None = None,
    *,
    target: np.ndarray | str | None = None,
    member: str | None = None,
    n_probes: int = diagnosis.N_PROBES,
    seed: int = 0,
) -> Report:
    """Which features of an SAE are dead on these activations, by which pathway, and what the mean has to do with it.

    Args:
      sae: a run; the folder or file of an SAE of any kind that `exchange.registry` reads; hf://OWNER/NAME/PLACE;
        saelens:RELEASE/ID; an SAE, or what `sae_jax.load` or `sharing.opened` returns.
      activations: as for `sae_jax.diagnose`; of the same width, and as the SAE takes them.
      workdir: where report.json, report.html, features.csv and the figures go; None writes nothing.
      target: of a transcoder the activations that it is to reconstruct, as many tokens of its d_out; FVE is of these.
      member: which SAE of a run.
      n_probes, seed: of the forecast for an untrained SAE.

    Returns:
      The report: `dead_by_relu`, `dead_by_topk` (by selection: positive, never selected), `dead_total` (fractions),
      `fired_once` (what as many tokens again are expected to wake, at most), `dead_features` (which), `fve` (null for
      a transcoder without its target), `l0`, b_dec against mu, `gamma_left` = ‖mu − b_in‖ / ‖sigma‖ (what the encoder
      still sees of the mean), `if_centred` (the same SAE with its bias at mu), `at_init` (forecast for an untrained
      one). Behind a norm of each token, all of it is of the normed tokens.

    Raises:
      Refused: the SAE, the activations or the target cannot be read, or their widths or numbers of tokens differ;
        nothing was written.
    """
    opened = sharing.opened(sae, member)
    encoder, name = opened.encoder, sae if isinstance(sae, str) else "sae"
    n_features, d_model = encoder.W_enc.shape
    diagnosis.check(n_features, encoder.k or 1, n_probes, seed, workdir, own=diagnosis.AUTOPSY)
    if target is not None:
        targets.check(target, activations, encoder, name)
    fits = partial(_check_memory, encoder, name, n_probes=n_probes)
    plain = open_tokens(activations, fits)
    tokens, scale = survey.rescaled(_normed(plain, encoder.norm))
    if tokens.d_model != d_model:
        raise Refused("--sae", name, f"an SAE of the activations' width {tokens.d_model}, not {d_model}")
    severity, sample, counts = survey.first_pass(tokens, of_directions=False)
    ordinary = giants.without(tokens.batches, counts.giant_norm) if counts.any_giant else severity
    mu = severity.raw.mean / scale
    read = texts.opened(activations, tokens.identity, opened.metadata) if workdir else None
    goal = None if target is None else targets.opened(target, encoder, plain, severity.raw.n_tokens)
    here, moved, curve = _looks(encoder, scale, severity, ordinary, tokens, counts.giant_norm, read, goal)
    median = moments_lib.geometric_median(lambda: [sample], severity.raw.mean, tolerance=1e-5)
    choices = remedies.preprocessings(severity, median, only=CENTRINGS)
    forecast = remedies.forecast(tokens, choices, severity.raw.mean, n_probes, seed)
    cosines = encoders.in_rows(encoder.W_enc, lambda W: fates.alignment(W, mu))
    b_in = np.asarray(encoder.b_in, np.float64)
    left = mu - b_in
    share = left**2 / max(float(left @ left), np.finfo(np.float64).tiny)

    result = Report(survey.summary(severity), n_features=n_features, k=encoder.k, sae=name, norm=encoder.norm)
    result |= {"architecture": encoder.name, "library": opened.library, "subtracts_b_dec": encoder.subtracts}
    result["pathway"] = encoder.pathway
    # What the decoder puts back of the mean: of a transcoder it is of other activations.
    result |= here.numbers | evaluation.bias_state(b_in if encoder.transcodes else encoder.b_dec, mu)
    result["gamma_left"] = float(np.linalg.norm(left)) / (float(np.linalg.norm(severity.raw.sigma)) / scale)
    result["bias_missing"] = [
        {"dimension": int(j), "mean": float(mu[j]), "bias": float(b_in[j]), "share_of_missing": float(share[j])}
        for j in np.argsort(-share)[:10]
    ]
    result["dead_features"] = {key: np.flatnonzero(here.fates == key).tolist() for key in FATES[1:]}
    result["alignment_with_mean"] = {
        key: {"n": int((here.fates == key).sum()), "cosine": _quartiles(cosines[here.fates == key])} for key in FATES
    }
    revived = (here.fates != "alive") & (moved.fates == "alive")
    result["if_centred"] = {**moved.numbers, "revived": int(revived.sum())}
    # Of another kind than TopK: a TopK SAE of this size that fires as many features a token.
    k = encoder.k or int(np.clip(round(here.numbers["l0"]), 1, n_features))
    result["at_init"] = {key: found.deaths(n_features, k) for key, found in forecast.items()}
    result["advice"] = _verdict(result, opened)
    result |= {"dead_over_tokens": curve, "n_giant_tokens": severity.raw.n_tokens - ordinary.raw.n_tokens}
    result |= {"without_giants": ordinary.gammas()}
    result["warnings"] = survey.warnings(severity, counts.bits)
    result["highest_rate_of_dead"] = evaluation.highest_rate_of_dead(severity.raw.n_tokens)
    result["target"] = goal.summary() if goal else None
    result |= {"n_zero_tokens": counts.n_zero, "n_probes": n_probes, "seed": seed, "data": tokens.identity}
    result |= {"sae_metadata": opened.metadata, "versions": tables.versions()}
    result.features = {"fate": here.fates, "n_fired": here.n_fired, "distance_to_threshold": here.margin / scale}
    draw = {
        "density": partial(autopsy_figures.density, here.n_fired, here.shift),
        "dead_over_tokens": partial(
            autopsy_figures.dead_over_tokens, curve, here.numbers["fired_once"], encoder.pathway
        ),
        "shifts": partial(
            figures.shifts, {"SAE": [("as it is", here.shift), ("bias moved to the mean", moved.shift)]}
        ),
        "alignment": partial(autopsy_figures.alignment, cosines, here.shift),
        "landscape": partial(pictures.landscape, sample, severity),
    }  # fmt: skip
    result.figures = {name: one() for name, one in draw.items()}
    if workdir:
        found = columns.of(opened, here, revived, cosines, scale)
        rows = [{"feature": i, **{key: column[i] for key, column in found.items()}} for i in range(n_features)]
        tables.write_csv(epath.Path(workdir) / "features.csv", rows)
        drawn = {name: page.Picture(figures.png(result.figures[name]), figures.png(one(narrow=True)))
                    for name, one in draw.items()}  # fmt: skip
        autopsy_page.write(workdir, result, drawn, found, read.found(revived) if read else None)
        tables.write_json(workdir, result)
    return result


ROW = 3000  # bytes that a feature takes: its line of the table, and what is seen of it


def _check_memory(encoder: Encoder, name: str, d_model: int, n_probes: int) -> None:
    """Refuses an SAE for whose examination there is no room: in other units, on the device, and its covariances."""
    rest = 2.0 * (encoder.W_enc.nbytes + encoder.W_dec.nbytes) + ROW * len(encoder.W_enc)
    memory.check(
        f"the weights of {name} in other units, covariances, probes and a table of its features",
        memory.Choice("n_probes", n_probes, lambda probes: rest + remedies.bytes_needed(d_model, probes)),
    )


def _normed(tokens: Tokens, norm: str) -> Tokens:
    if norm == "none":
        return tokens
    normed = jax.jit(encoders.NORMS[norm])
    return tokens._replace(batches=lambda: (np.asarray(normed(jnp.asarray(x, jnp.float32))) for x in tokens.batches()))


class Look(NamedTuple):
    """One SAE's features and numbers."""

    fates: np.ndarray  # (n,) of FATES
    n_fired: np.ndarray
    largest: np.ndarray
    margin: np.ndarray
    shift: evaluation.Shift
    numbers: dict[str, Any]


def _looks(
    encoder: Encoder, scale: float, severity: Severity, ordinary: Severity, tokens: Tokens, giant_norm: float,
    read: texts.Texts | None, target: Target | None,
) -> tuple[Look, Look, list[list[float]]]:  # fmt: skip
    """All tokens, in units of 1/scale, through the encoder as it is, and with its bias at the mean; its deaths over
    tokens seen."""
    mean = severity.raw.mean
    goals = target.goals(encoder.W_skip) if target else itertools.repeat(None)
    encoder = target.encoder(encoder, scale) if target else encoder.in_units(scale)
    explained = None if encoder.transcodes else (severity.raw, ordinary.raw)
    if target:
        explained = target.moments, target.ordinary
    places = tuple(sightings.place(encoder, mean, moved) for moved in (False, True))
    on_device = jax.tree.map(jnp.asarray, encoder)
    point = jnp.asarray(mean, jnp.float32)
    total: list[Seen] = []
    count, curve = 0, evaluation.DeathCurve()
    for (x, valid), goal in zip(remedies.padded(tokens, "autopsy"), goals, strict=False):
        best = read is not None and read.wants(count)
        found = sightings.see(on_device, places, point, x, valid, jnp.float32(giant_norm), goal, best=best)
        part, tops = jax.device_get(found)
        if read is not None and best:
            read.add(count, tops)
        part = [one._replace(n_fired=np.asarray(one.n_fired, np.int64), error_square=np.float64(one.error_square),
                             ordinary_error=np.float64(one.ordinary_error)) for one in part]  # fmt: skip
        total = [a | b for a, b in zip(total, part, strict=True)] if total else part
        count += int(valid.sum())
        curve.add(count, _sightings(total[0]))
    curve.add(count, _sightings(total[0]), last=True)
    turned = encoders.in_rows(encoder.W_enc, lambda W: np.einsum("nd,nd->n", W @ severity.raw.covariance, W))
    std = np.sqrt(np.maximum(turned, 0))
    ranked = 1.0 if encoder.ranked_by is None else np.asarray(encoder.ranked_by, np.float64)
    here, moved = (
        _look(seen, evaluation.Shift(
            (np.float64(at.offset) + encoder.b_enc) * ranked, std * ranked, ~seen.positive,
            seen.positive & (seen.n_fired == 0), severity.raw.n_tokens, encoder.pathway), explained)
        for seen, at in zip(total, places, strict=True)
    )  # fmt: skip
    return here, moved, curve.points


def _sightings(seen: Seen) -> death.Sightings:
    return death.Sightings(seen.positive, seen.n_fired)


def _look(seen: Seen, shift: evaluation.Shift, explained: tuple[Moments, Moments] | None) -> Look:
    """`explained` are the moments of what is reconstructed: of all tokens, and of those that are no giants."""
    found = np.where(shift.dead_by_relu, FATES[2], np.where(shift.dead_by_topk, FATES[1], FATES[0]))
    errors = zip(("fve", "fve_without_giants"), (seen.error_square, seen.ordinary_error), strict=True)
    sighted = _sightings(seen)
    numbers = {
        **death.pathways(sighted), "fired_once": death.fired_once(sighted),
        **{key: evaluation.explained(error, float(explained[i].square.sum())) if explained else None
           for i, (key, error) in enumerate(errors)},
        "l0": float(seen.n_fired.sum()) / shift.n_tokens,
    }  # fmt: skip
    return Look(found, seen.n_fired, seen.largest, seen.margin, shift, numbers)


def _quartiles(values: np.ndarray) -> list[float] | None:
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist() if len(values) else None


def _verdict(result: dict[str, Any], opened: Opened) -> str:
    """The autopsy in a few sentences."""

    def percent(found: dict[str, Any], key: str = "dead_total") -> str:
        return tables.cell(key, found[key])

    n_dead = sum(len(found) for found in result["dead_features"].values())
    lines = [
        f"{percent(result)} of the features ({n_dead} of {result['n_features']}) never fire on these "
        f"{result['n_tokens']:,} tokens: {percent(result, 'dead_by_relu')} by ReLU, "
        f"{percent(result, 'dead_by_topk')} by {opened.encoder.pathway}."
    ]
    if not result["subtracts_b_dec"]:
        lines.append(
            f"Its encoder subtracts no bias, so it sees the whole mean, {result['gamma_left']:.2f} times as long as "
            "the variation; b_enc may make up for that."
        )
    elif result["bias_projection"] is not None:
        lines.append(
            f"The bias has {100 * result['bias_projection']:.0f} % of the mean (b·mu/‖mu‖²); what it lacks of it is "
            f"{result['gamma_left']:.2f} times as long as the variation, where a bias of zero would lack "
            f"{result['gamma_raw']:.2f}."
        )
    moved, start = result["if_centred"], result["at_init"]
    if n_dead:
        lines.append(
            f"With the bias moved to the mean and nothing else changed, {moved['revived']} of the {n_dead} dead "
            f"features fire, {percent(moved)} are dead, and {_fve(result['fve'], moved['fve'])}."
        )
    alike = "" if opened.encoder.k else f" TopK SAE of this size that fires {result['l0']:.1f} features a token"
    lines.append(
        f"An untrained{alike or ' SAE of this size'} is forecast to start with {percent(start['none'])} dead, with its "
        f"bias at the mean {percent(start['mean'])}, at the geometric median {percent(start['geometric_median'])}."
    )
    return " ".join([*lines, *opened.notes])


def _fve(before: float | None, after: float | None) -> str:
    """A feature that fires again is worth what it explains."""
    if before is None or after is None:
        return "FVE is not known: the target's activations are not given (--target)"
    if after < before:
        return f"FVE falls from {before:.3f} to {after:.3f}: they fire, and explain less"
    return f"FVE rises from {before:.3f} to {after:.3f}"
