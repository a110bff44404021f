"""The dirty log: a bit for each 4096 bytes of guest memory that the device wrote."""

from __future__ import annotations

from vhostctl.conformance.case import case
from vhostctl.conformance.rig import (
    EVENT_IDX,
    LOG_ALL,
    MRG,
    PAGE,
    V1,
    Queue,
    Region,
    Rig,
    Setup,
    protect,
)
from vhostctl.conformance.ring import Part, load, store
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import frame, name
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory

_LOGGED = Setup(features=V1 | LOG_ALL, start=False)
_RING_ONLY = Setup(start=False)
_USED_AT = 0x20_0000
"""Where the log has the used ring; it need not be where the ring is."""


class _Log:
    """A bitmap of `pages` pages of log, which is told to the device of `rig`."""

    def __init__(self, target: Target, rig: Rig, pages: int = 1) -> None:
        self.memory = target.keep(GuestMemory.anonymous(pages * PAGE))
        self.hva = self.memory.regions[0].hva
        self.event = target.keep(EventFd.create("log"))
        rig.device.set_log_base(self.hva)
        rig.device.set_log_fd(self.event.fileno())

    def pages(self) -> list[int]:
        """Return the numbers of the pages that are marked, and clear them."""
        bits = int.from_bytes(load(self.hva, PAGE), "little")
        store(self.hva, bytes(PAGE))
        return [number for number in range(bits.bit_length()) if bits >> number & 1]


def _logged(target: Target, setup: Setup = _LOGGED) -> tuple[Rig, _Log]:
    rig = Rig(target, setup)
    log = _Log(target, rig)
    rig.start()
    return rig, log


def _page(part: Part, at: int = 0) -> int:
    return (part.addr + at) // PAGE


def _receive(rig: Rig, *parts: Part, size: int = 60) -> None:
    rig.rx.offer(parts)
    rig.wire.send(frame(1, size))
    rig.rx.wait(1)


def _transmit(rig: Rig, count: int, what: str = "used") -> None:
    rig.tx.offer(*[rig.outgoing(number) for number in range(count)])
    rig.tx.wait(count, what)


@case("A frame that is received marks the page of its buffer, and no other one.")
def one_page(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(PAGE, PAGE)
    _receive(rig, room)
    target.check("pages", log.pages(), [_page(room)])


@case("Of a large buffer only the pages that were written are marked.")
def used_part(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(4 * PAGE, PAGE)
    _receive(rig, room, size=PAGE - 12)
    target.check("pages of a frame that fills the first", log.pages(), [_page(room)])
    _receive(rig, room, size=PAGE - 11)
    target.check("pages with one byte more", log.pages(), [_page(room), _page(room) + 1])


@case("A frame over a page boundary marks both pages.")
def boundary(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(2 * PAGE, PAGE)
    _receive(rig, Part(room.addr + PAGE - 71, 200, room.flags))
    target.check("pages", log.pages(), [_page(room), _page(room) + 1])


@case("A frame of many pages marks each of them.")
def many_pages(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(4 * PAGE, PAGE)
    _receive(rig, room, size=9000)
    target.check("pages", log.pages(), [_page(room) + n for n in range(3)])


@case("The page of a header in a buffer of its own is marked.")
def header_page(target: Target) -> None:
    rig, log = _logged(target)
    header, data = rig.room(12, PAGE), rig.room(200, PAGE)
    _receive(rig, header, data)
    target.check("pages", log.pages(), sorted([_page(header), _page(data)]))


@case("Of the descriptors of a chain only those that were written to are marked.")
def written_descriptors(target: Target) -> None:
    rig, log = _logged(target)
    rooms = [rig.room(50, PAGE) for _ in range(4)]
    _receive(rig, *rooms)
    target.check("pages", log.pages(), [_page(room) for room in rooms[:2]])


@case("A merged frame marks the page of each of its buffers.")
def merged(target: Target) -> None:
    rig, log = _logged(target, Setup(features=V1 | MRG | LOG_ALL, start=False))
    rooms = [rig.room(100, PAGE) for _ in range(4)]
    rig.rx.offer(*[[room] for room in rooms])
    rig.wire.send(frame(1, 250))
    rig.rx.wait(3)
    target.check("pages", log.pages(), [_page(room) for room in rooms[:3]])


@case("A buffer in an indirect table is marked by its guest address; the table is not.")
def in_table(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(200, PAGE)
    held = rig.indirect([room])
    _receive(rig, held)
    target.check("pages", log.pages(), [_page(room)])


@case("The bit of a page is the one of its guest address in the bitmap.")
def bit_position(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(200, PAGE)
    _receive(rig, room)
    number = room.addr // PAGE
    target.check("byte", load(log.hva + number // 8, 1)[0], 1 << number % 8)


@case("Bits that are set already stay.")
def bits_stay(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(200, PAGE)
    byte, bit = log.hva + _page(room) // 8, 1 << _page(room) % 8
    store(byte, bytes([0xFF & ~bit]))
    _receive(rig, room)
    target.check("byte", load(byte, 1)[0], 0xFF)


@case("LOG_ALL alone marks nothing of the rings.")
def rings_not_marked(target: Target) -> None:
    rig, log = _logged(target)
    _transmit(rig, 3)
    target.check("pages", log.pages(), [])


@case("Without LOG_ALL what is received marks nothing.")
def not_without(target: Target) -> None:
    rig, log = _logged(target, _RING_ONLY)
    _receive(rig, rig.room(200))
    target.check("pages", log.pages(), [])
    target.check("log eventfd", log.event.drain(), 0)


def _marked_ring(target: Target, queue_of: str, log_gpa: int, features: int = V1) -> Queue:
    rig = Rig(target, Setup(features=features, start=False))
    queue: Queue = getattr(rig, queue_of)
    queue.place(log_gpa=log_gpa)
    return queue


@case("With VHOST_VRING_F_LOG the used ring is marked, LOG_ALL or not.")
def used_ring(target: Target) -> None:
    queue = _marked_ring(target, "tx", _USED_AT)
    log = _Log(target, queue.rig)
    queue.rig.start()
    log.pages()
    _transmit(queue.rig, 1)
    target.check("pages", log.pages(), [_USED_AT // PAGE])


@case("With VHOST_VRING_F_LOG the receive ring is marked, its buffers not.")
def rx_used_ring(target: Target) -> None:
    queue = _marked_ring(target, "rx", _USED_AT)
    log = _Log(target, queue.rig)
    queue.rig.start()
    _receive(queue.rig, queue.rig.room(200, PAGE))
    target.check("pages", log.pages(), [_USED_AT // PAGE])


@case("An element of the used ring marks its own page, flags and index theirs.")
def element_page(target: Target) -> None:
    # flags, index and elements 0 to 2 on one page, the rest on the next one
    queue = _marked_ring(target, "tx", _USED_AT - 28)
    log = _Log(target, queue.rig)
    queue.rig.start()
    log.pages()
    _transmit(queue.rig, 3, "first")
    target.check("pages of elements 0 to 2", log.pages(), [_USED_AT // PAGE - 1])
    _transmit(queue.rig, 1, "second")
    target.check("pages of element 3", log.pages(), [_USED_AT // PAGE - 1, _USED_AT // PAGE])


@case("Elements that go round the end of the used ring mark both of its ends.")
def elements_wrap(target: Target) -> None:
    rig = Rig(target, Setup(nums=(64, 1024), bases=(0, 1023), start=False))
    # flags and index, elements 0 to 511, and elements 512 to 1023, each on a page of their own
    rig.tx.place(log_gpa=_USED_AT - 4)
    log = _Log(target, rig)
    rig.start()
    log.pages()
    _transmit(rig, 2)
    first = _USED_AT // PAGE
    target.check("pages", log.pages(), [first - 1, first, first + 1])


@case("With EVENT_IDX the page of avail_event is marked when the ring goes idle.")
def avail_event(target: Target) -> None:
    # avail_event of 64 elements is at byte 516
    queue = _marked_ring(target, "tx", _USED_AT - 516, features=V1 | EVENT_IDX)
    log = _Log(target, queue.rig)
    queue.rig.start()
    log.pages()
    _transmit(queue.rig, 1)
    target.check("pages", log.pages(), [_USED_AT // PAGE - 1, _USED_AT // PAGE])


@case("The flags that are written when a ring starts are marked.")
def flags_marked(target: Target) -> None:
    queue = _marked_ring(target, "rx", _USED_AT)
    log = _Log(target, queue.rig)
    queue.start()
    target.check("pages", log.pages(), [_USED_AT // PAGE])


@case("The log's eventfd is signalled when something was marked.")
def event(target: Target) -> None:
    rig, log = _logged(target)
    target.check("before", log.event.drain(), 0)
    _receive(rig, rig.room(200))
    target.check("signalled", log.event.drain() > 0, True)


@case("The log's eventfd is signalled for the used ring too.")
def event_of_ring(target: Target) -> None:
    queue = _marked_ring(target, "tx", _USED_AT)
    log = _Log(target, queue.rig)
    queue.rig.start()
    log.event.drain()
    _transmit(queue.rig, 1)
    target.check("signalled", log.event.drain() > 0, True)


@case("Logging can be switched on and off under running rings.")
def live(target: Target) -> None:
    rig = Rig(target)
    log = _Log(target, rig)
    rooms = [rig.room(200, PAGE) for _ in range(3)]
    _receive(rig, rooms[0])
    target.check("pages before", log.pages(), [])
    rig.rx.place(log_gpa=_USED_AT)
    rig.device.set_features(V1 | LOG_ALL)
    _receive(rig, rooms[1])
    target.check("pages with", log.pages(), sorted([_page(rooms[1]), _USED_AT // PAGE]))
    rig.device.set_features(V1)
    rig.rx.place()
    _receive(rig, rooms[2])
    target.check("pages after", log.pages(), [])


@case("The log may be moved under running rings.")
def moved(target: Target) -> None:
    rig, first = _logged(target)
    second = _Log(target, rig)
    room = rig.room(200, PAGE)
    _receive(rig, room)
    target.check("pages in the old log", first.pages(), [])
    target.check("pages in the new log", second.pages(), [_page(room)])


@case("A log that cannot be written is no error: the frame is received.")
def log_not_writable(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(200)
    protect(log.hva, PAGE, read=True, write=False)
    rig.rx.offer([room])
    rig.wire.send(frame(1))
    target.check("used", rig.rx.wait(1), [(0, 72)])
    target.check("frame", name(rig.filled([room])[12:72]), "1x60")
    target.check("errors", rig.rx.errors(), 0)


@case("A ring does not start with LOG_ALL and a log beyond what a process can map.")
def log_out_of_range(target: Target) -> None:
    rig = Rig(target, _LOGGED)
    rig.device.set_log_base(1 << 57)
    target.check("RX", target.refused(rig.rx.start), "EFAULT")
    log = _Log(target, rig)
    target.check("RX with a log", target.refused(rig.rx.start), "")
    target.check(
        "moving the log", target.refused(lambda: rig.device.set_log_base(1 << 57)), "EFAULT"
    )
    room = rig.room(200, PAGE)
    _receive(rig, room)
    target.check("pages", log.pages(), [_page(room)])


@case("A log that ends too early for the highest region is refused.")
def log_too_short(target: Target) -> None:
    rig = Rig(target, _LOGGED)
    # The last MiB of user addresses, with five levels of page tables or four: nothing needs
    # to be mapped there for the device to take it as a log of less.
    for top in (1 << 56, 1 << 47):
        rig.device.set_log_base(top - (1 << 20))
        if not target.refused(rig.rx.start):
            break
    rig.rx.stop()
    far = Region(1 << 40, PAGE, rig.memory.regions[0].hva)  # needs 32 MiB of log
    rig.device.set_mem_table([*rig.memory.regions, far])
    target.check("with a far region", target.refused(rig.rx.start), "EFAULT")
    rig.device.set_mem_table(rig.memory.regions)
    target.check("without", target.refused(rig.rx.start), "")


@case("LOG_ALL with more than 1024 descriptors of length 0 in a chain is harmless.")
def many_empty(target: Target) -> None:
    rig, log = _logged(target)
    empty, room = rig.room(0), rig.room(200, PAGE)
    _receive(rig, rig.indirect([*[empty] * 2000, room, *[empty] * 2000]))
    target.check("pages", log.pages(), [_page(room)])
    target.check("frame", name(rig.filled([room])[12:72]), "1x60")
    target.check("errors", rig.rx.errors(), 0)


@case("LOG_ALL with a chain of 1024 segments marks what was written.")
def many_segments(target: Target) -> None:
    rig, log = _logged(target)
    room = rig.room(2 * PAGE, PAGE)
    parts = [Part(room.addr + 8 * n, 8, room.flags) for n in range(1024)]
    _receive(rig, rig.indirect(parts), size=5000)
    target.check("pages", log.pages(), [_page(room), _page(room) + 1])
    target.check("frame", name(rig.filled([room])[12:5012]), "1x5000")
