"""Whose run a workdir holds: its settings and its data, written down at the start and compared when it goes on."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from sae_jax.errors import Refused
from sae_jax.runtime import checkpoint, disk, processes
from sae_jax.runtime.checkpoint import CONFIG

DATA = "data.json"
SEEN_WITHIN = 60.0  # seconds until what one process has written is there for the others, on a disk that they share
WHERE = "started_in"  # in DATA: the folder that relative paths start from
# The identity that is held, and the folder its relative paths start from → the first key that differs, its value there
# and its value now; None where it is the same run.
Changed = Callable[[dict[str, Any], str], tuple[str, Any, Any] | None]


def check(workdir: str, changed: Changed) -> None:
    """Refuses a workdir that is in use, is damaged, or holds another configuration's run. Writes nothing."""
    try:
        _check(epath.Path(workdir), changed)
    except (OSError, ValueError) as error:  # names that are too long, folders that may not be looked into
        if isinstance(error, Refused):
            raise
        raise Refused("--workdir", workdir, f"a folder that can be read ({error})") from error


def _check(root: epath.Path, changed: Changed) -> None:
    if root.exists() and not root.is_dir():
        raise Refused("--workdir", str(root), "a folder")
    if jax.process_index() == 0:
        disk.check_free(root, "--workdir")
    steps = checkpoint.steps(root / checkpoint.FOLDER)
    if (root / CONFIG).exists():
        held = disk.read_json("--workdir", root / CONFIG)
        folder = disk.read_json("--workdir", root / DATA).get(WHERE, "") if (root / DATA).exists() else ""
        if difference := changed(held, folder):
            raise Refused(
                "--workdir", str(root),
                "a new folder: this one holds a run with {} = {!r}, not {!r}".format(*difference),
            )  # fmt: skip
    elif steps:
        raise Refused("--workdir", str(root), f"a new folder: this one has checkpoints but no {CONFIG}")
    if not steps and (root / "report.json").exists():
        raise Refused("--workdir", str(root), "a new folder: this one has a report, but no checkpoints")


def is_of_before(workdir: str) -> bool:
    """Whether a workdir holds a run whose held-out chunks are evenly spaced."""
    path = epath.Path(workdir) / DATA  # not CONFIG, which another process of a new run may just have written before it
    return path.exists() and disk.HELD_OUT not in disk.read_json("--workdir", path)


def check_data(workdir: str, data: dict[str, Any]) -> None:
    """Refuses to go on with other activations than a run was started on, wherever they lie. Writes nothing."""
    path = epath.Path(workdir) / DATA
    if path.exists():
        held, wanted = disk.read_json("--workdir", path), json.loads(json.dumps(data))
        passed_over = {"path", WHERE} | ({disk.SAMPLED} - held.keys())  # runs of before do not have the latter
        # The checksum last: another shape says more.
        for key in sorted((wanted.keys() | held.keys()) - passed_over, key=lambda key: (key == disk.SAMPLED, key)):
            if wanted.get(key) != held.get(key):
                raise Refused(
                    "--workdir", workdir,
                    f"a new folder: this one is of data with {key} = {held.get(key)!r}, not {wanted.get(key)!r}",
                )  # fmt: skip


def check_shared(workdir: str) -> None:
    """Refuses a workdir that is another folder to other processes: nobody would ever see their part of a checkpoint."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices("claimed")
    until = time.monotonic() + SEEN_WITHIN
    while not (seen := (epath.Path(workdir) / CONFIG).exists()) and time.monotonic() < until:
        time.sleep(0.2)
    processes.check_alike("--workdir", "folder, which they share,", seen)


@contextlib.contextmanager
def claimed(workdir: str, identity: dict[str, Any], data: dict[str, Any]) -> Iterator[None]:
    """Makes the workdir, writes down whose run it holds, and keeps other processes out until the run has ended."""
    if jax.process_index() != 0:
        yield
        return
    root = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(disk.sole_user(root, "--workdir"))
            disk.write_text(root / CONFIG, json.dumps(identity, indent=2) + "\n")
            disk.write_text(root / DATA, json.dumps({**data, WHERE: os.getcwd()}, indent=2) + "\n")
        except OSError as error:
            raise disk.unwritable("--workdir", workdir, error) from error
        yield
