"""A guest's serial port on this process's terminal, or whatever stdin and stdout are."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import termios
import tty
from collections.abc import Callable

from vhostctl.host.closing import Closing
from vhostctl.vmm.loop import Loop
from vhostctl.vmm.serial import Serial

_ESCAPE = 1  # Ctrl-A, as in QEMU and screen
_LEAVE = ord("x")
_PATIENCE_MS = 1000
_CHUNK = 4096
_ENOUGH = 1 << 16  # bytes


class Output:
    """Writes what a guest sends to `fd`, which stays the caller's.

    A reader that takes nothing for a second loses what comes until it reads again: the guest
    waits for nobody.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._patience = _PATIENCE_MS
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, data: bytes) -> None:
        """Write a few bytes at most; never raises because of the reader."""
        if not self._poll.poll(self._patience):
            self._patience = 0
            return
        self._patience = _PATIENCE_MS
        with contextlib.suppress(OSError):  # the reader has gone
            os.write(self._fd, data)


class Console(Closing):
    """Hands what is typed to a guest's port; a terminal is in raw mode until `close()`.

    Ctrl-A x calls `leave`, Ctrl-A Ctrl-A sends one Ctrl-A. While 64 KiB wait for the guest no
    more is read; from a terminal it is, for Ctrl-A x, and what else there is is lost.
    """

    def __init__(self, fd: int, loop: Loop, port: Serial, leave: Callable[[], None]) -> None:
        """Read `fd`, which stays the caller's; a plain file is not read. Raises KernelError."""
        self._fd = fd
        self._loop = loop
        self._port = port
        self._leave = leave
        self._escaped = False
        self._closed = False
        self._terminal = os.isatty(fd)
        self._before: list[object] | None = None
        # A signal may end the process ahead of the caller's `with`, or within `close()`.
        atexit.register(self._restore)
        try:
            if self._terminal:
                self._before = termios.tcgetattr(fd)
                tty.setraw(fd)
            # epoll(7) does not take files, which have everything at once and no guest to read it.
            with contextlib.suppress(PermissionError):
                self._watch()
        except BaseException:
            self.close()
            raise

    def _watch(self) -> None:
        self._port.drained = None
        if not self._closed:
            self._loop.watch(self._fd, self._read)

    def _read(self) -> None:
        if self._closed:  # what comes now is for whoever is next
            return
        try:
            data = os.read(self._fd, _CHUNK)
        except OSError:
            data = b""
        if not data:
            self._loop.unwatch(self._fd)
            return
        passed = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == _LEAVE:
                    self._leave()
                    continue
                passed.append(byte)
            elif byte == _ESCAPE:
                self._escaped = True
            else:
                passed.append(byte)
        if passed and not (self._terminal and self._full):
            self._port.input(bytes(passed))
        if self._full and not self._terminal:
            self._loop.unwatch(self._fd)
            self._port.drained = self._watch

    @property
    def _full(self) -> bool:
        return self._port.waiting >= _ENOUGH

    def close(self) -> None:
        """Read no more, and have the terminal as it was; a second call does nothing."""
        self._closed = True
        self._restore()
        atexit.unregister(self._restore)
        self._loop.unwatch(self._fd)

    def _restore(self) -> None:
        if self._before is not None:
            with contextlib.suppress(termios.error):  # it hung up
                # Not to wait for it: nobody may read.
                termios.tcsetattr(self._fd, termios.TCSANOW, self._before)  # type: ignore[arg-type]
            self._before = None
