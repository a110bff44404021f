"""SIGINT and SIGTERM for a command that ends where it chooses to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vhostctl.cli.exitcodes import ExitCode
from vhostctl.host.eventfd import EventFd

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Which signal came first, if any; `event` is readable from then on."""

    def __init__(self, event: EventFd) -> None:
        self.event = event
        self._first: int | None = None

    def take(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal, and raise nothing: see `taken()`."""
        if self._first is None:
            self._first = number
        self.event.signal()

    def check(self) -> None:
        """Raise, if a signal came, what it would have raised: KeyboardInterrupt or SystemExit."""
        if self._first == signal.SIGINT:
            raise KeyboardInterrupt
        if self._first is not None:
            raise SystemExit(ExitCode.TERMINATED)


@contextmanager
def taken() -> Iterator[Interrupts]:
    """Take SIGINT and SIGTERM within the block, where they raise nothing.

    An exception at any moment would now and then come between the taking of a lock and the
    block that gives it back, and what has many threads then never ends.
    """
    with EventFd.create("interrupts") as event:
        interrupts = Interrupts(event)
        before = {number: signal.getsignal(number) for number in _ENDING}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupts.take)
        try:
            yield interrupts
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
