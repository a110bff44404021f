"""Guest memory that this process maps: one shared mapping per region."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from typing import Self

from vhostctl.errors import ClosedError, InvalidArgument, kernel_error
from vhostctl.host.closing import Closing

PAGE = 4096
"""Alignment of every region, bytes (VHOST_PAGE_SIZE, linux/vhost_types.h)."""


class MappedRegion:
    """One region of guest memory, backed by a memfd so that it can be shared.

    `gpa` and `size` are bytes and multiples of 4096; `hva` is where this process has it.
    """

    def __init__(self, gpa: int, size: int) -> None:
        if gpa < 0 or size <= 0 or gpa % PAGE or size % PAGE:
            raise InvalidArgument(
                f"memory region {gpa:#x}+{size:#x} is not aligned to {PAGE} bytes",
                hint="use multiples of 4096 for address and size",
            )
        self.gpa = gpa
        self.size = size
        self._map: mmap.mmap | None = None
        try:
            fd = os.memfd_create("vhostctl-guest-memory", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, size)
                self._map = mmap.mmap(fd, size, mmap.MAP_SHARED)
            finally:
                os.close(fd)
        except OSError as error:
            raise kernel_error(
                error.errno or 0, "mmap", f"{size} bytes of guest memory", "ask for less memory"
            ) from error
        anchor = ctypes.c_char.from_buffer(self._map)
        self.hva = ctypes.addressof(anchor)
        del anchor  # it would keep the mapping from being closed

    def view(self) -> memoryview:
        """Return the region's bytes; release the view before `close()`."""
        if self._map is None:
            raise ClosedError(f"memory region {self.gpa:#x} is closed")
        return memoryview(self._map)

    def close(self) -> None:
        """Unmap; no descriptor may use the region any more. A second call does nothing."""
        if self._map is not None:
            self._map.close()
            self._map = None


class GuestMemory(Closing):
    """The guest's address space as this process maps it; a context manager.

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
                self.regions.append(MappedRegion(gpa, size))
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
