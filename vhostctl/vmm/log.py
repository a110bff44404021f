"""The log of device models: a guest, which can make them complain, cannot fill a disk with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

BURST = 20
"""Messages at most in each `PERIOD`."""
PERIOD = 10.0
"""Seconds."""


class Sparing(logging.Filter):
    """Lets the first `burst` messages of each `period` through, the last of them with a note.

    What is only for debugging is not counted.
    """

    def __init__(
        self,
        burst: int = BURST,
        period: float = PERIOD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._burst, self._period, self._clock = burst, period, clock
        self._began = clock()
        self._count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is to be seen."""
        if record.levelno < logging.INFO:
            return True
        now = self._clock()
        if now - self._began >= self._period:
            self._began, self._count = now, 0
        self._count += 1
        if self._count == self._burst:
            record.msg = f"{record.msg} (no more of this for {self._period:.0f} s)"
        return self._count <= self._burst


log = logging.getLogger("vhostctl.vmm")
log.addFilter(Sparing())
