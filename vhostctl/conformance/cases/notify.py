"""Notification, both ways: kicks, calls, and who may leave them out (virtio 1.2, 2.7.7-10)."""

from __future__ import annotations

from vhostctl.abi import virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.rig import EVENT_IDX, HEADER, MRG, NOTIFY_ON_EMPTY, V1, Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame

_NO_NOTIFY = virtio.VRING_USED_F_NO_NOTIFY
_NO_INTERRUPT = virtio.VRING_AVAIL_F_NO_INTERRUPT
_EVENT = Setup(features=V1 | EVENT_IDX)


def _transmit(rig: Rig, *counts: int) -> list[int]:
    """Transmit that many frames at once, each time waiting; return the calls after each time."""
    calls: list[int] = []
    for count in counts:
        rig.tx.offer(*[rig.outgoing(number) for number in range(count)])
        rig.tx.wait(count, f"transmission {len(calls)}")
        calls.append(rig.tx.calls())
    return calls


@case("A transmit ring that is idle wants kicks: its used flags are 0.")
def idle_flags(target: Target) -> None:
    rig = Rig(target)
    target.settle()
    target.check("flags at the start", rig.tx.used_flags, 0)
    _transmit(rig, 3)
    target.check("flags after work", rig.tx.used_flags, 0)


@case("Without EVENT_IDX avail_event is not written.")
def no_avail_event(target: Target) -> None:
    rig = Rig(target)
    rig.tx.avail_event = 0x5A5A
    _transmit(rig, 3)
    target.check("avail_event", rig.tx.avail_event, 0x5A5A)


@case("With EVENT_IDX an idle transmit ring wants a kick for the next buffer: avail_event says so.")
def avail_event(target: Target) -> None:
    rig = Rig(target, _EVENT)
    rig.tx.avail_event = 0x5A5A
    for total in (3, 8):
        _transmit(rig, total - rig.tx.avail_idx)
        target.check(f"avail_event after {total}", rig.tx.avail_event, total)
        target.check(f"flags after {total}", rig.tx.used_flags, 0)


@case("With EVENT_IDX avail_event goes on from 65535 to 0.")
def avail_event_wraps(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | EVENT_IDX, bases=(0, 65534)))
    _transmit(rig, 5)
    target.check("avail_event", rig.tx.avail_event, 3)


@case("A receive ring that waits for buffers wants kicks.")
def rx_wants_kicks(target: Target) -> None:
    rig = Rig(target)
    rig.wire.send(frame(1))
    target.settle()
    target.check("flags", rig.rx.used_flags, 0)


@case("A receive ring that has drained the socket wants no kicks: NO_NOTIFY stays set.")
def rx_wants_none(target: Target) -> None:
    rig = Rig(target)
    rig.rx.offer([rig.room(200)], [rig.room(200)])
    rig.wire.send(frame(1))
    rig.rx.wait(1)
    target.check("flags", rig.rx.used_flags, _NO_NOTIFY)


@case("With EVENT_IDX a receive ring that waits for buffers sets avail_event to what it has seen.")
def rx_avail_event(target: Target) -> None:
    rig = Rig(target, _EVENT)
    rig.rx.offer([rig.room(200)])
    rig.wire.send(frame(1))
    rig.rx.wait(1)
    rig.wire.send(frame(2))
    target.settle()
    target.check("avail_event", rig.rx.avail_event, 1)
    target.check("flags", rig.rx.used_flags, 0)


@case("used.flags is written as 0 when a ring starts, whatever stood there.")
def flags_at_start(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rig.write(rig.gpa(rig.rx.used), b"\xff\xff")
    rig.write(rig.gpa(rig.tx.used), b"\xff\xff")
    rig.start()
    target.check("RX flags", rig.rx.used_flags, 0)
    target.check("TX flags", rig.tx.used_flags, 0)


@case("A receive ring that wanted no kicks when it was stopped says so again when it starts.")
def flags_at_restart(target: Target) -> None:
    rig = Rig(target)
    rig.rx.offer([rig.room(200)], [rig.room(200)])
    rig.wire.send(frame(1))
    rig.rx.wait(1)
    rig.rx.stop()
    rig.write(rig.gpa(rig.rx.used), b"\0\0")
    rig.rx.start()
    target.check("flags", rig.rx.used_flags, _NO_NOTIFY)


@case("Without a kick a running transmit ring does not look at new buffers.")
def needs_kick(target: Target) -> None:
    rig = Rig(target)
    _transmit(rig, 1)
    rig.tx.publish(rig.tx.chain(rig.outgoing(2)))
    target.settle()
    target.check("used index", rig.tx.used_idx, 1)
    rig.tx.kick.signal()
    target.check("used", len(rig.tx.wait(1)), 1)


@case("A kick with nothing new does nothing.")
def empty_kick(target: Target) -> None:
    rig = Rig(target)
    rig.tx.kick.signal()
    rig.rx.kick.signal()
    target.settle()
    target.check("used", [rig.tx.used_idx, rig.rx.used_idx], [0, 0])
    target.check("calls", [rig.tx.calls(), rig.rx.calls()], [0, 0])
    target.check("errors", [rig.tx.errors(), rig.rx.errors()], [0, 0])


@case("The device never reads the counter of a kick eventfd.")
def kick_counter(target: Target) -> None:
    rig = Rig(target)
    rig.tx.offer(rig.outgoing(1))
    rig.tx.wait(1)
    rig.tx.kick.signal(4)
    target.settle()
    target.check("counter", rig.tx.kick.drain(), 5)


@case("A kick eventfd that is signalled already kicks when it is bound.")
def signalled_kick(target: Target) -> None:
    rig = Rig(target)
    rig.device.set_vring_kick(1, None)
    rig.tx.offer(rig.outgoing(1))
    target.settle()
    target.check("used index before", rig.tx.used_idx, 0)
    rig.device.set_vring_kick(1, rig.tx.kick.fileno())
    target.check("used", rig.tx.wait(1), [(0, 0)])


@case("A kick on the eventfd of one ring does not start work on the other.")
def kicks_are_apart(target: Target) -> None:
    rig = Rig(target)
    rig.tx.publish(rig.tx.chain(rig.outgoing(1)))
    rig.rx.kick.signal()
    target.settle()
    target.check("used index", rig.tx.used_idx, 0)
    rig.tx.kick.signal()
    rig.tx.wait(1)


@case("One eventfd may kick both rings.")
def shared_kick(target: Target) -> None:
    rig = Rig(target)
    rig.wire.send(frame(1))
    target.settle()
    rig.device.set_vring_kick(0, rig.tx.kick.fileno())
    rig.rx.publish(rig.rx.chain([rig.room(200)]))
    rig.tx.offer(rig.outgoing(2))
    target.check("TX used", rig.tx.wait(1, "TX"), [(0, 0)])
    target.check("RX used", rig.rx.wait(1, "RX"), [(0, 72)])


@case("Without EVENT_IDX every batch is signalled.")
def calls(target: Target) -> None:
    rig = Rig(target)
    target.check("calls", _transmit(rig, 1, 2, 3), [1, 2, 3])


@case("NO_INTERRUPT in the avail flags keeps the device from signalling.")
def no_interrupt(target: Target) -> None:
    rig = Rig(target)
    rig.tx.avail_flags = _NO_INTERRUPT
    target.check("calls with it", _transmit(rig, 1, 1), [0, 0])
    rig.tx.avail_flags = 0
    target.check("calls without", _transmit(rig, 1), [1])


@case("Other bits of the avail flags are ignored.")
def other_flags(target: Target) -> None:
    rig = Rig(target)
    rig.tx.avail_flags = 0xFFFE
    target.check("calls", _transmit(rig, 1), [1])


@case("NO_INTERRUPT keeps a receive ring from signalling too.")
def rx_no_interrupt(target: Target) -> None:
    rig = Rig(target)
    rig.rx.avail_flags = _NO_INTERRUPT
    rig.rx.offer([rig.room(200)], [rig.room(200)])
    rig.wire.send(frame(1))
    rig.rx.wait(1, "first")
    target.check("calls with it", rig.rx.calls(), 0)
    rig.rx.avail_flags = 0
    rig.wire.send(frame(2))
    rig.rx.wait(1, "second")
    target.check("calls without", rig.rx.calls(), 1)


@case("With EVENT_IDX the avail flags are ignored.")
def event_ignores_flags(target: Target) -> None:
    rig = Rig(target, _EVENT)
    rig.tx.avail_flags = _NO_INTERRUPT
    target.check("calls", _transmit(rig, 1), [1])


@case("With EVENT_IDX the first batch after a start is signalled whatever used_event is.")
def event_first(target: Target) -> None:
    rig = Rig(target, _EVENT)
    rig.tx.used_event = 1000
    target.check("calls", _transmit(rig, 1, 1), [1, 1])
    target.check("base", rig.tx.stop(), 2)
    rig.tx.start()
    target.check("calls after a restart", _transmit(rig, 1, 1), [2, 2])


@case("With EVENT_IDX a batch is signalled if it passes used_event, and only then.")
def event(target: Target) -> None:
    rig = Rig(target, _EVENT)
    seen = _transmit(rig, 1)
    rig.tx.used_event = 3
    for count in (1, 1, 1, 1, 1):  # used index 2, 3, 4, 5, 6: element 3 is the fourth
        seen += _transmit(rig, count)
    target.check("calls", seen, [1, 1, 1, 2, 2, 2])


@case("With EVENT_IDX a batch that begins before used_event and ends after it is signalled.")
def event_inside_a_batch(target: Target) -> None:
    rig = Rig(target, _EVENT)
    seen = _transmit(rig, 1)
    rig.tx.used_event = 5
    seen += _transmit(rig, 4)  # elements 1 to 4
    seen += _transmit(rig, 4)  # elements 5 to 8
    rig.tx.used_event = 20
    seen += _transmit(rig, 30)  # elements 9 to 38
    target.check("calls", seen, [1, 1, 2, 3])


@case("With EVENT_IDX used_event is compared across the wrap of the used index.")
def event_wraps(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | EVENT_IDX, bases=(0, 65533)))
    seen = _transmit(rig, 1)
    rig.tx.used_event = 1
    seen += _transmit(rig, 2)  # elements 65534 and 65535
    seen += _transmit(rig, 1)  # element 0
    seen += _transmit(rig, 1)  # element 1
    rig.tx.used_event = 65535
    seen += _transmit(rig, 2)
    target.check("calls", seen, [1, 1, 1, 2, 2])


@case("With EVENT_IDX a receive ring follows used_event.")
def rx_event(target: Target) -> None:
    rig = Rig(target, _EVENT)
    rig.rx.offer(*[[rig.room(200)] for _ in range(4)])
    seen = []
    rig.rx.used_event = 2
    for number in range(4):
        rig.wire.send(frame(number))
        rig.rx.wait(1, f"frame {number}")
        seen.append(rig.rx.calls())
    target.check("calls", seen, [1, 1, 2, 2])


@case("With EVENT_IDX a merged frame that passes used_event is signalled.")
def rx_event_merged(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG | EVENT_IDX))
    rig.rx.offer(*[[rig.room(100)] for _ in range(9)])
    seen = []
    rig.rx.used_event = 4
    for number in range(3):
        rig.wire.send(frame(number, 200))  # three buffers each
        rig.rx.wait(3, f"frame {number}")
        seen.append(rig.rx.calls())
    target.check("calls", seen, [1, 2, 2])


@case("NOTIFY_ON_EMPTY signals when the ring runs empty, against NO_INTERRUPT.")
def on_empty(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | NOTIFY_ON_EMPTY))
    rig.tx.avail_flags = _NO_INTERRUPT
    target.check("calls", _transmit(rig, 3, 2), [1, 2])


@case("NOTIFY_ON_EMPTY signals when the ring runs empty, against used_event.")
def on_empty_event(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | NOTIFY_ON_EMPTY | EVENT_IDX))
    rig.tx.used_event = 1000
    target.check("calls", _transmit(rig, 1, 1, 1), [1, 2, 3])


@case("NOTIFY_ON_EMPTY does not signal while buffers are left.")
def not_empty(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | NOTIFY_ON_EMPTY))
    rig.rx.avail_flags = _NO_INTERRUPT
    rig.rx.offer([rig.room(200)], [rig.room(200)])
    seen = []
    for number in range(2):
        rig.wire.send(frame(number))
        rig.rx.wait(1, f"frame {number}")
        seen.append(rig.rx.calls())
    target.check("calls", seen, [0, 1])


@case("Without a CALL eventfd the ring works, and nothing is made up for when one is bound.")
def no_call(target: Target) -> None:
    rig = Rig(target, Setup(call=False))
    _transmit(rig, 2)
    rig.device.set_vring_call(1, rig.tx.call.fileno())
    target.settle()
    target.check("calls when bound", rig.tx.calls(), 0)
    target.check("calls after", _transmit(rig, 1), [1])


@case("With EVENT_IDX batches without a CALL eventfd do not count as the first after a start.")
def no_call_event(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | EVENT_IDX, call=False))
    rig.tx.used_event = 1000
    _transmit(rig, 2)
    rig.device.set_vring_call(1, rig.tx.call.fileno())
    target.check("calls", _transmit(rig, 1, 1), [1, 1])


def _without_call(target: Target, count: int) -> int:
    """Return the calls for one packet after `count` without a CALL eventfd."""
    rig = Rig(target, Setup(features=V1 | EVENT_IDX, nums=(64, 1024)))
    _transmit(rig, 1)
    rig.device.set_vring_call(1, None)
    head = rig.tx.chain([rig.put(HEADER)])  # no frame: given back at once
    for done in range(0, count, 1024):
        step = min(1024, count - done)
        rig.tx.publish(*[head] * step)
        rig.tx.kick.signal()
        rig.tx.reach((1 + done + step) & 0xFFFF)
    rig.tx.taken = rig.tx.used_idx
    rig.tx.used_event = rig.tx.used_idx + 1000
    rig.device.set_vring_call(1, rig.tx.call.fileno())
    before = rig.tx.calls()
    return _transmit(rig, 1)[0] - before


@case("With EVENT_IDX elements that went by without a CALL eventfd count, up to 65535.")
def bound_again(target: Target) -> None:
    target.check("calls", _without_call(target, 40000), 0)


@case(
    "With EVENT_IDX the next batch is signalled if 65536 elements went by without a CALL eventfd."
)
def bound_too_late(target: Target) -> None:
    target.check("calls", _without_call(target, 66000), 1)


@case("Without a KICK eventfd the transmit ring still takes what is there when it starts.")
def no_kick(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rig.device.set_vring_kick(1, None)
    rig.tx.publish(rig.tx.chain(rig.outgoing(1)))
    rig.start()
    target.check("used", rig.tx.wait(1), [(0, 0)])


@case("The CALL eventfd may be replaced while the ring runs.")
def replace_call(target: Target) -> None:
    rig = Rig(target)
    first = _transmit(rig, 1)
    rig.device.set_vring_call(1, rig.rx.call.fileno())
    target.check("calls of the old one", first + _transmit(rig, 1), [1, 1])
    target.check("calls of the new one", rig.rx.calls(), 1)
