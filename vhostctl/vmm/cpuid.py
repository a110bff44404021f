"""The CPUID that a vCPU shows: the host's by way of KVM, with the guest's own topology.

One package of as many cores as there are vCPUs, one thread each; the APIC id is the index.
Leaf numbers and bits: Intel SDM volume 2A (CPUID), AMD APM volume 3 (appendix E).
"""

from __future__ import annotations

import re
from pathlib import Path

from vhostctl.abi.kvm import (
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    kvm_cpuid2,
    kvm_cpuid2_table,
    kvm_cpuid_entry2,
)
from vhostctl.errors import InvalidArgument
from vhostctl.vmm.layout import MAX_CPUS

_TOPOLOGY, _TOPOLOGY_V2 = 0xB, 0x1F

_ECX_VMX = 1 << 5
_ECX_TSC_DEADLINE = 1 << 24
_ECX_HYPERVISOR = 1 << 31
_EDX_HTT = 1 << 28
_ECX_XSAVE_AND_USERS = sum(1 << bit for bit in (12, 26, 27, 28, 29))  # FMA, OSXSAVE, AVX, F16C
_LEAF_7_EBX_AVX = sum(1 << bit for bit in (5, 16, 17, 21, 26, 27, 28, 30, 31))
_LEAF_7_ECX_XSTATE = sum(1 << bit for bit in (1, 3, 4, 6, 9, 10, 11, 12, 14))  # PKU, AVX-512...
_XSTATE = 0xD
_CPUINFO = Path("/proc/cpuinfo")
_EMULATOR = re.compile(r"^model name\s*: QEMU TCG CPU", re.MULTILINE)
_AMD_ECX_LEGACY_CORES = 1 << 1
# SVM, and the counters of core, northbridge and L2.
_AMD_ECX_HIDDEN = sum(1 << bit for bit in (2, 23, 24, 28))
_LEVEL_THREAD, _LEVEL_CORE = 1, 2


def guest_cpuid(
    supported: kvm_cpuid2,
    index: int,
    count: int,
    *,
    tsc_deadline: bool = True,
    xsave: bool | None = None,
) -> kvm_cpuid2:
    """Return the CPUID of vCPU `index` of `count`, out of what `Kvm.supported_cpuid` gave.

    Nested virtualisation and the performance counters are hidden: their state is not saved.
    So is XSAVE unless `xsave`; None is for what works here.
    `tsc_deadline` is KVM_CAP_TSC_DEADLINE_TIMER. Raises InvalidArgument for an `index` or
    `count` that cannot be.
    """
    if not 0 <= index < count <= MAX_CPUS:
        raise InvalidArgument(f"vCPU {index} of {count}", hint=f"use 1 to {MAX_CPUS} vCPUs")
    entries = [kvm_cpuid_entry2.from_buffer_copy(entry) for entry in supported.entries]
    entries = [entry for entry in entries if entry.function not in (_TOPOLOGY, _TOPOLOGY_V2)]
    if not (xsave_works() if xsave is None else xsave):
        entries = [entry for entry in entries if entry.function != _XSTATE]
        _hide_xsave(entries)
    for entry in entries:
        _adapt(entry, index, count, tsc_deadline)
    return kvm_cpuid2_table(entries + _topology(index, count))


def _adapt(entry: kvm_cpuid_entry2, index: int, count: int, tsc_deadline: bool) -> None:
    many = count > 1
    match entry.function:
        case 0:
            entry.eax = max(entry.eax, _TOPOLOGY)
        case 0x1:
            entry.ebx = entry.ebx & 0xFFFF | min(_ids(count), 255) << 16 | index << 24
            entry.ecx = _with(entry.ecx & ~_ECX_VMX, _ECX_TSC_DEADLINE, tsc_deadline)
            entry.ecx |= _ECX_HYPERVISOR
            entry.edx = _with(entry.edx, _EDX_HTT, many)
        case 0x4 if entry.eax & 0x1F:  # a cache; the last level is everybody's
            shared = _ids(count) if entry.eax >> 5 & 7 >= 3 else 1
            cores = min(_ids(count), 64)
            entry.eax = entry.eax & 0x3FFF | shared - 1 << 14 | cores - 1 << 26
        case 0xA | 0x8000_0022:  # performance counters
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0
        case 0x8000_0001:
            entry.ecx = _with(entry.ecx & ~_AMD_ECX_HIDDEN, _AMD_ECX_LEGACY_CORES, many)
        case 0x8000_0008:
            entry.ecx = _bits(count) << 12 | count - 1
        case 0x8000_001D if entry.eax & 0x1F:
            shared = _ids(count) if entry.eax >> 5 & 7 >= 3 else 1
            entry.eax = entry.eax & 0x3FFF | shared - 1 << 14
        case 0x8000_001E:
            entry.eax, entry.ebx, entry.ecx = index, index, 0


def xsave_works() -> bool:
    """Return whether guests may use XSAVE: not where KVM runs under QEMU's emulator.

    A guest's XSETBV does not reach KVM there, which then neither keeps the extended states
    apart nor says their right size: Linux 6.1 complains, 7.2 panics.
    """
    return _EMULATOR.search(_CPUINFO.read_text(encoding="utf-8")) is None


def _hide_xsave(entries: list[kvm_cpuid_entry2]) -> None:
    for entry in entries:
        if entry.function == 1:
            entry.ecx &= ~_ECX_XSAVE_AND_USERS
        elif (entry.function, entry.index) == (7, 0):
            entry.ebx &= ~_LEAF_7_EBX_AVX
            entry.ecx &= ~_LEAF_7_ECX_XSTATE


def _topology(index: int, count: int) -> list[kvm_cpuid_entry2]:
    """Return leaf 0xB: threads, cores, and the end of the list."""
    levels = ((0, 1, _LEVEL_THREAD), (_bits(count), count, _LEVEL_CORE), (0, 0, 0))
    return [
        kvm_cpuid_entry2(
            function=_TOPOLOGY,
            index=number,
            flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=shift,
            ebx=processors,
            ecx=kind << 8 | number,
            edx=index,
        )
        for number, (shift, processors, kind) in enumerate(levels)
    ]


def _bits(count: int) -> int:
    return (count - 1).bit_length()


def _ids(count: int) -> int:
    """Return how many APIC ids `count` cores take: a power of two."""
    return 1 << _bits(count)


def _with(word: int, bit: int, there: bool) -> int:
    return word | bit if there else word & ~bit
