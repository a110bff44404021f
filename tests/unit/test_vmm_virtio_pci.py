"""virtio-pci as a modern driver sees it: probe, rings, status, doorbells."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.pci_machine import VERSION_1, Driver, Machine, begin
from vhostctl.abi import pci
from vhostctl.abi import virtio_pci as abi
from vhostctl.abi.virtio_pci import VIRTIO_MSI_NO_VECTOR
from vhostctl.control.memtable import MemoryTable
from vhostctl.control.rings import RingPlacement

NEEDS_RESET = 0x40


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


@pytest.mark.parametrize(
    ("transitional", "ids"), [(True, (0x1000, 0, 1)), (False, (0x1041, 1, 0x1041))]
)
def test_the_ids_are_what_the_driver_matches(
    machine: Machine, transitional: bool, ids: tuple[int, int, int]
) -> None:
    _, function = machine.add(transitional=transitional)
    assert function.slot is not None
    read = machine.read_config
    assert read(function.slot, 0, 2) == read(function.slot, 0x2C, 2) == 0x1AF4
    found = read(function.slot, 2, 2), read(function.slot, 8, 1), read(function.slot, 0x2E, 2)
    assert found == ids
    assert read(function.slot, 0x0A, 2) == 0x0200
    assert bool(read(function.slot, 0x10) & 1) == transitional


def test_the_capabilities_lead_to_the_structures(machine: Machine) -> None:
    _, function, driver = begin(machine)
    assert set(driver.structures) == {1, 2, 3, 4, 5}
    assert function.slot is not None
    lengths = {}
    for kind, at in machine.capabilities(function.slot):
        if kind == pci.PCI_CAP_ID_VNDR:
            length = machine.read_config(function.slot, at + 2, 1)
            assert length == 16 + 4 * (machine.read_config(function.slot, at + 3, 1) in (2, 5))
            lengths[machine.read_config(function.slot, at + 3, 1)] = machine.read_config(
                function.slot, at + 12
            )
    assert lengths == {1: 56, 2: 12, 3: 1, 4: 4096, 5: 0}
    assert driver.multiplier == 4
    config = driver.structures[abi.VIRTIO_PCI_CAP_DEVICE_CFG]
    assert machine.mmio.read(config, 6) == b"\x02\0\0\0\0\x01"
    machine.mmio.write(config + 5, b"\x09")
    assert machine.mmio.read(config + 4, 4) == b"\0\x09\x01\0"


def test_features_are_offered_and_acknowledged_in_words(machine: Machine) -> None:
    device, _, driver = begin(machine)
    for select, expected in ((0, 0x23), (1, 9), (2, 0), (0xFFFFFFFF, 0)):
        driver.set("device_feature_select", select)
        assert driver.get("device_feature") == expected
    driver.set("guest_feature_select", 0xFFFFFFFF)
    driver.set("guest_feature", 0xFFFFFFFF)
    assert driver.get("guest_feature") == 0
    assert driver.negotiate(VERSION_1 | 1)
    driver.set("guest_feature_select", 0)
    driver.set("guest_feature", 0x21)
    assert driver.get("guest_feature") == 1
    driver.set("device_status", 15)
    assert device.started is not None
    assert device.started[0] == VERSION_1 | 1


@pytest.mark.parametrize("features", [VERSION_1 | 2, VERSION_1 | 4, 1 << 100])
def test_features_that_do_not_work_are_refused(machine: Machine, features: int) -> None:
    device, _, driver = begin(machine)
    driver.set("guest_feature_select", 3)
    driver.set("guest_feature", features >> 96)
    if features >> 96:
        driver.set("device_status", 11)
        assert driver.get("device_status") == 3
    else:
        assert not driver.negotiate(features)
    driver.set("device_status", 15)
    assert driver.get("device_status") & NEEDS_RESET
    assert device.started is None


def test_rings_are_where_the_driver_put_them(machine: Machine) -> None:
    device, function, driver = begin(machine)
    assert driver.negotiate(VERSION_1)
    assert driver.get("num_queues") == 3
    driver.set("queue_select", 2)
    assert driver.get("queue_size") == 64
    for size in (0, 48, 128, 0xFFFF):
        driver.set("queue_size", size)
        assert driver.get("queue_size") == 64
    driver.place(0, 128, 0xFEDC_BA98_7000)
    assert driver.get("queue_enable") == 1
    assert driver.get("queue_desc_hi") == 0xFEDC
    driver.set("queue_size", 32)
    driver.set("queue_desc_lo", 0)
    driver.set("queue_enable", 0)
    driver.set("queue_select", 7)
    assert [driver.get(name) for name in ("queue_size", "queue_enable", "queue_desc_lo")] == [0] * 3
    driver.place(7, 64, 0x1000)
    driver.set("device_status", 15)
    assert device.started is not None
    placed = list(device.started[1])
    at = 0xFEDC_BA98_7000
    assert placed == [RingPlacement(128, at, at + 0x1000, at + 0x2000), None, None]
    assert list(device.started[1]) == function.rings


def test_a_reset_forgets_everything(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    driver.take_vectors()
    driver.mask(0, True)
    device.calls[0].signal()
    assert machine.vm.doorbells
    driver.set("device_status", 0)
    assert driver.get("device_status") == 0
    assert device.started is None
    assert not machine.vm.doorbells
    assert not machine.vm.irqfds
    driver.set("queue_select", 0)
    names = ("queue_enable", "queue_desc_lo", "queue_size", "queue_msix_vector", "msix_config")
    values = [driver.get(name) for name in names]
    assert values == [0, 0, 256, VIRTIO_MSI_NO_VECTOR, VIRTIO_MSI_NO_VECTOR]
    assert not function.running
    machine.work()
    assert not machine.vm.sent
    driver.start()
    assert driver.get("device_status") == 15
    driver.take_vectors()
    assert not machine.vm.sent


def test_a_device_that_does_not_start_says_so(machine: Machine) -> None:
    device, _, driver = begin(machine)
    device.refuses = True
    assert driver.negotiate(VERSION_1)
    messages = driver.take_vectors()
    driver.place(2, 64, 0x1000)
    driver.set("device_status", 15)
    driver.set("device_status", 15)
    assert driver.get("device_status") == 15 | NEEDS_RESET
    machine.work()
    assert machine.vm.sent == [messages[3]]
    assert not machine.vm.doorbells
    machine.mmio.write(driver.doorbell(2), bytes(2))
    assert not device.notified
    device.refuses = False
    driver.start()
    assert driver.get("device_status") == 15


def test_doorbells_are_kvms_while_the_device_runs(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    kicks = [kick.fileno() for kick in device.kicks if kick is not None]
    expected = {(driver.doorbell(n), 0, None, False): fd for n, fd in enumerate(kicks)}
    assert machine.vm.doorbells == expected
    machine.mmio.write(driver.doorbell(2), b"\2\0")
    assert device.notified == [2]
    assert function.doorbell_exits == 0
    machine.mmio.write(driver.doorbell(1), b"\1\0")  # one that went past KVM's ioeventfd
    assert function.doorbell_exits == 1
    assert device.kicks[1] is not None
    assert device.kicks[1].drain() == 1
    for queue in (3, 1000, 1023):
        machine.mmio.write(driver.structures[2] + 4 * queue, bytes(4))
    assert function.doorbell_exits == 1
    driver.set("device_status", 0)
    assert function.doorbell_exits == 1


def test_without_ioeventfd_every_doorbell_is_an_exit() -> None:
    machine = Machine()
    device, function = machine.add(ioeventfd=False)
    assert function.slot is not None
    driver = Driver(machine, function.slot)
    driver.start()
    assert not machine.vm.doorbells
    for _ in range(3):
        machine.mmio.write(driver.doorbell(0), bytes(2))
    assert function.doorbell_exits == 3
    assert device.kicks[0] is not None
    assert device.kicks[0].drain() == 3
    machine.close()


def test_doorbells_move_with_the_bar(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    _, function, driver = begin(machine)
    driver.start()
    before = set(machine.vm.doorbells)
    register = pci.PCI_BASE_ADDRESS_0 + 4 * 4
    commits: list[MemoryTable] = []
    commit = machine.doorbells.commit

    def counting(before: MemoryTable, after: MemoryTable) -> None:
        commits.append(after)
        commit(before, after)

    monkeypatch.setattr(machine.doorbells, "commit", counting)
    machine.write_config(driver.slot, register, 0xE000_0000)
    assert len(commits) == 1
    moved = {(address - 0xE000_0000 & 0xFFFF, *rest) for address, *rest in machine.vm.doorbells}
    offset = driver.structures[2] & 0x3FFF
    assert moved == {(offset + 4 * n, 0, None, False) for n in range(2)}
    assert not before & set(machine.vm.doorbells)
    machine.write_config(driver.slot, pci.PCI_COMMAND, pci.PCI_COMMAND_MASTER, 2)
    assert not machine.vm.doorbells
    machine.write_config(driver.slot, pci.PCI_COMMAND, 7, 2)
    assert len(machine.vm.doorbells) == 2
    machine.write_config(driver.slot, register, 0x1000)
    assert not machine.vm.doorbells
    assert function.running


def test_a_device_that_is_no_bus_master_any_more_has_stopped(machine: Machine) -> None:
    device, function, driver = begin(machine)
    machine.write_config(driver.slot, pci.PCI_COMMAND, 3, 2)
    driver.start()  # a legacy driver may become one later
    running = [function.running]
    for command in (7, 3):
        machine.write_config(driver.slot, pci.PCI_COMMAND, command, 2)
        running.append(function.running)
    assert running == [True, True, False]
    assert device.started is None
    assert not machine.vm.doorbells
    assert driver.get("device_status") == 0
    machine.write_config(driver.slot, pci.PCI_COMMAND, 7, 2)
    driver.start()
    assert device.started is not None


def test_a_function_that_leaves_lets_go_of_its_line(machine: Machine) -> None:
    device, function, driver = begin(machine)
    driver.start()
    device.calls[0].signal()
    machine.work()
    assert any(machine.vm.lines.values())
    machine.pci.remove(function)
    assert not any(machine.vm.lines.values())


def test_two_functions_swap_places(machine: Machine) -> None:
    drivers = [begin(machine)[2] for _ in range(2)]
    for driver in drivers:
        driver.start()
    register = pci.PCI_BASE_ADDRESS_0 + 4 * 4
    first, second = (machine.bar(driver.slot, 4) for driver in drivers)
    before = {place[0]: fd for place, fd in machine.vm.doorbells.items()}
    machine.write_config(drivers[0].slot, register, second)
    assert len(machine.vm.doorbells) == 2
    machine.write_config(drivers[1].slot, register, first)
    after = {place[0]: fd for place, fd in machine.vm.doorbells.items()}
    assert after == {
        (at - first + second if at < second else at - second + first): fd
        for at, fd in before.items()
    }


def test_doorbells_that_kvm_refuses_are_answered_here(machine: Machine) -> None:
    device, function, driver = begin(machine)
    machine.vm.refused = range(0xC000_0000, 0xD800_0000)
    driver.start()
    assert function.running
    machine.mmio.write(driver.doorbell(0), bytes(2))
    assert function.doorbell_exits == 1
    machine.write_config(driver.slot, 0x20, 0xE000_0000)
    assert len(machine.vm.doorbells) == 2
    machine.write_config(driver.slot, 0x20, 0xD000_0000)
    assert not machine.vm.doorbells
    assert device.started is not None


def test_a_virtqueue_that_is_not_enabled_has_no_doorbell(machine: Machine) -> None:
    device, function, driver = begin(machine)
    assert driver.negotiate(VERSION_1)
    driver.place(1, 64, 0x1000)
    driver.set("device_status", 15)
    assert [place[0] for place in machine.vm.doorbells] == [driver.doorbell(1)]
    for queue in (0, 2):
        machine.mmio.write(driver.doorbell(queue), bytes(2))
    assert function.doorbell_exits == 0
    assert not device.notified


def test_a_modern_only_device_has_no_ports(machine: Machine) -> None:
    _, function = machine.add(transitional=False)
    assert function.slot is not None
    driver = Driver(machine, function.slot)
    driver.start()
    assert len(machine.vm.doorbells) == 2
    assert machine.ports.read(0xC000, 4) == b"\xff" * 4


def test_firmware_reaches_the_structures_by_configuration_space(machine: Machine) -> None:
    device, _, driver = begin(machine)
    at = next(
        at
        for kind, at in machine.capabilities(driver.slot)
        if kind == pci.PCI_CAP_ID_VNDR and machine.read_config(driver.slot, at + 3, 1) == 5
    )

    def go(offset: int, length: int, bar: int = 4) -> None:
        machine.write_config(driver.slot, at + 4, bar, 1)
        machine.write_config(driver.slot, at + 8, offset)
        machine.write_config(driver.slot, at + 12, length)

    go(18, 2)
    assert machine.read_config(driver.slot, at + 16, 2) == 3
    go(20, 1)
    machine.write_config(driver.slot, at + 16, 1, 1)
    assert driver.get("device_status") == 1
    go(0x2000, 4)
    assert machine.read_config(driver.slot, at + 16) == 2
    for offset, length, bar in ((0, 8, 4), (0, 4, 0), (1, 4, 4), (0xFFFF_FFFC, 4, 4), (0, 0, 9)):
        go(offset, length, bar)
        machine.write_config(driver.slot, at + 16, 0)
        machine.read_config(driver.slot, at + 16)
    assert driver.get("device_status") == 1
    assert device.resets == 0


@pytest.mark.parametrize("seed", range(2))
def test_no_access_raises(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    machine = Machine(irqfd=bool(seed))
    device, function, driver = begin(machine)
    bars = {bar.index: bar for bar in function.bars}
    started = 0
    for step in range(20_000):
        if step % 500 == 0:
            machine.write_config(driver.slot, pci.PCI_COMMAND, 7, 2)
            for index, at in ((0, 0xC000), (1, 0xC000_0000), (4, 0xC800_0000), (5, 0)):
                machine.write_config(driver.slot, 0x10 + 4 * index, at)
            driver = Driver(machine, driver.slot)
            if chance.random() < 0.7:
                driver.start()
            if chance.random() < 0.7:
                driver.take_vectors()
        started += device.started is not None
        length = chance.choice((1, 2, 4, 8))
        if chance.random() < 0.1:
            register = chance.randrange(0, 256, min(length, 4))
            machine.write_config(driver.slot, register, chance.getrandbits(8), min(length, 4))
            machine.read_config(driver.slot, register, min(length, 4))
            continue
        bar = bars[chance.choice((0, 1, 4))]
        base = chance.choice((0, 0, 0x1000, 0x2000, 0x3000)) if bar.size > 0x1000 else 0
        offset = min(base + chance.randrange(80), bar.size - length)
        where = machine.ports if bar.io else machine.mmio
        address = function.base(bar) + offset
        if chance.random() < 0.6:
            data = chance.choice((chance.randbytes(length), bytes([chance.randrange(16)] * length)))
            where.write(address, data)
        else:
            assert len(where.read(address, length)) == length
        if chance.random() < 0.2:
            chance.choice((*device.calls, device.config_call)).signal()
            machine.work()
    assert started > 1000
    assert device.resets > 10
    machine.close()
