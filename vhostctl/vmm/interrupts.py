"""Interrupts of a machine with KVM's own controllers: lines, messages and where GSIs lead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from vhostctl.abi.kvm import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry,
)
from vhostctl.errors import InvalidArgument, StateError

LINES = 24
"""GSIs that are pins of the I/O APIC; messages have those behind."""


class InterruptVm(Protocol):
    """What has in-kernel interrupt controllers: a Vm."""

    def irq_line(self, gsi: int, level: bool, /) -> None:
        """KVM_IRQ_LINE."""

    def set_gsi_routing(self, entries: Sequence[kvm_irq_routing_entry], /) -> None:
        """KVM_SET_GSI_ROUTING."""

    def signal_msi(self, address: int, data: int, /) -> int:
        """KVM_SIGNAL_MSI: how many processors took it."""

    def irqfd(self, event_fd: int, gsi: int, /, *, assign: bool = True) -> None:
        """KVM_IRQFD."""


@dataclass(frozen=True, slots=True)
class Msi:
    """A message-signalled interrupt: `data`, 32 bits, is written to `address`, 64 bits."""

    address: int
    data: int


class Interrupts:
    """Owns the GSI routing of a VM, and raises interrupts where no irqfd does.

    GSI 0 to 23 are the pins of PIC and I/O APIC, wired as in a PC: the timer's GSI 0 is pin 2
    of the I/O APIC, which an override in the MADT has to say. From 24 on a GSI is a message,
    once it is given one. `uses_irqfd` says whether notifiers may give events to KVM;
    `raised` counts the interrupts that this object raised instead: lines that went up and
    messages.
    """

    def __init__(self, vm: InterruptVm, irqfd: bool = True) -> None:
        """Set the routing of `vm`, which has its irqchip. Raises KernelError."""
        self._vm = vm
        self.uses_irqfd = irqfd
        self.raised = 0
        self._messages: dict[int, Msi | None] = {}
        self._holders: dict[int, set[object]] = {}
        self._pins = list(_pins())
        self._vm.set_gsi_routing(self._pins)

    def line(self, gsi: int, level: bool, source: object = None) -> None:
        """Raise or lower the line of `gsi`, which is up while any of its sources has it up.

        `source` is whoever shares the line with others, the function behind an INTx say.
        Raises KernelError.
        """
        holders = self._holders.setdefault(gsi, set())
        was = bool(holders)
        if level:
            holders.add(source)
        else:
            holders.discard(source)
        if bool(holders) != was:
            self.raised += level
            self._vm.irq_line(gsi, level)

    def allocate(self) -> int:
        """Return a GSI for messages, which leads nowhere until `route()`."""
        gsi = next(gsi for gsi in count(LINES) if gsi not in self._messages)
        self._messages[gsi] = None
        return gsi

    def release(self, gsi: int) -> None:
        """Give back what `allocate()` returned; no notifier uses it.

        KVM hears of it when the routing is set next: nobody raises it until then.
        """
        if gsi not in self._messages:
            raise _not_allocated(gsi)
        del self._messages[gsi]

    def route(self, gsi: int, message: Msi | None) -> None:
        """As `route_all()`, of one GSI."""
        self.route_all({gsi: message})

    def route_all(self, changes: Mapping[int, Msi | None]) -> None:
        """Have each GSI send its message, or nothing. KVM takes milliseconds for each call.

        Raises InvalidArgument for a GSI that was not allocated, and KernelError (EINVAL: more
        routes than KVM has); then all is as before.
        """
        for gsi in changes:
            if gsi not in self._messages:
                raise _not_allocated(gsi)
        messages = {**self._messages, **changes}
        if messages == self._messages:
            return
        entries = [_message(gsi, msi) for gsi, msi in messages.items() if msi is not None]
        self._vm.set_gsi_routing(self._pins + entries)
        self._messages = messages

    def signal(self, message: Msi) -> bool:
        """Send `message` now; return whether a processor took it.

        One that leads nowhere is no error: the guest chooses it. Raises KernelError.
        """
        self.raised += 1
        return self._vm.signal_msi(message.address, message.data) > 0

    def connect(self, event_fd: int, gsi: int) -> None:
        """Have the eventfd raise `gsi` without us (KVM_IRQFD), also for what waits in it.

        Raises StateError if irqfds are switched off, KernelError (EBUSY: it has one, EBADF).
        """
        if not self.uses_irqfd:
            raise StateError("irqfds are switched off", hint="use GuestNotifier.to_userspace()")
        self._vm.irqfd(event_fd, gsi)

    def disconnect(self, event_fd: int, gsi: int) -> None:
        """Undo `connect()`: what came until then is raised, what comes later stays. KernelError."""
        self._vm.irqfd(event_fd, gsi, assign=False)


def _not_allocated(gsi: int) -> InvalidArgument:
    return InvalidArgument(f"GSI {gsi} was not allocated", hint="use Interrupts.allocate()")


def _pins() -> Iterator[kvm_irq_routing_entry]:
    for gsi in range(LINES):
        if gsi < 8:
            yield _pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)
        elif gsi < 16:
            yield _pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)
        if gsi != 2:  # the slave PIC: its pin of the I/O APIC is the timer's
            yield _pin(gsi, KVM_IRQCHIP_IOAPIC, gsi or 2)


def _pin(gsi: int, chip: int, pin: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip = chip
    entry.u.irqchip.pin = pin
    return entry


def _message(gsi: int, message: Msi) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo = message.address & 0xFFFFFFFF
    entry.u.msi.address_hi = message.address >> 32
    entry.u.msi.data = message.data
    return entry
