"""IN_ORDER: buffers are taken and given back in the order of the table (virtio 1.2, 2.7.9)."""

from __future__ import annotations

from vhostctl.conformance.case import case
from vhostctl.conformance.rig import IN_ORDER, MRG, V1, Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name

_NEEDS = ("in_order",)
_SETUP = Setup(features=V1 | IN_ORDER)


def _publish(rig: Rig, *heads: int) -> None:
    """Publish `heads` of the transmit ring and kick."""
    rig.tx.publish(*heads)
    rig.tx.kick.signal()


@case("The contents of the avail ring are not read: heads follow one another.", needs=_NEEDS)
def heads_follow(target: Target) -> None:
    rig = Rig(target, _SETUP)
    for number in range(3):
        rig.tx.chain(rig.outgoing(number))
    _publish(rig, 63, 63, 63)
    target.check("frames", rig.sent(3), ["0x60", "1x60", "2x60"])
    target.check("errors", rig.tx.errors(), 0)


@case("A transmitted batch is given back with one element, of its last head.", needs=_NEEDS)
def one_element(target: Target) -> None:
    rig = Rig(target, _SETUP)
    heads = [rig.tx.chain(rig.outgoing(number)) for number in range(5)]
    _publish(rig, *heads)
    rig.tx.reach(5)
    target.check("first element", rig.tx.element(0), (4, 0))
    target.check("second element", rig.tx.element(1), (0, 0))
    target.check("frames", rig.sent(5), [f"{n}x60" for n in range(5)])
    target.check("calls", rig.tx.calls(), 1)


@case("The next batch has its element where the used index was.", needs=_NEEDS)
def next_batch(target: Target) -> None:
    rig = Rig(target, _SETUP)
    for last in (4, 7):
        while rig.tx.filled <= last:
            rig.tx.chain(rig.outgoing(rig.tx.filled))
        _publish(rig, *range(rig.tx.avail_idx, last + 1))
        rig.tx.reach(last + 1)
    target.check("elements", [rig.tx.element(0), rig.tx.element(5)], [(4, 0), (7, 0)])


@case("A chain moves the next head on by its descriptors.", needs=_NEEDS)
def chains(target: Target) -> None:
    rig = Rig(target, _SETUP)
    rig.tx.chain(rig.cut(rig.packet(1), 12, 20))
    rig.tx.chain(rig.outgoing(2))
    rig.tx.chain(rig.cut(rig.packet(3), 12))
    _publish(rig, 0, 3, 4)
    target.check("frames", rig.sent(3), ["1x60", "2x60", "3x60"])
    rig.tx.reach(3)
    target.check("element", rig.tx.element(0), (4, 0))


@case("A descriptor of a table moves the next head on by one.", needs=_NEEDS)
def tables(target: Target) -> None:
    rig = Rig(target, _SETUP)
    rig.tx.chain([rig.indirect(rig.cut(rig.packet(1), 12, 20))])
    rig.tx.chain(rig.outgoing(2))
    _publish(rig, 0, 1)
    target.check("frames", rig.sent(2), ["1x60", "2x60"])


@case("Heads go on from the end of the table to its beginning.", needs=_NEEDS)
def wraps(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | IN_ORDER, nums=(64, 4)))
    sent = []
    for number in range(0, 12, 3):
        heads = [rig.tx.chain(rig.outgoing(number + n)) for n in range(3)]
        _publish(rig, *heads)
        rig.tx.reach(number + 3)
        sent.append(rig.tx.element(number % 4))
    target.check("elements", sent, [(2, 0), (1, 0), (0, 0), (3, 0)])
    target.check("frames", rig.sent(12), [f"{n}x60" for n in range(12)])


@case("The head that a ring begins with is its base.", needs=_NEEDS)
def begins_with_base(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | IN_ORDER, bases=(0, 70)))
    rig.tx.filled = 70 % 64
    rig.tx.chain(rig.outgoing(1))
    _publish(rig, 0)
    target.check("frames", rig.sent(1), ["1x60"])
    rig.tx.reach(71)
    target.check("element", rig.tx.element(6), (6, 0))


@case("A frame that is received has one element: last head, and its own length.", needs=_NEEDS)
def received(target: Target) -> None:
    rig = Rig(target, _SETUP)
    rooms = [rig.room(200) for _ in range(3)]
    rig.rx.offer(*[[room] for room in rooms])
    for number in range(3):
        rig.wire.send(frame(number))
    rig.rx.reach(3)
    target.check("frames", [name(rig.filled([r])[12:72]) for r in rooms], ["0x60", "1x60", "2x60"])


@case("A merged frame has one element: last head, and what is in the last buffer.", needs=_NEEDS)
def merged(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG | IN_ORDER))
    rooms = [rig.room(100) for _ in range(5)]
    rig.rx.offer(*[[room] for room in rooms])
    rig.wire.send(frame(1, 250))
    rig.rx.reach(3)
    target.check("element", rig.rx.element(0), (2, 62))
    target.check("base", rig.rx.base(), 3)
    data = rig.filled(rooms)
    target.check("num_buffers", int.from_bytes(data[10:12], "little"), 3)
    target.check("frame", name(data[12:262]), "1x250")


@case("With too few buffers nothing is taken: they serve the frame later.", needs=_NEEDS)
def too_few(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG | IN_ORDER))
    rooms = [rig.room(100) for _ in range(3)]
    rig.rx.offer(*[[room] for room in rooms[:2]])
    rig.wire.send(frame(1, 250))
    target.settle()
    target.check("used index", rig.rx.used_idx, 0)
    rig.rx.offer(rooms[2:])
    rig.rx.reach(3)
    target.check("frame", name(rig.filled(rooms)[12:262]), "1x250")


@case("A chain that makes the ring stick does not move the next head on.", needs=_NEEDS)
def stuck(target: Target) -> None:
    rig = Rig(target, _SETUP)
    (data,) = rig.outgoing(1)
    rig.tx.chain([data._replace(addr=1 << 50)])
    _publish(rig, 0)
    rig.tx.wait_errors(1)
    target.check("used index", rig.tx.used_idx, 0)
    rig.tx.describe(0, data)
    rig.tx.kick.signal()
    target.check("frames", rig.sent(1), ["1x60"])


@case("The used ring is marked in the log where elements and index are written.", needs=_NEEDS)
def logged(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | IN_ORDER, start=False))
    log = rig.room(4096, 4096)
    rig.write(log.addr, bytes(4096))
    rig.device.set_log_base(rig.memory.hva(log.addr, 4096))
    rig.tx.place(log_gpa=rig.gpa(rig.tx.used))
    rig.start()
    rig.tx.chain(rig.outgoing(1))
    _publish(rig, 0)
    rig.sent(1)
    number = rig.gpa(rig.tx.used) // 4096
    target.check("bit", rig.read(log.addr + number // 8, 1)[0] >> number % 8 & 1, 1)
