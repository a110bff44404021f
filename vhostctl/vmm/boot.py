"""A stock Linux kernel into guest memory, and the first vCPU at its door.

This is the 64-bit boot protocol of Documentation/arch/x86/boot.rst: a bzImage is entered
0x200 bytes into its protected-mode part, in long mode, with memory below 4 GiB mapped at its
own address and RSI at the ``struct boot_params``.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from vhostctl.abi.bootparam import (
    E820_MAX_ENTRIES_ZEROPAGE,
    LOADED_HIGH,
    XLF_KERNEL_64,
    boot_e820_entry,
    boot_params,
    setup_header,
)
from vhostctl.abi.kvm import kvm_dtable, kvm_regs, kvm_segment, kvm_sregs
from vhostctl.control.addressspace import AddressSpace
from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.host.memory import PAGE
from vhostctl.vmm import acpi, layout

_HEADER_AT = 0x1F1
_ENTRY_64 = 0x200
_BOOT_FLAG = 0xAA55
_MAGIC = int.from_bytes(b"HdrS", "little")
_OLDEST = 0x20C  # boot protocol 2.12, the first one with XLF_KERNEL_64
_LOADER_UNKNOWN = 0xFF
_E820_RAM = 1
_E820_RESERVED = 2

_CODE = 0x10  # __BOOT_CS
_DATA = 0x18  # __BOOT_DS
_GDT = struct.pack("<4Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

_CR0_PE_ET_NE_WP_PG = 0x8001_0031
_CR4_PAE = 1 << 5
_EFER_LME_LMA = 1 << 8 | 1 << 10
_RFLAGS_ALWAYS = 1 << 1
_PRESENT_WRITABLE = 0x03
_HUGE = 0x83


class BootCpu(Protocol):
    """The vCPU that boots, in its state after a reset; host.kvm's Vcpu is one."""

    def sregs(self) -> kvm_sregs:
        """Return KVM_GET_SREGS."""

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """Do KVM_SET_SREGS."""

    def set_regs(self, regs: kvm_regs) -> None:
        """Do KVM_SET_REGS."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a loaded kernel begins: a guest physical address."""

    address: int

    def apply(self, vcpu: BootCpu) -> None:
        """Set the registers of the vCPU that boots; the others wait for its INIT and SIPI.

        Raises KernelError.
        """
        sregs = vcpu.sregs()
        sregs.cs = _segment(_CODE, kind=0xB, long=True)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(_DATA, kind=0x3, long=False))
        sregs.gdt = kvm_dtable(base=layout.GDT, limit=len(_GDT) - 1)
        sregs.cr0 = _CR0_PE_ET_NE_WP_PG
        sregs.cr3 = layout.PAGE_TABLES
        sregs.cr4 = _CR4_PAE
        sregs.efer = _EFER_LME_LMA
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=self.address, rsi=layout.BOOT_PARAMS, rflags=_RFLAGS_ALWAYS))


def load(
    space: AddressSpace, kernel: Path, initrd: Path | None, command_line: str, cpus: int
) -> Entry:
    """Place what a PC with `cpus` vCPUs boots: a bzImage, its initrd and the ACPI tables.

    RAM is all that `space` has outside PCI's windows. Raises InvalidArgument (no x86-64
    bzImage, something does not fit) and KernelError (a file that cannot be read).
    """
    with _open(kernel) as file:
        header = _read_header(file, kernel)
        line = os.fsencode(command_line)
        if len(line) > header.cmdline_size:
            raise InvalidArgument(
                f"the command line has {len(line)} bytes, {kernel} takes {header.cmdline_size}"
            )
        low = _low_ram(space)
        _read_kernel(space, file, kernel, header, low)
    if initrd is not None:
        header.ramdisk_image, header.ramdisk_size = _read_initrd(space, initrd, header, low)
    header.type_of_loader = _LOADER_UNKNOWN
    header.cmd_line_ptr = layout.COMMAND_LINE
    params = boot_params(acpi_rsdp_addr=layout.ACPI_TABLES, hdr=header)
    for at, entry in enumerate(e820(space)):
        params.e820_table[at] = entry
        params.e820_entries = at + 1
    _place(space, layout.BOOT_PARAMS, bytes(params), "boot parameters")
    _place(space, layout.COMMAND_LINE, line + b"\0", "command line")
    _place(space, layout.ACPI_TABLES, acpi.tables(cpus), "ACPI tables")
    _place(space, layout.GDT, _GDT, "descriptor table")
    _place(space, layout.PAGE_TABLES, _page_tables(), "page tables")
    return Entry(header.pref_address + _ENTRY_64)


def e820(space: AddressSpace) -> list[boot_e820_entry]:
    """Return the guest's memory as Linux is told of it, lowest first.

    Raises InvalidArgument if that is more than fits the boot parameters.
    """
    entries: list[boot_e820_entry] = []
    for region in space.table.regions:
        end = region.gpa + region.size
        for lowest, highest, kind in (
            (0, layout.EBDA, _E820_RAM),
            (layout.EBDA, layout.KERNEL_MIN, _E820_RESERVED),
            (layout.KERNEL_MIN, layout.LOW_RAM_END, _E820_RAM),
            (layout.HIGH_RAM, end, _E820_RAM),
        ):
            start, stop = max(region.gpa, lowest), min(end, highest)
            if start < stop:
                entries.append(boot_e820_entry(start, stop - start, kind))
    if len(entries) > E820_MAX_ENTRIES_ZEROPAGE:
        raise InvalidArgument(
            f"{len(entries)} pieces of RAM, Linux is told of {E820_MAX_ENTRIES_ZEROPAGE}",
            hint="use fewer memory regions",
        )
    return entries


def _open(path: Path) -> BinaryIO:
    try:
        # Its size is asked for before it is read.
        if not path.is_file():
            path.stat()
            raise InvalidArgument(f"{path} is not a file", hint="write what it has to one")
        return path.open("rb")
    except OSError as error:
        raise kernel_error(error.errno or 0, "open", str(path)) from error


def _read_header(file: BinaryIO, kernel: Path) -> setup_header:
    start = file.read(_HEADER_AT + ctypes.sizeof(setup_header))
    if len(start) < _HEADER_AT + ctypes.sizeof(setup_header):
        raise _not_bootable(kernel, "it is too short for a bzImage")
    # What lies behind the header's own end is code, and no field of it.
    end = 0x202 + start[0x201]
    header = setup_header.from_buffer_copy(start[_HEADER_AT:end].ljust(len(start), b"\0"))
    if header.boot_flag != _BOOT_FLAG or header.header != _MAGIC:
        raise _not_bootable(kernel, "it is no bzImage")
    if header.version < _OLDEST:
        version = f"{header.version >> 8}.{header.version & 0xFF:02}"
        raise _not_bootable(kernel, f"its boot protocol is {version}, not 2.12 or later")
    if not header.xloadflags & XLF_KERNEL_64 or not header.loadflags & LOADED_HIGH:
        raise _not_bootable(kernel, "it has no 64-bit entry")
    return header


def _not_bootable(kernel: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"{kernel} does not boot: {why}", hint="give an x86-64 bzImage")


def _low_ram(space: AddressSpace) -> int:
    """Return where the RAM that begins at address 0 ends."""
    first = space.table.regions[0] if space.table.regions else None
    if first is None or first.gpa != 0:
        raise InvalidArgument("no RAM at guest address 0", hint="add a region there")
    return min(first.size, layout.LOW_RAM_END)


def _read_kernel(
    space: AddressSpace, file: BinaryIO, kernel: Path, header: setup_header, low: int
) -> None:
    start = (header.setup_sects or 4) * 512 + 512
    size = os.fstat(file.fileno()).st_size - start
    # The last 16 bytes need not be there in full; a signature may follow.
    if size < max(header.syssize * 16 - 15, 1):
        raise _not_bootable(kernel, "its end is missing")
    end = header.pref_address + max(header.init_size, size)
    if header.pref_address < layout.KERNEL_MIN or end > low:
        raise InvalidArgument(
            f"{kernel} does not fit {low >> 20} MiB of memory below 4 GiB",
            hint=f"give at least {(end >> 20) + 1} MiB, and what the initrd takes",
        )
    file.seek(start)
    _read_into(space, header.pref_address, size, file, kernel)


def _read_initrd(
    space: AddressSpace, initrd: Path, header: setup_header, low: int
) -> tuple[int, int]:
    """Place the initrd as high as the kernel takes it; return its gpa and its size, bytes."""
    with _open(initrd) as file:
        size = os.fstat(file.fileno()).st_size
        top = min(low, header.initrd_addr_max + 1)
        address = (top - size) // PAGE * PAGE
        kernel_end = header.pref_address + header.init_size
        if address < kernel_end:
            raise InvalidArgument(
                f"{initrd} does not fit: it has {size} bytes, and {max(top - kernel_end, 0)}"
                " are left above the kernel",
                hint="give the guest more memory",
            )
        _read_into(space, address, size, file, initrd)
    return address, size


def _read_into(space: AddressSpace, gpa: int, size: int, file: BinaryIO, path: Path) -> None:
    buffer = (ctypes.c_char * size).from_address(space.hva(gpa, size, str(path)))
    try:
        done = file.readinto(buffer)  # type: ignore[attr-defined]  # BinaryIO does not say it
    except OSError as error:
        raise kernel_error(error.errno or 0, "read", str(path)) from error
    if done != size:
        raise InvalidArgument(f"{path} became shorter while it was read", hint="try again")


def _place(space: AddressSpace, gpa: int, data: bytes, what: str) -> None:
    ctypes.memmove(space.hva(gpa, len(data), what), data, len(data))


def _page_tables() -> bytes:
    """Return tables for `layout.PAGE_TABLES` that map the first 4 GiB at their own address."""
    pointers = layout.PAGE_TABLES + PAGE
    directories = [pointers + PAGE * (1 + at) for at in range(4)]
    top = struct.pack("<Q", pointers | _PRESENT_WRITABLE)
    second = struct.pack("<4Q", *(at | _PRESENT_WRITABLE for at in directories))
    pages = struct.pack("<2048Q", *(at << 21 | _HUGE for at in range(2048)))
    return top.ljust(PAGE, b"\0") + second.ljust(PAGE, b"\0") + pages


def _segment(selector: int, kind: int, *, long: bool) -> kvm_segment:
    return kvm_segment(
        base=0,
        limit=0xFFFF_FFFF,
        selector=selector,
        type=kind,
        present=1,
        dpl=0,
        db=not long,
        s=1,
        l=long,
        g=1,
    )
