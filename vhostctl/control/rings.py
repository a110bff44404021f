"""Where the rings lie in guest memory."""

from __future__ import annotations

from dataclasses import dataclass

from vhostctl.abi import virtio
from vhostctl.errors import InvalidArgument

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
