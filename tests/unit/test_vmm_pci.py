"""Configuration space, BARs and the bus, as a guest's PCI code uses them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.pci_machine import Machine
from vhostctl.abi import pci
from vhostctl.errors import InvalidArgument
from vhostctl.vmm import layout
from vhostctl.vmm.pcifunction import Capability, PciFunction, PciIds

ONES = 0xFFFF_FFFF
MEMORY = pci.PCI_COMMAND_MEMORY
IO = pci.PCI_COMMAND_IO


class Memory:
    """A device that is as many bytes as are written to it."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data


class Function(PciFunction):
    """A function with one BAR of each kind, that counts what it is told."""

    def __init__(self) -> None:
        super().__init__(PciIds(0x1234, 0x5678, 0x020000, 7, 0x1AF4, 1), interrupt=True)
        self.moves = 0
        self.io = self.add_bar(0, 64, Memory(64), io=True)
        self.low = self.add_bar(1, 0x1000, Memory(0x1000))
        self.wide = self.add_bar(4, 0x4000, Memory(0x4000), wide=True)

    def bars_moved(self) -> None:
        self.moves += 1


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def test_a_guest_finds_the_host_bridge_and_trusts_the_mechanism(machine: Machine) -> None:
    machine.ports.write(0xCFB, b"\x01")
    assert machine.ports.read(0xCF8, 4) == bytes(4)
    machine.ports.write(0xCF8, (1 << 31).to_bytes(4, "little"))
    assert machine.ports.read(0xCF8, 4) == (1 << 31).to_bytes(4, "little")
    assert machine.read_config(0, 0x0A, 2) == 0x0600
    assert machine.read_config(0, 0x0E, 1) == 0


def test_ids_are_read_at_every_width_and_written_at_none(machine: Machine) -> None:
    slot = machine.pci.add(Function())
    assert machine.read_config(slot, 0) == 0x5678_1234
    assert machine.read_config(slot, 2, 2) == 0x5678
    assert machine.read_config(slot, 3, 1) == 0x56
    assert machine.read_config(slot, 8) == 0x0200_0007
    assert machine.read_config(slot, 0x2C) == 0x0001_1AF4
    machine.write_config(slot, 0, ONES)
    machine.write_config(slot, 8, ONES)
    assert machine.read_config(slot, 0) == 0x5678_1234
    assert machine.read_config(slot, 8) == 0x0200_0007


def test_nobody_else_answers(machine: Machine) -> None:
    slot = machine.pci.add(Function())
    absent = (
        1 << 31 | (slot + 1) << 11,  # the next slot
        1 << 31 | slot << 11 | 1 << 8,  # another function
        1 << 31 | slot << 11 | 1 << 16,  # another bus
        slot << 11,  # not enabled
    )
    for address in absent:
        machine.ports.write(0xCF8, address.to_bytes(4, "little"))
        machine.ports.write(0xCFC, bytes(4))
        assert machine.ports.read(0xCFC, 4) == b"\xff" * 4
    assert machine.ports.read(0xCF9, 1) == b"\xff"
    assert machine.ports.read(0xCFA, 4) == b"\xff" * 4


def test_the_address_takes_four_bytes_at_once(machine: Machine) -> None:
    machine.ports.write(0xCF8, b"\x44\0\0\x80")
    for port, data in ((0xCF8, b"\0"), (0xCF8, b"\0\0"), (0xCF9, b"\x06"), (0xCFA, b"\0\0")):
        machine.ports.write(port, data)
    assert machine.ports.read(0xCF8, 4) == b"\x44\0\0\x80"


def test_firmware_has_placed_bars_and_lines(machine: Machine) -> None:
    functions = [Function(), Function()]
    slots = [machine.pci.add(function) for function in functions]
    assert slots == [1, 2]
    places = [
        (bar.io, function.base(bar), function.base(bar) + bar.size)
        for function in functions
        for bar in function.bars
    ]
    for io, start, end in places:
        window = layout.PCI_IO if io else layout.PCI_MEMORY
        assert window.start <= start < end <= window.stop
        assert not start % (end - start)
        assert sum(io == other and start < stop and at < end for other, at, stop in places) == 1
    assert [machine.read_config(slot, 0x3C, 2) for slot in slots] == [0x100 | 11, 0x100 | 10]


@pytest.mark.parametrize("command", [0, IO | MEMORY])
def test_bars_tell_their_size(machine: Machine, command: int) -> None:
    function = Function()
    slot = machine.pci.add(function)
    machine.write_config(slot, pci.PCI_COMMAND, command, 2)
    for register, expected in ((0x10, 0xFFFFFFC1), (0x14, 0xFFFFF000), (0x20, 0xFFFFC004)):
        before = machine.read_config(slot, register)
        machine.write_config(slot, register, ONES)
        assert machine.read_config(slot, register) == expected
        machine.write_config(slot, register, before)
        assert machine.read_config(slot, register) == before
    machine.write_config(slot, 0x24, ONES)
    assert machine.read_config(slot, 0x24) == ONES
    machine.write_config(slot, 0x24, 0)
    for register in (0x18, 0x1C, 0x30):
        machine.write_config(slot, register, ONES)
        assert machine.read_config(slot, register) == 0
    mapped = [bar.mapped is not None for bar in function.bars]
    assert mapped == [bool(command)] * 3


def test_a_bar_answers_where_it_is_while_it_is_on(machine: Machine) -> None:
    function = Function()
    slot = machine.pci.add(function)
    at = machine.bar(slot, 1)
    machine.mmio.write(at, b"nobody")
    assert machine.mmio.read(at, 1) == b"\xff"
    machine.write_config(slot, pci.PCI_COMMAND, MEMORY, 2)
    machine.mmio.write(at + 8, b"here")
    assert machine.mmio.read(at + 8, 4) == b"here"
    assert machine.ports.read(machine.bar(slot, 0), 1) == b"\xff"
    machine.write_config(slot, 0x14, 0xD000_0000)
    assert machine.mmio.read(at + 8, 4) == b"\xff" * 4
    assert machine.mmio.read(0xD000_0008, 4) == b"here"
    machine.write_config(slot, pci.PCI_COMMAND, 0, 2)
    assert machine.mmio.read(0xD000_0008, 4) == b"\xff" * 4
    assert function.moves == 3


@pytest.mark.parametrize(
    "where", [0, 0x10_0000, 0xBFFF_F000, layout.IOAPIC, layout.LAPIC, 0xFFFF_F000]
)
def test_a_bar_where_something_else_is_does_not_answer(machine: Machine, where: int) -> None:
    function = Function()
    slot = machine.pci.add(function)
    machine.write_config(slot, pci.PCI_COMMAND, MEMORY, 2)
    machine.write_config(slot, 0x14, where)
    assert function.low.mapped is None
    assert machine.read_config(slot, 0x14) == where
    machine.write_config(slot, 0x24, 1)  # the 64-bit one to above 4 GiB
    assert function.wide.mapped is None


def test_a_bar_over_another_waits_until_that_has_gone(machine: Machine) -> None:
    first, second = Function(), Function()
    slots = [machine.pci.add(function) for function in (first, second)]
    for slot in slots:
        machine.write_config(slot, pci.PCI_COMMAND, MEMORY, 2)
    taken = machine.bar(slots[0], 1)
    machine.write_config(slots[1], 0x14, taken)
    assert (first.low.mapped, second.low.mapped) == (taken, None)
    machine.write_config(slots[0], 0x14, 0xD000_0000)
    assert (first.low.mapped, second.low.mapped) == (0xD000_0000, taken)
    machine.pci.remove(first)
    assert machine.read_config(slots[0], 0) == ONES
    assert machine.mmio.read(0xD000_0000, 1) == b"\xff"


def test_capabilities_are_a_list_whose_writable_bits_are_told(machine: Machine) -> None:
    heard: list[tuple[bytes, range]] = []

    def reading(body: memoryview, part: range) -> None:  # noqa: ARG001
        body[3] = 0x77

    function = Function()
    first = function.add_capability(
        Capability(
            9,
            b"abcd",
            b"\0\xf0",
            reading=reading,
            written=lambda body, part: heard.append((bytes(body), part)),
        )
    )
    second = function.add_capability(Capability(0x11, bytes(10)))
    slot = machine.pci.add(function)
    assert machine.capabilities(slot) == [(9, first), (0x11, second)]
    assert machine.read_config(slot, pci.PCI_STATUS, 2) & pci.PCI_STATUS_CAP_LIST
    machine.write_config(slot, first, ONES)
    assert heard == [(b"a\xf2cd", range(2))]
    assert machine.read_config(slot, first + 4, 2) == 0x7763
    with pytest.raises(InvalidArgument, match="full"):
        function.add_capability(Capability(9, bytes(200)))


def test_only_so_many_functions_fit(machine: Machine) -> None:
    for _ in range(31):
        machine.pci.add(PciFunction(PciIds(1, 1, 1)))
    with pytest.raises(InvalidArgument, match="slots"):
        machine.pci.add(PciFunction(PciIds(1, 1, 1)))
    with pytest.raises(InvalidArgument, match="power of two"):
        PciFunction(PciIds(1, 1, 1)).add_bar(0, 24, Memory(24))


def test_what_the_guest_wrote_is_brought_back(machine: Machine) -> None:
    slot = machine.pci.add(Function())
    machine.write_config(slot, pci.PCI_COMMAND, MEMORY, 2)
    machine.write_config(slot, 0x14, 0xD000_0000)
    machine.read_config(slot, 0x2C)
    state = machine.pci.save()
    function = machine.pci._slots[slot]
    assert function is not None
    config = function.save_config()

    other = Machine()
    again = Function()
    assert other.pci.add(again) == slot
    again.restore_config(config)
    other.pci.restore(state)
    assert again.low.mapped == 0xD000_0000
    assert other.ports.read(0xCFC, 4) == b"\xf4\x1a\x01\0"
    with pytest.raises(InvalidArgument, match="another PCI function"):
        PciFunction(PciIds(1, 1, 1)).restore_config(config)
    other.close()


def test_no_access_to_the_ports_raises(machine: Machine) -> None:
    chance = random.Random(20240501)  # noqa: S311
    functions = [Function() for _ in range(3)]
    for function in functions:
        machine.pci.add(function)
    for _ in range(20_000):
        port, length = chance.randrange(0xCF8, 0xD00), chance.choice((1, 2, 4))
        if chance.random() < 0.5:
            address = chance.getrandbits(31) & 0x18FC | 1 << 31
            machine.ports.write(0xCF8, address.to_bytes(4, "little"))
        elif chance.random() < 0.5:
            machine.ports.write(port, chance.randbytes(length))
        else:
            assert len(machine.ports.read(port, length)) == length
    assert sum(function.moves for function in functions) > 5
