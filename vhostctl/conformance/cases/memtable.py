"""SET_MEM_TABLE: what it takes, in which order it looks, and that it is all or nothing."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from vhostctl.abi import vhost
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import (
    BAD,
    Edge,
    ask,
    file_of,
    is_running,
    owned,
    running,
    stopped,
)
from vhostctl.conformance.target import Target
from vhostctl.host.vhost import RX, TX, VhostNet

SET = vhost.VHOST_SET_MEM_TABLE
MAX_REGIONS = 64  # parameter max_mem_regions, as long as nobody sets it
PAGE = 4096

Region = tuple[int, int, int] | tuple[int, int, int, int]


def _header(regions: int, padding: int = 0) -> bytes:
    return struct.pack("=2I", regions, padding)


def _set(target: Target, device: VhostNet, regions: Sequence[Region]) -> str:
    """Set a table of (gpa, size, hva) or (gpa, size, hva, flags)."""
    data = _header(len(regions))
    data += b"".join(struct.pack("=4Q", *region, *[0] * (4 - len(region))) for region in regions)
    return ask(target, device, SET, ctypes.create_string_buffer(data, len(data)))


def _has_table(target: Target, device: VhostNet) -> bool:
    """Return whether a table was set: without one even stopping a ring is refused."""
    return ask(target, device, vhost.VHOST_NET_SET_BACKEND, file_of(RX, -1)) == ""


@case("A table without regions is a table.")
def empty(target: Target) -> None:
    device = owned(target)
    target.check("before", _has_table(target, device), False)
    target.check("answer", _set(target, device, []), "")
    target.check("after", _has_table(target, device), True)


@case("The header alone is read for an empty table.")
def empty_reads_header(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    target.check("answer", ask(target, device, SET, edge.before(_header(0))), "")


@case("A header that is not all there is EFAULT.")
def short_header(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    target.check("4 bytes", ask(target, device, SET, edge.words(0)), "EFAULT")


@case("Padding that is not 0 is EOPNOTSUPP, before the regions are counted or read.")
def padding(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    for count in (0, 1, 2**32 - 1):
        found = ask(target, device, SET, edge.before(_header(count, 1)))
        target.check(f"{count} regions", found, "EOPNOTSUPP")


@case("More regions than the limit are E2BIG before they are read.")
def too_many(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    for count in (MAX_REGIONS + 1, 2**16, 2**32 - 1):
        found = ask(target, device, SET, edge.before(_header(count)))
        target.check(f"{count} regions", found, "E2BIG")


@case("As many regions as the limit are accepted.")
def most(target: Target) -> None:
    device = owned(target)
    regions = [(n * PAGE, PAGE, 0x10000 + n * PAGE) for n in range(MAX_REGIONS)]
    target.check("answer", _set(target, device, regions), "")


@case("Regions that cannot be read are EFAULT.")
def short_regions(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    one = struct.pack("=4Q", 0, PAGE, 0x10000, 0)
    target.check("0 of 1", ask(target, device, SET, edge.before(_header(1))), "EFAULT")
    target.check("1 of 2", ask(target, device, SET, edge.before(_header(2) + one)), "EFAULT")
    target.check("31 bytes", ask(target, device, SET, edge.before(_header(1) + one[:31])), "EFAULT")
    target.check("1 of 1", ask(target, device, SET, edge.before(_header(1) + one)), "")


@case("A region whose end lies before its start is EFAULT.")
def wraps(target: Target) -> None:
    device = owned(target)
    for gpa, size in ((2**64 - PAGE, 2 * PAGE), (PAGE, 2**64 - 1), (2**63, 2**63 + 1)):
        found = _set(target, device, [(gpa, size, 0x10000)])
        target.check(f"{gpa:#x}+{size:#x}", found, "EFAULT")


@case("A region may end with the last address.")
def to_the_end(target: Target) -> None:
    device = owned(target)
    target.check("page", _set(target, device, [(2**64 - PAGE, PAGE, 0x10000)]), "")
    target.check("all but a byte", _set(target, device, [(0, 2**64 - 1, 0x10000)]), "")


@case("A region of size 0 is EFAULT, but at address 0 it is all there is.")
def size_zero(target: Target) -> None:
    device = owned(target)
    target.check("at 4096", _set(target, device, [(PAGE, 0, 0x10000)]), "EFAULT")
    target.check("at 1", _set(target, device, [(1, 0, 0x10000)]), "EFAULT")
    target.check("at 0", _set(target, device, [(0, 0, 0x10000)]), "")


@case("Regions may overlap, and lie in any order.")
def overlaps(target: Target) -> None:
    device = owned(target)
    same = (PAGE, 4 * PAGE, 0x10000)
    target.check("twice", _set(target, device, [same, same]), "")
    target.check("inside", _set(target, device, [same, (2 * PAGE, PAGE, 0x90000)]), "")
    target.check("backwards", _set(target, device, [(9 * PAGE, PAGE, 0x90000), same]), "")


@case("Addresses and sizes need no alignment.")
def unaligned(target: Target) -> None:
    device = owned(target)
    target.check("odd", _set(target, device, [(1, 3, 0x10001), (5, 7, 0x20003)]), "")


@case("The flags of a region are ignored.")
def flags(target: Target) -> None:
    device = owned(target)
    target.check("all ones", _set(target, device, [(PAGE, PAGE, 0x10000, 2**64 - 1)]), "")


@case("While no ring runs the memory of a region need not exist.")
def no_memory(target: Target) -> None:
    device = owned(target)
    target.check("null", _set(target, device, [(0, PAGE, 0)]), "")
    target.check("2^60", _set(target, device, [(0, PAGE, BAD)]), "")


@case("A refused first table leaves none, though a part of it was right.")
def first_refused(target: Target) -> None:
    device = owned(target)
    found = _set(target, device, [(0, PAGE, 0x10000), (PAGE, 0, 0x10000)])
    target.check("answer", found, "EFAULT")
    target.check("table", _has_table(target, device), False)


@case("A refused table leaves the one before it.")
def second_refused(target: Target) -> None:
    device = owned(target)
    _set(target, device, [(0, PAGE, 0x10000)])
    target.check("wraps", _set(target, device, [(0, PAGE, 0x10000), (PAGE, 0, 0)]), "EFAULT")
    target.check("pointer", ask(target, device, SET, BAD), "EFAULT")
    target.check("table", _has_table(target, device), True)


@case("While a ring runs a region must be memory of the owner, else EFAULT and no change.")
def live_refused(target: Target) -> None:
    rig = running(target)
    good = [(r.gpa, r.size, r.hva) for r in rig.memory.regions]
    found = _set(target, rig.device, [*good, (1 << 40, PAGE, BAD)])
    target.check("answer", found, "EFAULT")
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])


@case("One running ring is enough for a table to be looked at.")
def live_one(target: Target) -> None:
    rig = running(target)
    rig.rx.stop()
    target.check("one", _set(target, rig.device, [(0, PAGE, BAD)]), "EFAULT")
    rig.tx.stop()
    target.check("none", _set(target, rig.device, [(0, PAGE, BAD)]), "")


@case("A table is replaced while rings run, also by one that does not hold the rings.")
def live_without_rings(target: Target) -> None:
    rig = running(target)
    target.check("empty", _set(target, rig.device, []), "")
    target.check("runs", [is_running(target, rig.device, q) for q in (RX, TX)], [True, True])
    good = [(r.gpa, r.size, r.hva) for r in rig.memory.regions]
    target.check("as before", _set(target, rig.device, good), "")
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])


@case("A ring does not start while a region is no memory of the owner: EFAULT.")
def start_checks(target: Target) -> None:
    rig = stopped(target)
    good = [(r.gpa, r.size, r.hva) for r in rig.memory.regions]
    target.check("table", _set(target, rig.device, [*good, (1 << 40, PAGE, BAD)]), "")
    target.check("start", target.refused(rig.tx.start), "EFAULT")
    target.check("good table", _set(target, rig.device, good), "")
    target.check("good start", target.refused(rig.tx.start), "")
