"""What one wiring consists of, and the actions that put it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vhostctl.abi import virtio
from vhostctl.control.features import Negotiated, Policy, mask, negotiate
from vhostctl.control.memtable import MemoryTable
from vhostctl.control.rings import RingPlacement, check_size, place_rings
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host import module
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory
from vhostctl.host.tap import MAX_QUEUES, UNLIMITED, Tap, TapQueue
from vhostctl.host.vhost import DEFAULT_PATH, Region, VhostNet

DRIVER_BITS = mask(
    virtio.VIRTIO_NET_F_MRG_RXBUF,
    virtio.VIRTIO_RING_F_INDIRECT_DESC,
    virtio.VIRTIO_RING_F_EVENT_IDX,
    virtio.VIRTIO_F_VERSION_1,
)
"""Feature bits that the driver in guest/ understands."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What to wire: `queues` is pairs, `queue_size` descriptors, `memory_size` bytes."""

    tap: str = "tap0"
    device: str = DEFAULT_PATH
    queues: int = 1
    queue_size: int = 256
    memory_size: int = 32 << 20
    policy: Policy = field(default_factory=Policy)
    driver: int = DRIVER_BITS
    sndbuf: int = UNLIMITED

    def __post_init__(self) -> None:
        """Raise InvalidArgument for sizes that no device takes."""
        check_size(self.queue_size)
        if not 1 <= self.queues <= MAX_QUEUES:
            raise InvalidArgument(f"{self.queues} queue pairs", hint=f"use 1 to {MAX_QUEUES}")


class Memory(Protocol):
    """Guest memory, whoever maps it."""

    @property
    def regions(self) -> Sequence[Region]:
        """Its regions; the rings go into the lowest one."""


@dataclass(slots=True)
class VirtQueue:
    """One ring of a wiring: guest physical addresses, and the eventfds that go with it.

    `error` is signalled by the device when it finds the ring malformed.
    """

    placement: RingPlacement
    events: dict[str, EventFd]
    base: int = 0

    @property
    def size(self) -> int:
        """Descriptors in the ring."""
        return self.placement.size

    @property
    def desc(self) -> int:
        """Guest physical address of the descriptor table."""
        return self.placement.desc

    @property
    def avail(self) -> int:
        """Guest physical address of the avail ring."""
        return self.placement.avail

    @property
    def used(self) -> int:
        """Guest physical address of the used ring."""
        return self.placement.used

    @property
    def kick(self) -> int:
        """Descriptor of the eventfd that the driver signals; stays owned by the wiring."""
        return self.events["kick"].fileno()

    @property
    def call(self) -> int:
        """Descriptor of the eventfd that the device signals; stays owned by the wiring."""
        return self.events["call"].fileno()

    @property
    def error(self) -> EventFd:
        """The eventfd that counts malformed descriptors."""
        return self.events["error"]


class Wiring:
    """The parts of one wiring, each None or empty until its step has been taken."""

    def __init__(
        self,
        config: SessionConfig,
        memory: Memory | None,
        tap: Tap | None,
        vhost: Sequence[VhostNet],
        open_tap: Callable[[], Tap] | None,
    ) -> None:
        self.config = config
        self.memory = memory
        self._mapped: GuestMemory | None = None
        self.tap = tap
        self.vhost = list(vhost)
        self.queues: list[VirtQueue] = []
        self.table = MemoryTable(())
        self.negotiated = Negotiated(0, 0, 0, 0)
        self.arena = (0, 0)
        self.attached: set[tuple[int, int]] = set()
        self._tap_before: dict[int, tuple[int, int]] = {}
        self._open_tap = open_tap or (lambda: Tap.open(config.tap, config.queues))

    def map_memory(self) -> None:
        """Map guest memory of our own."""
        self.memory = self._mapped = GuestMemory.anonymous(self.config.memory_size)

    def unmap_memory(self) -> None:
        """Undo `map_memory`."""
        if self._mapped is not None:
            self._mapped.close()
            self.memory = self._mapped = None

    def place(self) -> None:
        """Build the memory table; lay the rings and their eventfds out from its start."""
        if self.memory is None:
            raise StateError("the rings cannot be placed before there is memory")
        self.table = MemoryTable(self.memory.regions, module.max_mem_regions())
        if not self.table.regions:
            raise InvalidArgument("the guest has no memory", hint="give it at least one region")
        first = self.table.regions[0]
        rings, end = place_rings(first.gpa, 2 * self.config.queues, self.config.queue_size)
        self.arena = (end, first.gpa + first.size - end)
        for index, ring in enumerate(rings):
            for part, (gpa, length) in ring.parts().items():
                self.table.hva(gpa, length, f"queue {index} {part}")
            queue = VirtQueue(ring, {})
            self.queues.append(queue)
            for name in ("kick", "call", "error"):
                queue.events[name] = EventFd.create(f"{name} of queue {index}")

    def unplace(self) -> None:
        """Undo `place`."""
        for queue in self.queues:
            for event in queue.events.values():
                event.close()
        self.queues.clear()

    def attach_tap(self) -> None:
        """Open the tap's queues."""
        self.tap = self._open_tap()

    def detach_tap(self) -> None:
        """Undo `attach_tap`."""
        if self.tap is not None:
            self.tap.close()
            self.tap = None

    def open_vhost(self) -> None:
        """Open one more vhost device."""
        label = f"{self.config.device} (pair {len(self.vhost)})"
        self.vhost.append(VhostNet.at(self.config.device, label))

    def close_vhost(self, pair: int) -> None:
        """Undo the `open_vhost` of `pair`."""
        for device in self.vhost[pair:]:
            device.close()
        del self.vhost[pair:]

    def negotiate(self) -> None:
        """Ask the device what it offers and settle the features."""
        self.negotiated = negotiate(
            driver=self.config.driver,
            device=self.vhost[0].get_features(),
            policy=self.config.policy,
        )

    def configure_tap(self, pair: int) -> None:
        """Make the tap's queue agree with what was negotiated."""
        queue = self.tap_queue(pair)
        self._tap_before[pair] = (queue.vnet_hdr_size(), queue.sndbuf())
        queue.set_vnet_hdr_size(self.negotiated.header_size)
        queue.set_offload(self.negotiated.offload)
        queue.set_sndbuf(self.config.sndbuf)

    def restore_tap(self, pair: int) -> None:
        """Undo `configure_tap`: a tap that outlives us has its header size back.

        Offloads cannot be asked for; they stay as they were negotiated.
        """
        before = self._tap_before.pop(pair, None)
        if before is not None and self.tap is not None:
            header, sndbuf = before
            self.tap.queues[pair].set_vnet_hdr_size(header)
            self.tap.queues[pair].set_sndbuf(sndbuf)

    def tap_queue(self, pair: int) -> TapQueue:
        """Return the tap's queue that serves `pair`."""
        if self.tap is None:
            raise StateError("there is no tap yet")
        return self.tap.queues[pair]

    def set_ring_address(self, pair: int, ring: int) -> None:
        """VHOST_SET_VRING_ADDR from the placement."""
        queue = self.queues[2 * pair + ring]
        parts = {
            name: self.table.hva(gpa, length, f"queue {2 * pair + ring} {name}")
            for name, (gpa, length) in queue.placement.parts().items()
        }
        self.vhost[pair].set_vring_addr(ring, **parts)
