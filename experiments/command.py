"""The command line of the scripts: flags alone; what the package refuses is said in one line, as the verbs say it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from sae_jax.errors import Preempted, Refused, RunFailed

SCALES = ("smoke", "cpu", "paper")


def run(main: Callable[..., None], workdir: str = "") -> None:
    """Calls main once the flags are read, with --workdir where a script has one, whose default is given.

    It is defined here, when a script is started: tests import several in one process, and a flag has one owner.
    """
    folder = flags.DEFINE_string("workdir", workdir, "folder for all that it writes") if workdir else None

    def parsed(words: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)
        try:
            if words[1:]:
                raise Refused("words", words[1], "flags alone, as --workdir=PATH (--help lists them)")
            main(*([] if folder is None else [Path(folder.value)]))
        except (Refused, RunFailed, Preempted) as error:
            print(f"sae_jax: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if module.startswith("experiments.") else ():  # for --help, beside the script's own
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(parsed, flags_parser=read)


def said(flag: flags.FlagHolder[Any]) -> Any:
    """Its value, also where no command line was read."""
    return flag.value if flags.FLAGS.is_parsed() else flag.default


def read(argv: list[str]) -> list[str]:
    """The words that are left when the flags are taken; a flag that is wrong ends it, with exit code 2."""
    try:
        return list(flags.FLAGS(argv))
    except flags.Error as error:
        print(f"sae_jax: {error} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def start(main: Callable[..., None], name: str, **choices: tuple[str, ...]) -> None:
    """Calls main(workdir, scale) with what the command line says, and with any of the further choices that it names."""
    scale = flags.DEFINE_enum("scale", "cpu", SCALES, "smoke: seconds; cpu: as in the READMEs; paper: an accelerator")
    more = {key: flags.DEFINE_enum(key, None, values, "this part alone") for key, values in choices.items()}

    def called(workdir: Path) -> None:
        main(workdir, scale.value, **{key: flag.value for key, flag in more.items() if flag.value})

    run(called, f"runs/{name}")
