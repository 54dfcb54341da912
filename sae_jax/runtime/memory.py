"""How much memory there is, asked before anything is allocated: what grows beyond it is killed without a word."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from sae_jax.errors import Refused

CGROUP, OWN_CGROUP, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
# A limit and what is used of it, as the two versions of control groups name them.
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available() -> int | None:
    """Bytes that a device, or the machine where the device is its processor, can still give; None: nobody knows."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return of_the_machine()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def of_the_machine() -> int | None:
    """Bytes that this process may still take: of the machine's, of its container's, of its job's."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = MEMINFO.read_text().splitlines()
        found.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    for folder in _groups():
        for most, used in LIMITS:
            with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
                here = folder / most
                found.append(int(here.read_text()) - int((folder / used).read_text()) + _cache(folder))
    return max(0, min(found)) if found else None


def _groups() -> Iterator[Path]:
    """Folders of the control group that this process is in, and of those above it; a container sees its own alone."""
    yield from (CGROUP, CGROUP / "memory")
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                parts = Path(path.lstrip("/")).parts
                yield from (CGROUP.joinpath(controllers, *parts[: i + 1]) for i in range(len(parts)))


def _cache(folder: Path) -> int:
    """Bytes of files that a group holds in memory and gives up when asked."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (folder / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return 0


class Choice(NamedTuple):
    """Something that the user has asked for so many of."""

    field: str
    value: int
    need: Callable[[int], float]  # bytes that all takes with so many of these: more with more


def fits(need: float) -> bool:
    """Whether so many bytes are there, as far as anybody knows."""
    there = available()
    return there is None or need <= there


def check(what: str, first: Choice, *others: Choice) -> None:
    """Refuses what cannot fit, and says how many would: of the first, or of one of the others alone.

    Args:
      what: takes the memory, in words.
    """
    there, need = available(), first.need(first.value)
    if there is None or need <= there:
        return
    fitting = [(choice, most) for choice in (first, *others) if (most := _most(choice, there)) > 0]
    taken = f"{what} take {need / 1e9:,.1f} GB, and {there / 1e9:,.1f} GB are free"
    if not fitting:
        raise Refused(first.field, first.value, f"less, on a machine with more memory: {taken}")
    (blamed, most), *rest = fitting
    instead = "".join(f", or {choice.field} of at most about {fewer}" for choice, fewer in rest)
    raise Refused(blamed.field, blamed.value, f"at most about {most}{instead}: {taken}")


def _most(choice: Choice, there: float) -> int:
    """The most that fits, 0 where not even one does."""
    low, high = 0, choice.value
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if choice.need(middle) <= there else (low, middle - 1)
    return low
