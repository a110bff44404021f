"""What one wiring consists of, and the actions that put it together."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from vhostctl.abi import virtio
from vhostctl.abi.vhost import VHOST_BACKEND_F_IOTLB_MSG_V2, VHOST_F_LOG_ALL
from vhostctl.control.addressspace import AddressSpace, MemoryListener, VhostMemory
from vhostctl.control.dirtylog import DirtyLog
from vhostctl.control.features import TAP_BITS, NegotiationResult, Policy, mask, negotiate
from vhostctl.control.iotlb import Iotlb
from vhostctl.control.iovamap import IovaMap
from vhostctl.control.memtable import MemoryTable
from vhostctl.control.pair import VhostPair
from vhostctl.control.rings import RingPlacement, VirtQueue, check_size, place_rings
from vhostctl.control.tapside import TapSide
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory
from vhostctl.host.tap import MAX_QUEUES, UNLIMITED, Tap
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

    `enabled` is how many pairs take part from the start, the first ones; None: all of them.
    `link` is whether the link is up then.
    `driver` are the feature bits that the guest's driver understands, `vmm` those that the
    caller serves itself (MAC, control queue...). `busyloop` is how long the worker polls, in
    microseconds. `worker` is ``task``, ``kthread`` or None for the kernel's choice.
    `translating` makes ring and buffer addresses I/O virtual ones, see control/iotlb.py.
    """

    tap: str = "tap0"
    device: str = DEFAULT_PATH
    queues: int = 1
    enabled: int | None = None
    link: bool = True
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
        if self.enabled is not None and not 1 <= self.enabled <= self.queues:
            raise InvalidArgument(
                f"{self.enabled} enabled queue pairs", hint=f"use 1 to {self.queues}"
            )
        if self.worker not in (None, "task", "kthread"):
            raise InvalidArgument(f"worker {self.worker!r}", hint="use task or kthread")
        if not 0 <= self.busyloop < 1 << 32:
            raise InvalidArgument(f"busyloop of {self.busyloop} us", hint="use 0 to 2^32 - 1")


EVENTS = ("kick", "call", "error")
"""What the eventfds of a ring are called."""


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
        for name in {name for ring in self.events for name in ring} - set(EVENTS):
            raise InvalidArgument(f"event {name!r}", hint=f"a ring has {', '.join(EVENTS)}")
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


class _Identity:
    """Has every region mapped at its guest physical address, as a memory listener."""

    def __init__(self, iotlb: Iotlb) -> None:
        self._iotlb = iotlb

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:
        old, new = ({(r.gpa, r.size) for r in table.regions} for table in (before, after))
        with ExitStack() as back:
            for gpa, size in old - new:
                self._iotlb.unmap(gpa, size)
                back.callback(self._iotlb.map, gpa, size, gpa)
            for gpa, size in new - old:
                self._iotlb.map(gpa, size, gpa)
                back.callback(self._iotlb.unmap, gpa, size)
            back.pop_all()


class Wiring:
    """The parts of one wiring, each None or empty until its step has been taken."""

    def __init__(
        self, config: SessionConfig, handed: Handed, open_tap: Callable[[], Tap] | None
    ) -> None:
        self.config = config
        self.handed = handed
        self.memory = AddressSpace() if handed.memory is None else handed.memory
        self.side = TapSide(
            handed.tap,
            config.enabled or config.queues,
            config.sndbuf,
            open_tap or (lambda: Tap.open(config.tap, config.queues)),
        )
        self.queues: list[VirtQueue] = []
        self.pairs: list[VhostPair] = []
        self.link = config.link
        """Whether backends are attached while the session runs."""
        self.busyloop = config.busyloop
        self.negotiated = NegotiationResult(0, 0, 0, 0)
        self.log = DirtyLog(self.pairs, self.memory.table)
        self.log_offered = False
        self.iotlb: Iotlb | None = None
        self.arena = (0, 0)
        self._mapped: GuestMemory | None = None
        self._made: list[EventFd] = []
        self._pins: dict[int, ExitStack] = {}
        self._listeners: list[MemoryListener] = []

    def map_memory(self) -> None:
        """Map guest memory of our own."""
        self._mapped = GuestMemory.anonymous(self.config.memory_size)
        with self.memory.transaction():
            for region in self._mapped.regions:
                self.memory.add(region, "guest memory")

    def unmap_memory(self) -> None:
        """Undo `map_memory`."""
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with mapped, self.memory.transaction():
                for region in mapped.regions:
                    self.memory.remove(region)

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
            for name in EVENTS:
                if name not in given:
                    queue.events[name] = EventFd.create(f"{name} of queue {index}")
                    self._made.append(queue.events[name])
        for pair, device in enumerate(self.handed.vhost):
            self._add_pair(pair, device)

    def _pin(self, index: int, placement: RingPlacement) -> None:
        with ExitStack() as pins:
            if not self.config.translating:  # else they are no addresses of guest memory's
                for part, (gpa, length) in placement.parts().items():
                    what = f"queue {index} {part}"
                    pins.enter_context(self.memory.pin(gpa, length, what))
            self._unpin(index)
            self._pins[index] = pins.pop_all()

    def _unpin(self, index: int) -> None:
        if index in self._pins:
            self._pins.pop(index).close()

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

    def _add_pair(self, index: int, device: VhostNet) -> None:
        queues = self.queues[2 * index : 2 * index + 2]
        prime = self._prime if self.config.translating else None
        self.pairs.append(VhostPair(index, device, queues, self._locate, prime))

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
        if not self.pairs[pair].vhost.owned:
            self.pairs[pair].vhost.set_fork_from_owner(self.config.worker == "task")

    def own(self, pair: int) -> None:
        """VHOST_SET_OWNER, once: a device that was handed in stays ours."""
        if not self.pairs[pair].vhost.owned:
            self.pairs[pair].vhost.set_owner()

    def negotiate(self) -> None:
        """Ask devices and tap what they offer and settle the features."""
        offers = [pair.vhost.get_features() for pair in self.pairs]
        device = functools.reduce(operator.and_, offers)
        wanted = self.config.driver | self.config.policy.required
        self.log_offered = bool(device >> VHOST_F_LOG_ALL & 1)
        self.negotiated = negotiate(
            driver=self.config.driver,
            device=device,
            tap=self.side.features() if wanted & TAP_BITS else 0,
            vmm=self.config.vmm,
            policy=self.config.policy,
            translating=self.config.translating,
        )

    def set_backend_features(self, pair: int) -> None:
        """VHOST_SET_BACKEND_FEATURES: the IOTLB's second message format, if it is offered."""
        device = self.pairs[pair].vhost
        wanted = 1 << VHOST_BACKEND_F_IOTLB_MSG_V2
        device.set_backend_features(device.get_backend_features() & wanted)

    def enabled(self, pair: int) -> bool:
        """Return whether `pair` takes part."""
        return pair in self.side.order

    def wanted(self, pair: VhostPair, ring: int) -> bool:
        """Return whether a ring is to have a backend while the session runs."""
        return self.link and self.enabled(pair.index) and ring not in pair.stopped

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
        self._listeners.append(listener)  # first: an interrupt may come behind the other
        self.memory.register(listener)

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
