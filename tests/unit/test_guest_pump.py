"""The loops that run without the interpreter: they end, they count, and they lose nothing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
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
from vhostctl.errors import ClosedError, InvalidArgument, KernelError, StateError
from vhostctl.guest.driver import RingError, native
from vhostctl.guest.pump import Forwarder, Loop, Sink, Transmitter
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


class PlainForwarder(Forwarder):
    """Takes the file for a tap: read and writev, no socket calls."""

    def __init__(self, b: Bench, fd: int) -> None:
        super().__init__(b.pair, fd)
        with b.pair.rx.claim() as rx, b.pair.tx.claim() as tx:
            lib = native.lib
            self._forward = native.ffi.gc(
                lib.forward_create(rx, tx, self._stop.fileno(), fd, False), lib.forward_destroy
            )


@contextmanager
def forwarding(
    b: Bench, *, plain: bool = False, kind: int = socket.SOCK_SEQPACKET
) -> Iterator[tuple[Forwarder, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        theirs.setblocking(False)
        ours.settimeout(DEADLINE)
        with (
            PlainForwarder(b, theirs.fileno())
            if plain
            else Forwarder(b.pair, theirs.fileno()) as loop
        ):
            yield loop, ours


@pytest.mark.parametrize("plain", [False, True], ids=["socket", "file"])
@pytest.mark.parametrize("features", MODES)
def test_forwarder_moves_frames_both_ways_in_order(features: int, plain: bool) -> None:
    sent = frames(400)
    with bench(features, 32, buffer_size=256) as b, forwarding(b, plain=plain) as (loop, far):
        b.pair.start()
        with running(loop, loop.run):
            for start in range(0, 400, 20):
                b.device.feed(sent[start : start + 20])
                assert [far.recv(4096) for _ in range(20)] == sent[start : start + 20]
            writer = threading.Thread(target=lambda: [far.send(frame) for frame in sent])
            writer.start()
            assert b.device.expect(400) == sent
            writer.join()
        stats = loop.stats()
        assert (stats.to_file, stats.from_file, stats.dropped) == (400, 400, 0)


def test_forwarder_drops_what_neither_side_takes() -> None:
    with bench(size=64) as b, forwarding(b) as (loop, far):
        b.pair.start()
        with running(loop, loop.run):
            far.send(bytes(1519))
            far.send(FRAME)
            assert b.device.expect(1) == [FRAME]
        assert loop.stats().dropped == 1


def test_forwarder_drops_when_the_file_is_full_and_goes_on() -> None:
    with bench(size=64) as b, forwarding(b) as (loop, far):
        b.pair.start()
        with running(loop, loop.run):
            b.device.feed([bytes(1500)] * 1000)
            while sum((loop.stats().to_file, loop.stats().dropped)) < 1000:
                pass
            taken = loop.stats().to_file
            assert 0 < taken < 1000
            assert [len(far.recv(2048)) for _ in range(taken)] == [1500] * taken
            b.device.feed([FRAME])
            assert far.recv(2048) == FRAME


def test_forwarder_tells_of_a_file_that_is_gone() -> None:
    with bench() as b, forwarding(b) as (loop, far):
        b.pair.start()
        far.close()
        with running(loop, loop.run) as forwarding_run:
            b.device.feed([FRAME])
            with pytest.raises(KernelError, match="EPIPE"):
                forwarding_run.result(DEADLINE)


def test_forwarder_wants_a_file_that_does_not_block() -> None:
    with bench() as b:
        reader, writer = os.pipe()
        try:
            with pytest.raises(InvalidArgument, match="O_NONBLOCK"):
                Forwarder(b.pair, reader)
        finally:
            os.close(reader)
            os.close(writer)
        with pytest.raises(KernelError, match="EBADF"):
            Forwarder(b.pair, reader)
