"""SIGINT and SIGTERM for a command that ends where it chooses to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vhostctl.cli.exitcodes import ExitCode
from vhostctl.errors import VhostctlError
from vhostctl.host.eventfd import EventFd

_ENDING = (signal.SIGINT, signal.SIGTERM)
_INSISTED = 3


class Interrupts:
    """Which signal came first, if any; `event` is readable from then on."""

    def __init__(self, event: EventFd) -> None:
        self.event = event
        self._seen: list[int] = []

    def take(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; only the third one raises, for something waits that should not."""
        self._seen.append(number)
        self.event.signal()
        if len(self._seen) >= _INSISTED:
            self.check()

    def check(self) -> None:
        """Raise, if a signal came, what it would have raised: KeyboardInterrupt or SystemExit."""
        if self._seen:
            if self._seen[0] == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(ExitCode.TERMINATED)

    @property
    def came(self) -> bool:
        """Whether there was one."""
        return bool(self._seen)


@contextmanager
def taken() -> Iterator[Interrupts]:
    """Take SIGINT and SIGTERM within the block, where they raise nothing; behind one, for good.

    An exception at any moment would now and then come between the taking of a lock and the
    block that gives it back, and what has many threads then never ends. A VhostctlError that
    comes after a signal, which may be why, gives way to the signal's exception.
    """
    before = {number: signal.getsignal(number) for number in _ENDING}
    with EventFd.create("interrupts") as event:
        interrupts = Interrupts(event)
        try:
            for number in _ENDING:
                signal.signal(number, interrupts.take)
            yield interrupts
        except VhostctlError:
            interrupts.check()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if interrupts.came else handler)
