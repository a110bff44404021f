"""The device core against an enemy: a program that test_engine_hostile.py runs, case by case.

It needs the engine built with VHM_HOSTILE (kmod/user/hostile.h), where one end of a socket
pair is a backend, and no privilege.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.ring import INDIRECT, WRITE, Part, RawRing, Used, load, store, table
from vhostctl.engine import _native as native
from vhostctl.errors import KernelError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import PAGE, GuestMemory
from vhostctl.host.vhost import RX, TX, VhostNet

ALLOC, COPY, SEND, RECEIVE = range(4)  # enum port_site of kmod/core/port.h
GPA = 0x10_0000
RINGS = 0x1_0000  # bytes before the buffers, which are not in the memory table
NUM = 16
HEADER = 12
FEATURES = (
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_RING_F_INDIRECT_DESC
    | 1 << vhost.VHOST_NET_F_VIRTIO_NET_HDR
)
PATIENCE = 20.0

enemy = ctypes.CDLL(native.__file__)
enemy.hostile_allow.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
enemy.hostile_flip.argtypes = [ctypes.c_uint64, ctypes.c_uint8, ctypes.c_ulong]
enemy.hostile_fail.argtypes = [ctypes.c_int, ctypes.c_ulong]
enemy.hostile_reads.restype = enemy.hostile_operations.restype = ctypes.c_ulong
enemy.hostile_trespasses.restype = ctypes.c_ulong
enemy.hostile_allocated.restype = ctypes.c_long
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Bench:
    """A device between two rings and a socket that the case looks into."""

    def __init__(self, stack: ExitStack) -> None:
        self.memory = stack.enter_context(GuestMemory([(GPA, 1 << 20)]))
        (self.region,) = self.memory.regions
        self.wire, self.tap = (
            stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        )
        self.wire.setblocking(False)
        self.kicks = [stack.enter_context(EventFd.create()) for _ in range(2)]
        self.calls = [stack.enter_context(EventFd.create()) for _ in range(2)]
        self.errors = [stack.enter_context(EventFd.create()) for _ in range(2)]
        self.rings = [RawRing(self.region.hva + queue * RINGS // 2, NUM) for queue in (RX, TX)]
        self.device = stack.enter_context(VhostNet.embedded())
        self.free = GPA + RINGS
        for ring in self.rings:
            for start, size in (
                (ring.desc, 16 * NUM),
                (ring.avail, 6 + 2 * NUM),
                (ring.used, 6 + 8 * NUM),
            ):
                assert enemy.hostile_allow(start, size) == 0
        assert enemy.hostile_allow(self.region.hva + RINGS, self.region.size - RINGS) == 0

    def bring_up(self, features: int = FEATURES) -> None:
        self.device.set_owner()
        self.device.set_features(features)
        self.set_mem_table()
        for queue in (RX, TX):
            self.configure(queue)
            self.device.set_backend(queue, self.tap.fileno())

    def set_mem_table(self) -> None:
        buffers = vhost.vhost_memory_region(
            guest_phys_addr=GPA + RINGS,
            memory_size=self.region.size - RINGS,
            userspace_addr=self.region.hva + RINGS,
        )
        self.device.request(vhost.VHOST_SET_MEM_TABLE, vhost.vhost_memory_table([buffers]))

    def configure(self, queue: int) -> None:
        device, ring = self.device, self.rings[queue]
        device.set_vring_num(queue, NUM)
        device.set_vring_base(queue, ring.taken)
        device.set_vring_addr(queue, desc=ring.desc, avail=ring.avail, used=ring.used)
        device.set_vring_call(queue, self.calls[queue].fileno())
        device.set_vring_err(queue, self.errors[queue].fileno())
        device.set_vring_kick(queue, self.kicks[queue].fileno())

    def restart(self, queue: int) -> None:
        """Stop the ring, lay it out anew and start it."""
        self.device.set_backend(queue, None)
        ring = self.rings[queue]
        store(ring.desc, bytes(RINGS // 2))
        ring.lay_out(ring.desc, NUM, 0)
        self.device.set_vring_base(queue, 0)
        self.free = GPA + RINGS
        for end in (self.wire, self.tap):
            with suppress(BlockingIOError):
                while end.recv(65536, socket.MSG_DONTWAIT):
                    pass
        self.device.set_backend(queue, self.tap.fileno())
        self.settle()

    def settle(self) -> None:
        with suppress(KernelError):
            self.device.set_log_fd(None)

    def hva(self, gpa: int) -> int:
        return self.region.hva + gpa - GPA

    def room(self, size: int, flags: int = 0) -> Part:
        self.free, gpa = self.free + size, self.free
        assert self.free <= GPA + self.region.size
        return Part(gpa, size, flags)

    def put(self, data: bytes) -> Part:
        part = self.room(len(data))
        store(self.hva(part.addr), data)
        return part

    def packet(self, frame: bytes, *, indirect: bool = False) -> list[Part]:
        """A chain of two parts with `frame` behind an empty header."""
        parts = [self.put(bytes(HEADER)), self.put(frame)]
        if indirect:
            place = self.put(table(parts))
            return [Part(place.addr, place.len, INDIRECT)]
        return parts

    def offer(self, queue: int, *chains: Iterable[Part]) -> None:
        ring = self.rings[queue]
        ring.publish(*[ring.chain(parts) for parts in chains])
        self.kicks[queue].signal()

    def receive(self) -> bytes:
        try:
            return self.wire.recv(65536)
        except BlockingIOError:
            return b""

    def in_order(self) -> None:
        """Nothing was touched that is not the guest's, and the device does its work."""
        enemy.hostile_fail(COPY, 0)
        place = ctypes.c_uint64()
        count = enemy.hostile_trespasses(ctypes.byref(place))
        assert not count, f"{count} accesses outside of memory, the last at {place.value:#x}"
        self.restart(TX)
        self.restart(RX)
        self.offer(TX, self.packet(b"x" * 60))
        wait(lambda: self.rings[TX].used_idx == 1, "a frame is sent")
        assert self.receive() == b"x" * 60
        self.wire.send(b"y" * 60)
        seen = b""
        # Frames of earlier runs may have been read ahead.
        while seen != b"y" * 60:
            buffer = self.room(256, WRITE)
            self.offer(RX, [buffer])
            wait(lambda: bool(self.rings[RX].take()), "a frame is received")
            seen = load(self.hva(buffer.addr) + HEADER, 60)


def wait(predicate: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not predicate():
        assert time.monotonic() < end, f"it never came: {what}"
        time.sleep(0.0005)


@contextmanager
def bench(features: int = FEATURES, *, up: bool = True) -> Iterator[Bench]:
    """A bench that leaves nothing behind."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    enemy.hostile_reset()
    with ExitStack() as stack:
        made = Bench(stack)
        if up:
            made.bring_up(features)
        yield made
    enemy.hostile_reset()
    assert enemy.hostile_allocated() == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def traffic() -> None:
    """Frames of every size go both ways, unchanged and in order."""
    sizes = [size * 7919 % 9000 + 1 for size in range(300)]
    with bench() as b:
        for size in sizes:
            b.free = GPA + RINGS
            frame = os.urandom(size)
            b.offer(TX, b.packet(frame, indirect=bool(size & 1)))
            wait(lambda: bool(b.rings[TX].take()), "a frame is sent")
            assert b.receive() == frame
            buffers = [b.room(size // 2 + 1, WRITE), b.room(size + HEADER, WRITE)]
            b.offer(RX, buffers)
            b.wire.send(frame)
            (used,) = wait_used(b, RX, 1)
            assert used.len == size + HEADER
            whole = b"".join(load(b.hva(part.addr), part.len) for part in buffers)
            assert whole[HEADER : HEADER + size] == frame
        b.in_order()


def wait_used(b: Bench, queue: int, count: int) -> list[Used]:
    ring = b.rings[queue]
    wait(lambda: (ring.used_idx - ring.taken) & 0xFFFF >= count, "used elements")
    return list(ring.take())


def full_socket() -> None:
    """What the socket has no room for goes out when it has, without another kick."""
    with bench() as b:
        b.tap.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        frames = [bytes([number]) * 1000 for number in range(NUM // 2)]
        for _ in range(20):
            b.free = GPA + RINGS
            b.offer(TX, *[b.packet(frame) for frame in frames])
            b.settle()
            assert len(b.rings[TX].take()) < len(frames)
            assert collect(b, len(frames)) == frames
            b.settle()
            b.rings[TX].take()
        b.in_order()


def collect(b: Bench, count: int) -> list[bytes]:
    seen: list[bytes] = []

    def look() -> bool:
        while frame := b.receive():
            seen.append(frame)
        return len(seen) >= count

    wait(look, f"{count} frames")
    return seen


def kept_frame() -> None:
    """A frame that was read ahead survives its ring's stop and start, on the same file only."""
    with bench() as b, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as other:
        for times in (1, 3):
            b.restart(RX)
            b.wire.send(b"first")
            b.wire.send(b"second")
            b.kicks[RX].signal()
            b.settle()
            for _ in range(times):
                b.device.set_backend(RX, None)
                with socket.fromfd(b.tap.fileno(), socket.AF_UNIX, socket.SOCK_DGRAM) as again:
                    b.device.set_backend(RX, again.fileno())
                b.settle()
            buffers = [b.room(256, WRITE) for _ in range(2)]
            b.offer(RX, *[[buffer] for buffer in buffers])
            wait_used(b, RX, 2)
            assert load(b.hva(buffers[0].addr) + HEADER, 5) == b"first"
            assert load(b.hva(buffers[1].addr) + HEADER, 6) == b"second"
        b.restart(RX)
        b.wire.send(b"lost")
        b.settle()
        b.device.set_backend(RX, None)
        b.device.set_backend(RX, other.fileno())
        b.settle()
        b.device.set_backend(RX, None)
        b.in_order()


def failing_allocations() -> None:
    """A device that gets no memory says so, holds nothing, and works when there is some."""
    number = 1
    while True:
        with bench(up=False) as b:
            enemy.hostile_fail(ALLOC, number)
            failure = None
            try:
                b.bring_up()
            except KernelError as error:
                failure = error.errno
            operations = enemy.hostile_operations(ALLOC)
        assert failure in (None, errno.ENOMEM)
        if operations < number:
            break
        number += 1
    assert number > 8


def failing_copies() -> None:
    """Every access fails once: in a request it is refused, in a ring the ring survives."""
    with bench(up=False) as b:
        enemy.hostile_fail(COPY, 0)
        b.bring_up()
        b.settle()
        operations = enemy.hostile_operations(COPY)
    assert operations > 20
    for number in range(1, operations + 1):
        with bench(up=False) as b:
            enemy.hostile_fail(COPY, number)
            with suppress(KernelError):
                b.bring_up()
    with bench() as b:
        run_once(b, lambda: enemy.hostile_fail(COPY, 0))
        operations = enemy.hostile_operations(COPY)
        assert operations > 30
        for number in range(1, operations + 1):
            run_once(b, lambda: enemy.hostile_fail(COPY, number))  # noqa: B023 - called at once
            b.in_order()


def failing_sends() -> None:
    """A frame that was not sent is sent later, and one that did not come gives its buffer back."""
    with bench() as b:
        for site in (SEND, RECEIVE):
            for number in (1, 2):
                run_once(b, lambda: enemy.hostile_fail(site, number))  # noqa: B023 - called at once
                wait(lambda: b.rings[TX].used_idx == 2, "both frames are sent")
                assert b.rings[RX].used_idx == (2 if site == SEND else 1)
                b.in_order()


def run_once(b: Bench, order: Callable[[], object]) -> None:
    """Two frames each way, one of them through an indirect table, with `order` before."""
    b.restart(TX)
    b.restart(RX)
    for ring, chains in (
        (b.rings[TX], [b.packet(b"a" * 60), b.packet(b"b" * 60, indirect=True)]),
        (b.rings[RX], [[b.room(40, WRITE), b.room(40, WRITE)], [b.room(128, WRITE)]]),
    ):
        ring.publish(*[ring.chain(parts) for parts in chains])
    order()
    b.kicks[TX].signal()
    b.settle()
    b.wire.send(b"c" * 60)
    b.wire.send(b"d" * 60)
    b.kicks[RX].signal()
    b.settle()


def flips() -> None:
    """Each byte of what the device reads changes just before each of its reads."""
    with bench() as b:
        enemy.hostile_flip(0, 0, 0)
        run_once(b, lambda: None)
        reads = enemy.hostile_reads()
        assert reads > 20
        step = 3  # a prime, so that bytes and reads meet in every combination of a few runs
        count = 0
        for mask in (0xFF, 0x01):
            for place in places(b):
                for number in range(1 + count % step, reads + 1, step):
                    run_once(b, lambda: enemy.hostile_flip(place, mask, number))  # noqa: B023
                count += 1
            b.in_order()
        assert count > 200


def places(b: Bench) -> list[int]:
    """Addresses of the bytes that the device goes by."""
    found: list[int] = []
    for ring, descriptors in ((b.rings[TX], 3), (b.rings[RX], 3)):
        found += range(ring.desc, ring.desc + 16 * descriptors)
        found += range(ring.avail, ring.avail + 8)
        found += range(ring.used + 2, ring.used + 4)
    indirect = b.hva(GPA + RINGS + 2 * (HEADER + 60))
    return [*found, *range(indirect, indirect + 32)]


def vanishing_memory() -> None:
    """Pages go while rings run: the ring says so, and works again when they are back."""
    with bench() as b:
        for queue in (TX, RX):
            ring = b.rings[queue]
            for page in (ring.desc, ring.avail, ring.used, b.region.hva + RINGS):
                for protection in (mmap.PROT_READ, 0):
                    b.restart(TX)
                    b.restart(RX)
                    assert libc.mprotect(page, PAGE, protection) == 0
                    b.wire.send(b"z" * 60)
                    for kick in b.kicks:
                        kick.signal()
                    b.settle()
                    with suppress(KernelError):
                        b.device.set_backend(queue, None)
                        b.device.set_backend(queue, b.tap.fileno())
                    assert libc.mprotect(page, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
                    b.in_order()


def requests_under_load() -> None:
    """Everything that may be replaced under a running ring is, while frames go through it."""
    with bench() as b, EventFd.create() as other:
        ended = threading.Event()
        seen = 0

        def guest() -> None:
            nonlocal seen
            frames = [bytes([number]) * 100 for number in range(NUM // 2)]
            while not ended.is_set():
                b.free = GPA + RINGS
                done = b.rings[TX].used_idx
                b.offer(TX, *[b.packet(frame) for frame in frames])
                while (b.rings[TX].used_idx - done) & 0xFFFF < len(frames):
                    if ended.is_set():
                        return
                    b.kicks[TX].signal()
                    seen += bool(b.receive())
                    time.sleep(0)

        thread = threading.Thread(target=guest)
        thread.start()
        deadline = time.monotonic() + PATIENCE
        try:
            for round_ in itertools.count():
                if round_ >= 150 and (seen > 100 or time.monotonic() > deadline):
                    break
                b.set_mem_table()
                b.device.set_vring_call(TX, (other if round_ & 1 else b.calls[TX]).fileno())
                b.device.set_vring_err(TX, None)
                b.device.set_vring_kick(TX, (other if round_ & 1 else b.kicks[TX]).fileno())
                b.device.set_features(FEATURES)
                b.device.set_vring_kick(TX, b.kicks[TX].fileno())
                if round_ % 10 == 0:
                    b.device.set_backend(TX, None)
                    b.device.set_backend(TX, b.tap.fileno())
                b.settle()
        finally:
            ended.set()
            thread.join()
        assert seen > 100
        b.in_order()


CASES = {
    case.__name__: case
    for case in (
        traffic,
        full_socket,
        kept_frame,
        failing_allocations,
        failing_copies,
        failing_sends,
        flips,
        vanishing_memory,
        requests_under_load,
    )
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
    print("done")
