"""Who answers at which address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.errors import InvalidArgument
from vhostctl.vmm.bus import Bus


class Model:
    """Reads as its number, and writes down what is written to it."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.log: list[tuple[int, bytes]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.log.append((offset, b""))
        return bytes([self.number] * length)

    def write(self, offset: int, data: bytes) -> None:
        self.log.append((offset, data))


def test_an_access_reaches_the_device_that_has_all_of_it() -> None:
    bus, low, high = Bus("port", 0x10000), Model(1), Model(2)
    bus.add(0x3F8, 8, low)
    bus.add(0x400, 8, high)
    assert bus.read(0x3F8, 1) == b"\1"
    assert bus.read(0x3FC, 4) == b"\1\1\1\1"
    bus.write(0x407, b"x")
    assert (low.log, high.log) == ([(0, b""), (4, b"")], [(7, b"x")])


@pytest.mark.parametrize("address", [0, 0x3F7, 0x3FD, 0x3FE, 0x400, 0x4FD, 0x500, 0xFFFF, 1 << 63])
def test_what_no_device_has_all_of_is_nobodys(address: int) -> None:
    bus, model = Bus("port", 0x10000), Model()
    bus.add(0x3F8, 8, model)
    bus.add(0x4F8, 8, model)
    assert bus.read(address, 4) == b"\xff\xff\xff\xff"
    bus.write(address, b"abcd")
    assert not model.log


def test_an_empty_bus_is_nobodys() -> None:
    assert Bus("memory", 1 << 52).read(0xFEE00000, 8) == b"\xff" * 8


@pytest.mark.parametrize(
    ("start", "size"), [(0x100, 1), (0xFF, 2), (0x10F, 1), (0x10F, 8), (0xF0, 0x40), (0x104, 4)]
)
def test_overlap_is_refused(start: int, size: int) -> None:
    bus, model = Bus("port", 0x10000), Model()
    bus.add(0x80, 8, model)
    bus.add(0x100, 0x10, model)
    with pytest.raises(InvalidArgument, match=r"port .* overlaps 0x100\+0x10"):
        bus.add(start, size, model)
    bus.add(0x110, 8, model)
    bus.add(0xF8, 8, model)


@pytest.mark.parametrize(("start", "size"), [(0, 0), (-1, 4), (0xFFFF, 2), (0x10000, 1), (4, -4)])
def test_a_range_outside_the_bus_is_refused(start: int, size: int) -> None:
    with pytest.raises(InvalidArgument, match="outside 0x0\\+0x10000"):
        Bus("port", 0x10000).add(start, size, Model())


def test_removed_is_gone_and_its_place_is_free() -> None:
    bus = Bus("port", 0x10000)
    bus.add(0x100, 16, Model(1))
    for nobody in (0x101, 0xF0, 0x200):
        with pytest.raises(InvalidArgument, match=f"no device at {nobody:#x}"):
            bus.remove(nobody)
    bus.remove(0x100)
    assert bus.read(0x100, 1) == b"\xff"
    bus.add(0xF8, 16, Model(2))
    assert bus.read(0x100, 1) == b"\2"


def test_a_device_may_move_itself_while_it_is_written() -> None:
    bus = Bus("port", 0x10000)

    class Mover(Model):
        def write(self, offset: int, data: bytes) -> None:
            super().write(offset, data)
            bus.remove(0x100)
            bus.add(0x200, 4, self)

    mover = Mover(3)
    bus.add(0x100, 4, mover)
    bus.write(0x102, b"m")
    assert (bus.read(0x100, 1), bus.read(0x200, 1)) == (b"\xff", b"\3")


RANGES = st.tuples(st.integers(0, 63), st.integers(1, 16))


@given(st.lists(RANGES, max_size=24), st.lists(RANGES, max_size=24))
def test_the_bus_is_what_a_map_of_bytes_says(
    ranges: list[tuple[int, int]], accesses: list[tuple[int, int]]
) -> None:
    bus = Bus("port", 64)
    owners: dict[int, int] = {}
    for number, (start, size) in enumerate(ranges):
        wanted = range(start, start + size)
        if number % 5 == 4 and owners:
            gone = owners[next(iter(owners))]
            bus.remove(min(at for at, owner in owners.items() if owner == gone))
            owners = {at: owner for at, owner in owners.items() if owner != gone}
        if wanted.stop > 64 or owners.keys() & set(wanted):
            with pytest.raises(InvalidArgument):
                bus.add(start, size, Model(number))
        else:
            bus.add(start, size, Model(number))
            owners |= dict.fromkeys(wanted, number)
    for at, length in accesses:
        found = {owners.get(byte) for byte in range(at, at + length)}
        owner = found.pop()
        alone = not found and owner is not None
        assert bus.read(at, length) == bytes([owner or 0] if alone else [0xFF]) * length
