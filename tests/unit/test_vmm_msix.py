"""The MSI-X table, whatever a guest writes into it, and what is made of it."""

from __future__ import annotations

import random

import pytest

from vhostctl.abi import pci
from vhostctl.errors import InvalidArgument
from vhostctl.vmm.interrupts import Msi
from vhostctl.vmm.msix import Msix
from vhostctl.vmm.pcifunction import PciFunction, PciIds

ON = pci.PCI_MSIX_FLAGS_ENABLE
MASKALL = pci.PCI_MSIX_FLAGS_MASKALL


class Rig:
    """An Msix behind the configuration space of a function."""

    def __init__(self, count: int) -> None:
        self.changes: list[tuple[int, Msi | None]] = []
        self.switches: list[bool] = []
        self.pending: set[int] = set()
        self.msix = Msix(
            count,
            lambda messages: self.changes.extend(messages.items()),
            lambda vector: vector in self.pending,
            lambda: self.switches.append(self.msix.enabled),
        )
        self.function = PciFunction(PciIds(1, 1, 1))
        self.at = self.function.add_capability(self.msix.capability(1))

    def control(self, flags: int) -> None:
        self.function.write_config(self.at + pci.PCI_MSIX_FLAGS, flags.to_bytes(2, "little"))

    def put(self, vector: int, message: Msi, masked: bool = False) -> None:
        entry = message.address.to_bytes(8, "little") + message.data.to_bytes(4, "little")
        for word in range(0, 12, 4):
            self.msix.write(16 * vector + word, entry[word : word + 4])
        self.msix.write(16 * vector + 12, masked.to_bytes(4, "little"))

    def told(self) -> list[tuple[int, Msi | None]]:
        changes, self.changes = self.changes, []
        return changes


ONE, TWO = Msi(0xFEE0_1000, 0x41), Msi(0x1_FEE0_2000, 0x42)


def test_the_capability_says_where_the_table_is() -> None:
    rig = Rig(5)
    assert rig.function.read_config(rig.at, 4) == b"\x11\0\x04\0"
    table, pba = (
        int.from_bytes(rig.function.read_config(rig.at + at, 4), "little") for at in (4, 8)
    )
    assert (table, pba & 7) == (1, 1)
    assert 5 * 16 <= pba & ~7 < rig.msix.bar_size
    rig.control(0xFFFF)
    assert rig.function.read_config(rig.at + 2, 2) == b"\x04\xc0"
    assert rig.msix.enabled


def test_a_message_is_told_when_nothing_masks_it() -> None:
    rig = Rig(3)
    rig.put(1, ONE)
    assert not rig.told()
    rig.control(ON | MASKALL)
    assert (rig.told(), rig.switches) == ([], [True])
    rig.control(ON)
    assert rig.told() == [(1, ONE)]
    rig.put(2, TWO)
    assert rig.told() == [(2, TWO)]
    rig.msix.write(1 * 16 + 12, b"\1\0\0\0")
    assert rig.told() == [(1, None)]
    assert rig.msix.message(1) is None
    rig.put(1, TWO)
    assert rig.told() == [(1, TWO)]
    rig.control(ON | MASKALL)
    assert rig.told() == [(1, None), (2, None)]
    rig.control(ON)
    rig.told()
    rig.control(0)
    assert rig.told() == [(1, None), (2, None)]
    assert rig.switches == [True, False]


def test_the_address_changes_half_at_a_time() -> None:
    rig = Rig(1)
    rig.control(ON)
    rig.put(0, ONE)
    rig.told()
    rig.msix.write(0, TWO.address.to_bytes(8, "little"))
    assert rig.told() == [(0, Msi(TWO.address, ONE.data))]
    rig.msix.write(4, bytes(4))
    assert rig.told() == [(0, Msi(TWO.address & 0xFFFFFFFF, ONE.data))]
    rig.msix.write(9, b"\x99")
    assert rig.told() == [(0, Msi(TWO.address & 0xFFFFFFFF, 0x9941))]


def test_only_the_mask_bit_of_the_control_word_is_kept() -> None:
    rig = Rig(2)
    rig.msix.write(12, b"\xff" * 4)
    assert rig.msix.read(12, 4) == b"\1\0\0\0"
    rig.msix.write(13, b"\xff\xff")
    assert rig.msix.read(8, 8) == b"\0\0\0\0\1\0\0\0"


def test_the_pba_says_what_is_pending_and_cannot_be_written() -> None:
    rig = Rig(70)
    pba = int.from_bytes(rig.function.read_config(rig.at + 8, 4), "little") & ~7
    rig.pending = {0, 9, 69}
    assert int.from_bytes(rig.msix.read(pba, 8), "little") == 1 << 0 | 1 << 9
    assert int.from_bytes(rig.msix.read(pba + 8, 4), "little") == 1 << 5
    assert rig.msix.read(pba + 1, 1) == b"\2"
    rig.msix.write(pba, b"\xff" * 8)
    rig.pending = set()
    assert rig.msix.read(pba, 8) == bytes(8)


@pytest.mark.parametrize("count", [0, 2049])
def test_so_many_vectors_there_cannot_be(count: int) -> None:
    with pytest.raises(InvalidArgument, match="vectors"):
        Rig(count)


def test_the_greatest_table_fits_its_bar() -> None:
    rig = Rig(2048)
    rig.put(2047, ONE)
    rig.control(ON)
    assert rig.told() == [(2047, ONE)]
    rig.pending = {2047}
    pba = int.from_bytes(rig.function.read_config(rig.at + 8, 4), "little") & ~7
    assert rig.msix.read(pba + 2047 // 8, 1) == b"\x80"
    assert pba + 256 <= rig.msix.bar_size


def test_state_is_brought_back() -> None:
    rig, again = Rig(2), Rig(2)
    rig.control(ON)
    rig.put(1, TWO)
    again.msix.restore(rig.msix.save())
    assert (again.told(), again.switches) == ([(1, TWO)], [True])
    with pytest.raises(InvalidArgument, match="table"):
        Rig(3).msix.restore(rig.msix.save())


def test_no_access_raises_and_what_is_told_is_what_there_is() -> None:
    chance = random.Random(7)  # noqa: S311
    rig = Rig(6)
    for _ in range(20_000):
        offset, length = chance.randrange(rig.msix.bar_size - 8), chance.choice((1, 2, 4, 8))
        if chance.random() < 0.7:
            offset %= 100
        if chance.random() < 0.05:
            rig.control(chance.getrandbits(16))
        elif chance.random() < 0.7:
            rig.msix.write(offset, chance.randbytes(length))
        else:
            assert len(rig.msix.read(offset, length)) == length
    last = dict(rig.told())
    assert all(rig.msix.message(vector) == message for vector, message in last.items())
    assert len(last) == 6
