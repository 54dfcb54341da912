"""`python -m sae_jax VERB`, installed as the command `sae-jax`."""

import os
import signal
import sys
from typing import Any

from sae_jax.cli import main
from sae_jax.errors import Preempted


def run() -> None:
    """Entry point: exits with the code of the verb. What has nothing to save when SIGTERM comes ends at once."""
    signal.signal(signal.SIGTERM, _stop)
    sys.unraisablehook = _print_unless_late
    sys.exit(main(sys.argv[1:]))


def _stop(*_: object) -> None:
    # Not an exception, which what runs just now might take for a fault of its own.
    os.write(2, b"sae_jax: stopped on request; run again to go on\n")
    os._exit(Preempted.exit_code)


def _print_unless_late(what: Any) -> None:
    # Where a disk is full one write of a checkpoint fails; orbax then closes the event loop that tensorstore tells of
    # all the others. The one that counts ends in a line of its own.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


if __name__ == "__main__":
    run()
