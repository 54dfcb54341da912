"""Where the curves of a training can be watched: TensorBoard always, Weights & Biases if asked for."""

import contextlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any, Protocol, Self

from etils import epath
from ml_collections import ConfigDict

from sae_jax import config as config_lib
from sae_jax.errors import Refused, first_line
from sae_jax.runtime import disk, optional

Values = dict[str, dict[str, Any]]  # member → metric → number; None where it is undefined
WANDB_ID = "wandb.json"  # in the workdir: which run of Weights & Biases a resumed training goes on with
PATIENCE = 60.0  # seconds for Weights & Biases to begin, and to send the rest at the end


class Board(Protocol):
    """Takes scalars as they are found, and the report at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def scalars(self, step: int, values: Values) -> None:
        """Metrics after a step, which never goes down."""

    def report(self, report: dict[str, Any]) -> None:
        """What report.json holds."""


def without_folders(config: ConfigDict) -> dict[str, Any]:
    """`config.identity`, of paths on this machine the last component only: what may be shown to others."""
    flat = config_lib.identity(config)
    for key in (*config_lib.PATH_KEYS, "data.model.id"):
        if (path := flat[key]) and not path.startswith("hf:") and (key in config_lib.PATH_KEYS or os.path.exists(path)):
            flat[key] = os.path.basename(path.rstrip("/"))
    return flat


def opened(config: ConfigDict, workdir: str) -> list[Board]:
    """Those that the configuration asks for."""
    return [TensorBoard(workdir), *([WandB(config, workdir)] if config.report.wandb else [])]


@contextlib.contextmanager
def _unseen(module: str) -> Iterator[None]:
    """As if an optional module of another library were not installed, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # as the import system says that it is not to be had
    try:
        yield
    finally:
        del sys.modules[module]


class TensorBoard:
    """Scalars under WORKDIR/tensorboard, `member/metric`; a resumed run writes a second events file."""

    def __init__(self, workdir: str):
        with _unseen("torch"):  # which tensorboardX imports where it is there: seconds, for tensors that never come
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event

        folder = epath.Path(workdir) / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._scalar, self._event = summary.scalar, Event
        # Written by this thread: tensorboardX's own blocks for ever once it has met a full disk.
        self._events = EventsWriter(str(folder / "events"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def scalars(self, step: int, values: Values) -> None:
        for key, value in _flat(values).items():
            one = self._scalar(key, value)
            self._events.write_event(self._event(wall_time=time.time(), step=step, summary=one))
        self._events.flush()

    def report(self, report: dict[str, Any]) -> None:
        """TensorBoard has no place for it."""


class WandB:
    """The same scalars on Weights & Biases, against `step`; the settings; in the summary, what the report says.

    What it cannot do (no network, no space, a service that fails) is said in one line, and the training goes on without
    it. Names of folders, files and this machine stay here.
    """

    def __init__(self, config: ConfigDict, workdir: str):
        self._run: Any = None
        try:
            self._run = self._begun(config, workdir)
        except Exception as error:  # from the network, the service, the disk
            self._give_up(error)

    def _begun(self, config: ConfigDict, workdir: str) -> Any:
        wandb = optional.module("wandb", "wandb")
        root, name = epath.Path(workdir), config.report.wandb
        held = disk.read_json("--workdir", root / WANDB_ID) if (root / WANDB_ID).exists() else {}
        if name not in held:
            held[name] = uuid.uuid4().hex[:12]
            disk.write_text(root / WANDB_ID, json.dumps(held) + "\n")
        local = "://" not in workdir
        run = wandb.init(
            project=name, id=held[name], resume="allow", name=(root.resolve() if local else root).name,
            dir=workdir if local else tempfile.mkdtemp(prefix="wandb"),
            config=without_folders(config), settings=_settings(wandb),
        )  # fmt: skip
        # Steps of our own: a training that was killed goes on from its checkpoint, behind what it has sent already, and
        # Weights & Biases drops what lies behind.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._try(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def scalars(self, step: int, values: Values) -> None:
        self._try(lambda run: run.log({"step": step, **_flat(values)}))

    def report(self, report: dict[str, Any]) -> None:
        found = {key: value for key, value in report.items() if isinstance(value, int | float)}
        for member in report["members"]:
            found |= _flat({f"{member['name']}/{when}": member[when] for when in ("init", "final")})
        self._try(lambda run: run.summary.update(found))

    def _try(self, work: Any) -> None:
        if self._run is not None:
            try:
                work(self._run)
            except Exception as error:  # as above
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"sae_jax: Weights & Biases: {first_line(error)}; going on without it", file=sys.stderr)


def check(config: ConfigDict) -> None:
    """Refuses Weights & Biases where it is not installed or nobody is logged in. Writes nothing."""
    if not config.report.wandb:
        return
    wandb = optional.module("wandb", "wandb")
    try:
        local = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        known = local or wandb.login(prompt=False, verify=False)
    except Exception as error:  # settings of its own that it cannot read
        allowed = f"settings that it can read ({first_line(error)})"
        raise Refused("report.wandb", config.report.wandb, allowed) from error
    if not known:
        allowed = "somebody logged in: run `wandb login`, or set WANDB_MODE=offline"
        raise Refused("report.wandb", config.report.wandb, allowed)


def _settings(wandb: Any) -> Any:
    """Only what is logged leaves: no output, code, git, packages, host, program or load of this machine."""
    return wandb.Settings(
        console="off", silent=True, disable_code=True, disable_git=True, disable_job_creation=True, host="", program="",
        x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
        init_timeout=PATIENCE, finish_timeout=PATIENCE, finish_timeout_raises=False, reinit="create_new",
    )  # fmt: skip


def _flat(values: Values) -> dict[str, Any]:
    return {f"{name}/{key}": value for name, found in values.items() for key, value in found.items()
            if isinstance(value, int | float)}  # fmt: skip
