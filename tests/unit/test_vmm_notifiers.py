"""Who takes an event at present, and that none is lost when that changes."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from collections.abc import Iterator

import pytest

from vhostctl.errors import KernelError
from vhostctl.host.eventfd import EventFd
from vhostctl.vmm.loop import Loop
from vhostctl.vmm.notifiers import GuestNotifier, HostNotifier


class Kvm:
    """What KVM does with an eventfd: takes what waits, and has taken all when it lets go."""

    def __init__(self, call: EventFd) -> None:
        self.call = call
        self.gsis: dict[int, int] = {}
        self.raised: list[int] = []
        self.refuses = False

    def connect(self, event_fd: int, gsi: int) -> None:
        if self.refuses:
            raise KernelError(errno.EBUSY, "KVM_IRQFD", "vm")
        assert event_fd not in self.gsis
        self.gsis[event_fd] = gsi
        self.work()

    def disconnect(self, event_fd: int, gsi: int) -> None:
        assert self.gsis[event_fd] == gsi
        self.work()
        del self.gsis[event_fd]

    def work(self) -> None:
        for gsi in self.gsis.values():
            if self.call.drain():
                self.raised.append(gsi)


@pytest.fixture
def call() -> Iterator[EventFd]:
    with EventFd.create("call") as event:
        yield event


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop(threading.RLock()) as loop:
        yield loop


def test_what_comes_while_held_waits_for_whoever_is_next(call: EventFd) -> None:
    kvm, notifier = Kvm(call), GuestNotifier(call, "queue 0")
    assert (notifier.held, notifier.pending) == (True, False)
    call.signal(3)
    assert notifier.pending
    notifier.to_irqfd(kvm, 24)
    assert (notifier.held, notifier.pending) == (False, False)
    assert kvm.raised == [24]
    notifier.hold()
    assert (notifier.held, notifier.pending) == (True, False)
    call.signal()
    notifier.hold()
    assert notifier.pending
    notifier.to_irqfd(kvm, 25)
    assert kvm.raised == [24, 25]
    notifier.close()
    assert not kvm.gsis


def test_another_gsi_and_the_same(call: EventFd) -> None:
    kvm, notifier = Kvm(call), GuestNotifier(call, "queue 0")
    notifier.to_irqfd(kvm, 24)
    notifier.to_irqfd(kvm, 24)  # the fake would not take it twice
    notifier.to_irqfd(kvm, 25)
    assert kvm.gsis == {call.fileno(): 25}
    notifier.hold()
    notifier.to_irqfd(kvm, 25)
    assert kvm.gsis == {call.fileno(): 25}
    notifier.close()


def test_userspace_is_called_with_the_lock_and_no_more_once_held(call: EventFd) -> None:
    lock, seen = threading.RLock(), threading.Semaphore(0)
    notifier = GuestNotifier(call, "queue 0")
    with Loop(lock) as loop:
        call.signal()
        with lock:
            notifier.to_userspace(loop, seen.release)
        assert seen.acquire(timeout=10)
        call.signal()
        assert seen.acquire(timeout=10)
        with lock:
            call.signal()
            time.sleep(0.02)  # the loop has it in hand
            notifier.hold()
        assert notifier.pending
        assert not seen.acquire(timeout=0.02)
        with lock:
            notifier.to_userspace(loop, seen.release)
            notifier.to_userspace(loop, seen.release)
        assert seen.acquire(timeout=10)
        notifier.close()
    assert not notifier.pending


def test_a_refusal_leaves_it_held_and_the_event_waiting(call: EventFd, loop: Loop) -> None:
    kvm, notifier = Kvm(call), GuestNotifier(call, "queue 0")
    kvm.refuses = True
    call.signal()
    with pytest.raises(KernelError):
        notifier.to_irqfd(kvm, 24)
    assert notifier.pending
    loop.watch(call.fileno(), lambda: None)
    with pytest.raises(ValueError, match="watched already"):
        notifier.to_userspace(loop, lambda: None)
    assert notifier.pending
    loop.unwatch(call.fileno())


def test_no_event_is_lost_while_who_takes_it_changes(call: EventFd) -> None:
    """Against the fake: the shape of it. tests/system/test_kvm_notifiers.py asks KVM itself."""
    lock, random_ = threading.RLock(), random.Random(6)  # noqa: S311 -- to be repeated
    kvm, notifier = Kvm(call), GuestNotifier(call, "queue 0")
    handled = [0]
    stop = threading.Event()

    def handler() -> None:
        handled[0] += 1

    with Loop(lock) as loop:

        def flip() -> None:
            while not stop.is_set():
                way = random_.randrange(3)
                with lock:
                    if way == 0:
                        notifier.hold()
                    elif way == 1:
                        notifier.to_irqfd(kvm, 24)
                    else:
                        notifier.to_userspace(loop, handler)
                    kvm.work()

        flipper = threading.Thread(target=flip)
        flipper.start()
        try:
            for _ in range(300):
                with lock:
                    before = handled[0] + len(kvm.raised)
                call.signal()
                deadline = time.monotonic() + 20
                while handled[0] + len(kvm.raised) == before:
                    assert time.monotonic() < deadline, "an event is lost"
                    time.sleep(0)
        finally:
            stop.set()
            flipper.join()
            with contextlib.suppress(KernelError):
                notifier.close()


def test_a_kick_is_kvms_or_ours(call: EventFd) -> None:
    notified: list[int] = []
    for ioeventfd in (True, False):
        kicked = HostNotifier(call, lambda: notified.append(1), ioeventfd=ioeventfd)
        bell = kicked.doorbell(0xC010, 2, 3, pio=True)
        if ioeventfd:
            assert bell is not None
            assert (bell.event, bell.address, bell.length, bell.datamatch, bell.pio) == (
                *(call, 0xC010, 2, 3),
                True,
            )
        else:
            assert bell is None
        kicked.ring()
        assert (call.drain(), kicked.exits, notified) == (1, 1, [])
    plain = HostNotifier(None, lambda: notified.append(1))
    assert plain.doorbell(0xC010) is None
    plain.ring()
    assert (plain.exits, notified) == (0, [1])
