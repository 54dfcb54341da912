"""Several real processes of one run, joined through jax.distributed on the loopback; for tests."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOIN = """
import sys
import jax
port, n, number = map(int, sys.argv[1:4])
jax.distributed.initialize(f"127.0.0.1:{port}", n, number)
"""


class Processes:
    """n interpreters that run the same source, in which `n` and `number` are known.

    Each sees one CPU device or as many as asked for, whatever flags the tests have, and finds this checkout; what they
    write goes to files.
    """

    def __init__(self, source: str, n: int, folder: Path, devices: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        self._logs = [folder / f"process{number}.log" for number in range(n)]
        self._running = []
        for number, log in enumerate(self._logs):
            command = [sys.executable, "-c", JOIN + textwrap.dedent(source), str(port), str(n), str(number)]
            with log.open("w") as file:
                self._running.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=folder))

    def wait(self, seconds: float = 600) -> list[tuple[int, str]]:
        """Exit code and output of each; those that do not end are killed, which fails the test."""
        try:
            codes = [process.wait(seconds) for process in self._running]
        finally:
            for process in self._running:
                process.kill()
                process.wait()
        return list(zip(codes, (log.read_text() for log in self._logs), strict=True))
