"""A VMM out of the pieces: boots Linux on this terminal, its network on vhost-net; Ctrl-A x leaves.

Usage: python examples/vmm.py BZIMAGE INITRD TAP [DEVICE]
"""

import queue
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from vhostctl import AddressSpace, Tap, VhostNet
from vhostctl.host.kvm import Kvm
from vhostctl.host.memory import MappedRegion
from vhostctl.vmm import boot, layout
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.console import Console, Output
from vhostctl.vmm.cpu import CpuThread
from vhostctl.vmm.cpuid import guest_cpuid
from vhostctl.vmm.doorbells import Doorbells
from vhostctl.vmm.interrupts import Interrupts
from vhostctl.vmm.loop import Loop
from vhostctl.vmm.memory import KvmMemory
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.netconfig import NetConfig
from vhostctl.vmm.pci import PciBus
from vhostctl.vmm.platform import Platform
from vhostctl.vmm.serial import Serial
from vhostctl.vmm.virtio_pci import VirtioPci


def under(lock: threading.RLock, close: Callable[[], None]) -> None:
    """Close a device model, which the loop may be about to call."""
    with lock:
        close()


def main(kernel: str, initrd: str, tap_name: str, device: str = "/dev/vhost-net") -> None:
    """Run the guest until it switches itself off."""
    ended: queue.SimpleQueue[object] = queue.SimpleQueue()
    lock = threading.RLock()  # around every call into a device model
    with ExitStack() as stack:
        enter = stack.enter_context
        # Guest memory, and whoever has to know of it: KVM's slots now, vhost's table later.
        ram = enter(MappedRegion.memfd(0, 256 << 20, "RAM"))
        tap = enter(Tap.open(tap_name))
        vhost = enter(VhostNet.at(device))
        kvm = enter(Kvm.open())
        vm = enter(kvm.create_vm())
        vm.set_tss_addr(layout.KVM_TSS)
        vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        vm.create_irqchip()
        vm.create_pit2()
        space = AddressSpace([ram])
        space.register(KvmMemory(vm))

        # Doorbells become ioeventfds, calls become irqfds; the loop is for what cannot.
        doorbells = enter(Doorbells(vm, space))
        interrupts = Interrupts(vm)
        loop = enter(Loop(lock, ended.put))

        # What the guest finds at its I/O ports and on its PCI bus.
        ports, mmio = Bus("I/O port", 1 << 16), Bus("MMIO", 1 << 64)
        serial = Serial(partial(interrupts.line, layout.SERIAL_GSI), Output(1).write)
        ports.add(layout.SERIAL_PORTS.start, len(layout.SERIAL_PORTS), serial)
        enter(Console(0, loop, serial, partial(ended.put, "left")))
        Platform(ports, partial(ended.put, "power off"), partial(ended.put, "reset"))
        pci = PciBus(ports, mmio)
        nic = enter(NetDevice(space, tap, [vhost], NetConfig("02:00:00:00:00:02")))
        function = VirtioPci(nic, interrupts, doorbells, loop)
        stack.callback(under, lock, function.close)
        pci.add(function)

        # One processor, which begins where Linux does.
        vcpu = enter(vm.create_vcpu(0))
        vcpu.set_cpuid(guest_cpuid(kvm.supported_cpuid(), 0, 1))
        line = "console=ttyS0 quiet pci=noearly vhostctl.ip=192.0.2.2/24"
        boot.load(space, Path(kernel), Path(initrd), line, 1).apply(vcpu)
        cpu = CpuThread(vcpu, ports, mmio, lock, ended.put)
        stack.callback(cpu.stop)
        cpu.start()
        cpu.resume()
        print("\nended:", ended.get())


if __name__ == "__main__":
    main(*sys.argv[1:])
