"""Interrupts of a virtio device: INTx, MSI-X, masks, and none that is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from tests.support.pci_machine import VERSION_1, Machine, begin
from vhostctl.abi import pci
from vhostctl.abi.kvm import kvm_irq_routing_entry
from vhostctl.abi.virtio_pci import VIRTIO_MSI_NO_VECTOR
from vhostctl.vmm.interrupts import Msi
from vhostctl.vmm.virtio_pci import VirtioPciState

ENABLE, MASKALL = pci.PCI_MSIX_FLAGS_ENABLE, pci.PCI_MSIX_FLAGS_MASKALL


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def test_intx_says_in_the_isr_what_it_is(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    gsi = function.gsi
    assert gsi is not None
    assert machine.read_config(driver.slot, pci.PCI_INTERRUPT_LINE, 1) == gsi
    device.calls[1].signal()
    machine.work()
    assert machine.vm.lines == {gsi: True}
    assert machine.read_config(driver.slot, pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    assert device.transport is not None
    generation = driver.get("config_generation")
    device.transport.config_changed()
    assert driver.get("config_generation") == generation + 1
    machine.work()
    assert driver.isr() == 3
    assert machine.vm.lines == {gsi: False}
    assert driver.isr() == 0
    assert not machine.read_config(driver.slot, pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT


def test_intx_that_is_disabled_comes_later(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    machine.write_config(driver.slot, pci.PCI_COMMAND, 7 | pci.PCI_COMMAND_INTX_DISABLE, 2)
    device.calls[0].signal()
    machine.work()
    assert not any(machine.vm.lines.values())
    machine.write_config(driver.slot, pci.PCI_COMMAND, 7, 2)
    assert machine.vm.lines == {function.gsi: True}
    machine.write_config(driver.slot, pci.PCI_COMMAND, 7 | pci.PCI_COMMAND_INTX_DISABLE, 2)
    assert machine.vm.lines == {function.gsi: False}


def test_a_shared_line_is_up_while_anybody_wants_it(machine: Machine) -> None:
    made = [begin(machine) for _ in range(3)]
    (one, first, driver), _, (two, third, other) = made
    assert first.gsi == third.gsi
    for its in (driver, other):
        its.start()
    for device in (one, two):
        device.calls[0].signal()
    machine.work()
    assert driver.isr() == 1
    assert machine.vm.lines[first.gsi or 0]
    assert other.isr() == 1
    assert not machine.vm.lines[first.gsi or 0]


def test_the_driver_hears_of_no_config_change_before_it_runs(machine: Machine) -> None:
    device, _, driver = begin(machine)
    assert driver.negotiate(VERSION_1)
    assert device.transport is not None
    device.transport.config_changed()
    machine.work()
    assert not machine.vm.lines.get(11)
    assert driver.get("config_generation") == 1


@pytest.mark.parametrize("irqfd", [True, False])
def test_each_vector_has_its_message(irqfd: bool) -> None:
    machine = Machine(irqfd=irqfd)
    device, _, driver = begin(machine)
    driver.start()
    messages = driver.take_vectors()
    assert len(machine.vm.irqfds) == (4 if irqfd else 0)
    for call in (*device.calls, device.config_call):
        call.signal()
        machine.work()
    assert machine.vm.sent == messages
    assert machine.interrupts.raised == (0 if irqfd else 4)
    assert not any(machine.vm.lines.values())
    machine.close()


@pytest.mark.parametrize("irqfd", [True, False])
def test_what_comes_while_masked_is_pending_and_sent_later(irqfd: bool) -> None:
    machine = Machine(irqfd=irqfd)
    device, _, driver = begin(machine)
    driver.start()
    messages = driver.take_vectors()
    driver.mask(1, True)
    for _ in range(2):
        device.calls[1].signal()
        machine.work()
    assert (machine.vm.sent, driver.pending()) == ([], 1 << 1)
    moved = Msi(0xFEE0_3000, 0x55)
    driver.write_message(1, moved)
    driver.mask(1, False)
    machine.work()
    assert (machine.vm.sent, driver.pending()) == ([moved], 0)
    driver.msix_control(ENABLE | MASKALL)
    device.calls[0].signal()
    machine.work()
    assert driver.pending() == 1
    driver.msix_control(ENABLE)
    machine.work()
    assert machine.vm.sent == [moved, messages[0]]
    assert machine.vm.lost == 0
    machine.close()


def test_a_message_may_change_while_it_is_not_masked(machine: Machine) -> None:
    device, _, driver = begin(machine)
    driver.start()
    driver.take_vectors()
    driver.write_message(0, Msi(0xFEE0_5000, 0x77))
    device.calls[0].signal()
    machine.work()
    assert machine.vm.sent == [Msi(0xFEE0_5000, 0x77)]


def test_vectors_are_shared_and_taken_back(machine: Machine) -> None:
    device, _, driver = begin(machine)
    driver.start()
    messages = driver.take_vectors()
    for queue in range(3):
        driver.set("queue_select", queue)
        driver.set("queue_msix_vector", 1)
    assert len(set(machine.vm.irqfds.values())) == 2
    for call in device.calls:
        call.signal()
    machine.work()
    assert machine.vm.sent == [messages[1]] * 3
    driver.set("queue_msix_vector", VIRTIO_MSI_NO_VECTOR)
    device.calls[2].signal()
    machine.work()
    assert len(machine.vm.sent) == 3
    driver.set("queue_msix_vector", 2)
    assert machine.vm.sent[3:] == [messages[2]]


@pytest.mark.parametrize("vector", [4, 2048, 0xFFFE])
def test_vectors_that_there_are_not_read_back_as_none(machine: Machine, vector: int) -> None:
    _, _, driver = begin(machine)
    driver.set("queue_select", 0)
    for name in ("queue_msix_vector", "msix_config"):
        driver.set(name, 0)
        assert driver.get(name) == 0
        driver.set(name, vector)
        assert driver.get(name) == VIRTIO_MSI_NO_VECTOR
    driver.set("queue_select", 3)
    driver.set("queue_msix_vector", 0)
    assert driver.get("queue_msix_vector") == VIRTIO_MSI_NO_VECTOR


def test_going_from_intx_to_msix_and_back_loses_nothing(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    device.calls[0].signal()
    messages = driver.take_vectors()
    machine.work()
    assert machine.vm.sent == [messages[0]]
    driver.mask(0, True)
    device.calls[0].signal()
    driver.msix_control(0)
    machine.work()
    assert machine.vm.lines == {function.gsi: True}
    driver.msix_control(ENABLE)
    assert machine.vm.lines == {function.gsi: False}


def test_a_route_that_kvm_refuses_is_sent_without(machine: Machine) -> None:
    device, _, driver = begin(machine)
    driver.start()
    machine.vm.refuse_routes = True
    messages = driver.take_vectors()
    device.calls[0].signal()
    machine.work()
    assert machine.vm.sent == [messages[0]]
    assert machine.interrupts.raised == 1


def test_random_masks_lose_no_event(machine: Machine) -> None:
    chance = random.Random(5)  # noqa: S311
    device, _, driver = begin(machine)
    driver.start()
    driver.take_vectors()
    masked = [False] * 4
    for _ in range(2_000):
        vector = chance.randrange(4)
        device_call = (*device.calls, device.config_call)[vector]
        device_call.signal()
        if chance.random() < 0.5:
            machine.work()
        if chance.random() < 0.5:
            masked[vector] = not masked[vector]
            driver.mask(vector, masked[vector])
        if chance.random() < 0.2:
            driver.write_message(vector, Msi(0xFEE0_0000 | chance.getrandbits(8) << 12, vector))
        machine.vm.sent.clear()
        driver.mask(vector, False)
        device_call.signal()
        machine.work()
        assert machine.vm.sent
        masked[vector] = False
    assert machine.vm.lost == 0


def test_a_table_that_is_unmasked_is_one_request(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, _, driver = begin(machine)
    driver.start()
    messages = driver.take_vectors()
    driver.msix_control(ENABLE | MASKALL)
    for vector, message in enumerate(messages):
        driver.write_message(vector, Msi(message.address, message.data + 0x20))
    requests: list[int] = []
    set_gsi_routing = machine.vm.set_gsi_routing

    def counting(entries: Sequence[kvm_irq_routing_entry]) -> None:
        requests.append(len(entries))
        set_gsi_routing(entries)

    monkeypatch.setattr(machine.vm, "set_gsi_routing", counting)
    driver.msix_control(ENABLE)
    assert len(requests) == 1
    for call in device.calls:
        call.signal()
    machine.work()
    assert [message.data for message in machine.vm.sent] == [0x60, 0x61, 0x62]
    driver.set("device_status", 0)
    assert len(requests) == 1
    assert not machine.vm.irqfds


def test_a_state_with_a_vector_that_no_register_has(machine: Machine) -> None:
    _, function, driver = begin(machine)
    driver.start()
    document = msgspec.json.encode(function.save())
    damaged = document.replace(b"65535", b"-1")
    assert damaged != document
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(damaged, type=VirtioPciState)
