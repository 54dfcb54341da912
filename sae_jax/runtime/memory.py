"""How much memory there is, asked before anything is allocated: what grows beyond it is killed without a word."""

from pathlib import Path

import jax

from sae_jax.errors import Refused

CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that a device, or the machine where the device is its processor, can still give; None: nobody knows."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        pass
    for most, used in (("memory.max", "memory.current"),
                       ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        try:  # a container's own limit; "max" where it has none
            found.append(int((CGROUP / most).read_text()) - int((CGROUP / used).read_text()) + _cache())
        except (OSError, ValueError):
            continue
    return max(0, min(found)) if found else None


def _cache() -> int:
    """Bytes of files that a container holds in memory and gives up when asked."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, StopIteration, ValueError):
        return 0


def check(field: str, value: int, what: str, each: float, rest: float = 0.0) -> None:
    """Refuses what cannot fit.

    Args:
      field, value: what the user asked for so many of.
      what: they take the memory for, in words.
      each: bytes that one of them takes.
      rest: bytes that are taken however few there are.
    """
    there = available()
    if there is None or value * each + rest <= there:
        return
    fits = int(max(0, there - rest) // each)
    raise Refused(
        field, value, f"at most about {fits}: {what} take {(value * each + rest) / 1e9:,.1f} GB, "
        f"and {there / 1e9:,.1f} GB are free"
    )  # fmt: skip
