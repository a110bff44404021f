"""The loops that run without the interpreter: they end, they count, and they lose nothing."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

from tests.support.guest_device import (
    DEADLINE,
    EVENT_IDX,
    MRG_RXBUF,
    VERSION_1,
    Bench,
    bench,
)
from vhostctl.errors import ClosedError, InvalidArgument, StateError
from vhostctl.guest.driver import RingError, native
from vhostctl.guest.pump import Loop, Sink, Transmitter
from vhostctl.guest.streams import default_pattern

PATTERN = default_pattern()
FRAME = PATTERN[:60]
MODES = [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | MRG_RXBUF | EVENT_IDX]
T = TypeVar("T")


@contextmanager
def running(loop: Loop, run: Callable[[], T]) -> Iterator[Future[T]]:
    """Run a loop in a thread and stop it at the end of the block."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        try:
            yield future
        finally:
            loop.stop()
            future.exception(DEADLINE)


def frames(count: int) -> list[bytes]:
    return [PATTERN[i : i + 60 + i % 1400] for i in range(count)]


@pytest.mark.parametrize("features", MODES)
@pytest.mark.parametrize("size", [1, 64, 256])
def test_transmitter_sends_so_many_and_returns_when_the_device_used_all(
    features: int, size: int
) -> None:
    with bench(features, size, base=65500) as b, Transmitter(b.pair, FRAME) as loop:
        b.pair.start()
        with running(loop, lambda: loop.run(1000)) as sent:
            assert b.device.expect(1000) == [FRAME] * 1000
            assert sent.result(DEADLINE) == 1000
        assert b.pair.stats().tx_completed == 1000
        assert b.pair.stats().tx_bytes == 60000


def test_transmitter_waits_for_the_last_frame_to_be_used() -> None:
    with bench(VERSION_1 | EVENT_IDX, 64) as b, Transmitter(b.pair, FRAME) as loop:
        tx = b.device.tx
        with running(loop, lambda: loop.run(10)) as sent:
            deadline = time.monotonic() + DEADLINE
            while tx.used_event != 9:
                assert time.monotonic() < deadline, "no interrupt for the last frame"
            assert not sent.done()
            b.device.transmitted()
            assert sent.result(DEADLINE) == 10
        assert tx.calls == 1


def test_transmitter_sleeps_through_most_of_a_ring() -> None:
    with bench(VERSION_1 | EVENT_IDX, 256) as b, Transmitter(b.pair, FRAME) as loop:
        with running(loop, lambda: loop.run(256 + 9 * 192)) as sent:
            # In batches of 64, as vhost-net uses them.
            assert len(b.device.expect(256 + 9 * 192)) == 256 + 9 * 192
            sent.result(DEADLINE)
        # One interrupt for each 192 frames, one at the end, and what the race adds.
        assert b.device.tx.calls <= 9 + 1 + 3


def test_transmitter_without_a_count_runs_until_stopped() -> None:
    with bench() as b, Transmitter(b.pair, FRAME) as loop, running(loop, loop.run) as sent:
        assert len(b.device.expect(600)) == 600
        loop.stop()
        assert sent.result(DEADLINE) >= 600


@pytest.mark.parametrize("features", MODES)
def test_sink_counts_and_recycles(features: int) -> None:
    with bench(features, 16, base=65530) as b, Sink(b.pair) as loop:
        b.pair.start()
        with running(loop, lambda: loop.run(500)) as taken:
            b.device.feed(frames(500))
            assert taken.result(DEADLINE) == 500
        assert b.pair.stats().rx_frames == 500
        assert b.pair.stats().rx_bytes == sum(map(len, frames(500)))
        assert b.pair.stats().rx_posted == 16


# Seconds of this thread's own CPU time, for the machine may stand still for longer; with half
# a CPU still less than the slice after which a missed frame would be found anyway.
PROMPT = 0.2


def sunk(b: Bench, count: int) -> None:
    """Return once `count` frames were received, which has to be soon."""
    deadline = time.thread_time() + PROMPT
    while b.pair.stats().rx_frames < count:
        assert time.thread_time() < deadline, "the sink sleeps beside a frame"


@pytest.mark.parametrize("features", MODES)
def test_sink_is_interrupted_once_for_many_frames_of_a_flow(features: int) -> None:
    with bench(features, base=65400) as b, Sink(b.pair) as loop:
        b.pair.start()
        with running(loop, loop.run):
            for count in range(1, 2001):
                b.device.feed([FRAME])
                # Slow enough for a sink that wants to see each by itself, and still a flow.
                pause = time.monotonic() + 0.0001
                while b.pair.stats().rx_frames < count and time.monotonic() < pause:
                    pass
            sunk(b, 2000)
        # On a machine that is busy a pause of the sender ends the flow now and then.
        assert b.device.rx.calls < 2000 / 2


@pytest.mark.parametrize("features", MODES)
@pytest.mark.parametrize("size", [1, 4, 64])
def test_sink_leaves_no_frame_at_the_end_of_a_flow(features: int, size: int) -> None:
    with bench(features, size) as b, Sink(b.pair) as loop:
        b.pair.start()
        with running(loop, loop.run):
            total = 0
            for burst in (*range(1, 40), 300):
                for count in (burst, 1):  # the single one comes after a pause of any length
                    b.device.feed([FRAME] * count)
                    total += count
                    sunk(b, total)


def test_a_stop_before_the_run_is_not_lost_and_ends_one_run() -> None:
    with bench() as b, Sink(b.pair) as loop:
        b.pair.start()
        loop.stop()
        assert loop.run() == 0
        assert b.device.deliver(FRAME)
        assert loop.run(1) == 1


def test_a_signal_handler_gets_its_turn() -> None:
    class Alarm(Exception):
        pass

    def ring(_number: int, _frame: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with bench() as b, Sink(b.pair) as loop:
            b.pair.start()
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(Alarm):
                loop.run()
            b.device.deliver(FRAME)
            assert loop.run(1) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_sleep_ends_often_enough_for_a_signal_that_came_just_before_it() -> None:
    with bench() as b, b.pair.rx.claim() as rx:
        assert native.lib.pump_sink(rx, -1, 1) == -errno.EINTR


def test_a_run_holds_its_queue_and_leaves_the_other() -> None:
    with bench() as b, Sink(b.pair) as loop:
        b.pair.start()
        with running(loop, loop.run):
            b.device.feed([FRAME])
            while not b.pair.stats().rx_frames:
                pass
            for use in (b.pair.receive, b.driver.close, b.pair.start):
                with pytest.raises(StateError):
                    use()
            assert b.pair.send([FRAME]) == 1
        assert b.pair.receive() == []


def test_a_fault_ends_the_run_with_an_error() -> None:
    with bench() as b, Sink(b.pair) as loop:
        b.pair.start()
        with running(loop, loop.run) as taken:
            b.device.rx.push([(0, 1 << 20)])
            os.eventfd_write(b.device.rx.place.call, 1)
            with pytest.raises(RingError, match="rx queue"):
                taken.result(DEADLINE)


def test_closed_drivers_and_bad_frames_are_refused() -> None:
    with bench() as b:
        with pytest.raises(InvalidArgument):
            Transmitter(b.pair, b"")
        with pytest.raises(InvalidArgument):
            Transmitter(b.pair, bytes(1519))
        with Sink(b.pair) as loop:
            b.driver.close()
            with pytest.raises(ClosedError):
                loop.run()
