"""The host's end of a VM's ports: sockets to QEMU, and bytes passed on as they come."""

from __future__ import annotations

import os
import selectors
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from vhostctl.lab.compose import PORTS

Sink = Callable[[bytes], object]
"""Takes bytes as they arrive."""

_CHUNK = 65_536
_TAIL_LINES = 100


def discard(_data: bytes) -> None:
    """Be a sink for what nobody wants."""


@dataclass(frozen=True)
class Wires:
    """Where a command's streams lead: `stdin` is a descriptor, None for an empty input.

    `console` gets what the kernel says.
    """

    stdin: int | None
    stdout: Sink
    stderr: Sink
    console: Sink | None


class Ports:
    """A socket pair for each port: `ours` by name, and the descriptors that QEMU inherits."""

    def __init__(self) -> None:
        pairs = {name: socket.socketpair() for name in PORTS}
        self.ours = {name: pair[0] for name, pair in pairs.items()}
        self._theirs = {name: pair[1] for name, pair in pairs.items()}
        for end in self.ours.values():
            end.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        for end in (*self.ours.values(), *self._theirs.values()):
            end.close()

    @property
    def inherited(self) -> dict[str, int]:
        """QEMU's ends, as descriptors by name."""
        return {name: end.fileno() for name, end in self._theirs.items()}

    def hand_over(self) -> None:
        """Close QEMU's ends here, so that its death is seen on ours."""
        for end in self._theirs.values():
            end.close()


class MarkedStream:
    """Passes bytes to `sink` until a marker comes.

    Nothing is held back but the start of what may turn out to be the marker.
    """

    def __init__(self, sink: Sink, marker: bytes) -> None:
        self._sink = sink
        self._marker = marker
        self._held = b""
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self.ended:
            return
        data = self._held + data
        at = data.find(self._marker)
        self.ended = at >= 0
        keep = 0 if self.ended else self._overlap(data)
        passed = data[:at] if self.ended else data[: len(data) - keep]
        self._held = data[len(data) - keep :]
        if passed:
            self._sink(passed)

    def flush(self) -> None:
        """Pass on what was held back: no marker will come any more."""
        held, self._held = self._held, b""
        if held:
            self._sink(held)

    def _overlap(self, data: bytes) -> int:
        """Return how many of the last bytes are the marker's first."""
        longest = min(len(data), len(self._marker) - 1)
        return next((n for n in range(longest, 0, -1) if data.endswith(self._marker[:n])), 0)


class Console:
    """Remembers the last lines of the kernel's console, and passes it all on to `sink`."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._lines: deque[bytes] = deque([b""], _TAIL_LINES)

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._sink(data)
        first, *rest = data.split(b"\n")
        self._lines[-1] += first
        self._lines.extend(rest)

    def tail(self) -> list[str]:
        """Return the last lines that hold something."""
        lines = (line.decode(errors="replace").strip() for line in self._lines)
        return [line for line in lines if line]


class Feed:
    """Passes what can be read from a descriptor to a socket, and its end with it.

    `source` may be a regular file. It is read only when the last bytes were taken.
    """

    def __init__(self, source: int, port: socket.socket, selector: selectors.BaseSelector) -> None:
        self._source = source
        self._port = port
        self._selector = selector
        self._pending = b""

    def start(self) -> None:
        """Begin to read."""
        self._selector.register(self._source, selectors.EVENT_READ, self._read)

    def _read(self) -> None:
        self._selector.unregister(self._source)
        self._pending = os.read(self._source, _CHUNK)
        if self._pending:
            self._selector.register(self._port, selectors.EVENT_WRITE, self._write)
        else:
            # Not a close: QEMU drops what it has not read of a connection that hung up.
            self._port.shutdown(socket.SHUT_WR)

    def _write(self) -> None:
        try:
            sent = self._port.send(self._pending)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            sent = len(self._pending)
        self._pending = self._pending[sent:]
        if not self._pending:
            self._selector.unregister(self._port)
            self.start()


def read_some(fd: int) -> bytes | None:
    """Return what can be read without waiting: None for nothing yet, no bytes at the end."""
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""
