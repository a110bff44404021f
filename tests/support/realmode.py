"""A VM whose guest is a few bytes of real-mode code, and what that code did."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

import pytest

from vhostctl.abi.kvm import kvm_regs
from vhostctl.errors import VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.host.kvm import Kvm
from vhostctl.host.memory import MappedRegion
from vhostctl.host.vcpu import Vcpu
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.cpu import CpuEnd, CpuThread
from vhostctl.vmm.cpuid import guest_cpuid

CODE = 0x1000
STACK = 0x8000
COUNTER = 0x2000
MEMORY = 0x10000
MMIO = 0xD0000  # within real mode's reach, and no slot has it
DONE = 0x95
PATIENCE = 120.0  # seconds, of an emulated machine

Access = tuple[int, bytes]


def outb(port: int, value: int) -> bytes:
    return out(port, value.to_bytes(1, "little"))


def out(port: int, value: bytes) -> bytes:
    """mov dx, port; mov a, value; out dx, a. 1, 2 or 4 bytes."""
    load, store = {1: (b"\xb0", b"\xee"), 2: (b"\xb8", b"\xef"), 4: (b"\x66\xb8", b"\x66\xef")}[
        len(value)
    ]
    return b"\xba" + port.to_bytes(2, "little") + load + value + store


def store(offset: int, value: bytes) -> bytes:
    """mov es:[offset], value; es is at MMIO. 1, 2, 4 or, from a copy in the code, 8 bytes."""
    where = offset.to_bytes(2, "little")
    if len(value) == 8:  # jmp over it; movq mm0, cs:[...]; movq es:[offset], mm0
        return b"\xeb\x08" + value + b"\xe8\x00\x00\x5b\x2e\x0f\x6f\x47\xf5\x26\x0f\x7f\x06" + where
    move = {1: b"\x26\xc6\x06", 2: b"\x26\xc7\x06", 4: b"\x66\x26\xc7\x06"}[len(value)]
    return move + where + value


LOAD_ES = b"\xb8" + (MMIO >> 4).to_bytes(2, "little") + b"\x8e\xc0"
FOREVER = b"\xeb\xfe"
SLEEP = b"\xfb\xf4\xeb\xfc"  # sti; hlt; again
FINISH = outb(DONE, 0) + b"\xfa\xf4"
# The first PIC gets vectors 0x20 to 0x27, nothing masked, IRQ 5 a level.
PIC = b"".join(
    outb(port, value)
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0))
)
LEVEL_5 = outb(0x4D0, 1 << 5)
EOI = outb(0x20, 0x20)


class Record:
    """A bus device that notes what is written, and answers reads with 1, 2, 3..."""

    def __init__(self, base: int, seen: queue.Queue[Access]) -> None:
        self._base = base
        self._seen = seen
        self.reads = 0
        self.on_read: Callable[[], None] = lambda: None
        self.on_write: Callable[[], None] = lambda: None

    def read(self, _offset: int, length: int) -> bytes:
        self.reads += 1
        self.on_read()
        return (self.reads & 0xFF).to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> None:
        self._seen.put((self._base + offset, data))
        self.on_write()


class Toy(Closing):
    """A VM with `cpus` vCPUs; the first one starts at CODE, the rest wait for a SIPI."""

    def __init__(self, code: bytes = FOREVER, *, cpus: int = 1, memory: int | None = None) -> None:
        """`memory` is the descriptor of another Toy's memory, whose contents stay."""
        with contextlib.ExitStack() as stack:
            self.kvm = stack.enter_context(open_kvm())
            if memory is None:
                self.memory = MappedRegion.memfd(0, MEMORY)
            else:
                self.memory = MappedRegion.from_fd(0, MEMORY, memory)
            stack.enter_context(self.memory)
            self.vm = stack.enter_context(self.kvm.create_vm())
            self.vm.set_tss_addr(0xFFFBD000)
            self.vm.set_identity_map_addr(0xFFFBC000)
            self.vm.create_irqchip()
            self.vm.create_pit2()
            self.vm.set_memory(0, 0, MEMORY, self.memory.hva)
            self.vcpus = [stack.enter_context(self.vm.create_vcpu(index)) for index in range(cpus)]
            for vcpu in self.vcpus:
                vcpu.set_cpuid(guest_cpuid(self.kvm.supported_cpuid(), vcpu.index, cpus))
            self.lock = threading.RLock()
            self.ends: queue.Queue[CpuEnd] = queue.Queue()
            self._seen: queue.Queue[Access] = queue.Queue()
            self.port, self.mmio = Record(0, self._seen), Record(MMIO, self._seen)
            self._threads: list[CpuThread] = []
            self._stack = stack.pop_all()
        if memory is None:
            self.put(CODE, code)
            begin(self.vcpus[0])

    def close(self) -> None:
        for thread in self._threads:
            thread.stop()
        self._stack.close()

    def put(self, address: int, data: bytes) -> None:
        with self.memory.view() as view:
            view[address : address + len(data)] = data

    def handler(self, vector: int, code: bytes) -> None:
        """Have an interrupt of `vector` run `code`, with all registers kept, and return."""
        address = 0x3000 + vector * 0x40
        self.put(address, b"\x60" + code + b"\x61\xcf")  # pusha, popa, iret
        self.put(vector * 4, address.to_bytes(4, "little"))

    def next(self) -> Access:
        """Return the next write to a port or to MMIO, with its address."""
        return self._seen.get(timeout=PATIENCE)

    def until(self, last: int) -> list[Access]:
        """Return what is written before the next write to `last`."""
        return list(iter(self.next, (last, b"\0")))

    def drain(self) -> list[Access]:
        """Return what was written and not looked at; the guest is paused."""
        return [self._seen.get() for _ in range(self._seen.qsize())]

    def is_quiet(self) -> bool:
        return self._seen.empty()

    def count(self) -> int:
        with self.memory.view() as view:
            return int.from_bytes(view[COUNTER : COUNTER + 4], "little")

    def wait_for_progress(self) -> None:
        """Wait until the guest counted on."""
        before, deadline = self.count(), time.monotonic() + PATIENCE
        while self.count() == before:
            assert time.monotonic() < deadline, "the guest stands still"
            time.sleep(0.0005)

    def thread(self, index: int = 0) -> CpuThread:
        """Return a thread for a vCPU, paused."""
        ports, mmio = Bus("I/O port", 1 << 16), Bus("address", 1 << 52)
        ports.add(0, 1 << 16, self.port)
        mmio.add(MMIO, 0x1000, self.mmio)
        thread = CpuThread(self.vcpus[index], ports, mmio, self.lock, self.ends.put)
        self._threads.append(thread)
        thread.start()
        return thread

    def go(self) -> CpuThread:
        """Run the first vCPU."""
        thread = self.thread()
        thread.resume()
        return thread


def open_kvm() -> Kvm:
    try:
        return Kvm.open()
    except VhostctlError as error:
        pytest.skip(f"no KVM: {error}")


def begin(vcpu: Vcpu) -> None:
    """Have a vCPU that never ran start at CODE, in real mode."""
    sregs = vcpu.sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=CODE, rsp=STACK, rflags=2))
