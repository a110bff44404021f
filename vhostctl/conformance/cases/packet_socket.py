"""A raw packet socket (AF_PACKET, SOCK_RAW) as the backend, instead of a tap."""

from __future__ import annotations

import os
import socket

from vhostctl.conformance.case import case
from vhostctl.conformance.rig import V1, VHOST_HDR, Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import ETHERTYPE, frame, name


def _on_a_socket(target: Target) -> tuple[Rig, socket.socket]:
    """Return a rig whose backend is a socket on the tap's link; the tap is read by the case."""
    rig = Rig(target, Setup(features=V1 | VHOST_HDR, header=None, start=False))
    backend = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    backend.bind((rig.wire.link, ETHERTYPE))
    for queue in (rig.rx, rig.tx):
        rig.device.set_backend(queue.index, backend.fileno())
    target.settle()
    return rig, backend


@case("What is transmitted goes out of the link.")
def transmits(target: Target) -> None:
    rig, backend = _on_a_socket(target)
    with backend:
        heads = rig.tx.offer(*[rig.outgoing(n) for n in range(5)])
        target.check("used", rig.tx.wait(5), [(head, 0) for head in heads])
        found = [name(os.read(rig.tap.fileno(), 4096)) for _ in range(5)]
        target.check("frames", found, [f"{n}x60" for n in range(5)])


@case("What comes in on the link is received.")
def receives(target: Target) -> None:
    rig, backend = _on_a_socket(target)
    with backend:
        rooms = [rig.room(200) for _ in range(3)]
        rig.rx.offer(*[[room] for room in rooms])
        for number in range(3):
            os.write(rig.tap.fileno(), frame(number))
        target.check("used", rig.rx.wait(3), [(n, 72) for n in range(3)])
        found = [name(rig.filled([room])[12:72]) for room in rooms]
        target.check("frames", found, ["0x60", "1x60", "2x60"])


@case("A packet shorter than an Ethernet header is given back.")
def short_frame(target: Target) -> None:
    rig, backend = _on_a_socket(target)
    with backend:
        heads = rig.tx.offer([rig.put(rig.packet(1)[:20])], rig.outgoing(2))
        target.check("used", rig.tx.wait(2), [(head, 0) for head in heads])
        target.check("frame", name(os.read(rig.tap.fileno(), 4096)), "2x60")
        target.check("errors", rig.tx.errors(), 0)
