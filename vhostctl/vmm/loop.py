"""One thread that waits for descriptors and calls device models under the machine's lock."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vhostctl.errors import ClosedError, InvalidArgument, StateError, kernel_error
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd

log = logging.getLogger(__name__)


def _log_error(error: BaseException) -> None:
    log.error("a callback of the VMM's loop failed", exc_info=error)


@dataclass(frozen=True, slots=True, eq=False)
class _Watch:
    callback: Callable[[], None]
    since: int


class Loop(Closing):
    """Calls back, from a thread of its own, when descriptors are readable (epoll(7)).

    Each callback runs under `lock`, one at a time. All methods are for any thread. `watch`
    and `unwatch` take the lock: after `unwatch` the callback neither runs nor will run.
    """

    def __init__(
        self,
        lock: threading.RLock,
        on_error: Callable[[BaseException], None] = _log_error,
        name: str = "vmm loop",
    ) -> None:
        """Start the thread; `on_error` gets, under the lock, what a callback raises.

        Raises KernelError (EMFILE, ENFILE, ENOMEM, EAGAIN: no more threads).
        """
        self._lock = lock
        self._on_error = on_error
        self._watched: dict[int, _Watch] = {}
        self._soon: deque[Callable[[], None]] = deque()
        self._round = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        with contextlib.ExitStack() as undo:
            self._wake = undo.enter_context(EventFd.create(f"{name} wake"))
            try:
                self._epoll = undo.enter_context(select.epoll())
                self._epoll.register(self._wake.fileno(), select.EPOLLIN)
            except OSError as error:
                raise kernel_error(error.errno or 0, "epoll_create", name) from error
            try:
                self._thread.start()
            except RuntimeError as error:
                raise kernel_error(errno.EAGAIN, "pthread_create", name) from error
            undo.pop_all()

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is readable, hung up or broken, until `unwatch(fd)`.

        Raises InvalidArgument if it is watched already, KernelError (EPERM for a file, which
        epoll(7) does not take) and ClosedError after `stop()`.
        """
        with self._lock:
            if self._stopping:
                raise ClosedError("the loop was stopped")
            if fd in self._watched:
                raise InvalidArgument(f"descriptor {fd} is watched already", hint="unwatch it")
            try:
                self._epoll.register(fd, select.EPOLLIN)
            except OSError as error:
                raise kernel_error(error.errno or 0, "epoll_ctl", f"descriptor {fd}") from error
            self._watched[fd] = _Watch(callback, self._round)

    def unwatch(self, fd: int) -> None:
        """Call back no more for `fd`, which may be closed afterwards; nothing if not watched."""
        with self._lock:
            if self._watched.pop(fd, None) is not None and not self._epoll.closed:
                with contextlib.suppress(OSError):  # closed already
                    self._epoll.unregister(fd)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, from the loop's thread; never if `stop()` comes before."""
        with self._lock:
            if not self._stopping:
                self._soon.append(callback)
                self._wake.signal()

    def stop(self) -> None:
        """End the thread and wait for it; nothing is called any more. A second call does nothing.

        The caller does not hold the lock, which a callback may be waiting for. Raises
        StateError from a callback.
        """
        if threading.current_thread() is self._thread:
            raise StateError("the loop cannot wait for itself", hint="stop it from another thread")
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._wake.signal()
        self._thread.join()
        with self._lock:
            self._watched.clear()
            self._soon.clear()
            self._epoll.close()
            self._wake.close()

    def close(self) -> None:
        """As `stop()`."""
        self.stop()

    def _run(self) -> None:
        while not self._stopping:
            self._round += 1
            for fd, _ in self._epoll.poll():
                if fd == self._wake.fileno():
                    self._wake.drain()
                else:
                    self._call_watch(fd)
            for _ in range(len(self._soon)):
                self._call(self._soon.popleft())

    def _call_watch(self, fd: int) -> None:
        with self._lock:
            watch = self._watched.get(fd)
            # What was readable may have been another file of the same number: a watch that
            # is younger than this round waits for the next one.
            if watch is not None and watch.since < self._round:
                self._call(watch.callback)

    def _call(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if self._stopping:
                return
            try:
                callback()
            except BaseException as error:  # noqa: BLE001 -- the thread serves other devices
                self._on_error(error)
