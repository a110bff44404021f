"""Where the rings lie in guest memory, and the eventfds that go with each."""

from __future__ import annotations

from dataclasses import dataclass

from vhostctl.abi import virtio
from vhostctl.errors import InvalidArgument
from vhostctl.host.eventfd import EventFd

MAX_SIZE = 32768


@dataclass(frozen=True, slots=True)
class RingPlacement:
    """One split ring (virtio 1.2, section 2.7): guest physical addresses of its parts."""

    size: int
    desc: int
    avail: int
    used: int

    def parts(self) -> dict[str, tuple[int, int]]:
        """Return (address, bytes) of the descriptor table, avail and used ring by name."""
        return {
            "desc": (self.desc, virtio.vring_desc_size(self.size)),
            "avail": (self.avail, virtio.vring_avail_size(self.size, event_idx=True)),
            "used": (self.used, virtio.vring_used_size(self.size, event_idx=True)),
        }


def check_size(size: int) -> None:
    """Raise InvalidArgument unless vhost takes a ring of `size` descriptors."""
    if not 1 <= size <= MAX_SIZE or size & (size - 1):
        raise InvalidArgument(
            f"queue size {size}", hint=f"it must be a power of two between 1 and {MAX_SIZE}"
        )


def _align(address: int, to: int) -> int:
    return (address + to - 1) & -to


def place_rings(gpa: int, count: int, size: int) -> tuple[list[RingPlacement], int]:
    """Lay out `count` rings of `size` descriptors from `gpa` on, each on its own pages.

    Returns the placements and the first address behind them. Room for the event index
    is always there, so that placement does not depend on negotiation.
    """
    check_size(size)
    rings: list[RingPlacement] = []
    for _ in range(count):
        desc = _align(gpa, 4096)
        avail = desc + virtio.vring_desc_size(size)
        used = _align(avail + virtio.vring_avail_size(size, event_idx=True), 4096)
        gpa = used + virtio.vring_used_size(size, event_idx=True)
        rings.append(RingPlacement(size, desc, avail, used))
    return rings, _align(gpa, 4096)


@dataclass(slots=True)
class VirtQueue:
    """One ring: guest physical addresses, and the eventfds that go with it by name.

    `events` has ``kick``, ``call`` and ``error``; the last is signalled by the device when it
    finds the ring malformed. `base` is where both indices start.
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
        """Descriptor of the eventfd that the driver signals; stays with its owner."""
        return self.events["kick"].fileno()

    @property
    def call(self) -> int:
        """Descriptor of the eventfd that the device signals; stays with its owner."""
        return self.events["call"].fileno()

    @property
    def error(self) -> EventFd:
        """The eventfd that counts malformed descriptors."""
        return self.events["error"]
