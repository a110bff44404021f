"""A split virtqueue written byte by byte, nonsense included (virtio 1.2, section 2.7).

The driver of `vhostctl.guest` refuses what a device must survive; here nothing is checked.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from typing import NamedTuple

from vhostctl.abi import virtio

NEXT = virtio.VRING_DESC_F_NEXT
WRITE = virtio.VRING_DESC_F_WRITE
INDIRECT = virtio.VRING_DESC_F_INDIRECT

_PAGE = 4096


class Part(NamedTuple):
    """One buffer of a chain: guest physical address, bytes, VRING_DESC_F_* besides NEXT."""

    addr: int
    len: int
    flags: int = 0


class Used(NamedTuple):
    """One element of the used ring: head of a chain, bytes written to it."""

    id: int
    len: int


def load(address: int, size: int) -> bytes:
    """Return `size` bytes at the host virtual `address`."""
    return ctypes.string_at(address, size)


def store(address: int, data: bytes) -> None:
    """Write `data` at the host virtual `address`."""
    ctypes.memmove(address, data, len(data))


def load16(address: int) -> int:
    """Return the 16-bit word at `address`, in one access."""
    return ctypes.c_uint16.from_address(address).value


def store16(address: int, value: int) -> None:
    """Write the 16-bit word at `address`, in one access: the device may be reading it."""
    ctypes.c_uint16.from_address(address).value = value & 0xFFFF


def table(parts: Iterable[Part]) -> bytes:
    """Return an indirect table: each of `parts` but the last continues with the next one."""
    entries = list(parts)
    return b"".join(
        descriptor(part, index + 1 if index + 1 < len(entries) else None)
        for index, part in enumerate(entries)
    )


def descriptor(part: Part, following: int | None = None) -> bytes:
    """Return one descriptor (16 bytes), with NEXT if another is `following`."""
    flags = part.flags if following is None else part.flags | NEXT
    return struct.pack("<QIHH", part.addr, part.len, flags, (following or 0) & 0xFFFF)


class RawRing:
    """A ring of `num` descriptors at the host virtual address `hva`.

    `desc`, `avail` and `used` are host virtual addresses, each on a page of its own.
    `base` is the avail and used index that both ends begin with.
    """

    def __init__(self, hva: int, num: int, base: int = 0) -> None:
        self.lay_out(hva, num, base)

    def lay_out(self, hva: int, num: int, base: int) -> None:
        """Begin anew with `num` descriptors at `hva`; the device has yet to be told."""
        self.num = num
        self.desc = hva
        self.avail = hva + _pages(16 * num)
        self.used = self.avail + _pages(6 + 2 * num)
        self.filled = 0
        self.taken = base
        self.avail_idx = base
        store16(self.used + 2, base)

    @staticmethod
    def span(num: int) -> int:
        """Return the bytes that a ring of `num` takes, in whole pages."""
        return _pages(16 * num) + _pages(6 + 2 * num) + _pages(6 + 8 * num)

    @property
    def avail_idx(self) -> int:
        """The index that the driver publishes."""
        return load16(self.avail + 2)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        store16(self.avail + 2, value)

    @property
    def avail_flags(self) -> int:
        """VRING_AVAIL_F_NO_INTERRUPT."""
        return load16(self.avail)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        store16(self.avail, value)

    @property
    def used_event(self) -> int:
        """The used index after which the driver wants a signal."""
        return load16(self.avail + 4 + 2 * self.num)

    @used_event.setter
    def used_event(self, value: int) -> None:
        store16(self.avail + 4 + 2 * self.num, value)

    @property
    def used_idx(self) -> int:
        """The index that the device publishes."""
        return load16(self.used + 2)

    @property
    def used_flags(self) -> int:
        """VRING_USED_F_NO_NOTIFY."""
        return load16(self.used)

    @property
    def avail_event(self) -> int:
        """The avail index after which the device wants a kick."""
        return load16(self.used + 4 + 8 * self.num)

    @avail_event.setter
    def avail_event(self, value: int) -> None:
        store16(self.used + 4 + 8 * self.num, value)

    def element(self, slot: int) -> Used:
        """Return what stands in `slot` of the used ring, whatever the index says."""
        return Used(*struct.unpack("<II", load(self.used + 4 + 8 * slot, 8)))

    def describe(self, index: int, part: Part, following: int | None = None) -> None:
        """Write descriptor `index`."""
        store(self.desc + 16 * index, descriptor(part, following))

    def chain(self, parts: Iterable[Part]) -> int:
        """Write `parts` as a chain into the next descriptors, round the table; return its head."""
        entries = list(parts)
        slots = [(self.filled + n) % self.num for n in range(len(entries))]
        for slot, part, following in zip(slots, entries, [*slots[1:], None], strict=True):
            self.describe(slot, part, following)
        self.filled = (self.filled + len(entries)) % self.num
        return slots[0]

    def publish(self, *heads: int) -> None:
        """Put `heads` into the avail ring, then publish the index that covers them."""
        index = self.avail_idx
        for offset, head in enumerate(heads):
            store16(self.avail + 4 + 2 * ((index + offset) % self.num), head)
        self.avail_idx = index + len(heads)

    def take(self) -> list[Used]:
        """Return the used elements that are new since the last call."""
        new = (self.used_idx - self.taken) & 0xFFFF
        found = [self.element((self.taken + n) % self.num) for n in range(new)]
        self.taken = (self.taken + new) & 0xFFFF
        return found


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
