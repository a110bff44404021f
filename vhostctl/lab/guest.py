"""The conversation with a booted VM: its output, its exit status, its end."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Self

from vhostctl.errors import VhostctlError
from vhostctl.lab.relay import Console, Feed, MarkedStream, Ports, Wires, discard, read_some

_DRAIN_SECONDS = 30.0
"""How long the rest of the output may pause once the exit status is known."""

# What tells most about a VM's end, best first.
_TELLING = ("Kernel panic", "BUG:", "lab init:", "qemu-system")


class LostMachineError(VhostctlError):
    """A VM ended, or never came up, without saying how its command did.

    `started` says whether the guest had come up; `console` is the end of what its kernel said.
    """

    def __init__(self, message: str, *, started: bool, console: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.started = started
        self.console = console


class TimeLimitError(VhostctlError):
    """A VM took longer than it was given."""


class Guest:
    """A VM that QEMU has just been started for; a context manager.

    `ports` were handed over to it. `wires` is None if QEMU has the terminal.
    """

    def __init__(
        self, qemu: subprocess.Popen[bytes], ports: Ports, wires: Wires | None, marker: bytes
    ) -> None:
        # Not epoll: stdin may be a regular file.
        self._selector = selectors.PollSelector()
        self._ports = ports
        self._control = b""
        self._up = False
        self._status: int | None = None
        self._ended = False
        self._heard = time.monotonic()
        self._console = Console((wires and wires.console) or discard)
        self._readers: dict[int, Callable[[bytes], None]] = {}
        self._streams: list[MarkedStream] = []
        self._feed: Feed | None = None
        self._exit = os.pidfd_open(qemu.pid)
        self._selector.register(self._exit, selectors.EVENT_READ, self._qemu_ended)
        self._listen(ports.ours["control"].fileno(), self._take_control)
        if wires is None:
            return
        if qemu.stdout is not None:
            os.set_blocking(qemu.stdout.fileno(), False)
            self._listen(qemu.stdout.fileno(), self._console.feed)
        for name, sink in (("stdout", wires.stdout), ("stderr", wires.stderr)):
            stream = MarkedStream(sink, marker)
            self._streams.append(stream)
            self._listen(ports.ours[name].fileno(), stream.feed)
        if wires.stdin is not None:
            self._feed = Feed(wires.stdin, ports.ours["stdin"], self._selector)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._selector.close()
        os.close(self._exit)

    def converse(self, deadline: float | None, up_within: float | None) -> int:
        """Pass bytes on until the VM is done, and return its command's exit status.

        `deadline` is on time.monotonic()'s clock. Raises TimeLimitError when it has passed, and
        LostMachineError when the VM ends without a status, or is not up after `up_within` seconds.
        """
        started = time.monotonic()
        while not self._done():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                self._flush()
                raise TimeLimitError(f"the time limit was reached {self._where()}")
            if up_within is not None and not self._up and now >= started + up_within:
                raise LostMachineError(f"not up after {up_within:g} s", started=False)
            for key, _ in self._selector.select(self._patience(now, deadline, up_within)):
                key.data()
        for fd in list(self._readers):
            self._receive(fd)  # what the console said last
        self._flush()
        if self._status is None:
            raise self._lost()
        return self._status

    def _patience(self, now: float, deadline: float | None, up_within: float | None) -> float:
        """Return for how many seconds at most nothing needs to be looked at."""
        limits = [1.0 if self._status is not None or up_within is not None else 60.0]
        if deadline is not None:
            limits.append(max(0.0, deadline - now))
        return min(limits)

    def _done(self) -> bool:
        if self._ended:
            return True
        if self._status is None:
            return False
        drained = all(stream.ended for stream in self._streams)
        return drained or time.monotonic() > self._heard + _DRAIN_SECONDS

    def _listen(self, fd: int, take: Callable[[bytes], None]) -> None:
        self._readers[fd] = take
        self._selector.register(fd, selectors.EVENT_READ, partial(self._receive, fd))

    def _receive(self, fd: int) -> bool:
        """Read once; say whether there may be more."""
        if fd not in self._readers:
            return False
        data = read_some(fd)
        if data:
            self._heard = time.monotonic()
            self._readers[fd](data)
        elif data is not None:
            self._selector.unregister(fd)
            del self._readers[fd]
        return bool(data)

    def _take_control(self, data: bytes) -> None:
        *lines, self._control = (self._control + data).split(b"\n")
        for line in lines:
            word, _, argument = line.partition(b" ")
            if word == b"up":
                self._up = True
                if self._feed is not None:
                    self._feed.start()
            elif word == b"exit":
                self._status = int(argument)

    def _qemu_ended(self) -> None:
        """Read what QEMU left in the sockets."""
        for fd in list(self._readers):
            while self._receive(fd):
                pass
        self._ended = True

    def _flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def _where(self) -> str:
        return "while the command ran" if self._up else "while the kernel booted"

    def _lost(self) -> LostMachineError:
        lines = self._console.tail()
        telling = [line for word in _TELLING for line in lines if word in line]
        reason = (telling or lines[-1:] or ["its console says nothing"])[0]
        return LostMachineError(
            f"the VM was lost {self._where()}: {reason}", started=self._up, console=tuple(lines)
        )
