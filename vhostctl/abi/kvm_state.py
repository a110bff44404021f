"""Mirror of ``linux/kvm.h`` and x86's ``asm/kvm.h``: state that a VMM saves and restores.

What only travels from one vCPU or VM to another is bytes here, whatever fields the header
gives it.
"""

from __future__ import annotations

import ctypes

from vhostctl.abi.ioctl import io, ior, iow, iowr
from vhostctl.abi.kvm import KVMIO
from vhostctl.abi.layout import Struct, flexible

HEADERS = ("linux/kvm.h",)

_u8 = ctypes.c_uint8
_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64


class kvm_irqchip(Struct):
    """State of one interrupt controller, KVM_IRQCHIP_* (520 bytes)."""

    __slots__ = ()
    _fields_ = (("chip_id", _u32), ("pad", _u32), ("chip", _u8 * 512))


class kvm_pit_state2(Struct):
    """State of the PIT (112 bytes)."""

    __slots__ = ()
    _fields_ = (("channels", _u64 * 9), ("flags", _u32), ("reserved", _u32 * 9))


class kvm_clock_data(Struct):
    """The paravirtual clock (48 bytes): `clock` in ns, `flags` of KVM_CLOCK_*."""

    __slots__ = ()
    _fields_ = (
        ("clock", _u64),
        ("flags", _u32),
        ("pad0", _u32),
        ("realtime", _u64),
        ("host_tsc", _u64),
        ("pad", _u32 * 4),
    )


KVM_APIC_REG_SIZE = 0x400


class kvm_lapic_state(Struct):
    """Registers of the local APIC (1024 bytes)."""

    __slots__ = ()
    _fields_ = (("regs", _u8 * KVM_APIC_REG_SIZE),)


class kvm_vcpu_events(Struct):
    """Exceptions and interrupts that are on their way into a vCPU (64 bytes)."""

    __slots__ = ()
    _fields_ = (
        ("exception", _u32 * 2),
        ("interrupt", _u8 * 4),
        ("nmi", _u8 * 4),
        ("sipi_vector", _u32),
        ("flags", _u32),
        ("smi", _u8 * 4),
        ("triple_fault", _u8),
        ("reserved", _u8 * 26),
        ("exception_has_payload", _u8),
        ("exception_payload", _u64),
    )


class kvm_debugregs(Struct):
    """Debug registers (128 bytes)."""

    __slots__ = ()
    _fields_ = (
        ("db", _u64 * 4),
        ("dr6", _u64),
        ("dr7", _u64),
        ("flags", _u64),
        ("reserved", _u64 * 9),
    )


class kvm_xsave(Struct):
    """The XSAVE area (4096 bytes); as many as KVM_CAP_XSAVE2 says are copied."""

    __slots__ = ()
    _fields_ = (("region", _u32 * 1024), ("extra", _u32 * 0))


class kvm_xcr(Struct):
    """One extended control register (16 bytes)."""

    __slots__ = ()
    _fields_ = (("xcr", _u32), ("reserved", _u32), ("value", _u64))


class kvm_xcrs(Struct):
    """All extended control registers (392 bytes)."""

    __slots__ = ()
    _fields_ = (
        ("nr_xcrs", _u32),
        ("flags", _u32),
        ("xcrs", kvm_xcr * 16),
        ("padding", _u64 * 16),
    )


class kvm_msr_entry(Struct):
    """A model-specific register and its value (16 bytes)."""

    __slots__ = ()
    _fields_ = (("index", _u32), ("reserved", _u32), ("data", _u64))


class kvm_msrs(Struct):
    """Header of a list of registers with values (8 bytes); see `kvm_msrs_table`."""

    __slots__ = ()
    _fields_ = (("nmsrs", _u32), ("pad", _u32), ("entries", kvm_msr_entry * 0))


def kvm_msrs_table(entries: list[kvm_msr_entry]) -> kvm_msrs:
    """Return the argument of KVM_GET_MSRS and KVM_SET_MSRS: 8 + 16 * len(entries) bytes."""
    sized = flexible(kvm_msrs, "entries", len(entries))
    table: kvm_msrs = sized(nmsrs=len(entries), entries=tuple(entries))
    return table


class kvm_msr_list(Struct):
    """Header of a list of register numbers (4 bytes); see `kvm_msr_list_table`."""

    __slots__ = ()
    _fields_ = (("nmsrs", _u32), ("indices", _u32 * 0))


def kvm_msr_list_table(count: int) -> kvm_msr_list:
    """Return the argument of KVM_GET_MSR_INDEX_LIST with room for `count` numbers."""
    table: kvm_msr_list = flexible(kvm_msr_list, "indices", count)(nmsrs=count)
    return table


KVM_GET_IRQCHIP = iowr("KVM_GET_IRQCHIP", KVMIO, 0x62, kvm_irqchip)
KVM_SET_IRQCHIP = ior("KVM_SET_IRQCHIP", KVMIO, 0x63, kvm_irqchip)  # the header's direction
KVM_SET_CLOCK = iow("KVM_SET_CLOCK", KVMIO, 0x7B, kvm_clock_data)
KVM_GET_CLOCK = ior("KVM_GET_CLOCK", KVMIO, 0x7C, kvm_clock_data)
KVM_GET_PIT2 = ior("KVM_GET_PIT2", KVMIO, 0x9F, kvm_pit_state2)
KVM_SET_PIT2 = iow("KVM_SET_PIT2", KVMIO, 0xA0, kvm_pit_state2)
KVM_GET_MSRS = iowr("KVM_GET_MSRS", KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS = iow("KVM_SET_MSRS", KVMIO, 0x89, kvm_msrs)
KVM_GET_LAPIC = ior("KVM_GET_LAPIC", KVMIO, 0x8E, kvm_lapic_state)
KVM_SET_LAPIC = iow("KVM_SET_LAPIC", KVMIO, 0x8F, kvm_lapic_state)
KVM_GET_VCPU_EVENTS = ior("KVM_GET_VCPU_EVENTS", KVMIO, 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow("KVM_SET_VCPU_EVENTS", KVMIO, 0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = ior("KVM_GET_DEBUGREGS", KVMIO, 0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = iow("KVM_SET_DEBUGREGS", KVMIO, 0xA2, kvm_debugregs)
KVM_SET_TSC_KHZ = io("KVM_SET_TSC_KHZ", KVMIO, 0xA2)
KVM_GET_TSC_KHZ = io("KVM_GET_TSC_KHZ", KVMIO, 0xA3)
KVM_SET_XSAVE = iow("KVM_SET_XSAVE", KVMIO, 0xA5, kvm_xsave)
KVM_GET_XCRS = ior("KVM_GET_XCRS", KVMIO, 0xA6, kvm_xcrs)
KVM_SET_XCRS = iow("KVM_SET_XCRS", KVMIO, 0xA7, kvm_xcrs)
KVM_KVMCLOCK_CTRL = io("KVM_KVMCLOCK_CTRL", KVMIO, 0xAD)
KVM_GET_XSAVE2 = ior("KVM_GET_XSAVE2", KVMIO, 0xCF, kvm_xsave)
KVM_GET_MSR_INDEX_LIST = iowr("KVM_GET_MSR_INDEX_LIST", KVMIO, 0x02, kvm_msr_list)
