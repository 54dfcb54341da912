"""Checkpoints: the whole TrainState, the statistics it was started from, the data position, the history so far.

The only file that imports orbax. A checkpoint appears under its final name only once it is complete, with the checksum
of every file in it. One that has been damaged since is named, put aside, and the one before it is taken.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sae_jax.errors import Refused, RunFailed
from sae_jax.runtime import disk

CONFIG = "config.json"  # whose run this is; workdir.py writes it
FOLDER = "checkpoints"
DAMAGED = "damaged"  # where checkpoints are put aside
CHECKSUMS = "checksums.json"
METADATA = "_CHECKPOINT_METADATA"
REMOVED = "removed.partial"  # under FOLDER: old ones on their way out, which nobody may take for whole any more
COMMITTED = "commit_success.txt"  # orbax writes it last; nobody reads what is in it


def steps(folder: epath.Path) -> list[int]:
    """Steps whose checkpoints are complete, in order. In object stores a folder is there before all of it is."""
    if not folder.exists():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(path.name) for path in found if "://" not in str(folder) or (path / COMMITTED).exists())


# -- damage ------------------------------------------------------------------------------------------------------------


def _checksums(folder: epath.Path, prefix: str = "") -> dict[str, str]:
    """Path under the folder → SHA-256, of every file that means anything."""
    found: dict[str, str] = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= _checksums(path, f"{prefix}{path.name}/")
        elif path.name == METADATA:
            found[prefix + path.name] = hashlib.sha256(_without_time(path.read_bytes())).hexdigest()
        elif path.name not in (CHECKSUMS, COMMITTED):
            with path.open("rb") as file:
                found[prefix + path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _without_time(data: bytes) -> bytes:
    """orbax's metadata as they were before it added, last of all, when the checkpoint became visible."""
    try:
        return json.dumps({**json.loads(data), "commit_timestamp_nsecs": None}, sort_keys=True).encode()
    except (ValueError, TypeError, RecursionError):
        return data


def _seal_of(checksums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def damage(checkpoint: epath.Path) -> str | None:
    """The first file that is not as it was written; None if all are."""
    try:
        recorded, found = disk.read_json("", checkpoint / CHECKSUMS), _checksums(checkpoint)
    except (Refused, OSError):
        return CHECKSUMS
    if recorded.pop(CHECKSUMS, None) != _seal_of(recorded):
        return CHECKSUMS
    return next((name for name in sorted(recorded | found) if recorded.get(name) != found.get(name)), None)


def _put_damaged_aside(root: epath.Path) -> None:
    """Leaves the newest intact checkpoint as the newest one, and says on stderr what was wrong with those after it.

    Raises:
      Refused: there are checkpoints, and all of them are damaged. They stay where they are.
    """
    bad: dict[int, str] = {}
    for step in reversed(steps(root / FOLDER)):
        wrong = damage(root / FOLDER / str(step))
        if wrong is None:
            break
        bad[step] = f"checkpoint {step} is damaged: {root / FOLDER / str(step) / wrong} is not as it was written"
    else:
        if bad:
            allowed = f"a folder with an intact checkpoint; {'; '.join(bad.values())}; remove them to start from step 0"
            raise Refused("--workdir", str(root), allowed)
        return
    for number, line in bad.items():
        aside = root / DAMAGED / str(number)
        if aside.exists():
            aside.rmtree()
        aside.parent.mkdir(exist_ok=True)
        (root / FOLDER / str(number)).rename(aside)
        print(f"sae_jax: {line}; put aside as {aside}, going on from step {step}", file=sys.stderr)


# -- saving and restoring ----------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one workdir, saved in the background.

    Raises:
      Refused: all there are, are damaged.
    """

    def __init__(self, workdir: str, keep: int):
        self._folder = epath.Path(workdir).absolute() / FOLDER
        if jax.process_index() == 0:
            _put_damaged_aside(self._folder.parent)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints examined")
        self._saving = -1
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                todelete_subdir=REMOVED,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, complete or under way."""
        return self._manager.latest_step()

    def save(
        self, step: int, states: Any, statistics: dict[str, np.ndarray], history: list[Any], position: Any
    ) -> None:
        """Starts saving; returns once the arrays are copied, so that their buffers may be donated.

        Raises:
          RunFailed: the checkpoint before this one could not be written, as on a full disk.
        """
        with self._writing():
            self._wait()
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(states),
                    statistics=ocp.args.StandardSave(statistics),
                    history=ocp.args.JsonSave(history),
                    position=ocp.args.JsonSave(position),
                ),
            )

    def _seal(self) -> None:
        """Adds the checksums to a checkpoint that is written but not yet visible."""
        here = next(path for path in self._folder.iterdir() if path.name.split(".")[0] == str(self._saving))
        found = _checksums(here)
        (here / CHECKSUMS).write_text(json.dumps({**found, CHECKSUMS: _seal_of(found)}, indent=1))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # from threads and from C++: whatever the writers raise
            kept = max((step for step in steps(self._folder) if step != self._saving), default=None)
            message = f"step {self._saving}: the checkpoint cannot be written ({error})"
            raise RunFailed(f"{message}; the last good checkpoint is that of step {kept}") from error

    def statistics(self) -> dict[str, np.ndarray] | None:
        """The statistics that the run started from; None where nothing is saved yet."""
        if self.latest is None:
            return None
        found = self._restored(statistics=ocp.args.StandardRestore()).statistics
        return {key: np.asarray(value) for key, value in found.items()}

    def restore(self, like: Any) -> tuple[Any, list[Any], Any]:
        """(states, history, data position) of the newest checkpoint; `like` has the shapes and devices."""
        restored = self._restored(
            state=ocp.args.StandardRestore(like),
            history=ocp.args.JsonRestore(),
            position=ocp.args.JsonRestore(),
        )
        return restored.state, restored.history, restored.position

    def _restored(self, **items: Any) -> Any:
        try:
            return self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        except Exception as error:  # every bit is as it was written: by another version, or members grouped otherwise
            allowed = "a checkpoint that this version can read, of a run with as many members side by side (member=N)"
            raise Refused("--workdir", str(self._folder / str(self.latest)), f"{allowed} ({error})") from error

    def close(self) -> None:
        """Waits for saves that are under way."""
        with self._writing():
            self._wait()
        self._manager.close()

    def _wait(self) -> None:
        """For the save that is under way; then what it has replaced is deleted."""
        self._manager.wait_until_finished()
        removed = self._folder / REMOVED
        if jax.process_index() == 0 and removed.exists():
            removed.rmtree()


def history(workdir: str) -> list[Any]:
    """The history kept in the newest checkpoint of a workdir: one entry per checkpoint so far."""
    with ocp.CheckpointManager(epath.Path(workdir).absolute() / FOLDER) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(history=ocp.args.JsonRestore())).history


class Saved(NamedTuple):
    """The newest checkpoint of a finished or unfinished run, as its own files describe it."""

    step: int
    groups: list[Any]  # of members, in order: a dictionary of arrays for each TrainState
    statistics: dict[str, np.ndarray]
    history: list[Any]
    identity: dict[str, Any]  # the configuration, flat


def saved(workdir: str, whole: bool = False) -> Saved:
    """Reads the newest intact checkpoint of a workdir into this machine's memory, whatever devices it was written on.

    `whole`: with Adam's moments, which are twice the SAEs and which training alone needs.

    Raises:
      Refused: no run is there, or it has no complete checkpoint.
    """
    root = epath.Path(workdir)
    if not (root / CONFIG).exists() or not (root / FOLDER).exists():
        raise Refused("--workdir", workdir, f"the folder of a run, with {CONFIG} and {FOLDER}")
    step = next((step for step in reversed(steps(root / FOLDER)) if damage(root / FOLDER / str(step)) is None), None)
    if step is None:
        raise Refused("--workdir", workdir, "a run with a complete and intact checkpoint")
    handlers = {  # made here: the first one starts JAX's devices, after which no process can join others
        "state": ocp.PyTreeCheckpointHandler(), "statistics": ocp.StandardCheckpointHandler(),
        "history": ocp.JsonCheckpointHandler(), "position": ocp.JsonCheckpointHandler(),
    }  # fmt: skip
    with ocp.CheckpointManager(root.absolute() / FOLDER, item_handlers=handlers) as manager:
        groups = [
            {key: part for key, part in group.items() if whole or key != "moments"}
            for group in manager.item_metadata(step).state
        ]
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), groups)
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(groups, restore_args=how, partial_restore=True),
                statistics=ocp.args.StandardRestore(),
                history=ocp.args.JsonRestore(),
            ),
        )
    identity = disk.read_json("--workdir", root / CONFIG)
    return Saved(step, list(found.state), found.statistics, found.history, identity)
