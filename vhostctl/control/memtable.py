"""The memory table that vhost is told: regions checked before the kernel sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from vhostctl.abi.vhost import VHOST_PAGE_SIZE
from vhostctl.errors import InvalidArgument
from vhostctl.host.vhost import Region

_ADDRESS_SPACE = 1 << 64


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """[gpa, gpa + size) of the guest is [hva, hva + size) of this process; bytes."""

    gpa: int
    size: int
    hva: int


class MemoryTable:
    """Regions sorted by guest physical address, as VHOST_SET_MEM_TABLE takes them.

    linux/vhost_types.h asks for 4 KiB alignment. The kernels do not enforce it; this
    table does, because an unaligned region breaks the dirty log without a word.
    """

    def __init__(self, regions: Iterable[Region], limit: int = 64) -> None:
        """Check and keep `regions`; `limit` is vhost's max_mem_regions.

        Raises InvalidArgument: alignment, empty, past 2^64, overlap, too many.
        """
        ordered = sorted((GuestRegion(r.gpa, r.size, r.hva) for r in regions), key=lambda r: r.gpa)
        for region in ordered:
            _check(region)
        for below, above in itertools.pairwise(ordered):
            if below.gpa + below.size > above.gpa:
                raise InvalidArgument(f"memory region {above.gpa:#x} overlaps {below.gpa:#x}")
        if len(ordered) > limit:
            raise InvalidArgument(
                f"{len(ordered)} memory regions, the device takes {limit}",
                hint="merge neighbours, or raise vhost's max_mem_regions",
            )
        self.regions: tuple[GuestRegion, ...] = tuple(ordered)

    def hva(self, gpa: int, length: int, what: str) -> int:
        """Return where this process has [gpa, gpa + length), which `what` occupies.

        Raises InvalidArgument unless the whole range lies inside one region.
        """
        for region in self.regions:
            if region.gpa <= gpa and gpa + length <= region.gpa + region.size:
                return region.hva + (gpa - region.gpa)
        raise InvalidArgument(
            f"{what} at {gpa:#x}+{length:#x} is outside every memory region",
            hint="place it inside one region",
        )


def _check(region: GuestRegion) -> None:
    for field in ("gpa", "size", "hva"):
        value = getattr(region, field)
        if value % VHOST_PAGE_SIZE or not 0 <= value < _ADDRESS_SPACE:
            raise InvalidArgument(
                f"memory region {region.gpa:#x}+{region.size:#x}: {field} {value:#x} is not "
                f"aligned to {VHOST_PAGE_SIZE} bytes",
                hint="linux/vhost_types.h asks for 4 KiB",
            )
    if region.size == 0 or region.gpa + region.size > _ADDRESS_SPACE:
        raise InvalidArgument(f"memory region {region.gpa:#x}+{region.size:#x} is empty or wraps")
