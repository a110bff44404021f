"""Guest memory of several regions: what a buffer's address means (VHOST_SET_MEM_TABLE)."""

from __future__ import annotations

from functools import partial

from vhostctl.conformance.case import case
from vhostctl.conformance.cases.hostile import stuck
from vhostctl.conformance.rig import GPA, MRG, PAGE, UNTOUCHED, V1, Region, Rig, Setup
from vhostctl.conformance.ring import INDIRECT, WRITE, Part, load, store, table
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name

_SIZE = 1 << 20
_NEXT_DOOR = GPA + _SIZE
_FAR = 0x1_0000_0000
_ADJACENT = ((GPA, _SIZE), (_NEXT_DOOR, PAGE), (_NEXT_DOOR + PAGE, PAGE))
_APART = ((GPA, _SIZE), (_FAR, _SIZE))


def _spread(rig: Rig, gpa: int, data: bytes) -> Part:
    """Write `data` at `gpa`, over as many regions as it takes."""
    for at, byte in enumerate(data):
        rig.write(gpa + at, bytes([byte]))
    return Part(gpa, len(data))


def _gather(rig: Rig, part: Part) -> bytes:
    return b"".join(rig.read(part.addr + at, 1) for at in range(part.len))


def _one(target: Target, rig: Rig, *parts: Part, size: int = 60) -> None:
    heads = rig.tx.offer(parts)
    target.check("used", rig.tx.wait(1), [(heads[0], 0)])
    target.check("frames", rig.sent(1), [f"1x{size}"])
    target.check("errors", rig.tx.errors(), 0)


@case("A chain may take its buffers from several regions.")
def chain_over_regions(target: Target) -> None:
    rig = Rig(target, Setup(regions=_APART))
    rig.write(_FAR, rig.packet(1)[12:])
    _one(target, rig, rig.put(rig.packet(1)[:12]), Part(_FAR, 60))


@case("A buffer that ends with its region is taken.")
def end_of_region(target: Target) -> None:
    rig = Rig(target, Setup(regions=_APART))
    rig.write(_FAR + _SIZE - 72, rig.packet(1))
    _one(target, rig, Part(_FAR + _SIZE - 72, 72))


@case("A buffer that spans two adjacent regions is taken from both.")
def spans_two(target: Target) -> None:
    rig = Rig(target, Setup(regions=_ADJACENT))
    _one(target, rig, _spread(rig, _NEXT_DOOR - 30, rig.packet(1)))


@case("A buffer that spans three adjacent regions is taken from all of them.")
def spans_three(target: Target) -> None:
    rig = Rig(target, Setup(regions=_ADJACENT))
    size = 60 + PAGE
    _one(target, rig, _spread(rig, _NEXT_DOOR - 30, rig.packet(1, size)), size=size)


@case("A receive buffer that spans two adjacent regions is written in both.")
def rx_spans_two(target: Target) -> None:
    rig = Rig(target, Setup(regions=_ADJACENT))
    room = Part(_NEXT_DOOR - 30, 200, WRITE)
    _spread(rig, room.addr, bytes([UNTOUCHED]) * room.len)
    rig.rx.offer([room])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(0, 72)])
    got = _gather(rig, room)
    target.check("frame", name(got[12:72]), "1x60")
    target.check("rest is untouched", got[72:].count(UNTOUCHED), 128)


@case("A merged header that spans two regions has its num_buffers.")
def header_spans_two(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG, regions=_ADJACENT))
    room = Part(_NEXT_DOOR - 11, 200, WRITE)
    _spread(rig, room.addr, bytes([UNTOUCHED]) * room.len)
    rig.rx.offer([room])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(0, 72)])
    got = _gather(rig, room)
    target.check("num_buffers", got[10:12].hex(), "0100")
    target.check("frame", name(got[12:72]), "1x60")


@case("An indirect table that spans two regions is taken.")
def table_spans_two(target: Target) -> None:
    rig = Rig(target, Setup(regions=_ADJACENT))
    held = _spread(rig, _NEXT_DOOR - 24, table(rig.cut(rig.packet(1), 12, 20)))
    _one(target, rig, held._replace(flags=INDIRECT))


@case("A buffer that runs into a gap between regions makes the ring stick.")
def gap(target: Target) -> None:
    rig = Rig(target, Setup(regions=((GPA, _SIZE), (_NEXT_DOOR + PAGE, PAGE))))
    rig.tx.publish(rig.tx.chain([Part(_NEXT_DOOR - 30, 72)]))
    stuck(target, rig.tx)


@case("A region may begin at any byte and have any size.")
def odd_region(target: Target) -> None:
    rig = Rig(target)
    place = rig.put(rig.packet(1))
    odd = Region(_FAR + 3, 72, rig.memory.hva(place.addr, 72))
    rig.device.set_mem_table([*rig.memory.regions, odd])
    _one(target, rig, Part(_FAR + 3, 72))


@case("A buffer one byte longer than its odd region makes the ring stick.")
def odd_region_end(target: Target) -> None:
    rig = Rig(target)
    place = rig.put(rig.packet(1))
    odd = Region(_FAR + 3, 72, rig.memory.hva(place.addr, 72))
    rig.device.set_mem_table([*rig.memory.regions, odd])
    rig.tx.publish(rig.tx.chain([Part(_FAR + 3, 73)]))
    stuck(target, rig.tx)


@case("Where regions overlap, the one that begins first is meant, whatever their order.")
def overlap(target: Target) -> None:
    rig = Rig(target)
    first, second = rig.put(rig.packet(1)), rig.put(rig.packet(2))
    low = Region(_FAR, PAGE, rig.memory.hva(first.addr, 72) - 100)
    high = Region(_FAR + 100, PAGE, rig.memory.hva(second.addr, 72))
    for order in ([low, high], [high, low]):
        rig.device.set_mem_table([*rig.memory.regions, *order])
        rig.tx.offer([Part(_FAR + 100, 72)])
        rig.tx.wait(1, f"{order.index(low)}")
    target.check("frames", rig.sent(2), ["1x60", "1x60"])


@case("The rings need not lie in the memory table.")
def rings_outside(target: Target) -> None:
    rig = Rig(target, Setup(regions=_APART))
    far = rig.memory.regions[1]
    rig.device.set_mem_table([far])
    store(far.hva, rig.packet(1))
    _one(target, rig, Part(_FAR, 72))


@case("Under a running ring a region that no process can map is refused.")
def beyond_the_process(target: Target) -> None:
    rig = Rig(target)
    for what, region in (
        ("all of memory", Region(0, 0, 0)),
        ("an address of 2^57", Region(_FAR, PAGE, 1 << 57)),
    ):
        replace = partial(rig.device.set_mem_table, [*rig.memory.regions, region])
        target.check(what, target.refused(replace), "EFAULT")
    _one(target, rig, *rig.outgoing(1))


@case("A memory table that is replaced under a running ring counts from the next buffer on.")
def replaced(target: Target) -> None:
    rig = Rig(target, Setup(regions=_APART))
    rings, far = rig.memory.regions
    store(far.hva, rig.packet(1))
    store(far.hva + PAGE, rig.packet(2))
    for number, hva in ((1, far.hva), (2, far.hva + PAGE)):
        rig.device.set_mem_table([rings, Region(_FAR, PAGE, hva)])
        rig.tx.offer([Part(_FAR, 72)])
        rig.tx.wait(1, f"{number}")
    target.check("frames", rig.sent(2), ["1x60", "2x60"])
    target.check("second page", load(far.hva + PAGE, 72) == rig.packet(2), True)


@case("A memory table that loses a chain's memory makes the ring stick, until it is back.")
def lost(target: Target) -> None:
    rig = Rig(target)
    rig.device.set_mem_table([])
    head = rig.tx.chain(rig.outgoing(1))
    rig.tx.publish(head)
    stuck(target, rig.tx)
    rig.device.set_mem_table(rig.memory.regions)
    rig.tx.kick.signal()
    target.check("used after", rig.tx.wait(1), [(head, 0)])
    target.check("frames after", rig.sent(1), ["1x60"])


@case("While the memory table is replaced over and over, no frame is lost or doubled.")
def replaced_under_load(target: Target) -> None:
    rig = Rig(target, Setup(regions=_APART))
    frames = []
    for number in range(60):
        rig.tx.offer(rig.outgoing(number))
        order = rig.memory.regions if number % 2 else rig.memory.regions[::-1]
        rig.device.set_mem_table(order)
        frames.append(f"{number}x60")
    target.check("used", len(rig.tx.wait(60)), 60)
    target.check("frames", rig.sent(60), frames)
    target.check("errors", rig.tx.errors(), 0)


@case("A refused memory table leaves the old one in force.")
def refused(target: Target) -> None:
    rig = Rig(target)
    wrong = Region(2**64 - PAGE, 2 * PAGE, rig.memory.regions[0].hva)
    again = target.refused(lambda: rig.device.set_mem_table([wrong]))
    target.check("errno", again, "EFAULT")
    _one(target, rig, *rig.outgoing(1))
