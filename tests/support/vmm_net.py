"""A virtio network device without a VM: our driver at its rings, commands by hand."""

from __future__ import annotations

import struct

from tests.support.wired import Wired
from vhostctl.abi import virtio
from vhostctl.control import access
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.features import mask
from vhostctl.control.rings import RingPlacement, place_rings
from vhostctl.control.wiring import DRIVER_BITS
from vhostctl.host.memory import MappedRegion
from vhostctl.host.vhost import VhostNet
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.netconfig import NetConfig
from vhostctl.vmm.virtio import Ring

MAC = "02:00:00:00:00:02"
SIZE = 64
MEMORY = 32 << 20
BITS = DRIVER_BITS & ~mask(virtio.VIRTIO_F_ACCESS_PLATFORM) | mask(
    virtio.VIRTIO_NET_F_MAC,
    virtio.VIRTIO_NET_F_STATUS,
    virtio.VIRTIO_NET_F_CTRL_VQ,
    virtio.VIRTIO_NET_F_CTRL_RX,
    virtio.VIRTIO_NET_F_CTRL_MAC_ADDR,
    virtio.VIRTIO_NET_F_GUEST_ANNOUNCE,
    virtio.VIRTIO_NET_F_MQ,
)


class Transport:
    """Counts what the device tells the driver."""

    def __init__(self) -> None:
        self.changes = 0
        self.broken = False
        self.later: list[int] = []

    def notify_later(self, queue: int) -> None:
        self.later.append(queue)

    def config_changed(self) -> None:
        self.changes += 1

    def needs_reset(self) -> None:
        self.broken = True


class Commands:
    """The driver's side of a control queue: one command at a time, its buffers at `buffers`."""

    def __init__(self, space: AddressSpace, ring: RingPlacement, buffers: int) -> None:
        self._space, self._ring, self._buffers = space, ring, buffers
        self._next = 0

    def add(self, command: bytes, *, flags: int = 0) -> None:
        """Make `command` available, and one byte for the answer."""
        answer = self._buffers + len(command)
        access.write(self._space, self._buffers, command + b"\xff")
        table = struct.pack("<QIHH", self._buffers, len(command), virtio.VRING_DESC_F_NEXT, 1)
        table += struct.pack("<QIHH", answer, 1, virtio.VRING_DESC_F_WRITE | flags, 0)
        access.write(self._space, self._ring.desc, table)
        entry = self._ring.avail + 4 + 2 * (self._next % self._ring.size)
        access.write(self._space, entry, bytes(2))
        self._next += 1
        access.write(self._space, self._ring.avail + 2, struct.pack("<H", self._next))

    def answer(self, command: bytes) -> int:
        """Return the byte that `command` was answered with."""
        return access.read(self._space, self._buffers + len(command), 1)[0]


class Rig(Wired):
    """A tap of `queues` queues in a namespace, a NetDevice on it, and what a driver does."""

    def __init__(self, device: str, queues: int = 1, features: int = BITS) -> None:
        super().__init__(queues)
        self.transport = Transport()
        self._wanted = features
        enter = self.stack.enter_context
        try:
            self.memory = enter(MappedRegion.anonymous(0, MEMORY, "memory"))
            self.space = AddressSpace([self.memory])
            self.vhost = [enter(VhostNet.at(device)) for _ in range(queues)]
            self.net = enter(NetDevice(self.space, self.tap, self.vhost, NetConfig(MAC)))
            self.net.attach(self.transport)
        except BaseException:
            self.close()
            raise

    def start(self, enable: int | None = None) -> None:
        """Do what a driver does up to DRIVER_OK, and post receive buffers.

        It enables the queues of the first `enable` pairs, or of all.
        """
        self.features = self.net.features & self._wanted
        assert self.net.accept(self.features)
        count = 2 * (len(self.vhost) if self.features >> virtio.VIRTIO_NET_F_MQ & 1 else 1)
        placed, end = place_rings(0, count + 1, SIZE)
        access.write(self.space, 0, bytes(end))
        used = count if enable is None else 2 * enable
        self.rings: list[Ring] = [
            ring if n < used or n == count else None for n, ring in enumerate(placed)
        ]
        rings, (control,) = placed[:used], placed[count:]
        self.commands = Commands(self.space, control, end)
        end += 4096
        self.net.start(self.features, self.rings)
        self.drive(self.space, self.net, rings, self.features, (end, MEMORY - end))

    def command(self, *words: int, data: bytes = b"") -> int:
        """Give a command; return what it was answered with."""
        command = bytes(words) + data
        self.commands.add(command)
        self.ring_control()
        return self.commands.answer(command)

    def ring_control(self) -> None:
        """Ring the control queue's doorbell, and see that all that waits is looked at."""
        self.net.notify(self.control)
        while self.transport.later:
            self.net.notify(self.transport.later.pop())

    @property
    def control(self) -> int:
        """The number of the control queue."""
        return len(self.rings) - 1
