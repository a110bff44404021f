"""The tests' virtio-net device with offloads: it writes and reads headers that are not zero."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

from tests.support.guest_device import Bench, Chain, Device, bench
from vhostctl.abi import virtio

CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO = (
    1 << bit for bit in (0, 1, 7, 8, 9, 10)
)
HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO = (1 << bit for bit in (11, 12, 13, 14))
GUEST_USO4, GUEST_USO6, HOST_USO = (1 << bit for bit in (54, 55, 56))
GUEST = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO4 | GUEST_USO6
HOST = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO | HOST_USO

NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, UDP, TCPV6, UDP_L4, ECN = 1, 3, 4, 5, 0x80

LONGEST = 65535 + 14


@dataclass(frozen=True)
class Header:
    """The first 10 bytes of every virtio-net header."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def __bytes__(self) -> bytes:
        return struct.pack("<BBHHHH", *astuple(self))


class OffloadDevice(Device):
    """Puts `outgoing` before what it delivers, and keeps the headers of what it takes."""

    outgoing = Header()

    def __init__(self, b: Bench, features: int) -> None:
        super().__init__(b.memory, b.device.rx.place, b.device.tx.place, features)
        self.headers: list[Header] = []

    def take(self, chain: Chain) -> bytes:
        assert not chain.writable, "writable part in a transmit chain"
        if self.split:
            assert chain.readable[0][1] == self.header, "header shares a legacy descriptor"
        data = b"".join(self.memory.read(*part) for part in chain.readable)
        assert not any(data[10 : self.header]), "num_buffers of a frame that is sent"
        self.headers.append(Header(*struct.unpack_from("<BBHHHH", data)))
        return data[self.header :]

    def _fill(self, chains: Iterable[Chain], data: bytes) -> Iterator[tuple[int, int]]:
        return super()._fill(chains, bytes(self.outgoing) + data[10:])


@dataclass
class Side:
    """A driver's queue pair and the device behind it."""

    bench: Bench
    device: OffloadDevice


@contextmanager
def side(
    features: int, size: int = 64, *, buffer_size: int = 4096, max_frame: int = LONGEST
) -> Iterator[Side]:
    """A pair of rings with an `OffloadDevice`, started."""
    with bench(features, size, buffer_size=buffer_size, max_frame=max_frame, base=65500) as b:
        made = Side(b, OffloadDevice(b, features))
        b.pair.start()
        yield made


def names(features: int) -> list[str]:
    return virtio.feature_names(features)
