"""virtio-pci as a legacy driver sees it, in its I/O BAR."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pci_machine import Machine, begin
from vhostctl.abi import pci
from vhostctl.abi import virtio_pci as abi
from vhostctl.abi.virtio_pci import VIRTIO_MSI_NO_VECTOR
from vhostctl.control.rings import RingPlacement

ENABLE = pci.PCI_MSIX_FLAGS_ENABLE


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


class Legacy:
    """A legacy driver: offsets into the I/O BAR."""

    def __init__(self, machine: Machine, slot: int) -> None:
        self.machine = machine
        machine.write_config(slot, pci.PCI_COMMAND, 7, 2)
        self.base = machine.bar(slot, 0)

    def get(self, offset: int, width: int) -> int:
        return int.from_bytes(self.machine.ports.read(self.base + offset, width), "little")

    def set(self, offset: int, value: int, width: int) -> None:
        self.machine.ports.write(self.base + offset, value.to_bytes(width, "little"))

    def start(self) -> None:
        for status in (0, 1, 3):
            self.set(abi.VIRTIO_PCI_STATUS, status, 1)
        self.set(abi.VIRTIO_PCI_GUEST_FEATURES, 0x21, 4)
        for queue in range(3):
            self.set(abi.VIRTIO_PCI_QUEUE_SEL, queue, 2)
            self.set(abi.VIRTIO_PCI_QUEUE_PFN, 0x100 + 0x10 * queue, 4)
        self.set(abi.VIRTIO_PCI_STATUS, 7, 1)


def test_a_legacy_driver_works(machine: Machine) -> None:
    device, function = machine.add()
    assert function.slot is not None
    driver = Legacy(machine, function.slot)
    assert driver.get(abi.VIRTIO_PCI_HOST_FEATURES, 4) == 0x23
    driver.set(abi.VIRTIO_PCI_QUEUE_SEL, 2, 2)
    driver.set(abi.VIRTIO_PCI_QUEUE_NUM, 16, 2)
    assert driver.get(abi.VIRTIO_PCI_QUEUE_NUM, 2) == 64
    driver.set(abi.VIRTIO_PCI_QUEUE_SEL, 3, 2)
    assert driver.get(abi.VIRTIO_PCI_QUEUE_NUM, 2) == 0
    driver.start()
    assert driver.get(abi.VIRTIO_PCI_STATUS, 1) == 7
    assert device.started is not None
    features, rings = device.started
    assert features == 0x21
    assert rings[0] == RingPlacement(256, 0x10_0000, 0x10_1000, 0x10_2000)
    assert rings[2] == RingPlacement(64, 0x12_0000, 0x12_0400, 0x12_1000)
    kicks = [kick.fileno() for kick in device.kicks if kick is not None]
    port = driver.base + abi.VIRTIO_PCI_QUEUE_NOTIFY
    assert machine.vm.doorbells == {(port, 2, n, True): fd for n, fd in enumerate(kicks)}
    driver.set(abi.VIRTIO_PCI_QUEUE_NOTIFY, 2, 2)
    driver.set(abi.VIRTIO_PCI_QUEUE_NOTIFY, 900, 2)
    assert device.notified == [2]
    device.calls[0].signal()
    machine.work()
    assert machine.vm.lines == {function.gsi: True}
    assert driver.get(abi.VIRTIO_PCI_ISR, 1) == 1
    driver.set(abi.VIRTIO_PCI_QUEUE_SEL, 0, 2)
    driver.set(abi.VIRTIO_PCI_QUEUE_PFN, 0, 4)
    assert driver.get(abi.VIRTIO_PCI_QUEUE_PFN, 4) == 0x100
    driver.set(abi.VIRTIO_PCI_STATUS, 0, 1)
    assert driver.get(abi.VIRTIO_PCI_QUEUE_PFN, 4) == 0
    assert device.started is None


def test_the_legacy_configuration_moves_with_msix(machine: Machine) -> None:
    device, _, modern = begin(machine)
    driver = Legacy(machine, modern.slot)
    assert driver.get(20, 4) == 2
    assert driver.get(18, 4) == 2 << 16
    modern.msix_control(ENABLE)
    assert driver.get(24, 4) == 2
    assert driver.get(20, 2) == VIRTIO_MSI_NO_VECTOR
    driver.set(abi.VIRTIO_MSI_CONFIG_VECTOR, 3, 2)
    driver.set(abi.VIRTIO_MSI_QUEUE_VECTOR, 0, 2)
    assert driver.get(20, 4) == 3
    driver.set(24 + 5, 0x22, 1)
    assert device.config[5] == 0x22
    modern.msix_control(0)
    assert driver.get(20 + 5, 1) == 0x22
    assert driver.get(100, 4) == 0
