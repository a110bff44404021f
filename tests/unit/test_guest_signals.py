"""Kicks and calls: as many as the suppression rules ask for, and none that is waited for lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.guest_device import EVENT_IDX, VERSION_1, Bench, Ring, bench, need_event
from vhostctl.errors import InvalidArgument, KernelError

FRAME = b"x" * 60
MODES = [VERSION_1, VERSION_1 | EVENT_IDX]


def calls(ring: Ring) -> int:
    try:
        return os.eventfd_read(ring.place.call)
    except BlockingIOError:
        return 0


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([0, 65530]),
    batches=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=30),
)
def test_kicks_follow_the_event_index(base: int, batches: list[tuple[int, bool]]) -> None:
    with bench(VERSION_1 | EVENT_IDX, 16, base=base) as b:
        tx = b.device.tx
        # The device's wish before it first ran: anything from the base on.
        event = base
        for count, goes_idle in batches:
            old = tx.avail_idx
            queued = b.pair.send([FRAME] * count)
            expected = queued > 0 and need_event(event, (old + queued) & 0xFFFF, old)
            assert tx.kicks() == expected
            b.device.transmitted()
            if goes_idle:
                tx.want_kicks(True)
                event = tx.last_avail


def test_kicks_follow_the_flag() -> None:
    with bench() as b:
        tx = b.device.tx
        for wanted in (True, False, False, True, True):
            tx.want_kicks(wanted)
            b.pair.send([FRAME] * 5)
            assert tx.kicks() == wanted
        assert b.pair.stats().tx_kicks == 3


@pytest.mark.parametrize("features", MODES)
def test_one_batch_is_one_kick(features: int) -> None:
    with bench(features) as b:
        assert b.pair.send([FRAME] * 256) == 256
        assert b.device.tx.kicks() == 1
        assert len(b.device.transmitted()) == 256


@pytest.mark.parametrize("features", MODES)
def test_receive_buffers_are_posted_in_one_batch(features: int) -> None:
    with bench(features) as b:
        b.pair.start()
        assert b.device.rx.kicks() == 1
        for _ in range(256):
            assert b.device.deliver(FRAME)
        b.device.rx.want_kicks(True)
        assert len(b.pair.receive(256)) == 256
        # receive() copies out and posts 64 at a time. Only the event index tells a device
        # that is awake already from one that sleeps.
        assert b.device.rx.kicks() == (1 if features & EVENT_IDX else 4)


@pytest.mark.parametrize("features", MODES)
def test_a_driver_that_does_not_wait_is_not_interrupted(features: int) -> None:
    with bench(features, base=65400) as b:
        b.pair.start()
        for _ in range(3000):
            b.pair.send([FRAME])
            b.device.transmitted()
            b.device.deliver(FRAME)
            b.pair.receive()
        assert b.device.tx.calls == 0
        assert b.device.rx.calls == 0


@pytest.mark.parametrize("features", MODES)
def test_a_wait_asks_for_an_interrupt_and_withdraws_the_wish(features: int) -> None:
    with bench(features) as b:
        b.pair.start()
        assert not b.pair.wait(0.001)
        b.device.deliver(FRAME)
        assert calls(b.device.rx) == 0
        assert b.pair.wait(0)
        assert b.pair.receive() == [FRAME]
        assert not b.pair.wait(0)


def wait_beside(b: Bench, act: Callable[[], object], *, transmit: bool = False) -> bool:
    """Wait while another thread acts once the wish for an interrupt can be seen."""
    ring = b.device.tx if transmit else b.device.rx
    idle = (ring.avail_flags, ring.used_event if ring.event_idx else 0)

    def act_when_armed() -> None:
        deadline = time.monotonic() + 10
        while (ring.avail_flags, ring.used_event if ring.event_idx else 0) == idle:
            assert time.monotonic() < deadline, "the driver never asked"
        act()

    thread = threading.Thread(target=act_when_armed)
    thread.start()
    try:
        return b.pair.wait(10, receive=not transmit, transmit=transmit)
    finally:
        thread.join()


@pytest.mark.parametrize("features", MODES)
def test_a_frame_wakes_who_waits_for_it_once(features: int) -> None:
    with bench(features, base=65530) as b:
        b.pair.start()
        for lap in range(1, 12):
            assert wait_beside(b, lambda: b.device.deliver(FRAME))
            assert b.pair.receive() == [FRAME]
            b.device.deliver(FRAME)
            b.pair.receive()
            assert b.device.rx.calls == lap
        assert b.pair.stats().rx_calls == 11


def test_with_the_event_index_three_quarters_of_the_ring_wake_a_sender() -> None:
    with bench(VERSION_1 | EVENT_IDX, 256) as b:
        assert b.pair.send([FRAME] * 300) == 256

        def use_until_interrupted() -> None:
            while not b.device.tx.calls:
                assert b.device.transmitted(1)

        assert wait_beside(b, use_until_interrupted, transmit=True)
        assert b.device.tx.used_idx == 192
        assert b.pair.send([FRAME] * 300) == 192
        b.device.transmitted()
        assert b.device.tx.calls == 1


@pytest.mark.parametrize("features", MODES)
def test_a_wait_for_room_ends_at_once_where_there_is_some(features: int) -> None:
    with bench(features, 4) as b:
        b.pair.start()
        assert b.pair.wait(0, receive=False, transmit=True)
        b.pair.send([FRAME] * 4)
        assert not b.pair.wait(0, receive=False, transmit=True)
        b.device.transmitted(1)
        assert b.pair.wait(0, receive=True, transmit=True)


@pytest.mark.parametrize("features", MODES)
def test_no_wake_up_is_lost_in_the_race_between_arming_and_using(features: int) -> None:
    """The device looks at the wish and the driver at the ring in any order, many times."""
    rounds = 3000
    with bench(features, 4, base=65000) as b:
        b.pair.start()

        def deliver_all() -> None:
            deadline = time.monotonic() + 60
            for _ in range(rounds):
                while not b.device.deliver(FRAME):
                    assert time.monotonic() < deadline

        thread = threading.Thread(target=deliver_all)
        thread.start()
        got = 0
        while got < rounds:
            assert b.pair.wait(10), f"slept through frame {got}"
            got += len(b.pair.receive())
        thread.join()
        assert got == rounds


def test_a_wait_for_nothing_is_refused() -> None:
    with bench() as b, pytest.raises(InvalidArgument):
        b.pair.wait(receive=False)


def test_a_dead_eventfd_is_an_error_and_no_busy_loop() -> None:
    with bench() as b:
        b.pair.start()
        spare = os.open(os.devnull, os.O_RDONLY)
        kept = os.dup(b.device.rx.place.call)
        os.close(b.device.rx.place.call)
        try:
            with pytest.raises(KernelError, match="EBADF"):
                b.pair.wait(1)
        finally:
            os.dup2(kept, b.device.rx.place.call)
            os.close(kept)
            os.close(spare)
