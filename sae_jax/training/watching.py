"""What is seen of a training while it goes on: its curves on the boards, and on stderr how far it is."""

import contextlib
from typing import Any, Self

import jax
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.reports import boards, tables
from sae_jax.runtime import progress
from sae_jax.training.step import Group

POINTS = 1000  # boards get about this many over a run


class Watch:
    """Shows what it is given, which has been fetched from the devices already. Only the first process does.

    Args:
      step: where the run is.
    """

    def __init__(self, config: ConfigDict, workdir: str, groups: list[Group], step: int):
        self._config, self._workdir, self._groups = config, workdir, groups
        members = config_lib.members(config)
        self._dead_after = {name: config_lib.dead_after_tokens(member) for name, member in members.items()}
        self._boards: list[boards.Board] = []
        self._shown = progress.Progress(config.train.steps, step, "steps", "training", config.report.every_seconds)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            for board in boards.opened(self._config, self._workdir):
                self._boards.append(self._stack.enter_context(board))
        self._stack.enter_context(self._shown)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def steps(self, first: int, count: int, metrics: Any) -> None:
        """Metrics of `count` steps from step `first` on: for each group, name → (steps, members)."""
        spacing = max(1, self._config.train.steps // POINTS)
        for t in range(count if self._boards else 0):
            if (first + t) % spacing == 0:
                self.scalars(first + t + 1, self._by_member(metrics, t))
        self._shown.update(count, lambda rate: self._standing(first + count, self._by_member(metrics, count - 1), rate))

    def scalars(self, step: int, values: boards.Values) -> None:
        """For the boards alone."""
        for board in self._boards:
            board.scalars(step, values)

    def report(self, report: dict[str, Any]) -> None:
        """What the run came to."""
        for board in self._boards:
            board.report(report)

    def _by_member(self, metrics: Any, t: int) -> boards.Values:
        return {
            name: {key: float(values[t, i]) for key, values in found.items()}
            for group, found in zip(self._groups, metrics, strict=True) for i, name in enumerate(group.names)
        }  # fmt: skip

    def _standing(self, step: int, values: boards.Values, rate: float) -> str:
        """How the members stand after a step. Before any feature can have been silent for long enough none is dead."""
        a_step = self._config.train.batch_size
        for name, found in values.items():
            if step * a_step < self._dead_after[name]:
                found["dead"] = None
        return f"{progress.short(rate * a_step)} tokens/s; {tables.standing(values)}"
