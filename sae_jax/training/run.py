"""`train`: from a configuration to a workdir with checkpoints, figures and report.json. Resumes where it was."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.autoencoder import sae as sae_lib
from sae_jax.autoencoder.sae import AllSum
from sae_jax.errors import Refused, RunFailed
from sae_jax.models.sources import Source, open_source
from sae_jax.outliers.preprocess import per_token
from sae_jax.reports import boards, tables
from sae_jax.runtime import checkpoint, processes
from sae_jax.runtime import devices as devices_lib
from sae_jax.runtime import workdir as workdir_lib
from sae_jax.runtime.stopping import StopRequest
from sae_jax.training import drawing, evaluation, footprint, watching
from sae_jax.training import step as step_lib
from sae_jax.training.ensemble import Ensemble, culprit


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains the members that the configuration describes, or goes on with a run that was stopped.

    Returns:
      The report, as written to report.json: `step`, `gamma` (after LayerNorm), `gamma_raw`, `gamma_direction`, and
      `members`, a list: each with its `name` and, under `init` and `final`, `dead_by_relu`, `dead_by_topk`,
      `dead_total` (shares of its features, on `n_eval_tokens` held-out tokens), `fve` (about the mean),
      `fve_about_zero`, `l0`, `bias_relative_error` (‖b − mu‖ / ‖mu‖), `bias_projection` (b·mu / ‖mu‖²), and `mmcs`
      where the true features are known.

    Raises:
      Refused: something in the configuration, the data or the workdir is wrong; nothing was written.
      RunFailed: activations or the loss are not finite; the last good checkpoint is kept.
      Preempted: SIGTERM came (Interrupted: Ctrl-C, in a command); the state was saved.
    """
    with processes.together():
        laid = {key: config.train[key] for key in ("devices", "mesh")}
        processes.check_alike("--config", "configuration", config_lib.identity(config) | laid)
        config_lib.check(config)
        devices = devices_lib.Devices(config.train.devices, **config_lib.mesh(config))
        devices.check_batch("train.batch_size", config.train.batch_size)
        devices.check_batch("eval.batch_size", config.eval.batch_size)
        if jax.process_index() == 0:
            boards.check(config)
        workdir_lib.check(workdir, partial(config_lib.changed, config))
        evenly = workdir_lib.is_of_before(workdir)
        source = open_source(config, partial(footprint.check_run, config), evenly, devices.part)
        if config.train.steps and source.n_train_tokens is not None and config.train.batch_size > source.n_train_tokens:
            allowed = f"up to {source.n_train_tokens}, the tokens there are to train on (rows are tokens)"
            raise Refused("train.batch_size", config.train.batch_size, allowed)
        groups = step_lib.group_members(config_lib.members(config), source.d_model)
        devices.check_groups([group.names for group in groups])
        workdir_lib.check_data(workdir, source.identity)
        data = {key: value for key, value in source.identity.items() if key != "path"}
        processes.check_alike("data.path", "activations", data)
        with workdir_lib.claimed(workdir, config_lib.identity(config), source.identity):
            workdir_lib.check_shared(workdir)
            return Run(config, workdir, devices, source).to_the_end()


class Run:
    """One run: its groups of members, its compiled programs, and the loop."""

    def __init__(self, config: ConfigDict, workdir: str, devices: devices_lib.Devices, source: Source):
        self.config, self.workdir, self.source, self.devices = config, workdir, source, devices
        self.checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
        self.history: list[dict[str, Any]] = []
        self.ensemble = Ensemble(config, source, self.checkpoints.statistics())
        self.groups = self.ensemble.groups
        self.states = devices.made(self.ensemble.initial_states)
        self.step, self.data = 0, source.train(0)
        self._evaluation_steps = config_lib.evaluation_steps(config)
        if self.checkpoints.latest is not None:
            self.states, self.history, position = self.checkpoints.restore(self.states)
            self.step = self.checkpoints.latest
            self.data.set_state(position)
        self._advance = devices.compile(
            self._steps, split=(None, None if source.split_axis is None else 1 + source.split_axis, None), donate=(0,),
            out=lambda states, *_: (states, devices_lib.STEPS),
        )  # fmt: skip
        self._evaluate = devices.compile(
            self._evaluate_batch, split=(None, source.split_axis, 0),
            out=lambda *_: (sae_lib.FEATURES, (sae_lib.MEMBERS, devices_lib.WHOLE)),
        )  # fmt: skip

    # -- what is compiled ----------------------------------------------------------------------------------------

    def tokens(self, split: str, given: Array, device: Int[Array, ""], share: int) -> Array:
        """This device's `share` of the rows of a batch, normed one by one if so configured, and scaled."""
        rows = device * share + jnp.arange(share)
        return per_token(self.source.tokens(split, given, rows), self.config.data.norm) * self.ensemble.scale

    def _steps(
        self, allsum: AllSum, device: Int[Array, ""], states: Any, inputs: Any, count: Int[Array, ""]
    ) -> tuple[Any, Any]:
        """`count` training steps of all groups on the first `count` of the given inputs; metrics of each step."""

        @partial(jax.jit, inline=True)  # traced once: for the shapes of its metrics, and again from memory in the loop
        def step(states: Any, given: Array, device: Int[Array, ""]) -> tuple[Any, Any]:
            x = self.tokens("train", given, device, self.config.train.batch_size // self.devices.shares)
            done = [
                step_lib.group_step(state, x, static=group.static, allsum=allsum, shards=self.devices.shards)
                for group, state in zip(self.groups, states, strict=True)
            ]
            return tuple(state for state, _ in done), tuple(metrics for _, metrics in done)

        def body(t: Array, carry: Any) -> Any:
            states, metrics = carry
            states, new = step(states, inputs[t], device)
            return states, jax.tree.map(lambda all_steps, one: all_steps.at[t].set(one), metrics, new)

        shapes = jax.eval_shape(step, states, inputs[0], device)[1]
        metrics = jax.tree.map(lambda s: jnp.zeros((inputs.shape[0], *s.shape), s.dtype), shapes)
        # The number of steps is an argument, so one program serves full dispatches and the rest before a checkpoint.
        return jax.lax.fori_loop(0, count, body, (states, metrics))

    def _evaluate_batch(
        self, allsum: AllSum, device: Int[Array, ""], groups: Any, given: Any, valid: Any
    ) -> Any:
        x = self.tokens("eval", given, device, self.config.eval.batch_size // self.devices.shares)
        shift, ordinary = (jnp.asarray(mu, x.dtype) for mu in (self.ensemble.shared_mu, self.ensemble.ordinary_mu))
        return evaluation.evaluate_batch(
            groups, x, valid, shift, allsum, self.devices.allmax, self.devices.shards, ordinary,
            self.ensemble.giant_norm,
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def to_the_end(self) -> dict[str, Any]:
        """Evaluate and save, then advance, until the last step; then the report and the figures."""
        with watching.Watch(self.config, self.workdir, self.groups, self.step) as watch:
            with StopRequest(together=True) as stop:  # until the last checkpoint is whole
                try:
                    self._advance_to_the_end(stop, watch)
                finally:
                    self.data.close()
                    self.checkpoints.close()
            report = self._finish()
            watch.report(report)
        return report

    def _advance_to_the_end(self, stop: StopRequest, watch: watching.Watch) -> None:
        total, every = self.config.train.steps, config_lib.checkpoint_every(self.config)
        pending: tuple[int, int, Any] | None = None
        with processes.together():
            while True:
                due = self.step % every == 0 or self.step == total
                evaluate, stopping = self.step in self._evaluation_steps, stop.requested()
                if evaluate or stopping:
                    self._settle(pending, watch)
                    pending = None
                    if evaluate:
                        self._evaluate_once(watch)
                    if due or stopping:
                        self._save()
                if self.step == total:
                    break
                if stopping:
                    raise stop.stopped(f"at step {self.step} of {total}")
                ahead = next(step for step in self._evaluation_steps if step > self.step) - self.step
                count = min(self.config.train.steps_per_dispatch, ahead)
                self.states, metrics = self._advance(self.states, self._next_inputs(count), np.int32(count))
                # Metrics of the dispatch before: while the device works on this one the next inputs are read and
                # on their way to it, so that it never waits for us.
                self._settle(pending, watch)
                pending = (self.step, count, metrics)
                self.step += count

    def _next_inputs(self, count: int) -> Any:
        inputs = [next(self.data) for _ in range(count)]
        inputs += inputs[-1:] * (self.config.train.steps_per_dispatch - count)  # never looked at
        return jnp.stack(inputs) if isinstance(inputs[0], jax.Array) else np.stack(inputs)

    def _settle(self, pending: tuple[int, int, Any] | None, watch: watching.Watch) -> None:
        """Fetches the metrics of a dispatch, stops at a loss that is not finite, shows the rest."""
        if pending is None:
            return
        first, count, metrics = pending
        metrics = processes.fetched(metrics)
        finite = [np.isfinite(group["loss"][:count]) & np.isfinite(group["grad_norm"][:count]) for group in metrics]
        bad = [t for t in range(count) if not all(group[t].all() for group in finite)]
        if bad:
            names = [
                name for group, good in zip(self.groups, finite, strict=True)
                for name, fine in zip(group.names, good[bad[0]], strict=True) if not fine
            ]  # fmt: skip
            raise self._failure(first + bad[0], names)
        watch.steps(first, count, metrics)

    def _failure(self, step: int, names: list[str]) -> RunFailed:
        kept = self.checkpoints.latest
        where, rest = f"step {step}, batch {step}: ", f"; the last good checkpoint is that of step {kept}"
        if self.source.split_axis is not None:
            self.data.set_state({"next_index": step})
            x = next(self.data)
            if not np.isfinite(x).all():
                return RunFailed(where + culprit(x) + rest)
        what = f"the loss or its gradient is not finite in {', '.join(names)}"
        return RunFailed(f"{where}{what}: a lower train.learning_rate may help{rest}")

    def _record(self) -> dict[str, Any]:
        """Held-out metrics, bias and fates of every member at this step."""
        try:
            return {"step": self.step, **self.ensemble.record(self.states, self._evaluate)}
        except RunFailed as error:
            kept = self.checkpoints.latest
            raise RunFailed(f"step {self.step}, {error}; the last good checkpoint is that of step {kept}") from None

    def _evaluate_once(self, watch: watching.Watch) -> None:
        if self.history and self.history[-1]["step"] >= self.step:
            return
        self.history.append(self._record())
        watch.scalars(self.step, {f"{name}/held_out": v for name, v in self.history[-1]["members"].items()})

    def _save(self) -> None:
        if self.checkpoints.latest != self.step:
            self.checkpoints.save(
                self.step, self.states, self.ensemble.statistics, self.history, self.data.get_state()
            )

    # -- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        first, last = self.history[0]["members"], self.history[-1]["members"]
        gammas = self.ensemble.statistics["gammas"].tolist()
        result: dict[str, Any] = {
            "step": self.step,
            **dict(zip(("gamma", "gamma_raw", "gamma_direction"), gammas, strict=True)),
            "n_features": self.config.sae.n_features,
            "k": self.ensemble.k,
            "pathway": self.ensemble.pathway,
            "d_model": self.source.d_model,
            "n_eval_tokens": self.source.n_eval_tokens,
            "highest_rate_of_dead": evaluation.highest_rate_of_dead(self.source.n_eval_tokens),
            "scale": self.ensemble.scale,
            "seed": self.config.seed,
            "devices": self.devices.count,
            "members": [
                {"name": name, "gamma_raw": self.ensemble.gamma_raw(name), "init": first[name], "final": last[name]}
                for name in self.ensemble.members
            ],
            "data": self.source.identity,
            "config": config_lib.identity(self.config),
            "versions": tables.versions(),
        }
        if not self.ensemble.seen:  # the run had come to its end before
            self._record()
        # All processes together open the checkpoints, and work on states of which each may have a part.
        kept, first_states = checkpoint.history(self.workdir), self.devices.made(self.ensemble.initial_states)
        rows = self.ensemble.fates(self.history, first_states, self.states)
        self._draw(kept, result, first_states)
        if jax.process_index() == 0:
            tables.write_csv(epath.Path(self.workdir) / "fates.csv", rows)
            tables.write_json(self.workdir, result)
        return result

    _draw = drawing.draw
