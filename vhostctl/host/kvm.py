"""KVM: the system (/dev/kvm), and a VM with its memory slots, interrupts and eventfds.

Every method raises KernelError and, after `close()`, ClosedError. x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from typing import Self

from vhostctl.abi import kvm, kvm_state
from vhostctl.errors import EnvironmentMissing, KernelError
from vhostctl.host.ioctl import call
from vhostctl.host.node import DeviceNode
from vhostctl.host.vcpu import KvmHandle, Vcpu, cpuid_table

DEFAULT_PATH = "/dev/kvm"
CHIPS = (kvm.KVM_IRQCHIP_PIC_MASTER, kvm.KVM_IRQCHIP_PIC_SLAVE, kvm.KVM_IRQCHIP_IOAPIC)
"""The interrupt controllers that `Vm.create_irqchip` makes, but for the local APICs."""

_LEAST_XSAVE = ctypes.sizeof(kvm_state.kvm_xsave)


class Kvm(DeviceNode):
    """KVM as a whole: what it can do, and new VMs."""

    @classmethod
    def open(cls, path: str = DEFAULT_PATH) -> Self:
        """Open the device node; EnvironmentMissing if it is not KVM's of today.

        Raises KernelError (ENOENT, EACCES...).
        """
        node = cls(path)
        try:
            version = node.ioctl(kvm.KVM_GET_API_VERSION, None)
        except OSError:
            version = 0
        if version != kvm.KVM_API_VERSION:
            node.close()
            raise EnvironmentMissing(
                f"{path} answers as version {version} of KVM, not {kvm.KVM_API_VERSION}",
                hint="check the path",
            )
        return node

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: what KVM_CAP_* `capability` is worth, 0 if it is not there."""
        return call(self, kvm.KVM_CHECK_EXTENSION, capability)

    def supported_cpuid(self) -> kvm.kvm_cpuid2:
        """KVM_GET_SUPPORTED_CPUID: what host and KVM can give a vCPU."""
        return cpuid_table(self, kvm.KVM_GET_SUPPORTED_CPUID)

    def msr_indices(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the registers that make up a vCPU's state, for `Vcpu.msrs`."""
        table = kvm_state.kvm_msr_list_table(0)
        try:
            call(self, kvm_state.KVM_GET_MSR_INDEX_LIST, table)
        except KernelError as error:  # it says how many there are
            if error.errno != errno.E2BIG:
                raise
        table = kvm_state.kvm_msr_list_table(table.nmsrs)
        call(self, kvm_state.KVM_GET_MSR_INDEX_LIST, table)
        return list(table.indices)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM: a VM whose memory is this process's."""
        run_size = call(self, kvm.KVM_GET_VCPU_MMAP_SIZE)
        while True:
            try:
                return Vm(call(self, kvm.KVM_CREATE_VM), f"VM of {self.label}", run_size)
            except InterruptedError:  # taking the locks of a large process
                continue


class Vm(KvmHandle):
    """One VM. Calls from several threads are the kernel's to order."""

    def __init__(self, fd: int, label: str, run_size: int) -> None:
        """Own `fd`; `run_size` is what a vCPU shares with us, bytes."""
        super().__init__(fd, label)
        self._run_size = run_size

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: what KVM_CAP_* `capability` is worth to this VM."""
        return call(self, kvm.KVM_CHECK_EXTENSION, capability)

    def create_vcpu(self, index: int) -> Vcpu:
        """KVM_CREATE_VCPU: the vCPU with APIC id `index`; after `create_irqchip`."""
        xsave_size = max(self.check_extension(kvm.KVM_CAP_XSAVE2), _LEAST_XSAVE)
        fd = call(self, kvm.KVM_CREATE_VCPU, index, f"vCPU {index}")
        return Vcpu(fd, index, self._run_size, xsave_size)

    def set_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        """KVM_SET_USER_MEMORY_REGION: [gpa, gpa + size) is our memory at `hva`; size 0 deletes.

        All three are multiples of 4096.
        """
        region = kvm.kvm_userspace_memory_region(slot, 0, gpa, size, hva)
        call(self, kvm.KVM_SET_USER_MEMORY_REGION, region, f"slot {slot}, {gpa:#x}+{size:#x}")

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages without memory, below 4 GiB, for Intel's real mode."""
        call(self, kvm.KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one more such page; before the first vCPU."""
        call(self, kvm.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(gpa))

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: two PICs, an IOAPIC, and a local APIC for each vCPU to come.

        GSIs 0 to 15 lead to both PIC and IOAPIC, 16 to 23 to the IOAPIC.
        """
        call(self, kvm.KVM_CREATE_IRQCHIP)

    def create_pit2(self) -> None:
        """KVM_CREATE_PIT2: an i8254, its speaker port 0x61 included; after `create_irqchip`."""
        call(self, kvm.KVM_CREATE_PIT2, kvm.kvm_pit_config(flags=kvm.KVM_PIT_SPEAKER_DUMMY))

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE: set the level of a GSI that leads to an irqchip."""
        call(self, kvm.KVM_IRQ_LINE, kvm.kvm_irq_level(gsi, level), f"GSI {gsi}")

    def set_gsi_routing(self, entries: Sequence[kvm.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: where GSIs lead, all of them; the table is replaced at once."""
        call(self, kvm.KVM_SET_GSI_ROUTING, kvm.kvm_irq_routing_table(list(entries)))

    def signal_msi(self, address: int, data: int) -> int:
        """KVM_SIGNAL_MSI: return how many vCPUs took the message, 0 if they have it already.

        A message for an APIC that there is not is lost, as on a bus: 0.
        """
        message = kvm.kvm_msi(address & 0xFFFF_FFFF, address >> 32, data)
        try:
            return call(self, kvm.KVM_SIGNAL_MSI, message)
        except PermissionError:  # KVM's own -1 for nobody, taken for an errno
            return 0

    def ioeventfd(
        self,
        event_fd: int,
        address: int,
        *,
        length: int = 0,
        datamatch: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        """KVM_IOEVENTFD: have a guest's write to `address` signal an eventfd instead of an exit.

        `length` is of 1, 2, 4 or 8 bytes, or 0 for any; with `datamatch` only a write of that
        value counts. `pio` is for an I/O port. Without `assign` this ends; the rest is as it was.
        """
        flags = 0
        if datamatch is not None:
            flags |= kvm.KVM_IOEVENTFD_FLAG_DATAMATCH
        if pio:
            flags |= kvm.KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            flags |= kvm.KVM_IOEVENTFD_FLAG_DEASSIGN
        doorbell = kvm.kvm_ioeventfd(datamatch or 0, address, length, event_fd, flags)
        what = "" if datamatch is None else f" = {datamatch:#x}"
        part = f"{'port' if pio else 'address'} {address:#x}+{length}{what}"
        call(self, kvm.KVM_IOEVENTFD, doorbell, part)

    def irqfd(
        self, event_fd: int, gsi: int, *, resample_fd: int | None = None, assign: bool = True
    ) -> None:
        """KVM_IRQFD: have an eventfd raise `gsi`, one that waits already included.

        With `resample_fd` the GSI is a level: it stays high until the guest's EOI, which lowers
        it and signals `resample_fd`. Without `assign` this ends; the rest is as it was.
        """
        flags = 0 if assign else kvm.KVM_IRQFD_FLAG_DEASSIGN
        if resample_fd is not None:
            flags |= kvm.KVM_IRQFD_FLAG_RESAMPLE
        route = kvm.kvm_irqfd(event_fd, gsi, flags, resample_fd or 0)
        call(self, kvm.KVM_IRQFD, route, f"GSI {gsi}")

    def irqchip(self, chip: int) -> kvm_state.kvm_irqchip:
        """KVM_GET_IRQCHIP: the state of one of `CHIPS`."""
        state = kvm_state.kvm_irqchip(chip_id=chip)
        call(self, kvm_state.KVM_GET_IRQCHIP, state)
        return state

    def set_irqchip(self, state: kvm_state.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        call(self, kvm_state.KVM_SET_IRQCHIP, state)

    def pit(self) -> kvm_state.kvm_pit_state2:
        """KVM_GET_PIT2."""
        state = kvm_state.kvm_pit_state2()
        call(self, kvm_state.KVM_GET_PIT2, state)
        return state

    def set_pit(self, state: kvm_state.kvm_pit_state2) -> None:
        """KVM_SET_PIT2; its counters begin anew."""
        call(self, kvm_state.KVM_SET_PIT2, state)

    def clock(self) -> int:
        """KVM_GET_CLOCK: the guest's paravirtual clock, ns."""
        data = kvm_state.kvm_clock_data()
        call(self, kvm_state.KVM_GET_CLOCK, data)
        return int(data.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """KVM_SET_CLOCK: let that clock go on from here."""
        call(self, kvm_state.KVM_SET_CLOCK, kvm_state.kvm_clock_data(clock=nanoseconds))
