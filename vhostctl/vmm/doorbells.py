"""The guest's doorbells that KVM answers itself, kept together with its memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

from vhostctl.control.addressspace import AddressSpace, take_back
from vhostctl.control.memtable import MemoryTable
from vhostctl.errors import VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.vmm.steps import whole


class DoorbellVm(Protocol):
    """What answers doorbells: a Vm."""

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
        """KVM_IOEVENTFD."""


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A write of the guest that signals `event` (KVM_IOEVENTFD), without an exit.

    `address` is an I/O port with `pio`, else a guest physical address. `length` is the bytes
    of the write: 1, 2, 4, 8, or 0 for any. With `datamatch` only a write of that value rings.
    """

    event: EventFd
    address: int
    length: int = 0
    datamatch: int | None = None
    pio: bool = False


class Doorbells(Closing):
    """The listener that keeps KVM's ioeventfds, as part of the address space's transactions.

    Doorbells that go are taken away before new ones come, so that two owners may swap
    addresses in one transaction. A write in between leaves KVM as an exit: the device model
    there rings then. The eventfds stay their owner's, open for as long as they are set. The
    same doorbell of two owners is there for as long as either has it.
    """

    def __init__(self, vm: DoorbellVm, space: AddressSpace) -> None:
        """Register with `space`; `vm` has no ioeventfds of this object yet."""
        self._vm = vm
        self._space = space
        self._wanted: dict[object, tuple[Doorbell, ...]] = {}
        self._present: set[Doorbell] = set()
        space.register(self)

    @property
    def present(self) -> frozenset[Doorbell]:
        """What KVM has at present."""
        return frozenset(self._present)

    def set(self, owner: object, doorbells: Iterable[Doorbell]) -> None:
        """Replace what `owner` had, at the end of the space's transaction that we are in.

        Without one, at once. The commit raises KernelError (EEXIST: the place is taken, EINVAL:
        the length, ENOSPC: too many, EBADF) or ClosedError; then all is as before.
        """
        with self._space.transaction():
            before = self._wanted.get(owner, ())
            self._space.touch(self, partial(self._put, owner, before))
            self._put(owner, tuple(doorbells))

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:  # noqa: ARG002
        """Give KVM the doorbells that are set, or raise and leave those that it has."""
        present = self.present
        wanted = frozenset(chain.from_iterable(self._wanted.values()))
        try:
            for step in self._way(wanted):
                step()
        except BaseException as error:
            take_back(error, self._way(present))
            raise

    def close(self) -> None:
        """Take all doorbells away; the address space is not listened to any more."""
        self._space.unregister(self)
        self._wanted.clear()
        with ExitStack() as steps:  # all of them, whatever one raises
            for step in self._way(frozenset()):
                steps.callback(step)

    def _put(self, owner: object, doorbells: tuple[Doorbell, ...]) -> None:
        if doorbells:
            self._wanted[owner] = doorbells
        else:
            self._wanted.pop(owner, None)

    def _way(self, wanted: frozenset[Doorbell]) -> list[partial[None]]:
        gone = [partial(self._remove, doorbell) for doorbell in self._present - wanted]
        return gone + [partial(self._add, doorbell) for doorbell in wanted - self._present]

    def _add(self, doorbell: Doorbell) -> None:
        with whole(partial(self._discard, doorbell)):
            self._ask(doorbell, assign=True)
            self._present.add(doorbell)

    def _remove(self, doorbell: Doorbell) -> None:
        with whole(partial(self._discard, doorbell)):
            self._ask(doorbell, assign=False)
            self._present.discard(doorbell)

    def _discard(self, doorbell: Doorbell) -> None:
        """Make sure that KVM has none."""
        with suppress(VhostctlError):
            self._ask(doorbell, assign=False)
        self._present.discard(doorbell)

    def _ask(self, doorbell: Doorbell, *, assign: bool) -> None:
        self._vm.ioeventfd(
            doorbell.event.fileno(),
            doorbell.address,
            length=doorbell.length,
            datamatch=doorbell.datamatch,
            pio=doorbell.pio,
            assign=assign,
        )
