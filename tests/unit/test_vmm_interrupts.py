"""Where GSIs lead, lines that are shared, and what Python raised itself."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from vhostctl.abi import kvm
from vhostctl.errors import InvalidArgument, KernelError, StateError
from vhostctl.vmm.interrupts import LINES, Interrupts, Msi

MESSAGE = Msi(0xFEE01000, 0x41)


class Chips:
    """Keeps what it was told; refuses routes if `full`."""

    def __init__(self) -> None:
        self.routes: dict[int, list[tuple[int, ...]]] = {}
        self.set = 0
        self.full = False
        self.lines: list[tuple[int, bool]] = []
        self.sent: list[tuple[int, int]] = []
        self.takers = 1
        self.connected: dict[int, int] = {}

    def set_gsi_routing(self, entries: Sequence[kvm.kvm_irq_routing_entry]) -> None:
        if self.full:
            raise KernelError(errno.EINVAL, "KVM_SET_GSI_ROUTING", "vm")
        self.set += 1
        self.routes = {}
        for entry in entries:
            if entry.type == kvm.KVM_IRQ_ROUTING_IRQCHIP:
                way: tuple[int, ...] = (entry.u.irqchip.irqchip, entry.u.irqchip.pin)
            else:
                assert entry.type == kvm.KVM_IRQ_ROUTING_MSI
                way = (entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data)
            self.routes.setdefault(entry.gsi, []).append(way)

    def irq_line(self, gsi: int, level: bool) -> None:
        self.lines.append((gsi, level))

    def signal_msi(self, address: int, data: int) -> int:
        self.sent.append((address, data))
        return self.takers

    def irqfd(self, event_fd: int, gsi: int, *, assign: bool = True) -> None:
        if assign:
            self.connected[event_fd] = gsi
        else:
            assert self.connected.pop(event_fd) == gsi


def test_the_pins_are_wired_as_in_a_pc() -> None:
    chips = Chips()
    Interrupts(chips)
    master, slave, ioapic = 0, 1, 2
    assert chips.routes[0] == [(master, 0), (ioapic, 2)]
    assert chips.routes[1] == [(master, 1), (ioapic, 1)]
    assert chips.routes[2] == [(master, 2)]
    assert chips.routes[9] == [(slave, 1), (ioapic, 9)]
    assert chips.routes[23] == [(ioapic, 23)]
    pins = [way for ways in chips.routes.values() for way in ways]
    assert sorted(chips.routes) == list(range(LINES))
    assert len(set(pins)) == len(pins) == 16 + 23


def test_a_message_has_a_gsi_while_it_is_routed() -> None:
    chips = Chips()
    interrupts = Interrupts(chips)
    pins = dict(chips.routes)
    first, second = interrupts.allocate(), interrupts.allocate()
    assert (first, second) == (24, 25)
    assert chips.set == 1
    interrupts.route(second, Msi(0x1234_FEE00000, 0xFFFFFFFF))
    assert chips.routes == pins | {25: [(0xFEE00000, 0x1234, 0xFFFFFFFF)]}
    interrupts.route(second, Msi(0x1234_FEE00000, 0xFFFFFFFF))
    assert chips.set == 2  # no change, no request
    interrupts.route(second, MESSAGE)
    interrupts.route(first, MESSAGE)
    assert chips.routes == pins | {gsi: [(0xFEE01000, 0, 0x41)] for gsi in (24, 25)}
    interrupts.release(first)
    assert chips.set == 4  # KVM hears of it with the next
    interrupts.route(second, None)
    assert chips.routes == pins
    assert interrupts.allocate() == 24
    with pytest.raises(InvalidArgument, match="GSI 26 was not allocated"):
        interrupts.route(26, MESSAGE)
    with pytest.raises(InvalidArgument, match="GSI 4 was not allocated"):
        interrupts.release(4)


def test_a_route_that_is_refused_changes_nothing() -> None:
    chips = Chips()
    interrupts = Interrupts(chips)
    first, second = interrupts.allocate(), interrupts.allocate()
    interrupts.route(first, MESSAGE)
    routes = chips.routes
    chips.full = True
    for change in (Msi(0, 0), None):
        with pytest.raises(KernelError):
            interrupts.route_all({second: MESSAGE, first: change})
    chips.full = False
    interrupts.route(second, Msi(4, 5))
    assert chips.routes == routes | {second: [(4, 0, 5)]}


def test_a_shared_line_is_up_while_anybody_has_it_up() -> None:
    chips = Chips()
    interrupts = Interrupts(chips)
    for source, level in ((1, True), (2, True), (2, True), (1, False), (1, False), (2, False)):
        interrupts.line(11, bool(level), source)
    interrupts.line(11, False, 3)
    assert chips.lines == [(11, True), (11, False)]
    assert interrupts.raised == 1
    interrupts.line(10, True)
    interrupts.line(11, True, 1)
    assert interrupts.raised == 3


def test_messages_that_python_sends_are_counted() -> None:
    chips = Chips()
    interrupts = Interrupts(chips)
    assert interrupts.signal(MESSAGE)
    chips.takers = 0
    assert not interrupts.signal(Msi(0, 0))
    assert chips.sent == [(0xFEE01000, 0x41), (0, 0)]
    assert interrupts.raised == 2


def test_irqfds_and_without_them() -> None:
    chips = Chips()
    interrupts = Interrupts(chips)
    interrupts.connect(7, 24)
    assert chips.connected == {7: 24}
    interrupts.disconnect(7, 24)
    assert not chips.connected
    without = Interrupts(chips, irqfd=False)
    assert (interrupts.uses_irqfd, without.uses_irqfd) == (True, False)
    with pytest.raises(StateError, match="switched off"):
        without.connect(7, 24)
    assert interrupts.raised == without.raised == 0
