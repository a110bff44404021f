"""vmm/cpu.py on a vCPU that is a list of exits, and vmm/cpuid.py; no /dev/kvm."""

from __future__ import annotations

import errno
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import pytest

from vhostctl.abi.kvm import kvm_cpuid2, kvm_cpuid2_table, kvm_cpuid_entry2
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host.vcpu import Exit, Interrupted, Mmio, PortIo, Shutdown, SystemEvent, Vcpu
from vhostctl.vmm import cpuid
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.cpu import KICK, CpuEnd, CpuThread
from vhostctl.vmm.cpuid import guest_cpuid
from vhostctl.vmm.layout import MAX_CPUS

PATIENCE = 20


class Script:
    """A vCPU that makes `exits`, and then waits for the signal as KVM_RUN does."""

    label = "vCPU 3"
    index = 3

    def __init__(self, exits: Iterable[Exit]) -> None:
        self._exits = iter(exits)
        self.idle = threading.Event()
        self.blocked = 0
        self.immediate: list[bool] = []
        self.told = 0

    def clock_paused(self) -> None:
        self.told += 1
        raise KernelError(errno.EINVAL, "KVM_KVMCLOCK_CTRL", self.label)

    def set_signal_mask(self, blocked: int) -> None:
        self.blocked = blocked

    def run(self, *, immediate: bool = False) -> Exit:
        self.immediate.append(immediate)
        for made in self._exits:
            return made
        self.idle.set()
        if not immediate:
            assert signal.sigtimedwait({KICK}, PATIENCE) is not None
        return Interrupted()


class Device:
    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.written: list[tuple[int, bytes]] = []
        self._act = act

    def read(self, offset: int, length: int) -> bytes:
        return bytes(offset + at for at in range(length))

    def write(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))
        self._act()


class Cpu:
    """A CpuThread with its surroundings; ends when the test does."""

    def __init__(self, exits: Iterable[Exit], act: Callable[[], None] = lambda: None) -> None:
        self.script = Script(exits)
        self.device = Device(act)
        self.ends: queue.Queue[CpuEnd] = queue.Queue()
        self.lock = threading.RLock()
        ports, mmio = Bus("port", 1 << 16), Bus("address", 1 << 52)
        ports.add(0x100, 0x100, self.device)
        mmio.add(0xD0000, 0x100, self.device)
        vcpu = cast(Vcpu, self.script)
        self.thread = CpuThread(vcpu, ports, mmio, self.lock, self.ends.put)

    def finish(self) -> None:
        """Run until every exit was handled."""
        self.thread.start()
        self.thread.resume()
        assert self.script.idle.wait(PATIENCE)
        self.thread.stop()


def test_exits_reach_the_buses_and_answers_the_vcpu() -> None:
    out, into, store, load = (bytearray(b"\1\2\3\4"), bytearray(4), bytearray(b"\5"), bytearray(8))
    cpu = Cpu(
        [
            PortIo(0x110, 2, 2, True, memoryview(out)),
            PortIo(0x120, 2, 2, False, memoryview(into)),
            PortIo(0x300, 1, 1, False, memoryview(nobody := bytearray(1))),
            Mmio(0xD0030, True, memoryview(store)),
            Mmio(0xD0040, False, memoryview(load)),
        ]
    )
    cpu.finish()
    assert cpu.device.written == [(0x10, b"\1\2"), (0x10, b"\3\4"), (0x30, b"\5")]
    assert into == b"\x20\x21\x20\x21"
    assert load == bytes(range(0x40, 0x48))
    assert nobody == b"\xff"
    assert cpu.ends.empty()


def test_the_last_exit_is_finished_before_the_vcpu_stops() -> None:
    """Which takes another KVM_RUN after each one, and none that enters the guest."""
    stopping = threading.Event()

    def stop() -> None:
        if not stopping.is_set():
            stopping.set()
            cpu.thread.stop()

    data = memoryview(bytearray(1))
    cpu = Cpu([PortIo(0x110, 1, 1, True, data)] * 3, stop)
    cpu.finish()
    assert len(cpu.device.written) == 3
    assert cpu.script.immediate[-3:] == [True, True, True]
    assert len(cpu.script.immediate) == 4


@pytest.mark.parametrize("cause", [Shutdown(), SystemEvent(1)], ids=["shutdown", "event"])
def test_an_end_is_told_once(cause: Shutdown | SystemEvent) -> None:
    cpu = Cpu([cause])
    cpu.thread.start()
    cpu.thread.resume()
    assert cpu.ends.get(timeout=PATIENCE) == CpuEnd(3, cause)
    cpu.thread.pause()
    cpu.thread.resume()
    cpu.thread.stop()
    assert cpu.ends.empty()


def test_who_stops_it_may_hold_what_the_end_needs() -> None:
    cpu = Cpu([Shutdown()])
    told, stopping = threading.Event(), threading.Event()

    def end(_: CpuEnd) -> None:
        told.set()
        assert stopping.wait(PATIENCE)
        with cpu.lock:
            pass

    def stop() -> None:
        with cpu.lock:
            stopping.set()
            time.sleep(0.01)  # for the other to want the lock
            cpu.thread.stop()

    cpu.thread._on_end = end
    cpu.thread.start()
    cpu.thread.resume()
    assert told.wait(PATIENCE)
    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    stopper.join(PATIENCE)
    assert not stopper.is_alive()


def test_the_guest_hears_that_it_stood_still() -> None:
    cpu = Cpu([])
    cpu.thread.start()
    told = []
    for _ in range(3):
        cpu.script.idle.clear()
        cpu.thread.resume()
        assert cpu.script.idle.wait(PATIENCE)
        cpu.thread.pause()
        told.append(cpu.script.told)
    # Whether it stood still before the first time depends on when its thread began.
    assert [count - told[0] for count in told] == [0, 1, 2]
    cpu.thread.stop()


def test_what_a_model_raises_is_told_and_holds_nothing() -> None:
    def fail() -> None:
        raise SystemExit

    data = bytearray(1)
    cpu = Cpu((PortIo(0x110, 1, 1, True, memoryview(data)) for _ in range(1)), fail)
    cpu.thread.start()
    cpu.thread.resume()
    end = cpu.ends.get(timeout=PATIENCE)
    assert isinstance(end.cause, SystemExit)
    assert cpu.lock.acquire(timeout=PATIENCE)
    cpu.thread.stop()
    data.clear()  # BufferError if the error's traceback holds what the vCPU shares


def test_only_kvm_run_lets_the_signal_through() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        cpu = Cpu([])
        cpu.finish()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert cpu.script.blocked & 1 << signal.SIGUSR2 - 1
    assert not cpu.script.blocked & 1 << KICK - 1
    assert KICK not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_thread_that_was_never_started_stops() -> None:
    cpu = Cpu([])
    cpu.thread.stop()
    cpu.thread.start()
    cpu.thread.stop()
    assert cpu.script.immediate == []


def test_a_thread_that_was_never_started_is_paused() -> None:
    cpu = Cpu([])
    waiter = threading.Thread(target=cpu.thread.pause, daemon=True)
    waiter.start()
    waiter.join(PATIENCE)
    assert not waiter.is_alive()
    cpu.finish()


AMD = (0x8000_0001, 0x8000_0008, 0x8000_001D, 0x8000_001E, 0x8000_0022)


def supported() -> kvm_cpuid2:
    words = {"eax": 0x1C004121, "ebx": 0xFFFFFFFF, "ecx": 0xFFFFFFFF, "edx": 0xFFFFFFFF}
    functions = (0, 1, 4, 0xA, 0xB, 0x1F, *AMD)
    return kvm_cpuid2_table([kvm_cpuid_entry2(function=n, **words) for n in functions])


def leaves(index: int, count: int, **options: bool) -> dict[tuple[int, int], kvm_cpuid_entry2]:
    table = guest_cpuid(supported(), index, count, **options)
    return {(entry.function, entry.index): entry for entry in table.entries}


@pytest.mark.parametrize(("count", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (254, 8)])
def test_every_cpu_is_a_core_of_one_package(count: int, bits: int) -> None:
    for index in {0, count - 1}:
        found = leaves(index, count)
        assert found[1, 0].ebx >> 24 == index
        assert found[1, 0].ebx >> 16 & 0xFF == min(1 << bits, 255)
        assert bool(found[1, 0].edx & 1 << 28) == (count > 1)
        assert [found[0xB, level].edx for level in range(3)] == [index] * 3
        assert (found[0xB, 0].eax, found[0xB, 0].ebx, found[0xB, 0].ecx) == (0, 1, 0x100)
        assert (found[0xB, 1].eax, found[0xB, 1].ebx, found[0xB, 1].ecx) == (bits, count, 0x201)
        assert found[0x8000_0008, 0].ecx == bits << 12 | count - 1
        assert found[0x8000_001E, 0].eax == index
        assert (0x1F, 0) not in found


def test_what_is_not_saved_is_not_shown() -> None:
    found = leaves(0, 2)
    assert not found[1, 0].ecx & 1 << 5  # VMX
    assert not found[0x8000_0001, 0].ecx & 1 << 2  # SVM
    assert not found[0x8000_0001, 0].ecx & 1 << 23  # more performance counters
    assert (found[0x8000_0022, 0].eax, found[0x8000_0022, 0].ebx) == (0, 0)
    assert found[1, 0].ecx >> 31 == 1  # a hypervisor is there
    assert (found[0xA, 0].eax, found[0xA, 0].edx) == (0, 0)
    assert found[1, 0].ecx & 1 << 24
    assert not leaves(0, 2, tsc_deadline=False)[1, 0].ecx & 1 << 24


@pytest.mark.parametrize("model", ["QEMU TCG CPU version 2.5+", "AMD EPYC 9654 96-Core"])
def test_under_an_emulator_there_are_no_extended_states(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: {model}\n")
    monkeypatch.setattr(cpuid, "_CPUINFO", cpuinfo)
    everything = {"eax": 0, "ebx": 0xFFFF_FFFF, "ecx": 0xFFFF_FFFF, "edx": 0}
    table = kvm_cpuid2_table([kvm_cpuid_entry2(function=n, **everything) for n in (1, 7, 0xD)])
    found = {entry.function: entry for entry in guest_cpuid(table, 0, 1).entries}
    hidden = model.startswith("QEMU")
    assert (0xD not in found) == hidden
    assert bool(found[1].ecx & 1 << 26) != hidden  # XSAVE
    assert bool(found[7].ebx & 1 << 5) != hidden  # AVX2
    assert bool(found[7].ecx & 1 << 3) != hidden  # PKU
    assert found[1].ecx & 1  # SSE3 has nothing to do with it


def test_supported_leaves_stay_as_they_were() -> None:
    table = supported()
    before = bytes(table)
    guest_cpuid(table, 1, 2)
    assert bytes(table) == before


@pytest.mark.parametrize(("index", "count"), [(0, 0), (1, 1), (-1, 2), (0, MAX_CPUS + 1)])
def test_cpus_that_cannot_be_are_refused(index: int, count: int) -> None:
    with pytest.raises(InvalidArgument, match="use 1 to 254"):
        guest_cpuid(supported(), index, count)
