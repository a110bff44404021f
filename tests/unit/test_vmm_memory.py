"""KVM's slots follow the guest's memory, and nothing that stays is ever taken away."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.abi.kvm import KVM_CAP_NR_MEMSLOTS
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.errors import InvalidArgument, KernelError, kernel_error
from vhostctl.vmm.memory import KvmMemory

PAGE = 4096


def region(gpa: int, pages: int, hva: int) -> GuestRegion:
    return GuestRegion(gpa * PAGE, pages * PAGE, hva * PAGE)


@dataclass
class Slots:
    """KVM's rules for slots; the call with number `refuses` raises `error`."""

    limit: int = 8
    refuses: int = 0
    error: BaseException = field(
        default_factory=lambda: kernel_error(errno.ENOMEM, "KVM_SET_USER_MEMORY_REGION", "vm")
    )
    after_it_was_done: bool = False
    calls: list[tuple[int, int, int]] = field(default_factory=list)
    slots: dict[int, GuestRegion] = field(default_factory=dict)
    watched: set[int] = field(default_factory=set)

    def check_extension(self, capability: int) -> int:
        assert capability == KVM_CAP_NR_MEMSLOTS
        return self.limit

    def set_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        self.calls.append((slot, gpa // PAGE, size // PAGE))
        refused = len(self.calls) == self.refuses
        if refused and not self.after_it_was_done:
            raise self.error
        self._set(slot, gpa, size, hva)
        assert self.watched <= self.pages().keys()
        if refused:
            raise self.error

    def _set(self, slot: int, gpa: int, size: int, hva: int) -> None:
        old, new = self.slots.get(slot), GuestRegion(gpa, size, hva)
        if slot >= self.limit or (size == 0 and old is None) or (old and size and old != new):
            raise kernel_error(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION", f"slot {slot}")
        if not size:
            del self.slots[slot]
            return
        for number, other in self.slots.items():
            if number != slot and gpa < other.gpa + other.size and other.gpa < gpa + size:
                raise kernel_error(errno.EEXIST, "KVM_SET_USER_MEMORY_REGION", f"slot {slot}")
        self.slots[slot] = new

    def pages(self) -> dict[int, int]:
        return {page: hva for one in self.slots.values() for page, hva in pages(one).items()}


def pages(one: GuestRegion) -> dict[int, int]:
    return {one.gpa + at: one.hva + at for at in range(0, one.size, PAGE)}


def wanted(table: MemoryTable) -> dict[int, int]:
    return {page: hva for one in table.regions for page, hva in pages(one).items()}


def test_regions_come_and_go_and_numbers_are_used_again() -> None:
    vm, space = Slots(), AddressSpace([region(0, 4, 100)], limit=8)
    memory = KvmMemory(vm)
    space.register(memory)
    high = region(8, 2, 200)
    space.add(high)
    space.add(region(16, 1, 300))
    assert memory.slots == vm.slots
    assert [one.gpa // PAGE for one in vm.slots.values()] == [0, 8, 16]
    space.remove(high)
    space.add(region(20, 1, 400))
    assert vm.calls == [(0, 0, 4), (1, 8, 2), (2, 16, 1), (1, 8, 0), (1, 20, 1)]
    assert memory.slots == vm.slots


def test_a_region_that_grows_or_merges_is_not_taken_away() -> None:
    middle = region(4, 4, 104)
    vm, space = Slots(), AddressSpace([region(0, 4, 100), region(8, 4, 108)], limit=8)
    space.register(KvmMemory(vm))
    vm.watched = set(vm.pages())
    space.add(middle)
    assert len(space.table.regions) == 1
    space.remove(middle)
    assert vm.calls == [(0, 0, 4), (1, 8, 4), (2, 4, 4), (2, 4, 0)]


def test_a_region_that_shrinks_is_away_only_until_its_rest_is_back() -> None:
    vm, space = Slots(), AddressSpace([region(0, 8, 100), region(16, 1, 300)], limit=8)
    space.register(KvmMemory(vm))
    vm.calls.clear()
    with space.transaction():
        space.remove(region(0, 8, 100))
        space.remove(region(16, 1, 300))
        space.add(region(0, 2, 100))
        space.add(region(4, 4, 104))
    assert vm.calls == [(1, 16, 0), (0, 0, 0), (0, 0, 2), (1, 4, 4)]


def test_memory_that_moves_is_replaced_in_place() -> None:
    vm, space = Slots(), AddressSpace([region(0, 4, 100), region(8, 4, 200)], limit=8)
    space.register(KvmMemory(vm))
    vm.calls.clear()
    with space.transaction():
        for old, new in ((region(0, 4, 100), 300), (region(8, 4, 200), 400)):
            space.remove(old)
            space.add(GuestRegion(old.gpa, old.size, new * PAGE))
    assert vm.calls == [(0, 0, 0), (0, 0, 4), (1, 8, 0), (1, 8, 4)]


def test_the_limit_is_kvms() -> None:
    vm, space = Slots(limit=2), AddressSpace([region(0, 1, 100)], limit=8)
    space.register(KvmMemory(vm))

    def two_more() -> None:
        with space.transaction():
            space.add(region(4, 1, 200))
            space.add(region(8, 1, 300))

    with pytest.raises(InvalidArgument, match="all 2 memory slots of KVM are taken"):
        two_more()
    assert (len(vm.slots), len(space.regions)) == (1, 1)
    space.add(region(8, 1, 300))
    with space.transaction():  # only if the old one goes first
        space.remove(region(0, 1, 100))
        space.add(region(4, 1, 200))
    assert vm.pages() == wanted(space.table)


def test_a_kernel_that_does_not_say_has_32() -> None:
    memory = KvmMemory(Slots(limit=0))
    assert memory._limit == 32


LAYOUTS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 5), st.sampled_from((100, 200))), max_size=5
)


def table(layout: list[tuple[int, int, int]]) -> MemoryTable:
    taken: set[int] = set()
    regions = []
    for gpa, count, offset in layout:
        if not taken & set(range(gpa, gpa + count)):
            taken |= set(range(gpa, gpa + count))
            regions.append(region(gpa, count, gpa + offset))
    return MemoryTable(regions)


@given(st.lists(LAYOUTS, max_size=8))
def test_slots_are_what_the_table_says_and_what_stays_is_never_away(
    layouts: list[list[tuple[int, int, int]]],
) -> None:
    vm = Slots(limit=64)
    memory = KvmMemory(vm)
    before = MemoryTable(())
    for layout in layouts:
        after = table(layout)
        # A slot of which all stays where it is.
        vm.watched = {
            page
            for slot in vm.slots.values()
            if pages(slot).items() <= wanted(after).items()
            for page in pages(slot)
        }
        memory.commit(before, after)
        assert vm.pages() == wanted(after)
        assert memory.slots == vm.slots
        before = after


@given(LAYOUTS, LAYOUTS, st.integers(1, 12), st.sampled_from(("refused", "before", "after")))
def test_a_refusal_at_any_step_leaves_the_slots_as_they_were(
    first: list[tuple[int, int, int]],
    second: list[tuple[int, int, int]],
    step: int,
    how: str,
) -> None:
    vm = Slots(limit=64)
    memory = KvmMemory(vm)
    memory.commit(MemoryTable(()), table(first))
    slots = dict(vm.slots)
    vm.refuses = len(vm.calls) + step
    if how != "refused":
        vm.error = KeyboardInterrupt()
        vm.after_it_was_done = how == "after"
    try:
        memory.commit(table(first), table(second))
    except (KernelError, KeyboardInterrupt):
        assert vm.slots == slots
        assert memory.slots == slots
    else:
        assert vm.pages() == wanted(table(second))


def test_what_cannot_be_taken_back_is_a_note_and_still_known() -> None:
    class OneWay(Slots):
        def set_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
            self.refuses = 0 if not self.calls else len(self.calls) + 1
            super().set_memory(slot, gpa, size, hva)

    vm = OneWay()
    memory = KvmMemory(vm)
    with pytest.raises(KernelError, match="ENOMEM") as failure:
        memory.commit(MemoryTable(()), MemoryTable([region(0, 1, 100), region(4, 1, 200)]))
    (note,) = failure.value.__notes__
    assert "while taking the memory table back: KVM_SET_USER_MEMORY_REGION" in note
    assert memory.slots == vm.slots == {0: region(0, 1, 100)}
