"""Calls masked and unmasked against a device that signals at any moment, and eventfds."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostctl.control.notifiers import CallNotifier
from vhostctl.errors import ClosedError, InvalidArgument, KernelError, kernel_error
from vhostctl.host.eventfd import EventFd
from vhostctl.host.vhost import TX

STEPS = ["event", "mask", "unmask", "bind", "read"]


class Device:
    """Signals what is bound; `around` is called before and after each binding."""

    def __init__(self) -> None:
        self.bound: int | None = None
        self.ring: int | None = None
        self.requests = 0
        self.around: Callable[[], None] = lambda: None
        self.refuses = False
        self.events = 0
        self.owed = False  # the guest did not hear of the last one

    def set_vring_call(self, queue: int, eventfd: int | None) -> None:
        self.requests += 1
        self.around()
        if self.refuses:
            raise kernel_error(errno.EPERM, "VHOST_SET_VRING_CALL", "device")
        self.ring, self.bound = queue, eventfd
        self.around()

    def event(self) -> None:
        if self.bound is not None:
            os.eventfd_write(self.bound, 1)
            self.events += 1
            self.owed = True


class Guest:
    """A notifier, the device it is told to and the guest's eventfd."""

    def __init__(self) -> None:
        self.device = Device()
        self.call = EventFd.create("call")
        self.notifier = CallNotifier(self.device, TX, self.call, "queue 1")

    def close(self) -> None:
        self.notifier.close()
        self.call.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_the_guests_eventfd_is_bound_unless_masked(guest: Guest) -> None:
    guest.notifier.bind()
    assert (guest.device.ring, guest.device.bound) == (TX, guest.call.fileno())
    guest.notifier.mask()
    assert guest.device.bound not in (None, guest.call.fileno())
    guest.notifier.unmask()
    assert guest.device.bound == guest.call.fileno()


@pytest.mark.parametrize("pending", [False, True])
def test_what_came_while_another_had_it_masked_is_not_lost(guest: Guest, pending: bool) -> None:
    guest.notifier.mask(pending=pending)
    guest.notifier.bind()
    assert guest.notifier.pending is pending
    guest.notifier.unmask()
    assert guest.call.drain() == pending


@pytest.mark.parametrize("events", [0, 1, 1000])
def test_what_came_while_masked_is_one_event(guest: Guest, events: int) -> None:
    guest.notifier.bind()
    guest.notifier.mask()
    for _ in range(events):
        guest.device.event()
    assert guest.call.drain() == 0
    assert guest.notifier.pending is (events > 0)
    assert guest.notifier.pending is (events > 0)  # to ask takes nothing away
    guest.notifier.unmask()
    assert guest.call.drain() == (events > 0)
    assert not guest.notifier.pending


def test_twice_is_once(guest: Guest) -> None:
    guest.notifier.bind()
    for change, masked in ((guest.notifier.mask, True), (guest.notifier.unmask, False)):
        change()
        guest.device.event()
        before = guest.device.requests
        change()
        assert guest.device.requests == before
        assert guest.notifier.masked is masked
    assert guest.call.drain() == 2  # the masked one, and the one behind it


def test_a_mask_before_the_device_is_bound_holds_from_the_start(guest: Guest) -> None:
    guest.notifier.mask()
    assert guest.device.requests == 0
    guest.notifier.bind()
    guest.device.event()
    assert guest.call.drain() == 0
    guest.notifier.unmask()
    assert guest.call.drain() == 1


def test_unmasked_again_before_bind_nobody_was_told(guest: Guest) -> None:
    guest.notifier.mask()
    guest.notifier.unmask()
    assert guest.device.requests == 0
    guest.notifier.bind()
    assert guest.device.bound == guest.call.fileno()


def test_a_new_start_keeps_the_mask_and_what_is_pending(guest: Guest) -> None:
    guest.notifier.bind()
    guest.notifier.mask()
    guest.device.event()
    guest.device.bound = None  # as a reset leaves it
    guest.notifier.bind()
    assert guest.notifier.pending
    guest.notifier.unmask()
    assert guest.call.drain() == 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_refusal_changes_nothing(guest: Guest, masked: bool) -> None:
    guest.notifier.bind()
    if masked:
        guest.notifier.mask()
        guest.device.event()
    guest.device.refuses = True
    with pytest.raises(KernelError):
        (guest.notifier.unmask if masked else guest.notifier.mask)()
    assert guest.notifier.masked is masked
    guest.device.refuses = False
    guest.notifier.mask()
    guest.notifier.unmask()
    assert guest.call.drain() == masked


def test_close_leaves_the_guests_eventfd_open(guest: Guest) -> None:
    guest.notifier.bind()
    guest.notifier.close()
    guest.notifier.close()
    guest.call.signal()
    with pytest.raises(ClosedError):
        guest.notifier.mask()
    assert not guest.notifier.masked


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=40), st.booleans())
def test_nothing_is_lost_whatever_the_order(steps: list[str], amid: bool) -> None:
    """With `amid` an event comes before and after each change of the binding too."""
    guest = Guest()
    if amid:
        guest.device.around = guest.device.event
    heard = 0
    try:
        guest.notifier.bind()
        for step in [*steps, "unmask"]:
            if step == "event":
                guest.device.event()
            elif step == "read":
                signals = guest.call.drain()
                heard += signals
                if signals and not guest.notifier.pending:
                    guest.device.owed = False
            else:
                getattr(guest.notifier, step)()
            if not guest.notifier.masked:
                assert guest.call.wait(0) or not guest.device.owed
        assert heard + guest.call.drain() <= guest.device.events
        assert not guest.notifier.pending
    finally:
        guest.close()


def test_a_device_in_another_thread_is_always_heard(guest: Guest) -> None:
    """The guest takes one event for each frame, as a driver would; a lost one stalls it."""
    rounds = 2000
    lock = threading.Lock()  # the ring's, which both a signal and a binding take
    change = guest.device.set_vring_call

    def locked(queue: int, eventfd: int | None) -> None:
        with lock:
            change(queue, eventfd)

    guest.device.set_vring_call = locked  # type: ignore[method-assign]
    guest.notifier.bind()
    ready = EventFd.create("ready")
    deaf: list[int] = []

    def hear() -> None:
        for number in range(rounds):
            with lock:
                guest.device.event()
            if not guest.call.wait(20):
                deaf.append(number)
                return
            guest.call.drain()
        ready.signal()

    listener = threading.Thread(target=hear)
    listener.start()
    deadline = time.monotonic() + 60
    while listener.is_alive() and time.monotonic() < deadline:
        guest.notifier.mask()
        guest.notifier.unmask()
    listener.join(30)
    assert (deaf, ready.drain()) == ([], 1)
    ready.close()


def test_an_adopted_eventfd_keeps_its_flags_and_never_makes_us_wait() -> None:
    theirs = os.eventfd(0, 0)
    event = EventFd.adopt(theirs, "handed in")
    assert os.get_blocking(theirs)
    assert event.drain() == 0
    os.eventfd_write(theirs, 3)
    event.signal()
    assert (event.drain(), event.drain()) == (4, 0)
    event.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(theirs)


def test_what_is_no_eventfd_is_named_and_left_alone() -> None:
    read, write = os.pipe()
    with pytest.raises(InvalidArgument, match=rf"call: descriptor {read} is pipe:.*; hand in"):
        EventFd.adopt(read, "call")
    os.close(read)
    os.close(write)
    for number in (read, -1):
        with pytest.raises(InvalidArgument, match=f"descriptor {number} is not open"):
            EventFd.adopt(number)


def test_wait_leaves_the_counter_as_it_is() -> None:
    with EventFd.create() as event:
        assert not event.wait(0)
        assert not event.wait(0.001)
        event.signal(7)
        assert event.wait()
        assert event.drain() == 7
