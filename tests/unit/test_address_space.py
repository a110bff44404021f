"""Memory that comes and goes: transactions, listeners, pins, the limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.control.addressspace import AddressSpace, VhostMemory
from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.errors import ClosedError, InvalidArgument, KernelError, StateError
from vhostctl.host import module
from vhostctl.host.memory import BorrowedRegion
from vhostctl.host.vhost import Region

PAGE = 4096
LOW = BorrowedRegion(0, 4 * PAGE, 0x10000, "low")
HIGH = BorrowedRegion(8 * PAGE, 2 * PAGE, 0x40000, "high")
DIMM = BorrowedRegion(16 * PAGE, PAGE, 0x80000, "dimm1")

Told = tuple[str, list[int], list[int]]


def gpas(table: MemoryTable) -> list[int]:
    return [region.gpa // PAGE for region in table.regions]


@dataclass(eq=False)
class Listener:
    """Writes down what it is told; raises `error` if there is one."""

    log: list[Told] = field(default_factory=list)
    name: str = ""
    error: BaseException | None = None

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:
        self.log.append((self.name, gpas(before), gpas(after)))
        if self.error is not None:
            raise self.error


class Device:
    """Keeps the table that it was told; the call with number `refuses` raises `error`."""

    def __init__(self, refuses: int = 0, error: BaseException | None = None) -> None:
        self.table: tuple[Region, ...] = ()
        self.calls = 0
        self.refuses = refuses
        self.error = error or KernelError(14, "VHOST_SET_MEM_TABLE", "pair 0")

    def set_mem_table(self, regions: Iterable[Region]) -> None:
        self.calls += 1
        if self.calls == self.refuses:
            raise self.error
        self.table = tuple(regions)


def test_each_change_is_told_once_and_in_order() -> None:
    log: list[Told] = []
    space = AddressSpace([LOW], limit=8)
    for name in ("a", "b"):
        space.register(Listener(log, name))
    assert log == [("a", [], [0]), ("b", [], [0])]
    log.clear()
    space.add(HIGH)
    assert log == [("a", [0], [0, 8]), ("b", [0], [0, 8])]
    log.clear()
    with space.transaction():
        space.add(DIMM)
        with space.transaction():
            space.remove("low")
        assert not log
        assert gpas(space.table) == [0, 8]
        assert [region.name for region in space.regions] == ["low", "high"]
    assert log == [("a", [0, 8], [8, 16]), ("b", [0, 8], [8, 16])]
    assert [region.name for region in space.regions] == ["high", "dimm1"]


def test_what_changes_nothing_is_told_to_nobody() -> None:
    space = AddressSpace([LOW], limit=8)
    listener = Listener()
    space.register(listener)
    listener.log.clear()
    with space.transaction():
        pass
    with space.transaction():
        space.add(HIGH)
        space.remove(HIGH)
    with space.transaction():  # the same memory in two pieces
        space.remove("low")
        space.add(GuestRegion(0, PAGE, LOW.hva), "left")
        space.add(GuestRegion(PAGE, 3 * PAGE, LOW.hva + PAGE), "right")
    assert not listener.log
    assert [str(region) for region in space.regions] == [
        "memory region 'left' 0x0+0x1000",
        "memory region 'right' 0x1000+0x3000",
    ]
    space.unregister(listener)
    space.unregister(listener)
    space.add(HIGH)
    assert not listener.log


def test_an_exception_takes_back_what_its_block_changed() -> None:
    space = AddressSpace([LOW], limit=8)
    listener = Listener()
    space.register(listener)

    def change(*regions: Region, removed: str = "") -> None:
        with space.transaction():
            for region in regions:
                space.add(region)
            space.remove(removed)

    with pytest.raises(InvalidArgument, match="no memory region 'none'"):
        change(HIGH, DIMM, removed="none")
    assert len(listener.log) == 1
    assert gpas(space.table) == [0]
    with space.transaction():
        space.add(HIGH)
        with pytest.raises(InvalidArgument, match="'high' already"):
            change(DIMM, HIGH)
    assert listener.log[1:] == [("", [0], [0, 8])]


def test_a_listener_that_refuses_leaves_all_as_it_was() -> None:
    log: list[Told] = []
    space = AddressSpace([LOW], limit=8)
    listeners = [Listener(log, name) for name in "abcd"]
    for listener in listeners:
        space.register(listener)
    for error in (KernelError(14, "VHOST_SET_MEM_TABLE", "x"), KeyboardInterrupt()):
        log.clear()
        listeners[2].error = error
        with pytest.raises(type(error)):
            space.add(HIGH)
        forth, back = ([0], [0, 8]), ([0, 8], [0])
        assert log == [("a", *forth), ("b", *forth), ("c", *forth), ("b", *back), ("a", *back)]
        assert (gpas(space.table), len(space.regions)) == ([0], 1)
    listeners[2].error = None
    space.add(HIGH)
    assert gpas(space.table) == [0, 8]


def test_what_fails_while_it_is_taken_back_is_a_note_on_the_first_error() -> None:
    space = AddressSpace(limit=8)

    class OneWay(Listener):
        def commit(self, before: MemoryTable, after: MemoryTable) -> None:
            super().commit(before, after)
            if len(self.log) > 2:
                raise ClosedError("one way only")

    first, second = Listener(), OneWay()
    space.register(first)
    space.register(second)
    refusing = Listener()
    space.register(refusing)
    refusing.error = OSError("refused")
    with pytest.raises(OSError, match="refused") as failure:
        space.add(LOW)
    assert failure.value.__notes__ == ["while taking the memory table back: one way only"]
    assert first.log[-1] == ("", [0], [])


def test_a_listener_that_refuses_what_is_there_is_not_registered() -> None:
    space = AddressSpace([LOW], limit=8)
    listener = Listener(error=OSError("no"))
    with pytest.raises(OSError, match="no"):
        space.register(listener)
    space.add(HIGH)
    assert len(listener.log) == 1


def test_a_listener_sees_the_new_table_and_cannot_change_it() -> None:
    space = AddressSpace(limit=8)
    seen = []

    class Meddler:
        def commit(self, before: MemoryTable, after: MemoryTable) -> None:
            seen.append((before.regions, space.table is after))
            if after.regions:
                space.remove("low")

    space.register(Meddler())
    with pytest.raises(StateError, match="cannot change the memory that is being committed"):
        space.add(LOW)
    assert seen == [((), True), ((), True)]
    assert space.regions == ()


def test_names() -> None:
    space = AddressSpace([LOW], limit=8)
    with pytest.raises(InvalidArgument, match="there is a memory region 'low' already"):
        space.add(HIGH, "low")
    space.add(HIGH, "dimm0")
    space.add(DIMM)
    nameless = GuestRegion(32 * PAGE, PAGE, 0x90000)
    space.add(nameless)
    for missing in ("high", "", GuestRegion(0, PAGE, 0x10000)):
        with pytest.raises(
            InvalidArgument,
            match=r"no memory region ('high'|''|at 0x0) to remove; there is: .*'low' 0x0\+0x4000, ",
        ):
            space.remove(missing)
    space.remove("dimm0")
    space.remove(space.regions[0])
    space.remove(nameless)
    space.remove(DIMM)
    assert space.regions == ()


def test_overlap_is_refused_at_the_end_of_the_transaction() -> None:
    space = AddressSpace([LOW], limit=8)
    with pytest.raises(
        InvalidArgument, match=r"'dimm1' 0x1000\+0x1000 overlaps memory region 'low' 0x0\+0x4000"
    ):
        space.add(BorrowedRegion(PAGE, PAGE, 0x70000, "dimm1"))
    with space.transaction():
        space.add(BorrowedRegion(PAGE, PAGE, 0x70000, "dimm1"))
        space.remove("low")
    assert space.hva(PAGE, PAGE) == 0x70000


def test_the_limit_counts_merged_regions_and_is_read_at_each_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "max_mem_regions", lambda: 2)
    space = AddressSpace([LOW, HIGH])
    listener = Listener()
    space.register(listener)
    with pytest.raises(
        InvalidArgument, match=r"3 memory regions with .* takes 2; .*max_mem_regions"
    ):
        space.add(DIMM)
    assert len(listener.log) == 1
    space.add(GuestRegion(4 * PAGE, PAGE, LOW.hva + LOW.size))  # LOW grows
    assert len(space.regions) == 3
    monkeypatch.setattr(module, "max_mem_regions", lambda: 3)
    space.add(DIMM)
    assert len(space.table.regions) == 3


def test_what_is_pinned_stays() -> None:
    space = AddressSpace([LOW, HIGH], limit=8)
    listener = Listener()
    space.register(listener)

    def move() -> None:
        with space.transaction():
            space.remove("high")
            space.add(BorrowedRegion(HIGH.gpa, HIGH.size, 0xA0000, "high"))

    with pytest.raises(InvalidArgument, match=r"queue 3 used ring at .* outside"):
        space.pin(2 * PAGE, 4 * PAGE, "queue 3 used ring")
    with space.pin(9 * PAGE, 8, "queue 3 used ring") as pin:
        assert pin.hva == HIGH.hva + PAGE
        refusal = r"memory region 'high' 0x8000\+0x2000 is in use by queue 3 used ring; stop"
        with pytest.raises(InvalidArgument, match=refusal):
            space.remove("high")
        with pytest.raises(InvalidArgument, match=refusal):
            move()
        with space.transaction():  # smaller, and what is pinned is where it was
            space.remove("high")
            space.add(BorrowedRegion(9 * PAGE, PAGE, HIGH.hva + PAGE, "rest"))
        space.remove("low")
    assert len(listener.log) == 3
    space.unpin(pin)
    space.remove("rest")


def test_a_pin_across_merged_neighbours_holds_both() -> None:
    space = AddressSpace([LOW], limit=8)
    space.add(BorrowedRegion(LOW.size, PAGE, LOW.hva + LOW.size, "behind"))
    with space.pin(LOW.size - 8, 16, "queue 0 desc"):
        for name in ("low", "behind"):
            with pytest.raises(InvalidArgument, match=f"'{name}' .* is in use by queue 0 desc"):
                space.remove(name)


def test_every_device_gets_the_table() -> None:
    devices = [Device(), Device()]
    space = AddressSpace([LOW], limit=8)
    space.register(VhostMemory(devices))
    space.add(HIGH)
    assert [device.table for device in devices] == [space.table.regions] * 2
    assert [device.calls for device in devices] == [2, 2]


@pytest.mark.parametrize("refusing", [0, 1, 2])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_device_that_refuses_gives_the_others_the_old_table(
    refusing: int, interrupted: bool
) -> None:
    devices = [Device(), Device(), Device()]
    space = AddressSpace([LOW], limit=8)
    space.register(VhostMemory(devices))
    before = space.table.regions
    devices[refusing].refuses = 2
    error = KeyboardInterrupt if interrupted else KernelError
    devices[refusing].error = error(14, "VHOST_SET_MEM_TABLE", "pair")
    with pytest.raises(error):
        space.add(HIGH)
    assert [device.table for device in devices] == [before] * 3
    told_back = [3] * refusing + [2 + interrupted] + [1] * (2 - refusing)
    assert [device.calls for device in devices] == told_back
    assert space.table.regions == before
    space.add(HIGH)


REGIONS = [
    # Slots of four pages: some follow the one below in this process as well, some not.
    GuestRegion(slot * 4 * PAGE, pages * PAGE, hva + slot * 4 * PAGE)
    for slot in range(8)
    for pages in (1, 4, 6)
    for hva in (1 << 20, 1 << 30)
]


@given(st.lists(st.sampled_from(REGIONS), max_size=40))
def test_the_table_is_what_a_map_of_pages_says(toggles: list[GuestRegion]) -> None:
    space = AddressSpace(limit=64)
    told: list[MemoryTable] = []

    class Follower:
        def commit(self, before: MemoryTable, after: MemoryTable) -> None:
            if told:
                assert before is told[-1]
                assert before.regions != after.regions
            told.append(after)

    space.register(Follower())
    model: list[GuestRegion] = []
    for region in toggles:
        if region in model:
            space.remove(region)
            model.remove(region)
            continue
        try:
            space.add(region)
        except InvalidArgument:
            assert any(pages(region).keys() & pages(other).keys() for other in model)
        else:
            model.append(region)
        assert [entry.source for entry in space.regions] == model
    wanted = {page: hva for region in model for page, hva in pages(region).items()}
    found: dict[int, int] = {}
    for entry in space.table.regions:
        assert not pages(entry).keys() & found.keys()
        assert found.get(entry.gpa - PAGE) != entry.hva - PAGE  # else they would be one
        found |= pages(entry)
    assert found == wanted
    assert told[-1].regions == space.table.regions


def pages(region: GuestRegion) -> dict[int, int]:
    return {region.gpa + at: region.hva + at for at in range(0, region.size, PAGE)}
