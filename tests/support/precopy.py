"""A copy of guest memory, made as a migration makes it: while the guest runs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol, Self

from tests.support.load import Load
from tests.support.load_rig import BUFFER, FRAME
from vhostctl.control.dirtylog import DirtyPages
from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.control.session import Session
from vhostctl.guest.driver import NetDriver

PAGE = 4096
_SLACK = 63  # bytes in NetDriver.arena_size() for a start that is not on 64


class Log(Protocol):
    """A DirtyLog that was started."""

    def sync(self) -> DirtyPages: ...

    def stop(self) -> DirtyPages: ...


class SessionLog:
    """The log of a session, as a copy uses it."""

    def __init__(self, session: Session) -> None:
        self.sync = session.sync_log
        self.stop = session.stop_log


@dataclass(frozen=True)
class Layout:
    """Whose memory the first pair's is.

    `used`, `receive` and `driver` are whole pages, (gpa, bytes); a page where the two arenas
    meet is in none. `written` is what the driver writes, to the byte: with mergeable buffers a
    receive chain is one buffer, so that it writes nothing into the receive arena, and
    descriptors lie in none.
    """

    used: list[GuestRegion]
    receive: GuestRegion
    driver: list[GuestRegion]
    written: list[tuple[int, int]]

    @classmethod
    def of(cls, session: Session, buffer_size: int, max_frame: int) -> Self:
        rings = [queue.placement.parts() for queue in session.devices[0].queues]
        size = session.config.queue_size
        start, length = session.arena
        end = start + length
        arena = NetDriver.arena_size([size], session.features, buffer_size, max_frame)
        transmit = start + arena - _SLACK
        asked = [ring[part] for ring in rings for part in ("desc", "avail")]
        behind = -(-transmit // PAGE) * PAGE
        return cls(
            used=[region(*ring["used"]) for ring in rings],
            receive=region(start, (transmit & -PAGE) - start),
            driver=[*(region(*part) for part in asked), region(behind, end - behind)],
            written=[*asked, (transmit, end - transmit)],
        )


def region(gpa: int, length: int) -> GuestRegion:
    """Return the pages of [gpa, gpa + length)."""
    start, end = gpa & -PAGE, (gpa + length + PAGE - 1) & -PAGE
    return GuestRegion(start, end - start, 0)


class Precopy:
    """All of guest memory on creation, then what the log says was written since.

    The log knows the device's writes. Those of the guest's own processors are in KVM's log,
    and here in nobody's: `take()` copies what the driver writes.
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

    def differences(self) -> list[int]:
        """Return the pages (gpas) of all memory where the copy is not what memory holds."""
        found = []
        for region, copy in self._copies:
            now = ctypes.string_at(region.hva, region.size)
            found += [
                region.gpa + at
                for at in range(0, region.size, PAGE)
                if now[at : at + PAGE] != copy[at : at + PAGE]
            ]
        return found


def completed(load: Load, copy: Precopy) -> tuple[int, list[int]]:
    """Complete `copy` in the middle of the load, which goes on after that.

    Returns how many pages the log had in the end, and those of all memory that differ.
    """
    bases = load.session.stop()
    load.pause()
    pages = copy.finish()
    for gpa, length in Layout.of(load.session, BUFFER, FRAME).written:
        copy.take(gpa, length)
    wrong = copy.differences()
    load.session.start(bases)
    load.resume()
    return pages, wrong
