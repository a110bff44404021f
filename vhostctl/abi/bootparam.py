"""Mirror of ``asm/bootparam.h`` (x86): what a boot loader and Linux tell each other.

Documentation/arch/x86/boot.rst says what the fields mean. Of ``struct boot_params`` only
the members have names that a loader of a 64-bit kernel fills in.
"""

from __future__ import annotations

import ctypes

from vhostctl.abi.layout import Struct

HEADERS = ("asm/bootparam.h",)

LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0

E820_MAX_ENTRIES_ZEROPAGE = 128

_u8 = ctypes.c_uint8
_u16 = ctypes.c_uint16
_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64


class setup_header(Struct):
    """What a kernel says about itself, from byte 0x1f1 of its file on (123 bytes)."""

    __slots__ = ()
    _pack_ = 1
    _fields_ = (
        ("setup_sects", _u8),
        ("root_flags", _u16),
        ("syssize", _u32),
        ("ram_size", _u16),
        ("vid_mode", _u16),
        ("root_dev", _u16),
        ("boot_flag", _u16),
        ("jump", _u16),
        ("header", _u32),
        ("version", _u16),
        ("realmode_swtch", _u32),
        ("start_sys_seg", _u16),
        ("kernel_version", _u16),
        ("type_of_loader", _u8),
        ("loadflags", _u8),
        ("setup_move_size", _u16),
        ("code32_start", _u32),
        ("ramdisk_image", _u32),
        ("ramdisk_size", _u32),
        ("bootsect_kludge", _u32),
        ("heap_end_ptr", _u16),
        ("ext_loader_ver", _u8),
        ("ext_loader_type", _u8),
        ("cmd_line_ptr", _u32),
        ("initrd_addr_max", _u32),
        ("kernel_alignment", _u32),
        ("relocatable_kernel", _u8),
        ("min_alignment", _u8),
        ("xloadflags", _u16),
        ("cmdline_size", _u32),
        ("hardware_subarch", _u32),
        ("hardware_subarch_data", _u64),
        ("payload_offset", _u32),
        ("payload_length", _u32),
        ("setup_data", _u64),
        ("pref_address", _u64),
        ("init_size", _u32),
        ("handover_offset", _u32),
        ("kernel_info_offset", _u32),
    )


class boot_e820_entry(Struct):
    """[addr, addr + size) of the guest's memory is of `type` (20 bytes)."""

    __slots__ = ()
    _pack_ = 1
    _fields_ = (("addr", _u64), ("size", _u64), ("type", _u32))


class boot_params(Struct):
    """What Linux finds at the address in RSI, the "zero page" (4096 bytes)."""

    __slots__ = ()
    _pack_ = 1
    _fields_ = (
        ("_screen_to_ist", _u8 * 0x70),
        ("acpi_rsdp_addr", _u64),
        ("_disks_to_scratch", _u8 * (0x1E8 - 0x78)),
        ("e820_entries", _u8),
        ("_edd_to_pad6", _u8 * (0x1F1 - 0x1E9)),
        ("hdr", setup_header),
        ("_pad7_edd", _u8 * (0x2D0 - 0x1F1 - ctypes.sizeof(setup_header))),
        ("e820_table", boot_e820_entry * E820_MAX_ENTRIES_ZEROPAGE),
        ("_pad8_to_pad9", _u8 * (0x1000 - 0xCD0)),
    )
