"""The driver's half of virtio-net queues: what a guest's kernel would do, in this process.

Rings and frames are worked in C (virtio 1.2, sections 2.7 and 5.1.6). The driver believes
nothing that it reads from shared memory: a device that breaks the protocol breaks the
queue, and every later use of it raises `RingError`.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from vhostctl.abi import virtio
from vhostctl.errors import ClosedError, InvalidArgument, StateError, VhostctlError, kernel_error
from vhostctl.guest import _native as native
from vhostctl.guest.config import GuestMemory, Queue, QueueConfig, QueueStats
from vhostctl.host.closing import Closing

__all__ = [
    "GuestMemory",
    "NetDriver",
    "NetQueue",
    "Queue",
    "QueueConfig",
    "QueuePair",
    "QueueStats",
    "RingError",
    "check",
    "native",
    "own",
]

ffi, lib = native.ffi, native.lib

_ALIGN = 64
_U64 = (1 << 64) - 1
_MAX_FRAME = 65550  # 64 KiB and an Ethernet header
_BATCH = 64
_SLICE = 1.0  # seconds that the C side may sleep before Python looks for signals

_FAULTS = {
    lib.RING_FAULT_USED_INDEX: "used idx passed what was made available",
    lib.RING_FAULT_USED_ID: "a used id lies outside the ring",
    lib.RING_FAULT_USED_IDLE: "a used id heads no chain that the device has",
    lib.RING_FAULT_USED_LENGTH: "a used length exceeds the chain",
    lib.RING_FAULT_SHORT_FRAME: "a received frame is shorter than the vnet header",
    lib.RING_FAULT_NUM_BUFFERS: "num_buffers is 0 or exceeds the buffers used",
    lib.RING_FAULT_PARTIAL_BUFFER: "a merged buffer before the last is not full",
}

# Bits that make of the ring or the header something that is not driven here, or promise
# more of a header than is known here.
_NOT_DRIVEN = (
    virtio.VIRTIO_F_RING_PACKED,
    virtio.VIRTIO_F_IN_ORDER,
    virtio.VIRTIO_NET_F_HASH_REPORT,
    virtio.VIRTIO_NET_F_GUEST_HDRLEN,
    virtio.VIRTIO_NET_F_RSC_EXT,
    virtio.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
    virtio.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO,
)


class RingError(VhostctlError):
    """The device broke the ring protocol; the queue is of no use until it is made anew.

    `fault` is the C side's RING_FAULT_* code.
    """

    fault: int = 0

    def __init__(self, label: str, fault: int) -> None:
        super().__init__(
            f"{label} is broken: {_FAULTS.get(fault, f'fault {fault}')}",
            hint="reset the device and make its queues anew",
        )
        self.fault = fault


@dataclass(frozen=True, slots=True)
class _Settings:
    features: int
    buffer_size: int
    max_frame: int

    def __post_init__(self) -> None:
        for bit in _NOT_DRIVEN:
            if self.features >> bit & 1:
                raise InvalidArgument(
                    f"{virtio.FEATURE_NAMES[bit]} is not driven here",
                    hint="leave it out of the acknowledged features",
                )
        if not 128 <= self.buffer_size <= 1 << 20 or self.buffer_size % _ALIGN:
            raise InvalidArgument(
                f"buffer size {self.buffer_size}", hint="use a multiple of 64 in 128..1048576"
            )
        if not 14 <= self.max_frame <= _MAX_FRAME:
            raise InvalidArgument(f"frame size {self.max_frame}", hint=f"use 14..{_MAX_FRAME}")

    def has(self, bit: int) -> bool:
        return bool(self.features >> bit & 1)

    def shape(self, receive: bool) -> native.CData:
        shape = ffi.new("struct net_shape *")
        lib.net_shape(shape, self.features & _U64, self.buffer_size, self.max_frame, receive)
        return shape

    def arena(self, size: int, receive: bool) -> int:
        """Return the bytes of tables and buffers for a ring of `size` descriptors."""
        shape = self.shape(receive)
        needed = shape.chain
        if shape.mergeable:
            needed = -(-(shape.header + shape.limit) // self.buffer_size)
        if not needed <= size <= 32768 or size & (size - 1):
            raise InvalidArgument(
                f"a ring of {size} descriptors for frames of {self.max_frame} bytes",
                hint=f"use a power of two in {needed}..32768, or larger buffers",
            )
        return lib.ring_arena(size, shape.segments, self.buffer_size)


def own(made: native.CData, destroy: Callable[[native.CData], None], label: str) -> native.CData:
    """Return what the C side made, destroyed with its last reference. KernelError: no memory."""
    if not made:
        raise kernel_error(errno.ENOMEM, "allocation", label)
    return ffi.gc(made, destroy)


class NetQueue:
    """One direction of a pair.

    Synchronisation: one thread at a time drives a queue, any other gets StateError.
    """

    def __init__(self, label: str, config: native.CData, limit: int) -> None:
        self.label = label
        self.limit = limit
        """Longest frame, bytes; a VLAN tag included."""
        self._lock = threading.Lock()
        self._queue: native.CData | None = own(
            lib.net_queue_create(config), lib.net_queue_destroy, label
        )

    @property
    def handle(self) -> native.CData:
        """The C side. Raises ClosedError after `close()`."""
        if self._queue is None:
            raise ClosedError(f"{self.label} is closed")
        return self._queue

    @contextmanager
    def claim(self) -> Iterator[native.CData]:
        """Drive the queue for the length of a with block, which gets the C side.

        Raises ClosedError, and StateError while another thread drives it.
        """
        if not self._lock.acquire(blocking=False):
            raise StateError(f"{self.label} is driven by another thread", hint="stop that first")
        try:
            yield self.handle
        finally:
            self._lock.release()

    def stats(self) -> native.CData:
        """Return a fresh ``struct net_stats``, from any thread. Raises ClosedError."""
        stats = ffi.new("struct net_stats *")
        lib.net_queue_stats(self.handle, stats)
        return stats

    @property
    def closed(self) -> bool:
        """Whether the C side is gone."""
        return self._queue is None

    def forget(self) -> None:
        """Let go of the C side, within a `claim()`."""
        self._queue = None


def check(result: int, *queues: NetQueue) -> int:
    """Return what the C side returned if it is no error.

    Raises RingError if the device broke one of `queues`, KernelError for any -errno.
    """
    if result >= 0:
        return result
    for queue in queues:
        fault = queue.handle.ring.fault
        if fault:
            raise RingError(queue.label, fault)
    raise kernel_error(-result, "I/O", ", ".join(queue.label for queue in queues))


class QueuePair:
    """A receive and a transmit queue, frame by frame.

    Synchronisation: one thread may receive while another sends; `stats()` is for any.
    """

    def __init__(self, index: int, rx: NetQueue, tx: NetQueue, features: int) -> None:
        self.index = index
        self.features = features
        """The acknowledged bits."""
        self.rx = rx
        self.tx = tx
        self._stage = ffi.new("uint8_t[]", _BATCH * 2048 + rx.limit)
        self._lengths = ffi.new("uint32_t[]", _BATCH)

    def start(self) -> None:
        """Post receive buffers and kick both rings, whatever the device asked for.

        Call it when the device starts, and again when it starts again: the rings go on
        where they were. Raises RingError, KernelError.
        """
        for queue in (self.rx, self.tx):
            with queue.claim() as handle:
                check(lib.net_start(handle), queue)

    def send(self, frames: Sequence[bytes | bytearray | memoryview]) -> int:
        """Queue frames, each from its Ethernet header on; return how many there was room for.

        Takes back what the device has used, and kicks if the device wants it. Raises
        InvalidArgument (an empty or too long frame: nothing was queued) and RingError.
        """
        lengths = array("I", [memoryview(frame).nbytes for frame in frames])
        for length in lengths:
            if not 1 <= length <= self.tx.limit:
                raise InvalidArgument(f"frame of {length} bytes", hint=f"use 1..{self.tx.limit}")
        with self.tx.claim() as tx:
            packed = ffi.from_buffer("uint8_t[]", b"".join(frames))
            sizes = ffi.from_buffer("uint32_t[]", lengths)
            return check(lib.pump_send(tx, packed, sizes, len(lengths)), self.tx)

    def receive(self, limit: int = 64) -> list[bytes]:
        """Return up to `limit` frames that have come, without vnet headers; does not wait.

        Their buffers go back to the device. Frames that are empty or too long are dropped
        and counted. With GUEST_CSUM a checksum, and with GUEST_TSO4 and the like the cut into
        segments, may be left to the guest: nothing tells of it here (see `Patch`). Raises
        RingError; frames that came before a fault are returned first.
        """
        frames: list[bytes] = []
        with self.rx.claim() as rx:
            while len(frames) < limit:
                room = min(limit - len(frames), _BATCH)
                count = lib.pump_receive(rx, self._stage, len(self._stage), self._lengths, room)
                if count <= 0:
                    if not frames:
                        check(count, self.rx)
                    break
                start = 0
                for i in range(count):
                    frames.append(bytes(ffi.buffer(self._stage + start, self._lengths[i])))
                    start += self._lengths[i]
        return frames

    def wait(
        self, timeout: float | None = None, *, receive: bool = True, transmit: bool = False
    ) -> bool:
        """Sleep until there is a frame to receive or room to send, at most `timeout` seconds.

        True: something can be done. `transmit` waits for room for a frame of any length,
        and then for most of the ring. Raises InvalidArgument if nothing is waited for.
        """
        if not receive and not transmit:
            raise InvalidArgument("a wait for nothing", hint="set receive or transmit")
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        queues = [q for q, wanted in ((self.rx, receive), (self.tx, transmit)) if wanted]
        with ExitStack() as stack:
            claimed = {queue: stack.enter_context(queue.claim()) for queue in queues}
            rx, tx = claimed.get(self.rx, ffi.NULL), claimed.get(self.tx, ffi.NULL)
            while True:
                left = min(max(deadline - time.monotonic(), 0.0), _SLICE)
                result = lib.pump_ready(rx, tx, math.ceil(left * 1000))
                if result != -errno.EINTR and check(result, *queues):
                    return True
                if not left:
                    return False

    def stats(self) -> QueueStats:
        """Return the counters. Raises ClosedError."""
        rx, tx = self.rx.stats(), self.tx.stats()
        return QueueStats(
            rx_frames=rx.frames,
            rx_bytes=rx.bytes,
            rx_kicks=rx.kicks,
            rx_calls=rx.calls,
            rx_errors=rx.errors,
            rx_posted=rx.in_flight,
            tx_frames=tx.frames,
            tx_bytes=tx.bytes,
            tx_kicks=tx.kicks,
            tx_calls=tx.calls,
            tx_errors=tx.errors,
            tx_in_flight=tx.in_flight,
            tx_completed=tx.completed,
        )


class NetDriver(Closing):
    """virtio-net driver over guest memory; a context manager.

    Make it before the device starts: it writes the rings' first state. Close it before
    the memory is unmapped.
    """

    def __init__(
        self,
        memory: GuestMemory,
        pairs: Sequence[tuple[Queue, Queue]],
        features: int,
        arena: tuple[int, int],
        *,
        buffer_size: int = 2048,
        max_frame: int = 1514,
    ) -> None:
        """Lay out the rings of `pairs`, (receive, transmit) each.

        `features` are the acknowledged bits; `arena` is (gpa, bytes) for buffers and
        indirect tables, see `arena_size`. `buffer_size` and `max_frame` are bytes, the
        latter without a VLAN tag: 65549 where GSO packets are to pass. Raises
        InvalidArgument, and what ``memory.hva`` raises.
        """
        settings = _Settings(features, buffer_size, max_frame)
        self._next = -(-arena[0] // _ALIGN) * _ALIGN
        self._end = arena[0] + arena[1]
        made: list[QueuePair] = []
        for index, (rx, tx) in enumerate(pairs):
            receive, transmit = (
                self._make(f"{name} queue of pair {index}", memory, place, settings, name == "rx")
                for name, place in (("rx", rx), ("tx", tx))
            )
            made.append(QueuePair(index, receive, transmit, features))
        self.pairs = tuple(made)

    def _make(
        self, label: str, memory: GuestMemory, place: Queue, settings: _Settings, receive: bool
    ) -> NetQueue:
        arena = settings.arena(place.size, receive)
        if self._next + arena > self._end:
            raise InvalidArgument(
                f"{label}: arena is {self._next + arena - self._end} bytes short",
                hint="see NetDriver.arena_size()",
            )
        if not 0 <= place.base <= 0xFFFF:
            raise InvalidArgument(f"{label}: base {place.base}", hint="use 0..65535")
        event_idx = settings.has(virtio.VIRTIO_RING_F_EVENT_IDX)
        parts = {
            "desc": (place.desc, virtio.vring_desc_size(place.size), 16),
            "avail": (place.avail, virtio.vring_avail_size(place.size, event_idx=event_idx), 2),
            "used": (place.used, virtio.vring_used_size(place.size, event_idx=event_idx), 4),
            "arena": (self._next, arena, _ALIGN),
        }
        config = ffi.new("struct net_queue_config *")
        for name, (gpa, length, align) in parts.items():
            hva = memory.hva(gpa, length)
            if hva % align:
                raise InvalidArgument(f"{label}: {name} at {gpa:#x} is not on {align} bytes")
            setattr(config, name, ffi.cast("void *", hva))
        config.arena_gpa = self._next
        config.features = settings.features & _U64
        config.buffer_size, config.max_frame = settings.buffer_size, settings.max_frame
        config.size, config.base = place.size, place.base
        config.kick, config.call = place.kick, place.call
        config.receive = receive
        self._next += arena
        return NetQueue(label, config, settings.shape(receive).limit)

    @staticmethod
    def arena_size(sizes: Sequence[int], features: int, buffer_size: int, max_frame: int) -> int:
        """Return the bytes of arena for rings of `sizes` descriptors, wherever it starts.

        `sizes` is in virtqueue order: rx and tx of pair 0, rx and tx of pair 1, ... Raises
        InvalidArgument as the constructor does.
        """
        settings = _Settings(features, buffer_size, max_frame)
        queues = sum(settings.arena(size, not index & 1) for index, size in enumerate(sizes))
        return queues + _ALIGN - 1

    def close(self) -> None:
        """Forget the queues; a second call does nothing, other later use raises ClosedError.

        Raises StateError while a thread drives one of them; none is forgotten then.
        """
        queues = [queue for pair in self.pairs for queue in (pair.rx, pair.tx) if not queue.closed]
        with ExitStack() as stack:
            for queue in queues:
                stack.enter_context(queue.claim())
            for queue in queues:
                queue.forget()
