"""The command line: flags in, a table and a report out, and one line with an exit code where something is wrong."""

import difflib
import sys
from collections.abc import Callable

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from sae_jax import config as config_lib
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
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    others = [argument for argument in argv if argument not in overrides]
    plain, workdir = _read(others)
    if not workdir:
        raise Refused("--workdir", workdir, "a folder for the run")
    keys = config_lib.flatten(plain)
    for override in overrides:  # one by one, so that the one that is wrong can be named
        key, equals, value = override.removeprefix("--config.").partition("=")
        if not equals:
            raise Refused(override, "", "written as --config.KEY=VALUE")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=3, cutoff=0.4) or sorted(keys)
            raise Refused(key, value, "an existing key, as " + ", ".join(near))
        try:
            _read([*others, override])
        except Refused as error:
            raise Refused(key, value, f"a value of type {type(keys[key]).__name__}") from error
    return _read(argv)[0], workdir


def _read(argv: list[str]) -> tuple[ConfigDict, str | None]:
    values = flags.FlagValues()
    try:
        config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
        workdir = flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
        rest = values(argv)
        found = config.value
        if found is not None:
            config_lib.flatten(found)  # a file that could not be loaded speaks up here
    except Exception as error:  # a configuration file is code: whatever it raises is the user's to see in one line
        raise Refused("flags", " ".join(argv[1:]), f"flags that can be read ({error})") from error
    if len(rest) > 1:
        raise Refused("argument", rest[1], "flags only, as --config.train.steps=1000")
    if found is None:
        raise Refused("--config", None, "a configuration file, as configs/synthetic.py")
    return found, workdir.value
