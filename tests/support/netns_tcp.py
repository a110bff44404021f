"""Two hosts on taps of their own, and what they say to each other: TCP and UDP, checked."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.guest_device import EVENT_IDX, INDIRECT, MRG_RXBUF, VERSION_1, layout
from vhostctl.control.features import negotiate, tap_features
from vhostctl.guest.driver import NetDriver, QueuePair
from vhostctl.guest.streams import default_pattern
from vhostctl.host.closing import Closing
from vhostctl.host.links import Links
from vhostctl.host.memory import GuestMemory
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import UNLIMITED, Tap
from vhostctl.host.vhost import VhostNet

RINGS = MRG_RXBUF | INDIRECT | EVENT_IDX | VERSION_1
LONGEST = 65535 + 14
PATIENCE = 120.0  # seconds for one step of a conversation, on an emulated machine too
UDP_SEGMENT = 103  # linux/udp.h
PATTERN = default_pattern()

Family = socket.AddressFamily
FAMILIES = (socket.AF_INET, socket.AF_INET6)
_PREFIXES = {socket.AF_INET: ("192.0.2.", 24), socket.AF_INET6: ("2001:db8::", 64)}


class Host(Closing):
    """A network namespace with a tap, `tap0`, and an address of each family."""

    def __init__(self, number: int, mtu: int = 1500) -> None:
        self.number = number
        self.mtu = mtu
        with ExitStack() as stack:
            self.namespace = stack.enter_context(NetNamespace())
            self.tap = stack.enter_context(self.namespace.run(lambda: Tap.open("tap0")))
            self._stack = stack.pop_all()

    def up(self) -> None:
        """Bring the link up; its queue has been told of its offloads by then."""
        self.namespace.run(self._up)

    def _up(self) -> None:
        sysctl = Path("/proc/sys/net/ipv4")
        (sysctl / "tcp_ecn").write_text("1", encoding="ascii")
        # However long a round trip takes here, packets are as long as they may be.
        (sysctl / "tcp_tso_rtt_log").write_text("20", encoding="ascii")
        with Links() as links:
            links.change("tap0", mtu=self.mtu, state="up")
            for family in FAMILIES:
                links.add_address("tap0", f"{self.address(family)}/{_PREFIXES[family][1]}")

    def address(self, family: Family) -> str:
        return f"{_PREFIXES[family][0]}{self.number}"

    def socket(self, family: Family, kind: socket.SocketKind) -> socket.socket:
        """A socket in the namespace, bound to a free port of its address."""

        def make() -> socket.socket:
            made = socket.socket(family, kind)
            made.settimeout(PATIENCE)
            made.bind((self.address(family), 0))
            return made

        return self.namespace.run(make)

    def faults(self) -> dict[str, int]:
        """What the host's stack and the tap found wrong with what arrived, or dropped."""
        return self.namespace.run(_faults)

    def close(self) -> None:
        self._stack.close()


def _faults() -> dict[str, int]:
    net = Path("/proc/thread-self/net")
    counters: dict[str, int] = {}
    lines = (net / "snmp").read_text(encoding="ascii").splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        protocol, *fields = names.split()
        for name, value in zip(fields, values.split()[1:], strict=True):
            counters[protocol.removesuffix(":") + name] = int(value)
    for line in (net / "snmp6").read_text(encoding="ascii").splitlines():
        name, value = line.split()
        counters[name] = int(value)
    faults = {
        name: value
        for name, value in counters.items()
        if name.endswith(("CsumErrors", "InErrs", "InErrors", "HdrErrors", "TruncatedPkts"))
    }
    (tap,) = (
        line.partition(":")[2].split()
        for line in (net / "dev").read_text(encoding="ascii").splitlines()
        if line.strip().startswith("tap0:")
    )
    # linux/net-procfs.c: bytes packets errs drop fifo frame compressed multicast, twice.
    named = {"rx_errs": 2, "rx_drop": 3, "rx_frame": 5, "tx_errs": 10, "tx_drop": 11}
    return {name: value for name, value in faults.items() if value} | {
        name: int(tap[at]) for name, at in named.items() if int(tap[at])
    }


@contextmanager
def attached(
    device: str, host: Host, driver: int, *, rings: int = RINGS, buffer_size: int = 16384
) -> Iterator[QueuePair]:
    """A vhost device on the host's tap, and a driver that understands `driver` and `rings`."""
    queue = host.tap.queues[0]
    places, free = layout([256, 256], [0, 0])
    with ExitStack() as stack:
        for place in places:
            stack.callback(os.close, place.kick)
            stack.callback(os.close, place.call)
        memory = stack.enter_context(GuestMemory.anonymous(64 << 20))
        vhost = stack.enter_context(VhostNet.at(device))
        vhost.set_owner()
        agreed = negotiate(
            driver=driver | rings,
            device=vhost.get_features(),
            tap=tap_features(queue.offloads()),
        )
        queue.set_vnet_hdr_size(agreed.header_size)
        queue.set_offload(agreed.offload)
        queue.set_sndbuf(UNLIMITED)
        vhost.set_features(agreed.device_features)
        vhost.set_mem_table(memory.regions)
        (region,) = memory.regions
        made = NetDriver(
            memory,
            [(places[0], places[1])],
            agreed.features,
            (free, region.gpa + region.size - free),
            buffer_size=buffer_size,
            max_frame=LONGEST,
        )
        stack.enter_context(made)
        for index, place in enumerate(places):
            vhost.set_vring_num(index, place.size)
            vhost.set_vring_base(index, place.base)
            parts = {
                part: memory.hva(getattr(place, part), 1) for part in ("desc", "avail", "used")
            }
            vhost.set_vring_addr(index, **parts)
            vhost.set_vring_kick(index, place.kick)
            vhost.set_vring_call(index, place.call)
        for index in (0, 1):
            vhost.set_backend(index, queue.fileno())
            stack.callback(vhost.set_backend, index, None)
        (pair,) = made.pairs
        pair.start()
        yield pair


def _content(seed: int, size: int) -> Iterator[memoryview]:
    """`size` bytes that differ from those of another seed."""
    view, at = memoryview(PATTERN), seed
    while size:
        part = view[at % 4096 :][: min(size, 60000)]
        yield part
        size -= len(part)
        at += 977


def _send(out: socket.socket, seed: int, size: int) -> str:
    digest = hashlib.sha256()
    for part in _content(seed, size):
        digest.update(part)
        out.sendall(part)
    out.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def _receive(source: socket.socket) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(1 << 20)
    while count := source.recv_into(buffer):
        digest.update(memoryview(buffer)[:count])
        size += count
    return size, digest.hexdigest()


def tcp(first: Host, second: Host, family: Family, size: int) -> None:
    """Send `size` bytes each way at once over one connection; both ends' digests agree."""
    with first.socket(family, socket.SOCK_STREAM) as listener:
        listener.listen(1)
        with second.socket(family, socket.SOCK_STREAM) as far:
            far.connect(listener.getsockname())
            near, _ = listener.accept()
            with near, ThreadPoolExecutor(4) as pool:
                near.settimeout(PATIENCE)
                sent = [pool.submit(_send, end, seed, size) for seed, end in enumerate((near, far))]
                got = [pool.submit(_receive, end) for end in (far, near)]
                for out, arrived in zip(sent, got, strict=True):
                    assert arrived.result() == (size, out.result())
