"""A virtio function that goes on in another machine, and one that goes."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import msgspec
import pytest

from tests.support.pci_machine import VERSION_1, FakeDevice, Machine, begin
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.vmm.virtio_pci import VirtioPci, VirtioPciState


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def carry_over(function: VirtioPci, device: FakeDevice) -> tuple[Machine, FakeDevice, VirtioPci]:
    """Save, and restore in another machine by way of JSON."""
    text = msgspec.json.encode(function.save())
    machine = Machine()
    again, other = machine.add(FakeDevice(features=device.features))
    other.restore(msgspec.json.decode(text, type=VirtioPciState))
    return machine, again, other


def test_another_process_goes_on_with_vectors_and_doorbells(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    messages = driver.take_vectors()
    machine.write_config(driver.slot, 0x20, 0xE000_0000)
    driver.mask(1, True)
    device.calls[1].signal()
    other, again, moved = carry_over(function, device)
    assert driver.pending() == 1 << 1
    assert again.started is None
    assert again.resets == 0
    assert moved.running
    assert moved.rings == function.rings
    assert set(other.vm.doorbells) == set(machine.vm.doorbells)
    driver.machine = other
    assert driver.pending() == 1 << 1
    again.calls[0].signal()
    other.work()
    driver.mask(1, False)
    assert other.vm.sent == messages[:2]
    assert driver.slot == moved.slot
    other.close()


def test_another_process_goes_on_with_intx(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    device.calls[0].signal()
    machine.work()
    device.config_call.signal()
    other, _, moved = carry_over(function, device)
    assert other.vm.lines == {moved.gsi: True}
    other.work()
    driver.machine = other
    assert driver.isr() == 3
    assert other.vm.lines == {moved.gsi: False}
    other.close()


def test_state_of_another_device_is_refused(machine: Machine) -> None:
    _, function, driver = begin(machine)
    driver.start(VERSION_1 | 1)
    state = function.save()
    other = Machine()
    _, fewer = other.add(FakeDevice(features=VERSION_1))
    with pytest.raises(InvalidArgument, match="features"):
        fewer.restore(state)
    state.driver.queues.pop()
    with pytest.raises(InvalidArgument, match="virtqueues"):
        function.restore(state)
    events = msgspec.structs.replace(state.events, vectors=(0,))
    with pytest.raises(InvalidArgument, match="sources"):
        function._events.restore(events)
    _, modern = other.add(transitional=False)
    with pytest.raises(InvalidArgument, match="another PCI function"):
        modern.restore(state)
    other.close()


def test_closing_twice_resets_once(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    device.calls[0].signal()
    machine.work()
    resets = device.resets
    function.close()
    function.close()
    assert device.resets == resets + 1
    assert not machine.vm.doorbells
    assert not any(machine.vm.lines.values())
    assert machine.read_config(driver.slot, 0) == 0xFFFFFFFF


def test_a_device_that_cannot_be_reset_still_goes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: FakeDevice) -> None:
        raise KernelError(errno.EIO, "VHOST_NET_SET_BACKEND", "device")

    _, function, driver = begin(machine)
    driver.start()
    with monkeypatch.context() as patch:
        patch.setattr(FakeDevice, "reset", refuse)
        with pytest.raises(KernelError):
            function.close()
    assert not machine.loop.watched
    assert not machine.vm.doorbells
    assert function.bus is None
