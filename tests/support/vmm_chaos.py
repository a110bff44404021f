"""What a guest may do to its virtual machine, at random: noise, and drivers gone mad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tests.support.vmm_chaos_rings import EVERYTHING, QUEUES, Chance, Rings
from tests.support.vmm_hostile import CONFIG, ISR, NOTIFY, RAM, Driver
from vhostctl.abi import pci, virtio
from vhostctl.abi import virtio_pci as abi
from vhostctl.abi.virtio_pci import virtio_pci_common_cfg as common
from vhostctl.control.rings import RingPlacement
from vhostctl.host.memory import PAGE
from vhostctl.vmm import layout
from vhostctl.vmm.virtio_pci import LEGACY_BAR, MODERN_BAR, MSIX_BAR

_STATUS = (0, 1, 3, 4, 7, 8, 11, 15, 0x40, 0x80, 0x8F, 0xFF)
_VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
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


class Card(Protocol):
    """What is done to the card from outside; vmm.net's NetDevice is one."""

    @property
    def features(self) -> int: ...

    @property
    def running(self) -> bool: ...

    def set_link(self, up: bool) -> None: ...

    def announce(self) -> None: ...


class Chaos:
    """Chooses what the guest does next; the choice depends on nothing but `seed`.

    `starts` counts how often a driver of it had the card take its rings.
    """

    def __init__(self, driver: Driver, card: Card, seed: int, ram: int = RAM) -> None:
        """Be a guest that has RAM up to `ram`; it uses what `RAM` says, and the last pages."""
        self.driver = driver
        self.cpu = driver.cpu
        self.starts = 0
        self._card = card
        self._chance = Chance(seed, ram)
        self._rng = self._chance.rng
        self._rings = Rings(self.cpu, self._chance)
        self._depth = 0
        actions = self.actions()
        self._actions = list(actions)
        self._weights = list(actions.values())

    def actions(self) -> dict[Callable[[], None], int]:
        """Return what it does, and how often."""
        return {
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

    def run(self, operations: int) -> None:
        """Do something until that many operations more are done."""
        end = self.cpu.operations + operations
        with self.cpu.explained("the guest went mad"):
            while self.cpu.operations < end:
                self._something()

    def _something(self) -> None:
        self._rng.choices(self._actions, self._weights)[0]()

    def _interrupted(self) -> None:
        """Now and then do something else in the middle."""
        if not self._depth and self._chance.of(0.02):
            self._depth += 1
            self._something()
            self._depth -= 1

    def _features(self) -> int:
        offered = self._card.features
        one_pair = offered & ~(1 << virtio.VIRTIO_NET_F_MQ)
        some = offered & (self._rng.getrandbits(64) | self._rng.getrandbits(64))
        whole = (offered, offered, one_pair, one_pair, _VERSION_1, some, some | _VERSION_1)
        return self._rng.choice((*whole, self._rng.getrandbits(64)))

    def drive(self) -> None:
        """Set the card up as a modern driver does, more or less."""
        if self._chance.of(0.8):
            self.restore_bars()
        self.driver.accept(self._features())
        for queue in range(QUEUES):
            self._interrupted()
            if self._chance.of(0.97):
                self.driver.place(queue, self._rings.place(queue))
                self.driver.set("queue_msix_vector", self._rng.choice((queue, 0, 5, 6, 0xFFFF)))
        self._interrupted()
        self.driver.set("device_status", 15)
        self._started()

    def drive_legacy(self) -> None:
        """Set the card up as a driver of before virtio 1.0 does."""
        if self._chance.of(0.8):
            self.restore_bars()
        for status in (0, 1, 3):
            self._legacy(abi.VIRTIO_PCI_STATUS, status, 1)
        self._legacy(abi.VIRTIO_PCI_GUEST_FEATURES, self._features(), 4)
        for queue in range(QUEUES):
            self._interrupted()
            ring = self._rings.place_legacy(queue)
            page = ring.desc // PAGE if self._chance.of(0.9) else self._chance.value()
            self._legacy(abi.VIRTIO_PCI_QUEUE_SEL, queue, 2)
            self._legacy(abi.VIRTIO_PCI_QUEUE_PFN, page, 4)
            if self._chance.of(0.2):  # a modern driver works on it at the same time
                parts = [self._chance.address() for _ in range(3)]
                self._legacy(abi.VIRTIO_PCI_QUEUE_PFN, 0, 4)
                self.driver.place(queue, RingPlacement(ring.size, *parts))
                self.cpu.port(self.driver.at[LEGACY_BAR] + abi.VIRTIO_PCI_QUEUE_PFN, 4)
        self._legacy(abi.VIRTIO_PCI_STATUS, 7, 1)
        self._started()

    def _started(self) -> None:
        self.starts += self._card.running

    def _legacy(self, register: int, value: int, width: int) -> None:
        self.cpu.out(self.driver.at[LEGACY_BAR] + register, value, width)

    def traffic(self) -> None:
        """Make more available on a virtqueue, and say so."""
        if self._rings.placed:
            queue = self._rng.choice(list(self._rings.placed))
            self._rings.fill(queue)
            self._doorbell(queue)

    def _doorbell(self, queue: int) -> None:
        if self._chance.of(0.7):
            self.driver.ring(queue)
        else:
            self._legacy(abi.VIRTIO_PCI_QUEUE_NOTIFY, queue, 2)

    def ring_doorbell(self) -> None:
        """Ring for a virtqueue that there may be."""
        self._doorbell(self._rng.choice((*range(QUEUES), 5, 1023, 0xFFFF)))
        if self._chance.of(0.2):
            at = self.driver.at[MODERN_BAR] + NOTIFY + self._rng.randrange(PAGE)
            self.cpu.store(at, self._chance.value(), self._chance.width())

    def command(self) -> None:
        """Put something on the control queue."""
        queue = self._rng.choice((2, 4))
        if queue not in self._rings.placed:
            return
        data = self._rng.choice(
            (b"\1\0", b"\2\0", b"\2\0", b"\0\0", self._rng.randbytes(6), self._rng.randbytes(60))
        )
        command = bytes(self._rng.choice(_COMMANDS)) + data
        if self._chance.of(0.2):
            command = self._rng.randbytes(self._rng.randrange(9))
        self._rings.command(queue, command)
        self._doorbell(queue)

    def touch_common(self) -> None:
        """Access a register of the common configuration."""
        field = self._rng.choice([name for name, _ in common._fields_])
        if self._chance.of(0.3):
            self.driver.get(field)
            return
        value = self._rng.choice(_STATUS) if field == "device_status" else self._chance.value()
        if field == "queue_select":
            value = self._rng.choice((*range(QUEUES + 2), value))
        if field == "device_status" and not value and self._chance.of(0.5):
            return
        self.driver.set(field, value, self._chance.width() if self._chance.of(0.2) else None)

    def touch_legacy(self) -> None:
        """Access a register of the legacy BAR, which a modern driver may be using too."""
        register = self._rng.choice((*range(0, 20, 2), 18, 19, 20, 22, 24, 30, 125))
        if self._chance.of(0.5):
            self.cpu.port(self.driver.at[LEGACY_BAR] + register, self._chance.width())
            return
        value = (
            self._rng.choice(_STATUS) if register == abi.VIRTIO_PCI_STATUS else self._chance.value()
        )
        self._legacy(register, value, self._chance.width())

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
        if self._chance.of(0.6):
            self.cpu.load(at, self._chance.width())
        else:
            self.cpu.store(at, self._chance.value(), self._chance.width())

    def interrupts(self) -> None:
        """Change the MSI-X table, which vector is whose, and what is masked."""
        entry = self.driver.at[MSIX_BAR] + 16 * self._rng.choice((*range(6), 6, 255))
        match self._rng.randrange(4):
            case 0:
                enable, mask = pci.PCI_MSIX_FLAGS_ENABLE, pci.PCI_MSIX_FLAGS_MASKALL
                flags = (0, enable, enable, enable | mask, mask, self._chance.value())
                self.driver.msix_control(self._rng.choice(flags))
            case 1:
                self.cpu.store(entry, self._rng.choice((0xFEE0_0000, self._chance.value())), 8)
                self.cpu.store(entry + 8, self._chance.value(), 4)
            case 2:
                self.cpu.store(entry + 12, self._rng.choice((0, 0, 1, self._chance.value())), 4)
            case _:
                self.driver.set("queue_select", self._rng.randrange(QUEUES + 1))
                self.driver.set("queue_msix_vector", self._rng.choice((0, 1, 5, 6, 0xFFFF)))
                self.driver.set("msix_config", self._rng.choice((0, 5, 6, self._chance.value())))

    def move_bars(self) -> None:
        """Put a BAR over RAM, another BAR, a controller, the end of the address space."""
        index = self._rng.choice(list(self.driver.at))
        window = layout.PCI_IO if index == LEGACY_BAR else layout.PCI_MEMORY
        fitting = self._rng.randrange(window.start, window.stop, 1 << 14)
        others = [self.driver.at[other] for other in self.driver.at if other != index]
        ends = (window.start, window.stop - 128, window.stop - (1 << 14))
        targets = (fitting, fitting, *others, *ends, self._chance.value(), self._chance.address())
        self.driver.move(index, self._rng.choice(targets))
        if self._chance.of(0.3):
            self.cpu.configure(pci.PCI_COMMAND, self._rng.choice((0, 1, 2, 7, 0x407, 0xFFFF)), 2)

    def restore_bars(self) -> None:
        """Have everything where it was, so that it can be reached again."""
        self.driver.come_home()

    def window(self) -> None:
        """Access the card by its capability for firmware (VIRTIO_PCI_CAP_PCI_CFG)."""
        at = self.driver.capabilities[abi.VIRTIO_PCI_CAP_PCI_CFG]
        self.cpu.configure(at + 4, self._rng.choice((MODERN_BAR, MODERN_BAR, 0, 7)), 1)
        offset = self._rng.choice((self._rng.randrange(64), self._rng.randrange(1 << 14)))
        self.cpu.configure(at + 8, offset if self._chance.of(0.9) else self._chance.value())
        self.cpu.configure(at + 12, self._rng.choice((1, 2, 4, 8, 0, self._chance.value())))
        if self._chance.of(0.5):
            self.cpu.configuration(at + 16, self._rng.choice((1, 2, 4)))
        else:
            self.cpu.configure(at + 16, self._chance.value(), self._rng.choice((1, 2, 4)))

    def configuration(self) -> None:
        """Access any register of any function's configuration space."""
        slot = self._rng.choice((None, None, 0, 2, 31))
        register = self._rng.randrange(256)
        if self._chance.of(0.5):
            self.cpu.configuration(register, self._chance.width(), slot)
        else:
            self.cpu.configure(register, self._chance.value(), self._chance.width(), slot)

    def noise(self) -> None:
        """Access whatever there is."""
        near = (
            *self.driver.at.values(),
            *layout.PCI_MEMORY[:1],
            layout.IOAPIC,
            self._chance.address(),
        )
        address = self._rng.choice(near) + self._rng.randrange(-16, 1 << 15)
        port = self._rng.choice(self._rng.choice(_PORTS))
        value, width = self._chance.value(), self._chance.width()
        match self._rng.randrange(4):
            case 0:
                self.cpu.out(port, value, width)
            case 1:
                self.cpu.port(port, width)
            case 2:
                self.cpu.store(address & EVERYTHING, value, width)
            case _:
                self.cpu.load(address & EVERYTHING, width)

    def board(self) -> None:
        """Serial port, power management, reset; nobody ends the machine because of it."""
        port = self._rng.choice((*layout.SERIAL_PORTS, *_PM1, layout.KEYBOARD_COMMAND_PORT))
        value = self._rng.choice((self._chance.value(), 0xFE, 0x3400))
        self.cpu.out(port, value, self._rng.choice((1, 2, 4)))
        self.cpu.port(port, self._rng.choice((1, 2, 4)))

    def host(self) -> None:
        """Do what happens outside meanwhile: the link goes and comes, the VM has moved."""
        with self.cpu.lock:
            self._card.set_link(self._chance.of(0.7))
            self._card.announce()
