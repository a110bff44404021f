"""The memory table that vhost is told: regions checked before the kernel sees them."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from vhostctl.abi.vhost import VHOST_PAGE_SIZE
from vhostctl.errors import InvalidArgument
from vhostctl.host.memory import describe
from vhostctl.host.vhost import Region

_ADDRESS_SPACE = 1 << 64
_gpa = attrgetter("gpa")


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """[gpa, gpa + size) of the guest is [hva, hva + size) of this process; bytes."""

    gpa: int
    size: int
    hva: int


class MemoryTable:
    """Regions sorted by guest physical address, as VHOST_SET_MEM_TABLE takes them.

    Neighbours that follow each other in the guest and in this process are one entry.
    linux/vhost_types.h asks for 4 KiB alignment. The kernels do not enforce it; this
    table does, because an unaligned region breaks the dirty log without a word.
    """

    def __init__(self, regions: Iterable[Region], limit: int = 64) -> None:
        """Check, merge and keep `regions`; `limit` is vhost's max_mem_regions.

        Raises InvalidArgument: alignment, empty, past 2^64, overlap, too many.
        """
        merged: list[GuestRegion] = []
        last: Region | None = None
        for region in sorted(regions, key=_gpa):
            _check(region)
            if last is not None and last.gpa + last.size > region.gpa:
                raise InvalidArgument(f"{_name(region)} overlaps {_name(last)}")
            last = region
            below = merged[-1] if merged else None
            if below is not None and (below.gpa + below.size, below.hva + below.size) == (
                region.gpa,
                region.hva,
            ):
                merged[-1] = GuestRegion(below.gpa, below.size + region.size, below.hva)
            else:
                merged.append(GuestRegion(region.gpa, region.size, region.hva))
        if len(merged) > limit:
            raise InvalidArgument(
                f"{len(merged)} memory regions with neighbours merged, the device takes {limit}",
                hint="map neighbours one behind the other, or raise vhost's max_mem_regions",
            )
        self.regions: tuple[GuestRegion, ...] = tuple(merged)

    @property
    def end(self) -> int:
        """The first guest physical address behind the highest region; 0 without any."""
        return self.regions[-1].gpa + self.regions[-1].size if self.regions else 0

    def find(self, gpa: int, length: int) -> int | None:
        """Return where this process has [gpa, gpa + length); None unless one region has it all."""
        at = bisect.bisect_right(self.regions, gpa, key=_gpa) - 1
        if at < 0 or length < 0:
            return None
        region = self.regions[at]
        return region.hva + gpa - region.gpa if gpa + length <= region.gpa + region.size else None

    def hva(self, gpa: int, length: int, what: str) -> int:
        """Return where this process has [gpa, gpa + length), which `what` occupies.

        Raises InvalidArgument unless the whole range lies inside one region.
        """
        found = self.find(gpa, length)
        if found is None:
            raise InvalidArgument(
                f"{what} at {gpa:#x}+{length:#x} is outside every memory region",
                hint="place it inside one region",
            )
        return found


def _name(region: Region) -> str:
    return describe(region.gpa, region.size, getattr(region, "name", ""))


def _check(region: Region) -> None:
    for field in ("gpa", "size", "hva"):
        value = getattr(region, field)
        if value % VHOST_PAGE_SIZE or not 0 <= value < _ADDRESS_SPACE:
            raise InvalidArgument(
                f"{_name(region)}: {field} {value:#x} is not aligned to {VHOST_PAGE_SIZE} bytes",
                hint="linux/vhost_types.h asks for 4 KiB",
            )
    if region.size == 0 or region.gpa + region.size > _ADDRESS_SPACE:
        raise InvalidArgument(f"{_name(region)} is empty or wraps")
