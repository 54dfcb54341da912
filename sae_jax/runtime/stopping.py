"""Asked to stop, by SIGTERM or from the keyboard: noted where something can be saved first, else the end at once.

Nothing is raised for the command: an exception that lands in a callback of C++, in a finaliser or in an `except` of
another library is swallowed there, or crashes. In a notebook, where verbs are functions, KeyboardInterrupt is as usual.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from sae_jax.errors import Interrupted, Preempted

ENDS: dict[int, type[Preempted]] = {signal.SIGTERM: Preempted, signal.SIGINT: Interrupted}


class StopRequest:
    """Notes SIGTERM while its context lasts, in the main thread; in a command the first Ctrl-C too.

    Args:
      together: the processes of a run agree on when to stop; otherwise this one asks nobody.
    """

    active: "list[StopRequest]" = []

    def __init__(self, together: bool = False):
        self._noted = 0  # the signal
        self._told = False
        self._again = False
        self._agree: Callable[..., Any] | None = None
        if together:
            import jax  # this much is imported before anything else of a command, and must not take any time

            if jax.process_count() > 1:
                from sae_jax.runtime import processes

                self._agree = processes.any_process
        self._asked: Any = 0

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            caught = ENDS if signal.getsignal(signal.SIGINT) is end else (signal.SIGTERM,)
            self._before = {number: signal.signal(number, self._note) for number in caught}
        self.active.append(self)
        return self

    def requested(self) -> bool:
        """Whether to stop now. Several processes stop in the same turn: the one after it was asked of any of them."""
        if self._agree is None:
            self._told = self._noted > 0
        else:
            before, self._asked = self._asked, self._agree(self._noted > 0)
            self._told = int(before) > 0
        return self._told

    def stopped(self, where: str) -> Preempted:
        """What to raise once everything is saved; `where` says how far it came."""
        kind = ENDS.get(self._noted, Preempted)
        return kind(f"{kind.said} {where}; run again to go on")

    def takes(self, number: int) -> bool:
        """Whether a signal is left to this request: Ctrl-C once, SIGTERM always. Asked by the watching thread."""
        again, self._again = self._again, self._again or number == signal.SIGINT
        return number in self._before and not (again and number == signal.SIGINT)

    def _note(self, number: int, *_: object) -> None:
        self._noted = self._noted or number

    def __exit__(self, *raised: object) -> None:
        self.active.remove(self)
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._noted and not self._told and raised[0] is None:  # it came too late to be asked about: all is saved
            signal.raise_signal(self._noted)


# -- a command -------------------------------------------------------------------------------------------------------


def end_when_asked() -> None:
    """From here on SIGTERM and Ctrl-C end this process at any moment, with one line, unless a StopRequest takes them.

    Python runs handlers between two steps of its main thread, which may be compiling or waiting for a device for
    minutes: a thread watches too.
    """
    watched, told = os.pipe()
    os.set_blocking(told, False)
    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(watched,), daemon=True).start()
    os.register_at_fork(after_in_child=_as_elsewhere)


def _as_elsewhere() -> None:
    """A forked worker has no watching thread, and must not write into the pipe of its parent."""
    signal.set_wakeup_fd(-1)
    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _watch(watched: int) -> None:
    while signals := os.read(watched, 16):
        for number in signals:
            if number in ENDS and not any(request.takes(number) for request in StopRequest.active):
                end(number)


_ending = threading.RLock()
_begun: list[int] = []


def end(number: int, *_: object) -> None:
    """The handler: one line, and the exit code of the signal. It never returns to the work.

    Handler and watching thread both come here: the second waits for the end, or the command could finish with code 0.
    """
    kind = ENDS[number]
    _ending.acquire()  # and never released
    if _begun:  # another signal, within this very handler: what it interrupted goes on
        return
    _begun.append(number)
    with contextlib.suppress(OSError):
        os.write(2, f"sae_jax: {kind.said}; run again to go on\n".encode())
    os._exit(kind.exit_code)
