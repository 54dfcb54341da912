"""The command line that the figures share: --workdir for runs, table and picture, --scale for size and length."""

from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

SCALES = ("smoke", "cpu", "paper")


def start(main: Callable[[Path, str], None], name: str) -> None:
    """Calls main(workdir, scale) with what the command line says."""
    workdir = flags.DEFINE_string("workdir", f"runs/{name}", "folder for the runs, the table and the picture")
    scale = flags.DEFINE_enum("scale", "cpu", SCALES, "smoke: seconds; cpu: as in README.md; paper: an accelerator")

    def parsed(_: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)
        main(Path(workdir.value), scale.value)

    app.run(parsed)
