"""Listeners with changes of their own: one transaction with the memory's."""

from __future__ import annotations

from functools import partial

import pytest

from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.memtable import MemoryTable
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.memory import BorrowedRegion

PAGE = 4096
LOW = BorrowedRegion(0, 4 * PAGE, 0x10000, "low")
HIGH = BorrowedRegion(8 * PAGE, 2 * PAGE, 0x40000, "high")
DIMM = BorrowedRegion(16 * PAGE, PAGE, 0x80000, "dimm1")


class Keeper:
    """A listener with a value of its own, which it takes over at the commit."""

    def __init__(self) -> None:
        self.wanted = self.value = self.asked = 0
        self.error: BaseException | None = None

    def set(self, space: AddressSpace, value: int) -> None:
        with space.transaction():
            space.touch(self, partial(setattr, self, "wanted", self.wanted))
            self.wanted = value

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:  # noqa: ARG002
        self.asked += 1
        if self.error is not None:
            raise self.error
        self.value = self.wanted


def test_a_touched_listener_is_asked_even_if_the_memory_stays() -> None:
    space = AddressSpace([LOW], limit=8)
    other, keeper = Keeper(), Keeper()
    space.register(other)
    space.register(keeper)
    keeper.set(space, 1)
    assert (keeper.value, keeper.asked, other.asked) == (1, 2, 1)
    with space.transaction():
        keeper.set(space, 2)
        space.add(HIGH)
        keeper.set(space, 3)
        assert keeper.value == 1
    assert (keeper.value, keeper.asked, other.asked) == (3, 3, 2)
    space.add(DIMM)
    assert (keeper.value, keeper.asked) == (3, 4)
    with pytest.raises(StateError, match="touched outside a transaction"):
        space.touch(keeper, print)


def test_a_block_that_is_left_takes_back_what_it_touched() -> None:
    space = AddressSpace([LOW], limit=8)
    keeper = Keeper()
    space.register(keeper)

    def fail(value: int) -> None:
        with space.transaction():
            keeper.set(space, value)
            space.add(LOW)

    with pytest.raises(InvalidArgument):
        fail(1)
    assert (keeper.wanted, keeper.value, keeper.asked) == (0, 0, 1)
    with space.transaction():
        keeper.set(space, 2)
        with pytest.raises(InvalidArgument):
            fail(3)
        assert keeper.wanted == 2
    assert (keeper.wanted, keeper.value, keeper.asked) == (2, 2, 2)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("refusing", [0, 1, 2])
def test_a_commit_that_fails_takes_back_what_was_touched(refusing: int, with_memory: bool) -> None:
    space = AddressSpace([LOW], limit=8)
    keepers = [Keeper() for _ in range(3)]
    for keeper in keepers:
        space.register(keeper)
        keeper.set(space, 1)
    keepers[refusing].error = OSError("refused")

    def change(value: int) -> None:
        with space.transaction():
            for keeper in keepers:
                keeper.set(space, value)
            if with_memory:
                space.add(HIGH)

    with pytest.raises(OSError, match="refused"):
        change(2)
    assert [(keeper.wanted, keeper.value) for keeper in keepers] == [(1, 1)] * 3
    assert len(space.table.regions) == 1
    keepers[refusing].error = None
    change(3)
    assert [(keeper.wanted, keeper.value) for keeper in keepers] == [(3, 3)] * 3


def test_an_overlap_takes_back_what_was_touched() -> None:
    space = AddressSpace([LOW], limit=8)
    keeper = Keeper()
    space.register(keeper)

    def overlap() -> None:
        with space.transaction():
            keeper.set(space, 1)
            space.add(BorrowedRegion(PAGE, PAGE, 0x70000))

    with pytest.raises(InvalidArgument, match="overlaps"):
        overlap()
    assert (keeper.wanted, keeper.asked) == (0, 1)
    space.add(HIGH)
    assert keeper.value == 0
