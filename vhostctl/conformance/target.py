"""What a case gets: devices to ask, and a place for what it saw."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Protocol, TypeVar

from vhostctl.conformance.flags import Flags
from vhostctl.conformance.report import Difference
from vhostctl.errors import ClosedError, InvalidArgument, KernelError
from vhostctl.host.closing import Closing
from vhostctl.host.vhost import VhostNet

PATIENCE = 60.0
"""Seconds that `Target.wait` gives an event: emulated machines are slow, loaded ones slower."""

_PAUSE = 0.002
_NO_DESCRIPTOR = -2  # -1 would unbind


class Closable(Protocol):
    """A file, a socket, anything of vhostctl.host."""

    def close(self) -> object:
        """Give up what it holds."""


Owned = TypeVar("Owned", bound=Closable)


class Target(Closing):
    """The device under test, for one case; closing it closes all that the case opened."""

    def __init__(self, opener: Callable[[], VhostNet], flags: Flags) -> None:
        self._opener = opener
        self._kept = ExitStack()
        self._open = ExitStack()
        self._devices: list[VhostNet] = []
        self.flags = flags
        self.observed: dict[str, object] = {}
        self.mismatches: list[Difference] = []

    def open(self) -> VhostNet:
        """Return a fresh device, which the end of the case closes if nobody did before."""
        device = self._opener()
        self._open.callback(device.close)
        self._devices.append(device)
        return device

    def keep(self, owned: Owned) -> Owned:
        """Return `owned`, which the end of the case closes, after every device."""
        self._kept.callback(owned.close)
        return owned

    def check(self, what: str, got: object, want: object) -> None:
        """Record the observation `what`; it is a mismatch if `got` is not `want`.

        Both are what JSON can say. Raises InvalidArgument if the case has used `what` before.
        """
        if what in self.observed:
            raise InvalidArgument(f"two observations are called {what!r}")
        got, want = json.loads(json.dumps([got, want]))
        self.observed[what] = got
        if got != want:
            self.mismatches.append(Difference(what, got, want))

    def refused(self, call: Callable[[], object]) -> str:
        """Return the name of the errno that `call` is refused with, or "" if it worked."""
        try:
            call()
        except OSError as error:
            number = error.errno or 0
            if number == errno.EOPNOTSUPP:
                return "EOPNOTSUPP"  # Linux has one number for it and ENOTSUP
            return errno.errorcode.get(number, str(number))
        return ""

    def wait(self, predicate: Callable[[], bool], what: str) -> bool:
        """Wait for `predicate`, at most `PATIENCE` seconds; that it never came is a mismatch."""
        deadline = time.monotonic() + PATIENCE
        while not predicate():
            if time.monotonic() > deadline:
                self.observed[what] = False
                self.mismatches.append(Difference(what, got=False, want=True))
                return False
            time.sleep(_PAUSE)
        return True

    def settle(self) -> None:
        """Return when every open device has done the work that was queued before.

        SET_LOG_FD waits for the worker whether it succeeds or not, and with a number that
        is no descriptor it changes nothing.
        """
        for device in self._devices:
            with suppress(KernelError, ClosedError):
                device.set_log_fd(_NO_DESCRIPTOR)

    def close(self) -> None:
        """Close every device, the last first, and then what was kept."""
        with self._kept:
            self._open.close()
