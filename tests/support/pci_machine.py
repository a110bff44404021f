"""A PCI bus with nothing behind it but what tests look at, and a driver of virtio-pci."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from vhostctl.abi import pci
from vhostctl.abi import virtio_pci as abi
from vhostctl.abi.kvm import KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry
from vhostctl.abi.virtio_pci import virtio_pci_common_cfg as common
from vhostctl.control.addressspace import AddressSpace
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host.eventfd import EventFd
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.doorbells import Doorbells
from vhostctl.vmm.interrupts import Interrupts, Msi
from vhostctl.vmm.pci import PciBus
from vhostctl.vmm.virtio import Ring, Transport
from vhostctl.vmm.virtio_pci import VirtioPci

NET = 1
VERSION_1 = 1 << 32


class FakeVm:
    """KVM's side of doorbells and interrupts, which `work()` does by hand."""

    def __init__(self) -> None:
        self.doorbells: dict[tuple[int, int, int | None, bool], int] = {}
        self.irqfds: dict[int, int] = {}
        self.routes: dict[int, Msi] = {}
        self.lines: dict[int, bool] = {}
        self.sent: list[Msi] = []
        self.lost = 0
        self.refused = range(0)
        self.refuse_routes = False

    def ioeventfd(
        self,
        event_fd: int,
        address: int,
        *,
        length: int = 0,
        datamatch: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        place = address, length, datamatch, pio
        if assign:
            if address in self.refused or place in self.doorbells:
                raise KernelError(28, "KVM_IOEVENTFD", "vm")
            self.doorbells[place] = event_fd
        else:
            assert self.doorbells.pop(place) == event_fd

    def irq_line(self, gsi: int, level: bool) -> None:
        self.lines[gsi] = level

    def set_gsi_routing(self, entries: Sequence[kvm_irq_routing_entry]) -> None:
        found = {}
        for entry in entries:
            if entry.type == KVM_IRQ_ROUTING_MSI:
                address = entry.u.msi.address_lo | entry.u.msi.address_hi << 32
                found[entry.gsi] = Msi(address, entry.u.msi.data)
        if self.refuse_routes and found:
            raise KernelError(22, "KVM_SET_GSI_ROUTING", "vm")
        self.routes = found

    def signal_msi(self, address: int, data: int) -> int:
        self.sent.append(Msi(address, data))
        return 1

    def irqfd(self, event_fd: int, gsi: int, *, assign: bool = True) -> None:
        if assign:
            assert event_fd not in self.irqfds
            self.irqfds[event_fd] = gsi
            self.work()
        else:
            self.work()
            assert self.irqfds.pop(event_fd) == gsi

    def work(self) -> None:
        for event_fd, gsi in self.irqfds.items():
            if readable(event_fd):
                drain(event_fd)
                if gsi in self.routes:
                    self.sent.append(self.routes[gsi])
                else:
                    self.lost += 1


class FakeLoop:
    """A loop that turns when it is told to."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[], None]] = {}
        self.soon: list[Callable[[], None]] = []

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        assert fd not in self.watched
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def work(self) -> None:
        while self.soon:
            self.soon.pop()()
        for fd, callback in list(self.watched.items()):
            if fd in self.watched and readable(fd):
                callback()


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def drain(fd: int) -> None:
    with EventFd.adopt(fd) as event:
        event.drain()
        event.detach()


@dataclass
class FakeDevice:
    """A device with two virtqueues that have a kick, and a third one that has none."""

    features: int = VERSION_1 | 1 << 35 | 0x23
    device_id: int = NET
    queue_sizes: Sequence[int] = (256, 256, 64)
    config: bytearray = field(default_factory=lambda: bytearray(b"\x02\0\0\0\0\x01\x01\0"))
    started: tuple[int, Sequence[Ring]] | None = None
    refuses: bool = False
    resets: int = 0
    notified: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kicks: Sequence[EventFd | None] = (EventFd.create("0"), EventFd.create("1"), None)
        self.calls: Sequence[EventFd] = [EventFd.create(f"call {n}") for n in range(3)]
        self.config_call = EventFd.create("config")
        self.transport: Transport | None = None

    def close(self) -> None:
        for event in (*self.kicks, *self.calls, self.config_call):
            if event is not None:
                event.close()

    def attach(self, transport: Transport) -> None:
        self.transport = transport

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length]).ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        end = min(offset + len(data), len(self.config))
        if offset < end:
            self.config[offset:end] = data[: end - offset]

    def accept(self, features: int) -> bool:
        return not features & 2

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        if self.refuses:
            raise InvalidArgument("a ring is nowhere")
        assert self.started is None
        self.started = features, rings

    def notify(self, queue: int) -> None:
        self.notified.append(queue)

    def reset(self) -> None:
        self.started = None
        self.resets += 1


class Machine:
    """Buses, a PCI bus, and what KVM would be; `close()` closes what was added too."""

    def __init__(self, *, irqfd: bool = True) -> None:
        self.vm = FakeVm()
        self.loop = FakeLoop()
        self.ports = Bus("ports", 1 << 16)
        self.mmio = Bus("memory", 1 << 52)
        self.space = AddressSpace(limit=64)
        self.doorbells = Doorbells(self.vm, self.space)
        self.interrupts = Interrupts(self.vm, irqfd)
        self.pci = PciBus(self.ports, self.mmio)
        self._stack = ExitStack()

    def add(
        self, device: FakeDevice | None = None, *, transitional: bool = True, ioeventfd: bool = True
    ) -> tuple[FakeDevice, VirtioPci]:
        device = device or FakeDevice()
        self._stack.callback(device.close)
        function = VirtioPci(
            device,
            self.interrupts,
            self.doorbells,
            self.loop,
            transitional=transitional,
            ioeventfd=ioeventfd,
        )
        self.pci.add(function)
        self._stack.callback(function.close)
        return device, function

    def work(self) -> None:
        self.vm.work()
        self.loop.work()

    def close(self) -> None:
        self._stack.close()
        assert not self.vm.doorbells
        assert not self.vm.irqfds
        assert not self.loop.watched

    def read_config(self, slot: int, register: int, width: int = 4) -> int:
        self._select(slot, register)
        return int.from_bytes(self.ports.read(0xCFC + register % 4, width), "little")

    def write_config(self, slot: int, register: int, value: int, width: int = 4) -> None:
        self._select(slot, register)
        self.ports.write(0xCFC + register % 4, value.to_bytes(width, "little"))

    def _select(self, slot: int, register: int) -> None:
        address = 1 << 31 | slot << 11 | register & 0xFC
        self.ports.write(0xCF8, address.to_bytes(4, "little"))

    def capabilities(self, slot: int) -> list[tuple[int, int]]:
        """Return (id, offset) of each capability, as a driver finds them."""
        found = []
        at = self.read_config(slot, pci.PCI_CAPABILITY_LIST, 1)
        while at:
            found.append((self.read_config(slot, at, 1), at))
            at = self.read_config(slot, at + 1, 1)
            assert len(found) < 48
        return found

    def bar(self, slot: int, index: int) -> int:
        """Return where a BAR says that it is."""
        register = pci.PCI_BASE_ADDRESS_0 + 4 * index
        low = self.read_config(slot, register)
        if low & 1:
            return low & ~3
        high = self.read_config(slot, register + 4) if low & 4 else 0
        return high << 32 | low & ~0xF


class Driver:
    """A modern driver of the virtio function in `slot`, MSI-X included."""

    def __init__(self, machine: Machine, slot: int) -> None:
        self.machine = machine
        self.slot = slot
        self.structures: dict[int, int] = {}
        machine.write_config(slot, pci.PCI_COMMAND, 7, 2)
        for kind, at in machine.capabilities(slot):
            if kind == pci.PCI_CAP_ID_MSIX:
                self.msix = at
                table = machine.read_config(slot, at + pci.PCI_MSIX_TABLE)
                pba = machine.read_config(slot, at + pci.PCI_MSIX_PBA)
                self.table = machine.bar(slot, table & 7) + (table & ~7)
                self.pba = machine.bar(slot, pba & 7) + (pba & ~7)
            else:
                cfg_type = machine.read_config(slot, at + 3, 1)
                bar = machine.bar(slot, machine.read_config(slot, at + 4, 1))
                self.structures[cfg_type] = bar + machine.read_config(slot, at + 8)
                if cfg_type == abi.VIRTIO_PCI_CAP_NOTIFY_CFG:
                    self.multiplier = machine.read_config(slot, at + 16)

    def get(self, name: str) -> int:
        place = getattr(common, name)
        address = self.structures[abi.VIRTIO_PCI_CAP_COMMON_CFG] + place.offset
        return int.from_bytes(self.machine.mmio.read(address, place.size), "little")

    def set(self, name: str, value: int) -> None:
        place = getattr(common, name)
        address = self.structures[abi.VIRTIO_PCI_CAP_COMMON_CFG] + place.offset
        self.machine.mmio.write(address, value.to_bytes(place.size, "little"))

    def negotiate(self, features: int) -> bool:
        self.set("device_status", 0)
        assert self.get("device_status") == 0
        self.set("device_status", 1)
        self.set("device_status", 3)
        for word in range(2):
            self.set("guest_feature_select", word)
            self.set("guest_feature", features >> 32 * word & 0xFFFFFFFF)
        self.set("device_status", 11)
        return self.get("device_status") == 11

    def place(self, queue: int, size: int, at: int) -> None:
        self.set("queue_select", queue)
        self.set("queue_size", size)
        for part, address in zip(
            ("desc", "avail", "used"), (at, at + 0x1000, at + 0x2000), strict=True
        ):
            self.set(f"queue_{part}_lo", address & 0xFFFFFFFF)
            self.set(f"queue_{part}_hi", address >> 32)
        self.set("queue_enable", 1)

    def start(self, features: int = VERSION_1) -> None:
        assert self.negotiate(features)
        for queue in range(self.get("num_queues")):
            self.place(queue, 64, 0x1_0000_0000 + 0x10000 * queue)
        self.set("device_status", 15)

    def doorbell(self, queue: int) -> int:
        self.set("queue_select", queue)
        offset = self.get("queue_notify_off") * self.multiplier
        return self.structures[abi.VIRTIO_PCI_CAP_NOTIFY_CFG] + offset

    def isr(self) -> int:
        return self.machine.mmio.read(self.structures[abi.VIRTIO_PCI_CAP_ISR_CFG], 1)[0]

    def msix_control(self, flags: int) -> None:
        self.machine.write_config(self.slot, self.msix + pci.PCI_MSIX_FLAGS, flags, 2)

    def write_message(self, vector: int, message: Msi) -> None:
        for offset, value in (
            (0, message.address & 0xFFFFFFFF),
            (4, message.address >> 32),
            (8, message.data),
        ):
            self.machine.mmio.write(self.table + 16 * vector + offset, value.to_bytes(4, "little"))

    def mask(self, vector: int, masked: bool) -> None:
        self.machine.mmio.write(self.table + 16 * vector + 12, masked.to_bytes(4, "little"))

    def take_vectors(self) -> list[Msi]:
        """Turn MSI-X on as Linux does: one vector for each virtqueue, then config."""
        count = self.get("num_queues") + 1
        messages = [Msi(0xFEE0_0000, 0x40 + vector) for vector in range(count)]
        self.msix_control(pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL)
        for vector, message in enumerate(messages):
            self.write_message(vector, message)
        self.msix_control(pci.PCI_MSIX_FLAGS_ENABLE)
        for vector in range(count):
            self.mask(vector, False)
        self.set("msix_config", count - 1)
        assert self.get("msix_config") == count - 1
        for queue in range(count - 1):
            self.set("queue_select", queue)
            self.set("queue_msix_vector", queue)
            assert self.get("queue_msix_vector") == queue
        return messages

    def pending(self) -> int:
        return int.from_bytes(self.machine.mmio.read(self.pba, 8), "little")


def begin(machine: Machine) -> tuple[FakeDevice, VirtioPci, Driver]:
    """Add a device, and have a driver find it."""
    device, function = machine.add()
    assert function.slot is not None
    return device, function, Driver(machine, function.slot)
