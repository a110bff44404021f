"""All that KVM keeps of a VM's processors and interrupts, as data.

Each part is what the kernel gives for it, byte by byte (linux/kvm.h, asm/kvm.h): those
layouts are the kernel's promise. The vCPUs are paused (`CpuThread.pause`) or were never run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from vhostctl.abi import kvm, kvm_state
from vhostctl.abi.layout import Struct
from vhostctl.errors import InvalidArgument
from vhostctl.host.kvm import CHIPS, Kvm, Vm
from vhostctl.host.vcpu import Vcpu

_TSC = 0x10
_TSC_DEADLINE = 0x6E0
_State = TypeVar("_State", bound=Struct)


class CpuState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One vCPU: `msrs` by number, `tsc_khz` a rate, the others structs of the kernel."""

    index: int
    tsc_khz: int
    mp_state: int
    cpuid: bytes
    regs: bytes
    sregs: bytes
    xsave: bytes
    xcrs: bytes
    debugregs: bytes
    lapic: bytes
    events: bytes
    msrs: dict[int, int]


class KvmState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The vCPUs, the interrupt controllers by KVM_IRQCHIP_*, the PIT and KVM's clock (ns)."""

    cpus: list[CpuState]
    irqchips: dict[int, bytes]
    pit: bytes
    clock: int


# Kept by KVM, shown by CPUID and not in its list: memory types and machine checks (Intel SDM
# volume 4). A bank that there is not cannot be read.
_MTRRS = [0x2FF, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270)]
_MACHINE_CHECK_BANKS = list(range(0x400, 0x400 + 4 * 32))
_UNLISTED = _MTRRS + _MACHINE_CHECK_BANKS


def save(system: Kvm, vm: Vm, vcpus: Sequence[Vcpu]) -> KvmState:
    """Return the state of `vm`, all of whose `vcpus` are paused. Raises KernelError."""
    indices = system.msr_indices() + _UNLISTED
    return KvmState(
        cpus=[save_cpu(vcpu, indices) for vcpu in vcpus],
        irqchips={chip: bytes(vm.irqchip(chip)) for chip in CHIPS},
        pit=bytes(vm.pit()),
        clock=vm.clock(),
    )


def restore(state: KvmState, vm: Vm, vcpus: Sequence[Vcpu]) -> None:
    """Make a VM that has its irqchips, PIT, memory and `vcpus`, never run, be as `state`.

    Raises KernelError (EINVAL if this processor or kernel lacks what the other had), and
    InvalidArgument if the number of vCPUs differs or a part has not the length of its struct.
    """
    if [cpu.index for cpu in state.cpus] != [vcpu.index for vcpu in vcpus]:
        raise InvalidArgument(f"{len(vcpus)} vCPUs for the state of {len(state.cpus)}")
    # Before the registers of the clock, which the guest's page is written from.
    vm.set_clock(state.clock)
    for cpu, vcpu in zip(state.cpus, vcpus, strict=True):
        restore_cpu(cpu, vcpu)
    # After the local APICs: a level that is high in the IOAPIC is delivered to them again.
    for data in state.irqchips.values():
        vm.set_irqchip(_struct(kvm_state.kvm_irqchip, data))
    vm.set_pit(_struct(kvm_state.kvm_pit_state2, state.pit))


def save_cpu(vcpu: Vcpu, msrs: list[int]) -> CpuState:
    """Return the state of a vCPU; `msrs` are `Kvm.msr_indices()`. Raises KernelError."""
    # First: asking for it lets an INIT or SIPI that waits take effect on all the others.
    mp_state = vcpu.mp_state()
    return CpuState(
        index=vcpu.index,
        tsc_khz=vcpu.tsc_khz(),
        mp_state=mp_state,
        cpuid=bytes(vcpu.cpuid()),
        regs=bytes(vcpu.regs()),
        sregs=bytes(vcpu.sregs()),
        xsave=vcpu.xsave(),
        xcrs=bytes(vcpu.xcrs()),
        debugregs=bytes(vcpu.debugregs()),
        lapic=bytes(vcpu.lapic()),
        msrs=vcpu.msrs(msrs),
        events=bytes(vcpu.events()),
    )


def restore_cpu(state: CpuState, vcpu: Vcpu) -> None:
    """Make a vCPU that never ran be as `state`. Raises KernelError and InvalidArgument."""
    # CPUID first, for it decides which bits and registers the rest may have.
    vcpu.set_cpuid(_cpuid(state.cpuid))
    if vcpu.tsc_khz() != state.tsc_khz:
        vcpu.set_tsc_khz(state.tsc_khz)
    vcpu.set_regs(_struct(kvm.kvm_regs, state.regs))
    vcpu.set_sregs(_struct(kvm.kvm_sregs, state.sregs))
    vcpu.set_xcrs(_struct(kvm_state.kvm_xcrs, state.xcrs))
    vcpu.set_xsave(state.xsave)
    vcpu.set_debugregs(_struct(kvm_state.kvm_debugregs, state.debugregs))
    # After sregs, which have the APIC's base; before the deadline, which its timer takes.
    vcpu.set_lapic(_struct(kvm_state.kvm_lapic_state, state.lapic))
    vcpu.set_msrs(dict(sorted(state.msrs.items(), key=_by_need)))
    # Last, for set_regs drops exceptions and the local APIC's state raises events.
    vcpu.set_events(_struct(kvm_state.kvm_vcpu_events, state.events))
    vcpu.set_mp_state(state.mp_state)


def _by_need(item: tuple[int, int]) -> tuple[bool, bool, int]:
    """Order registers: the counter first, its deadline last."""
    index, _ = item
    return index == _TSC_DEADLINE, index != _TSC, index


def _struct(kind: type[_State], data: bytes) -> _State:
    if len(data) != ctypes.sizeof(kind):
        raise InvalidArgument(f"{len(data)} bytes are no struct {kind.__name__}")
    return kind.from_buffer_copy(data)


def _cpuid(data: bytes) -> kvm.kvm_cpuid2:
    leaves = (len(data) - ctypes.sizeof(kvm.kvm_cpuid2)) // ctypes.sizeof(kvm.kvm_cpuid_entry2)
    table = _struct(type(kvm.kvm_cpuid2_table([], max(leaves, 0))), data)
    if table.nent != leaves:  # KVM would read on behind the table, and show it to the guest
        raise InvalidArgument(f"CPUID of {table.nent} leaves in a table of {leaves}")
    return table
