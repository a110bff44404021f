"""A copy of guest memory, made as a migration makes it: while the guest runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Protocol

from vhostctl.control.dirtylog import DirtyPages
from vhostctl.control.memtable import MemoryTable

PAGE = 4096


class Log(Protocol):
    """A DirtyLog that was started."""

    def sync(self) -> DirtyPages: ...

    def stop(self) -> DirtyPages: ...


class Precopy:
    """All of guest memory on creation, then what the log says was written since.

    The log knows the device's writes. Those of the guest's own processors are in KVM's log,
    and here in nobody's: `take()` copies the pages that the driver writes.
    """

    def __init__(self, table: MemoryTable, log: Log) -> None:
        self._log = log
        self._copies = [(region, bytearray(region.size)) for region in table.regions]
        for region, _ in self._copies:
            self.take(region.gpa, region.size)

    def take(self, gpa: int, length: int) -> None:
        """Copy [gpa, gpa + length), as far as it is memory."""
        for region, copy in self._copies:
            start = max(gpa, region.gpa)
            end = min(gpa + length, region.gpa + region.size)
            if start < end:
                at = start - region.gpa
                place = ctypes.c_char.from_buffer(copy, at)
                ctypes.memmove(ctypes.addressof(place), region.hva + at, end - start)

    def _copy(self, pages: DirtyPages) -> int:
        for gpa, length in pages:
            self.take(gpa, length)
        return pages.count

    def round(self) -> int:
        """Copy what was written since the last round; return how many pages."""
        return self._copy(self._log.sync())

    def finish(self) -> int:
        """Copy the rest, once the rings stand still, and stop the log; return as `round()`."""
        return self._copy(self._log.stop())

    def differences(self, pages: Iterable[int]) -> list[int]:
        """Return those of `pages` (gpas) where the copy is not what memory holds."""
        found = []
        for gpa in pages:
            for region, copy in self._copies:
                at = gpa - region.gpa
                if (
                    0 <= at < region.size
                    and ctypes.string_at(region.hva + at, PAGE) != copy[at : at + PAGE]
                ):
                    found.append(gpa)
        return found
