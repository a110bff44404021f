"""The vIOMMU's table: which I/O virtual address is which guest physical one."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vhostctl.abi.vhost import VHOST_ACCESS_RW
from vhostctl.errors import InvalidArgument

PAGE = 4096
"""Alignment of every mapping, bytes."""

ADDRESSES = 1 << 64
"""How many there are, of either kind."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """[iova, iova + size) is [gpa, gpa + size) of the guest; bytes.

    `perm` is one of VHOST_ACCESS_RO, VHOST_ACCESS_WO, VHOST_ACCESS_RW (linux/vhost_types.h).
    """

    iova: int
    size: int
    gpa: int
    perm: int

    @property
    def end(self) -> int:
        """The first iova behind it."""
        return self.iova + self.size

    def cut(self, start: int, end: int) -> Mapping:
        """Return the part of it that lies inside [start, end) of I/O virtual addresses."""
        start, end = max(start, self.iova), min(end, self.end)
        return replace(self, iova=start, size=end - start, gpa=self.gpa + start - self.iova)

    def __str__(self) -> str:
        return f"iova {self.iova:#x}+{self.size:#x}"


class IovaMap:
    """The table; iterating gives a copy in the order of addresses.

    Mappings are aligned to 4096 bytes and never overlap. Any thread may call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mappings: list[Mapping] = []  # by iova

    def __iter__(self) -> Iterator[Mapping]:
        """Yield the mappings of this moment in the order of their addresses."""
        with self._lock:
            return iter(tuple(self._mappings))

    def map(self, iova: int, size: int, gpa: int, perm: int = VHOST_ACCESS_RW) -> None:
        """Let [iova, iova + size) be [gpa, gpa + size); bytes, `perm` one of VHOST_ACCESS_*.

        Raises InvalidArgument: alignment, range, permission, overlap.
        """
        new = Mapping(iova, size, gpa, perm)
        _check_range("iova", iova, size)
        _check_range("gpa", gpa, size)
        if not 0 < perm <= VHOST_ACCESS_RW:
            raise InvalidArgument(f"{new}: permission {perm}", hint="use 1 (r), 2 (w) or 3 (rw)")
        with self._lock:
            first, behind = self._inside(iova, new.end)
            if first != behind:
                raise InvalidArgument(
                    f"{new} overlaps the mapping {self._mappings[first]}", hint="unmap that first"
                )
            self._mappings.insert(first, new)

    def unmap(self, iova: int, size: int) -> list[Mapping]:
        """Take out what lies inside [iova, iova + size) and return it, in order.

        Of a mapping that reaches beyond, the rest stays. Raises InvalidArgument.
        """
        _check_range("iova", iova, size)
        end = iova + size
        with self._lock:
            first, behind = self._inside(iova, end)
            hit = self._mappings[first:behind]
            kept = [m.cut(0, iova) for m in hit[:1] if m.iova < iova]
            kept += [m.cut(end, ADDRESSES) for m in hit[-1:] if m.end > end]
            self._mappings[first:behind] = kept
        return [m.cut(iova, end) for m in hit]

    def translate(self, iova: int) -> Mapping | None:
        """Return the whole mapping around `iova`; None if there is none."""
        with self._lock:
            first, behind = self._inside(iova, iova + 1)
            return self._mappings[first] if first < behind else None

    def _inside(self, start: int, end: int) -> tuple[int, int]:
        """Return the first index of a mapping that touches [start, end), and that behind."""
        first = bisect_right(self._mappings, start, key=lambda m: m.iova)
        if first and self._mappings[first - 1].end > start:
            first -= 1
        behind = bisect_right(self._mappings, end - 1, lo=first, key=lambda m: m.iova)
        return first, behind


def _check_range(what: str, start: int, size: int) -> None:
    if start < 0 or size <= 0 or start % PAGE or size % PAGE or start + size > ADDRESSES:
        raise InvalidArgument(
            f"{what} {start:#x}+{size:#x}", hint="use multiples of 4096 below 2^64, size above 0"
        )
