"""Where the rings of a wiring lie and stand, as device and guest memory tell it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import msgspec

from vhostctl.control import access
from vhostctl.control.changes import rings
from vhostctl.control.pair import VhostPair
from vhostctl.control.wiring import Wiring

_INDEX = 2  # bytes, and as many of flags before it, in avail and used ring alike


class RingStatus(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """One ring: `size` descriptors at three guest physical addresses.

    `avail_index` counts what the driver made available, `base` what the device took of it
    (VHOST_GET_VRING_BASE), `used_index` what the device gave back, each modulo 65536. `running` is
    whether the ring has a backend, `masked` whether its calls are kept from the guest.
    """

    queue: int
    size: int
    desc: int
    avail: int
    used: int
    avail_index: int
    base: int
    used_index: int
    running: bool
    masked: bool


def look(wiring: Wiring) -> list[RingStatus]:
    """Return the status of every ring, in virtqueue order. Raises KernelError."""
    return list(_look(wiring))


def _look(wiring: Wiring) -> Iterator[RingStatus]:
    order = "little" if wiring.negotiated.endian == "little" else sys.byteorder

    def index(pair: VhostPair, ring: int, part: str) -> int:
        gpa = getattr(pair.queues[ring], part) + _INDEX
        data = access.read(wiring.memory, gpa, _INDEX, f"{pair.name_of(ring)} {part}")
        return int.from_bytes(data, order)

    for pair, ring in rings(wiring):
        # In the order in which a buffer comes last to each: no count overtakes the one before it.
        used_index = index(pair, ring, "used")
        base = pair.base(ring)
        queue = pair.queues[ring]
        yield RingStatus(
            queue=2 * pair.index + ring,
            size=queue.size,
            desc=queue.desc,
            avail=queue.avail,
            used=queue.used,
            avail_index=index(pair, ring, "avail"),
            base=base,
            used_index=used_index,
            running=pair.attached(ring),
            masked=pair.calls[ring].masked,
        )
