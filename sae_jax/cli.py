"""The command line: flags in, a table and a report out, and one line with an exit code where something is wrong."""

import sys
from collections.abc import Callable

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from sae_jax.errors import Preempted, Refused, RunFailed

USAGE = """usage: python -m sae_jax train --config=configs/X.py --workdir=DIR [--config.a.b=value ...]

verbs:
  train   train the SAEs a configuration describes; run it again to go on where it stopped
"""


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        verb = VERBS.get(argv[0])
        if verb is None:
            raise Refused("verb", argv[0], "one of " + ", ".join(VERBS))
        return verb(argv)
    except (Refused, RunFailed, Preempted) as error:
        print(f"sae_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


def train(argv: list[str]) -> int:
    """sae_jax train --config --workdir"""
    config, workdir = _parse(argv)
    from sae_jax import report, running

    logging.set_verbosity(logging.ERROR)  # the libraries below narrate every save
    print(report.table(running.train(config, workdir)))
    print(f"report, figures, checkpoints: {workdir}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {"train": train}


def _parse(argv: list[str]) -> tuple[ConfigDict, str]:
    """The configuration with its overrides, and the workdir. Wrong flags are refused in one line."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        raise Refused("flags", " ".join(argv[1:]), " ".join(str(error).split())) from error
    if len(rest) > 1:
        raise Refused("argument", rest[1], "flags only, as --config.train.steps=1000")
    if config.value is None:
        raise Refused("--config", None, "a configuration file, as configs/synthetic.py")
    if not workdir.value:
        raise Refused("--workdir", workdir.value, "a folder for the run")
    return config.value, workdir.value
