"""Bytes of guest memory, for whoever plays the device without vhost: checked, then copied."""

from __future__ import annotations

import ctypes

from vhostctl.control.addressspace import AddressSpace


def read(space: AddressSpace, gpa: int, length: int, what: str = "memory") -> bytes:
    """Return [gpa, gpa + length) of the guest, which `what` occupies.

    Raises InvalidArgument unless the range lies inside one entry of the memory table.
    """
    return ctypes.string_at(space.hva(gpa, length, what), length)


def write(space: AddressSpace, gpa: int, data: bytes, what: str = "memory") -> None:
    """Store `data` at `gpa`; see `read`."""
    ctypes.memmove(space.hva(gpa, len(data), what), data, len(data))
