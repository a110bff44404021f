"""The dirty log: which pages of guest memory the devices wrote (VHOST_F_LOG_ALL).

It knows what vhost writes: received frames and used rings. What the guest's own processors
write is another log's business (KVM_GET_DIRTY_LOG); a migration takes the union of both.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Protocol, TypeVar

from vhostctl.abi.vhost import VHOST_PAGE_SIZE
from vhostctl.control.memtable import MemoryTable
from vhostctl.errors import ClosedError, StateError, VhostctlError, kernel_error
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd

T = TypeVar("T")

_WORD = 64  # pages in a word of the bitmap: QEMU's and the kernel's unit
_CHUNK = bytes(4096)
_BYTES = re.compile(rb"\xff+|[^\x00\xff]{1,8}")


class Span(Protocol):
    """A piece of guest memory, such as a region of the table; bytes on 4096-byte bounds."""

    @property
    def gpa(self) -> int:
        """Guest physical address."""

    @property
    def size(self) -> int:
        """Length."""


class LogTarget(Protocol):
    """What takes the address of the log: a VhostNet."""

    def set_log_base(self, hva: int, /) -> None:
        """VHOST_SET_LOG_BASE."""

    def set_log_fd(self, eventfd: int | None, /) -> None:
        """VHOST_SET_LOG_FD."""


class Loggable(Protocol):
    """A device and the rings on it: a VhostPair."""

    @property
    def vhost(self) -> LogTarget:
        """The device."""

    def set_logging(self, enabled: bool, /) -> None:
        """Switch VHOST_F_LOG_ALL, and VHOST_VRING_F_LOG of both rings."""

    def log_end(self) -> int:
        """Return the first gpa behind what the device logs of its own accord."""


class DirtyPages:
    """A set of pages of 4096 bytes of guest memory; immutable.

    Iterates as (gpa, bytes), in order and neighbours merged. `|` is the union.
    """

    __slots__ = ("_bits",)

    def __init__(self, bits: int = 0) -> None:
        """Bit n of `bits` stands for the page at 4096 * n."""
        self._bits = bits

    @property
    def count(self) -> int:
        """How many pages."""
        return self._bits.bit_count()

    def within(self, span: Span) -> DirtyPages:
        """Return those that lie in `span`."""
        pages = (1 << span.size // VHOST_PAGE_SIZE) - 1
        return DirtyPages(self._bits & pages << span.gpa // VHOST_PAGE_SIZE)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = end = 0
        for first, last in _runs(self._bits):
            if first != end:
                if start != end:
                    yield start * VHOST_PAGE_SIZE, (end - start) * VHOST_PAGE_SIZE
                start = first
            end = last
        if start != end:
            yield start * VHOST_PAGE_SIZE, (end - start) * VHOST_PAGE_SIZE

    def __or__(self, other: DirtyPages) -> DirtyPages:
        return DirtyPages(self._bits | other._bits)

    def __bool__(self) -> bool:
        return bool(self._bits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DirtyPages) and self._bits == other._bits

    def __hash__(self) -> int:
        return hash(self._bits)

    def __repr__(self) -> str:
        return f"<DirtyPages {self.count}>"


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of ones as (first, behind the last), cut anywhere, in order.

    C finds what is not 0: the log of 64 GiB has 2 MiB, nearly all of it empty.
    """
    data = bits.to_bytes(-(-bits.bit_length() // 8), "little")
    for start in range(0, len(data), len(_CHUNK)):
        chunk = data[start : start + len(_CHUNK)]
        if chunk == _CHUNK:
            continue
        for match in _BYTES.finditer(chunk):
            at = 8 * (start + match.start())
            if match[0][0] == 0xFF:
                yield at, at + 8 * len(match[0])
                continue
            rest = int.from_bytes(match[0], "little")
            while rest:
                zeros = (rest & -rest).bit_length() - 1
                rest >>= zeros
                ones = (~rest & rest + 1).bit_length() - 1
                rest >>= ones
                at += zeros
                yield at, at + ones
                at += ones


class _Bitmap:
    """A bit for each page below `end` at least, mapped until `close()`.

    Private and anonymous: pages that no device wrote to cost nothing, read or not.
    """

    def __init__(self, end: int) -> None:
        words = -(-end // (VHOST_PAGE_SIZE * _WORD)) or 1
        size = words * _WORD // 8
        try:
            self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise kernel_error(error.errno or 0, "mmap", f"{size} bytes of dirty log") from error
        anchor = ctypes.c_char.from_buffer(self._map)
        self.hva = ctypes.addressof(anchor)
        del anchor  # it would keep the mapping from being closed
        self.end = words * _WORD * VHOST_PAGE_SIZE

    def take(self) -> DirtyPages:
        """Return what is set and clear it; no device may write meanwhile."""
        bits = int.from_bytes(self._map, "little")
        if bits:
            self._map[:] = bytes(len(self._map))
        return DirtyPages(bits)

    def close(self) -> None:
        self._map.close()


def _unless_closed(action: Callable[[T], None], argument: T) -> None:
    with suppress(ClosedError):  # a device that is closed writes nothing
        action(argument)


class DirtyLog(Closing):
    """The dirty log of all devices of a VM, in one bitmap that they share.

    `start()`, `sync()` as often as needed, `stop()`; then again, if wanted. The devices are
    those of `pairs` at `start()`. `event` is signalled when something was logged.

    As a listener of an AddressSpace it is to be registered before the one that tells the
    devices: while started the log only ever grows, so that it is large enough before a device
    knows of more memory, and after a change that was refused. Pages of a region that is gone
    may be reported once more; `DirtyPages.within` leaves them out.

    Stop it, or close the devices, before it is dropped: until then they write to its memory.
    Not synchronised: one thread at a time.
    """

    # QEMU takes words out of the bitmap while the kernel sets bits in it, with an atomic
    # exchange that Python lacks. Here every device is given the other of two bitmaps, and the
    # first is read when nobody writes to it any more: a device changes the base of each ring
    # under the lock that its worker holds for a whole run, and its answer waits for the worker.
    #
    # If a device refuses, some write to the one bitmap and some to the other, both rings of
    # a device perhaps (SET_LOG_BASE is applied ring by ring). That loses nothing and needs no
    # way back: both stay mapped, and both are read by the next two that succeed.

    def __init__(
        self, pairs: Sequence[Loggable], table: MemoryTable, event: EventFd | None = None
    ) -> None:
        self._pairs = pairs
        self._table = table
        self._event = event
        self._told: list[Loggable] = []
        self._logging: list[Loggable] = []
        self._bitmaps: list[_Bitmap] = []  # where the devices write, where they will, outgrown
        self._carried = DirtyPages()

    @property
    def started(self) -> bool:
        """Whether the devices log."""
        return bool(self._bitmaps)

    def start(self) -> None:
        """Log from now on. Raises KernelError and StateError; then all is as it was."""
        if self.started:
            raise StateError("the dirty log is started", hint="stop it first")
        end = max(self._table.end, *(pair.log_end() for pair in self._pairs), 0)
        self._bitmaps = [_Bitmap(end), _Bitmap(end)]
        self._carried = DirtyPages()
        try:
            for pair in list(self._pairs):
                self._give_to(pair)
            for pair in self._told:
                self._logging.append(pair)  # first: what fails may be half done
                pair.set_logging(True)
        except BaseException as error:
            try:
                self._quiet()
            except VhostctlError as second:
                error.add_note(f"while undoing: {second}")
            self._release()
            raise

    def _give_to(self, pair: Loggable) -> None:
        try:
            pair.vhost.set_log_base(self._bitmaps[0].hva)
            if self._event is not None:
                pair.vhost.set_log_fd(self._event.fileno())
            self._told.append(pair)
        except BaseException:
            with suppress(VhostctlError):  # one of its rings may have taken it
                self._take_from(pair)
            raise

    def sync(self) -> DirtyPages:
        """Return what was written since the last `sync()` or `start()`.

        Raises StateError, and KernelError if a device refuses: then `stop()`, or the next
        two of these, have it all.
        """
        self._expect_started()
        now, other, *outgrown = self._bitmaps
        self._switch(other)
        self._bitmaps = [other, now, *outgrown]
        self._collect(now)
        pages, self._carried = self._carried, DirtyPages()
        return pages

    def stop(self) -> DirtyPages:
        """Log no longer; return what was written since the last `sync()`.

        Raises StateError, and KernelError if a device refuses: all are told, and the log
        stays started for another `stop()`.
        """
        self._expect_started()
        self._quiet()
        pages = self._carried
        for bitmap in self._bitmaps:
            pages |= bitmap.take()
        self._release()
        return pages

    def commit(self, before: MemoryTable, after: MemoryTable) -> None:  # noqa: ARG002
        """Grow with the memory table, as its listener. Raises KernelError: nothing changed."""
        if self.started and after.end > self._bitmaps[0].end:
            self._grow(after.end)
        self._table = after

    def _grow(self, end: int) -> None:
        larger = _Bitmap(end), _Bitmap(end)
        self._bitmaps = [*larger, *self._bitmaps]
        self._switch(larger[0])
        self._collect()

    def _switch(self, bitmap: _Bitmap) -> None:
        for pair in self._told:
            pair.vhost.set_log_base(bitmap.hva)

    def _collect(self, *quiet: _Bitmap) -> None:
        """Take what is in `quiet` and in the outgrown bitmaps; the latter go."""
        for bitmap in (*quiet, *self._bitmaps[2:]):
            self._carried |= bitmap.take()
        while len(self._bitmaps) > 2:
            self._bitmaps.pop().close()

    def _quiet(self) -> None:
        """Take the log from every device, whatever another says; raises an error at the end."""
        with ExitStack() as every:
            for pair in self._told:
                every.callback(_unless_closed, self._take_from, pair)
            for pair in self._logging:  # run first: last in, first out
                every.callback(_unless_closed, pair.set_logging, False)

    def _take_from(self, pair: Loggable) -> None:
        # What a device starts with. It writes nothing without both flags; this waits for its
        # worker, and leaves no address behind that something else may be mapped at.
        pair.vhost.set_log_base(0)
        if self._event is not None:
            pair.vhost.set_log_fd(None)

    def _release(self) -> None:
        for bitmap in self._bitmaps:
            bitmap.close()
        self._bitmaps, self._told, self._logging = [], [], []
        self._carried = DirtyPages()

    def _expect_started(self) -> None:
        if not self.started:
            raise StateError("the dirty log is not started", hint="call start() first")

    def close(self) -> None:
        """Stop if it is started; a second call does nothing. Raises as `stop()` does."""
        if self.started:
            self.stop()
