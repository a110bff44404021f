"""One thread, callbacks under the lock, and changes from anywhere."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vhostctl.errors import ClosedError, InvalidArgument, KernelError, StateError
from vhostctl.host.eventfd import EventFd
from vhostctl.vmm.loop import Loop


class Rig:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.errors: list[BaseException] = []
        self.loop = Loop(self.lock, self.errors.append, "test loop")
        self.log: list[str] = []

    def note(self, event: EventFd, name: str) -> Callable[[], None]:
        def callback() -> None:
            event.drain()
            self.log.append(name)

        return callback

    def settle(self) -> None:
        """Return when the loop has called all that was there."""
        for _ in range(2):  # the first may be of a round that had begun
            done = threading.Event()
            self.loop.call_soon(done.set)
            assert done.wait(10)


@pytest.fixture
def rig() -> Iterator[Rig]:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    rig = Rig()
    with rig.loop:
        yield rig
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert "test loop" not in [thread.name for thread in threading.enumerate()]
    assert not rig.errors


@pytest.fixture
def events() -> Iterator[list[EventFd]]:
    made = [EventFd.create() for _ in range(2)]
    yield made
    for event in made:
        event.close()


def test_a_readable_descriptor_calls_back_under_the_lock(rig: Rig, events: list[EventFd]) -> None:
    seen: list[tuple[str, bool]] = []

    def callback() -> None:
        events[0].drain()
        free: list[bool] = []

        def other() -> None:
            free.append(rig.lock.acquire(blocking=False))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        seen.append((threading.current_thread().name, free[0]))

    rig.loop.watch(events[0].fileno(), callback)
    events[0].signal()
    rig.settle()
    assert seen == [("test loop", False)]


def test_what_waits_before_it_is_watched_is_not_forgotten(rig: Rig, events: list[EventFd]) -> None:
    events[0].signal()
    rig.loop.watch(events[0].fileno(), rig.note(events[0], "early"))
    rig.settle()
    assert rig.log == ["early"]


def test_no_callback_while_somebody_has_the_lock(rig: Rig, events: list[EventFd]) -> None:
    rig.loop.watch(events[0].fileno(), rig.note(events[0], "late"))
    with rig.lock:
        events[0].signal()
        time.sleep(0.05)
        assert not rig.log
    rig.settle()
    assert rig.log == ["late"]


def test_unwatched_under_the_lock_is_never_called(rig: Rig, events: list[EventFd]) -> None:
    """The loop has the event in hand already, and waits for the lock."""
    rig.loop.watch(events[0].fileno(), rig.note(events[0], "gone"))
    with rig.lock:
        events[0].signal()
        time.sleep(0.05)
        rig.loop.unwatch(events[0].fileno())
    rig.settle()
    assert not rig.log
    rig.loop.unwatch(events[0].fileno())


def test_a_callback_may_unwatch_another_of_the_same_round(rig: Rig, events: list[EventFd]) -> None:
    def first_wins(mine: int) -> Callable[[], None]:
        def callback() -> None:
            events[mine].drain()
            rig.loop.unwatch(events[1 - mine].fileno())
            rig.log.append(str(mine))

        return callback

    with rig.lock:
        for number, event in enumerate(events):
            rig.loop.watch(event.fileno(), first_wins(number))
            event.signal()
    rig.settle()
    assert len(rig.log) == 1


def test_a_number_used_again_in_the_same_round_is_not_called_for_the_old_file(rig: Rig) -> None:
    """Reading a pipe that is empty would block the loop for ever."""
    old, new = os.pipe(), os.pipe()
    read: list[bytes] = []

    def callback() -> None:
        read.append(os.read(old[0], 1))

    rig.loop.watch(old[0], callback)
    with rig.lock:
        os.write(old[1], b"a")
        time.sleep(0.05)
        rig.loop.unwatch(old[0])
        os.dup2(new[0], old[0])
        rig.loop.watch(old[0], callback)
    rig.settle()
    assert not read
    os.write(new[1], b"b")
    rig.settle()
    assert read == [b"b"]
    rig.loop.unwatch(old[0])
    for fd in (*old, *new):
        os.close(fd)


def test_a_callback_may_watch_and_unwatch_itself(rig: Rig, events: list[EventFd]) -> None:
    def once() -> None:
        rig.loop.unwatch(events[0].fileno())
        rig.loop.watch(events[1].fileno(), rig.note(events[1], "second"))
        rig.log.append("first")

    rig.loop.watch(events[0].fileno(), once)
    events[0].signal()
    rig.settle()
    events[1].signal()
    rig.settle()
    assert rig.log == ["first", "second"]


def test_call_soon_keeps_the_order_and_runs_in_the_loop(rig: Rig) -> None:
    with rig.lock:
        for name in "abc":
            rig.loop.call_soon(lambda name=name: rig.log.append(name))  # type: ignore[misc]
        rig.loop.call_soon(lambda: rig.loop.call_soon(lambda: rig.log.append("d")))
        assert not rig.log
    rig.settle()
    assert rig.log == list("abcd")


def test_what_a_callback_raises_goes_to_on_error_and_the_loop_goes_on(
    rig: Rig, events: list[EventFd]
) -> None:
    def bad() -> None:
        events[0].drain()
        raise ZeroDivisionError

    rig.loop.watch(events[0].fileno(), bad)
    events[0].signal()
    rig.settle()
    rig.loop.call_soon(bad)
    rig.settle()
    assert [type(error) for error in rig.errors] == [ZeroDivisionError] * 2
    rig.errors.clear()


def test_without_on_error_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    with Loop(threading.RLock()) as loop, caplog.at_level(logging.ERROR):
        loop.call_soon(lambda: [][0])
        loop.call_soon(done.set)
        assert done.wait(10)
    assert "IndexError" in caplog.text


def test_refusals(rig: Rig, events: list[EventFd], tmp_path: Path) -> None:
    fd = events[0].fileno()
    rig.loop.watch(fd, rig.log.clear)
    with pytest.raises(InvalidArgument, match=f"descriptor {fd} is watched already"):
        rig.loop.watch(fd, rig.log.clear)
    with (tmp_path / "file").open("w") as file, pytest.raises(PermissionError, match="epoll_ctl"):
        rig.loop.watch(file.fileno(), rig.log.clear)
    with pytest.raises(KernelError, match="EBADF"):
        rig.loop.watch(99999, rig.log.clear)
    with pytest.raises(InvalidArgument):
        rig.loop.watch(fd, rig.log.clear)
    rig.loop.call_soon(rig.loop.stop)
    rig.settle()
    assert isinstance(rig.errors.pop(), StateError)


def test_stop_ends_it_for_good(events: list[EventFd]) -> None:
    called: list[int] = []
    loop = Loop(threading.RLock())
    loop.watch(events[0].fileno(), lambda: called.append(1))  # for ever: nobody drains
    events[0].signal()
    while not called:
        time.sleep(0.001)
    loop.stop()
    calls = len(called)
    time.sleep(0.02)
    assert len(called) == calls
    loop.stop()
    loop.call_soon(lambda: called.append(3))
    loop.unwatch(events[0].fileno())
    with pytest.raises(ClosedError):
        loop.watch(events[0].fileno(), lambda: None)
    assert len(called) == calls


def test_a_descriptor_that_was_closed_first_can_be_unwatched(rig: Rig) -> None:
    event = EventFd.create()
    fd = event.fileno()
    rig.loop.watch(fd, rig.log.clear)
    event.close()
    rig.loop.unwatch(fd)
    with EventFd.create() as again:
        assert again.fileno() == fd
        rig.loop.watch(fd, rig.note(again, "again"))
        again.signal()
        rig.settle()
        rig.loop.unwatch(fd)
    assert rig.log == ["again"]


def test_changes_from_many_threads(rig: Rig) -> None:
    """Each event of each thread is seen between its watch and unwatch, and none after."""
    failures: list[str] = []

    def worker() -> None:
        with EventFd.create() as event:
            for turn in range(100):
                seen = threading.Event()

                def callback(seen: threading.Event = seen) -> None:
                    event.drain()
                    seen.set()

                rig.loop.watch(event.fileno(), callback)
                event.signal()
                if not seen.wait(20):
                    failures.append(f"lost {turn}")
                rig.loop.unwatch(event.fileno())
                seen.clear()
                event.signal()
                if seen.wait(0.0005):
                    failures.append(f"called after unwatch {turn}")
                event.drain()

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
