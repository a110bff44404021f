"""MSI-X: a table of messages in a BAR, each of which can be masked. PCI 3.0, section 6.8.2."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import msgspec

from vhostctl.abi import pci
from vhostctl.errors import InvalidArgument
from vhostctl.vmm.interrupts import Msi
from vhostctl.vmm.pcifunction import Capability
from vhostctl.vmm.registers import U16

MAX_VECTORS = pci.PCI_MSIX_FLAGS_QSIZE + 1

_ENTRY = struct.Struct("<QII")
_FLAGS = struct.Struct("<H")
_PAGE = 4096
_MASKED = pci.PCI_MSIX_ENTRY_CTRL_MASKBIT


class MsixState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The control word of the capability, and the table: 16 bytes for each vector."""

    flags: U16
    table: bytes


class Msix:
    """The vectors of a function: what its BAR shows, table first, and its capability.

    `changed` is called with the vectors, all that one write changes at once, that send another
    message now, or None: masked, function masked, or MSI-X is off. `pending(vector)` is asked
    for the PBA.
    """

    def __init__(
        self,
        count: int,
        changed: Callable[[Mapping[int, Msi | None]], None],
        pending: Callable[[int], bool],
        switched: Callable[[], None] = lambda: None,
    ) -> None:
        """Have `count` vectors, masked; `switched` is called when `enabled` becomes another.

        Raises InvalidArgument unless `count` is one that a function can have.
        """
        if not 1 <= count <= MAX_VECTORS:
            raise InvalidArgument(f"{count} MSI-X vectors", hint=f"use 1 to {MAX_VECTORS}")
        self.count = count
        self._changed = changed
        self._pending = pending
        self._switched = switched
        self._flags = 0
        self._table = bytearray(_ENTRY.pack(0, 0, _MASKED) * count)
        self._told: list[Msi | None] = [None] * count
        self._pba = -(-len(self._table) // _PAGE) * _PAGE
        self.bar_size = 1 << (self._pba + _PAGE - 1).bit_length()

    @property
    def enabled(self) -> bool:
        """Whether the function sends messages, and no INTx."""
        return bool(self._flags & pci.PCI_MSIX_FLAGS_ENABLE)

    def message(self, vector: int) -> Msi | None:
        """Return what `vector` sends now; None while it is masked or MSI-X is off."""
        return self._told[vector] if vector < self.count else None

    def capability(self, bar: int) -> Capability:
        """Return the capability for a function that has this behind BAR `bar`."""
        body = struct.pack("<HII", self.count - 1, bar, self._pba | bar)
        writable = _FLAGS.pack(pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL)
        return Capability(pci.PCI_CAP_ID_MSIX, body, writable, written=self._control)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the BAR at `offset`; where there is nothing they are 0."""
        return bytes(map(self._byte, range(offset, offset + length)))

    def write(self, offset: int, data: bytes) -> None:
        """Write to the table, at any offset and width; nothing else can be written."""
        end = min(offset + len(data), len(self._table))
        if offset >= end:
            return
        self._table[offset:end] = data[: end - offset]
        vectors = range(offset // _ENTRY.size, (end - 1) // _ENTRY.size + 1)
        for vector in vectors:
            control = vector * _ENTRY.size + pci.PCI_MSIX_ENTRY_VECTOR_CTRL
            self._table[control : control + 4] = bytes((self._table[control] & _MASKED, 0, 0, 0))
        self._tell(vectors)

    def save(self) -> MsixState:
        """Return what the guest wrote."""
        return MsixState(self._flags, bytes(self._table))

    def restore(self, state: MsixState) -> None:
        """Be as `state` says, and tell of it. Raises InvalidArgument for another table size."""
        if len(state.table) != len(self._table):
            raise InvalidArgument(f"the state has {len(state.table)} bytes of MSI-X table")
        self._table[:] = state.table
        self._switch(state.flags)

    def _control(self, body: memoryview, part: range) -> None:  # noqa: ARG002
        self._switch(_FLAGS.unpack_from(body)[0])

    def _switch(self, flags: int) -> None:
        was, self._flags = self.enabled, flags
        if self.enabled != was:
            self._switched()
        self._tell(range(self.count))

    def _tell(self, vectors: range) -> None:
        quiet = (self._flags ^ pci.PCI_MSIX_FLAGS_ENABLE) & (
            pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL
        )
        changes: dict[int, Msi | None] = {}
        for vector in vectors:
            address, data, control = _ENTRY.unpack_from(self._table, vector * _ENTRY.size)
            message = None if quiet or control & _MASKED else Msi(address, data)
            if message != self._told[vector]:
                self._told[vector] = changes[vector] = message
        if changes:
            self._changed(changes)

    def _byte(self, at: int) -> int:
        if at < len(self._table):
            return self._table[at]
        first = 8 * (at - self._pba)
        if not 0 <= first < self.count:
            return 0
        vectors = range(first, min(first + 8, self.count))
        return sum(self._pending(vector) << (vector - first) for vector in vectors)
