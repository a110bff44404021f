"""A kernel in guest memory: what is where, and what cannot be booted."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostctl.abi.bootparam import XLF_KERNEL_64, boot_params, setup_header
from vhostctl.abi.kvm import kvm_regs, kvm_sregs
from vhostctl.control.addressspace import AddressSpace
from vhostctl.errors import InvalidArgument, KernelFileNotFoundError
from vhostctl.host.memory import BorrowedRegion, GuestMemory
from vhostctl.vmm import acpi, boot, layout

MIB = 1 << 20
SETUP_SECTS = 3
CODE = bytes(range(256)) * 16
LINE = "console=ttyS0 quiet"


def header(**changes: int) -> setup_header:
    fields = {
        "setup_sects": SETUP_SECTS,
        "syssize": len(CODE) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "header": 0x53726448,
        "version": 0x20F,
        "loadflags": 1,
        "xloadflags": XLF_KERNEL_64,
        "initrd_addr_max": 0x7FFF_FFFF,
        "cmdline_size": 2047,
        "pref_address": 16 * MIB,
        "init_size": 4 * MIB,
    }
    return setup_header(**(fields | changes))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(0, 32 * MIB), (layout.HIGH_RAM, MIB)]) as memory:
        yield memory


@pytest.fixture
def space(memory: GuestMemory) -> AddressSpace:
    return AddressSpace(memory.regions)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return bzimage(tmp_path, header())


def bzimage(folder: Path, about: setup_header, code: bytes = CODE) -> Path:
    setup = bytearray((SETUP_SECTS + 1) * 512)
    setup[0x1F1 : 0x1F1 + ctypes.sizeof(about)] = bytes(about)
    setup[0x26C:] = b"\xcc" * (len(setup) - 0x26C)  # code of the setup part
    path = folder / "bzImage"
    path.write_bytes(setup + code)
    return path


def peek(space: AddressSpace, gpa: int, length: int) -> bytes:
    return ctypes.string_at(space.hva(gpa, length), length)


def zero_page(space: AddressSpace) -> boot_params:
    return boot_params.from_buffer_copy(peek(space, layout.BOOT_PARAMS, 4096))


def test_everything_is_where_linux_looks(space: AddressSpace, kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"cpio" * 2000)
    entry = boot.load(space, kernel, initrd, LINE, 2)
    params = zero_page(space)
    assert entry.address == 16 * MIB + 0x200
    assert peek(space, 16 * MIB, len(CODE)) == CODE
    assert (params.hdr.ramdisk_image, params.hdr.ramdisk_size) == (32 * MIB - 8192, 8000)
    assert peek(space, params.hdr.ramdisk_image, 8000) == initrd.read_bytes()
    assert peek(space, params.hdr.cmd_line_ptr, len(LINE) + 1) == LINE.encode() + b"\0"
    assert params.hdr.type_of_loader == 0xFF
    assert params.hdr.version == 0x20F
    tables = acpi.tables(2)
    assert peek(space, params.acpi_rsdp_addr, len(tables)) == tables
    # Nothing of the file outside its header gets into the page but the header.
    assert bytes(params)[0x26C:0x2D0] == bytes(0x64)


def test_linux_is_told_of_its_ram(space: AddressSpace, kernel: Path) -> None:
    boot.load(space, kernel, None, LINE, 1)
    params = zero_page(space)
    told = [(e.addr, e.size, e.type) for e in params.e820_table[: params.e820_entries]]
    assert told == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x60400, 2),
        (MIB, 31 * MIB, 1),
        (layout.HIGH_RAM, MIB, 1),
    ]
    assert (params.hdr.ramdisk_image, params.hdr.ramdisk_size) == (0, 0)


def test_memory_in_the_windows_of_pci_is_no_ram(space: AddressSpace) -> None:
    before = [bytes(entry) for entry in boot.e820(space)]
    space.add(BorrowedRegion(layout.PCI_MEMORY.start, MIB, 0x1000_0000))
    assert [bytes(entry) for entry in boot.e820(space)] == before


def test_the_page_tables_map_4_gib_at_their_own_address(space: AddressSpace, kernel: Path) -> None:
    boot.load(space, kernel, None, LINE, 1)

    def entry(table: int, at: int) -> int:
        value = int.from_bytes(peek(space, table + 8 * at, 8), "little")
        assert value & 3 == 3
        return value

    for address in (0, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, 0xFEE0_0000, 0xFFFF_FFFF):
        pointers = entry(layout.PAGE_TABLES, 0) & ~0xFFF
        directory = entry(pointers, address >> 30) & ~0xFFF
        page = entry(directory, address >> 21 & 511)
        assert page & 0x80
        assert page & ~0x1F_FFFF == address & ~0x1F_FFFF


class FakeCpu:
    def __init__(self) -> None:
        self.special = kvm_sregs()
        self.regs = kvm_regs()

    def sregs(self) -> kvm_sregs:
        return self.special

    def set_sregs(self, sregs: kvm_sregs) -> None:
        self.special = sregs

    def set_regs(self, regs: kvm_regs) -> None:
        self.regs = regs


def test_the_vcpu_is_in_long_mode_at_the_entry(space: AddressSpace, kernel: Path) -> None:
    cpu = FakeCpu()
    boot.load(space, kernel, None, LINE, 1).apply(cpu)
    assert (cpu.regs.rip, cpu.regs.rsi, cpu.regs.rflags) == (0x100_0200, layout.BOOT_PARAMS, 2)
    special = cpu.special
    assert special.efer & 0x500 == 0x500
    assert special.cr0 & 0x8000_0001 == 0x8000_0001
    assert special.cr4 & 0x20
    assert special.cr3 == layout.PAGE_TABLES
    assert (special.cs.selector, special.cs.l, special.cs.db) == (0x10, 1, 0)
    assert (special.ds.selector, special.ss.selector) == (0x18, 0x18)
    gdt = peek(space, special.gdt.base, special.gdt.limit + 1)
    assert len(gdt) == 32
    assert gdt[0x10 + 6] & 0x20  # the descriptor says 64-bit too


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"boot_flag": 0}, "it is no bzImage"),
        ({"header": 0}, "it is no bzImage"),
        ({"version": 0x20B}, "its boot protocol is 2.11, not 2.12 or later"),
        ({"xloadflags": 0}, "it has no 64-bit entry"),
        ({"loadflags": 0}, "it has no 64-bit entry"),
        ({"syssize": len(CODE) // 16 + 1}, "its end is missing"),
        ({"setup_sects": 255}, "its end is missing"),
        ({"setup_sects": 11, "syssize": 0}, "its end is missing"),
        ({"init_size": 17 * MIB}, "does not fit 32 MiB of memory below 4 GiB"),
        ({"pref_address": 1 << 63}, "does not fit 32 MiB of memory below 4 GiB"),
        ({"pref_address": 0}, "does not fit 32 MiB of memory below 4 GiB"),
        ({"cmdline_size": 5}, "the command line has 19 bytes, .* takes 5"),
    ],
)
def test_what_does_not_boot_says_why(
    space: AddressSpace, tmp_path: Path, changes: dict[str, int], why: str
) -> None:
    with pytest.raises(InvalidArgument, match=why):
        boot.load(space, bzimage(tmp_path, header(**changes)), None, LINE, 1)


def test_a_file_that_is_no_kernel(space: AddressSpace, tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text("hello")
    with pytest.raises(InvalidArgument, match="too short for a bzImage"):
        boot.load(space, path, None, LINE, 1)
    with pytest.raises(KernelFileNotFoundError, match="absent"):
        boot.load(space, tmp_path / "absent", None, LINE, 1)


def test_the_initrd_stays_off_the_kernel(space: AddressSpace, kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(12 * MIB)
    boot.load(space, kernel, initrd, LINE, 1)
    assert zero_page(space).hdr.ramdisk_image == 20 * MIB
    with initrd.open("ab") as file:
        file.truncate(12 * MIB + 1)
    with pytest.raises(InvalidArgument, match=f"{12 * MIB} are left above the kernel"):
        boot.load(space, kernel, initrd, LINE, 1)


def test_the_initrd_is_where_the_kernel_reaches_it(space: AddressSpace, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x")
    kernel = bzimage(tmp_path, header(initrd_addr_max=24 * MIB - 1))
    boot.load(space, kernel, initrd, LINE, 1)
    assert zero_page(space).hdr.ramdisk_image == 24 * MIB - 4096


def test_a_pc_begins_at_address_0(kernel: Path) -> None:
    with GuestMemory([(layout.HIGH_RAM, MIB)]) as memory:
        for space in (AddressSpace(memory.regions), AddressSpace()):
            with pytest.raises(InvalidArgument, match="no RAM at guest address 0"):
                boot.load(space, kernel, None, LINE, 1)


def test_ram_makes_room_for_pci() -> None:
    assert layout.ram(64 * MIB) == [(0, 64 * MIB)]
    assert layout.ram(5 << 30) == [(0, 3 << 30), (4 << 30, 2 << 30)]
    for size in (0, MIB, 64 * MIB + 1):
        with pytest.raises(InvalidArgument, match="bytes of memory"):
            layout.ram(size)
