"""Guest memory in this process: regions of several kinds, each at one address."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vhostctl.errors import ClosedError, InvalidArgument, kernel_error
from vhostctl.host.closing import Closing
from vhostctl.host.handle import Handle

PAGE = 4096
"""Alignment of every region, bytes (VHOST_PAGE_SIZE, linux/vhost_types.h)."""

_MEMFD = "vhostctl-guest-memory"
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
_LESS = "ask for less memory"


class MappedRegion(Closing):
    """A region of guest memory that this process maps.

    `gpa` and `size` are bytes and multiples of 4096, `hva` is where this process has it and
    `name` what errors call it. Each kind has a constructor: `anonymous`, `memfd`, `hugetlb`,
    `file` and `from_fd`; `BorrowedRegion` is for memory that is mapped already. They raise
    InvalidArgument (alignment, a file that is too short) and KernelError (ENOMEM, EMFILE...).
    """

    def __init__(
        self,
        gpa: int,
        size: int,
        fd: int | None,
        *,
        offset: int = 0,
        shared: bool = True,
        name: str = "",
        hint: str = _LESS,
    ) -> None:
        """Map `size` bytes of `fd` from `offset` on; private zeroes if it is None.

        `fd` is this object's from here on, even if this raises. Unless `shared`, what is
        written stays in this process. `hint` is the remedy for ENOMEM.
        """
        self.gpa = gpa
        self.size = size
        self.name = name
        self.label = describe(gpa, size, name)
        self._offset = offset
        with contextlib.ExitStack() as stack:
            file = None if fd is None else stack.enter_context(Handle(fd, self.label))
            _check(gpa, size)
            if file is not None:
                _check_file(file, offset, size)
            self._map: mmap.mmap | None = _map(self.label, file, size, offset, shared, hint)
            self._file = file if shared else None
            if shared:
                stack.pop_all()  # keep the descriptor
        # An export that outlived this line would keep the mapping from being closed.
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def anonymous(cls, gpa: int, size: int, name: str = "") -> Self:
        """Map fresh memory that no other process can have."""
        return cls(gpa, size, None, name=name)

    @classmethod
    def memfd(cls, gpa: int, size: int, name: str = "") -> Self:
        """Map a fresh memfd; whoever gets `fileno()` can map the same memory."""
        _check(gpa, size)
        return cls(gpa, size, _memfd(size), name=name)

    @classmethod
    def hugetlb(cls, gpa: int, size: int, page_size: int = 2 << 20, name: str = "") -> Self:
        """Map a fresh memfd of huge pages of `page_size` bytes, of which `size` is a multiple.

        They must have been reserved; ENOMEM says where. Raises InvalidArgument for a size
        that this kernel does not have.
        """
        if page_size not in huge_page_sizes():
            known = ", ".join(map(str, huge_page_sizes())) or "none"
            raise InvalidArgument(f"huge pages of {page_size} bytes", hint=f"there are: {known}")
        _check(gpa, size, page_size)
        flags = os.MFD_HUGETLB | (page_size.bit_length() - 1) << os.MFD_HUGE_SHIFT
        pool = _HUGE_PAGES / f"hugepages-{page_size >> 10}kB/nr_hugepages"
        hint = f"{size // page_size} huge pages must be free: raise {pool}"
        return cls(gpa, size, _memfd(size, flags), name=name, hint=hint)

    @classmethod
    def file(
        cls,
        gpa: int,
        size: int,
        path: str | os.PathLike[str],
        offset: int = 0,
        *,
        shared: bool = True,
        name: str = "",
    ) -> Self:
        """Map `size` bytes of the file `path` from `offset` on, a multiple of 4096.

        With `shared`, what guest and device write is in the file, else only in this process.
        """
        flags = (os.O_RDWR if shared else os.O_RDONLY) | os.O_CLOEXEC
        try:
            fd = os.open(path, flags)
        except OSError as error:
            raise kernel_error(error.errno or 0, "open", os.fspath(path)) from error
        return cls(gpa, size, fd, offset=offset, shared=shared, name=name)

    @classmethod
    def from_fd(cls, gpa: int, size: int, fd: int, offset: int = 0, name: str = "") -> Self:
        """Map `size` bytes of `fd`, a memfd of another process say; `fd` stays the caller's."""
        try:
            own = os.dup(fd)
        except OSError as error:
            raise kernel_error(error.errno or 0, "dup", f"descriptor {fd}") from error
        return cls(gpa, size, own, offset=offset, name=name)

    def fileno(self) -> int:
        """Return the descriptor behind a shared region; it stays owned by this object.

        Raises InvalidArgument for a private region, ClosedError after `close()`.
        """
        if self._map is None:
            raise ClosedError(f"{self.label} is closed")
        if self._file is None:
            raise InvalidArgument(f"{self.label} is private", hint="use MappedRegion.memfd()")
        return self._file.fileno()

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of all that may hold other bytes than zero, by lseek(2).

        The rest was never touched, and reading it would allocate it. A private region, and
        a file system that does not know, have one extent.
        """
        end = 0
        while self._file is not None and end < self.size:
            fd, start = self._file.fileno(), self._offset
            try:
                at = os.lseek(fd, start + end, os.SEEK_DATA) - start
                if at >= self.size:
                    return
                end = min(os.lseek(fd, start + at, os.SEEK_HOLE) - start, self.size)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole
                    return
                break
            yield at, end - at
        if end < self.size:
            yield end, self.size - end

    def view(self) -> memoryview:
        """Return the region's bytes."""
        if self._map is None:
            raise ClosedError(f"{self.label} is closed")
        return memoryview(self._map)

    def close(self) -> None:
        """Unmap; no vhost descriptor may use the region any more. A second call does nothing.

        While a `view()` or another export is there, the memory stays mapped until that goes.
        """
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):
                mapping.close()
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class BorrowedRegion(Closing):
    """A region that somebody else mapped at `hva`; its `close()` leaves it mapped."""

    gpa: int
    size: int
    hva: int
    name: str = ""

    def __post_init__(self) -> None:
        """Raise InvalidArgument unless all three are multiples of 4096."""
        _check(self.gpa, self.size)
        if self.hva <= 0 or self.hva % PAGE:
            raise InvalidArgument(
                f"{describe(self.gpa, self.size, self.name)}: address {self.hva:#x}",
                hint=f"use a multiple of {PAGE} above 0",
            )

    def close(self) -> None:
        """Do nothing: the memory is its owner's."""


class GuestMemory(Closing):
    """Guest memory that is this process's own: a memfd for each region; a context manager.

    Close the vhost descriptors that use it first: their worker reads it until then.
    """

    def __init__(self, regions: Iterable[tuple[int, int]]) -> None:
        """Map one region for each (gpa, size) of `regions`, in bytes.

        Raises InvalidArgument (alignment, overlap) and KernelError (ENOMEM).
        """
        self.regions: list[MappedRegion] = []
        try:
            for gpa, size in sorted(regions):
                last = self.regions[-1] if self.regions else None
                if last is not None and gpa < last.gpa + last.size:
                    raise InvalidArgument(f"memory region {gpa:#x} overlaps {last.gpa:#x}")
                self.regions.append(MappedRegion.memfd(gpa, size))
        except BaseException:
            self.close()
            raise

    @classmethod
    def anonymous(cls, size: int, gpa: int = 0x1_0000_0000) -> Self:
        """Return one region of `size` bytes at guest physical address `gpa`."""
        return cls([(gpa, size)])

    def hva(self, gpa: int, length: int) -> int:
        """Return the host virtual address of [gpa, gpa + length).

        Raises InvalidArgument if the range is not inside one region.
        """
        for region in self.regions:
            if region.gpa <= gpa and length >= 0 and gpa + length <= region.gpa + region.size:
                return region.hva + (gpa - region.gpa)
        raise InvalidArgument(f"guest address {gpa:#x}+{length:#x} is outside every memory region")

    def close(self) -> None:
        """Unmap every region; a second call does nothing."""
        for region in self.regions:
            region.close()
        self.regions = []


def describe(gpa: int, size: int, name: str = "") -> str:
    """Return what errors call the region [gpa, gpa + size) of this name."""
    what = f"memory region {name!r}" if name else "memory region"
    return f"{what} {gpa:#x}+{size:#x}"


def huge_page_sizes() -> list[int]:
    """Return the sizes of huge pages that this kernel has, in bytes."""
    names = _HUGE_PAGES.glob("hugepages-*kB")
    return sorted(int(path.name.removeprefix("hugepages-")[:-2]) << 10 for path in names)


def _check(gpa: int, size: int, page: int = PAGE) -> None:
    # More than sys.maxsize bytes cannot be asked of mmap(2).
    if gpa < 0 or not 0 < size <= sys.maxsize or gpa % PAGE or size % page:
        raise InvalidArgument(
            f"{describe(gpa, size)} is not aligned to {page} bytes",
            hint=f"use multiples of {PAGE} for the address and of {page} for the size",
        )


def _check_file(file: Handle, offset: int, size: int) -> None:
    if offset < 0 or offset % PAGE:
        raise InvalidArgument(f"{file.label}: offset {offset}", hint=f"use a multiple of {PAGE}")
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and offset + size > found.st_size:
        raise InvalidArgument(
            f"{file.label}: the file has {found.st_size} bytes, {offset + size} are to be mapped",
            hint="an access behind its end would be fatal: lengthen it",
        )


def _memfd(size: int, flags: int = 0) -> int:
    """Return a memfd of `size` bytes; the caller closes it."""
    try:
        fd = os.memfd_create(_MEMFD, os.MFD_CLOEXEC | flags)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        target = f"{size} bytes of guest memory"
        raise kernel_error(error.errno or 0, "memfd_create", target) from error
    return fd


def _map(
    label: str, file: Handle | None, size: int, offset: int, shared: bool, hint: str
) -> mmap.mmap:
    flags = mmap.MAP_SHARED if shared and file is not None else mmap.MAP_PRIVATE
    if file is None:
        flags |= mmap.MAP_ANONYMOUS
    try:
        return mmap.mmap(-1 if file is None else file.fileno(), size, flags, offset=offset)
    except OSError as error:
        remedy = hint if error.errno == errno.ENOMEM else ""
        raise kernel_error(error.errno or 0, "mmap", label, remedy) from error
