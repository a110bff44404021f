"""Pairs on a multi-queue tap without a session, and numbered flows through them."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyroute2

from vhostctl.abi import tun, virtio
from vhostctl.control.session import Session
from vhostctl.control.wiring import SessionConfig
from vhostctl.guest.driver import NetDriver
from vhostctl.guest.endpoint import Endpoint
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import RX
from vhostctl.jobs.running import Running

FEATURES = 1 << virtio.VIRTIO_F_VERSION_1 | 1 << virtio.VIRTIO_NET_F_MRG_RXBUF
PAIRS = 4
SIZE = 256
HOST, GUEST = "192.0.2.1", "192.0.2.2"
MAC = bytes.fromhex("020000000002")
PORT = 7000
FLOWS = 16
BURST = 32  # datagrams that one system call sends
PAYLOAD = 64
_SOL_UDP, _UDP_SEGMENT, _SO_RCVBUFFORCE = 17, 103, 33  # linux/udp.h, asm-generic/socket.h
_PERMANENT = 0x80  # NUD_PERMANENT of linux/neighbour.h


class Rig:
    """`PAIRS` pairs on the tap tap0 of a namespace, running; a context manager.

    Nothing but what a test sends goes to the guest: there is no IPv6 and no ARP.
    """

    def __init__(self, namespace: NetNamespace, device: str) -> None:
        self.namespace = namespace
        self._stack = ExitStack()
        try:
            self._make(device)
        except BaseException:
            self._stack.close()
            raise

    def _make(self, device: str) -> None:
        enter = self._stack.enter_context
        config = SessionConfig("tap0", device, queues=PAIRS, queue_size=SIZE, memory_size=16 << 20)
        config = replace(config, driver=FEATURES)
        open_tap = partial(self.namespace.run, partial(Tap.open, "tap0", PAIRS))
        self.session = enter(Session(config, open_tap=open_tap))
        assert self.session.tap is not None
        self.tap = self.session.tap
        self.tap.queues[0].set_offload(tun.TUN_F_CSUM)  # for bursts of UDP
        self.namespace.run(self._set_up_link)
        self.driver = enter(
            NetDriver(self.session, self.session.pairs, self.session.features, self.session.arena)
        )
        self.session.start()

    def _set_up_link(self) -> None:
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        with pyroute2.IPRoute() as route:
            index = socket.if_nametoindex("tap0")
            route.link("set", index=index, state="up")
            route.addr("add", index=index, address=HOST, prefixlen=24)
            route.neigh("add", dst=GUEST, lladdr=MAC.hex(":"), ifindex=index, state=_PERMANENT)

    def guest(self, *pairs: int) -> ExitStack:
        """Return a running echo on `pairs`, all if there are none named."""
        stack = ExitStack()
        try:
            for pair in pairs or range(PAIRS):
                station = stack.enter_context(Endpoint(self.driver.pairs[pair], MAC, GUEST))
                self.driver.pairs[pair].start()
                stack.enter_context(Running(station, f"guest {pair}"))
        except BaseException:
            stack.close()
            raise
        return stack

    def link(self) -> Any:
        """Return what netlink says of the tap."""
        with pyroute2.IPRoute() as route:
            return route.get_links(socket.if_nametoindex("tap0"))[0]

    def dropped(self) -> int:
        """Return the frames that the tap had no room for."""
        stats = self.namespace.run(self.link).get_attr("IFLA_STATS64")
        return int(stats["tx_dropped"])

    def tap_queues(self) -> tuple[int, int]:
        """Return how many queues of the tap are enabled and disabled, as the kernel says."""
        data = self.namespace.run(self.link).get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_DATA")
        return (
            int(data.get_attr("IFLA_TUN_NUM_QUEUES")),
            int(data.get_attr("IFLA_TUN_NUM_DISABLED_QUEUES") or 0),
        )

    def udp_errors(self) -> int:
        """Return the datagrams that the host's sockets had no room for."""
        lines = self.namespace.run(Path("/proc/thread-self/net/snmp").read_text).splitlines()
        names, values = (line.split() for line in lines if line.startswith("Udp:"))
        return int(values[names.index("InErrors")])

    def base(self, pair: int) -> int:
        """Return how far the device is in the receive ring of `pair`."""
        return self.session.devices[pair].base(RX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def payload(number: int) -> bytes:
    return struct.pack("<Q", number) + number.to_bytes(4, "little") * ((PAYLOAD - 8) // 4)


class Flows:
    """Numbered datagrams to the guest, in bursts over `FLOWS` flows, and their echoes.

    A context manager that sends from `start()` on; its exit ends that and the listening.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._sockets: list[socket.socket] = []
        self._senders: list[socket.socket] = []
        self._poll = select.epoll()
        self._ended = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="echoes")
        self._talker = threading.Thread(target=self._talk, name="flows")
        self.sent = 0
        self.echoed: list[int] = []
        self.changed = 0

    def renew(self) -> None:
        """Go on with flows that nobody has seen yet: a tap keeps a known one where it is."""
        fresh = self._rig.namespace.run(lambda: [self._open() for _ in range(FLOWS)])
        self._sockets += fresh
        for sock in fresh:
            self._poll.register(sock.fileno(), select.EPOLLIN)
        self._senders = fresh

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        sock.setsockopt(_SOL_UDP, _UDP_SEGMENT, PAYLOAD)
        sock.bind((HOST, 0))
        sock.connect((GUEST, PORT))
        return sock

    def send(self, sock: socket.socket, count: int = BURST) -> None:
        """Send the next `count` datagrams as one burst."""
        first = self.sent
        sock.send(b"".join(payload(first + n) for n in range(count)))
        self.sent += count

    def burst(self, bursts: int = 1) -> None:
        """Send so many bursts on each flow."""
        for _ in range(bursts):
            for sock in self._senders:
                self.send(sock)

    def _talk(self) -> None:
        while not self._ended.is_set():
            self.burst()

    def _listen(self) -> None:
        by_number = {}
        while True:
            found = self._poll.poll(0.05)
            if not found and self._ended.is_set() and not self._talker.is_alive():
                return
            for number, _ in found:
                if number not in by_number:
                    by_number = {sock.fileno(): sock for sock in self._sockets}
                self._take(by_number[number])

    def _take(self, sock: socket.socket) -> None:
        for _ in range(256):
            try:
                data = sock.recv(2048, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            number = int.from_bytes(data[:8], "little")
            self.echoed.append(number)
            self.changed += data != payload(number)

    def start(self) -> None:
        """Send at full speed from now on."""
        self._talker.start()

    def stop(self) -> None:
        """Send no more."""
        self._ended.set()
        if self._talker.ident:
            self._talker.join()

    def wait_settled(self, lost: int, seconds: float = 20) -> int:
        """Wait until all but `lost` datagrams came back; return how many did not."""
        deadline = time.monotonic() + seconds
        while (missing := self.sent - len(self.echoed)) > lost and time.monotonic() < deadline:
            time.sleep(0.02)
        return missing

    def __enter__(self) -> Self:
        self.renew()
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._listener.join()
        self._poll.close()
        for sock in self._sockets:
            sock.close()
