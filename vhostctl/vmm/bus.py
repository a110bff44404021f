"""A bus of a guest: which device model answers at which address."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from vhostctl.errors import InvalidArgument

NOBODY = b"\xff"
"""Each byte that is read where there is no device."""


class BusDevice(Protocol):
    """A device model behind a range of addresses; the bus keeps every access inside it."""

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset` of the range."""

    def write(self, offset: int, data: bytes) -> None:
        """Take `data`, written at `offset` of the range."""


@dataclass(frozen=True, slots=True)
class _Range:
    start: int
    size: int
    device: BusDevice

    def __str__(self) -> str:
        return f"{self.start:#x}+{self.size:#x}"


_start = attrgetter("start")


class Bus:
    """Device models by address: the guest's I/O ports, or what of its memory is no RAM.

    A device may change the bus while it is read or written. One thread at a time.
    """

    def __init__(self, name: str, size: int) -> None:
        """Have addresses from 0 to `size`, exclusive; `name` is for errors."""
        self.name = name
        self.size = size
        self.accesses = 0
        """Reads and writes that came here."""
        self._ranges: list[_Range] = []

    def add(self, start: int, size: int, device: BusDevice) -> None:
        """Have `device` answer at [start, start + size).

        Raises InvalidArgument if that is empty, past the end or overlaps another device's.
        """
        new = _Range(start, size, device)
        if size <= 0 or start < 0 or start + size > self.size:
            raise InvalidArgument(f"{self.name} {new} is empty or outside 0x0+{self.size:#x}")
        at = bisect.bisect_left(self._ranges, start, key=_start)
        for other in self._ranges[max(at - 1, 0) : at + 1]:
            if start < other.start + other.size and other.start < start + size:
                raise InvalidArgument(f"{self.name} {new} overlaps {other}")
        self._ranges.insert(at, new)

    def remove(self, start: int) -> None:
        """Have nobody answer where the range begins at `start`. InvalidArgument if none does."""
        at = bisect.bisect_left(self._ranges, start, key=_start)
        if at == len(self._ranges) or self._ranges[at].start != start:
            raise InvalidArgument(f"{self.name}: no device at {start:#x} to remove")
        del self._ranges[at]

    def read(self, address: int, length: int) -> bytes:
        """Return the `length` bytes at `address`; all ones unless one range has them all."""
        found = self._find(address, length)
        if found is None:
            return NOBODY * length
        return found.device.read(address - found.start, length)

    def write(self, address: int, data: bytes) -> None:
        """Write `data` at `address`; nothing unless one range has it all."""
        found = self._find(address, len(data))
        if found is not None:
            found.device.write(address - found.start, data)

    def _find(self, address: int, length: int) -> _Range | None:
        self.accesses += 1
        at = bisect.bisect_right(self._ranges, address, key=_start) - 1
        if at < 0:
            return None
        found = self._ranges[at]
        return found if address + length <= found.start + found.size else None
