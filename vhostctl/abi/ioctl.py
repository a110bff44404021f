"""Named ioctl requests whose numbers are built as ``asm-generic/ioctl.h`` builds them.

`ioctl_opt` does the arithmetic but validates with ``assert``: under ``python -O`` an
argument too large for the 14-bit size field would yield the number of another request.
The constructors here check first, and the result is unsigned as in the header.
"""

from __future__ import annotations

import ctypes
import dataclasses

import ioctl_opt

from vhostctl.abi.layout import Struct
from vhostctl.errors import InvalidArgument

Argument = (
    type[Struct]
    | type[ctypes.c_int]
    | type[ctypes.c_uint]
    | type[ctypes.c_uint8]
    | type[ctypes.c_uint64]
)

_MAX_SIZE = ioctl_opt.IOCSIZE_MASK >> ioctl_opt.IOCSIZE_SHIFT


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One ioctl request.

    Attributes:
        name: the kernel's name, such as ``VHOST_SET_OWNER``.
        number: the unsigned 32-bit request number.
        argument: type of what the third argument of ioctl(2) points to, or None if there is
            none. For a struct with a flexible tail this is the header without the tail.
        by_value: the third argument is the value itself and not a pointer to it.

    Raises InvalidArgument if `number` is not an unsigned 32-bit integer, or if a struct
    is to be passed by value.
    """

    name: str
    number: int
    argument: Argument | None = None
    by_value: bool = False

    def __post_init__(self) -> None:
        """Check what the class documents."""
        if not 0 <= self.number < 2**32:
            raise InvalidArgument(
                f"{self.name}: request number {self.number} is not unsigned 32-bit"
            )
        if self.by_value and (self.argument is None or issubclass(self.argument, Struct)):
            raise InvalidArgument(f"{self.name}: only an integer can be passed by value")


def io(name: str, magic: int, nr: int) -> Request:
    """Return the request that the header writes ``_IO(magic, nr)``; it takes no argument."""
    _check(name, magic, nr)
    return Request(name, ioctl_opt.IO(magic, nr))


def ior(
    name: str, magic: int, nr: int, encoded: Argument, *, argument: Argument | None = None
) -> Request:
    """Return the request that the header writes ``_IOR(magic, nr, encoded)``.

    `argument` is what the kernel really copies, where the header encodes another type.
    Raises InvalidArgument if `magic` or `nr` is not 8-bit, or `encoded` is 16 KiB or larger.
    """
    _check(name, magic, nr, encoded)
    return Request(name, ioctl_opt.IOR(magic, nr, encoded), argument or encoded)


def iow(
    name: str,
    magic: int,
    nr: int,
    encoded: Argument,
    *,
    argument: Argument | None = None,
    by_value: bool = False,
) -> Request:
    """Return the request that the header writes ``_IOW(magic, nr, encoded)``; see `ior`."""
    _check(name, magic, nr, encoded)
    return Request(name, ioctl_opt.IOW(magic, nr, encoded), argument or encoded, by_value)


def iowr(name: str, magic: int, nr: int, encoded: Argument) -> Request:
    """Return the request that the header writes ``_IOWR(magic, nr, encoded)``; see `ior`."""
    _check(name, magic, nr, encoded)
    return Request(name, ioctl_opt.IOWR(magic, nr, encoded), encoded)


def _check(name: str, magic: int, nr: int, encoded: Argument | None = None) -> None:
    size = ctypes.sizeof(encoded) if encoded else 0
    for what, value, limit in (("type", magic, 255), ("nr", nr, 255), ("size", size, _MAX_SIZE)):
        if not 0 <= value <= limit:
            raise InvalidArgument(f"{name}: ioctl {what} {value} is not in 0..{limit}")
