"""The guest's memory as it changes: regions come and go, and whoever has to know is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from vhostctl.control.memtable import MemoryTable
from vhostctl.errors import InvalidArgument, StateError, VhostctlError
from vhostctl.host import module
from vhostctl.host.closing import Closing
from vhostctl.host.memory import describe
from vhostctl.host.vhost import Region


class MemoryListener(Protocol):
    """Whoever has to know what the guest's memory is: vhost devices, a dirty log, an IOTLB."""

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:
        """Go over from one table to the other, or raise and be as before.

        Called once more the other way round if a listener behind this one raises; one that
        cannot go back raises then, and that is a note on the first error. For a listener that
        was touched the tables may be the same.
        """


class MemTableDevice(Protocol):
    """A device with a memory table; VhostNet is one."""

    def set_mem_table(self, regions: Iterable[Region]) -> None:
        """Replace the whole table, or raise and keep the old one."""


@dataclass(frozen=True, slots=True)
class NamedRegion:
    """One region of an address space: bytes, `name` or "", and `source`, what was added."""

    gpa: int
    size: int
    hva: int
    name: str
    source: Region

    def is_called(self, region: Region | str) -> bool:
        """Return whether this is `region`: its name, what was added, or this."""
        if isinstance(region, str):
            return bool(region) and region == self.name
        return region in (self.source, self)

    def __str__(self) -> str:
        return describe(self.gpa, self.size, self.name)


class Pin(Closing):
    """[gpa, gpa + length) stays at `hva` of this process until `close()`, because of `user`."""

    def __init__(self, space: AddressSpace, gpa: int, length: int, hva: int, user: str) -> None:
        self._space = space
        self.gpa = gpa
        self.length = length
        self.hva = hva
        self.user = user

    def close(self) -> None:
        """Let go of the range; a second call does nothing."""
        self._space.unpin(self)


class AddressSpace:
    """The guest's memory: regions by guest physical address, changed in transactions.

    It maps and closes nothing; what was removed may be closed once the transaction is over.
    `table` and `hva()` are for any thread, all else is for one thread at a time.
    """

    def __init__(self, regions: Iterable[Region] = (), limit: int | None = None) -> None:
        """Start with `regions`; see `add`.

        `limit` is the most entries of the merged table. None: what vhost's max_mem_regions
        says at each commit.
        """
        self._limit = limit
        self._listeners: list[MemoryListener] = []
        self._pins: dict[Pin, None] = {}
        self._regions: tuple[NamedRegion, ...] = ()
        self._pending: list[NamedRegion] = []
        self._touched: list[tuple[MemoryListener, Callable[[], None]]] = []
        self._depth = 0
        self._committing = False
        self._table = MemoryTable(())
        with self.transaction():
            for region in regions:
                self.add(region)

    @property
    def regions(self) -> tuple[NamedRegion, ...]:
        """What was added and not removed, as last committed and in this order."""
        return self._regions

    @property
    def table(self) -> MemoryTable:
        """The regions sorted and merged, as last committed.

        While listeners are asked it is the new one already, so that nobody who looks an
        address up finds memory of which a listener was told that it went.
        """
        return self._table

    def hva(self, gpa: int, length: int, what: str = "memory") -> int:
        """Return where this process has [gpa, gpa + length), which `what` occupies.

        Raises InvalidArgument unless the whole range lies inside one entry of the table.
        """
        return self._table.hva(gpa, length, what)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make what changes inside the with block one change, committed at its end.

        One inside another is committed with the outermost. An exception takes back what
        changed inside the block it leaves, and no listener hears of it. The commit raises
        InvalidArgument (overlap, too many regions, a pinned range) and what listeners raise;
        then all is as before. Raises StateError if a listener asks for it from `commit()`.
        """
        if self._committing:
            raise StateError(
                "a memory listener cannot change the memory that is being committed",
                hint="change it after the transaction",
            )
        before, touched = list(self._pending), len(self._touched)
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._committing = True
                self._commit()
                self._touched.clear()
        except BaseException as error:
            self._pending = list(self._regions) if self._depth == 1 else before
            self._forget(error, touched)
            raise
        finally:
            self._depth -= 1
            self._committing = False

    def add(self, region: Region, name: str = "") -> None:
        """Add `region`, which is called `name`, or as it calls itself.

        Raises InvalidArgument if the name is taken; see `transaction` for what else.
        """
        name = name or getattr(region, "name", "")
        with self.transaction():
            if name and any(other.name == name for other in self._pending):
                raise InvalidArgument(
                    f"there is a memory region {name!r} already", hint="give it another name"
                )
            self._pending.append(
                NamedRegion(region.gpa, region.size, region.hva, name, source=region)
            )

    def remove(self, region: Region | str) -> None:
        """Remove a region: by its name, what was added, or its entry of `regions`.

        Raises InvalidArgument if it is not there; see `transaction` for what else.
        """
        with self.transaction():
            for at, entry in enumerate(self._pending):
                if entry.is_called(region):
                    del self._pending[at]
                    return
            wanted = repr(region) if isinstance(region, str) else f"at {region.gpa:#x}"
            known = ", ".join(map(str, self._pending)) or "none"
            raise InvalidArgument(f"no memory region {wanted} to remove", hint=f"there is: {known}")

    def touch(self, listener: MemoryListener, undo: Callable[[], None]) -> None:
        """Ask `listener` at the commit even if the memory stays, for changes of its own.

        `undo` takes them back: it is called if the block that we are in is left by an exception
        or the commit fails, and then before the listener is asked to go back. Raises
        StateError outside a transaction.
        """
        if not self._depth:
            raise StateError(
                "a memory listener is touched outside a transaction",
                hint="change it inside `with space.transaction()`",
            )
        self._touched.append((listener, undo))

    def register(self, listener: MemoryListener) -> None:
        """Tell `listener` of the present table, and of every later one.

        Listeners are asked in the order in which they came. What this one raises goes up,
        and it is not registered.
        """
        listener.commit(MemoryTable(()), self._table)
        self._listeners.append(listener)

    def unregister(self, listener: MemoryListener) -> None:
        """Tell `listener` nothing any more; what it knows, it keeps."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def pin(self, gpa: int, length: int, user: str) -> Pin:
        """Keep [gpa, gpa + length) where it is; `user` says what it is for in errors.

        Until the pin is closed, a commit that removes or moves any of it raises
        InvalidArgument, which names region and user. Raises InvalidArgument unless the
        whole range lies inside one entry of the table.
        """
        pin = Pin(self, gpa, length, self.hva(gpa, length, user), user)
        self._pins[pin] = None
        return pin

    def unpin(self, pin: Pin) -> None:
        """Let go of what `pin` keeps; a second call does nothing."""
        self._pins.pop(pin, None)

    def _commit(self) -> None:
        limit = module.max_mem_regions() if self._limit is None else self._limit
        before, after = self._table, MemoryTable(self._pending, limit)
        self._check_pins(after)
        changed = after.regions != before.regions
        touched = [listener for listener, _ in self._touched]
        listeners = [one for one in self._listeners if changed or one in touched]
        regions, told = self._regions, list[MemoryListener]()
        try:
            self._table, self._regions = after, tuple(self._pending)
            for listener in listeners:
                listener.commit(before, after)
                told.append(listener)
        except BaseException as error:
            self._table, self._regions = before, regions
            self._forget(error, 0)
            take_back(
                error, (partial(listener.commit, after, before) for listener in reversed(told))
            )
            raise

    def _forget(self, error: BaseException, since: int) -> None:
        """Take back what touched listeners changed of their own, but for the first `since`."""
        take_back(error, [undo for _, undo in reversed(self._touched[since:])])
        del self._touched[since:]

    def _check_pins(self, after: MemoryTable) -> None:
        for pin in self._pins:
            if after.find(pin.gpa, pin.length) == pin.hva:
                continue
            region = next(
                region
                for region in self._regions
                if region not in self._pending
                and region.gpa < pin.gpa + pin.length
                and pin.gpa < region.gpa + region.size
            )
            raise InvalidArgument(
                f"{region} is in use by {pin.user}", hint="stop what uses it before it is removed"
            )


class VhostMemory:
    """The listener that gives every vhost device the table (VHOST_SET_MEM_TABLE)."""

    def __init__(self, devices: Sequence[MemTableDevice]) -> None:
        """Speak to `devices`, in this order; each must have an owner, or it says EPERM."""
        self._devices = tuple(devices)

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:
        """Set `after` on every device; if one refuses, those ahead of it get `before` again.

        Raises what the device raises: KernelError (EFAULT, EPERM...) or ClosedError.
        """
        done = 0
        try:
            for device in self._devices:
                device.set_mem_table(after.regions)
                done += 1
        except BaseException as error:
            # An interrupt says nothing about whether the device took the table.
            done += not isinstance(error, VhostctlError)
            changed = reversed(self._devices[:done])
            take_back(error, (partial(device.set_mem_table, before.regions) for device in changed))
            raise


def take_back(error: BaseException, steps: Iterable[Callable[[], None]]) -> None:
    """Take every one of `steps`, because of `error`; what they raise is a note on it."""
    for step in steps:
        try:
            step()
        except BaseException as second:  # noqa: BLE001 -- the first error is the one to report
            error.add_note(f"while taking the memory table back: {second}")
