"""A PC of these pieces: memory, vCPUs, interrupts, a serial port and virtio devices on PCI."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from vhostctl.abi.kvm import KVM_CAP_TSC_DEADLINE_TIMER
from vhostctl.control.addressspace import AddressSpace
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.closing import Closing
from vhostctl.host.kvm import DEFAULT_PATH, Kvm
from vhostctl.host.memory import MappedRegion
from vhostctl.vmm import boot, layout
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.cpu import CpuEnd, CpuThread
from vhostctl.vmm.cpuid import guest_cpuid, xsave_works
from vhostctl.vmm.doorbells import Doorbells
from vhostctl.vmm.interrupts import Interrupts
from vhostctl.vmm.loop import Loop
from vhostctl.vmm.memory import KvmMemory
from vhostctl.vmm.pci import PciBus
from vhostctl.vmm.platform import Platform
from vhostctl.vmm.serial import Serial
from vhostctl.vmm.virtio import VirtioDevice
from vhostctl.vmm.virtio_pci import VirtioPci

_PORTS = 1 << 16
_ADDRESSES = 1 << 64


class End(enum.Enum):
    """How a machine ended."""

    POWER_OFF = "the guest switched itself off"
    RESET = "the guest asked for a reset"
    QUIT = "it was ended from outside"


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What the guest is to have: `memory` in bytes, `cpus` processors.

    Without `irqfd` every interrupt and without `ioeventfd` every doorbell goes through this
    process. A device that is not `transitional` is for drivers of virtio 1.0 and later.
    """

    memory: int = 256 << 20
    cpus: int = 1
    irqfd: bool = True
    ioeventfd: bool = True
    transitional: bool = True

    def __post_init__(self) -> None:
        """Raise InvalidArgument for what no PC has."""
        layout.ram(self.memory)
        if not 1 <= self.cpus <= layout.MAX_CPUS:
            raise InvalidArgument(f"{self.cpus} vCPUs", hint=f"use 1 to {layout.MAX_CPUS}")


class Counters(msgspec.Struct, frozen=True, rename="kebab"):
    """What left the guest for this process since the start.

    `doorbell_exits` are doorbells of rings that vhost serves, `interrupts_raised` interrupts
    that no irqfd raised; `port_exits` and `mmio_exits` all accesses to device models.
    """

    doorbell_exits: int
    interrupts_raised: int
    port_exits: int
    mmio_exits: int


@contextmanager
def fresh_ram(size: int) -> Iterator[list[MappedRegion]]:
    """Yield `size` bytes of memory for a guest, where `layout.ram` has it.

    Raises InvalidArgument and KernelError.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(MappedRegion.memfd(gpa, part, f"RAM at {gpa:#x}"))
            for gpa, part in layout.ram(size)
        ]


class Machine(Closing):
    """A virtual machine on /dev/kvm; a context manager that ends it.

    `space` is its memory: what is added to it or removed, KVM and vhost hear of. `lock` is
    held around every call into a device model; hold it to change one from outside. Devices
    come by `add()`, then `boot()` or `restore()` in vmm/suspend.py, then `start()` and `resume()`;
    `wait()` returns how it ended. `close()` stops the vCPUs and closes the devices.
    """

    def __init__(
        self,
        config: MachineConfig,
        ram: Sequence[MappedRegion],
        output: Callable[[bytes], None],
        kvm: str = DEFAULT_PATH,
    ) -> None:
        """Make the machine, its vCPUs paused; `output` gets what the serial port sends.

        `ram` is guest memory at the addresses of `layout.ram`, such as `fresh_ram()`; it stays
        the caller's. Raises KernelError, EnvironmentMissing and InvalidArgument.
        """
        self.config = config
        self.ram = tuple(ram)
        self.lock = threading.RLock()
        self.functions: list[VirtioPci] = []
        self._running = False
        self._ended = threading.Event()
        self._outcome: End | BaseException | None = None
        with ExitStack() as stack:
            self._build(stack, output, kvm)
            self._stack = stack.pop_all()

    def _build(self, stack: ExitStack, output: Callable[[bytes], None], kvm: str) -> None:
        config = self.config
        self.kvm = stack.enter_context(Kvm.open(kvm))
        self.vm = stack.enter_context(self.kvm.create_vm())
        self.vm.set_tss_addr(layout.KVM_TSS)
        self.vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.space = AddressSpace(self.ram)
        self.space.register(KvmMemory(self.vm))
        self.doorbells = stack.enter_context(Doorbells(self.vm, self.space))
        self.interrupts = Interrupts(self.vm, config.irqfd)
        self.ports, self.mmio = Bus("I/O port", _PORTS), Bus("MMIO", _ADDRESSES)
        self.loop = stack.enter_context(Loop(self.lock, self._finish))
        self.serial = Serial(partial(self.interrupts.line, layout.SERIAL_GSI), output)
        self.ports.add(layout.SERIAL_PORTS.start, len(layout.SERIAL_PORTS), self.serial)
        self.platform = Platform(
            self.ports, partial(self.end, End.POWER_OFF), partial(self.end, End.RESET)
        )
        self.pci = PciBus(self.ports, self.mmio)
        supported = self.kvm.supported_cpuid()
        deadline = bool(self.vm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
        xsave = xsave_works()
        self.cpus: list[CpuThread] = []
        for index in range(config.cpus):
            vcpu = stack.enter_context(self.vm.create_vcpu(index))
            leaves = guest_cpuid(supported, index, config.cpus, tsc_deadline=deadline, xsave=xsave)
            vcpu.set_cpuid(leaves)
            cpu = CpuThread(vcpu, self.ports, self.mmio, self.lock, self._cpu_ended)
            stack.callback(cpu.stop)
            self.cpus.append(cpu)

    def add(self, device: VirtioDevice) -> VirtioPci:
        """Put a virtio device on the PCI bus, before the guest runs.

        It is the machine's from here on, even if this raises. Raises InvalidArgument (no slot is
        left) and KernelError.
        """
        # Closed behind its function: until then loop and KVM know its eventfds.
        self._stack.callback(device.close)
        function = VirtioPci(
            device,
            self.interrupts,
            self.doorbells,
            self.loop,
            transitional=self.config.transitional,
            ioeventfd=self.config.ioeventfd,
        )
        self._stack.callback(self._remove, function)
        with self.lock:
            self.pci.add(function)
        self.functions.append(function)
        return function

    def _remove(self, function: VirtioPci) -> None:
        with self.lock:
            function.close()

    def boot(self, kernel: Path, initrd: Path | None = None, command_line: str = "") -> None:
        """Load a Linux bzImage and have vCPU 0 begin in it, at `resume()`.

        Raises InvalidArgument (no bzImage, something does not fit) and KernelError.
        """
        entry = boot.load(self.space, kernel, initrd, command_line, self.config.cpus)
        entry.apply(self.cpus[0].vcpu)

    def start(self) -> None:
        """Make the threads of the vCPUs, which are paused. Call once."""
        for cpu in self.cpus:
            cpu.start()

    @property
    def running(self) -> bool:
        """Whether the vCPUs run, as far as it was asked for."""
        return self._running

    def resume(self) -> None:
        """Let the vCPUs run."""
        self._running = True
        for cpu in self.cpus:
            cpu.resume()

    def pause(self) -> None:
        """Return when every vCPU is out of the guest, its last exit finished."""
        self._running = False
        for cpu in self.cpus:
            cpu.pause()

    def wait(self, timeout: float | None = None) -> End | None:
        """Return how the machine ended; None if it has not within `timeout` seconds.

        For any number of threads, which all learn of the first end. Raises VhostctlError for a
        vCPU that KVM cannot run any more, and what a device model raised.
        """
        self._ended.wait(timeout)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def end(self, how: End) -> None:
        """Have `wait()` return `how`, unless it ended before; for any thread."""
        self._finish(how)

    def _finish(self, outcome: End | BaseException) -> None:
        with self.lock:
            if self._outcome is None:
                self._outcome = outcome
        self._ended.set()

    def _cpu_ended(self, end: CpuEnd) -> None:
        if isinstance(end.cause, BaseException):
            self._finish(end.cause)
        else:
            self._finish(StateError(f"vCPU {end.index}: {end.cause}", hint="the guest is lost"))

    def counters(self) -> Counters:
        """Return what left the guest for this process."""
        return Counters(
            doorbell_exits=sum(function.doorbell_exits for function in self.functions),
            interrupts_raised=self.interrupts.raised,
            port_exits=self.ports.accesses,
            mmio_exits=self.mmio.accesses,
        )

    def close(self) -> None:
        """Stop the vCPUs and the loop, take the devices out, close all that is ours.

        Who still waits for the end learns of it. A second call does nothing.
        """
        with self._stack:  # closed even if we are interrupted while a vCPU stops
            self.end(End.QUIT)
            for cpu in self.cpus:
                cpu.stop()
