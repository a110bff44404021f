"""NET_SET_BACKEND: what a ring may be attached to, when, and how long that is held."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import ExitStack
from functools import partial

from vhostctl.abi import tun, vhost
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import (
    BAD,
    MISSING_RING,
    NO_FD,
    Edge,
    ask,
    elsewhere,
    file_of,
    has_link,
    is_running,
    owned,
    protect,
    running,
    stopped,
)
from vhostctl.conformance.rig import PAGE, Rig
from vhostctl.conformance.target import Target
from vhostctl.host.eventfd import EventFd
from vhostctl.host.tap import TapQueue
from vhostctl.host.vhost import RX, TX

SET = vhost.VHOST_NET_SET_BACKEND


def _start(target: Target, rig: Rig, fd: int, queue: int = TX) -> str:
    return ask(target, rig.device, SET, file_of(queue, fd))


@case("Its argument is read before the owner is looked at: EFAULT.")
def pointer(target: Target) -> None:
    device, edge = target.open(), target.keep(Edge())
    target.check("no owner", ask(target, device, SET, BAD), "EFAULT")
    target.check("4 bytes", ask(target, device, SET, edge.words(RX)), "EFAULT")
    device.set_owner()
    target.check("owner", ask(target, device, SET, BAD), "EFAULT")
    target.check("other process", elsewhere(lambda: ask(target, device, SET, BAD)), "EFAULT")


@case("Whoever is not the owner gets EPERM, even for a ring that is not there.")
def not_owner(target: Target) -> None:
    device = target.open()
    for queue in (RX, MISSING_RING):
        target.check(f"no owner, {queue}", ask(target, device, SET, file_of(queue, -1)), "EPERM")
    device.set_owner()
    for queue in (RX, MISSING_RING):
        found = elsewhere(partial(ask, target, device, SET, file_of(queue, -1)))
        target.check(f"other process, {queue}", found, "EPERM")


@case("Another process than the owner cannot stop a ring: EPERM.")
def stop_elsewhere(target: Target) -> None:
    rig = running(target)
    target.check("stop", elsewhere(lambda: _start(target, rig, -1)), "EPERM")
    target.check("runs", is_running(target, rig.device, TX), True)


@case("A ring that is not there is ENOBUFS, whatever the descriptor and without a memory table.")
def no_ring(target: Target) -> None:
    device = owned(target)
    for fd in (-1, NO_FD):
        for index in (MISSING_RING, 2**32 - 1):
            found = ask(target, device, SET, file_of(index, fd))
            target.check(f"ring {index}, fd {fd}", found, "ENOBUFS")


@case("Without a memory table it is EFAULT, also to stop, and whatever the descriptor.")
def no_table(target: Target) -> None:
    device = owned(target)
    for fd in (-1, NO_FD):
        target.check(f"fd {fd}", ask(target, device, SET, file_of(RX, fd)), "EFAULT")


@case("Stopping a stopped ring is fine, as often as one likes.")
def stop_stopped(target: Target) -> None:
    device = owned(target)
    device.set_mem_table([])
    found = [ask(target, device, SET, file_of(queue, -1)) for queue in (RX, TX, RX, RX)]
    target.check("answers", found, [""] * 4)


@case("Rings outside the owner's memory are EFAULT, also to stop.")
def bad_rings(target: Target) -> None:
    rig = stopped(target)
    for part in ("desc", "avail", "used"):
        where = {"desc": rig.tx.desc, "avail": rig.tx.avail, "used": rig.tx.used} | {part: BAD}
        rig.device.set_vring_addr(TX, **where)
        target.check(f"{part}, start", target.refused(rig.tx.start), "EFAULT")
        target.check(f"{part}, stop", _start(target, rig, -1), "EFAULT")
        target.check(f"{part}, no descriptor", _start(target, rig, NO_FD), "EFAULT")


@case("Rings without addresses do not start: EFAULT.")
def no_addresses(target: Target) -> None:
    device = owned(target)
    device.set_mem_table([])
    queue = running(target).wire.queues[0]
    target.check("start", ask(target, device, SET, file_of(TX, queue.fileno())), "EFAULT")
    target.check("runs", is_running(target, device, TX), False)


@case("A used ring that is not mapped, or cannot be written, does not start: EFAULT.")
def used_unwritable(target: Target) -> None:
    rig = stopped(target)
    page = rig.memory.hva(rig.alloc(PAGE, PAGE), PAGE)
    rig.device.set_vring_addr(TX, desc=rig.tx.desc, avail=rig.tx.avail, used=page)
    for access, name in ((1, "read only"), (0, "no access")):
        protect(page, PAGE, access)
        target.check(name, target.refused(rig.tx.start), "EFAULT")
        target.check(f"runs, {name}", is_running(target, rig.device, TX), False)
    protect(page, PAGE, 3)
    target.check("writable", target.refused(rig.tx.start), "")


@case("A number that is no descriptor is ENOTSOCK; of those below 0 only -1 stops.")
def no_descriptor(target: Target) -> None:
    rig = stopped(target)
    for fd in (NO_FD, -2, -(2**31), 2**31 - 1):
        target.check(f"{fd}", _start(target, rig, fd), "ENOTSOCK")


@case("Files that are no socket are ENOTSOCK.")
def no_socket(target: Target) -> None:
    rig = stopped(target)
    reader, writer = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    with tempfile.TemporaryFile() as file, EventFd.create() as event:
        files = {"pipe": reader, "null": null, "file": file.fileno(), "eventfd": event.fileno()}
        for name, fd in files.items():
            target.check(name, _start(target, rig, fd), "ENOTSOCK")
    for fd in (reader, writer, null):
        os.close(fd)


@case("The device itself is ENOTSOCK.", needs=("node",))
def itself(target: Target) -> None:
    rig = stopped(target)
    target.check("itself", _start(target, rig, rig.device.fileno()), "ENOTSOCK")
    target.check("another", _start(target, rig, target.open().fileno()), "ENOTSOCK")


@case("Sockets that are not raw packet sockets are ENOTSOCK.")
def wrong_sockets(target: Target) -> None:
    rig = stopped(target)
    for name, family, kind, protocol in (
        ("UDP", socket.AF_INET, socket.SOCK_DGRAM, 0),
        ("TCP", socket.AF_INET, socket.SOCK_STREAM, 0),
        ("Unix", socket.AF_UNIX, socket.SOCK_DGRAM, 0),
        ("netlink", socket.AF_NETLINK, socket.SOCK_RAW, 0),
        ("raw IP", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        ("packet, datagrams", socket.AF_PACKET, socket.SOCK_DGRAM, 0),
    ):
        with socket.socket(family, kind, protocol) as other:
            target.check(name, _start(target, rig, other.fileno()), "ENOTSOCK")


@case("A raw packet socket is taken, and given up by -1.")
def packet_socket(target: Target) -> None:
    rig = stopped(target)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind((rig.wire.link, 0))
        target.check("start", _start(target, rig, raw.fileno()), "")
        target.check("runs", is_running(target, rig.device, TX), True)
        target.check("stop", _start(target, rig, -1), "")


@case("A tun descriptor that was never given a link is EINVAL, and the ring stays stopped.")
def tun_without_link(target: Target) -> None:
    rig = stopped(target)
    with TapQueue("unattached") as queue:
        target.check("start", _start(target, rig, queue.fileno()), "EINVAL")
    target.check("runs", is_running(target, rig.device, TX), False)
    target.check("tap", target.refused(rig.tx.start), "")


@case("A tun, which has no Ethernet header, is taken like a tap.")
def tun_link(target: Target) -> None:
    rig = stopped(target)
    with TapQueue("tun") as queue:
        queue.attach("", tun.IFF_TUN | tun.IFF_NO_PI | tun.IFF_VNET_HDR)
        target.check("start", _start(target, rig, queue.fileno()), "")
        target.check("stop", _start(target, rig, -1), "")


@case("The same tap again is fine and changes nothing.")
def same_again(target: Target) -> None:
    rig = running(target)
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])
    target.check("again", target.refused(rig.tx.start), "")
    target.check("base", rig.tx.base(), 1)
    rig.tx.offer(rig.outgoing(2))
    target.check("sent after", rig.sent(2), ["1x60", "2x60"])


@case("The same tap again is EFAULT if the rings could not start now.")
def same_again_checked(target: Target) -> None:
    rig = running(target)
    rig.rx.stop()
    rig.device.set_vring_addr(RX, desc=BAD, avail=BAD, used=BAD)
    target.check("RX", target.refused(rig.rx.start), "EFAULT")
    target.check("TX", target.refused(rig.tx.start), "")


@case("A refused backend leaves the one before it.")
def refused_keeps(target: Target) -> None:
    rig = running(target)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        target.check("UDP", _start(target, rig, other.fileno()), "ENOTSOCK")
    target.check("no descriptor", _start(target, rig, NO_FD), "ENOTSOCK")
    with TapQueue("unattached") as queue:
        target.check("no link", _start(target, rig, queue.fileno()), "EINVAL")
    target.check("runs", is_running(target, rig.device, TX), True)
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])


@case("Both rings may have the same tap, and one of them alone may have it.")
def both_rings(target: Target) -> None:
    rig = stopped(target)
    target.check("TX", target.refused(rig.tx.start), "")
    target.check("RX stopped", is_running(target, rig.device, RX), False)
    target.check("RX", target.refused(rig.rx.start), "")
    rig.tx.stop()
    target.check("RX runs", is_running(target, rig.device, RX), True)
    target.check("TX stopped", is_running(target, rig.device, TX), False)


@case("A ring runs without kick, call and error eventfds.")
def no_eventfds(target: Target) -> None:
    rig = stopped(target)
    for bind in (rig.device.set_vring_kick, rig.device.set_vring_call, rig.device.set_vring_err):
        bind(TX, None)
    rig.tx.publish(rig.tx.chain(rig.outgoing(1)))
    target.check("start", target.refused(rig.tx.start), "")
    target.check("sent", rig.sent(1), ["1x60"])


@case("The ring holds the tap: it stays when its descriptor is closed, and goes when stopped.")
def held_until_stop(target: Target) -> None:
    rig = running(target)
    link = rig.wire.link
    rig.rx.stop()
    for queue in rig.wire.queues:
        queue.close()
    target.check("held", has_link(link), True)
    rig.tx.stop()
    target.check("let go", has_link(link), False)


@case("close() lets go of the tap.")
def held_until_close(target: Target) -> None:
    rig = running(target)
    link = rig.wire.link
    for queue in rig.wire.queues:
        queue.close()
    target.check("held", has_link(link), True)
    rig.device.close()
    target.check("let go", has_link(link), False)


@case("Another tap takes the place of the first, which is let go.")
def other_tap(target: Target) -> None:
    rig = running(target)
    link = rig.wire.link
    with ExitStack() as stack:
        other = stack.enter_context(TapQueue("other"))
        other.attach("", tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR)
        for queue in (RX, TX):
            target.check(f"ring {queue}", _start(target, rig, other.fileno(), queue), "")
    for first in rig.wire.queues:
        first.close()
    target.check("first", has_link(link), False)


@case("A refused backend is not held.")
def refused_not_held(target: Target) -> None:
    rig = stopped(target)
    rig.device.set_vring_addr(TX, desc=rig.tx.desc, avail=rig.tx.avail, used=0)
    target.check("start", target.refused(rig.tx.start), "EFAULT")
    rig.wire.close()
    target.check("let go", has_link(rig.wire.link), False)


@case("Stopped and started 100 times, a ring goes on where it was.")
def many_times(target: Target) -> None:
    rig = running(target)
    for _ in range(100):
        rig.tx.stop()
        rig.tx.start()
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])
    target.check("base", rig.tx.base(), 1)
