"""What a guest may do to its virtual machine, at random: noise, and drivers gone mad."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.support.vmm_hostile import CONFIG, ISR, NOTIFY, RAM, Driver
from vhostctl.abi import pci, virtio
from vhostctl.abi import virtio_pci as abi
from vhostctl.abi.virtio_pci import virtio_pci_common_cfg as common
from vhostctl.control.rings import RingPlacement
from vhostctl.host.memory import PAGE
from vhostctl.vmm import layout
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.virtio_pci import LEGACY_BAR, MODERN_BAR, MSIX_BAR

WIDTHS = (1, 2, 4, 8)

_STATUS = (0, 1, 3, 4, 7, 8, 11, 15, 0x40, 0x80, 0x8F, 0xFF)
_EVERYTHING = (1 << 64) - 1
_VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
_EDGES = (
    *(0, 0x1000, layout.EBDA, layout.KERNEL_MIN),
    *(RAM - 0x4001, RAM - PAGE, RAM - 2, RAM - 1, RAM, RAM + PAGE),
    *(layout.PCI_MEMORY.start, layout.IOAPIC, layout.LAPIC, layout.KVM_TSS),
    *(layout.HIGH_RAM, 1 << 44, (1 << 63) - 1, (1 << 64) - PAGE, (1 << 64) - 1),
)
_PM1 = range(layout.PM1_EVENT_PORTS.start, layout.PM1_CONTROL_PORTS.stop)
_PORTS = (
    *(layout.SERIAL_PORTS, layout.PCI_CONFIG_PORTS, _PM1),
    *(range(0x60, 0x72), layout.PCI_IO, range(0x1_0000)),
)
_MQ = virtio.VIRTIO_NET_CTRL_MQ, virtio.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
_COMMANDS = (
    *(_MQ, _MQ),
    (virtio.VIRTIO_NET_CTRL_MAC, virtio.VIRTIO_NET_CTRL_MAC_ADDR_SET),
    (virtio.VIRTIO_NET_CTRL_MAC, virtio.VIRTIO_NET_CTRL_MAC_TABLE_SET),
    (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_PROMISC),
    (virtio.VIRTIO_NET_CTRL_ANNOUNCE, virtio.VIRTIO_NET_CTRL_ANNOUNCE_ACK),
)
_DESC = struct.Struct("<QIHH")
_QUEUES = 5
_ROOM = 1 << 16  # bytes of RAM for each virtqueue, from _RINGS on
_RINGS = 1 << 20


class Chaos:
    """Chooses what the guest does next; the choice depends on nothing but `seed`.

    `starts` counts how often a driver of it had the card take its rings.
    """

    def __init__(self, driver: Driver, net: NetDevice, seed: int) -> None:
        self.driver = driver
        self.cpu = driver.cpu
        self.starts = 0
        self._net = net
        self._rng = random.Random(seed)  # noqa: S311 -- chance that can be repeated
        self._rings = dict[int, RingPlacement]()
        self._available = dict[int, int]()
        self._spoiled = 0.0  # how many descriptors are bad: the first that is ends its ring
        self._depth = 0
        actions: dict[Callable[[], None], int] = {
            self.drive: 6,
            self.drive_legacy: 3,
            self.traffic: 30,
            self.ring_doorbell: 20,
            self.command: 15,
            self.touch_common: 30,
            self.touch_legacy: 15,
            self.touch_elsewhere: 15,
            self.interrupts: 15,
            self.move_bars: 6,
            self.restore_bars: 6,
            self.window: 8,
            self.configuration: 8,
            self.noise: 20,
            self.board: 10,
            self.host: 1,
        }
        self._actions = list(actions)
        self._weights = list(actions.values())

    def run(self, operations: int) -> None:
        """Do something until that many operations more are done."""
        end = self.cpu.operations + operations
        with self.cpu.explained("the guest went mad"):
            while self.cpu.operations < end:
                self._something()

    def _something(self) -> None:
        self._rng.choices(self._actions, self._weights)[0]()

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _interrupted(self) -> None:
        """Now and then do something else in the middle."""
        if not self._depth and self._chance(0.02):
            self._depth += 1
            self._something()
            self._depth -= 1

    def _value(self) -> int:
        kinds = (0, 1, self._rng.getrandbits(8), self._rng.getrandbits(64), _EVERYTHING)
        return self._rng.choice((*kinds, self._address()))

    def _width(self) -> int:
        return self._rng.choice(WIDTHS)

    def _address(self) -> int:
        if self._chance(0.5):
            return self._rng.randrange(0, RAM, self._rng.choice((1, 2, 16, PAGE)))
        return self._rng.choice(_EDGES)

    def _features(self) -> int:
        offered = self._net.features
        one_pair = offered & ~(1 << virtio.VIRTIO_NET_F_MQ)
        some = offered & (self._rng.getrandbits(64) | self._rng.getrandbits(64))
        whole = (offered, offered, one_pair, one_pair, _VERSION_1, some, some | _VERSION_1)
        return self._rng.choice((*whole, self._rng.getrandbits(64)))

    def _placement(self, queue: int) -> RingPlacement:
        """Return where a virtqueue is: most of the time somewhere where it can be."""
        home = _RINGS + _ROOM * queue
        size = self._rng.choice((1, 2, 16, 64, 64, 256))
        ring = RingPlacement(size, home, home + 0x2000, home + 0x4000)
        if self._chance(0.9):
            return ring
        near = RAM - self._rng.choice((16, 256, 0x1000, 0x2000))
        spoiled = {
            "desc": (self._address(), near, ring.used),
            "avail": (self._address(), near, ring.desc),
            "used": (self._address(), near, ring.avail, ring.desc),
        }
        parts = {
            part: self._rng.choice((getattr(ring, part), *bad)) for part, bad in spoiled.items()
        }
        return RingPlacement(self._rng.choice((size, 0, 3, 0x8000, 0xFFFF)), **parts)

    def drive(self) -> None:
        """Set the card up as a modern driver does, more or less."""
        if self._chance(0.8):
            self.restore_bars()
        self.driver.accept(self._features())
        for queue in range(_QUEUES):
            self._interrupted()
            if self._chance(0.97):
                self._rings[queue] = self._placement(queue)
                self._fill(queue, fresh=True)
                self.driver.place(queue, self._rings[queue])
                self.driver.set("queue_msix_vector", self._rng.choice((queue, 0, 5, 6, 0xFFFF)))
        self._interrupted()
        self.driver.set("device_status", 15)
        self._started()

    def drive_legacy(self) -> None:
        """Set the card up as a driver of before virtio 1.0 does."""
        if self._chance(0.8):
            self.restore_bars()
        for status in (0, 1, 3):
            self._legacy(abi.VIRTIO_PCI_STATUS, status, 1)
        self._legacy(abi.VIRTIO_PCI_GUEST_FEATURES, self._features(), 4)
        for queue in range(_QUEUES):
            self._interrupted()
            size = 256 if queue < _QUEUES - 1 else 64
            home = _RINGS + _ROOM * queue
            used = home + (0x2000 if size == 256 else 0x1000)
            self._rings[queue] = RingPlacement(size, home, home + 16 * size, used)
            self._fill(queue, fresh=True)
            page = home // PAGE if self._chance(0.9) else self._value()
            self._legacy(abi.VIRTIO_PCI_QUEUE_SEL, queue, 2)
            self._legacy(abi.VIRTIO_PCI_QUEUE_PFN, page, 4)
            if self._chance(0.2):  # a modern driver works on it at the same time
                parts = [self._address() for _ in range(3)]
                self._legacy(abi.VIRTIO_PCI_QUEUE_PFN, 0, 4)
                self.driver.place(queue, RingPlacement(size, *parts))
                self.cpu.port(self.driver.at[LEGACY_BAR] + abi.VIRTIO_PCI_QUEUE_PFN, 4)
        self._legacy(abi.VIRTIO_PCI_STATUS, 7, 1)
        self._started()

    def _started(self) -> None:
        self.starts += self._net.running

    def _legacy(self, register: int, value: int, width: int) -> None:
        self.cpu.out(self.driver.at[LEGACY_BAR] + register, value, width)

    def _fill(self, queue: int, *, fresh: bool = False) -> None:
        """Write descriptors, some of which can be used, and make some of them available."""
        ring = self._rings[queue]
        size = max(1, min(ring.size, 256))
        if fresh:
            self._available[queue] = 0
            self._spoiled = self._rng.choice((0, 0, 0.002, 0.3))
            self.cpu.poke(ring.used, bytes(4))
        if fresh or self._chance(0.2):
            table = b"".join(self._descriptor(queue, at, size) for at in range(size))
            self.cpu.poke(ring.desc, table)
        heads = range(size)
        if self._chance(self._spoiled / 3):
            heads = range(0, 1 << 16, 7)
        entries = self._rng.choices(heads, k=size + 1)
        more = (
            self._rng.choice((1, 1, 8, size, size))
            if not self._chance(self._spoiled / 9)
            else 0x8000
        )
        self._available[queue] = index = self._available.get(queue, 0) + more & 0xFFFF
        flags = self._rng.choice((0, 0, 1, 0xFFFF))
        self.cpu.poke(ring.avail, struct.pack(f"<{size + 3}H", flags, index, *entries))
        if self._chance(self._spoiled / 9):
            self.cpu.poke(ring.used, self._rng.randbytes(8 * size + 6))

    def _descriptor(self, queue: int, at: int, size: int) -> bytes:
        receives = queue < _QUEUES - 1 and not queue % 2
        length = self._rng.choice((12, 64, 1526, 2048, 4096))
        flags = virtio.VRING_DESC_F_WRITE if receives else 0
        following = (at + 1) % size
        gpa = self._rng.randrange(RAM // 2, RAM - 4096)
        if self._chance(self._spoiled):
            gpa, length = self._address(), self._rng.choice((0, 1, length, 1 << 16, 0xFFFF_FFFF))
        if self._chance(self._spoiled):
            flags ^= self._rng.randrange(8)
            following = self._rng.choice((at, following, self._rng.getrandbits(16)))
        if flags & virtio.VRING_DESC_F_INDIRECT:
            gpa, length = self._rng.choice((_RINGS, gpa)), 16 * self._rng.randrange(1, 40)
        return _DESC.pack(gpa, length, flags, following)

    def traffic(self) -> None:
        """Make more available on a virtqueue, and say so."""
        if self._rings:
            queue = self._rng.choice(list(self._rings))
            self._fill(queue)
            self._doorbell(queue)

    def _doorbell(self, queue: int) -> None:
        if self._chance(0.7):
            self.driver.ring(queue)
        else:
            self._legacy(abi.VIRTIO_PCI_QUEUE_NOTIFY, queue, 2)

    def ring_doorbell(self) -> None:
        """Ring for a virtqueue that there may be."""
        self._doorbell(self._rng.choice((*range(_QUEUES), 5, 1023, 0xFFFF)))
        if self._chance(0.2):
            at = self.driver.at[MODERN_BAR] + NOTIFY + self._rng.randrange(PAGE)
            self.cpu.store(at, self._value(), self._width())

    def command(self) -> None:
        """Put something on the control queue."""
        queue = self._rng.choice((2, 4))
        if queue not in self._rings:
            return
        ring = self._rings[queue]
        size = max(1, min(ring.size, 64))
        data = self._rng.choice(
            (b"\1\0", b"\2\0", b"\2\0", b"\0\0", self._rng.randbytes(6), self._rng.randbytes(60))
        )
        command = bytes(self._rng.choice(_COMMANDS)) + data
        if self._chance(0.2):
            command = self._rng.randbytes(self._rng.randrange(9))
        gpa = RAM // 2 + _ROOM
        self.cpu.poke(gpa, command)
        chain = _DESC.pack(gpa, len(command), virtio.VRING_DESC_F_NEXT, 1 % size)
        chain += _DESC.pack(gpa + 128, 1, virtio.VRING_DESC_F_WRITE, 0)
        if self._chance(0.15):
            self._spoiled = 0.3
            chain = b"".join(self._descriptor(queue, at, size) for at in range(size))
        self.cpu.poke(ring.desc, chain)
        self._available[queue] = index = self._available.get(queue, 0) + 1 & 0xFFFF
        self.cpu.poke(ring.avail + 4 + 2 * ((index - 1) % size), bytes(2))
        self.cpu.poke(ring.avail + 2, struct.pack("<H", index))
        self._doorbell(queue)

    def touch_common(self) -> None:
        """Access a register of the common configuration."""
        field = self._rng.choice([name for name, _ in common._fields_])
        if self._chance(0.3):
            self.driver.get(field)
            return
        value = self._rng.choice(_STATUS) if field == "device_status" else self._value()
        if field == "queue_select":
            value = self._rng.choice((*range(_QUEUES + 2), value))
        if field == "device_status" and not value and self._chance(0.5):
            return
        self.driver.set(field, value, self._width() if self._chance(0.2) else None)

    def touch_legacy(self) -> None:
        """Access a register of the legacy BAR, which a modern driver may be using too."""
        register = self._rng.choice((*range(0, 20, 2), 18, 19, 20, 22, 24, 30, 125))
        if self._chance(0.5):
            self.cpu.port(self.driver.at[LEGACY_BAR] + register, self._width())
            return
        value = self._rng.choice(_STATUS) if register == abi.VIRTIO_PCI_STATUS else self._value()
        self._legacy(register, value, self._width())

    def touch_elsewhere(self) -> None:
        """Access the other structures: ISR, the device's configuration, MSI-X table and PBA."""
        base, size = self._rng.choice(
            (
                (self.driver.at[MODERN_BAR] + ISR, 8),
                (self.driver.at[MODERN_BAR] + CONFIG, 64),
                (self.driver.at[MODERN_BAR], 4 * PAGE + 8),
                (self.driver.at[MSIX_BAR], 2 * PAGE + 8),
                (self.driver.at[MSIX_BAR] + PAGE, 8),
            )
        )
        at = base + self._rng.randrange(size)
        if self._chance(0.6):
            self.cpu.load(at, self._width())
        else:
            self.cpu.store(at, self._value(), self._width())

    def interrupts(self) -> None:
        """Change the MSI-X table, which vector is whose, and what is masked."""
        entry = self.driver.at[MSIX_BAR] + 16 * self._rng.choice((*range(6), 6, 255))
        match self._rng.randrange(4):
            case 0:
                enable, mask = pci.PCI_MSIX_FLAGS_ENABLE, pci.PCI_MSIX_FLAGS_MASKALL
                flags = (0, enable, enable, enable | mask, mask, self._value())
                self.driver.msix_control(self._rng.choice(flags))
            case 1:
                self.cpu.store(entry, self._rng.choice((0xFEE0_0000, self._value())), 8)
                self.cpu.store(entry + 8, self._value(), 4)
            case 2:
                self.cpu.store(entry + 12, self._rng.choice((0, 0, 1, self._value())), 4)
            case _:
                self.driver.set("queue_select", self._rng.randrange(_QUEUES + 1))
                self.driver.set("queue_msix_vector", self._rng.choice((0, 1, 5, 6, 0xFFFF)))
                self.driver.set("msix_config", self._rng.choice((0, 5, 6, self._value())))

    def move_bars(self) -> None:
        """Put a BAR over RAM, another BAR, a controller, the end of the address space."""
        index = self._rng.choice(list(self.driver.at))
        window = layout.PCI_IO if index == LEGACY_BAR else layout.PCI_MEMORY
        fitting = self._rng.randrange(window.start, window.stop, 1 << 14)
        others = [self.driver.at[other] for other in self.driver.at if other != index]
        ends = (window.start, window.stop - 128, window.stop - (1 << 14))
        targets = (fitting, fitting, *others, *ends, self._value(), self._address())
        self.driver.move(index, self._rng.choice(targets))
        if self._chance(0.3):
            self.cpu.configure(pci.PCI_COMMAND, self._rng.choice((0, 1, 2, 7, 0x407, 0xFFFF)), 2)

    def restore_bars(self) -> None:
        """Have everything where it was, so that it can be reached again."""
        self.driver.come_home()

    def window(self) -> None:
        """Access the card by its capability for firmware (VIRTIO_PCI_CAP_PCI_CFG)."""
        at = self.driver.capabilities[abi.VIRTIO_PCI_CAP_PCI_CFG]
        self.cpu.configure(at + 4, self._rng.choice((MODERN_BAR, MODERN_BAR, 0, 7)), 1)
        offset = self._rng.choice((self._rng.randrange(64), self._rng.randrange(1 << 14)))
        self.cpu.configure(at + 8, offset if self._chance(0.9) else self._value())
        self.cpu.configure(at + 12, self._rng.choice((1, 2, 4, 8, 0, self._value())))
        if self._chance(0.5):
            self.cpu.configuration(at + 16, self._rng.choice((1, 2, 4)))
        else:
            self.cpu.configure(at + 16, self._value(), self._rng.choice((1, 2, 4)))

    def configuration(self) -> None:
        """Access any register of any function's configuration space."""
        slot = self._rng.choice((None, None, 0, 2, 31))
        register = self._rng.randrange(256)
        if self._chance(0.5):
            self.cpu.configuration(register, self._width(), slot)
        else:
            self.cpu.configure(register, self._value(), self._width(), slot)

    def noise(self) -> None:
        """Access whatever there is."""
        near = (*self.driver.at.values(), *layout.PCI_MEMORY[:1], layout.IOAPIC, self._address())
        address = self._rng.choice(near) + self._rng.randrange(-16, 1 << 15)
        port = self._rng.choice(self._rng.choice(_PORTS))
        value, width = self._value(), self._width()
        match self._rng.randrange(4):
            case 0:
                self.cpu.out(port, value, width)
            case 1:
                self.cpu.port(port, width)
            case 2:
                self.cpu.store(address & _EVERYTHING, value, width)
            case _:
                self.cpu.load(address & _EVERYTHING, width)

    def board(self) -> None:
        """Serial port, power management, reset; nobody ends the machine because of it."""
        port = self._rng.choice((*layout.SERIAL_PORTS, *_PM1, layout.KEYBOARD_COMMAND_PORT))
        value = self._rng.choice((self._value(), 0xFE, 0x3400))
        self.cpu.out(port, value, self._rng.choice((1, 2, 4)))
        self.cpu.port(port, self._rng.choice((1, 2, 4)))

    def host(self) -> None:
        """Do what happens outside meanwhile: the link goes and comes, the VM has moved."""
        with self.cpu.machine.lock:
            self._net.set_link(self._chance(0.7))
            self._net.announce()
