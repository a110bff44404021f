"""Registers of a device model that a guest may access at any offset and width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec

U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
"""What a register holds, in the saved state of a device."""


@dataclass(frozen=True, slots=True)
class Register:
    """`size` bytes at `offset`, little-endian; without `write` they are read-only.

    `read` has no effect on the device where there is `write`: a write to some of the bytes
    reads the others. `write` gets a value that fits the size, and `read` returns one.
    """

    offset: int
    size: int
    read: Callable[[], int]
    write: Callable[[int], None] | None = None


class Registers:
    """A BusDevice of registers; what is between them reads 0."""

    def __init__(self, registers: Iterable[Register]) -> None:
        """Have `registers`, of which no two overlap."""
        self._registers = sorted(registers, key=lambda register: register.offset)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`."""
        data = bytearray(length)
        for register, start, end in self._within(offset, length):
            value = register.read().to_bytes(register.size, "little")
            first = start - register.offset
            data[start - offset : end - offset] = value[first : first + end - start]
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`, one register after the other."""
        for register, start, end in self._within(offset, len(data)):
            if register.write is None:
                continue
            value = bytearray(register.size)
            if end - start < register.size:
                value[:] = register.read().to_bytes(register.size, "little")
            first = start - register.offset
            value[first : first + end - start] = data[start - offset : end - offset]
            register.write(int.from_bytes(value, "little"))

    def _within(self, offset: int, length: int) -> Iterator[tuple[Register, int, int]]:
        for register in self._registers:
            start = max(offset, register.offset)
            end = min(offset + length, register.offset + register.size)
            if start < end:
                yield register, start, end
