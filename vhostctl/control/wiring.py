"""What one wiring consists of, and the actions that put it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from vhostctl.abi import virtio
from vhostctl.abi.vhost import VHOST_BACKEND_F_IOTLB_MSG_V2
from vhostctl.control.addressspace import AddressSpace, MemoryListener, Pin, VhostMemory
from vhostctl.control.dirtylog import DirtyLog
from vhostctl.control.features import (
    TAP_BITS,
    NegotiationResult,
    Policy,
    mask,
    negotiate,
    tap_features,
)
from vhostctl.control.iotlb import Iotlb
from vhostctl.control.iovamap import IovaMap
from vhostctl.control.memtable import MemoryTable
from vhostctl.control.multiqueue import compact
from vhostctl.control.pair import VhostPair
from vhostctl.control.rings import RingPlacement, VirtQueue, check_size, place_rings
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory
from vhostctl.host.tap import MAX_QUEUES, UNLIMITED, Tap, TapQueue
from vhostctl.host.vhost import DEFAULT_PATH, Region, VhostNet

DRIVER_BITS = mask(
    virtio.VIRTIO_NET_F_MRG_RXBUF,
    virtio.VIRTIO_RING_F_INDIRECT_DESC,
    virtio.VIRTIO_RING_F_EVENT_IDX,
    virtio.VIRTIO_F_VERSION_1,
    virtio.VIRTIO_F_ACCESS_PLATFORM,
)
"""Feature bits that the driver in guest/ understands and that need nobody's offload."""


class Memory(Protocol):
    """Guest memory, whoever maps it."""

    @property
    def regions(self) -> Sequence[Region]:
        """Its regions; the rings go into the lowest one."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What to wire: `queues` is pairs, `queue_size` descriptors, `memory_size` bytes.

    `driver` are the feature bits that the guest's driver understands, `vmm` those that the
    caller serves itself (MAC, control queue...). `busyloop` is how long the worker polls, in
    microseconds. `worker` is ``task``, ``kthread`` or None for the kernel's choice.
    `translating` makes ring and buffer addresses I/O virtual ones, see control/iotlb.py.
    """

    tap: str = "tap0"
    device: str = DEFAULT_PATH
    queues: int = 1
    queue_size: int = 256
    memory_size: int = 32 << 20
    policy: Policy = field(default_factory=Policy)
    driver: int = DRIVER_BITS
    vmm: int = 0
    sndbuf: int = UNLIMITED
    busyloop: int = 0
    worker: str | None = None
    translating: bool = False

    def __post_init__(self) -> None:
        """Raise InvalidArgument for what no device takes."""
        check_size(self.queue_size)
        if not 1 <= self.queues <= MAX_QUEUES:
            raise InvalidArgument(f"{self.queues} queue pairs", hint=f"use 1 to {MAX_QUEUES}")
        if self.worker not in (None, "task", "kthread"):
            raise InvalidArgument(f"worker {self.worker!r}", hint="use task or kthread")
        if not 0 <= self.busyloop < 1 << 32:
            raise InvalidArgument(f"busyloop of {self.busyloop} us", hint="use 0 to 2^32 - 1")


@dataclass(frozen=True, slots=True)
class Handed:
    """What the caller brings along and keeps; None or empty for what is to be opened here.

    `events` are the eventfds of each ring by name, in virtqueue order: ``kick``, ``call``
    and ``error``, of which any may be left out. `rings` are where the rings lie already.
    `mappings` is what a translating device sees of memory.
    """

    memory: AddressSpace | None = None
    tap: Tap | None = None
    vhost: Sequence[VhostNet] = ()
    events: Sequence[dict[str, EventFd]] = ()
    rings: Sequence[RingPlacement] = ()
    mappings: IovaMap | None = None

    def check(self, pairs: int) -> None:
        """Raise InvalidArgument unless there is one of each for each of `pairs`, or none."""
        for kind, count, each in (
            ("vhost devices", len(self.vhost), 1),
            ("tap queues", len(self.tap.queues) if self.tap else 0, 1),
            ("rings' eventfds", len(self.events), 2),
            ("ring placements", len(self.rings), 2),
        ):
            if count and count != each * pairs:
                raise InvalidArgument(
                    f"{pairs} queue pairs and {count} {kind}",
                    hint=f"each pair needs {each} of its own",
                )


@dataclass(frozen=True, slots=True)
class TapSettings:
    """What a queue of a tap had before it was adapted; offloads cannot be asked for."""

    header_size: int
    sndbuf: int

    @classmethod
    def of(cls, queue: TapQueue) -> Self:
        """Ask `queue`. Raises KernelError."""
        return cls(queue.vnet_hdr_size(), queue.sndbuf())

    def apply(self, queue: TapQueue) -> None:
        """Give it back to `queue`."""
        queue.set_vnet_hdr_size(self.header_size)
        queue.set_sndbuf(self.sndbuf)


class _Identity:
    """Has every region mapped at its guest physical address, as a memory listener."""

    def __init__(self, iotlb: Iotlb) -> None:
        self._iotlb = iotlb

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:
        old, new = ({(r.gpa, r.size) for r in table.regions} for table in (before, after))
        for gpa, size in old - new:
            self._iotlb.unmap(gpa, size)
        for gpa, size in new - old:
            self._iotlb.map(gpa, size, gpa)


class Wiring:
    """The parts of one wiring, each None or empty until its step has been taken."""

    def __init__(
        self, config: SessionConfig, handed: Handed, open_tap: Callable[[], Tap] | None
    ) -> None:
        self.config = config
        self.handed = handed
        self.memory = handed.memory or AddressSpace()
        self.tap = handed.tap
        self.queues: list[VirtQueue] = []
        self.pairs: list[VhostPair] = []
        self.order = list(range(config.queues))
        """The enabled pair at each of the tap's queue indices."""
        self.masked: dict[int, bool] = {}
        """Queues whose call is masked from the start: whether one came already."""
        self.busyloop = config.busyloop
        self.negotiated = NegotiationResult(0, 0, 0, 0)
        self.log = DirtyLog(self.pairs, self.memory.table)
        self.iotlb: Iotlb | None = None
        self.arena = (0, 0)
        self._mapped: GuestMemory | None = None
        self._made: list[EventFd] = []
        self._pins: dict[int, list[Pin]] = {}
        self._listeners: list[MemoryListener] = []
        self._tap_before: dict[int, TapSettings] = {}
        self._opened_tap: Tap | None = None
        self._open_tap = open_tap or (lambda: Tap.open(config.tap, config.queues))

    def map_memory(self) -> None:
        """Map guest memory of our own."""
        self._mapped = GuestMemory.anonymous(self.config.memory_size)
        with self.memory.transaction():
            for region in self._mapped.regions:
                self.memory.add(region, "guest memory")

    def unmap_memory(self) -> None:
        """Undo `map_memory`."""
        if self._mapped is not None:
            with self.memory.transaction():
                for region in self.memory.regions:
                    self.memory.remove(region)
            self._mapped.close()
            self._mapped = None

    def place(self) -> None:
        """Lay out the rings from the start of memory, unless they lie somewhere; make eventfds."""
        rings = list(self.handed.rings)
        if not rings:
            if not self.memory.table.regions:
                raise InvalidArgument("the guest has no memory", hint="give it at least one region")
            first = self.memory.table.regions[0]
            count = 2 * self.config.queues
            rings, end = place_rings(first.gpa, count, self.config.queue_size)
            self.arena = (end, first.gpa + first.size - end)
        events = self.handed.events or [{} for _ in rings]
        for index, (ring, given) in enumerate(zip(rings, events, strict=True)):
            queue = VirtQueue(ring, dict(given))
            self.queues.append(queue)
            self._pin(index, ring)
            for name in ("kick", "call", "error"):
                if name not in given:
                    queue.events[name] = EventFd.create(f"{name} of queue {index}")
                    self._made.append(queue.events[name])
        for pair, device in enumerate(self.handed.vhost):
            self._add_pair(pair, device)

    def _pin(self, index: int, placement: RingPlacement) -> None:
        pins: list[Pin] = []
        if not self.config.translating:  # else they are no addresses of guest memory's
            for part, (gpa, length) in placement.parts().items():
                pins.append(self.memory.pin(gpa, length, f"queue {index} {part}"))
        self._unpin(index)
        self._pins[index] = pins

    def _unpin(self, index: int) -> None:
        for pin in self._pins.pop(index, ()):
            pin.close()

    def move_ring(self, index: int, placement: RingPlacement) -> None:
        """Have queue `index` lie somewhere else from now on. Raises InvalidArgument."""
        self._pin(index, placement)
        self.queues[index].placement = placement

    def unplace(self) -> None:
        """Undo `place`."""
        for index in range(len(self.queues)):
            self._unpin(index)
        for pair in self.pairs:
            pair.forget()
        for event in self._made:
            event.close()
        self._made.clear()
        self.pairs.clear()
        self.queues.clear()

    def attach_tap(self) -> None:
        """Open the tap's queues."""
        self.tap = self._opened_tap = self._open_tap()
        queues, wanted = self.tap.queues, set(self.order)
        self.order[:] = range(len(queues))
        for pair in set(self.order) - wanted:
            queues[pair].disable()
            compact(self.order, pair)

    def detach_tap(self) -> None:
        """Undo `attach_tap`; a tap that took its place is its owner's."""
        if self._opened_tap is not None:
            self._opened_tap.close()
        self.tap = self._opened_tap = None

    def _add_pair(self, index: int, device: VhostNet) -> None:
        queues = self.queues[2 * index : 2 * index + 2]
        prime = self._prime if self.config.translating else None
        pair = VhostPair(index, device, queues, self._locate, prime)
        self.pairs.append(pair)
        for ring, call in enumerate(pair.calls):
            if 2 * index + ring in self.masked:
                call.mask(pending=self.masked[2 * index + ring])

    def _locate(self, gpa: int, length: int, what: str) -> int:
        return gpa if self.config.translating else self.memory.hva(gpa, length, what)

    def open_vhost(self, pair: int) -> None:
        """Open the vhost device of `pair`."""
        label = f"{self.config.device} (pair {pair})"
        device = VhostNet.at(self.config.device, label)
        try:
            self._add_pair(pair, device)
        except BaseException:
            device.close()
            raise

    def close_vhost(self, pair: int) -> None:
        """Undo the `open_vhost` of `pair`."""
        for opened in self.pairs[pair:]:
            opened.close()
        del self.pairs[pair:]

    def choose_worker(self, pair: int) -> None:
        """VHOST_SET_FORK_FROM_OWNER, where the caller has a wish."""
        if not self.pairs[pair].owned:
            self.pairs[pair].vhost.set_fork_from_owner(self.config.worker == "task")

    def negotiate(self) -> None:
        """Ask device and tap what they offer and settle the features."""
        self.negotiated = negotiate(
            driver=self.config.driver,
            device=self.pairs[0].vhost.get_features(),
            tap=self._tap_features(),
            vmm=self.config.vmm,
            policy=self.config.policy,
            translating=self.config.translating,
        )

    def _tap_features(self) -> int:
        """Ask the tap, which tells only by trying, if the driver cares."""
        wanted = self.config.driver | self.config.policy.required
        return tap_features(self.tap_queue(0).offloads()) if wanted & TAP_BITS else 0

    def set_backend_features(self, pair: int) -> None:
        """VHOST_SET_BACKEND_FEATURES: the IOTLB's second message format, if it is offered."""
        device = self.pairs[pair].vhost
        wanted = 1 << VHOST_BACKEND_F_IOTLB_MSG_V2
        device.set_backend_features(device.get_backend_features() & wanted)

    def adapt(self, queue: TapQueue) -> None:
        """Make a tap's queue agree with what was negotiated."""
        queue.set_vnet_hdr_size(self.negotiated.header_size)
        queue.set_vnet_le(self.negotiated.endian == "little")
        queue.set_offload(self.negotiated.offload)
        queue.set_sndbuf(self.config.sndbuf)

    def configure_tap(self, pair: int) -> None:
        """`adapt` the tap's queue of `pair`."""
        queue = self.tap_queue(pair)
        self._tap_before[pair] = TapSettings.of(queue)
        self.adapt(queue)

    def restore_tap(self, pair: int) -> None:
        """Undo `configure_tap`: a tap that outlives us has its header size back."""
        before = self._tap_before.pop(pair, None)
        if before is not None and self.tap is not None:
            before.apply(self.tap.queues[pair])

    def exchange_tap(self, tap: Tap, before: dict[int, TapSettings], order: Sequence[int]) -> None:
        """Have `tap`, which had `before`, in the place of the tap so far."""
        for pair in range(self.config.queues):
            self.restore_tap(pair)
        self.detach_tap()
        self.tap, self._tap_before = tap, before
        self.order[:] = order

    def enabled(self, pair: int) -> bool:
        """Return whether `pair` takes part."""
        return pair in self.order

    def tap_queue(self, pair: int) -> TapQueue:
        """Return the tap's queue that serves `pair`."""
        if self.tap is None:
            raise StateError("there is no tap yet")
        return self.tap.queues[pair]

    def translate(self) -> None:
        """Have somebody who answers IOTLB misses."""
        devices = [pair.vhost for pair in self.pairs]
        mappings = IovaMap() if self.handed.mappings is None else self.handed.mappings
        self.iotlb = Iotlb(devices, mappings)

    def end_translation(self) -> None:
        """Undo `translate`."""
        if self.iotlb is not None:
            self.iotlb.close()
            self.iotlb = None

    def follow_memory(self) -> None:
        """Have log and IOTLB hear of memory before the devices do."""
        self._listen(self.log)
        if self.iotlb is not None:
            self._listen(self.iotlb)
            if self.handed.mappings is None:
                self._listen(_Identity(self.iotlb))

    def _listen(self, listener: MemoryListener) -> None:
        self.memory.register(listener)
        self._listeners.append(listener)

    def set_mem_table(self, pair: int) -> None:
        """VHOST_SET_MEM_TABLE, and again whenever memory changes."""
        self._listen(VhostMemory([self.pairs[pair].vhost]))

    def forget_memory(self) -> None:
        """Undo `follow_memory` and every `set_mem_table`: the devices keep their tables."""
        while self._listeners:
            self.memory.unregister(self._listeners.pop())

    def _prime(self, device: VhostNet, iova: int, length: int) -> None:
        if self.iotlb is None:
            raise StateError("nobody answers IOTLB misses")
        self.iotlb.prime(device, iova, length)
