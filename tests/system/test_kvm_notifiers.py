"""Guest notifiers and transactions, asked of KVM itself."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import pytest

from tests.support.realmode import open_kvm
from tests.system.conftest import until
from vhostctl.abi.kvm import KVM_IRQCHIP_PIC_MASTER
from vhostctl.control.addressspace import AddressSpace, MemoryListener, VhostMemory
from vhostctl.errors import KernelError, VhostctlError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.kvm import Vm
from vhostctl.host.memory import BorrowedRegion, MappedRegion
from vhostctl.host.vcpu import Vcpu
from vhostctl.host.vhost import Region, VhostNet
from vhostctl.vmm.doorbells import Doorbell, Doorbells
from vhostctl.vmm.interrupts import Interrupts, Msi
from vhostctl.vmm.loop import Loop
from vhostctl.vmm.memory import KvmMemory
from vhostctl.vmm.notifiers import GuestNotifier

EVENTS = 10_000
PAGE = 4096

pytestmark = pytest.mark.usefixtures("nothing_left")

PIN = 5
VECTOR = 0x61
_SPURIOUS = 0x0F0  # local APIC: spurious-interrupt vector register, bit 8 is "enabled"
_REQUESTS = 0x200  # local APIC: interrupt request registers, 32 vectors each, 16 bytes apart
_PIC_LEVELS, _PIC_REQUESTS = 0, 1  # struct kvm_pic_state: last_irr, irr


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def vm(stack: ExitStack) -> Vm:
    machine = stack.enter_context(stack.enter_context(open_kvm()).create_vm())
    machine.create_irqchip()
    return machine


class Sink(Protocol):
    """An interrupt of the guest, seen where KVM keeps it until a processor takes it."""

    gsi: int

    def raised(self) -> bool: ...

    def clear(self) -> None: ...

    def inject(self) -> None:
        """What userspace does for an event."""


class Pin:
    """An edge-triggered pin of the PIC."""

    def __init__(self, vm: Vm, interrupts: Interrupts) -> None:
        self.gsi = PIN
        self._vm = vm
        self._interrupts = interrupts

    def raised(self) -> bool:
        return bool(self._vm.irqchip(KVM_IRQCHIP_PIC_MASTER).chip[_PIC_REQUESTS] & 1 << PIN)

    def clear(self) -> None:
        state = self._vm.irqchip(KVM_IRQCHIP_PIC_MASTER)
        # The level too: it may be about to fall, and written back high it would stay so.
        for register in (_PIC_LEVELS, _PIC_REQUESTS):
            state.chip[register] &= ~(1 << PIN)
        self._vm.set_irqchip(state)

    def inject(self) -> None:
        self._interrupts.line(PIN, True)
        self._interrupts.line(PIN, False)


class Message:
    """A message to the local APIC of a vCPU that never runs."""

    def __init__(self, vcpu: Vcpu, interrupts: Interrupts) -> None:
        self._vcpu = vcpu
        self._interrupts = interrupts
        self._msi = Msi(0xFEE00000, VECTOR)
        self.gsi = interrupts.allocate()
        interrupts.route(self.gsi, self._msi)
        lapic = vcpu.lapic()
        lapic.regs[_SPURIOUS + 1] |= 1
        vcpu.set_lapic(lapic)

    def raised(self) -> bool:
        at = _REQUESTS + VECTOR // 32 * 16 + VECTOR % 32 // 8
        return bool(self._vcpu.lapic().regs[at] & 1 << VECTOR % 8)

    def clear(self) -> None:
        lapic = self._vcpu.lapic()
        lapic.regs[_REQUESTS + VECTOR // 32 * 16 + VECTOR % 32 // 8] = 0
        self._vcpu.set_lapic(lapic)

    def inject(self) -> None:
        assert self._interrupts.signal(self._msi)


@pytest.fixture(params=["message", "pin"])
def sink(request: pytest.FixtureRequest, stack: ExitStack, vm: Vm) -> tuple[Sink, Interrupts]:
    interrupts = Interrupts(vm)
    if request.param == "pin":
        return Pin(vm, interrupts), interrupts
    return Message(stack.enter_context(vm.create_vcpu(0)), interrupts), interrupts


def wait_for(sink: Sink, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not sink.raised():
        assert time.monotonic() < deadline, f"no interrupt within {seconds} s: {what}"
        time.sleep(0)


@contextmanager
def flipping(notifier: GuestNotifier, sink: Sink, interrupts: Interrupts) -> Iterator[list[int]]:
    """Hold it, give it to KVM and to ourselves, at random; yields how often each was done."""
    chance = random.Random(6)  # noqa: S311 -- to be repeated
    lock, stop, failures = threading.RLock(), threading.Event(), list[BaseException]()
    done = [0, 0, 0]

    def flip() -> None:
        while not stop.is_set():
            way = chance.randrange(3)
            with lock:
                if way == 0:
                    notifier.hold()
                elif way == 1:
                    notifier.to_irqfd(interrupts, sink.gsi)
                else:
                    notifier.to_userspace(loop, sink.inject)
            done[way] += 1
            if not chance.randrange(3):
                time.sleep(chance.random() / 1000)  # or few events would come between two flips

    with Loop(lock, failures.append) as loop:
        flipper = threading.Thread(target=flip)
        flipper.start()
        try:
            yield done
        finally:
            stop.set()
            flipper.join()
            notifier.close()
    assert not failures


def test_each_event_is_followed_by_an_interrupt(
    stack: ExitStack, sink: tuple[Sink, Interrupts]
) -> None:
    """10,000 events, whoever takes them at the moment; and none that nobody signalled."""
    chip, interrupts = sink
    call = stack.enter_context(EventFd.create("call"))
    notifier = GuestNotifier(call, "queue 0")
    with flipping(notifier, chip, interrupts) as done:
        for number in range(EVENTS):
            assert not chip.raised(), f"an interrupt more than events after {number}"
            call.signal()
            wait_for(chip, f"event {number}, after {done} changes")
            chip.clear()
        flips = sum(done)
        until(lambda: sum(done) >= flips + 50, "changes behind the last event")
        assert not chip.raised()
    assert min(done) > EVENTS // 100
    assert 0 < interrupts.raised < EVENTS


def test_pending_is_true_to_the_facts(stack: ExitStack, sink: tuple[Sink, Interrupts]) -> None:
    """What KVM was given is not there any more when it is held again."""
    chip, interrupts = sink
    call = stack.enter_context(EventFd.create("call"))
    notifier = GuestNotifier(call, "queue 0")
    for while_held, while_connected in ((1, 0), (3, 0), (0, 1), (2, 2), (0, 0)):
        for _ in range(while_held):
            call.signal()
        assert notifier.pending == bool(while_held)
        notifier.to_irqfd(interrupts, chip.gsi)
        if while_held:
            wait_for(chip, "it waited")
            chip.clear()
        for _ in range(while_connected):
            call.signal()
            wait_for(chip, "it came")
            chip.clear()
        notifier.hold()
        assert not notifier.pending
        assert not chip.raised()
    call.signal()
    notifier.to_irqfd(interrupts, chip.gsi)
    notifier.hold()  # at once: the interrupt is there when this returns
    assert chip.raised()
    assert not notifier.pending
    assert interrupts.raised == 0


def test_one_eventfd_has_one_irqfd(stack: ExitStack, vm: Vm) -> None:
    call = stack.enter_context(EventFd.create("call"))
    interrupts = Interrupts(vm)
    first, second = GuestNotifier(call, "queue 0"), GuestNotifier(call, "queue 1")
    first.to_irqfd(interrupts, PIN)
    with pytest.raises(KernelError, match=r"KVM_IRQFD .*EBUSY"):
        second.to_irqfd(interrupts, PIN)
    assert second.held
    first.close()
    second.to_irqfd(interrupts, PIN)
    second.close()


def test_a_message_to_nobody_is_no_error(stack: ExitStack, vm: Vm) -> None:
    stack.enter_context(vm.create_vcpu(0))
    interrupts = Interrupts(vm)
    chance = random.Random(7)  # noqa: S311 -- to be repeated
    gsi = interrupts.allocate()
    for _ in range(500):
        message = Msi(chance.randrange(1 << 64) & ~3, chance.randrange(1 << 32))
        interrupts.signal(message)
        interrupts.route(gsi, message)
        interrupts.signal(Msi(0xFEE00000 | message.address & 0xFFFFC, message.data))
    assert interrupts.raised == 1000


class Vhost:
    """A vhost device, and the table that it took last."""

    def __init__(self, device: VhostNet) -> None:
        self._device = device
        self.table: tuple[Region, ...] = ()

    def set_mem_table(self, regions: Iterable[Region]) -> None:
        table = tuple(regions)
        self._device.set_mem_table(table)
        self.table = table


class Guest:
    """Memory, doorbells and a vhost device, in one transaction."""

    def __init__(self, stack: ExitStack, vm: Vm, device: str, order: str) -> None:
        self.vm = vm
        self.low = stack.enter_context(MappedRegion.memfd(0, 4 * PAGE, "low"))
        self.high = stack.enter_context(MappedRegion.memfd(16 * PAGE, 4 * PAGE, "high"))
        self.events = [stack.enter_context(EventFd.create()) for _ in range(3)]
        vhost = stack.enter_context(VhostNet.at(device))
        vhost.set_owner()
        self.vhost = Vhost(vhost)
        self.space = AddressSpace([self.low], limit=1000)
        listeners: dict[str, MemoryListener] = {
            "kvm": KvmMemory(vm),
            "vhost": VhostMemory([self.vhost]),
        }
        for name in order.split():
            if name == "bells":
                self.doorbells = Doorbells(vm, self.space)
            else:
                self.space.register(listeners[name])
        self.doorbells.set("a", [Doorbell(self.events[0], 0xE0000000, 2)])

    def has_memory(self, region: Region) -> bool:
        """Whether KVM has a slot there: it takes no other that overlaps."""
        probe = 500
        try:
            self.vm.set_memory(probe, region.gpa, PAGE, region.hva)
        except FileExistsError:
            return True
        self.vm.set_memory(probe, region.gpa, 0, region.hva)
        return False

    def has_doorbell(self, address: int) -> bool:
        """Whether KVM has one there: it takes no other at the same place."""
        event = self.events[2].fileno()
        try:
            self.vm.ioeventfd(event, address, length=2)
        except FileExistsError:
            return True
        self.vm.ioeventfd(event, address, length=2, assign=False)
        return False

    def state(self) -> tuple[object, ...]:
        return (
            [self.has_memory(self.low), self.has_memory(self.high)],
            [self.has_doorbell(0xE0000000), self.has_doorbell(0xE0001000)],
            self.vhost.table,
            self.space.table.regions,
        )

    def change(self, *more: Region, bells: Iterable[Doorbell] = ()) -> None:
        with self.space.transaction():
            self.space.remove("low")
            self.space.add(self.high)
            for region in more:
                self.space.add(region)
            self.doorbells.set("a", [Doorbell(self.events[0], 0xE0001000, 2)])
            self.doorbells.set("b", bells)


@pytest.mark.parametrize("order", ["kvm vhost bells", "bells kvm vhost", "vhost bells kvm"])
def test_memory_vhost_and_doorbells_are_one_transaction(
    stack: ExitStack, vm: Vm, device: str, order: str
) -> None:
    """Each of the three refuses in turn, and all are as they were."""
    guest = Guest(stack, vm, device, order)
    before = guest.state()
    assert before[:2] == ([True, False], [True, False])
    huge = BorrowedRegion(1 << 40, 1 << 43, 1 << 40)  # KVM: at most 2^31 - 1 pages
    many = [BorrowedRegion((100 + 2 * at) * PAGE, PAGE, guest.high.hva) for at in range(65)]
    stopped: list[tuple[str, tuple[Region, ...], list[Doorbell]]] = [
        ("KVM_SET_USER_MEMORY_REGION.*EINVAL", (huge,), []),
        ("KVM_IOEVENTFD.*EINVAL", (), [Doorbell(guest.events[1], 0xE0002000, 3)]),
        ("KVM_IOEVENTFD.*EEXIST", (), [Doorbell(guest.events[1], 0xE0001000, 2)]),
    ]
    if device == "engine":  # a node's limit is its module's
        stopped.append(("VHOST_SET_MEM_TABLE.*E2BIG", tuple(many), []))
    for message, regions, bells in stopped:
        with pytest.raises(VhostctlError, match=message) as failure:
            guest.change(*regions, bells=bells)
        assert not hasattr(failure.value, "__notes__")
        assert guest.state() == before
    guest.change(bells=[Doorbell(guest.events[1], 0xE0002000, 4)])
    assert guest.state()[:2] == ([False, True], [False, True])
    guest.doorbells.close()


def test_kvm_says_how_many_slots_it_has(vm: Vm) -> None:
    memory = KvmMemory(vm)
    many = min(memory._limit, 500)  # today's KVM takes 32764
    assert many >= 32
    with MappedRegion.anonymous(0, PAGE) as page:
        space = AddressSpace(limit=many)
        space.register(memory)
        with space.transaction():
            for at in range(many):
                space.add(BorrowedRegion(2 * at * PAGE, PAGE, page.hva, f"page {at}"))
        assert len(memory.slots) == many
        with space.transaction():
            for at in range(0, many, 2):
                space.remove(f"page {at}")
        assert len(memory.slots) == many // 2
    with pytest.raises(KernelError, match="EINVAL"):
        vm.set_memory(memory._limit, 1 << 40, PAGE, page.hva)
