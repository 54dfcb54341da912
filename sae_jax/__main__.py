"""`python -m sae_jax VERB`, installed as the command `sae-jax`."""

import atexit
import gc
import signal
import sys
from typing import Any

from sae_jax.runtime import stopping


def run() -> None:
    """Entry point: exits with the code of the verb. What has nothing to save ends at once when it is asked to stop."""
    stopping.end_when_asked()  # before anything that takes time to import
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # last of all: the work is done, and no Python runs
    gc.set_threshold(100_000, 20, 20)  # libraries make half a million objects that stay: to look through them over and
    atexit.register(gc.freeze)  # over takes 0.3 s, and once more at the end as long
    sys.unraisablehook = _print_unless_late
    from sae_jax import cli

    sys.exit(cli.main(sys.argv[1:]))


def _print_unless_late(what: Any) -> None:
    # Where a disk is full one write of a checkpoint fails; orbax then closes the event loop that tensorstore tells of
    # all the others. The one that counts ends in a line of its own.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


if __name__ == "__main__":
    run()
