"""Checkpoints: the whole TrainState, the statistics it was started from, the data position, the history so far.

The only file that imports orbax. A checkpoint appears under its final name only once it is complete.
"""

import json
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sae_jax.disk import write_text
from sae_jax.errors import Refused

CONFIG = "config.json"
FOLDER = "checkpoints"


def check_workdir(workdir: str, identity: dict[str, Any]) -> None:
    """Refuses a workdir that holds another configuration's run. Writes nothing."""
    root = epath.Path(workdir)
    wanted = _as_json(identity)
    if root.exists() and not root.is_dir():
        raise Refused("--workdir", workdir, "a folder")
    if (root / CONFIG).exists():
        held = json.loads((root / CONFIG).read_text())
        for key in sorted(wanted.keys() | held.keys()):
            if wanted.get(key) != held.get(key):
                raise Refused(
                    "--workdir", workdir,
                    f"a new folder: this one holds a run with {key} = {held.get(key)!r}, not {wanted.get(key)!r}",
                )  # fmt: skip
    elif (root / FOLDER).exists():
        raise Refused("--workdir", workdir, f"a new folder: this one has checkpoints but no {CONFIG}")


def claim_workdir(workdir: str, identity: dict[str, Any]) -> None:
    """Makes the workdir, and writes down whose run it holds."""
    root = epath.Path(workdir)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / CONFIG, json.dumps(_as_json(identity), indent=2) + "\n")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


class Checkpoints:
    """The checkpoints of one workdir, saved in the background."""

    def __init__(self, workdir: str, keep: int):
        folder = epath.Path(workdir).absolute() / FOLDER
        self._manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, states: Any, statistics: dict[str, np.ndarray], history: list[Any], position: Any
    ) -> None:
        """Starts saving; returns once the arrays are copied, so that their buffers may be donated."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(states),
                statistics=ocp.args.StandardSave(statistics),
                history=ocp.args.JsonSave(history),
                position=ocp.args.JsonSave(position),
            ),
        )

    def statistics(self, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The statistics that the run started from."""
        args = ocp.args.Composite(statistics=ocp.args.StandardRestore(like))
        return self._manager.restore(self.latest, args=args).statistics

    def restore(self, like: Any) -> tuple[Any, list[Any], Any]:
        """(states, history, data position) of the newest checkpoint; `like` has the shapes and devices."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like),
            history=ocp.args.JsonRestore(),
            position=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(self.latest, args=args)
        return restored.state, restored.history, restored.position

    def close(self) -> None:
        """Waits for saves that are under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def history(workdir: str) -> list[Any]:
    """The history kept in the newest checkpoint of a workdir: one entry per checkpoint so far."""
    with ocp.CheckpointManager(epath.Path(workdir).absolute() / FOLDER) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(history=ocp.args.JsonRestore())).history
