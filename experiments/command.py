"""The command line that the figures share: --workdir for runs, table and picture, --scale for size and length."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from sae_jax.errors import Preempted, Refused, RunFailed

SCALES = ("smoke", "cpu", "paper")


def start(main: Callable[..., None], name: str, **choices: tuple[str, ...]) -> None:
    """Calls main(workdir, scale) with what the command line says, and with any of the further choices that it names."""
    workdir = flags.DEFINE_string("workdir", f"runs/{name}", "folder for the runs, the table and the picture")
    scale = flags.DEFINE_enum("scale", "cpu", SCALES, "smoke: seconds; cpu: as in the READMEs; paper: an accelerator")
    more = {key: flags.DEFINE_enum(key, None, values, "this part alone") for key, values in choices.items()}

    def parsed(_: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)
        try:
            main(Path(workdir.value), scale.value, **{key: flag.value for key, flag in more.items() if flag.value})
        except (Refused, RunFailed, Preempted) as error:  # as the verbs say them: in one line
            print(f"sae_jax: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    app.run(parsed)
