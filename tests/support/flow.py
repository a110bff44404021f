"""Numbered, checked datagrams both ways over a wire, in the background."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Self

from vhostctl.jobs.hosttraffic import PATIENCE, WINDOW
from vhostctl.jobs.traffic import Traffic
from vhostctl.jobs.wire import Wire


class Flow:
    """Datagrams over all pairs of `wire`, as fast as they are taken, in a with block.

    A window of them is under way at a time, so that none need be lost: what is missing at the
    end was dropped by somebody. `windows` counts those that went both ways.
    """

    def __init__(self, wire: Wire) -> None:
        self.windows = 0
        self._wire = wire
        self._stack = ExitStack()
        self._background = ExitStack()

    def _progress(self, datagrams: float) -> None:
        self.windows += int(datagrams) // (2 * WINDOW)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._traffic = stack.enter_context(Traffic(self._wire, self._wire.driver.pairs))
            self._traffic.ping()
            self._running = self._traffic.in_background(self._progress)
            self._background.enter_context(self._running)
            stack.push(self._background)
            self.go_on()
            self._stack = stack.pop_all()
        return self

    def go_on(self, windows: int = 1) -> None:
        """Wait until `windows` more have gone both ways."""
        goal, deadline = self.windows + windows, time.monotonic() + 2 * PATIENCE
        while self.windows < goal:
            self._running.check()
            assert time.monotonic() < deadline, f"{self.windows} windows, not {goal}"
            time.sleep(0.001)

    def end(self) -> list[str]:
        """Let the last window come and start no more; return what went wrong, a line each."""
        self._background.close()
        errors = sum(self._wire.session.ring_errors())
        return self._traffic.problems() + [f"{errors} ring errors"] * bool(errors)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
