"""Rings that let go of what they read ahead, on the hostile build; see hostile_cases.py."""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from contextlib import suppress

from tests.core.hostile_cases import GPA, HEADER, NUM, PATIENCE, RINGS, Bench, bench, wait
from vhostctl.conformance.ring import WRITE, Part, load
from vhostctl.engine.device import Engine
from vhostctl.errors import KernelError
from vhostctl.host.vhost import RX, TX

FRAMES = 3000


def frame(number: int) -> bytes:
    return b"%08d" % number + b"." * 40


def numbers(frames: list[bytes]) -> list[int]:
    return [int(one[:8]) for one in frames]


class Guest:
    """Posts receive buffers and takes what came, in order."""

    def __init__(self, b: Bench) -> None:
        self.b = b
        self.posted: list[Part] = []
        self.seen: list[bytes] = []

    def post(self, count: int) -> None:
        for _ in range(count):
            if self.b.free + 128 > GPA + self.b.region.size:
                self.b.free = GPA + RINGS
            self.posted.append(self.b.room(128, WRITE))
        self.b.offer(RX, *[[part] for part in self.posted[len(self.posted) - count :]])

    def take(self) -> int:
        ring = self.b.rings[RX]
        taken = ring.take()
        for used in taken:
            part = self.posted.pop(0)
            self.seen.append(load(self.b.hva(part.addr) + HEADER, used.len - HEADER))
        return len(taken)

    def has(self, count: int) -> bool:
        self.take()
        return len(self.seen) >= count


def drops(b: Bench) -> int:
    channel = b.device._channel
    assert isinstance(channel, Engine)
    return channel.stats(RX).drops


def read_ahead(b: Bench, count: int) -> None:
    """Let the ring, which has no buffers, read `count` frames."""
    b.device.set_backend(RX, None)
    for number in range(count):
        b.wire.send(frame(number))
    b.device.set_backend(RX, b.tap.fileno())
    b.settle()
    assert not readable(b)


def readable(b: Bench) -> bool:
    with suppress(BlockingIOError):
        b.tap.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return True
    return False


def let_go() -> None:
    """Of a settled ring's file another reader gets every later frame, and nothing twice."""
    with bench() as b:
        guest = Guest(b)
        read_ahead(b, 10)
        assert b.device.settle(TX) == 0
        assert b.device.settle(RX, timeout=0.01) == 10
        for number in range(10, 20):
            b.wire.send(frame(number))
        guest.post(4)
        wait(lambda: guest.has(4), "four frames")
        b.settle()
        assert b.device.settle(RX) == 6
        guest.post(11)
        assert b.device.settle(RX, timeout=5) == 0
        b.settle()
        guest.take()
        assert numbers(guest.seen) == list(range(10))
        b.device.set_backend(RX, None)
        assert b.device.settle(RX) == 0
        later = [b.tap.recv(100) for _ in range(10)]
        assert numbers(later) == list(range(10, 20))
        assert not readable(b)
        assert drops(b) == 0
        b.in_order()


def read_again() -> None:
    """A backend that is set ends it, be it the same file, and nothing is lost on the way."""
    for stop in (False, True):
        with bench() as b:
            guest = Guest(b)
            read_ahead(b, 3)
            assert b.device.settle(RX) == 3
            for number in range(3, 9):
                b.wire.send(frame(number))
            if stop:
                b.device.set_backend(RX, None)
                assert b.device.settle(RX) == 3
            b.device.set_backend(RX, b.tap.fileno())
            guest.post(9)
            wait(lambda: guest.has(9), "every frame")  # noqa: B023 - called at once
            assert numbers(guest.seen) == list(range(9))
            b.in_order()


def count_drops() -> None:
    """Frames that nobody can get any more are counted: at a reset, and for another file."""
    with bench() as b:
        read_ahead(b, 5)
        assert b.device.settle(RX) == 5
        b.device.set_backend(RX, None)
        assert drops(b) == 0
        b.device.reset_owner()
        assert drops(b) == 5
        refused = None
        try:
            b.device.settle(RX)
        except KernelError as error:
            refused = error.errno
        assert refused == errno.EPERM
        b.bring_up()
        read_ahead(b, 2)
        b.device.reset_owner()
        assert drops(b) == 7
        b.bring_up()
        b.in_order()


def hand_over_under_load() -> None:
    """Two readers of one file in turns, while frames come: each frame once and in order."""
    with bench() as b:
        guest = Guest(b)
        ended = threading.Event()

        def send() -> None:
            for number in range(FRAMES):
                while not ended.is_set():
                    with suppress(BlockingIOError):
                        b.wire.send(frame(number))
                        break
                    time.sleep(0)

        thread = threading.Thread(target=send)
        thread.start()
        seen: list[bytes] = []
        handed = 0
        try:
            guest.post(NUM // 2)
            end = time.monotonic() + 3 * PATIENCE
            while len(seen) + len(guest.seen) < FRAMES:
                assert time.monotonic() < end, f"{len(seen)} frames came"
                post_what_came(guest)
                if len(guest.seen) < 20:
                    continue
                while b.device.settle(RX):
                    post_what_came(guest)
                b.device.set_backend(RX, None)
                post_what_came(guest)
                seen += guest.seen
                guest.seen.clear()
                before = len(seen)
                with suppress(BlockingIOError):
                    while len(seen) < before + 20:
                        seen.append(b.tap.recv(100, socket.MSG_DONTWAIT))
                handed += len(seen) - before
                b.device.set_backend(RX, b.tap.fileno())
        finally:
            ended.set()
            thread.join()
        assert numbers(seen + guest.seen) == list(range(FRAMES))
        assert handed > FRAMES // 10
        assert drops(b) == 0


def post_what_came(guest: Guest) -> None:
    if count := guest.take():
        guest.post(count)


CASES = {case.__name__: case for case in (let_go, read_again, count_drops, hand_over_under_load)}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
    print("done")
