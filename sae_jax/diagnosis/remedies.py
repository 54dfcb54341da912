"""What may be done about feature death before training: the remedies, what each would leave, and which to take.

A forecast sends a few hundred random directions (probes) past all tokens under every remedy at once; a measurement
sends a real untrained SAE behind each.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax.autoencoder import death, dense, topk
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import SAE
from sae_jax.models.sources import BATCH, Tokens
from sae_jax.outliers import giants, theory
from sae_jax.outliers.moments import Severity
from sae_jax.outliers.preprocess import Preprocessing, whitening
from sae_jax.outliers.probes import Forecast, stratified_rows
from sae_jax.outliers.selections import COUNTED, Selection
from sae_jax.runtime import memory, progress
from sae_jax.training.evaluation import DeathCurve

PIECE = 2**27  # cosines of tokens with probes at a time
LENGTHS = 2**18  # tokens whose norms BatchTopK's bar is taken of
MATRICES = 16  # d × d, float64: scatters of three views, of a batch, their sum, without giants, whitening
HARMLESS = 0.01  # a remedy that leaves fewer features dead at initialisation is good enough
WIDE = 0.015  # half of a 95 % band that is to be narrower
CLOSER = 2.0**40  # multiplications of a closer look for the sake of the band alone: some 20 seconds on 2 CPU cores
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


def preprocessings(
    severity: Severity, median: Float[np.ndarray, "d"], ordinary: Severity | None = None,
    only: Collection[str] = tuple(REMEDIES),
) -> dict[str, Preprocessing]:  # fmt: skip
    """Every remedy, or some, in the order of cost; `ordinary` are the moments without tokens of giant norm."""

    def shifted(shift: np.ndarray, norm: str = "none") -> Preprocessing:
        return Preprocessing(shift=np.float32(shift), norm=norm)  # jax.numpy would compile a cast

    made: dict[str, Callable[[], Preprocessing]] = {
        "none": lambda: shifted(np.zeros_like(median)),
        "mean": lambda: shifted(severity.raw.mean),
        "geometric_median": lambda: shifted(median),
        "layer_norm_centred": lambda: shifted(severity.layer_normed.mean, "layer_norm"),
        "unit_norm_centred": lambda: shifted(severity.directions.mean, "unit"),
        "whitening": lambda: whitening(severity.raw, ordinary=ordinary.raw if ordinary else None),
    }
    return {name: make() for name, make in made.items() if name in only}


@partial(jax.jit, static_argnames="of_directions")
def _improve(
    best: dict[str, Array], choices: dict[str, Preprocessing], probes: dict[str, Array],
    x: Float[Array, "B d"], valid: Bool[Array, "B"], of_directions: bool,
) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """The best of each probe, now with these tokens, and the tokens' norms behind each remedy."""

    def one(best: Array, before: Preprocessing, w: Array) -> tuple[Array, Array]:
        y = before(x)
        length = jnp.linalg.norm(y, axis=1, keepdims=True)
        seen = jnp.matmul(y, w.T, precision="highest")
        if of_directions:
            seen = seen / jnp.where(length > 0, length, 1)
        return jnp.maximum(best, jnp.max(jnp.where(valid[:, None], seen, -jnp.inf), axis=0)), length[:, 0]

    found = {name: one(best[name], before, probes[name]) for name, before in choices.items()}
    return {name: best for name, (best, _) in found.items()}, {name: norms for name, (_, norms) in found.items()}


def forecast(
    tokens: Tokens, choices: dict[str, Preprocessing], mean: Float[np.ndarray, "d"], n_probes: int, seed: int,
    selections: dict[str, Selection] | None = None,
) -> dict[str, Forecast]:  # fmt: skip
    """One pass over the tokens with n_probes probes for every remedy; `mean` is that of the tokens.

    Args:
      selections: what is selected behind each remedy, as `selections.behind` has it; not given: TopK.
    """
    selections = selections or dict.fromkeys(choices, Selection())
    of_directions = next(iter(selections.values())).rule == "topk"
    lengths = {name: giants.Sample(LENGTHS) for name in choices if selections[name].rule == "batch_topk"}
    rows = {}
    for name, before in choices.items():
        # Fates hang on what a remedy leaves of the mean; behind a per-token norm nothing is left of it. Every remedy
        # gets the same random numbers, so that they differ by what they do and not by luck.
        left = np.zeros(before.width)
        if before.norm == "none":
            left = before.affine(mean)
        rng = np.random.default_rng([seed, theory.STREAM])
        rows[name] = stratified_rows(n_probes, left, rng)
    probes = jax.device_put({name: np.float32(w) for name, w in rows.items()})
    best = jax.device_put({name: np.full(n_probes, -np.inf, np.float32) for name in choices})
    at_a_time = _rows(n_probes)
    for x, valid in padded(tokens, "forecast"):
        for start in range(0, BATCH, at_a_time):
            rows_now = slice(start, start + at_a_time)
            best, norms = _improve(best, choices, probes, x[rows_now], valid[rows_now], of_directions)
            for name, sample in lengths.items():
                sample.add(np.asarray(norms[name])[valid[rows_now]])
    return {
        name: Forecast(
            w, np.asarray(best[name], np.float64) * (np.sqrt(w.shape[1]) if of_directions else 1), selections[name],
            lengths[name].rows if name in lengths else None,
        ) for name, w in rows.items()
    }  # fmt: skip


def forecast_closely(
    tokens: Tokens, choices: dict[str, Preprocessing], mean: Float[np.ndarray, "d"], n_features: int, k: int,
    n_probes: int, seed: int, selections: dict[str, Selection] | None = None, n_tokens: int = 0,
) -> dict[str, Forecast]:  # fmt: skip
    """`forecast`, then again and again with four times as many probes for the remedies that `undecided` names.

    It ends where there are as many probes as features, as more would tell nothing more about one SAE; or as many as
    have a place in memory. Told that there are n_tokens, it also looks again at what is not known to `WIDE`, if a look
    at all of that costs no more than `CLOSER`: of some alone, remedies would differ by the luck of their probes.
    """
    found, d_model = forecast(tokens, choices, mean, n_probes, seed, selections), len(mean)
    while (
        n_probes < n_features and memory.fits(_probe_bytes(4 * n_probes, d_model))
        and (doubtful := undecided(found, n_features, k) + wide(found, n_features, k, 4.0 * n_probes * n_tokens))
    ):  # fmt: skip
        n_probes, seed = 4 * n_probes, seed + 2
        found |= forecast(tokens, {name: choices[name] for name in doubtful}, mean, n_probes, seed, selections)
    return found


def wide(found: dict[str, Forecast], n_features: int, k: int, cosines: float) -> list[str]:
    """Remedies whose dead, in total or by ReLU, are not known to `WIDE`; none where a look at all costs over `CLOSER`.

    Args:
      cosines: of tokens with probes that a closer look at one remedy takes; 0 where there is to be none.
    """
    names = []
    for name, one in found.items():
        by_relu = 0.5 if one.selection.rule in COUNTED else 0.0  # k/n, or threshold, whose bar is 0
        band = one.curve(np.array([one.at(n_features, k), by_relu]))
        if np.max(band.high - band.low) > 2 * WIDE:
            names.append(name)
    cost = cosines * sum(found[name].rows.shape[1] for name in names)
    return names if 0 < cost <= CLOSER else []


def undecided(found: dict[str, Forecast], n_features: int, k: int) -> list[str]:
    """Remedies that the recommendation hangs on and that may leave more or less than 1 % dead, as far as is known."""
    doubtful = []
    for name, one in found.items():
        band = one.curve(np.array([one.at(n_features, k)]))
        if band.high[0] < HARMLESS:
            break  # good enough for certain: what costs more does not matter
        if band.low[0] < HARMLESS:
            doubtful.append(name)
    return doubtful


def _rows(n_probes: int) -> int:
    """Tokens looked at together: a power of two, fewer where there are many probes."""
    return max(1, min(BATCH, 2 ** ((PIECE // n_probes).bit_length() - 1)))


def _probe_bytes(n_probes: int, d_model: int) -> float:
    """Probes of every remedy, in float64 and float32, and what they have of the tokens that are looked at."""
    return len(REMEDIES) * (12.0 * n_probes * d_model + 8.0 * n_probes * _rows(n_probes))


def bytes_needed(d_model: int, n_probes: int, n_features: int = 0, rule: str = "topk") -> float:
    """Of a diagnosis: covariances, probes and, where deaths are measured, an untrained SAE of n_features behind every
    remedy with its pre-activations."""
    rows = topk.rows_at_a_time(BATCH, n_features, d_model) if rule == "topk" else 2.0 * BATCH
    # W_enc and W_dec are one array as long as nothing is trained; two more of its size while one is made.
    each = 4.0 * (d_model * (len(REMEDIES) + 2) + 2 * rows + 2 * len(REMEDIES))
    return MATRICES * 8.0 * d_model**2 + _probe_bytes(n_probes, d_model) + n_features * each


def check_memory(d_model: int, *, n_features: int, n_probes: int, measure: bool, rule: str = "topk") -> None:
    """Refuses what cannot be diagnosed in the memory there is."""
    probes = memory.Choice("n_probes", n_probes, lambda p: bytes_needed(d_model, p, n_features if measure else 0, rule))
    what = f"covariances of width {d_model} (rows are tokens, columns dimensions) and probes"
    if not measure:
        memory.check(what, probes)
        return
    saes = memory.Choice("n_features", n_features, lambda n: bytes_needed(d_model, n_probes, n, rule))
    memory.check(f"an untrained SAE behind every remedy, its pre-activations, {what}", saes, probes)


@partial(jax.jit, static_argnames="rule")
def _sight(
    sae: SAE, before: Preprocessing, x: Float[Array, "B d"], valid: Bool[Array, "B"], rule: str, threshold: float
) -> death.Sightings:
    return death.sight(dense.of(sae, rule, jnp.float32(threshold)), before(x), valid)[0]


def measured_deaths(
    tokens: Tokens, choices: dict[str, Preprocessing], n_features: int, k: int, seed: int
) -> dict[str, theory.Deaths]:
    """Deaths counted in an untrained SAE behind every remedy, on all tokens."""
    return measured(tokens, choices, n_features, k, seed)[0]


def measured(
    tokens: Tokens, choices: dict[str, Preprocessing], n_features: int, k: int, seed: int,
    selections: dict[str, Selection] | None = None,
) -> tuple[dict[str, theory.Deaths], dict[str, list[list[float]]]]:  # fmt: skip
    """`measured_deaths`, and the curve of each over the tokens seen; `selections` as of `forecast`."""
    selections = selections or dict.fromkeys(choices, Selection())
    saes = {
        name: sae_lib.init(jax.random.key(seed), n_features, k, jnp.zeros(before.width, jnp.float32))
        for name, before in choices.items()
    }
    seen: dict[str, death.Sightings] = {}
    curves = {name: DeathCurve() for name in choices}
    count = 0
    for x, valid in padded(tokens, "measure"):
        count += int(valid.sum())
        for name, before in choices.items():
            how = selections[name]
            part = death.fetched(_sight(saes[name], before, x, valid, how.rule, how.threshold or 0.0))
            seen[name] = seen[name] | part if name in seen else part
            curves[name].add(count, seen[name])
    for name, curve in curves.items():
        curve.add(count, seen[name], last=True)
    deaths = {name: death.pathways(found) for name, found in seen.items()}
    return deaths, {name: curve.points for name, curve in curves.items()}


def padded(tokens: Tokens, what: str = "") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape, with the mask of the rows that are tokens; progress is shown of `what`, if it is named."""
    for x in progress.counted(tokens.batches(), what) if what else tokens.batches():
        for start in range(0, len(x), BATCH):
            part = np.asarray(x[start : start + BATCH], np.float32)
            yield np.pad(part, ((0, BATCH - len(part)), (0, 0))), np.arange(BATCH) < len(part)


# -- which to take ---------------------------------------------------------------------------------------------------


ALIKE = 0.02  # forecasts that differ by less are not told apart


def recommended(probe: dict[str, theory.Deaths]) -> str:
    """The cheapest remedy forecast to leave under 1 % dead; failing that, the cheapest of those that leave as few dead
    by ReLU, then in total, as any."""
    for name, deaths in probe.items():
        if deaths["dead_total"] < HARMLESS:
            return name
    rest = dict(probe)
    for key in ("dead_by_relu", "dead_total"):
        least = min(deaths[key] for deaths in rest.values())
        rest = {name: deaths for name, deaths in rest.items() if deaths[key] <= least + ALIKE}
    return next(iter(rest))


def advice(
    probe: dict[str, theory.Deaths], chosen: str, doubtful: Collection[str] = (), rule: str = "topk"
) -> str:
    """The report in a few sentences.

    Args:
      doubtful: the remedies that `undecided` names.
      rule: what selects; pilots are for TopK alone.
    """
    none, then = probe["none"], probe[chosen]
    lines = [
        f"Untreated, {_percent(none['dead_total'])} of the features are forecast to be dead at initialisation, "
        f"{_percent(none['dead_by_relu'])} by ReLU."
    ]
    if none["dead_total"] >= HARMLESS:
        grows = "; death by TopK can shrink or grow in training, which --pilot forecasts roughly"
        rest = grows if rule == "topk" else ""
        lines.append(f"Death by ReLU stays until the bias has learned the mean{rest}: this is a risk, not a verdict.")
    what = REMEDIES[chosen][0].upper() + REMEDIES[chosen][1:]
    if none["dead_total"] < HARMLESS:
        lines.append("No remedy is needed.")
    elif chosen == "none":
        lines.append("No remedy is forecast to leave clearly fewer: the mean is not what they die of.")
    elif then["dead_total"] < HARMLESS:
        lines.append(f"{what} is forecast to leave {_percent(then['dead_total'])} dead.")
    else:
        lines.append(f"{what} is the best found, and still leaves {_percent(then['dead_total'])} dead.")
    if doubtful:
        found = ", ".join(f"{name.replace('_', ' ')} {_percent(probe[name]['dead_total'])}" for name in doubtful)
        lines.append(f"On which side of 1 % it is, the forecast cannot tell: {found}.")
    worse = [name for name in probe if probe[name]["dead_total"] > none["dead_total"] + ALIKE]
    if worse:
        found = ", ".join(f"{name.replace('_', ' ')} {_percent(probe[name]['dead_total'])}" for name in worse)
        lines.append(f"Beware, these make it worse: {found}.")
    if "mean" in worse:
        lines.append("A mean that a few tokens of very large norm make does that; the geometric median ignores them.")
    return " ".join(lines)


def dropped(kept: int, d_model: int) -> str:
    """What whitening leaves out, in a sentence."""
    return (
        f"Whitening keeps {kept} of {d_model} dimensions: along the others the tokens vary by less than a millionth of "
        "the largest variance, and an SAE behind it cannot reconstruct them."
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
