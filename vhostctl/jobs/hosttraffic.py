"""The host's end of the selftest: its own network stack, through ordinary sockets."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from vhostctl.guest.streams import Stream

T = TypeVar("T")


class InNamespace(Protocol):
    """Runs a function where the tap is, and returns what it returns."""

    def __call__(self, function: Callable[[], T], /) -> T:
        """Return function()."""


PATIENCE = 30
"""Seconds without a frame after which what is missing counts as lost."""

WINDOW = 64
"""Datagrams under way in one direction: far below what a tap and a socket can queue."""

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_RECEIVE_BUFFER = 4 << 20
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_PING_GROUPS = Path("/proc/sys/net/ipv4/ping_group_range")
_ECHO = {4: (socket.IPPROTO_ICMP, 8, 0), 6: (socket.IPPROTO_ICMPV6, 128, 129)}


class HostSockets:
    """Sockets in the tap's namespace; `in_namespace` is where they are opened."""

    def __init__(self, in_namespace: InNamespace) -> None:
        """Let the namespace open ping sockets (ip-sysctl: ping_group_range)."""
        self._in_namespace = in_namespace
        in_namespace(lambda: _PING_GROUPS.write_text("0 2147483647"))

    def _open(self, version: int, protocol: int = 0) -> socket.socket:
        family = _FAMILIES[version]
        sock = self._in_namespace(lambda: socket.socket(family, socket.SOCK_DGRAM, protocol))
        # Bounded by the kernel, unlike settimeout(): one system call a datagram, not two.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
        return sock

    def ping(self, version: int, address: str, sizes: list[int]) -> int:
        """Send echo requests of the payload `sizes`; return how many came back whole."""
        protocol, request, reply = _ECHO[version]
        answered = 0
        with self._open(version, protocol) as sock:
            sock.connect((address, 0))
            for sequence, size in enumerate(sizes):
                body = struct.pack("!H", sequence) + bytes(i & 0xFF for i in range(size))
                sock.send(struct.pack("!BBHH", request, 0, 0, 0) + body)
                try:
                    answer = sock.recv(1 << 16)
                except BlockingIOError:
                    break  # as long as this took, nothing will come
                answered += answer[0] == reply and answer[6:] == body
        return answered

    def sender(self, version: int, address: str, port: int) -> socket.socket:
        """Return a UDP socket that sends to `address`, from a port that the kernel picks."""
        sock = self._open(version)
        try:
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def receiver(self, version: int, address: str, port: int) -> socket.socket:
        """Return a UDP socket bound to `address` that can hold a window of datagrams."""
        sock = self._open(version)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            sock.bind((address, port))
        except BaseException:
            sock.close()
            raise
        return sock


@dataclass(slots=True)
class Tally:
    """What became of a stream: datagrams sent, how many came (`frames`), payload `bytes`."""

    sent: int = 0
    frames: int = 0
    bytes: int = 0
    changed: int = 0

    @property
    def lost(self) -> int:
        """Datagrams that were sent and did not come."""
        return self.sent - self.frames


class StreamReceiver:
    """Checks a stream that comes out of the guest, datagram by datagram, into `tally`."""

    def __init__(self, stream: Stream, sockets: dict[int, socket.socket], tally: Tally) -> None:
        self._stream = stream
        self._sockets = sockets
        self._tally = tally
        self._position = 0
        self._settled: set[int] = set()  # ahead of the position: came already, or never will

    def receive(self, until: int) -> bool:
        """Take datagrams up to number `until`; False if they stopped coming."""
        while self._position < until:
            if self._position not in self._settled:
                try:
                    data = self._sockets[self._stream.version(self._position)].recv(1 << 16)
                except BlockingIOError:
                    return False
                self._tally.frames += 1
                self._tally.bytes += len(data)
                if data != self._stream.payload(self._position):
                    self._resynchronise(data)
            self._settled.discard(self._position)
            self._position += 1
        return True

    def _resynchronise(self, data: bytes) -> None:
        """Find `data` among the next datagrams of its family; those between are lost."""
        version = self._stream.version(self._position)
        ahead = range(self._position, self._position + WINDOW)
        family = [k for k in ahead if self._stream.version(k) == version]
        for number, k in enumerate(family):
            if data == self._stream.payload(k):
                self._settled.update(family[: number + 1])
                return
        self._tally.changed += 1
