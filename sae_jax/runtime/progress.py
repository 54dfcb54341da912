"""How far a long work is: a bar where stderr is a terminal, elsewhere a line every so many seconds.

Logs, Slurm and notebooks are no terminals. Of several processes the first one speaks.
"""

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from tqdm import tqdm

EVERY = 30.0  # seconds between lines
FIRST = 2.0  # seconds to the first line: early enough to see that it works, late enough for a rate


class Progress:
    """Counts what is done and shows it on stderr.

    Args:
      total: how much there is to do; None where nobody knows.
      initial: how much was done before this process.
      unit: in the plural, as "steps".
      every: seconds between lines where stderr is no terminal; 0: no lines.
    """

    def __init__(self, total: int | None, initial: int, unit: str, what: str, every: float = EVERY):
        self.total, self.unit, self.at = total, unit, initial
        # Asking for its number would start the devices, which a model in torch may want for itself.
        speaks = not jax.distributed.is_initialized() or jax.process_index() == 0
        terminal = sys.stderr.isatty()
        self._what, self._every = what, every if speaks and not terminal else 0.0
        self._bar = tqdm(total=total, initial=initial, unit=f" {unit}", desc=what, disable=not (speaks and terminal))
        # The clock starts with the first thing done: what comes before is mostly compilation.
        self._start: tuple[float, int] | None = None
        self._last, self._due = (0.0, initial), 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int, more: Callable[[float], str] = lambda rate: "") -> None:
        """Adds what has been done since the last call.

        Args:
          more: what else to show, given the rate per second; called where something is shown.
        """
        self.at += count
        now = time.monotonic()
        if self._start is None:
            self._start = self._last = (now, self.at)
            self._due = now + min(FIRST, self._every)
        if not self._bar.disable:
            if said := more(self._rate(now, self._start)):
                self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(count)
        elif self._every and now >= self._due and now > self._last[0]:
            print(self._line(now, self._start, more), file=sys.stderr, flush=True)
            self._last, self._due = (now, self.at), now + self._every

    def _rate(self, now: float, since: tuple[float, int]) -> float:
        return (self.at - since[1]) / max(now - since[0], 1e-9)

    def _line(self, now: float, start: tuple[float, int], more: Callable[[float], str]) -> str:
        rate, mean = self._rate(now, self._last), self._rate(now, start)
        parts = [f"{self.at} {self.unit}", f"{short(rate)} {self.unit}/s"]
        if self.total:
            parts[0] = f"{self.at} of {self.total} {self.unit} ({100 * self.at / self.total:.0f} %)"
            if mean > 0:
                left = datetime.timedelta(seconds=round(max(0, self.total - self.at) / mean))
                parts.append(f"{left} left")
        said = more(rate)
        return f"{self._what}: " + ", ".join(parts) + (f"; {said}" if said else "")


def counted(batches: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches, counted on stderr as they are gone through."""
    with Progress(None, 0, "batches", what) as shown:
        for batch in batches:
            yield batch
            shown.update(1)


def short(value: float) -> str:
    """A rate in three digits, as 0.251, 17.3, 1.24k or 3.05M."""
    for size, letter in ((1e6, "M"), (1e3, "k"), (1.0, "")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
