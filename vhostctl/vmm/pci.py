"""The PCI bus of a PC: configuration mechanism #1, and BARs on the buses of the machine.

PCI Local Bus 3.0, section 3.2.2.3.2. There is bus 0 only, and one function per slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from vhostctl.errors import InvalidArgument
from vhostctl.vmm import layout
from vhostctl.vmm.bus import NOBODY, Bus
from vhostctl.vmm.log import log
from vhostctl.vmm.pcifunction import Bar, PciFunction, PciIds, PciState

_DATA = 4
_ENABLE = 1 << 31


class PciBusState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The address register (port 0xCF8), and the host bridge."""

    address: int
    bridge: PciState


class HostBridge(PciFunction):
    """What Linux wants to see in slot 0 before it trusts configuration mechanism #1."""

    def __init__(self) -> None:
        super().__init__(PciIds(vendor=0x8086, device=0x0D57, class_code=0x06_00_00))


class PciBus:
    """Bus 0: configuration by ports 0xCF8 to 0xCFF, and BARs on the buses of the machine."""

    def __init__(self, ports: Bus, mmio: Bus) -> None:
        """Answer on `ports`. Raises InvalidArgument if one of the ports is taken."""
        self._buses = {True: ports, False: mmio}
        self._address = 0
        self._slots: list[PciFunction | None] = [None] * layout.PCI_SLOTS
        self._bridge = HostBridge()
        self.add(self._bridge)
        ports.add(layout.PCI_CONFIG_PORTS.start, len(layout.PCI_CONFIG_PORTS), self)

    def add(self, function: PciFunction) -> int:
        """Put `function` into the first slot that is free, its BARs placed; returns the slot.

        Raises InvalidArgument if there is no slot or no room for a BAR.
        """
        if None not in self._slots:
            raise InvalidArgument(f"all {layout.PCI_SLOTS} PCI slots are taken")
        slot = self._slots.index(None)
        for bar in function.bars:
            function.place(bar, self._room(bar, function))
        function.bus, function.slot = self, slot
        function.set_interrupt_line(layout.intx_gsi(slot))
        self._slots[slot] = function
        return slot

    def remove(self, function: PciFunction) -> None:
        """Take `function` out; nothing if it is not on this bus."""
        if function.bus is not self or function.slot is None:
            return
        function.unplugged()
        for bar in function.bars:
            self._unmap(bar)
        self._slots[function.slot] = None
        function.bus = function.slot = None
        function.bars_moved()
        self.refresh()

    def refresh(self) -> None:
        """Map each BAR where its function wants it, and tell functions whose BARs moved.

        One that lies over another device is not mapped until that one has gone.
        """
        # In this order of functions doorbells leave an address before others come to it.
        moved: dict[PciFunction, None] = {}
        for function in self._functions():
            for bar in function.bars:
                if bar.mapped is not None and bar.mapped != function.wanted(bar):
                    self._unmap(bar)
                    moved[function] = None
        for function in self._functions():
            for bar in function.bars:
                if bar.mapped is None and self._map(bar, function.wanted(bar)):
                    moved[function] = None
        for function in moved:
            function.bars_moved()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the two registers."""
        if offset >= _DATA:
            function = self._selected()
            if function is not None:
                return function.read_config(self._register(offset), length)
        elif (offset, length) == (0, 4):
            return self._address.to_bytes(4, "little")
        return NOBODY * length

    def write(self, offset: int, data: bytes) -> None:
        """Write one of the two registers; the address takes four bytes at once."""
        if offset >= _DATA:
            function = self._selected()
            if function is not None:
                function.write_config(self._register(offset), data)
        elif (offset, len(data)) == (0, 4):
            self._address = int.from_bytes(data, "little")

    def save(self) -> PciBusState:
        """Return what there is to know besides the functions that were added."""
        return PciBusState(self._address, self._bridge.save_config())

    def restore(self, state: PciBusState) -> None:
        """Be as `state` says. Raises InvalidArgument if it is of another host bridge."""
        self._bridge.restore_config(state.bridge)
        self._address = state.address & 0xFFFF_FFFF

    def _functions(self) -> Iterator[PciFunction]:
        return (function for function in self._slots if function is not None)

    def _selected(self) -> PciFunction | None:
        elsewhere = self._address >> 16 & 0xFF or self._address >> 8 & 7
        if not self._address & _ENABLE or elsewhere:
            return None
        return self._slots[self._address >> 11 & 0x1F]

    def _register(self, offset: int) -> int:
        return (self._address & 0xFC) + offset - _DATA

    def _room(self, bar: Bar, beside: PciFunction) -> int:
        functions = (*self._functions(), beside)
        bars = [(f.base(b), b) for f in functions for b in f.bars if b.io == bar.io]
        at = bar.window.start
        for base, other in sorted(bars, key=lambda entry: entry[0]):
            if at < base + other.size and base < at + bar.size:
                at = -(-(base + other.size) // bar.size) * bar.size
        if at + bar.size > bar.window.stop:
            raise InvalidArgument(f"no room for a BAR of {bar.size} bytes")
        return at

    def _map(self, bar: Bar, address: int | None) -> bool:
        if address is None:
            return False
        try:
            self._buses[bar.io].add(address, bar.size, bar.device)
        except InvalidArgument as error:
            log.debug("a guest's BAR is not mapped: %s", error)
            return False
        bar.mapped = address
        return True

    def _unmap(self, bar: Bar) -> None:
        if bar.mapped is not None:
            self._buses[bar.io].remove(bar.mapped)
            bar.mapped = None
