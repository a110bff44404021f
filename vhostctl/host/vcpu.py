"""A vCPU of KVM: what it runs, why it stopped, and all of its registers.

Every method raises KernelError and, after `close()`, ClosedError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import struct
from dataclasses import dataclass
from typing import TypeVar

from vhostctl.abi import kvm, kvm_state
from vhostctl.abi.ioctl import Request
from vhostctl.abi.layout import Struct, flexible
from vhostctl.errors import ClosedError, kernel_error
from vhostctl.host.handle import Handle
from vhostctl.host.ioctl import Channel, call, ioctl, refusal

_State = TypeVar("_State", bound=Struct)
_MMIO_DATA = kvm.kvm_run.mmio.offset + 8  # struct kvm_run: mmio.data follows phys_addr
_MOST_LEAVES = 256  # KVM_MAX_CPUID_ENTRIES of arch/x86/include/asm/kvm_host.h
_NO_EXIT = (errno.EINTR, errno.EAGAIN)
_SUBERRORS = {
    kvm.KVM_INTERNAL_ERROR_EMULATION: "an instruction that KVM cannot emulate",
    kvm.KVM_INTERNAL_ERROR_SIMUL_EX: "exceptions on top of each other",
    kvm.KVM_INTERNAL_ERROR_DELIVERY_EV: "an exit while an event was delivered",
    kvm.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "an exit that KVM does not know",
}


@dataclass(frozen=True, slots=True)
class PortIo:
    """The guest reads or writes an I/O port: `count` times `size` bytes (1, 2 or 4).

    `data` has size * count bytes of what it wrote, or is where what it reads goes. It is
    the vCPU's and good until the next `run()`.
    """

    port: int
    size: int
    count: int
    write: bool
    data: memoryview


@dataclass(frozen=True, slots=True)
class Mmio:
    """The guest reads or writes memory that no slot has: 1 to 8 bytes; `data` as PortIo's."""

    address: int
    write: bool
    data: memoryview


@dataclass(frozen=True, slots=True)
class Halted:
    """The guest executed HLT, and there is no irqchip in the kernel to wait with."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A triple fault."""


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """The guest asked for a shutdown, a reset...: KVM_SYSTEM_EVENT_*."""

    type: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A signal came, `immediate` was asked for, or a waiting vCPU was started by another."""


@dataclass(frozen=True, slots=True)
class Failure:
    """KVM cannot go on with this vCPU; `reason` is for people."""

    reason: str


Exit = PortIo | Mmio | Halted | Shutdown | SystemEvent | Interrupted | Failure


class KvmHandle(Handle):
    """A descriptor of KVM, which takes ioctls."""

    def ioctl(self, request: Request, argument: object) -> int:
        """As ioctl(2): return its result, raise OSError with its errno."""
        return ioctl(self.fileno(), request, argument)


class Vcpu(KvmHandle):
    """One vCPU. One thread at a time: KVM makes others wait while it runs."""

    def __init__(self, fd: int, index: int, run_size: int, xsave_size: int) -> None:
        """Own `fd`; `run_size` and `xsave_size` are bytes (`Vm.create_vcpu` knows them)."""
        super().__init__(fd, f"vCPU {index}")
        self.index = index
        self._xsave_words = xsave_size // 4
        self._map: mmap.mmap | None = None
        try:
            self._map = mmap.mmap(fd, run_size)
        except OSError as error:
            self.close()
            raise kernel_error(error.errno or 0, "mmap", self.label) from error
        self._run: kvm.kvm_run | None = kvm.kvm_run.from_buffer(self._map)
        self._shared = memoryview(self._map)

    def close(self) -> None:
        """Close the vCPU; no thread may be inside `run()`. A second call does nothing.

        While there is a PortIo or Mmio of it, KVM keeps vCPU and VM.
        """
        mapping, self._map = self._map, None
        if mapping is not None:
            self._run = None
            self._shared.release()
            with contextlib.suppress(BufferError):  # an exit that outlives us has its data
                mapping.close()
        super().close()

    def run(self, *, immediate: bool = False) -> Exit:
        """KVM_RUN: finish the last exit, run the guest until the next one, and return that.

        With `immediate` the last exit is finished and the guest not entered: the answer is
        Interrupted, or another exit that the same instruction makes.
        """
        run = self._run
        if run is None:
            raise ClosedError(f"{self.label} is closed")
        if run.immediate_exit != immediate:  # a checked assignment is slow
            run.immediate_exit = immediate
        try:
            self.ioctl(kvm.KVM_RUN, None)
        except OSError as error:
            if error.errno in _NO_EXIT:
                return Interrupted()
            raise refusal(error, kvm.KVM_RUN.name, self.label) from error
        reason = run.exit_reason
        if reason == kvm.KVM_EXIT_IO:
            io = run.io
            data = self._shared[io.data_offset : io.data_offset + io.size * io.count]
            write = io.direction == kvm.KVM_EXIT_IO_OUT
            return PortIo(io.port, io.size, io.count, write, data)
        if reason == kvm.KVM_EXIT_MMIO:
            mmio = run.mmio
            data = self._shared[_MMIO_DATA : _MMIO_DATA + mmio.len]
            return Mmio(mmio.phys_addr, bool(mmio.is_write), data)
        return _rare(run)

    def set_signal_mask(self, blocked: int) -> None:
        """KVM_SET_SIGNAL_MASK: the signals blocked while in `run()`, bit N - 1 being signal N."""
        mask = flexible(kvm.kvm_signal_mask, "sigset", 8)(len=8)
        mask.sigset[:] = struct.pack("=Q", blocked)
        call(self, kvm.KVM_SET_SIGNAL_MASK, mask)

    def regs(self) -> kvm.kvm_regs:
        """KVM_GET_REGS: general registers."""
        return self._get(kvm.KVM_GET_REGS, kvm.kvm_regs())

    def set_regs(self, regs: kvm.kvm_regs) -> None:
        """KVM_SET_REGS; drops an exception that is on its way into the vCPU."""
        call(self, kvm.KVM_SET_REGS, regs)

    def sregs(self) -> kvm.kvm_sregs:
        """KVM_GET_SREGS: segments, tables, control registers."""
        return self._get(kvm.KVM_GET_SREGS, kvm.kvm_sregs())

    def set_sregs(self, sregs: kvm.kvm_sregs) -> None:
        """KVM_SET_SREGS; EINVAL for what this vCPU's CPUID does not allow."""
        call(self, kvm.KVM_SET_SREGS, sregs)

    def cpuid(self) -> kvm.kvm_cpuid2:
        """KVM_GET_CPUID2: the leaves that the guest sees."""
        return cpuid_table(self, kvm.KVM_GET_CPUID2)

    def set_cpuid(self, cpuid: kvm.kvm_cpuid2) -> None:
        """KVM_SET_CPUID2: what the guest sees; before the first `run()`."""
        call(self, kvm.KVM_SET_CPUID2, cpuid)

    def mp_state(self) -> int:
        """KVM_GET_MP_STATE: KVM_MP_STATE_*."""
        return int(self._get(kvm.KVM_GET_MP_STATE, kvm.kvm_mp_state()).mp_state)

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE."""
        call(self, kvm.KVM_SET_MP_STATE, kvm.kvm_mp_state(mp_state=state))

    def lapic(self) -> kvm_state.kvm_lapic_state:
        """KVM_GET_LAPIC: registers of the local APIC."""
        return self._get(kvm_state.KVM_GET_LAPIC, kvm_state.kvm_lapic_state())

    def set_lapic(self, lapic: kvm_state.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC; its base is in `sregs`, which come first."""
        call(self, kvm_state.KVM_SET_LAPIC, lapic)

    def events(self) -> kvm_state.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS: exceptions and interrupts on their way."""
        return self._get(kvm_state.KVM_GET_VCPU_EVENTS, kvm_state.kvm_vcpu_events())

    def set_events(self, events: kvm_state.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        call(self, kvm_state.KVM_SET_VCPU_EVENTS, events)

    def debugregs(self) -> kvm_state.kvm_debugregs:
        """KVM_GET_DEBUGREGS."""
        return self._get(kvm_state.KVM_GET_DEBUGREGS, kvm_state.kvm_debugregs())

    def set_debugregs(self, debugregs: kvm_state.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        call(self, kvm_state.KVM_SET_DEBUGREGS, debugregs)

    def xcrs(self) -> kvm_state.kvm_xcrs:
        """KVM_GET_XCRS: extended control registers."""
        return self._get(kvm_state.KVM_GET_XCRS, kvm_state.kvm_xcrs())

    def set_xcrs(self, xcrs: kvm_state.kvm_xcrs) -> None:
        """KVM_SET_XCRS."""
        call(self, kvm_state.KVM_SET_XCRS, xcrs)

    def xsave(self) -> bytes:
        """KVM_GET_XSAVE2: FPU and vector registers, as the XSAVE instruction lays them out."""
        area = (ctypes.c_uint32 * self._xsave_words)()
        call(self, kvm_state.KVM_GET_XSAVE2, area)
        return bytes(area)

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE; `area` may be shorter than this vCPU's, the rest is zero."""
        words = (ctypes.c_uint32 * max(self._xsave_words, -(-len(area) // 4)))()
        ctypes.memmove(words, area, len(area))
        call(self, kvm_state.KVM_SET_XSAVE, words)

    def msrs(self, indices: list[int]) -> dict[int, int]:
        """KVM_GET_MSRS: the value of each of `indices` that this vCPU lets us read."""
        found: dict[int, int] = {}
        rest = indices
        while rest:
            table = kvm_state.kvm_msrs_table([kvm_state.kvm_msr_entry(index=n) for n in rest])
            done = call(self, kvm_state.KVM_GET_MSRS, table)
            found |= {entry.index: entry.data for entry in table.entries[:done]}
            rest = rest[done + 1 :]  # it stops before the first that it does not read
        return found

    def set_msrs(self, values: dict[int, int]) -> None:
        """KVM_SET_MSRS, in the order of `values`. KernelError names the one that is refused."""
        entries = [kvm_state.kvm_msr_entry(index=n, data=value) for n, value in values.items()]
        done = call(self, kvm_state.KVM_SET_MSRS, kvm_state.kvm_msrs_table(entries))
        if done < len(entries):
            refused = entries[done]
            target = f"{self.label} MSR {refused.index:#x} = {refused.data:#x}"
            raise kernel_error(errno.EINVAL, kvm_state.KVM_SET_MSRS.name, target)

    def tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: what the guest's time stamp counter counts in a millisecond."""
        return call(self, kvm_state.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; a host without TSC scaling takes little but its own."""
        call(self, kvm_state.KVM_SET_TSC_KHZ, khz)

    def clock_paused(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell a guest with KVM's clock that it stood still.

        KernelError (EINVAL) if the guest does not use that clock.
        """
        call(self, kvm_state.KVM_KVMCLOCK_CTRL)

    def _get(self, request: Request, state: _State) -> _State:
        call(self, request, state)
        return state


def cpuid_table(channel: Channel, request: Request) -> kvm.kvm_cpuid2:
    """Return what `request`, which fills a table of CPUID leaves, answers."""
    table = kvm.kvm_cpuid2_table([], _MOST_LEAVES)
    call(channel, request, table)
    return kvm.kvm_cpuid2_table(list(table.entries[: table.nent]))


def _rare(run: kvm.kvm_run) -> Exit:
    match run.exit_reason:
        case kvm.KVM_EXIT_HLT:
            return Halted()
        case kvm.KVM_EXIT_SHUTDOWN:
            return Shutdown()
        case kvm.KVM_EXIT_SYSTEM_EVENT:
            return SystemEvent(run.system_event.type)
        case kvm.KVM_EXIT_FAIL_ENTRY:
            why = run.fail_entry.hardware_entry_failure_reason
            return Failure(f"the processor refused to enter the guest ({why:#x})")
        case kvm.KVM_EXIT_INTERNAL_ERROR:
            internal = run.internal
            what = _SUBERRORS.get(internal.suberror, f"internal error {internal.suberror}")
            words = " ".join(f"{word:x}" for word in internal.data[: min(internal.ndata, 16)])
            return Failure(f"{what} ({words})")
        case kvm.KVM_EXIT_UNKNOWN:
            return Failure(f"unknown exit of the processor ({run.hw.hardware_exit_reason:#x})")
        case reason:
            return Failure(f"exit {reason} of KVM, which nobody asked for")
