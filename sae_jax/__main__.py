"""`python -m sae_jax VERB`, installed as the command `sae-jax`."""

import sys

from sae_jax.cli import main


def run() -> None:
    """Entry point: exits with the code of the verb."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
