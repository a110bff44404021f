"""Numbered datagrams through a rig: to the guest and back, and from the guest."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable
from typing import Self

from tests.support.load_rig import GUEST, HOST, Rig
from vhostctl.guest.endpoint import Endpoint, Peer
from vhostctl.guest.streams import Stream
from vhostctl.host.closing import Closing

PORT = 7000
FLOWS = 16
BURST = 32  # datagrams that one system call sends
SIZES = (64, 400, 1472)  # bytes of their payload, which change from burst to burst
ROOM = 256 << 10  # bytes that a socket holds: what it has is read before a test can end
_TO_HOST, _FROM_GUEST = 7100, 7200  # UDP ports, plus the pair's number
_WINDOW = 512  # datagrams of the guest's own that may be under way
_LANE_ROOM = 4 << 20  # bytes, for that window
_SOL_UDP, _UDP_SEGMENT, _SO_RCVBUFFORCE = 17, 103, 33  # linux/udp.h, asm-generic/socket.h


def _size(number: int) -> int:
    return SIZES[number // BURST % len(SIZES)]


def payload(number: int) -> bytes:
    return struct.pack("<Q", number) + number.to_bytes(4, "little") * ((_size(number) - 8) // 4)


def _socket(port: int, room: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, room)
    sock.bind((HOST, port))
    return sock


class Lane:
    """Datagrams that the guest sends on one pair: none is lost, and they come in order."""

    def __init__(self, rig: Rig, pair: int) -> None:
        self._rig = rig
        self._pair = pair
        self._lock = threading.Lock()
        self._endpoint: Endpoint | None = None
        self._runs = 0
        self.socket = rig.namespace.run(lambda: _socket(_TO_HOST + pair, _LANE_ROOM))
        self.came = 0
        self.position = 0
        self.changed = 0

    def begin(self, endpoint: Endpoint) -> None:
        """Have `endpoint`, which is not running, send a stream of its own."""
        self._runs += 1
        self._stream = Stream.for_mtu(1500, ipv6=False, number=self._runs << 8 | self._pair)
        peer = Peer(self._rig.mac(), _TO_HOST + self._pair, HOST)
        endpoint.generate(self._stream, peer, _FROM_GUEST + self._pair)
        self.position = 0
        self._endpoint = endpoint
        endpoint.goal = _WINDOW

    def take(self, data: bytes) -> None:
        """Check the next datagram, and let the guest send on."""
        if data != self._stream.payload(self.position):
            self.changed += 1
            return
        self.came += 1
        self.position += 1
        if self.position % (_WINDOW // 4) == 0:
            with self._lock:
                if self._endpoint is not None:
                    self._endpoint.goal = self.position + _WINDOW

    def end(self) -> None:
        """Have the guest send no more; what it sent may still be under way."""
        with self._lock:
            endpoint, self._endpoint = self._endpoint, None
            if endpoint is not None:
                endpoint.goal = 0


class Flows(Closing):
    """Numbered datagrams to the guest, in bursts over `flows` flows, and their echoes.

    A context manager that sends from `start()` on; its exit ends that and the listening.
    """

    def __init__(self, rig: Rig, flows: int = FLOWS, lanes: tuple[Lane, ...] = ()) -> None:
        """Listen to `lanes` as well."""
        self._rig = rig
        self._flows = flows
        self._sockets: list[socket.socket] = []
        self._senders: list[socket.socket] = []
        self._takers: dict[int, tuple[socket.socket, Callable[[bytes], None]]] = {}
        self._poll = select.epoll()
        self._ended = threading.Event()
        self._closed = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="echoes")
        self._talker = threading.Thread(target=self._talk, name="flows")
        self.sent = 0
        self.echoed = array("Q")
        self.changed = 0
        for lane in lanes:
            self._listen_on(lane.socket, lane.take)

    def _listen_on(self, sock: socket.socket, take: Callable[[bytes], None]) -> None:
        self._sockets.append(sock)
        self._takers[sock.fileno()] = sock, take
        self._poll.register(sock.fileno(), select.EPOLLIN)

    def renew(self) -> None:
        """Go on with flows that nobody has seen yet: a tap keeps a known one where it is."""
        fresh = self._rig.namespace.run(lambda: [self._open() for _ in range(self._flows)])
        for sock in fresh:
            self._listen_on(sock, self._take)
        self._senders = fresh

    def _open(self) -> socket.socket:
        sock = _socket(0, ROOM)
        sock.connect((GUEST, PORT))
        return sock

    def burst(self, bursts: int = 1) -> None:
        """Send so many bursts on each flow."""
        for _ in range(bursts):
            for sock in self._senders:
                first = self.sent
                self.sent += BURST
                segment = (_SOL_UDP, _UDP_SEGMENT, struct.pack("H", _size(first)))
                sock.sendmsg([payload(first + n) for n in range(BURST)], [segment])

    def _talk(self) -> None:
        while not self._ended.is_set():
            self.burst()

    def _listen(self) -> None:
        while not self._closed.is_set():
            for number, _ in self._poll.poll(0.05):
                self._receive(*self._takers[number])

    @staticmethod
    def _receive(sock: socket.socket, take: Callable[[bytes], None]) -> None:
        for _ in range(256):
            try:
                data = sock.recv(2048, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            take(data)

    def _take(self, data: bytes) -> None:
        number = int.from_bytes(data[:8], "little")
        if number < self.sent and data == payload(number):
            self.echoed.append(number)
        else:
            self.changed += 1

    def repeated(self) -> int:
        """Return how many datagrams came back more than once."""
        seen = bytearray(self.sent)
        for number in self.echoed:
            seen[number] = 1
        return len(self.echoed) - seen.count(1)

    def start(self) -> None:
        """Send at full speed from now on."""
        self._talker.start()

    def stop(self) -> None:
        """Send no more."""
        self._ended.set()
        if self._talker.ident:
            self._talker.join()

    def wait_settled(self, lost: int, seconds: float = 120) -> int:
        """Wait until all came back but `lost` and what UDP dropped; return how many did not."""
        deadline = time.monotonic() + seconds
        while (missing := self.sent - len(self.echoed)) > lost + self._rig.udp().errors:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return missing

    def __enter__(self) -> Self:
        self.renew()
        self._listener.start()
        return self

    def close(self) -> None:
        """Send no more, and listen no more."""
        self.stop()
        self._closed.set()
        self._listener.join()
        self._poll.close()
        for sock in self._sockets:
            sock.close()
