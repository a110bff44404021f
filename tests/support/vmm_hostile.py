"""A guest that does everything wrong: what leaves its vCPU, chosen by a seed."""

from __future__ import annotations

import abc
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from vhostctl.abi import pci
from vhostctl.abi.virtio_pci import virtio_pci_common_cfg as common
from vhostctl.control import access
from vhostctl.control.rings import RingPlacement
from vhostctl.host.memory import PAGE
from vhostctl.vmm import layout
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.machine import Machine
from vhostctl.vmm.virtio_pci import LEGACY_BAR, MODERN_BAR, MSIX_BAR, VirtioPci

RAM = 32 << 20
BARS = (LEGACY_BAR, MSIX_BAR, MODERN_BAR)
COMMON, ISR, CONFIG, NOTIFY = (PAGE * page for page in range(4))


class Cpu(abc.ABC):
    """The accesses of a vCPU; each is an operation.

    `slot` is where the card is, `lock` is held for what is done to the machine from outside.
    """

    def __init__(self, slot: int, lock: AbstractContextManager[object]) -> None:
        self.slot = slot
        self.lock = lock
        self.operations = 0
        self.last: deque[tuple[str, int, object, int]] = deque(maxlen=24)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Have what fails inside say which accesses were the last."""
        try:
            yield
        except BaseException as error:
            error.add_note(f"{what}, operation {self.operations}, behind:")
            error.add_note("\n".join(_text(*access) for access in self.last))
            raise

    @abc.abstractmethod
    def out(self, port: int, value: int, width: int) -> None:
        """Write to an I/O port."""

    @abc.abstractmethod
    def port(self, port: int, width: int) -> int:
        """Read an I/O port."""

    @abc.abstractmethod
    def store(self, address: int, value: int, width: int) -> None:
        """Write where there is no RAM."""

    @abc.abstractmethod
    def load(self, address: int, width: int) -> int:
        """Read where there is no RAM."""

    @abc.abstractmethod
    def poke(self, gpa: int, data: bytes) -> None:
        """Write RAM, as far as there is any."""

    def configure(self, register: int, value: int, width: int = 4, slot: int | None = None) -> None:
        """Write a register of configuration space."""
        self.out(self._config_port(register, slot), value, width)

    def configuration(self, register: int, width: int = 4, slot: int | None = None) -> int:
        """Read a register of configuration space."""
        return self.port(self._config_port(register, slot), width)

    def bar(self, index: int) -> int:
        """Return what a BAR of the card says."""
        register = pci.PCI_BASE_ADDRESS_0 + 4 * index
        low = self.configuration(register)
        if low & pci.PCI_BASE_ADDRESS_SPACE_IO:
            return low & ~3
        wide = low & pci.PCI_BASE_ADDRESS_MEM_TYPE_64
        return (self.configuration(register + 4) << 32 if wide else 0) | low & ~0xF

    def capabilities(self) -> dict[int, int]:
        """Return where MSI-X (0) and the virtio structures are, by cfg_type."""
        found = {}
        at = self.configuration(pci.PCI_CAPABILITY_LIST, 1)
        while at:
            msix = self.configuration(at, 1) == pci.PCI_CAP_ID_MSIX
            found[0 if msix else self.configuration(at + 3, 1)] = at
            at = self.configuration(at + pci.PCI_CAP_LIST_NEXT, 1)
        return found

    def _config_port(self, register: int, slot: int | None) -> int:
        address = 1 << 31 | (self.slot if slot is None else slot) << 11 | register & 0xFC
        self.out(layout.PCI_CONFIG_PORTS.start, address, 4)
        return layout.PCI_CONFIG_PORTS.start + 4 + register % 4


class GuestCpu(Cpu):
    """Hands them to the buses of a machine as `CpuThread` does."""

    def __init__(self, machine: Machine, function: VirtioPci) -> None:
        assert function.slot is not None
        super().__init__(function.slot, machine.lock)
        self.machine = machine
        self.slowest = 0.0

    def out(self, port: int, value: int, width: int) -> None:
        self._write(self.machine.ports, "out", port, value, width)

    def port(self, port: int, width: int) -> int:
        return self._read(self.machine.ports, "in", port, width)

    def store(self, address: int, value: int, width: int) -> None:
        self._write(self.machine.mmio, "store", address, value, width)

    def load(self, address: int, width: int) -> int:
        return self._read(self.machine.mmio, "load", address, width)

    def poke(self, gpa: int, data: bytes) -> None:
        began = self._begin("poke", gpa, data[:64].hex(), len(data))
        with self.lock:
            access.write(self.machine.space, min(gpa, RAM), data[: max(0, RAM - gpa)])
        self._end(began)

    def _write(self, bus: Bus, what: str, at: int, value: int, width: int) -> None:
        value &= (1 << 8 * width) - 1
        began = self._begin(what, at, value, width)
        with self.lock:
            bus.write(at, value.to_bytes(width, "little"))
        self._end(began)

    def _read(self, bus: Bus, what: str, at: int, width: int) -> int:
        began = self._begin(what, at, "", width)
        with self.lock:
            data = bus.read(at, width)
        self._end(began)
        assert len(data) == width
        return int.from_bytes(data, "little")

    def _begin(self, what: str, at: int, value: object, width: int) -> float:
        self.operations += 1
        self.last.append((what, at, value, width))
        return time.monotonic()

    def _end(self, began: float) -> None:
        self.slowest = max(self.slowest, time.monotonic() - began)


def _text(what: str, at: int, value: object, width: int) -> str:
    shown = f"{value:#x}" if isinstance(value, int) else value
    return f"{what} {at:#x} {shown} width {width}"


class Driver:
    """A driver of the card by `cpu` that may place rings and give features as it likes."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.homes = {index: cpu.bar(index) for index in BARS}
        self.capabilities = cpu.capabilities()
        self.at = dict(self.homes)

    def come_home(self) -> None:
        """Have the BARs where they were, and the card decode them."""
        for index, home in self.homes.items():
            self.move(index, home)
        self.cpu.configure(pci.PCI_COMMAND, 7, 2)

    def move(self, index: int, address: int) -> None:
        """Write a BAR, and believe that it is there."""
        register = pci.PCI_BASE_ADDRESS_0 + 4 * index
        self.cpu.configure(register, address)
        if index == MODERN_BAR:
            self.cpu.configure(register + 4, address >> 32)
        self.at[index] = address

    def set(self, field: str, value: int, width: int | None = None) -> None:
        """Write a field of the common configuration."""
        place = getattr(common, field)
        self.cpu.store(self.at[MODERN_BAR] + COMMON + place.offset, value, width or place.size)

    def get(self, field: str) -> int:
        """Read one."""
        place = getattr(common, field)
        return self.cpu.load(self.at[MODERN_BAR] + COMMON + place.offset, place.size)

    def accept(self, features: int) -> None:
        """Go from a reset to FEATURES_OK."""
        for status in (0, 1, 3):
            self.set("device_status", status)
        for word in range(2):
            self.set("guest_feature_select", word)
            self.set("guest_feature", features >> 32 * word)
        self.set("device_status", 11)

    def place(self, queue: int, ring: RingPlacement) -> None:
        """Set a virtqueue up."""
        self.set("queue_select", queue)
        self.set("queue_size", ring.size)
        for part in ("desc", "avail", "used"):
            address = getattr(ring, part)
            self.set(f"queue_{part}_lo", address)
            self.set(f"queue_{part}_hi", address >> 32)
        self.set("queue_enable", 1)

    def ring(self, queue: int) -> None:
        """Ring a doorbell."""
        self.cpu.store(self.at[MODERN_BAR] + NOTIFY + 4 * queue, queue, 2)

    def msix_control(self, flags: int) -> None:
        """Write the control word of MSI-X."""
        self.cpu.configure(self.capabilities[0] + pci.PCI_MSIX_FLAGS, flags, 2)
