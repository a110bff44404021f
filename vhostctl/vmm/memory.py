"""The memory slots of a KVM virtual machine, kept as the guest's memory changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Protocol

from vhostctl.abi.kvm import KVM_CAP_NR_MEMSLOTS
from vhostctl.control.addressspace import take_back
from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.errors import InvalidArgument, VhostctlError
from vhostctl.vmm.steps import whole

_FEWEST_SLOTS = 32  # of kernels that do not say (virt/kvm/api.rst, 4.35)


class SlotVm(Protocol):
    """What has memory slots: a Vm."""

    def check_extension(self, capability: int, /) -> int:
        """KVM_CHECK_EXTENSION."""

    def set_memory(self, slot: int, gpa: int, size: int, hva: int, /) -> None:
        """KVM_SET_USER_MEMORY_REGION; a size of 0 deletes."""


class KvmMemory:
    """The listener that keeps KVM's slots (KVM_SET_USER_MEMORY_REGION).

    KVM cannot change a slot's size or address: it is deleted, and for a moment the guest has
    no memory there. So what stays where it is keeps its slot: a region that grows gets
    another slot behind the first. Only one that shrinks loses all of its slot for the moment
    until its rest is back; whoever takes a piece out of memory that is in use pauses the
    vCPUs meanwhile.
    """

    def __init__(self, vm: SlotVm) -> None:
        """Speak to `vm`, which has no slots yet."""
        self._vm = vm
        self._limit = vm.check_extension(KVM_CAP_NR_MEMSLOTS) or _FEWEST_SLOTS
        self._slots: dict[GuestRegion, int] = {}

    @property
    def slots(self) -> dict[int, GuestRegion]:
        """What KVM has at present, by slot number."""
        return {slot: region for region, slot in self._slots.items()}

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:  # noqa: ARG002
        """Give KVM the memory of `after`, or raise and leave the slots as they were.

        Raises InvalidArgument (no slot is left) and KernelError (EINVAL, EEXIST, ENOMEM). A
        slot that could not be taken back is a note on what is raised.
        """
        slots = dict(self._slots)
        try:
            for region, stays in _steps(slots, after):
                if stays:
                    self._create(region, self._free_slot())
                else:
                    self._delete(region)
        except BaseException as error:
            take_back(error, self._way_back(slots))
            raise

    def _free_slot(self) -> int:
        taken = set(self._slots.values())
        for slot in range(self._limit):
            if slot not in taken:
                return slot
        raise InvalidArgument(
            f"all {self._limit} memory slots of KVM are taken",
            hint="use fewer regions of memory, or let neighbours follow each other",
        )

    def _way_back(self, slots: dict[GuestRegion, int]) -> Iterator[Callable[[], None]]:
        for region in self._slots.keys() - slots.keys():
            yield partial(self._delete, region)
        for region in slots.keys() - self._slots.keys():
            yield partial(self._create, region, slots[region])

    def _create(self, region: GuestRegion, slot: int) -> None:
        with whole(partial(self._discard, region, slot)):
            self._vm.set_memory(slot, region.gpa, region.size, region.hva)
            self._slots[region] = slot

    def _delete(self, region: GuestRegion) -> None:
        slot = self._slots[region]
        with whole(partial(self._discard, region, slot)):
            self._vm.set_memory(slot, region.gpa, 0, region.hva)
            del self._slots[region]

    def _discard(self, region: GuestRegion, slot: int) -> None:
        """Make sure that KVM has none."""
        with suppress(VhostctlError):
            self._vm.set_memory(slot, region.gpa, 0, region.hva)
        self._slots.pop(region, None)


def _steps(slots: Iterable[GuestRegion], after: MemoryTable) -> list[tuple[GuestRegion, bool]]:
    """Return what to delete (False) and to create (True), in order."""
    kept = [slot for slot in slots if after.find(slot.gpa, slot.size) == slot.hva]
    gone = [slot for slot in slots if slot not in kept]
    new = [piece for entry in after.regions for piece in _without(entry, kept)]
    # What is in nobody's way goes first: it makes room for numbers. What is in the way goes
    # right before what takes its place.
    order = [(slot, False) for slot in gone if not any(_overlap(slot, piece) for piece in new)]
    for piece in new:
        order += [(slot, False) for slot in gone if _overlap(slot, piece)]
        order.append((piece, True))
    return list(dict.fromkeys(order))


def _without(entry: GuestRegion, kept: Iterable[GuestRegion]) -> Iterator[GuestRegion]:
    """Yield the pieces of `entry` that no slot of `kept` has."""
    at, end = entry.gpa, entry.gpa + entry.size
    inside = [slot for slot in kept if entry.gpa <= slot.gpa < end]
    for slot in sorted(inside, key=attrgetter("gpa")):
        if at < slot.gpa:
            yield GuestRegion(at, slot.gpa - at, entry.hva + at - entry.gpa)
        at = slot.gpa + slot.size
    if at < end:
        yield GuestRegion(at, end - at, entry.hva + at - entry.gpa)


def _overlap(one: GuestRegion, other: GuestRegion) -> bool:
    return one.gpa < other.gpa + other.size and other.gpa < one.gpa + one.size
