"""A guest loop in a thread of its own."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Protocol, Self


class Stoppable(Protocol):
    """What guest/pump.py and guest/endpoint.py offer."""

    def run(self) -> object:
        """Run until stopped."""

    def stop(self) -> None:
        """End the run; from any thread."""


class Running:
    """Runs `loop` from entry to exit of a with block; on exit its error is raised.

    `tid` is the kernel's number of the thread, for its CPU time.
    """

    def __init__(self, loop: Stoppable, name: str) -> None:
        self._loop = loop
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name)

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as error:  # noqa: BLE001 -- it is raised where the thread is joined
            self._error = error

    @property
    def tid(self) -> int:
        """The thread's number; valid inside the with block."""
        return self._thread.native_id or 0

    @property
    def alive(self) -> bool:
        """Whether the loop goes on."""
        return self._thread.is_alive()

    def check(self) -> None:
        """Raise the loop's error if it ended with one."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        try:
            # An interrupt inside start() would leave a thread that nobody knows of.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                self._thread.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException:
            self._end()
            raise
        return self

    def _end(self) -> None:
        """Stop and join, whatever comes: the loop uses memory that goes after this."""
        self._loop.stop()
        interrupt: BaseException | None = None
        while self._thread.is_alive():
            try:
                self._thread.join()
            except (KeyboardInterrupt, SystemExit) as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()
        if error is None:
            self.check()
