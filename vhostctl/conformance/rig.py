"""A device that runs: memory, both rings with their eventfds, and a tap behind them."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable, Sequence

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.ring import INDIRECT, WRITE, Part, RawRing, Used, load, store, table
from vhostctl.conformance.target import Target
from vhostctl.conformance.wire import MIN_FRAME, Wire, frame, wire
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory
from vhostctl.host.vhost import RX, TX

GPA = 0x10_0000
PAGE = 4096

V1 = 1 << virtio.VIRTIO_F_VERSION_1
MRG = 1 << virtio.VIRTIO_NET_F_MRG_RXBUF
EVENT_IDX = 1 << virtio.VIRTIO_RING_F_EVENT_IDX
INDIRECT_DESC = 1 << virtio.VIRTIO_RING_F_INDIRECT_DESC
NOTIFY_ON_EMPTY = 1 << virtio.VIRTIO_F_NOTIFY_ON_EMPTY
LOG_ALL = 1 << vhost.VHOST_F_LOG_ALL
VHOST_HDR = 1 << vhost.VHOST_NET_F_VIRTIO_NET_HDR
PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM
TUNNEL_GSO = (
    1 << virtio.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO | 1 << virtio.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO
)
IN_ORDER = 1 << virtio.VIRTIO_F_IN_ORDER

HEADER = bytes(12)
"""A virtio_net header of VERSION_1 or MRG_RXBUF that asks for nothing."""

UNTOUCHED = 0xAA
"""What receive buffers are filled with before the device writes to them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """An entry of the memory table that a case makes up; bytes, in no way checked."""

    gpa: int
    size: int
    hva: int


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """How a rig is brought up; `bases` and the ring sizes `nums` are of RX and TX.

    `regions` are (gpa, size). `header` is the tap's, None for a tap without one, and
    `sndbuf` its send buffer, None for unlimited. Without `call` no CALL eventfd is bound.
    """

    features: int = V1
    nums: tuple[int, int] = (64, 64)
    bases: tuple[int, int] = (0, 0)
    regions: Sequence[tuple[int, int]] = ((GPA, 8 << 20),)
    header: int | None = 12
    sndbuf: int | None = None
    call: bool = True
    start: bool = True

    @property
    def header_size(self) -> int:
        """Bytes of virtio_net header in the guest's buffers (virtio 1.2, section 5.1.6)."""
        if self.features & TUNNEL_GSO:
            return 24
        return 12 if self.features & (V1 | MRG) else 10


class Queue(RawRing):
    """One ring of a device, with its eventfds; `wait` and `take` give its used elements."""

    def __init__(self, rig: Rig, index: int, hva: int) -> None:
        super().__init__(hva, rig.setup.nums[index], rig.setup.bases[index])
        self.rig = rig
        self.index = index
        self.kick = rig.target.keep(EventFd.create("kick"))
        self.call = rig.target.keep(EventFd.create("call"))
        self.err = rig.target.keep(EventFd.create("err"))
        self._errors = 0
        self._calls = 0

    def place(self, *, log_gpa: int | None = None) -> None:
        """VHOST_SET_VRING_ADDR: host virtual addresses, or I/O virtual ones in IOTLB mode."""
        shift = self.rig.shift
        self.rig.device.set_vring_addr(
            self.index,
            desc=self.desc + shift,
            avail=self.avail + shift,
            used=self.used + shift,
            log_gpa=log_gpa,
        )

    def configure(self) -> None:
        """Tell the device size, base, addresses and eventfds of the ring."""
        device = self.rig.device
        device.set_vring_num(self.index, self.num)
        device.set_vring_base(self.index, self.taken)
        self.place()
        device.set_vring_kick(self.index, self.kick.fileno())
        if self.rig.setup.call:
            device.set_vring_call(self.index, self.call.fileno())
        device.set_vring_err(self.index, self.err.fileno())

    def start(self) -> None:
        """Attach the tap, and let the device look once at what is there."""
        self.rig.device.set_backend(self.index, self.rig.tap.fileno())
        self.rig.target.settle()

    def stop(self) -> int:
        """Detach the tap; return the base that the device stopped at."""
        self.rig.device.set_backend(self.index, None)
        return self.base()

    def base(self) -> int:
        """VHOST_GET_VRING_BASE."""
        return self.rig.device.get_vring_base(self.index)

    def offer(self, *chains: Iterable[Part]) -> list[int]:
        """Publish `chains` at once and kick; return their heads."""
        heads = [self.chain(parts) for parts in chains]
        self.publish(*heads)
        self.kick.signal()
        return heads

    def wait(self, count: int, what: str = "used") -> list[Used]:
        """Wait for `count` more used elements; return those that came, and any beyond."""
        self.rig.target.wait(
            lambda: (self.used_idx - self.taken) & 0xFFFF >= count, f"{what}: elements came"
        )
        self.rig.target.settle()
        return self.take()

    def reach(self, index: int) -> None:
        """Wait until the used index is `index`."""
        self.rig.target.wait(lambda: self.used_idx == index, f"the used index is {index}")
        self.rig.target.settle()

    def wait_errors(self, count: int, what: str = "errors") -> None:
        """Wait until ERR was signalled `count` times since the beginning."""
        self.rig.target.wait(lambda: self.errors() >= count, f"{what}: ERR was signalled")
        self.rig.target.settle()

    def errors(self) -> int:
        """Return how often ERR was signalled so far."""
        self._errors += self.err.drain()
        return self._errors

    def calls(self) -> int:
        """Return how often CALL was signalled so far."""
        self._calls += self.call.drain()
        return self._calls


class Rig:
    """A device under test between rings that the case writes and a tap that it looks into.

    `shift` is what the device is told of an address in the region of the rings, less its
    host virtual address: 0, or the way to the guest physical one in IOTLB mode.
    """

    def __init__(
        self,
        target: Target,
        setup: Setup | None = None,
        *,
        onto: Wire | None = None,
        tap_queue: int = 0,
    ) -> None:
        """Bring a fresh device up on a tap of its own, or on queue `tap_queue` of `onto`."""
        self.target = target
        self.setup = setup or Setup()
        self.memory = target.keep(GuestMemory(self.setup.regions))
        self.wire = onto or wire(target, header=self.setup.header, sndbuf=self.setup.sndbuf)
        self.tap = self.wire.queues[tap_queue]
        first = min(self.memory.regions, key=lambda region: region.gpa)
        self._free = first.gpa + sum(RawRing.span(num) for num in self.setup.nums)
        self.device = target.open()
        self.shift = first.gpa - first.hva if self.setup.features & PLATFORM else 0
        self.rx = Queue(self, RX, first.hva)
        self.tx = Queue(self, TX, first.hva + RawRing.span(self.setup.nums[RX]))
        self.prepare()
        if self.setup.start:
            self.start()

    def prepare(self) -> None:
        """Do what a VMM does with a device that has no owner, up to the backends."""
        self.device.set_owner()
        if self.setup.features >> 64:
            self.device.request(
                vhost.VHOST_SET_FEATURES_ARRAY, vhost.vhost_features_table(self.setup.features)
            )
        else:
            self.device.set_features(self.setup.features)
        self.device.set_mem_table(self.memory.regions)
        for queue in (self.rx, self.tx):
            queue.configure()

    def start(self) -> None:
        """Attach the tap to both rings."""
        self.rx.start()
        self.tx.start()

    def alloc(self, size: int, align: int = 64) -> int:
        """Return the guest physical address of `size` bytes that nobody else uses."""
        found = -(-self._free // align) * align
        self._free = found + size
        return found

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory."""
        store(self.memory.hva(gpa, len(data)), data)

    def read(self, gpa: int, size: int) -> bytes:
        """Read guest memory."""
        return load(self.memory.hva(gpa, size), size)

    def put(self, data: bytes) -> Part:
        """Return a buffer that holds `data`, for the device to read."""
        gpa = self.alloc(len(data))
        self.write(gpa, data)
        return Part(gpa, len(data))

    def cut(self, data: bytes, *sizes: int) -> list[Part]:
        """Return buffers of `sizes` bytes that hold `data`, and one for the rest if any."""
        parts = []
        for size in sizes:
            parts.append(self.put(data[:size]))
            data = data[size:]
        return [*parts, self.put(data)] if data else parts

    def packet(self, number: int, size: int = MIN_FRAME) -> bytes:
        """Return the frame `number` behind an empty header, as a driver transmits it."""
        return bytes(self.setup.header_size) + frame(number, size)

    def outgoing(self, number: int, size: int = MIN_FRAME) -> list[Part]:
        """Return a chain of one buffer that holds `packet(number, size)`."""
        return [self.put(self.packet(number, size))]

    def room(self, size: int, align: int = 64) -> Part:
        """Return a buffer of `size` bytes for the device to write, filled with UNTOUCHED."""
        gpa = self.alloc(size, align)
        self.write(gpa, bytes([UNTOUCHED]) * size)
        return Part(gpa, size, WRITE)

    def indirect(self, parts: Iterable[Part]) -> Part:
        """Return the descriptor of an indirect table that holds `parts`."""
        held = self.put(table(parts))
        return held._replace(flags=INDIRECT)

    def filled(self, parts: Iterable[Part]) -> bytes:
        """Return what stands in the buffers `parts`, one after the other."""
        return b"".join(self.read(part.addr, part.len) for part in parts)

    def sent(self, count: int, what: str = "sent") -> list[str]:
        """Wait for `count` frames from the device; return the names of all that came."""
        self.target.wait(lambda: len(self.wire.received()) >= count, f"{what}: frames came")
        self.target.settle()
        return self.wire.received()

    def protect(self, gpa: int, size: int, *, read: bool, write: bool) -> None:
        """mprotect(2) the pages of guest memory: reads or writes by the device then fault."""
        protect(self.memory.hva(gpa, size), size, read=read, write=write)

    def gpa(self, hva: int) -> int:
        """Return the guest physical address of `hva` in the region of the rings."""
        first = min(self.memory.regions, key=lambda region: region.gpa)
        return hva - first.hva + first.gpa


def protect(hva: int, size: int, *, read: bool, write: bool) -> None:
    """mprotect(2) the pages from `hva` on. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(hva), ctypes.c_size_t(size), read | write << 1):
        raise OSError(ctypes.get_errno(), "mprotect")
