"""A virtio-net device for tests: reads and writes the same rings as the driver, and checks them.

Written from the virtio specification, apart from the driver: it shares no code with it. A rule
that the driver breaks fails an assertion here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from vhostctl.guest.driver import NetDriver, QueueConfig, QueuePair

MRG_RXBUF, ANY_LAYOUT, INDIRECT, EVENT_IDX, VERSION_1 = (1 << bit for bit in (15, 27, 28, 29, 32))

NEXT, WRITE, INDIRECT_FLAG = 1, 2, 4
BASE = 0x1_0000_0000
DEADLINE = 20.0  # seconds after which something that must come is held not to come


class Memory:
    """One region of guest memory at BASE."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.map = mmap.mmap(-1, size)
        anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(anchor)
        del anchor

    def hva(self, gpa: int, length: int) -> int:
        assert gpa >= BASE
        assert gpa + length <= BASE + self.size, f"{gpa:#x}+{length:#x} is outside memory"
        return self.address + gpa - BASE

    def read(self, gpa: int, length: int) -> bytes:
        self.hva(gpa, length)
        return self.map[gpa - BASE : gpa - BASE + length]

    def write(self, gpa: int, data: bytes) -> None:
        self.hva(gpa, len(data))
        self.map[gpa - BASE : gpa - BASE + len(data)] = data

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 2), "little")

    def set_u16(self, gpa: int, value: int) -> None:
        self.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))


def need_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from `old` to `new` passes `event` (virtio 1.2, 2.7.7.2)."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


@dataclass
class Chain:
    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    indirect: bool = False

    @property
    def room(self) -> int:
        return sum(length for _, length in self.writable)


class Ring:
    """The device's side of one split ring."""

    def __init__(self, memory: Memory, place: QueueConfig, features: int) -> None:
        self.memory = memory
        self.place = place
        self.event_idx = bool(features & EVENT_IDX)
        self.may_indirect = bool(features & INDIRECT)
        self.last_avail = self.used_idx = self.signalled = place.base
        self.outstanding: dict[int, Chain] = {}
        self.calls = 0

    @property
    def avail_idx(self) -> int:
        return self.memory.u16(self.place.avail + 2)

    @property
    def avail_flags(self) -> int:
        return self.memory.u16(self.place.avail)

    @property
    def used_event(self) -> int:
        return self.memory.u16(self.place.avail + 4 + 2 * self.place.size)

    def pending(self) -> int:
        waiting = (self.avail_idx - self.last_avail) & 0xFFFF
        assert waiting + len(self.outstanding) <= self.place.size, "more available than descriptors"
        return waiting

    def pop(self) -> Chain | None:
        """Take the next available chain; checks everything the specification asks of it."""
        if not self.pending():
            return None
        slot = self.last_avail % self.place.size
        chain = Chain(self.memory.u16(self.place.avail + 4 + 2 * slot))
        assert chain.head not in self.outstanding, "head made available twice"
        self.last_avail = (self.last_avail + 1) & 0xFFFF
        for gpa, length, flags in self._walk(chain):
            assert length > 0, "empty descriptor"
            self.memory.hva(gpa, length)
            if flags & WRITE:
                chain.writable.append((gpa, length))
            else:
                assert not chain.writable, "readable part after a writable one"
                chain.readable.append((gpa, length))
        self._check_overlap(chain)
        self.outstanding[chain.head] = chain
        return chain

    def _walk(self, chain: Chain) -> Iterator[tuple[int, int, int]]:
        table, index, entries, seen = self.place.desc, chain.head, self.place.size, 0
        while True:
            assert index < entries, "descriptor index outside the table"
            seen += 1
            assert seen <= min(entries, self.place.size), "loop, or longer than the queue"
            gpa, length, flags, following = struct.unpack(
                "<QIHH", self.memory.read(table + 16 * index, 16)
            )
            assert not flags & ~(NEXT | WRITE | INDIRECT_FLAG), "unknown descriptor flag"
            if flags & INDIRECT_FLAG:
                assert self.may_indirect, "indirect without the feature"
                assert not chain.indirect, "indirect inside indirect"
                assert not flags & NEXT, "indirect with next"
                assert length > 16, "a table for no more than one descriptor"
                assert length % 16 == 0
                assert gpa % 16 == 0
                chain.indirect = True
                table, index, entries, seen = gpa, 0, length // 16, 0
                continue
            yield gpa, length, flags
            if not flags & NEXT:
                if chain.indirect:
                    assert seen == entries, "the table is longer than the chain"
                return
            index = following

    def _check_overlap(self, chain: Chain) -> None:
        spans = sorted(
            (gpa, gpa + length)
            for other in (*self.outstanding.values(), chain)
            for gpa, length in (*other.readable, *other.writable)
        )
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start, "buffers of two chains overlap"

    def push(self, entries: Sequence[tuple[int, int]]) -> bool:
        """Use `entries` (id, len) at once; returns whether the driver was interrupted."""
        for index, (head, length) in enumerate(entries):
            slot = (self.used_idx + index) % self.place.size
            self.memory.write(self.place.used + 4 + 8 * slot, struct.pack("<II", head, length))
            self.outstanding.pop(head, None)
        self.used_idx = (self.used_idx + len(entries)) & 0xFFFF
        self.memory.set_u16(self.place.used + 2, self.used_idx)
        wanted = not self.avail_flags & 1
        if self.event_idx:
            assert self.avail_flags == 0, "avail flags with event index"
            wanted = need_event(self.used_event, self.used_idx, self.signalled)
        self.signalled = self.used_idx
        if wanted:
            self.calls += 1
            os.eventfd_write(self.place.call, 1)
        return wanted

    def want_kicks(self, wanted: bool) -> None:
        if self.event_idx:
            event = self.last_avail if wanted else self.last_avail - 1
            self.memory.set_u16(self.place.used + 4 + 8 * self.place.size, event)
        else:
            self.memory.set_u16(self.place.used, 0 if wanted else 1)

    def kicks(self) -> int:
        try:
            return os.eventfd_read(self.place.kick)
        except BlockingIOError:
            return 0


class Device:
    """Both queues of a pair, as a network card works them."""

    def __init__(self, memory: Memory, rx: QueueConfig, tx: QueueConfig, features: int) -> None:
        self.rx = Ring(memory, rx, features)
        self.tx = Ring(memory, tx, features)
        self.memory = memory
        self.mergeable = bool(features & MRG_RXBUF)
        self.header = 12 if features & (MRG_RXBUF | VERSION_1) else 10
        self.split = not features & (VERSION_1 | ANY_LAYOUT)

    def take(self, chain: Chain) -> bytes:
        """Return the frame in a transmit chain."""
        assert not chain.writable, "writable part in a transmit chain"
        if self.split:
            assert chain.readable[0][1] == self.header, "header shares a legacy descriptor"
        data = b"".join(self.memory.read(*part) for part in chain.readable)
        assert data[: self.header] == bytes(self.header)
        return data[self.header :]

    def transmitted(self, limit: int = 1 << 16, *, batch: int = 64) -> list[bytes]:
        """Take up to `limit` frames and give their buffers back, `batch` of them at a time."""
        frames: list[bytes] = []
        done: list[tuple[int, int]] = []
        while len(frames) < limit and (chain := self.tx.pop()):
            frames.append(self.take(chain))
            done.append((chain.head, 0))
            if len(done) == batch:
                self.tx.push(done)
                done = []
        if done:
            self.tx.push(done)
        return frames

    def deliver(self, frame: bytes, *, flags: int = 0, buffers: int | None = None) -> bool:
        """Write one frame into receive buffers; False, and nothing, if there are too few.

        `buffers` overrides num_buffers with a wrong one.
        """
        if not self.rx.pending():
            return False
        data = bytes([flags]) + bytes(self.header - 1) + frame
        chains: list[Chain] = []
        avail = self.rx.last_avail
        while sum(chain.room for chain in chains) < len(data):
            chain = self.rx.pop() if self.mergeable or not chains else None
            if chain is None:
                for unused in chains:
                    del self.rx.outstanding[unused.head]
                self.rx.last_avail = avail
                return False
            assert not chain.readable, "readable part in a receive chain"
            if self.split and not self.mergeable:
                assert chain.writable[0][1] == self.header, "header shares a legacy descriptor"
            chains.append(chain)
        if self.mergeable:
            count = len(chains) if buffers is None else buffers
            data = data[:10] + count.to_bytes(2, "little") + data[12:]
        self.rx.push(list(self._fill(chains, data)))
        return True

    def _fill(self, chains: Iterable[Chain], data: bytes) -> Iterator[tuple[int, int]]:
        for chain in chains:
            written = 0
            for gpa, length in chain.writable:
                part, data = data[:length], data[length:]
                self.memory.write(gpa, part)
                written += len(part)
            yield chain.head, written

    def wait_kick(self, ring: Ring, deadline: float) -> None:
        """Sleep until `ring` is kicked; asks for the kick as a device that goes idle does."""
        ring.want_kicks(True)
        if not ring.pending():
            poll = select.poll()
            poll.register(ring.place.kick, select.POLLIN)
            assert poll.poll(max(0.0, deadline - time.monotonic()) * 1000), "no kick came"
        ring.kicks()
        ring.want_kicks(False)

    def expect(self, count: int) -> list[bytes]:
        """Return the next `count` transmitted frames, waiting for kicks where needed."""
        deadline = time.monotonic() + DEADLINE
        frames = self.transmitted(count)
        while len(frames) < count:
            self.wait_kick(self.tx, deadline)
            frames += self.transmitted(count - len(frames))
        return frames

    def feed(self, frames: Iterable[bytes], *, flags: int = 0) -> None:
        """Deliver all `frames`, waiting for buffers where needed."""
        deadline = time.monotonic() + DEADLINE
        for frame in frames:
            while not self.deliver(frame, flags=flags):
                self.wait_kick(self.rx, deadline)


@dataclass
class Bench:
    """A driver and a device on the same memory."""

    memory: Memory
    driver: NetDriver
    device: Device
    pair: QueuePair


def layout(sizes: Sequence[int], bases: Sequence[int]) -> tuple[list[QueueConfig], int]:
    """Place rings back to back, with new eventfds; returns them and the first free address."""
    places = []
    gpa = BASE
    for size, base in zip(sizes, bases, strict=True):
        avail = gpa + 16 * size
        used = -(-(avail + 6 + 2 * size) // 4) * 4
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        places.append(QueueConfig(size, gpa, avail, used, kick, call, base))
        gpa = -(-(used + 6 + 8 * size) // 16) * 16
    return places, gpa


@contextmanager
def bench(
    features: int = VERSION_1,
    size: int = 256,
    *,
    buffer_size: int = 2048,
    max_frame: int = 1514,
    base: int = 0,
) -> Iterator[Bench]:
    """A pair of rings of `size`, not started yet."""
    arena = NetDriver.arena_size([size, size], features, buffer_size, max_frame)
    places, free = layout([size, size], [base, base])
    memory = Memory(free - BASE + arena)
    memory.write(BASE, b"\xa5" * memory.size)  # memory is not zero unless the driver sees to it
    try:
        with NetDriver(
            memory,
            [(places[0], places[1])],
            features,
            (free, arena),
            buffer_size=buffer_size,
            max_frame=max_frame,
        ) as driver:
            device = Device(memory, places[0], places[1], features)
            yield Bench(memory, driver, device, driver.pairs[0])
    finally:
        memory.map.close()
        for place in places:
            os.close(place.kick)
            os.close(place.call)
