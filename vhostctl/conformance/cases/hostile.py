"""Chains that no driver may build: each costs the ring that has it, and nothing else."""

from __future__ import annotations

from vhostctl.abi import virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.rig import EVENT_IDX, GPA, MRG, PAGE, V1, Queue, Rig, Setup
from vhostctl.conformance.ring import INDIRECT, WRITE, Part
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name

_OUTSIDE = 0x4000_0000_0000
_END = GPA + (8 << 20)
_NO_NOTIFY = virtio.VRING_USED_F_NO_NOTIFY


def stuck(target: Target, queue: Queue, errors: int = 1) -> None:
    """Expect that each kick tries the next chain again, and signals `errors` errors for it.

    What is tried is published already.
    """
    for attempt in (1, 2):
        queue.kick.signal()
        queue.wait_errors(attempt * errors, f"attempt {attempt}")
        target.check(f"errors after attempt {attempt}", queue.errors(), attempt * errors)
    target.check("base", queue.base(), queue.rig.setup.bases[queue.index])
    target.check("used index", queue.used_idx, queue.rig.setup.bases[queue.index])
    target.check("calls", queue.calls(), 0)
    target.check("flags", queue.used_flags, _NO_NOTIFY)


def _stuck_tx(target: Target, rig: Rig, *parts: Part, errors: int = 1) -> None:
    rig.tx.publish(rig.tx.chain(parts))
    stuck(target, rig.tx, errors)
    target.check("frames", rig.wire.received(), [])


def _stuck_rx(target: Target, rig: Rig, *parts: Part, errors: int = 1) -> None:
    """Let a frame wait first: without one a receive ring does not look at its buffers."""
    rig.wire.send(frame(1))
    target.settle()
    rig.rx.publish(rig.rx.chain(parts))
    stuck(target, rig.rx, errors)


@case("A descriptor that continues with itself makes the ring stick.")
def loop_of_one(target: Target) -> None:
    rig = Rig(target)
    (data,) = rig.outgoing(1)
    rig.tx.describe(0, data, 0)
    rig.tx.publish(0)
    stuck(target, rig.tx)


@case("A loop of descriptors makes the ring stick.")
def loop(target: Target) -> None:
    rig = Rig(target)
    (data,) = rig.outgoing(1)
    for index, following in ((0, 1), (1, 2), (2, 0)):
        rig.tx.describe(index, data, following)
    rig.tx.publish(0)
    stuck(target, rig.tx)


@case("A chain that takes every descriptor and one more makes the ring stick.")
def longer_than_the_ring(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 4)))
    parts = rig.cut(rig.packet(1), 12, 20, 20)
    for index, part in enumerate(parts):
        rig.tx.describe(index, part, (index + 1) % 4)
    rig.tx.publish(0)
    stuck(target, rig.tx)


@case("A loop of descriptors of length 0 ends too.")
def loop_of_nothing(target: Target) -> None:
    rig = Rig(target)
    rig.tx.describe(0, Part(GPA, 0), 1)
    rig.tx.describe(1, Part(GPA, 0), 0)
    rig.tx.publish(0)
    stuck(target, rig.tx)


@case("A loop of receive buffers makes the ring stick.")
def rx_loop(target: Target) -> None:
    rig = Rig(target)
    rig.wire.send(frame(1))
    target.settle()
    rig.rx.describe(0, rig.room(10), 0)
    rig.rx.publish(0)
    stuck(target, rig.rx)


@case("A head beyond the table makes the ring stick.")
def head_beyond(target: Target) -> None:
    rig = Rig(target)
    rig.tx.publish(64)
    stuck(target, rig.tx)


@case("A next beyond the table makes the ring stick.")
def next_beyond(target: Target) -> None:
    rig = Rig(target)
    rig.tx.describe(0, rig.outgoing(1)[0], 64)
    rig.tx.publish(0)
    stuck(target, rig.tx)


@case("An avail index that runs ahead by more than the ring makes it stick; a good one frees it.")
def avail_jump(target: Target) -> None:
    rig = Rig(target)
    (head,) = [rig.tx.chain(rig.outgoing(1))]
    rig.tx.publish(head)
    rig.tx.avail_idx = 65
    stuck(target, rig.tx)
    rig.tx.avail_idx = 1
    rig.tx.kick.signal()
    target.check("used after", rig.tx.wait(1), [(head, 0)])
    target.check("frames after", rig.sent(1), ["1x60"])


@case("An avail index that runs ahead by the whole ring is taken.")
def avail_full(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 4)))
    rig.tx.offer(*[rig.outgoing(n) for n in range(4)])
    target.check("used", len(rig.tx.wait(4)), 4)
    target.check("errors", rig.tx.errors(), 0)


@case("An avail index that goes back is one that runs ahead too far.")
def avail_back(target: Target) -> None:
    rig = Rig(target, Setup(bases=(0, 10)))
    rig.tx.avail_idx = 9
    stuck(target, rig.tx)


@case("A receive ring whose avail index runs ahead too far sticks, and the frame waits.")
def rx_avail_jump(target: Target) -> None:
    rig = Rig(target)
    rig.wire.send(frame(1))
    target.settle()
    room = rig.room(200)
    rig.rx.publish(rig.rx.chain([room]))
    rig.rx.avail_idx = 65
    stuck(target, rig.rx)
    rig.rx.avail_idx = 1
    rig.rx.kick.signal()
    target.check("used after", rig.rx.wait(1), [(0, 72)])
    target.check("frame", name(rig.filled([room])[12:72]), "1x60")


@case("A buffer outside every region makes the transmit ring stick.")
def outside(target: Target) -> None:
    _stuck_tx(target, Rig(target), Part(_OUTSIDE, 72))


@case("A buffer at guest address 0 makes the ring stick where there is no memory.")
def at_zero(target: Target) -> None:
    _stuck_tx(target, Rig(target), Part(0, 72))


@case("A buffer just below a region makes the ring stick.")
def below(target: Target) -> None:
    _stuck_tx(target, Rig(target), Part(GPA - 1, 72))


@case("A buffer that begins inside the last region and ends behind it makes the ring stick.")
def straddling(target: Target) -> None:
    _stuck_tx(target, Rig(target), Part(_END - 71, 72))


@case("A buffer whose end overflows 64 bits makes the ring stick.")
def overflow(target: Target) -> None:
    _stuck_tx(target, Rig(target), Part(2**64 - 36, 72))


@case("A buffer of 2^32 - 1 bytes makes the ring stick where no region holds it.")
def huge(target: Target) -> None:
    _stuck_tx(target, Rig(target), Part(GPA, 2**32 - 1))


@case("One good descriptor before one outside every region does not help the chain.")
def second_outside(target: Target) -> None:
    rig = Rig(target)
    _stuck_tx(target, rig, *rig.outgoing(1), Part(_OUTSIDE, 1))


@case("A receive buffer outside every region makes the ring stick.")
def rx_outside(target: Target) -> None:
    _stuck_rx(target, Rig(target), Part(_OUTSIDE, 200, WRITE))


@case("A receive buffer that ends behind its region makes the ring stick.")
def rx_straddling(target: Target) -> None:
    _stuck_rx(target, Rig(target), Part(_END - 199, 200, WRITE))


@case("With MRG_RXBUF a bad buffer makes the ring stick with the good ones before it.")
def rx_bad_after_good(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG))
    rig.wire.send(frame(1, 300))
    target.settle()
    rooms = [rig.room(100), rig.room(100), rig.room(200)]
    heads = [rig.rx.chain([room]) for room in rooms]
    rig.rx.describe(heads[2], Part(_OUTSIDE, 200, WRITE))
    rig.rx.publish(*heads)
    stuck(target, rig.rx)
    rig.rx.describe(heads[2], rooms[2])
    rig.rx.kick.signal()
    target.check("used after", rig.rx.wait(3), [(0, 100), (1, 100), (2, 112)])
    target.check("frame", name(rig.filled(rooms)[12:312]), "1x300")


@case("A readable descriptor after a writable one makes a transmit ring stick.")
def out_after_in(target: Target) -> None:
    rig = Rig(target)
    _stuck_tx(target, rig, rig.room(100), *rig.outgoing(1))


@case("A readable descriptor after a writable one makes a receive ring stick.")
def rx_out_after_in(target: Target) -> None:
    rig = Rig(target)
    _stuck_rx(target, rig, rig.room(100), *rig.outgoing(1))


@case("An indirect table inside an indirect table makes the ring stick.")
def nested(target: Target) -> None:
    rig = Rig(target)
    inner = rig.indirect(rig.outgoing(1))
    _stuck_tx(target, rig, rig.indirect([inner]), errors=2)


@case("An indirect table whose length is not a multiple of 16 makes the ring stick.")
def odd_table(target: Target) -> None:
    rig = Rig(target)
    held = rig.indirect(rig.outgoing(1))
    _stuck_tx(target, rig, held._replace(len=17), errors=2)


@case("An empty indirect table makes the ring stick.")
def empty_table(target: Target) -> None:
    rig = Rig(target)
    held = rig.indirect(rig.outgoing(1))
    _stuck_tx(target, rig, held._replace(len=0), errors=2)


@case("An indirect table of more than 65536 descriptors makes the ring stick.")
def long_table(target: Target) -> None:
    rig = Rig(target)
    held = rig.indirect(rig.outgoing(1))
    _stuck_tx(target, rig, held._replace(len=16 * 65537), errors=2)


@case("An indirect table outside every region makes the ring stick.")
def table_outside(target: Target) -> None:
    _stuck_tx(target, Rig(target), Part(_OUTSIDE, 16, INDIRECT), errors=2)


@case("An indirect table whose last descriptor continues makes the ring stick.")
def unending_table(target: Target) -> None:
    rig = Rig(target)
    held = rig.indirect(rig.cut(rig.packet(1), 12, 20))
    _stuck_tx(target, rig, held._replace(len=32), errors=2)


@case("A descriptor of an indirect table that lies outside every region makes the ring stick.")
def outside_in_table(target: Target) -> None:
    rig = Rig(target)
    _stuck_tx(target, rig, rig.indirect([*rig.outgoing(1), Part(_OUTSIDE, 1)]), errors=2)


@case("A readable descriptor after a writable one inside a table makes the ring stick.")
def out_after_in_table(target: Target) -> None:
    rig = Rig(target)
    _stuck_tx(target, rig, rig.indirect([rig.room(10), *rig.outgoing(1)]), errors=2)


@case("More than 1024 segments make the ring stick.")
def too_many_segments(target: Target) -> None:
    rig = Rig(target)
    (data,) = rig.outgoing(1, 1100)
    parts = [Part(data.addr + at, 1) for at in range(1025)]
    _stuck_tx(target, rig, rig.indirect(parts), errors=2)


@case("A ring that sticks goes on once its chain is mended and it is kicked.")
def mended(target: Target) -> None:
    rig = Rig(target)
    _stuck_tx(target, rig, Part(_OUTSIDE, 72))
    rig.tx.describe(0, rig.outgoing(1)[0])
    rig.tx.kick.signal()
    target.check("used", rig.tx.wait(1), [(0, 0)])
    target.check("frames after", rig.sent(1), ["1x60"])


@case("Chains before a bad one are sent and given back.")
def good_ones_before(target: Target) -> None:
    rig = Rig(target)
    rig.tx.offer(rig.outgoing(1), rig.outgoing(2), [Part(_OUTSIDE, 72)], rig.outgoing(3))
    target.check("used", rig.tx.wait(2), [(0, 0), (1, 0)])
    target.check("frames", rig.sent(2), ["1x60", "2x60"])
    target.check("base", rig.tx.base(), 2)
    target.check("errors", rig.tx.errors(), 1)


@case("A transmit ring that sticks does not touch the receive ring, nor the other way round.")
def rings_are_apart(target: Target) -> None:
    rig = Rig(target)
    _stuck_tx(target, rig, Part(_OUTSIDE, 72))
    rig.rx.offer([rig.room(200)])
    rig.wire.send(frame(1))
    target.check("RX used", rig.rx.wait(1), [(0, 72)])


@case("A ring that sticks at 65535 is still at 65535.")
def stuck_at_wrap(target: Target) -> None:
    rig = Rig(target, Setup(bases=(0, 65535)))
    _stuck_tx(target, rig, Part(_OUTSIDE, 72))


@case("Without an ERR eventfd a bad chain makes the ring stick all the same.")
def no_err(target: Target) -> None:
    rig = Rig(target)
    rig.device.set_vring_err(1, None)
    rig.tx.offer([Part(_OUTSIDE, 72)])
    target.settle()
    target.check("base", rig.tx.base(), 0)
    target.check("used index", rig.tx.used_idx, 0)
    target.check("errors", rig.tx.errors(), 0)


@case("With EVENT_IDX a ring that sticks leaves avail_event alone.")
def stuck_event(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | EVENT_IDX))
    rig.tx.avail_event = 0x5A5A
    rig.tx.offer([Part(_OUTSIDE, 72)])
    rig.tx.wait_errors(1)
    target.check("avail_event", rig.tx.avail_event, 0x5A5A)
    target.check("flags", rig.tx.used_flags, 0)


@case("A used ring that cannot be written costs the buffer; the frame is sent.")
def used_not_writable(target: Target) -> None:
    rig = Rig(target)
    rig.protect(rig.gpa(rig.tx.used), PAGE, read=True, write=False)
    rig.tx.offer(rig.outgoing(1))
    target.check("frames", rig.sent(1), ["1x60"])
    rig.tx.wait_errors(1)
    target.check("used index", rig.tx.used_idx, 0)
    target.check("base", rig.tx.base(), 1)


@case("An avail ring that cannot be read makes the ring stick.")
def avail_not_readable(target: Target) -> None:
    rig = Rig(target)
    rig.tx.publish(rig.tx.chain(rig.outgoing(1)))
    rig.protect(rig.gpa(rig.tx.avail), PAGE, read=False, write=False)
    rig.tx.kick.signal()
    rig.tx.wait_errors(1)
    target.check("used index", rig.tx.used_idx, 0)
    target.check("base", rig.tx.base(), 0)
    rig.protect(rig.gpa(rig.tx.avail), PAGE, read=True, write=True)
    rig.tx.kick.signal()
    target.check("frames", rig.sent(1), ["1x60"])


@case("A descriptor table that cannot be read makes the ring stick.")
def table_not_readable(target: Target) -> None:
    rig = Rig(target)
    rig.tx.publish(rig.tx.chain(rig.outgoing(1)))
    rig.protect(rig.gpa(rig.tx.desc), PAGE, read=False, write=False)
    stuck(target, rig.tx)


@case("A receive buffer that cannot be written costs the frame; the buffer serves the next one.")
def buffer_not_writable(target: Target) -> None:
    rig = Rig(target)
    room = rig.room(200, PAGE)
    rig.protect(room.addr, PAGE, read=True, write=False)
    rig.rx.offer([room])
    rig.wire.send(frame(1))
    target.settle()
    target.check("used index", rig.rx.used_idx, 0)
    target.check("base", rig.rx.base(), 0)
    target.check("errors", rig.rx.errors(), 0)
    rig.protect(room.addr, PAGE, read=True, write=True)
    rig.wire.send(frame(2))
    target.check("used", rig.rx.wait(1), [(0, 72)])
    target.check("frame", name(rig.filled([room])[12:72]), "2x60")
