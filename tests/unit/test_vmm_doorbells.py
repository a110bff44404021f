"""Doorbells are part of the memory's transactions: all of it, or none."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from vhostctl.control.addressspace import AddressSpace, VhostMemory
from vhostctl.errors import ClosedError, KernelError, VhostctlError, kernel_error
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import BorrowedRegion
from vhostctl.host.vhost import Region
from vhostctl.vmm.doorbells import Doorbell, Doorbells
from vhostctl.vmm.memory import KvmMemory

PAGE = 4096
LOW = BorrowedRegion(0, 4 * PAGE, 0x10000, "low")
HIGH = BorrowedRegion(8 * PAGE, 2 * PAGE, 0x40000, "high")

Place = tuple[int, int, int | None, bool]


@dataclass
class Machine:
    """KVM's rules for doorbells and slots, and a vhost device; the call `refuses` raises."""

    refuses: str = ""
    error: BaseException = field(default_factory=lambda: KernelError(errno.ENOSPC, "x", "vm"))
    doorbells: dict[Place, int] = field(default_factory=dict)
    slots: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    late: bool = False  # an interrupt comes when the call was done
    table: tuple[Region, ...] = ()
    log: list[str] = field(default_factory=list)

    @contextmanager
    def _may(self, call: str) -> Iterator[None]:
        self.log.append(call)
        refused = call == self.refuses
        if refused:
            self.refuses = ""
        if refused and not self.late:
            raise self.error
        yield
        if refused:
            raise self.error

    def check_extension(self, _: int) -> int:
        return 8

    def set_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        with self._may("memory"):
            if size:
                self.slots[slot] = (gpa, size, hva)
            elif not self.slots.pop(slot, None):
                raise kernel_error(errno.EINVAL, "KVM_SET_USER_MEMORY_REGION", f"slot {slot}")

    def set_mem_table(self, regions: Iterable[Region]) -> None:
        with self._may("vhost"):
            self.table = tuple(regions)

    def ioeventfd(
        self,
        event_fd: int,
        address: int,
        *,
        length: int = 0,
        datamatch: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        with self._may(f"{'+' if assign else '-'}{address:#x}"):
            self._ioeventfd((address, length, datamatch, pio), event_fd, assign)

    def _ioeventfd(self, place: Place, event_fd: int, assign: bool) -> None:
        if assign and place in self.doorbells:
            raise kernel_error(errno.EEXIST, "KVM_IOEVENTFD", f"{place[0]:#x}")
        if assign:
            self.doorbells[place] = event_fd
        elif self.doorbells.get(place) != event_fd:
            raise kernel_error(errno.ENOENT, "KVM_IOEVENTFD", f"{place[0]:#x}")
        else:
            del self.doorbells[place]

    def state(self) -> tuple[object, ...]:
        return dict(self.doorbells), set(self.slots.values()), self.table


@pytest.fixture
def events() -> Iterator[list[EventFd]]:
    made = [EventFd.create() for _ in range(3)]
    yield made
    for event in made:
        event.close()


def addresses(machine: Machine) -> list[int]:
    return sorted(place[0] for place in machine.doorbells)


def test_each_owner_replaces_its_own(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace([LOW], limit=8)
    doorbells = Doorbells(machine, space)
    doorbells.set("a", [Doorbell(events[0], 0x100), Doorbell(events[1], 0x104, 2, 1, pio=True)])
    doorbells.set("b", [Doorbell(events[2], 0x200, 4)])
    fds = [event.fileno() for event in events]
    assert machine.doorbells == {
        (0x100, 0, None, False): fds[0],
        (0x104, 2, 1, True): fds[1],
        (0x200, 4, None, False): fds[2],
    }
    machine.log.clear()
    doorbells.set("a", [Doorbell(events[1], 0x104, 2, 1, pio=True), Doorbell(events[0], 0x108)])
    assert machine.log == ["-0x100", "+0x108"]  # what stays is let alone
    space.add(HIGH)
    assert len(machine.log) == 2
    doorbells.set("a", [])
    doorbells.set("nobody", [])
    assert addresses(machine) == [0x200]
    doorbells.close()
    doorbells.close()
    assert not machine.doorbells
    assert not doorbells.present
    space.remove(HIGH)


def test_it_is_one_change_with_the_memory(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace([LOW], limit=8)
    doorbells = Doorbells(machine, space)
    with space.transaction():
        doorbells.set("a", [Doorbell(events[0], 0x100)])
        space.add(HIGH)
        doorbells.set("a", [Doorbell(events[0], 0x200)])
        assert not machine.doorbells
    assert machine.log == ["+0x200"]


def test_two_owners_may_swap_places(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace(limit=8)
    doorbells = Doorbells(machine, space)
    doorbells.set("a", [Doorbell(events[0], 0x100)])
    doorbells.set("b", [Doorbell(events[1], 0x200)])
    with space.transaction():
        doorbells.set("a", [Doorbell(events[0], 0x200)])
        doorbells.set("b", [Doorbell(events[1], 0x100)])
    assert machine.doorbells[0x200, 0, None, False] == events[0].fileno()
    assert machine.doorbells[0x100, 0, None, False] == events[1].fileno()


def test_a_place_that_is_taken_changes_nothing(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace(limit=8)
    doorbells = Doorbells(machine, space)
    doorbells.set("a", [Doorbell(events[0], 0x100)])
    before = machine.state()
    with pytest.raises(FileExistsError, match="KVM_IOEVENTFD"):
        doorbells.set("b", [Doorbell(events[1], 0x300), Doorbell(events[1], 0x100)])
    assert machine.state() == before
    doorbells.set("a", [])
    doorbells.set("b", [Doorbell(events[1], 0x100)])
    assert addresses(machine) == [0x100]


def test_the_same_doorbell_of_two_owners_is_shared(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace(limit=8)
    doorbells = Doorbells(machine, space)
    for owner in ("a", "b"):
        doorbells.set(owner, [Doorbell(events[0], 0x100)])
    doorbells.set("a", [])
    assert addresses(machine) == [0x100]
    doorbells.set("b", [])
    assert addresses(machine) == []


def test_a_block_that_is_left_changes_nothing(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace([LOW], limit=8)
    doorbells = Doorbells(machine, space)
    doorbells.set("a", [Doorbell(events[0], 0x100)])

    def fail() -> None:
        with space.transaction():
            doorbells.set("a", [Doorbell(events[0], 0x200)])
            doorbells.set("b", [Doorbell(events[1], 0x100)])
            space.remove("nothing of the kind")

    with pytest.raises(VhostctlError):
        fail()
    assert machine.log == ["+0x100"]
    doorbells.set("c", [])
    assert addresses(machine) == [0x100]


def test_an_eventfd_that_is_closed_changes_nothing(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace(limit=8)
    doorbells = Doorbells(machine, space)
    closed = EventFd.create()
    closed.close()
    with pytest.raises(ClosedError):
        doorbells.set("a", [Doorbell(events[0], 0x100), Doorbell(closed, 0x200)])
    assert not machine.doorbells
    doorbells.set("a", [Doorbell(events[0], 0x100)])
    assert addresses(machine) == [0x100]


STEPS = ["memory", "vhost", "-0x100", "+0x200", "+0x300"]


@pytest.mark.parametrize("order", ["kvm vhost bells", "bells vhost kvm", "vhost bells kvm"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("interrupt", ["", "before", "after"])
def test_memory_vhost_and_doorbells_are_one_transaction(
    events: list[EventFd], order: str, step: str, interrupt: str
) -> None:
    """Whatever refuses, all three are as they were; the same change works afterwards."""
    machine, space = Machine(), AddressSpace([LOW], limit=8)
    doorbells = None
    for name in order.split():
        if name == "bells":
            doorbells = Doorbells(machine, space)
        else:
            space.register(KvmMemory(machine) if name == "kvm" else VhostMemory([machine]))
    assert doorbells is not None
    doorbells.set("a", [Doorbell(events[0], 0x100)])
    before, regions = machine.state(), space.table.regions

    def change() -> None:
        with space.transaction():
            space.remove("low")
            space.add(HIGH)
            doorbells.set("a", [Doorbell(events[0], 0x200)])
            doorbells.set("b", [Doorbell(events[1], 0x300)])

    machine.refuses = step
    machine.late = interrupt == "after"
    if interrupt:
        machine.error = KeyboardInterrupt()
    with pytest.raises(type(machine.error)):
        change()
    assert machine.state() == before
    assert space.table.regions == regions
    change()
    assert addresses(machine) == [0x200, 0x300]
    assert [one.gpa for one in machine.table] == [HIGH.gpa]
    assert set(machine.slots.values()) == {(HIGH.gpa, HIGH.size, HIGH.hva)}


def test_close_goes_on_after_a_refusal(events: list[EventFd]) -> None:
    machine, space = Machine(), AddressSpace(limit=8)
    doorbells = Doorbells(machine, space)
    doorbells.set("a", [Doorbell(event, at) for event, at in zip(events, (1, 2, 3), strict=True)])
    machine.refuses = "-0x2"
    with pytest.raises(KernelError, match="ENOSPC"):
        doorbells.close()
    assert addresses(machine) == [2]
