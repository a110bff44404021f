"""The device's side of a virtqueue of commands, such as virtio-net's control queue.

For a command now and then: frames are vhost's. Split rings, virtio 1.2, section 2.7.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vhostctl.abi import virtio
from vhostctl.control import access
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.rings import RingPlacement
from vhostctl.errors import InvalidArgument

LONGEST = 1 << 16
"""Bytes of the longest command that is looked at; the MAC tables are what is long."""
MOST = 1024
"""Descriptors of the longest chain, as vhost-net has it (UIO_MAXIOV)."""

_DESC = struct.Struct("<QIHH")
_U16 = struct.Struct("<H")
_U32_PAIR = struct.Struct("<II")
_HEADER = 4  # flags and idx, ahead of the entries of both rings

Handler = Callable[[bytes], bytes]
"""A command as the driver wrote it to the answer that it gets."""


@dataclass(frozen=True, slots=True)
class _Buffer:
    gpa: int
    length: int
    writable: bool


class ControlQueue:
    """Takes commands off a ring and answers them, one with each call of `take`.

    `base` is where the avail ring is read next. Not synchronised.
    """

    def __init__(
        self, space: AddressSpace, ring: RingPlacement, features: int, base: int = 0
    ) -> None:
        self._space = space
        self._ring = ring
        self._event_idx = bool(features >> virtio.VIRTIO_RING_F_EVENT_IDX & 1)
        self._indirect = bool(features >> virtio.VIRTIO_RING_F_INDIRECT_DESC & 1)
        self.base = base

    def take(self, handle: Handler) -> bool | None:
        """Answer the next command; return whether the driver wants to hear of it.

        None if no command waits: the next one is rung for. Raises InvalidArgument if the ring
        or the command is malformed: the device then needs a reset (virtio 1.2, 2.1.2).
        """
        self._ask_for_doorbell()  # first: what is added behind the look is rung for
        if self.base == self._u16(self._ring.avail + 2):
            return None
        head = self._u16(self._ring.avail + _HEADER + 2 * (self.base % self._ring.size))
        buffers = list(self._chain(head))
        command = self._gather(buffers)
        written = self._scatter(buffers, handle(command))
        used = self._u16(self._ring.used + 2)
        entry = self._ring.used + _HEADER + 8 * (used % self._ring.size)
        access.write(self._space, entry, _U32_PAIR.pack(head, written), "a used entry")
        self.base = self.base + 1 & 0xFFFF
        used = used + 1 & 0xFFFF
        access.write(self._space, self._ring.used + 2, _U16.pack(used), "the used index")
        return self._wanted(used)

    def _ask_for_doorbell(self) -> None:
        if self._event_idx:
            avail_event = self._ring.used + _HEADER + 8 * self._ring.size
            access.write(self._space, avail_event, _U16.pack(self.base), "avail_event")

    def _wanted(self, used: int) -> bool:
        if self._event_idx:
            return used - 1 & 0xFFFF == self._u16(self._ring.avail + _HEADER + 2 * self._ring.size)
        return not self._u16(self._ring.avail) & virtio.VRING_AVAIL_F_NO_INTERRUPT

    def _u16(self, gpa: int) -> int:
        number: int = _U16.unpack(access.read(self._space, gpa, 2, "the control ring"))[0]
        return number

    def _chain(self, head: int) -> Iterator[_Buffer]:
        """Yield the buffers of a chain, of its indirect table if it has one."""
        table, size = self._ring.desc, self._ring.size
        index, indirect, budget = head, False, LONGEST
        for _ in range(MOST):
            if index >= size:
                raise InvalidArgument(f"descriptor {index} of a table of {size}")
            raw = access.read(self._space, table + _DESC.size * index, _DESC.size, "a descriptor")
            gpa, length, flags, following = _DESC.unpack(raw)
            if flags & virtio.VRING_DESC_F_INDIRECT:
                if indirect or not self._indirect or length % _DESC.size or not length:
                    raise InvalidArgument("an indirect descriptor where none may be")
                table, size, index, indirect = gpa, min(length, LONGEST) // _DESC.size, 0, True
                continue
            budget -= length
            if budget < 0:
                raise InvalidArgument(f"a command of more than {LONGEST} bytes")
            yield _Buffer(gpa, length, bool(flags & virtio.VRING_DESC_F_WRITE))
            if not flags & virtio.VRING_DESC_F_NEXT:
                return
            index = following
        raise InvalidArgument(f"a chain of more than {MOST} descriptors")

    def _gather(self, buffers: list[_Buffer]) -> bytes:
        readable = (b for b in buffers if not b.writable)
        return b"".join(access.read(self._space, b.gpa, b.length, "a command") for b in readable)

    def _scatter(self, buffers: list[_Buffer], answer: bytes) -> int:
        written = 0
        for buffer in buffers:
            if buffer.writable and written < len(answer):
                part = answer[written : written + buffer.length]
                access.write(self._space, buffer.gpa, part, "an answer")
                written += len(part)
        return written
