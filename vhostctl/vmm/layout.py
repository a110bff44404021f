"""Where things are in the guest: memory, I/O ports and interrupt lines of the PC.

A `range` is of guest physical addresses or of I/O ports, in bytes. Everything below 1 MiB
is firmware's to place; here that is `boot.py` and `acpi.py`.
"""

from __future__ import annotations

from vhostctl.errors import InvalidArgument
from vhostctl.host.memory import PAGE

LOW_RAM_END = 0xC000_0000
"""RAM below 4 GiB ends here at the latest; the rest of it begins at `HIGH_RAM`."""
HIGH_RAM = 0x1_0000_0000

BOOT_PARAMS = 0x7000
GDT = 0x8000
PAGE_TABLES = 0x9000
COMMAND_LINE = 0x2_0000
EBDA = 0x9_FC00
"""Firmware keeps RAM from here to `KERNEL_MIN` for itself: video memory, ROMs, ACPI."""
ACPI_TABLES = 0xE_0000
"""The RSDP, which Linux looks for from here on, and the other tables behind it."""
KERNEL_MIN = 0x10_0000

PCI_MEMORY = range(0xC000_0000, 0xFEC0_0000)
PCI_IO = range(0xC000, 0x1_0000)
PCI_CONFIG_PORTS = range(0xCF8, 0xD00)
PCI_SLOTS = 32

MAX_CPUS = 254
"""APIC ids are 8 bits wide, 255 is for all, and the IOAPIC has one as well."""
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000
"""One page that KVM keeps for itself on Intel (KVM_SET_IDENTITY_MAP_ADDR)."""
KVM_TSS = 0xFFFB_D000
"""Three pages that KVM keeps for itself on Intel (KVM_SET_TSS_ADDR)."""

TIMER_PIN = 2
"""The pin of the I/O APIC at which the timer's GSI 0 arrives, as in every PC."""
SERIAL_PORTS = range(0x3F8, 0x400)
SERIAL_GSI = 4
KEYBOARD_COMMAND_PORT = 0x64
PM1_EVENT_PORTS = range(0x600, 0x604)
PM1_CONTROL_PORTS = range(0x604, 0x606)
SCI_GSI = 9
"""ACPI's interrupt; nothing raises it."""


def intx_gsi(slot: int) -> int:
    """Return the GSI of a PCI slot's INTx: level-triggered, shared by every other slot."""
    return 10 + slot % 2


def ram(size: int) -> list[tuple[int, int]]:
    """Return (gpa, size) of each region of RAM, `size` bytes in all, lowest first.

    Raises InvalidArgument unless it is a multiple of 4096 above `KERNEL_MIN`.
    """
    if size % PAGE or size <= KERNEL_MIN:
        raise InvalidArgument(
            f"{size} bytes of memory", hint=f"use a multiple of {PAGE} above {KERNEL_MIN}"
        )
    low = min(size, LOW_RAM_END)
    return [(0, low), (HIGH_RAM, size - low)] if size > low else [(0, low)]
