"""Mirror of ``linux/kvm.h`` and x86's ``asm/kvm.h``: what a VMM with in-kernel irqchips asks.

`abi.kvm_state` has the state that is saved and restored.
"""

from __future__ import annotations

import ctypes

from vhostctl.abi.ioctl import io, ior, iow, iowr
from vhostctl.abi.layout import Struct, flexible

HEADERS = ("linux/kvm.h",)

_u8 = ctypes.c_uint8
_u16 = ctypes.c_uint16
_u32 = ctypes.c_uint32
_s32 = ctypes.c_int32
_u64 = ctypes.c_uint64

KVMIO = 0xAE
KVM_API_VERSION = 12


def _each(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class kvm_userspace_memory_region(Struct):
    """A slot of guest memory (32 bytes); `memory_size` 0 deletes it. All but slot in bytes."""

    __slots__ = ()
    _fields_ = (
        ("slot", _u32),
        ("flags", _u32),
        ("guest_phys_addr", _u64),
        ("memory_size", _u64),
        ("userspace_addr", _u64),
    )


class kvm_irq_level(Struct):
    """The level of one GSI (8 bytes)."""

    __slots__ = ()
    _fields_ = (("irq", _u32), ("level", _u32))


KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2


class kvm_pit_config(Struct):
    """How the PIT is made (64 bytes)."""

    __slots__ = ()
    _fields_ = (("flags", _u32), ("pad", _u32 * 15))


KVM_PIT_SPEAKER_DUMMY = 1


class kvm_irq_routing_irqchip(Struct):
    """A pin of an interrupt controller (8 bytes)."""

    __slots__ = ()
    _fields_ = (("irqchip", _u32), ("pin", _u32))


class kvm_irq_routing_msi(Struct):
    """A message-signalled interrupt (16 bytes)."""

    __slots__ = ()
    _fields_ = (("address_lo", _u32), ("address_hi", _u32), ("data", _u32), ("pad", _u32))


class _route(ctypes.Union):
    _fields_ = (
        ("irqchip", kvm_irq_routing_irqchip),
        ("msi", kvm_irq_routing_msi),
        ("pad", _u32 * 8),
    )


class kvm_irq_routing_entry(Struct):
    """Where a GSI leads (48 bytes); `type` of KVM_IRQ_ROUTING_* says which member of `u` counts."""

    __slots__ = ()
    _fields_ = (("gsi", _u32), ("type", _u32), ("flags", _u32), ("pad", _u32), ("u", _route))


KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2


class kvm_irq_routing(Struct):
    """Header of the GSI routing table (8 bytes); see `kvm_irq_routing_table`."""

    __slots__ = ()
    _fields_ = (("nr", _u32), ("flags", _u32), ("entries", kvm_irq_routing_entry * 0))


def kvm_irq_routing_table(
    entries: list[kvm_irq_routing_entry] | tuple[kvm_irq_routing_entry, ...],
) -> kvm_irq_routing:
    """Return the argument of KVM_SET_GSI_ROUTING: 8 + 48 * len(entries) bytes."""
    sized = flexible(kvm_irq_routing, "entries", len(entries))
    table: kvm_irq_routing = sized(nr=len(entries), entries=tuple(entries))
    return table


class kvm_msi(Struct):
    """A message to signal now (32 bytes)."""

    __slots__ = ()
    _fields_ = (
        ("address_lo", _u32),
        ("address_hi", _u32),
        ("data", _u32),
        ("flags", _u32),
        ("devid", _u32),
        ("pad", _u8 * 12),
    )


class kvm_irqfd(Struct):
    """An eventfd that raises a GSI (32 bytes); `resamplefd` counts with KVM_IRQFD_FLAG_RESAMPLE."""

    __slots__ = ()
    _fields_ = (
        ("fd", _u32),
        ("gsi", _u32),
        ("flags", _u32),
        ("resamplefd", _u32),
        ("pad", _u8 * 16),
    )


KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1


class kvm_ioeventfd(Struct):
    """An eventfd that a guest's write signals (64 bytes); `len` 0 is a write of any length."""

    __slots__ = ()
    _fields_ = (
        ("datamatch", _u64),
        ("addr", _u64),
        ("len", _u32),
        ("fd", _s32),
        ("flags", _u32),
        ("pad", _u8 * 36),
    )


KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2


class kvm_regs(Struct):
    """General registers (144 bytes)."""

    __slots__ = ()
    _fields_ = (
        *_each(_u64, "rax rbx rcx rdx rsi rdi rsp rbp"),
        *_each(_u64, "r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"),
    )


class kvm_segment(Struct):
    """A segment register with its hidden part (24 bytes); `limit` in bytes, whatever `g` is."""

    __slots__ = ()
    _fields_ = (
        ("base", _u64),
        ("limit", _u32),
        ("selector", _u16),
        *_each(_u8, "type present dpl db s l g avl unusable padding"),
    )


class kvm_dtable(Struct):
    """The register of a descriptor table (16 bytes)."""

    __slots__ = ()
    _fields_ = (("base", _u64), ("limit", _u16), ("padding", _u16 * 3))


class kvm_sregs(Struct):
    """Segments, tables and control registers (312 bytes)."""

    __slots__ = ()
    _fields_ = (
        *_each(kvm_segment, "cs ds es fs gs ss tr ldt"),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *_each(_u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", _u64 * 4),
    )


class kvm_mp_state(Struct):
    """Whether a vCPU runs, halts or waits for its SIPI (4 bytes), KVM_MP_STATE_*."""

    __slots__ = ()
    _fields_ = (("mp_state", _u32),)


KVM_MP_STATE_HALTED = 3


class kvm_cpuid_entry2(Struct):
    """The answer of one CPUID leaf (40 bytes); `index` is the subleaf where `flags` says so."""

    __slots__ = ()
    _fields_ = (
        *_each(_u32, "function index flags eax ebx ecx edx"),
        ("padding", _u32 * 3),
    )


KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0  # the header's own spelling


class kvm_cpuid2(Struct):
    """Header of a table of CPUID leaves (8 bytes); see `kvm_cpuid2_table`."""

    __slots__ = ()
    _fields_ = (("nent", _u32), ("padding", _u32), ("entries", kvm_cpuid_entry2 * 0))


def kvm_cpuid2_table(entries: list[kvm_cpuid_entry2], count: int | None = None) -> kvm_cpuid2:
    """Return a table of `entries`, with room for `count` of them: 8 + 40 * count bytes."""
    count = len(entries) if count is None else count
    sized = flexible(kvm_cpuid2, "entries", count)
    table: kvm_cpuid2 = sized(nent=count, entries=tuple(entries))
    return table


class kvm_signal_mask(Struct):
    """Header of the mask of signals blocked in KVM_RUN (4 bytes), which `len` bytes follow."""

    __slots__ = ()
    _fields_ = (("len", _u32), ("sigset", _u8 * 0))


class _hw(ctypes.Structure):
    _fields_ = (("hardware_exit_reason", _u64),)


class _fail_entry(ctypes.Structure):
    _fields_ = (("hardware_entry_failure_reason", _u64), ("cpu", _u32))


class _io(ctypes.Structure):
    _fields_ = (
        ("direction", _u8),
        ("size", _u8),
        ("port", _u16),
        ("count", _u32),
        ("data_offset", _u64),
    )


class _mmio(ctypes.Structure):
    _fields_ = (("phys_addr", _u64), ("data", _u8 * 8), ("len", _u32), ("is_write", _u8))


class _internal(ctypes.Structure):
    _fields_ = (("suberror", _u32), ("ndata", _u32), ("data", _u64 * 16))


class _system_event(ctypes.Structure):
    _fields_ = (("type", _u32), ("ndata", _u32), ("data", _u64 * 16))


class _exit(ctypes.Union):
    _fields_ = (
        ("hw", _hw),
        ("fail_entry", _fail_entry),
        ("io", _io),
        ("mmio", _mmio),
        ("internal", _internal),
        ("system_event", _system_event),
        ("padding", ctypes.c_char * 256),
    )


class kvm_run(Struct):
    """What a vCPU shares with its VMM (2352 bytes); `exit_reason` says which member counts."""

    __slots__ = ()
    _anonymous_ = ("_exit",)
    _fields_ = (
        ("request_interrupt_window", _u8),
        ("immediate_exit", _u8),
        ("padding1", _u8 * 6),
        ("exit_reason", _u32),
        ("ready_for_interrupt_injection", _u8),
        ("if_flag", _u8),
        ("flags", _u16),
        ("cr8", _u64),
        ("apic_base", _u64),
        ("_exit", _exit),
        ("kvm_valid_regs", _u64),
        ("kvm_dirty_regs", _u64),
        ("s", _u8 * 2048),
    )


KVM_EXIT_UNKNOWN = 0
KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24

KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4

KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_XSAVE2 = 208

KVM_GET_API_VERSION = io("KVM_GET_API_VERSION", KVMIO, 0x00)
KVM_CREATE_VM = io("KVM_CREATE_VM", KVMIO, 0x01)
KVM_CHECK_EXTENSION = io("KVM_CHECK_EXTENSION", KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = io("KVM_GET_VCPU_MMAP_SIZE", KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = iowr("KVM_GET_SUPPORTED_CPUID", KVMIO, 0x05, kvm_cpuid2)

KVM_CREATE_VCPU = io("KVM_CREATE_VCPU", KVMIO, 0x41)
KVM_SET_USER_MEMORY_REGION = iow(
    "KVM_SET_USER_MEMORY_REGION", KVMIO, 0x46, kvm_userspace_memory_region
)
KVM_SET_TSS_ADDR = io("KVM_SET_TSS_ADDR", KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow("KVM_SET_IDENTITY_MAP_ADDR", KVMIO, 0x48, _u64)
KVM_CREATE_IRQCHIP = io("KVM_CREATE_IRQCHIP", KVMIO, 0x60)
KVM_IRQ_LINE = iow("KVM_IRQ_LINE", KVMIO, 0x61, kvm_irq_level)
KVM_SET_GSI_ROUTING = iow("KVM_SET_GSI_ROUTING", KVMIO, 0x6A, kvm_irq_routing)
KVM_IRQFD = iow("KVM_IRQFD", KVMIO, 0x76, kvm_irqfd)
KVM_CREATE_PIT2 = iow("KVM_CREATE_PIT2", KVMIO, 0x77, kvm_pit_config)
KVM_IOEVENTFD = iow("KVM_IOEVENTFD", KVMIO, 0x79, kvm_ioeventfd)
KVM_SIGNAL_MSI = iow("KVM_SIGNAL_MSI", KVMIO, 0xA5, kvm_msi)

KVM_RUN = io("KVM_RUN", KVMIO, 0x80)
KVM_GET_REGS = ior("KVM_GET_REGS", KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = iow("KVM_SET_REGS", KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = ior("KVM_GET_SREGS", KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = iow("KVM_SET_SREGS", KVMIO, 0x84, kvm_sregs)
KVM_SET_SIGNAL_MASK = iow("KVM_SET_SIGNAL_MASK", KVMIO, 0x8B, kvm_signal_mask)
KVM_SET_CPUID2 = iow("KVM_SET_CPUID2", KVMIO, 0x90, kvm_cpuid2)
KVM_GET_CPUID2 = iowr("KVM_GET_CPUID2", KVMIO, 0x91, kvm_cpuid2)
KVM_GET_MP_STATE = ior("KVM_GET_MP_STATE", KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE = iow("KVM_SET_MP_STATE", KVMIO, 0x99, kvm_mp_state)
