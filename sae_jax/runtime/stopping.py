"""Asked to stop: SIGTERM is noted instead of died of, so that what is under way can be saved first."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sae_jax.runtime import devices as devices_lib


class StopRequest:
    """Notes SIGTERM while its context lasts, in the main thread.

    Args:
      devices: of a run; its processes agree on when to stop. None: this process asks nobody.
    """

    def __init__(self, devices: devices_lib.Devices | None = None):
        self._noted = False
        self._agree: Callable[..., Any] | None = None
        if devices and jax.process_count() > 1:
            self._agree = devices.compile(lambda allsum, device, flag: allsum(flag), split=(None,))
        self._asked: Any = 0

    def __enter__(self) -> "StopRequest":
        self._before: Callable[..., Any] | int | None = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def requested(self) -> bool:
        """Whether to stop now. Several processes stop in the same turn: the one after it was asked of any of them."""
        if self._agree is None:
            return self._noted
        before, self._asked = self._asked, self._agree(np.int32(self._noted))
        return int(before) > 0

    def _note(self, *_: object) -> None:
        self._noted = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
