"""IOTLB mode: rings and buffers by I/O virtual address, each translation asked for."""

from __future__ import annotations

import select

from vhostctl.abi import vhost
from vhostctl.conformance.case import case
from vhostctl.conformance.rig import (
    EVENT_IDX,
    GPA,
    LOG_ALL,
    MRG,
    PAGE,
    PLATFORM,
    V1,
    Queue,
    Rig,
    Setup,
)
from vhostctl.conformance.ring import WRITE, Part, RawRing, load
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name
from vhostctl.host.vhost import TX

RO, WO, RW = vhost.VHOST_ACCESS_RO, vhost.VHOST_ACCESS_WO, vhost.VHOST_ACCESS_RW
_SIZE = 8 << 20
_SETUP = Setup(features=V1 | PLATFORM, start=False)
_IOVA = 0x7_0000_0000
"""An address that no region has."""


def _tell(rig: Rig, kind: int, iova: int, size: int, hva: int = 0, perm: int = RW) -> None:
    message = vhost.vhost_msg(type=vhost.VHOST_IOTLB_MSG)
    message.iotlb.iova = iova
    message.iotlb.size = size
    message.iotlb.uaddr = hva
    message.iotlb.perm = perm
    message.iotlb.type = kind
    rig.device.write_message(message)


def update(rig: Rig, iova: int, size: int, hva: int, perm: int = RW) -> None:
    """Map [iova, iova + size) to `hva`."""
    _tell(rig, vhost.VHOST_IOTLB_UPDATE, iova, size, hva, perm)


def invalidate(rig: Rig, iova: int, size: int) -> None:
    """Unmap what overlaps [iova, iova + size)."""
    _tell(rig, vhost.VHOST_IOTLB_INVALIDATE, iova, size)


def _map_all(rig: Rig) -> None:
    """Map guest memory to itself: I/O virtual addresses are then guest physical ones."""
    region = rig.memory.regions[0]
    update(rig, region.gpa, region.size, region.hva)


def _map_rings(rig: Rig) -> None:
    region = rig.memory.regions[0]
    update(rig, region.gpa, sum(RawRing.span(num) for num in rig.setup.nums), region.hva)


def _running(target: Target, features: int = 0) -> Rig:
    """Return a rig whose rings are mapped, and nothing else."""
    rig = Rig(target, Setup(features=V1 | PLATFORM | features, start=False))
    _map_rings(rig)
    rig.start()
    return rig


def _misses(rig: Rig) -> list[list[int]]:
    """Read all messages; return address, type and permission of each."""
    poll = select.poll()
    poll.register(rig.device.fileno(), select.POLLIN)
    found = []
    while poll.poll(0):
        message = rig.device.read_message().iotlb
        found.append([message.iova, message.type, message.perm])
    return found


def _wait_miss(target: Target, rig: Rig, what: str = "miss") -> list[list[int]]:
    poll = select.poll()
    poll.register(rig.device.fileno(), select.POLLIN)
    target.wait(lambda: bool(poll.poll(0)), f"{what}: a message came")
    target.settle()
    return _misses(rig)


def _miss(iova: int, perm: int) -> list[int]:
    return [iova, vhost.VHOST_IOTLB_MISS, perm]


@case("With everything mapped frames pass both ways, and no miss is asked.")
def all_mapped(target: Target) -> None:
    rig = Rig(target, _SETUP)
    _map_all(rig)
    rig.start()
    rig.tx.offer(rig.cut(rig.packet(1), 12))
    room = rig.room(200)
    rig.rx.offer([room])
    rig.wire.send(frame(2))
    target.check("TX used", rig.tx.wait(1, "TX"), [(0, 0)])
    target.check("RX used", rig.rx.wait(1, "RX"), [(0, 72)])
    target.check("sent", rig.sent(1), ["1x60"])
    target.check("received", name(rig.filled([room])[12:72]), "2x60")
    target.check("misses", _misses(rig), [])


@case("A translation may lead anywhere: the I/O virtual address is no guest physical one.")
def anywhere(target: Target) -> None:
    rig = _running(target)
    data = rig.put(rig.packet(1))
    update(rig, _IOVA, 72, rig.memory.hva(data.addr, 72))
    rig.tx.offer([Part(_IOVA, 72)])
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("frames", rig.sent(1), ["1x60"])


@case("A transmit buffer that is not mapped is a miss for reading; no error, no element.")
def tx_miss(target: Target) -> None:
    rig = _running(target)
    rig.tx.offer([Part(_IOVA, 72)])
    target.check("misses", _wait_miss(target, rig), [_miss(_IOVA, RO)])
    target.check("used index", rig.tx.used_idx, 0)
    target.check("base", rig.tx.base(), 0)
    target.check("errors", rig.tx.errors(), 0)


@case("A receive buffer that is not mapped is a miss for writing.")
def rx_miss(target: Target) -> None:
    rig = _running(target)
    rig.rx.offer([Part(_IOVA, 200, WRITE)])
    rig.wire.send(frame(1))
    # The kick and the frame wake the worker, each perhaps for itself.
    found = _wait_miss(target, rig)
    target.check("misses", found[:1], [_miss(_IOVA, WO)])
    target.check("more misses", [miss for miss in found if miss != found[0]], [])
    target.check("base", rig.rx.base(), 0)
    target.check("errors", rig.rx.errors(), 0)


@case("An update for a miss that was read wakes the transmit ring without a kick.")
def update_wakes(target: Target) -> None:
    rig = _running(target)
    data = rig.put(rig.packet(1))
    rig.tx.offer([Part(_IOVA, 72)])
    _wait_miss(target, rig)
    update(rig, _IOVA, 72, rig.memory.hva(data.addr, 72))
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("frames", rig.sent(1), ["1x60"])


@case("An update for a miss that was read wakes the receive ring without a kick.")
def update_wakes_rx(target: Target) -> None:
    rig = _running(target)
    room = rig.room(200)
    rig.rx.offer([Part(_IOVA, 200, WRITE)])
    rig.wire.send(frame(1))
    _wait_miss(target, rig)
    update(rig, _IOVA, 200, rig.memory.hva(room.addr, 200))
    target.check("used", rig.rx.wait(1), [(0, 72)])
    target.check("frame", name(rig.filled([room])[12:72]), "1x60")


@case("An update for a miss that nobody has read yet works with the next kick.")
def update_before_read(target: Target) -> None:
    rig = _running(target)
    data = rig.put(rig.packet(1))
    rig.tx.offer([Part(_IOVA, 72)])
    target.settle()
    update(rig, _IOVA, 72, rig.memory.hva(data.addr, 72))
    rig.tx.kick.signal()
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("the miss can still be read", _misses(rig), [_miss(_IOVA, RO)])


@case("A miss names the first address that is not mapped, inside a buffer too.")
def miss_inside(target: Target) -> None:
    rig = _running(target)
    data = rig.put(rig.packet(1))
    hva = rig.memory.hva(data.addr, 72)
    update(rig, _IOVA, 30, hva)
    rig.tx.offer([Part(_IOVA, 72)])
    target.check("misses", _wait_miss(target, rig), [_miss(_IOVA + 30, RO)])
    update(rig, _IOVA + 30, 42, hva + 30)
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("frames", rig.sent(1), ["1x60"])


@case("A chain asks for one miss at a time, in its order.")
def one_by_one(target: Target) -> None:
    rig = _running(target)
    data = rig.put(rig.packet(1))
    hva = rig.memory.hva(data.addr, 72)
    rig.tx.offer([Part(_IOVA, 12), Part(_IOVA + PAGE, 60)])
    target.check("first", _wait_miss(target, rig, "first"), [_miss(_IOVA, RO)])
    update(rig, _IOVA, 12, hva)
    target.check("second", _wait_miss(target, rig, "second"), [_miss(_IOVA + PAGE, RO)])
    update(rig, _IOVA + PAGE, 60, hva + 12)
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("frames", rig.sent(1), ["1x60"])


@case("Each attempt on an address that is not mapped asks for it again.")
def asks_again(target: Target) -> None:
    rig = _running(target)
    rig.tx.offer([Part(_IOVA, 72)])
    target.settle()
    rig.tx.kick.signal()
    target.settle()
    target.check("misses", _misses(rig), [_miss(_IOVA, RO)] * 2)


@case("An indirect table that is not mapped is a miss for reading.")
def table_miss(target: Target) -> None:
    rig = _running(target)
    held = rig.indirect(rig.outgoing(1))
    rig.tx.offer([held])
    target.check("misses", _wait_miss(target, rig), [_miss(held.addr, RO)])
    _map_all(rig)
    target.check("used", rig.tx.wait(1), [(0, 0)])


@case("An invalidated mapping is a miss again.")
def invalidated(target: Target) -> None:
    rig = _running(target)
    hva = rig.memory.hva(rig.put(rig.packet(1)).addr, 72)
    update(rig, _IOVA, 72, hva)
    rig.tx.offer([Part(_IOVA, 72)])
    rig.tx.wait(1, "before")
    invalidate(rig, _IOVA + 40, 1)
    rig.tx.offer([Part(_IOVA, 72)])
    target.check("misses", _wait_miss(target, rig), [_miss(_IOVA, RO)])
    update(rig, _IOVA, 72, hva)
    rig.tx.wait(1, "after")
    target.check("frames", rig.sent(2), ["1x60", "1x60"])


@case("Once its rings are invalidated a ring does nothing but ask for them.")
def rings_invalidated(target: Target) -> None:
    rig = Rig(target, _SETUP)
    _map_all(rig)
    rig.start()
    invalidate(rig, GPA, _SIZE)
    rig.tx.offer(rig.outgoing(1))
    misses = _wait_miss(target, rig)
    target.check("asked for", [m for m in misses if not GPA <= m[0] < GPA + _SIZE], [])
    target.check("used index", rig.tx.used_idx, 0)
    target.check("flags", rig.tx.used_flags, 0)
    _map_all(rig)
    rig.tx.kick.signal()
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("errors", rig.tx.errors(), 0)


def _denied(target: Target, queue: Queue) -> None:
    queue.wait_errors(1)
    # One for each try: a kick and a frame may come to a worker as two.
    target.check("errors", queue.errors() >= 1, True)
    target.check("base", queue.base(), 0)
    target.check("used index", queue.used_idx, 0)
    target.check("misses", _misses(queue.rig), [])


@case("A transmit buffer that may not be read makes the ring stick: an error, no miss.")
def write_only(target: Target) -> None:
    rig = _running(target)
    data = rig.put(rig.packet(1))
    update(rig, _IOVA, 72, rig.memory.hva(data.addr, 72), WO)
    rig.tx.offer([Part(_IOVA, 72)])
    _denied(target, rig.tx)


@case("A receive buffer that may not be written makes the ring stick: an error, no miss.")
def read_only(target: Target) -> None:
    rig = _running(target)
    room = rig.room(200)
    update(rig, _IOVA, 200, rig.memory.hva(room.addr, 200), RO)
    rig.rx.offer([Part(_IOVA, 200, WRITE)])
    rig.wire.send(frame(1))
    _denied(target, rig.rx)


@case("Buffers need no more than the permission that they use.")
def least_permission(target: Target) -> None:
    rig = _running(target, MRG | EVENT_IDX)
    data, room = rig.put(rig.packet(1)), rig.room(200)
    update(rig, _IOVA, 72, rig.memory.hva(data.addr, 72), RO)
    update(rig, _IOVA + PAGE, 200, rig.memory.hva(room.addr, 200), WO)
    rig.tx.offer([Part(_IOVA, 72)])
    rig.rx.offer([Part(_IOVA + PAGE, 200, WRITE)])
    rig.wire.send(frame(2))
    target.check("TX used", rig.tx.wait(1, "TX"), [(0, 0)])
    target.check("RX used", rig.rx.wait(1, "RX"), [(0, 72)])
    target.check("received", name(rig.filled([room])[12:72]), "2x60")


@case("A ring whose used ring is not mapped does not start, and asks for it.")
def start_unmapped(target: Target) -> None:
    rig = Rig(target, _SETUP)
    target.check("start", target.refused(rig.tx.start), "EFAULT")
    target.check("misses", _misses(rig), [_miss(rig.gpa(rig.tx.used), RO)])
    _map_all(rig)
    target.check("start once it is mapped", target.refused(rig.tx.start), "")
    rig.tx.offer(rig.outgoing(1))
    target.check("used", rig.tx.wait(1), [(0, 0)])


@case("A ring that was moved is translated anew: it does not start where nothing is mapped.")
def moved_unmapped(target: Target) -> None:
    rig = _running(target)
    rig.tx.offer([Part(_IOVA, 72)])
    target.settle()
    rig.tx.stop()
    rig.device.set_vring_addr(TX, desc=_IOVA, avail=_IOVA + PAGE, used=_IOVA + 2 * PAGE)
    target.check("start", target.refused(rig.tx.start), "EFAULT")
    target.check("misses", _misses(rig), [_miss(_IOVA + 2 * PAGE, RO)])


@case("Messages that nobody has read are gone when the backend is taken.")
def stop_drops_messages(target: Target) -> None:
    rig = _running(target)
    rig.tx.offer([Part(_IOVA, 72)])
    target.settle()
    rig.tx.stop()
    target.check("misses", _misses(rig), [])


@case("LOG_ALL marks the guest address behind the buffer's translation.")
def logged(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | PLATFORM | LOG_ALL, start=False))
    log = rig.room(PAGE, PAGE)
    rig.write(log.addr, bytes(PAGE))
    room = rig.room(200, PAGE)
    rig.device.set_log_base(rig.memory.hva(log.addr, PAGE))
    _map_rings(rig)
    update(rig, _IOVA, 200, rig.memory.hva(room.addr, 200))
    rig.start()
    rig.rx.offer([Part(_IOVA, 200, WRITE)])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(0, 72)])
    bits = int.from_bytes(load(rig.memory.hva(log.addr, PAGE), PAGE), "little")
    pages = [number for number in range(bits.bit_length()) if bits >> number & 1]
    target.check("pages", pages, [room.addr // PAGE])


@case("ACCESS_PLATFORM acknowledged again forgets every translation.")
def acknowledged_again(target: Target) -> None:
    rig = _running(target)
    data = rig.put(rig.packet(1))
    update(rig, _IOVA, 72, rig.memory.hva(data.addr, 72))
    rig.device.set_features(V1 | PLATFORM)
    _map_rings(rig)
    rig.tx.offer([Part(_IOVA, 72)])
    target.check("misses", _wait_miss(target, rig), [_miss(_IOVA, RO)])


@case(
    "A ring does nothing after IOTLB mode was entered or left under it.",
    needs=("platform_toggles",),
)
def toggled(target: Target) -> None:
    rig = Rig(target)
    rig.device.set_features(V1 | PLATFORM)
    rig.tx.offer(rig.outgoing(1))
    target.settle()
    target.check("used index inside", rig.tx.used_idx, 0)
    rig.device.set_features(V1)
    rig.tx.kick.signal()
    target.settle()
    target.check("used index outside", rig.tx.used_idx, 0)
    rig.tx.place()
    rig.tx.kick.signal()
    target.check("used with its addresses", rig.tx.wait(1), [(0, 0)])
    target.check("frames", rig.sent(1), ["1x60"])
