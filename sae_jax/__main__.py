"""`python -m sae_jax VERB`, installed as the command `sae-jax`."""

import os
import signal
import sys

from sae_jax.cli import main
from sae_jax.errors import Preempted


def run() -> None:
    """Entry point: exits with the code of the verb. What has nothing to save when SIGTERM comes ends at once."""
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(sys.argv[1:]))


def _stop(*_: object) -> None:
    # Not an exception, which what runs just now might take for a fault of its own.
    os.write(2, b"sae_jax: stopped on request; run again to go on\n")
    os._exit(Preempted.exit_code)


if __name__ == "__main__":
    run()
