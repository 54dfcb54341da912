"""The members of a run: what they start from, and what is found out about each of them along the way.

Members that differ in seed, learning rate, AuxK weight, bias or gamma are one vmapped program; those that differ in
what fixes the program (n, k, preset, schedule) are groups of their own. All see the same batches.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.autoencoder import death
from sae_jax.autoencoder.death import Sightings
from sae_jax.errors import RunFailed
from sae_jax.models.sources import Source
from sae_jax.outliers import giants, preprocess, rounding
from sae_jax.outliers import moments as moments_lib
from sae_jax.outliers.preprocess import Preprocessing
from sae_jax.runtime import processes
from sae_jax.training import evaluation, fates, recovery
from sae_jax.training import step as step_lib


class Ensemble:
    """The members of one configuration on one source.

    Args:
      statistics: those of a checkpoint, or None where the run is new.
    """

    def __init__(self, config: ConfigDict, source: Source, statistics: dict[str, np.ndarray] | None):
        self.source = source
        self.norm = config.data.norm
        self.members = config_lib.members(config)
        self.groups = step_lib.group_members(self.members, source.d_model)
        self.seen: dict[str, Sightings] = {}  # by the held-out tokens of the latest record
        found = statistics or self._statistics()
        self.statistics = processes.of_the_first(found, "data.path", "activations")
        if "giant_norm" not in self.statistics:  # a run that is older than these numbers
            self.statistics |= self._ordinary()[0]
        self.scale = float(self.statistics["scale"])
        self.shared_mu = self.statistics["mu"] * self.scale
        # Of the scaled tokens: the norm above which one is a giant, and the mean of those that are none.
        self.giant_norm = float(self.statistics["giant_norm"]) * self.scale
        self.ordinary_mu = self.statistics["ordinary_mu"] * self.scale

    def _statistics(self) -> dict[str, np.ndarray]:
        """Of the tokens after `data.norm`: mu, the median and the whitening where members need them, and the scale that
        makes ‖sigma‖ = √d. The three gammas are of the activations as they come."""
        d = self.source.d_model
        whiten = any(member.sae.whiten for member in self.members.values())

        bits = rounding.Bits()
        severity = moments_lib.severity(bits.watching(self._batches()), covariance=whiten)
        for warning in rounding.warnings(severity.raw, bits.kept):
            print(f"sae_jax: beware: {warning}", file=sys.stderr)
        seen = {"none": severity.raw, "layer_norm": severity.layer_normed, "unit": severity.directions}[self.norm]
        spread = float(np.linalg.norm(seen.sigma))
        if not spread > 0:
            raise RunFailed("step 0: the activations do not vary at all")
        median = np.full(d, np.nan)
        if any(member.sae.center == "geometric_median" for member in self.members.values()):
            median = moments_lib.geometric_median(self._normed, seen.mean)
        found = {
            "mu": seen.mean,
            "geometric_median": median,
            "scale": np.asarray(np.sqrt(d) / spread),
            "gammas": np.asarray(list(severity.gammas().values())),
        }
        numbers, ordinary = self._ordinary(covariance=whiten)
        found |= numbers
        if whiten:
            whitening = preprocess.whitening(seen, ordinary=ordinary)
            found |= {"whitening": np.asarray(whitening.matrix), "unwhitening": np.asarray(whitening.inverse)}
            if len(whitening.matrix) < d:
                kept = f"sae.whiten keeps {len(whitening.matrix)} of {d} dimensions"
                print(f"sae_jax: {kept}; the SAE cannot reconstruct the others", file=sys.stderr)
        return found

    def _batches(self) -> Iterator[np.ndarray]:
        """Training tokens for the statistics, as they come."""
        for number, x in enumerate(self.source.statistics()):
            if not np.isfinite(x).all():
                raise RunFailed(f"step 0, statistics batch {number}: {culprit(x)}")
            yield x

    def _normed(self) -> Iterator[np.ndarray]:
        """The same after `data.norm`."""
        norm = {"none": lambda x: x, "layer_norm": moments_lib.layer_norm, "unit": moments_lib.direction}[self.norm]
        return map(norm, self._batches())

    def _ordinary(self, covariance: bool = False) -> tuple[dict[str, np.ndarray], moments_lib.Moments]:
        """What tells tokens of giant norm from the others, and the moments of the others."""
        norms = giants.Sample(giants.MOST)
        for x in self._normed():
            norms.add(giants.norms(x))
        most = giants.giant_norm(norms.rows)
        ordinary = giants.without(self._normed, most, covariance).raw
        return {"giant_norm": np.asarray(most), "ordinary_mu": ordinary.mean}, ordinary

    @property
    def pathway(self) -> str:
        """By what features die that are positive somewhere, in a word that is true of every member."""
        found = {death.pathway(member.sae.activation) for member in self.members.values()}
        return found.pop() if len(found) == 1 else death.pathway("any")

    @property
    def k(self) -> int | None:
        """That of every member, where they have one and the same."""
        found = {member.sae.k for member in self.members.values()} - {0}
        return found.pop() if len(found) == 1 else None

    def initial_states(self) -> tuple[step_lib.TrainState, ...]:
        """The untrained members, group by group; a pure function of the configuration and the statistics."""
        return tuple(self._initial(group) for group in self.groups)

    def _initial(self, group: step_lib.Group) -> step_lib.TrainState:
        configs = [self.members[name] for name in group.names]
        if group.static.whiten:
            before = jax.tree.map(lambda a: np.stack([a] * len(configs)), self._whitening())
            centers = np.zeros(before.matrix.shape[:2])
        else:
            moved = np.stack([self.mean_shift(name) for name in group.names])
            before = Preprocessing(shift=-moved, scale=np.ones(len(configs))) if moved.any() else None
            centers = np.stack([self._center(name) for name in group.names])
        before = jax.tree.map(lambda a: jnp.asarray(a, float), before)
        return step_lib.init_group(configs, jnp.asarray(centers, float), before)

    def _whitening(self) -> Preprocessing:
        """PCA whitening of the scaled tokens."""
        return Preprocessing(
            shift=self.shared_mu, scale=np.asarray(1 / self.scale),
            matrix=self.statistics["whitening"], inverse=self.statistics["unwhitening"],
        )  # fmt: skip

    def _center(self, name: str) -> np.ndarray:
        """Where b_dec starts, (d,)."""
        kind = self.members[name].sae.center
        if kind == "none":
            return np.zeros(self.source.d_model)
        point = self.statistics["mu" if kind == "mean" else kind]
        return point * self.scale + self.mean_shift(name)

    def mean_shift(self, name: str) -> np.ndarray:
        """What this member's tokens are moved by: nonzero where it has a data.gamma of its own."""
        return self.source.mean_shift(self.members[name]) * self.scale

    def mu(self, name: str) -> np.ndarray:
        """The mean of this member's scaled tokens, (d,)."""
        mu: np.ndarray = self.shared_mu + self.mean_shift(name)
        return mu

    def gamma_raw(self, name: str) -> float:
        """gamma of this member's tokens, whose scaled spread is √d."""
        return float(np.linalg.norm(self.mu(name)) / np.sqrt(self.source.d_model))

    def record(self, states: tuple[step_lib.TrainState, ...], run: Callable[..., Any]) -> dict[str, Any]:
        """`members`: held-out metrics and the bias of each; `fates`: a letter for each of its features.

        Args:
          states: group by group.
          run: the compiled `evaluation.evaluate_batch`.
        """
        groups = tuple(step_lib.in_shared_frame(state) for state in states)
        moved = [np.stack([self.mean_shift(name) for name in group.names]) for group in self.groups]
        results = evaluation.evaluate(
            run, groups, self.source.held_out(), self.source.n_eval_tokens, self.shared_mu, moved
        )
        found: dict[str, Any] = {}
        letters: dict[str, str] = {}
        for group, state, sae, values in zip(self.groups, states, groups, results, strict=True):
            # In the frame of each member's own tokens; going there and back would cost float32 digits at high gamma.
            biases = processes.fetched(sae.b_dec if group.static.whiten else state.sae.b_dec)
            for i, name in enumerate(group.names):
                if not np.isfinite(biases[i]).all() or not np.isfinite(values[i]["fve_about_zero"] or 0):
                    raise RunFailed(f"{name} no longer reconstructs anything finite")
                seen = values[i].pop("seen")
                letters[name] = fates.letters(seen)
                self.seen[name] = seen
                found[name] = {**values[i], **evaluation.bias_state(biases[i], self.mu(name))}
                if self.source.truth is not None:
                    rows, truth = sae.W_dec[i], np.asarray(self.source.truth)
                    found[name]["mmcs"] = float(_mmcs(truth, rows, None))
                    found[name]["mmcs_alive"] = float(_mmcs(truth, rows, seen.fired))
        return {"members": {name: found[name] for name in self.members}, "fates": letters}

    def fates(
        self, history: list[dict[str, Any]], first_states: tuple[step_lib.TrainState, ...],
        states: tuple[step_lib.TrainState, ...],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """One line for every feature of every member; `record` has been called with these last states."""
        rows: list[dict[str, Any]] = []
        for group, first, last in zip(self.groups, first_states, states, strict=True):
            W_enc = [step_lib.in_shared_frame(state).W_enc for state in (first, last)]
            silent = processes.fetched(last.tokens_since_fired)
            for i, name in enumerate(group.names):
                start, end = (processes.fetched(fates.alignment(w[i], self.mu(name))) for w in W_enc)
                found = fates.ledger(history, name)
                seen = self.seen[name]
                largest = seen.largest / self.scale
                rows += fates.rows(
                    name, found, start, end, silent[i], seen.n_fired, largest, self.source.n_eval_tokens
                )
        return rows


_mmcs = jax.jit(recovery.mmcs)  # one program: what the dictionary is compared with need not lie where it lies


def culprit(x: Float[np.ndarray, "B d"]) -> str:
    """Where the first value stands that is not finite."""
    row, dimension = np.argwhere(~np.isfinite(x))[0]
    return f"activations that are not finite (row {row}, dimension {dimension} is {x[row, dimension]})"
