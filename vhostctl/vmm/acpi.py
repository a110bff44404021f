"""The ACPI tables of the PC: processors, interrupt controllers, the PCI bus, power-off.

What is not there is said not to be there (no keyboard controller, VGA, CMOS clock, power
button), so that the guest does not look for it. Sections are those of the ACPI
specification 6.4.
"""

from __future__ import annotations

import struct

from vhostctl.errors import InvalidArgument
from vhostctl.vmm import aml, layout

SLEEP_TYPE_OFF = 5
"""SLP_TYP of S5, soft off."""
RESET_VALUE = 0xFE
"""What written to `layout.KEYBOARD_COMMAND_PORT` resets the machine, as on every PC."""
_OEM = b"VHOSTC"
_TABLE = b"VHOSTCTL"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_SPACE = layout.KERNEL_MIN - layout.ACPI_TABLES

_FADT_SIZE = 276
_FADT_FLAGS = (
    1 << 0  # WBINVD works
    | 1 << 2  # every processor has C1
    | 1 << 4  # no power button in PM1
    | 1 << 5  # no sleep button either
    | 1 << 10  # RESET_REG is there
)
_FADT_BOOT_FLAGS = (
    1 << 0  # the serial port
    | 1 << 2  # no VGA
    | 1 << 4  # no PCIe ASPM
    | 1 << 5  # no CMOS clock
)
_AS_ISA = 0x00
_LEVEL_HIGH = 0x0D


def tables(cpus: int) -> bytes:
    """Return what is at `layout.ACPI_TABLES` of a PC with `cpus` vCPUs, the RSDP first.

    Raises InvalidArgument for a number of vCPUs that there cannot be.
    """
    if not 1 <= cpus <= layout.MAX_CPUS:
        raise InvalidArgument(f"{cpus} vCPUs", hint=f"use 1 to {layout.MAX_CPUS}")
    image = bytearray(64)  # the RSDP comes last
    facs = _append(image, _facs())
    dsdt = _append(image, _table(b"DSDT", 2, _dsdt()))
    fadt = _append(image, _fadt(facs, dsdt))
    madt = _append(image, _madt(cpus))
    xsdt = _append(image, _table(b"XSDT", 1, struct.pack("<2Q", fadt, madt)))
    image[:36] = _rsdp(xsdt)
    if len(image) > _SPACE:
        raise InvalidArgument(f"{len(image)} bytes of ACPI tables, there is room for {_SPACE}")
    return bytes(image)


def _append(image: bytearray, table: bytes) -> int:
    """Put `table` at the next 64 bytes, as the FACS wants it; return its gpa."""
    image += bytes(-len(image) % 64)
    at = layout.ACPI_TABLES + len(image)
    image += table
    return at


def _rsdp(xsdt: int) -> bytes:
    """Return the root pointer, revision 2 (5.2.5.3)."""
    first = _summed(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 2, 0), at=8)
    return _summed(first + struct.pack("<IQB3x", 36, xsdt, 0), at=32)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Return a table: the common header and `body` (5.2.6)."""
    length = _HEADER.size + len(body)
    header = _HEADER.pack(signature, length, revision, 0, _OEM, _TABLE, 1, b"VHCT", 1)
    return _summed(header + body, at=9)


def _summed(data: bytes, at: int) -> bytes:
    """Return `data` with the byte at `at` such that all of them add up to 0."""
    return data[:at] + bytes((-sum(data) & 0xFF,)) + data[at + 1 :]


def _facs() -> bytes:
    """Return the firmware control structure, whose lock nobody takes (5.2.10)."""
    return struct.pack("<4sI24xB31x", b"FACS", 64, 2)


def _io_register(port: int, size: int) -> bytes:
    """Return the address of an I/O register of `size` bytes (5.2.3.2)."""
    return struct.pack("<BBBBQ", 1, 8 * size, 0, size.bit_length(), port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """Return the fixed description table, revision 6.0 (5.2.9).

    Without an SMI command port the machine is always in ACPI mode.
    """
    event, control = layout.PM1_EVENT_PORTS, layout.PM1_CONTROL_PORTS
    fadt = bytearray(_FADT_SIZE)
    for at, form, *values in (
        (36, "<II", facs, dsdt),
        (46, "<H", layout.SCI_GSI),
        (56, "<I", event.start),
        (64, "<I", control.start),
        (88, "<BB", len(event), len(control)),
        (96, "<HH", 0xFFF, 0xFFF),  # no C2, no C3
        (109, "<H", _FADT_BOOT_FLAGS),
        (112, "<I", _FADT_FLAGS),
        (128, "<B", RESET_VALUE),
        (140, "<Q", dsdt),
    ):
        struct.pack_into(str(form), fadt, int(at), *values)
    fadt[116:128] = _io_register(layout.KEYBOARD_COMMAND_PORT, 1)
    fadt[148:160] = _io_register(event.start, len(event))
    fadt[172:184] = _io_register(control.start, len(control))
    return _table(b"FACP", 6, bytes(fadt[_HEADER.size :]))


def _madt(cpus: int) -> bytes:
    """Return the interrupt controllers: a LAPIC for each vCPU and one IOAPIC (5.2.12)."""
    body = struct.pack("<II", layout.LAPIC, 1)  # the 8259s are there too
    for cpu in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += struct.pack("<BBBBII", 1, 12, cpus, 0, layout.IOAPIC, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, layout.TIMER_PIN, _AS_ISA)
    body += struct.pack("<BBBBIH", 2, 10, 0, layout.SCI_GSI, layout.SCI_GSI, _LEVEL_HIGH)
    return _table(b"APIC", 5, body)


def _dsdt() -> bytes:
    """Return S5, and the PCI root bridge with its windows and the INTx of each slot."""
    off = aml.integer(SLEEP_TYPE_OFF)
    zero = aml.integer(0)
    routes = [
        aml.package([aml.integer(slot << 16 | 0xFFFF), zero, zero, aml.integer(gsi)])
        for slot, gsi in enumerate(map(layout.intx_gsi, range(layout.PCI_SLOTS)))
    ]
    windows = aml.resources(
        aml.bus_window(range(1)),
        aml.io_ports(layout.PCI_CONFIG_PORTS),
        aml.io_window(layout.PCI_IO),
        aml.memory_window(layout.PCI_MEMORY),
    )
    bridge = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_BBN", zero),
        aml.name("_CRS", windows),
        aml.name("_PRT", aml.package(routes)),
    )
    sleep = aml.name("\\_S5_", aml.package([off, off, zero, zero]))
    return sleep + aml.scope("\\_SB_", bridge)
