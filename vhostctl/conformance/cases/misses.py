"""IOTLB messages that are read: what a ring misses when it starts, and who forgets it."""

from __future__ import annotations

import os
import select
from concurrent.futures import ThreadPoolExecutor

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.messages import WHOLE
from vhostctl.conformance.cases.support import (
    BAD,
    MISSING_RING,
    invalidate,
    is_running,
    map_pages,
    stopped,
    update,
)
from vhostctl.conformance.rig import V1, Rig
from vhostctl.conformance.target import Target
from vhostctl.errors import KernelError
from vhostctl.host.vhost import RX, TX

PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM
MSG_V2 = 1 << vhost.VHOST_BACKEND_F_IOTLB_MSG_V2
PAGE = 4096


def _rig(target: Target) -> Rig:
    """Return a device in IOTLB mode whose rings have addresses and no mapping."""
    return stopped(target, V1 | PLATFORM)


def _map(rig: Rig, perm: int = vhost.VHOST_ACCESS_RW) -> None:
    """Map all of guest memory, at the addresses that the guest knows."""
    for region in rig.memory.regions:
        rig.device.write_message(update(region.gpa, region.size, region.hva, perm))


def _unread(rig: Rig) -> list[list[int]]:
    """Read every message; return kind, address, size and permission of each."""
    found: list[list[int]] = []
    while True:
        try:
            seen = rig.device.read_message().iotlb
        except KernelError:
            return found
        found.append([seen.type, seen.iova, seen.size, seen.perm])


def _used(rig: Rig, queue: int) -> int:
    """Return the used ring's I/O virtual address."""
    ring = (rig.rx, rig.tx)[queue]
    return ring.used + rig.shift


@case("A ring whose used ring is not mapped does not start: EFAULT, and a miss is read.")
def start_misses(target: Target) -> None:
    rig = _rig(target)
    target.check("start", target.refused(rig.tx.start), "EFAULT")
    target.check("runs", is_running(target, rig.device, TX), False)
    want = [vhost.VHOST_IOTLB_MISS, _used(rig, TX), 0, vhost.VHOST_ACCESS_RO]
    target.check("miss", _unread(rig) == [want], True)


@case("In a miss every byte that has no meaning is 0.")
def no_leak(target: Target) -> None:
    rig = _rig(target)
    target.refused(rig.tx.start)
    want = vhost.vhost_msg(type=vhost.VHOST_IOTLB_MSG)
    want.iotlb = vhost.vhost_iotlb_msg(
        iova=_used(rig, TX), perm=vhost.VHOST_ACCESS_RO, type=vhost.VHOST_IOTLB_MISS
    )
    target.check("bytes", rig.device.read(WHOLE) == bytes(want), True)


@case("With IOTLB_MSG_V2 acknowledged a miss is in version 2, address space 0.")
def second_version(target: Target) -> None:
    rig = _rig(target)
    rig.device.set_backend_features(MSG_V2)
    target.refused(rig.tx.start)
    want = vhost.vhost_msg_v2(type=vhost.VHOST_IOTLB_MSG_V2)
    want.iotlb = vhost.vhost_iotlb_msg(
        iova=_used(rig, TX), perm=vhost.VHOST_ACCESS_RO, type=vhost.VHOST_IOTLB_MISS
    )
    target.check("bytes", rig.device.read(WHOLE) == bytes(want), True)


@case("A read() takes one message, however much room it has.")
def one_a_read(target: Target) -> None:
    rig = _rig(target)
    target.refused(rig.tx.start)
    target.refused(rig.rx.start)
    target.check("first", len(rig.device.read(4 * WHOLE)), WHOLE)
    target.check("second", len(rig.device.read(4 * WHOLE)), WHOLE)
    target.check("third", target.refused(lambda: rig.device.read(4 * WHOLE)), "EAGAIN")


@case("Misses are read in the order in which they came.")
def order(target: Target) -> None:
    rig = _rig(target)
    for ring in (rig.tx, rig.rx, rig.tx):
        target.refused(ring.start)
    found = [iova for _, iova, _, _ in _unread(rig)]
    target.check("order", found == [_used(rig, queue) for queue in (TX, RX, TX)], True)


@case("A read() with too little room gives nothing and leaves the message.")
def short_read(target: Target) -> None:
    rig = _rig(target)
    target.refused(rig.tx.start)
    target.check("71 bytes", rig.device.read(WHOLE - 1).hex(), "")
    target.check("messages", len(_unread(rig)), 1)


@case("poll() says that a message can be read as long as one is unread.")
def poll_message(target: Target) -> None:
    rig = _rig(target)
    events = select.POLLIN | select.POLLRDNORM | select.POLLOUT | select.POLLWRNORM
    poll = select.poll()
    poll.register(rig.device.fileno(), events)
    target.refused(rig.tx.start)
    found = [seen for _, seen in poll.poll(0)]
    target.check("unread", found, [select.POLLIN | select.POLLRDNORM])
    rig.device.read_message()
    target.check("read", poll.poll(0), [])


@case("A blocking read() gives the message that is there.", needs=("node",))
def blocking_read(target: Target) -> None:
    rig = _rig(target)
    target.refused(rig.tx.start)
    os.set_blocking(rig.device.fileno(), True)
    target.check("message", len(rig.device.read(WHOLE)), WHOLE)


@case("A blocking read() waits for a message.", needs=("node",))
def blocking_read_waits(target: Target) -> None:
    rig = _rig(target)
    os.set_blocking(rig.device.fileno(), True)
    with ThreadPoolExecutor(1) as pool:
        message = pool.submit(rig.device.read, WHOLE)
        target.refused(rig.tx.start)
        target.check("message", len(message.result()), WHOLE)


@case("A ring starts when all of it is mapped, and misses nothing.")
def start_mapped(target: Target) -> None:
    rig = _rig(target)
    _map(rig)
    for ring in (rig.rx, rig.tx):
        target.check(f"start {ring.index}", target.refused(ring.start), "")
    target.check("misses", _unread(rig), [])


@case("A ring starts after its miss was answered.")
def start_answered(target: Target) -> None:
    rig = _rig(target)
    target.check("first", target.refused(rig.tx.start), "EFAULT")
    _unread(rig)
    _map(rig)
    target.check("second", target.refused(rig.tx.start), "")


@case("The used ring's mapping must allow reading, though the device writes there, else EFAULT.")
def permission(target: Target) -> None:
    for perm, want in ((vhost.VHOST_ACCESS_WO, "EFAULT"), (vhost.VHOST_ACCESS_RO, "")):
        rig = _rig(target)
        _map(rig, perm)
        target.check(f"start, {perm}", target.refused(rig.tx.start), want)
        target.check(f"misses, {perm}", _unread(rig), [])


@case("A used ring that is mapped to no memory does not start, and that is no miss.")
def no_memory(target: Target) -> None:
    rig = _rig(target)
    rig.device.write_message(update(_used(rig, TX) & -PAGE, PAGE, 0))
    target.check("start", target.refused(rig.tx.start), "EFAULT")
    target.check("misses", _unread(rig), [])


@case("An invalidation unmaps: of the whole, and of a part that belongs to a longer mapping.")
def invalidated(target: Target) -> None:
    for name, iova, size in (("whole", 0, 0), ("part", None, 1)):
        rig = _rig(target)
        _map(rig)
        where = _used(rig, TX) if iova is None else iova
        rig.device.write_message(invalidate(where, size))
        target.check(name, target.refused(rig.tx.start), "EFAULT")
        target.check(f"{name}, misses", len(_unread(rig)), 1)


@case("An invalidation elsewhere leaves a mapping.")
def invalidated_elsewhere(target: Target) -> None:
    rig = _rig(target)
    _map(rig)
    first = rig.memory.regions[0]
    rig.device.write_message(invalidate(first.gpa + first.size, 2**40))
    rig.device.write_message(invalidate(0, first.gpa))
    target.check("start", target.refused(rig.tx.start), "")


@case("Beyond 2048 mappings the oldest goes.")
def oldest_goes(target: Target) -> None:
    rig = _rig(target)
    _map(rig)
    map_pages(rig.device, 2047, 1 << 40)
    target.check("2048", target.refused(rig.tx.start), "")
    rig.tx.stop()
    rig.device.write_message(update(1 << 50, PAGE, 0x10000))
    target.check("2049", target.refused(rig.tx.start), "EFAULT")


@case("ACCESS_PLATFORM acknowledged again forgets every mapping.")
def platform_again(target: Target) -> None:
    rig = _rig(target)
    _map(rig)
    rig.device.set_features(rig.setup.features)
    target.check("start", target.refused(rig.tx.start), "EFAULT")


@case("ACCESS_PLATFORM that comes or goes forgets the rings' addresses.",
      needs=("platform_toggles",))  # fmt: skip
def platform_forgets(target: Target) -> None:
    rig = stopped(target)
    rig.device.set_features(V1 | PLATFORM)
    _map(rig)
    target.refused(rig.tx.start)
    target.check("on", [iova for _, iova, _, _ in _unread(rig)], [0])
    rig.tx.place()
    rig.device.set_features(V1)
    target.check("off", target.refused(rig.tx.start), "EFAULT")
    rig.tx.place()
    target.check("set again", target.refused(rig.tx.start), "")


@case("Stopping any ring drops the messages of both, also if it is stopped already.")
def stop_drops(target: Target) -> None:
    for queue in (RX, TX):
        rig = _rig(target)
        target.refused(rig.tx.start)
        target.refused(rig.rx.start)
        rig.device.set_backend(queue, None)
        target.check(f"stop {queue}", _unread(rig), [])


@case("A stop that is refused drops the messages too.")
def refused_stop_drops(target: Target) -> None:
    rig = stopped(target, V1 | PLATFORM | 1 << vhost.VHOST_F_LOG_ALL)
    rig.device.set_log_base(rig.memory.hva(rig.alloc(PAGE), PAGE))
    target.refused(rig.tx.start)
    rig.device.set_log_base(BAD)
    target.check("stop", target.refused(lambda: rig.device.set_backend(TX, None)), "EFAULT")
    target.check("messages", _unread(rig), [])


@case("To stop a ring that is not there drops no message.")
def no_ring_keeps(target: Target) -> None:
    rig = _rig(target)
    target.refused(rig.tx.start)
    found = target.refused(lambda: rig.device.set_backend(MISSING_RING, None))
    target.check("no ring", found, "ENOBUFS")
    target.check("messages", len(_unread(rig)), 1)


@case("RESET_OWNER drops the messages.")
def reset_drops(target: Target) -> None:
    rig = _rig(target)
    target.refused(rig.tx.start)
    rig.device.reset_owner()
    target.check("reset", target.refused(lambda: rig.device.read(WHOLE)), "EAGAIN")
    rig.device.set_owner()
    rig.device.set_features(PLATFORM)
    target.check("owned", _unread(rig), [])


@case("Leaving IOTLB mode drops the messages.", needs=("platform_toggles",))
def mode_drops(target: Target) -> None:
    rig = _rig(target)
    target.refused(rig.tx.start)
    rig.device.set_features(V1)
    target.check("messages", target.refused(lambda: rig.device.read(WHOLE)), "EAGAIN")
