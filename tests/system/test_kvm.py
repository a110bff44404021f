"""KVM by way of host/kvm.py and vmm/cpu.py, with guests of a few bytes. Needs /dev/kvm."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import msgspec
import pytest

from tests.support.realmode import (
    DONE,
    EOI,
    FINISH,
    LEVEL_5,
    LOAD_ES,
    MMIO,
    PATIENCE,
    PIC,
    SLEEP,
    Toy,
    open_kvm,
    out,
    outb,
    store,
)
from vhostctl.abi import kvm
from vhostctl.errors import InvalidArgument, KernelError, StateError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.vcpu import Failure
from vhostctl.vmm import cpustate
from vhostctl.vmm.cpuid import xsave_works

pytestmark = pytest.mark.usefixtures("kvm_is_there", "nothing_left")

TIMES = 200
TICK = 0x90
PORT = 0xC010
GSI = 5
# The time stamp counter, HV_X64_MSR_VP_RUNTIME and HV_X64_MSR_TIME_REF_COUNT.
CLOCKS = {0x10, 0x4000_0010, 0x4000_0020}
APIC_ENABLE = 0xF1  # byte of the local APIC's registers; bit 0 enables it
VECTOR = 0x25  # of IRQ 5, as PIC sets it
COUNTING = b"\x66\xff\x06\x00\x20\xeb\xf9"  # inc dword [COUNTER], for ever
RINGING = COUNTING[:5] + outb(TICK, 1) + b"\xeb\xf3"  # the same, with a port written
BUSY = {"loop": COUNTING, "hlt": SLEEP, "port": RINGING}
# in al, 0x91; out TICK, al; for ever: a read that is lost or done twice shows.
ECHO = b"\xe4\x91\xe6\x90\xeb\xfa"


@pytest.fixture(scope="module")
def kvm_is_there() -> Iterator[None]:
    # The first VM switches a hook of the scheduler on, the last one off, by patching the
    # kernel. Done for every test, on several CPUs, that sooner or later crashed a kernel
    # under QEMU's emulator.
    with open_kvm() as system, system.create_vm():
        yield


@pytest.fixture
def event() -> Iterator[EventFd]:
    with EventFd.create() as fresh:
        yield fresh


def writes(pio: bool, length: int) -> tuple[bytes, list[bytes]]:
    """Return code that writes one value, another one and another length, and what it writes."""
    lengths = (length, length, 2 if length == 1 else 1)
    data = [
        bytes(first + at for at in range(size))
        for first, size in zip((17, 49, 81), lengths, strict=True)
    ]
    if pio:
        return b"".join(out(PORT, each) for each in data), data
    return LOAD_ES + b"".join(store(PORT & 0xFFF, each) for each in data), data


@pytest.mark.parametrize("matching", [False, True], ids=["any", "datamatch"])
@pytest.mark.parametrize(
    ("pio", "length"),
    [(True, 1), (True, 2), (True, 4), (False, 1), (False, 2), (False, 4), (False, 8)],
)
def test_only_what_matches_rings_a_doorbell(
    event: EventFd, pio: bool, length: int, matching: bool
) -> None:
    code, data = writes(pio, length)
    address = PORT if pio else MMIO + (PORT & 0xFFF)
    match = int.from_bytes(data[0], "little") if matching else None
    others = data[1:] if matching else data[2:]
    with Toy(code + FINISH) as toy:
        toy.vm.ioeventfd(event.fileno(), address, length=length, datamatch=match, pio=pio)
        toy.go()
        assert toy.until(DONE) == [(address, each) for each in others]
        assert event.drain() == len(data) - len(others)


@pytest.mark.parametrize("pio", [True, False], ids=["pio", "mmio"])
def test_a_doorbell_of_no_length_takes_any(event: EventFd, pio: bool) -> None:
    code, data = writes(pio, 4)
    address = PORT if pio else MMIO + (PORT & 0xFFF)
    with Toy(code + FINISH) as toy:
        toy.vm.ioeventfd(event.fileno(), address, pio=pio)
        toy.go()
        assert toy.until(DONE) == []
        assert event.drain() == len(data)


def test_a_doorbell_that_was_taken_away_exits_again(event: EventFd) -> None:
    with Toy(out(PORT, b"\1\2") + FINISH) as toy:
        toy.vm.ioeventfd(event.fileno(), PORT, length=2, datamatch=0x201, pio=True)
        toy.vm.ioeventfd(event.fileno(), PORT, length=2, datamatch=0x201, pio=True, assign=False)
        toy.go()
        assert toy.until(DONE) == [(PORT, b"\1\2")]
        assert event.drain() == 0


def test_refused_doorbells_are_explained(event: EventFd) -> None:
    with Toy() as toy, EventFd.create() as other:
        toy.vm.ioeventfd(event.fileno(), MMIO, length=2, datamatch=1)
        toy.vm.ioeventfd(other.fileno(), MMIO, length=2, datamatch=2)
        for length, datamatch in ((2, 1), (2, None), (0, None)):
            with pytest.raises(FileExistsError, match=r"address 0xd0000.*another ioeventfd"):
                toy.vm.ioeventfd(other.fileno(), MMIO, length=length, datamatch=datamatch)
        for length, datamatch in ((3, None), (16, None), (0, 1)):
            with pytest.raises(KernelError, match=r"the length is 1, 2, 4 or 8 bytes") as refused:
                toy.vm.ioeventfd(other.fileno(), MMIO + 64, length=length, datamatch=datamatch)
            assert refused.value.errno == errno.EINVAL
        with pytest.raises(FileNotFoundError, match="no such ioeventfd"):
            toy.vm.ioeventfd(other.fileno(), MMIO + 64, length=2, assign=False)


def test_refused_irqfds_slots_and_chips_are_explained(event: EventFd) -> None:
    with Toy() as toy, open_kvm() as system, system.create_vm() as bare:
        toy.vm.irqfd(event.fileno(), GSI)
        with pytest.raises(KernelError, match="raises an interrupt already"):
            toy.vm.irqfd(event.fileno(), GSI)
        with pytest.raises(KernelError, match="irqchips that are made before"):
            bare.irqfd(event.fileno(), GSI)
        with pytest.raises(FileExistsError, match=r"slot 1, 0x1000\+0x1000.*overlaps"):
            toy.vm.set_memory(1, 0x1000, 0x1000, toy.memory.hva)
        with pytest.raises(FileExistsError, match="has its irqchips"):
            toy.vm.create_irqchip()
        with pytest.raises(FileExistsError, match=r"vCPU 0.*index of its own"):
            toy.vm.create_vcpu(0)


def test_an_eventfd_interrupts_the_guest(event: EventFd) -> None:
    with Toy(PIC + FINISH[:-2] + SLEEP) as toy:
        toy.handler(VECTOR, outb(TICK, 0x77) + EOI)
        toy.vm.irqfd(event.fileno(), GSI)
        toy.go()
        toy.until(DONE)
        for _ in range(3):
            event.signal()
            assert toy.next() == (TICK, b"\x77")
        toy.vm.irqfd(event.fileno(), GSI, assign=False)
        event.signal()  # nobody's now: it waits, and comes with the next irqfd
        event_seen = event.wait(0)
        toy.vm.irqfd(event.fileno(), GSI)
        assert event_seen
        assert toy.next() == (TICK, b"\x77")
        toy.vm.irq_line(GSI, True)
        toy.vm.irq_line(GSI, False)
        assert toy.next() == (TICK, b"\x77")


def test_a_level_comes_again_until_its_source_is_quiet(event: EventFd) -> None:
    with Toy(PIC + LEVEL_5 + FINISH[:-2] + SLEEP) as toy, EventFd.create() as resample:
        toy.handler(VECTOR, outb(TICK, 0x77) + EOI)
        toy.vm.irqfd(event.fileno(), GSI, resample_fd=resample.fileno())
        toy.go()
        toy.until(DONE)
        event.signal()
        for again in (True, True, True, False):
            assert toy.next() == (TICK, b"\x77")
            assert resample.wait(PATIENCE)
            resample.drain()
            if again:
                event.signal()
        assert not resample.wait(0.2)
        assert toy.is_quiet()


def test_messages_interrupt_the_guest(event: EventFd) -> None:
    # Neither vector is ended with an EOI, so each comes once, and 0x71 within 0x51.
    with Toy(FINISH[:-2] + SLEEP) as toy:
        toy.handler(0x51, outb(TICK, 0x51))
        toy.handler(0x71, outb(TICK, 0x71))
        lapic = toy.vcpus[0].lapic()
        lapic.regs[APIC_ENABLE] |= 1
        toy.vcpus[0].set_lapic(lapic)
        route = kvm.kvm_irq_routing_entry(gsi=24, type=kvm.KVM_IRQ_ROUTING_MSI)
        route.u.msi = kvm.kvm_irq_routing_msi(address_lo=0xFEE00000, data=0x51)
        toy.vm.set_gsi_routing([route])
        toy.vm.irqfd(event.fileno(), 24)
        toy.go()
        toy.until(DONE)
        event.signal()
        assert toy.next() == (TICK, b"\x51")
        assert toy.vm.signal_msi(0xFEE00000, 0x71) == 1
        assert toy.next() == (TICK, b"\x71")
        assert toy.vm.signal_msi(0xFEE70000, 0x71) == 0  # no such APIC


@pytest.mark.parametrize("code", BUSY.values(), ids=BUSY.keys())
def test_pause_and_resume(code: bytes) -> None:
    with Toy(code) as toy:
        thread = toy.go()
        for turn in range(TIMES):
            if code is not SLEEP:
                toy.wait_for_progress()
            if turn % 2:
                thread.pause()
            else:
                with toy.lock:  # a model or the loop may hold it
                    thread.pause()
            paused = toy.count()
            regs = toy.vcpus[0].regs()
            assert bytes(toy.vcpus[0].regs()) == bytes(regs)
            assert toy.count() == paused
            thread.resume()
        thread.pause()
        thread.pause()


@pytest.mark.parametrize("code", BUSY.values(), ids=BUSY.keys())
def test_stop(code: bytes) -> None:
    with Toy(code) as toy:
        for turn in range(TIMES):
            thread = toy.thread()
            thread.resume()
            if turn % 2 and code is not SLEEP:
                toy.wait_for_progress()
            thread.stop()
            thread.stop()
            with pytest.raises(StateError, match="vCPU 0 was stopped"):
                thread.resume()
        assert toy.ends.empty()


def test_a_model_may_pause_the_vcpu_that_called_it() -> None:
    with Toy(RINGING) as toy:
        thread = toy.thread()
        toy.port.on_write = thread.pause
        for turn in range(1, 20):
            thread.resume()
            assert toy.next() == (TICK, b"\1")
            thread.pause()
            assert toy.count() == turn
            assert toy.is_quiet()


def test_what_a_model_raises_is_handed_on() -> None:
    def fail() -> None:
        raise ZeroDivisionError("a model's mistake")

    with Toy(RINGING) as toy:
        toy.port.on_write = fail
        thread = toy.go()
        end = toy.ends.get(timeout=PATIENCE)
        assert end.index == 0
        assert isinstance(end.cause, ZeroDivisionError)
        thread.pause()
        thread.stop()


def test_a_guest_that_kvm_gives_up_on_ends() -> None:
    with Toy(b"\xea\x00\x00\x00\xd0") as toy:  # jmp to where there is no memory
        toy.go()
        end = toy.ends.get(timeout=PATIENCE)
        assert isinstance(end.cause, Failure)
        assert end.cause.reason.startswith("an instruction that KVM cannot emulate")


def test_string_io_reaches_the_models_piece_by_piece() -> None:
    # mov si, code; mov dx, TICK; mov cx, 4; rep outsb
    code = b"\xbe\x00\x10\xba\x90\x00\xb9\x04\x00\xfc\xf3\x6e"
    with Toy(code + FINISH) as toy:
        toy.go()
        assert toy.until(DONE) == [(TICK, bytes([each])) for each in code[:4]]


def test_a_vm_goes_on_in_another(event: EventFd) -> None:
    """Nothing that the guest reads or writes is lost or done twice, wherever it was paused."""
    code = PIC + b"\xfb" + ECHO
    with Toy(code, cpus=2) as first:
        first.handler(VECTOR, outb(TICK + 1, 0x77) + EOI)
        first.vcpus[1].set_mp_state(kvm.KVM_MP_STATE_HALTED)
        lapic = first.vcpus[0].lapic()
        lapic.regs[APIC_ENABLE] |= 1
        first.vcpus[0].set_lapic(lapic)
        threads = [first.thread(0), first.thread(1)]
        within = threading.Event()

        def pause_within_a_read() -> None:
            if first.port.reads == 100:
                threads[0].pause()
                within.set()

        first.port.on_read = pause_within_a_read
        for thread in threads:
            thread.resume()
        assert within.wait(PATIENCE)
        for thread in threads:
            thread.stop()
        state = cpustate.save(first.kvm, first.vm, first.vcpus)
        seen = first.drain()
        assert len(seen) == 99
        reads = first.port.reads
        packed = msgspec.json.encode(state)
        with Toy(cpus=2, memory=first.memory.fileno()) as second:
            cpustate.restore(
                msgspec.json.decode(packed, type=cpustate.KvmState), second.vm, second.vcpus
            )
            again = cpustate.save(second.kvm, second.vm, second.vcpus)
            before, after = settled(state), settled(again)
            assert [name for name in before if before[name] != after[name]] == []
            assert state.clock <= again.clock < state.clock + PATIENCE * 1e9
            second.port.reads = reads
            second.go()
            seen += [second.next() for _ in range(100)]
            second.vm.irqfd(event.fileno(), GSI)
            event.signal()
            while (access := second.next()) != (TICK + 1, b"\x77"):
                seen.append(access)
    assert len(seen) >= 199
    assert seen == [(TICK, bytes([at & 0xFF])) for at in range(1, len(seen) + 1)]


def test_every_part_of_a_state_is_taken_over() -> None:
    with Toy() as first, Toy() as second:
        vcpu = first.vcpus[0]
        leaves = list(vcpu.cpuid().entries)
        leaves[0].edx ^= 1  # a letter of the vendor's name
        vcpu.set_cpuid(kvm.kvm_cpuid2_table(leaves))
        parts = {"cpuid", "xsave", "debugregs", "msrs", "events"}
        if xsave_works():  # or it is hidden, and XCR0 has one value
            parts.add("xcrs")
            xcrs = vcpu.xcrs()
            xcrs.xcrs[0].value = 3
            vcpu.set_xcrs(xcrs)
        area = bytearray(vcpu.xsave())
        area[160:164] = b"xmm0"
        area[512] |= 2  # XSTATE_BV: SSE is there
        vcpu.set_xsave(bytes(area))
        debugregs = vcpu.debugregs()
        debugregs.db[1] = 0x1234
        vcpu.set_debugregs(debugregs)
        registers = {0x174: 0x18, 0x2FF: 0xC06, 0x200: 0x6, 0x250: 0x0606, 0x400: (1 << 64) - 1}
        vcpu.set_msrs(registers)  # SYSENTER, memory types, machine checks
        events = vcpu.events()
        events.nmi[2] = 1  # masked
        vcpu.set_events(events)
        pit = first.vm.pit()
        pit.channels[6] = 0x4321  # the count of channel 2
        first.vm.set_pit(pit)
        state = cpustate.save(first.kvm, first.vm, first.vcpus)
        cpu = state.cpus[0]
        assert cpu.xsave[160:164] == b"xmm0"
        assert {index: cpu.msrs[index] for index in registers} == registers
        blank, before = settled(cpustate.save(second.kvm, second.vm, second.vcpus)), settled(state)
        changed = {name for name in before if before[name] != blank[name]}
        assert changed == {"pit"} | {f"0 {part}" for part in parts}
        cpustate.restore(state, second.vm, second.vcpus)
        after = settled(cpustate.save(second.kvm, second.vm, second.vcpus))
        assert [name for name in before if before[name] != after[name]] == []


def settled(state: cpustate.KvmState) -> dict[str, object]:
    """Return the parts of a state in which time does not show."""
    parts: dict[str, object] = {f"irqchip {chip}": data for chip, data in state.irqchips.items()}
    parts["pit"] = [state.pit[at : at + 16] for at in (0, 24, 48)]  # times follow each
    for cpu in state.cpus:
        for name, part in msgspec.structs.asdict(cpu).items():
            parts[f"{cpu.index} {name}"] = part
        parts[f"{cpu.index} msrs"] = {
            index: at for index, at in cpu.msrs.items() if index not in CLOCKS
        }
    return parts


def test_a_state_for_other_vcpus_is_refused() -> None:
    with Toy(cpus=2) as two, Toy() as one:
        state = cpustate.save(two.kvm, two.vm, two.vcpus)
        with pytest.raises(InvalidArgument, match="1 vCPUs for the state of 2"):
            cpustate.restore(state, one.vm, one.vcpus)
        short = msgspec.structs.replace(state.cpus[0], regs=b"\0")
        with pytest.raises(InvalidArgument, match="1 bytes are no struct kvm_regs"):
            cpustate.restore_cpu(short, one.vcpus[0])
        wrong = msgspec.structs.replace(state.cpus[0], msrs={0xC0FFEE: 1})
        with pytest.raises(KernelError, match=r"vCPU 0 MSR 0xc0ffee = 0x1"):
            cpustate.restore_cpu(wrong, one.vcpus[0])
