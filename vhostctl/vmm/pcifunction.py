"""A PCI function: 256 bytes of configuration, of which the guest may write some.

PCI Local Bus 3.0: the header in section 6.1, BARs in 6.2.5, capabilities in 6.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from vhostctl.abi import pci
from vhostctl.errors import InvalidArgument
from vhostctl.vmm import layout
from vhostctl.vmm.bus import NOBODY, BusDevice

_INTA = 1

_COMMAND_BITS = (
    pci.PCI_COMMAND_IO
    | pci.PCI_COMMAND_MEMORY
    | pci.PCI_COMMAND_MASTER
    | pci.PCI_COMMAND_PARITY
    | pci.PCI_COMMAND_SERR
    | pci.PCI_COMMAND_INTX_DISABLE
)


@dataclass(frozen=True, slots=True)
class PciIds:
    """What a function says that it is; `class_code` is three bytes, the base class on top."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability: `body` behind its id and next pointer, and the bits of it to write.

    `writable` begins where `body` does and may be shorter. `reading` is called before the
    guest reads any of it, `written` after it wrote, with the body as it is, which they may
    change, and the part of it that is meant.
    """

    id: int
    body: bytes
    writable: bytes = b""
    reading: Callable[[memoryview, range], None] | None = None
    written: Callable[[memoryview, range], None] | None = None


@dataclass(slots=True)
class Bar:
    """A base address register: what answers, `size` bytes of it; `mapped` is where, or None."""

    index: int
    size: int
    device: BusDevice
    io: bool
    wide: bool
    mapped: int | None = None

    @property
    def register(self) -> int:
        """Where it is in configuration space; 8 bytes if it is `wide`, else 4."""
        return pci.PCI_BASE_ADDRESS_0 + 4 * self.index

    @property
    def window(self) -> range:
        """Where it can be: the host bridge passes nothing else on."""
        return layout.PCI_IO if self.io else layout.PCI_MEMORY


class PciState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration space of a function, 256 bytes."""

    config: bytes


class FunctionBus(Protocol):
    """What a function asks of the bus that it is on; vmm.pci.PciBus is one."""

    def refresh(self) -> None:
        """Map BARs where functions want them now."""

    def remove(self, function: PciFunction, /) -> None:
        """Take `function` out; nothing if it is not on this bus."""


class PciFunction:
    """One function: its configuration space, in which the guest can write what it may.

    A subclass adds BARs and capabilities before it is put on a bus.
    """

    def __init__(self, ids: PciIds, *, interrupt: bool = False) -> None:
        """Be what `ids` says; `interrupt` says that there is an INTx."""
        self.bars: list[Bar] = []
        self.bus: FunctionBus | None = None
        self.slot: int | None = None
        self._config = bytearray(pci.PCI_CFG_SPACE_SIZE)
        self._writable = bytearray(pci.PCI_CFG_SPACE_SIZE)
        self._capabilities: list[tuple[int, Capability]] = []
        self._last_link = pci.PCI_CAPABILITY_LIST
        self._free = pci.PCI_STD_HEADER_SIZEOF
        self._put(pci.PCI_VENDOR_ID, ids.vendor, 2)
        self._put(pci.PCI_DEVICE_ID, ids.device, 2)
        self._put(pci.PCI_REVISION_ID, ids.revision, 1)
        self._put(pci.PCI_CLASS_PROG, ids.class_code, 3)
        self._put(pci.PCI_SUBSYSTEM_VENDOR_ID, ids.subsystem_vendor, 2)
        self._put(pci.PCI_SUBSYSTEM_ID, ids.subsystem, 2)
        self._let(pci.PCI_COMMAND, _COMMAND_BITS, 2)
        if interrupt:
            self._put(pci.PCI_INTERRUPT_PIN, _INTA, 1)
            self._let(pci.PCI_INTERRUPT_LINE, 0xFF, 1)

    @property
    def command(self) -> int:
        """The command register, PCI_COMMAND_*."""
        return self._get(pci.PCI_COMMAND, 2)

    @property
    def gsi(self) -> int | None:
        """The GSI of its INTx; None while it is on no bus."""
        return None if self.slot is None else layout.intx_gsi(self.slot)

    def add_bar(
        self, index: int, size: int, device: BusDevice, *, io: bool = False, wide: bool = False
    ) -> Bar:
        """Have `device` behind BAR `index`; `wide` ones are 64 bits and take the next one too.

        Raises InvalidArgument unless `size` is a power of two, at least 16 bytes (4 of I/O),
        and for an `index` that there is not, or that another BAR has.
        """
        registers = range(index, index + 1 + wide)
        taken = {n for bar in self.bars for n in range(bar.index, bar.index + 1 + bar.wide)}
        if registers.stop > pci.PCI_STD_NUM_BARS or taken.intersection(registers):
            raise InvalidArgument(
                f"BAR {index}", hint=f"use one of 0 to {pci.PCI_STD_NUM_BARS - 1} that is free"
            )
        if size & (size - 1) or size < (4 if io else 16):
            raise InvalidArgument(f"BAR of {size} bytes", hint="use a power of two from 16 on")
        bar = Bar(index, size, device, io, wide)
        flags = pci.PCI_BASE_ADDRESS_SPACE_IO if io else wide and pci.PCI_BASE_ADDRESS_MEM_TYPE_64
        width = 8 if wide else 4
        self._put(bar.register, flags, width)
        self._let(bar.register, -size & (1 << 8 * width) - 1, width)
        self.bars.append(bar)
        return bar

    def add_capability(self, capability: Capability) -> int:
        """Put a capability behind the others; returns its offset.

        Raises InvalidArgument if configuration space is full.
        """
        at, size = self._free, 2 + len(capability.body)
        if at + size > pci.PCI_CFG_SPACE_SIZE:
            raise InvalidArgument(f"capability {capability.id:#x}: configuration space is full")
        self._put(self._last_link, at, 1)
        self._put(at + pci.PCI_CAP_LIST_ID, capability.id, 1)
        self._last_link = at + pci.PCI_CAP_LIST_NEXT
        self._config[at + 2 : at + size] = capability.body
        self._writable[at + 2 : at + 2 + len(capability.writable)] = capability.writable
        self._config[pci.PCI_STATUS] |= pci.PCI_STATUS_CAP_LIST
        self._capabilities.append((at, capability))
        self._free = (at + size + 3) & ~3
        return at

    def read_config(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`; past the end they are all ones."""
        for capability, body, part in self._touched(offset, length):
            if capability.reading is not None:
                capability.reading(body, part)
        return bytes(self._config[offset : offset + length]).ljust(length, NOBODY)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`, as far as it can be written."""
        command = self.command
        end = min(offset + len(data), pci.PCI_CFG_SPACE_SIZE)
        for at, value in zip(range(offset, end), data, strict=False):
            mask = self._writable[at]
            self._config[at] = self._config[at] & ~mask | value & mask
        for capability, body, part in self._touched(offset, len(data)):
            if capability.written is not None:
                capability.written(body, part)
        bars = range(pci.PCI_BASE_ADDRESS_0, pci.PCI_BASE_ADDRESS_5 + 4)
        if self.command != command:
            self.command_written(command)
        if self.bus is not None and (
            self.command != command or (offset < bars.stop and bars.start < end)
        ):
            self.bus.refresh()

    def base(self, bar: Bar) -> int:
        """Return what the register of `bar` says, wherever that is."""
        return self._get(bar.register, 8 if bar.wide else 4) & -bar.size

    def place(self, bar: Bar, address: int) -> None:
        """Write `address` to the register of `bar`, as firmware does; maps nothing yet."""
        flags = self._get(bar.register, 1) & ~self._writable[bar.register]
        self._put(bar.register, address | flags, 8 if bar.wide else 4)

    def wanted(self, bar: Bar) -> int | None:
        """Return where `bar` has to be mapped: None if it is off or outside its window."""
        if not self.command & (pci.PCI_COMMAND_IO if bar.io else pci.PCI_COMMAND_MEMORY):
            return None
        base = self.base(bar)
        return base if base in bar.window and base + bar.size <= bar.window.stop else None

    def bars_moved(self) -> None:
        """Be told that `mapped` of BARs is another one now."""

    def unplugged(self) -> None:
        """Be told that it leaves its slot now."""

    def command_written(self, before: int) -> None:
        """Be told that the command register, which was `before`, is another one now."""

    def show_interrupt(self, *, asserted: bool) -> None:
        """Have the status register say whether the function wants an INTx."""
        status = self._config[pci.PCI_STATUS] & ~pci.PCI_STATUS_INTERRUPT
        self._config[pci.PCI_STATUS] = status | (pci.PCI_STATUS_INTERRUPT if asserted else 0)

    def set_interrupt_line(self, gsi: int) -> None:
        """Write the interrupt line register, in which firmware leaves where INTx goes."""
        if self._config[pci.PCI_INTERRUPT_PIN]:
            self._put(pci.PCI_INTERRUPT_LINE, gsi, 1)

    def save_config(self) -> PciState:
        """Return the configuration space."""
        return PciState(bytes(self._config))

    def restore_config(self, state: PciState) -> None:
        """Have what the guest wrote before, and map BARs as it says; tells no capability.

        Raises InvalidArgument if that was of another function.
        """
        self.show_interrupt(asserted=False)
        theirs = bytearray(state.config)
        if len(theirs) > pci.PCI_STATUS:
            theirs[pci.PCI_STATUS] &= ~pci.PCI_STATUS_INTERRUPT
        same = len(theirs) == len(self._config) and not any(
            (mine ^ other) & ~mask
            for mine, other, mask in zip(self._config, theirs, self._writable, strict=True)
        )
        if not same:
            raise InvalidArgument(
                f"the state in slot {self.slot} is of another PCI function",
                hint="give the machine the devices that it had",
            )
        self._config[:] = theirs
        if self.bus is not None:
            self.bus.refresh()

    def _touched(self, offset: int, length: int) -> Iterator[tuple[Capability, memoryview, range]]:
        for at, capability in self._capabilities:
            start, size = at + 2, len(capability.body)
            part = range(max(offset - start, 0), min(offset + length - start, size))
            if part:
                yield capability, memoryview(self._config)[start : start + size], part

    def _get(self, offset: int, width: int) -> int:
        return int.from_bytes(self._config[offset : offset + width], "little")

    def _put(self, offset: int, value: int, width: int) -> None:
        self._config[offset : offset + width] = value.to_bytes(width, "little")

    def _let(self, offset: int, mask: int, width: int) -> None:
        self._writable[offset : offset + width] = mask.to_bytes(width, "little")
