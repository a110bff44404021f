"""Rings that stop, start and change hands while frames are on their way."""

from __future__ import annotations

import os
import threading
from functools import partial

from vhostctl.conformance.case import case
from vhostctl.conformance.rig import EVENT_IDX, MRG, V1, Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import Wire, frame, name, wire
from vhostctl.host.eventfd import EventFd

_ROUNDS = 40


def _numbers(*wires: Wire) -> list[int]:
    """Return the numbers of all frames that came out, over all wires, in order of their number."""
    return sorted(int(found.split("x")[0]) for one in wires for found in one.received())


def _transmit(rig: Rig, number: int, what: str = "used") -> None:
    rig.tx.offer(rig.outgoing(number))
    rig.tx.wait(1, what)


@case("GET_VRING_BASE after a stop is the avail index that was taken.")
def base_after_stop(target: Target) -> None:
    rig = Rig(target)
    rig.tx.offer(*[rig.outgoing(n) for n in range(5)])
    rig.tx.wait(5)
    target.check("TX base", rig.tx.stop(), 5)
    rig.rx.offer(*[[rig.room(100)] for _ in range(9)])
    for number in range(2):
        rig.wire.send(frame(number))
    rig.rx.wait(2, "RX")
    target.check("RX base", rig.rx.stop(), 2)


@case("A ring that is stopped does nothing, whatever is published and kicked.")
def stopped(target: Target) -> None:
    rig = Rig(target)
    rig.tx.stop()
    rig.rx.stop()
    rig.tx.offer(rig.outgoing(1))
    rig.rx.offer([rig.room(200)])
    rig.wire.send(frame(2))
    target.settle()
    target.check("used", [rig.tx.used_idx, rig.rx.used_idx], [0, 0])
    target.check("bases", [rig.tx.base(), rig.rx.base()], [0, 0])
    target.check("frames", rig.wire.received(), [])
    rig.start()
    target.check("TX used after", rig.tx.wait(1, "TX"), [(0, 0)])
    target.check("RX used after", rig.rx.wait(1, "RX"), [(0, 72)])


@case("When a ring has stopped, all that was taken is in the used ring and on the wire.")
def stop_flushes(target: Target) -> None:
    rig = Rig(target)
    agree = []
    for number in range(0, _ROUNDS * 8, 8):
        rig.tx.offer(*[rig.outgoing(number + n) for n in range(8)])
        base = rig.tx.stop()
        agree.append(base == rig.tx.used_idx == len(rig.wire.received()))
        rig.tx.start()
        rig.tx.reach(number + 8)
    target.check("base is used index is frames", agree, [True] * _ROUNDS)
    target.check("frames", _numbers(rig.wire), list(range(_ROUNDS * 8)))


@case("A ring that is set up anew with its old base goes on where it was.")
def resumes(target: Target) -> None:
    rig = Rig(target)
    rig.tx.offer(*[rig.outgoing(n) for n in range(3)])
    rig.tx.wait(3)
    base = rig.tx.stop()
    rig.tx.configure()
    target.check("base", [base, rig.tx.base()], [3, 3])
    rig.tx.start()
    _transmit(rig, 3)
    target.check("frames", rig.sent(4), [f"{n}x60" for n in range(4)])


@case("A stopped ring may get another size and another place.")
def moves(target: Target) -> None:
    rig = Rig(target)
    _transmit(rig, 1)
    rig.tx.stop()
    moved = rig.memory.hva(rig.alloc(1 << 16, 4096), 1 << 16)
    rig.tx.lay_out(moved, 256, base=0)
    rig.tx.configure()
    rig.tx.start()
    heads = rig.tx.offer(*[rig.outgoing(n) for n in range(2, 130)])
    target.check("used", rig.tx.wait(128), [(head, 0) for head in heads])
    target.check("frames", _numbers(rig.wire), list(range(1, 130)))


@case("The backend swapped over and over under load: no frame is lost, none sent twice.")
def swap_tx(target: Target) -> None:
    rig = Rig(target)
    other = wire(target)
    fds = [rig.wire.queues[0].fileno(), other.queues[0].fileno()]
    for number in range(_ROUNDS):
        rig.tx.offer(rig.outgoing(number))
        rig.device.set_backend(1, fds[(number + 1) % 2])
        rig.wire.received()
        other.received()
        if number % 16 == 15:
            rig.tx.reach(number + 1)
    rig.tx.wait(_ROUNDS)
    target.check("frames", _numbers(rig.wire, other), list(range(_ROUNDS)))
    target.check("errors", rig.tx.errors(), 0)


@case("The receive backend taken and given over and over: every frame is received, in order.")
def swap_rx(target: Target) -> None:
    rig = Rig(target)
    rooms = [rig.room(100) for _ in range(_ROUNDS)]
    for number, room in enumerate(rooms):
        rig.rx.offer([room])
        rig.wire.send(frame(number))
        rig.device.set_backend(0, None)
        rig.device.set_backend(0, rig.wire.queues[0].fileno())
    rig.rx.wait(_ROUNDS)
    found = [name(rig.filled([room])[12:72]) for room in rooms]
    target.check("frames", found, [f"{n}x60" for n in range(_ROUNDS)])


@case("Frames that wait in a tap are its own: another backend does not get them.")
def swap_rx_other(target: Target) -> None:
    rig = Rig(target)
    other = wire(target)
    rig.wire.send(frame(1))
    target.settle()
    rig.device.set_backend(0, other.queues[0].fileno())
    rooms = [rig.room(100), rig.room(100)]
    rig.rx.offer(rooms[:1])
    other.send(frame(2))
    rig.rx.wait(1, "other")
    rig.device.set_backend(0, rig.wire.queues[0].fileno())
    rig.rx.offer(rooms[1:])
    rig.rx.wait(1, "first")
    found = [name(rig.filled([room])[12:72]) for room in rooms]
    target.check("frames", found, ["2x60", "1x60"])


@case("SET_BACKEND with the socket that is there already changes nothing.")
def same_backend(target: Target) -> None:
    rig = Rig(target)
    _transmit(rig, 1)
    rig.write(rig.gpa(rig.tx.used), b"\x01\0\x07\0")
    rig.tx.start()
    target.check("flags and used index in memory", [rig.tx.used_flags, rig.tx.used_idx], [1, 7])
    rig.tx.offer(rig.outgoing(2))
    target.check("frames", rig.sent(2), ["1x60", "2x60"])
    rig.tx.reach(2)
    target.check("element", rig.tx.element(1), (1, 0))


@case("A kick eventfd that is replaced no longer kicks; the new one does.")
def replace_kick(target: Target) -> None:
    rig = Rig(target)
    with EventFd.create() as new:
        rig.device.set_vring_kick(1, new.fileno())
        rig.tx.offer(rig.outgoing(1))
        target.settle()
        target.check("used index after the old one", rig.tx.used_idx, 0)
        new.signal()
        target.check("used after the new one", rig.tx.wait(1), [(0, 0)])


@case("The kick eventfd replaced over and over under load: no frame is lost.")
def replace_kick_under_load(target: Target) -> None:
    rig = Rig(target)
    fds = [target.keep(EventFd.create()) for _ in range(2)]
    for number in range(_ROUNDS):
        event = fds[number % 2]
        rig.device.set_vring_kick(1, event.fileno())
        rig.tx.publish(rig.tx.chain(rig.outgoing(number)))
        event.signal()
    rig.tx.wait(_ROUNDS)
    target.check("frames", rig.sent(_ROUNDS), [f"{n}x60" for n in range(_ROUNDS)])


@case("A closed kick eventfd still belongs to the ring: the device holds it.")
def closed_kick(target: Target) -> None:
    rig = Rig(target)
    with EventFd.create() as event:
        rig.device.set_vring_kick(1, event.fileno())
        copy = os.dup(event.fileno())
    try:
        rig.tx.publish(rig.tx.chain(rig.outgoing(1)))
        os.eventfd_write(copy, 1)
        target.check("used", rig.tx.wait(1), [(0, 0)])
    finally:
        os.close(copy)


@case("A closed tap descriptor still is the backend: the device holds it.")
def closed_tap(target: Target) -> None:
    rig = Rig(target)
    rig.wire.queues[0].close()
    _transmit(rig, 1)
    target.check("frames", rig.sent(1), ["1x60"])


@case("Two devices on the queues of one tap each have their own frames.")
def two_devices(target: Target) -> None:
    shared = wire(target, queues=2)
    first = Rig(target, onto=shared)
    second = Rig(target, onto=shared, tap_queue=1)
    for number in range(0, 20, 2):
        first.tx.offer(first.outgoing(number))
        second.tx.offer(second.outgoing(number + 1))
    first.tx.wait(10, "first")
    second.tx.wait(10, "second")
    target.check("frames", _numbers(shared), list(range(20)))
    for rig in (first, second):
        rig.rx.offer(*[[rig.room(100)] for _ in range(20)])
    for number in range(20):
        shared.send(frame(number))
    target.wait(lambda: first.rx.used_idx + second.rx.used_idx == 20, "20 frames are received")


@case("A device closed with its rings running leaves the tap to the next one.")
def close_running(target: Target) -> None:
    rig = Rig(target)
    rig.rx.offer(*[[rig.room(100)] for _ in range(8)])
    rig.tx.offer(*[rig.outgoing(n) for n in range(8)])
    rig.wire.send(frame(1))
    rig.device.close()
    taken = rig.tx.used_idx
    target.check("frames are used elements", len(rig.wire.received()) == taken, True)
    after = Rig(target, onto=rig.wire)
    _transmit(after, 99)
    target.check("last frame", after.wire.received()[-1], "99x60")
    target.check("the closed device is quiet", rig.tx.used_idx == taken, True)


@case("Closing a device with frames on their way, over and over.", seconds=120)
def close_over_and_over(target: Target) -> None:
    shared = wire(target)
    agree = []
    for _ in range(20):
        rig = Rig(target, onto=shared)
        before = len(shared.received())
        rig.rx.offer(*[[rig.room(100)] for _ in range(4)])
        shared.send(frame(1))
        rig.tx.offer(*[rig.outgoing(n) for n in range(16)])
        rig.device.close()
        agree.append(len(shared.received()) - before == rig.tx.used_idx)
    target.check("frames are used elements", agree, [True] * 20)


@case("RESET_OWNER stops running rings; after a new bring-up they run again.")
def reset_running(target: Target) -> None:
    rig = Rig(target)
    _transmit(rig, 1)
    rig.device.reset_owner()
    rig.tx.offer(rig.outgoing(2))
    rig.device.set_owner()
    target.settle()
    target.check("used index after the reset", rig.tx.used_idx, 1)
    rig.device.reset_owner()
    rig.prepare()
    rig.start()
    target.check("frames", rig.sent(2), ["1x60", "2x60"])
    target.check("base", rig.tx.base(), 2)


@case("RESET_OWNER forgets the eventfds: a kick on the old one does nothing.")
def reset_forgets_kick(target: Target) -> None:
    rig = Rig(target)
    rig.device.reset_owner()
    rig.device.set_owner()
    rig.device.set_features(V1)
    rig.device.set_mem_table(rig.memory.regions)
    rig.device.set_vring_num(1, rig.tx.num)
    rig.tx.place()
    rig.tx.start()
    rig.tx.offer(rig.outgoing(1))
    target.settle()
    target.check("used index", rig.tx.used_idx, 0)


@case("Stopped by -1 twice, a ring is still stopped, and starts.")
def stop_twice(target: Target) -> None:
    rig = Rig(target)
    rig.tx.stop()
    target.check("again", target.refused(rig.tx.stop), "")
    rig.tx.start()
    _transmit(rig, 1)
    target.check("frames", rig.sent(1), ["1x60"])


@case("A backend that is refused leaves the old one at work.")
def refused_backend(target: Target) -> None:
    rig = Rig(target)
    for what, fd in (("a kick", rig.tx.kick.fileno()), ("no descriptor", 1 << 20)):
        target.check(what, target.refused(partial(rig.device.set_backend, 1, fd)), "ENOTSOCK")
    _transmit(rig, 1)
    target.check("frames", rig.sent(1), ["1x60"])


@case("A descriptor that changes its file while it is made the backend is one or the other.")
def changing_descriptor(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    tap = rig.wire.queues[0].fileno()
    slot = os.dup(tap)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.dup2(rig.tx.err.fileno(), slot)
            os.dup2(tap, slot)

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = set()
    for _ in range(300):
        outcomes.add(target.refused(lambda: rig.device.set_backend(1, slot)))
        rig.device.set_backend(1, None)
    stop.set()
    thread.join()
    os.close(slot)
    target.check("other outcomes", sorted(outcomes - {"", "ENOTSOCK"}), [])
    rig.start()
    _transmit(rig, 1)
    target.check("frames", rig.sent(1), ["1x60"])


@case("With a busy-poll timeout frames pass both ways.")
def busy_poll(target: Target) -> None:
    rig = Rig(target, Setup(features=V1 | MRG | EVENT_IDX))
    for queue in (0, 1):
        rig.device.set_vring_busyloop_timeout(queue, 50)
    rooms = [rig.room(100) for _ in range(20)]
    rig.rx.offer(*[[room] for room in rooms])
    for number in range(20):
        rig.wire.send(frame(number))
        rig.tx.offer(rig.outgoing(number))
    rig.rx.wait(20, "RX")
    rig.tx.wait(20, "TX")
    wanted = [f"{n}x60" for n in range(20)]
    target.check("received", [name(rig.filled([room])[12:72]) for room in rooms], wanted)
    target.check("sent", rig.sent(20), wanted)


@case("Features that change the header count from the next packet on.")
def header_changes(target: Target) -> None:
    rig = Rig(target, Setup(features=0, header=10))
    rig.tx.offer([rig.put(bytes(10) + frame(1))])
    rig.tx.wait(1, "legacy")
    rig.device.set_features(MRG)
    rig.wire.queues[0].set_vnet_hdr_size(12)
    room = rig.room(100)
    rig.rx.offer([room])
    rig.wire.send(frame(2))
    target.check("used", rig.rx.wait(1, "merged"), [(0, 72)])
    target.check("num_buffers", rig.filled([room])[10:12].hex(), "0100")


@case("SET_VRING_ADDR under a running ring moves it.")
def addr_live(target: Target) -> None:
    rig = Rig(target)
    _transmit(rig, 1)
    moved = rig.memory.hva(rig.alloc(1 << 16, 4096), 1 << 16)
    old = rig.tx.used_idx
    rig.tx.lay_out(moved, 64, base=1)
    rig.tx.place()
    _transmit(rig, 2)
    target.check("frames", rig.sent(2), ["1x60", "2x60"])
    target.check("used index in the old and the new ring", [old, rig.tx.used_idx], [1, 2])
