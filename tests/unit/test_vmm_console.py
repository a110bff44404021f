"""A guest's serial port on a terminal, and the terminal afterwards."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostctl.errors import ClosedError
from vhostctl.vmm.console import Console, Output
from vhostctl.vmm.loop import Loop
from vhostctl.vmm.serial import Serial

PATIENCE = 30.0


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    for fd in (master, slave):
        try:
            os.close(fd)
        except OSError:
            continue  # a test closed it


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop(threading.RLock()) as loop:
        yield loop


class Guest:
    """What was typed for it, and whether it was left."""

    def __init__(self) -> None:
        self.port = Serial(lambda _: None, print)
        self.left = threading.Event()

    @property
    def got(self) -> bytes:
        return self.port.state().received

    def console(self, fd: int, loop: Loop) -> Console:
        return Console(fd, loop, self.port, self.left.set)


def test_what_is_typed_arrives_and_the_terminal_is_as_before(
    terminal: tuple[int, int], loop: Loop
) -> None:
    master, slave = terminal
    before, guest = termios.tcgetattr(slave), Guest()
    with guest.console(slave, loop):
        assert termios.tcgetattr(slave) != before
        os.write(master, b"a\x03\x01\x01b\x01")
        os.write(master, b"x")
        assert guest.left.wait(PATIENCE)
    assert guest.got == b"a\x03\x01b"
    assert termios.tcgetattr(slave) == before


def test_a_terminal_that_cannot_be_watched_is_as_before(
    terminal: tuple[int, int], loop: Loop
) -> None:
    _, slave = terminal
    before = termios.tcgetattr(slave)
    loop.stop()
    with pytest.raises(ClosedError):
        Guest().console(slave, loop)
    assert termios.tcgetattr(slave) == before


def test_a_terminal_that_hung_up_is_no_matter(terminal: tuple[int, int], loop: Loop) -> None:
    master, slave = terminal
    with Guest().console(slave, loop):
        os.close(master)


INTERRUPTED = """
import sys, threading
from vhostctl.vmm.console import Console
from vhostctl.vmm.loop import Loop
from vhostctl.vmm.serial import Serial

console = Console(0, Loop(threading.RLock()), Serial(print, print), print)
sys.exit(7)  # a signal, before anybody could enter the block that closes it
"""


def test_a_signal_ahead_of_the_block_leaves_the_terminal_sane(terminal: tuple[int, int]) -> None:
    _, slave = terminal
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED]
    ended = subprocess.run(command, stdin=slave, timeout=PATIENCE, check=False)
    assert ended.returncode == 7
    assert termios.tcgetattr(slave) == before


def test_a_pipe_that_ends_is_not_asked_again(loop: Loop) -> None:
    reader, writer = os.pipe()
    guest = Guest()
    with guest.console(reader, loop):
        os.write(writer, b"text")
        os.close(writer)
        deadline = time.monotonic() + PATIENCE
        while reader in loop._watched:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert guest.got == b"text"
    os.close(reader)


def test_what_the_guest_does_not_read_waits_in_the_pipe(loop: Loop) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    guest = Guest()
    sent = received = b""

    def send_all_that_fits() -> None:
        """Until nothing is taken for a while."""
        nonlocal sent
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                part = bytes([len(sent) >> 12 & 0x7F | 0x80]) * 4096
                sent += part[: os.write(writer, part)]
                deadline = time.monotonic() + 0.3

    with guest.console(reader, loop):
        for _ in range(3):
            send_all_that_fits()
            waiting = guest.port.waiting
            assert 1 << 16 <= waiting < 1 << 17
            with loop._lock:  # as a vCPU holds it
                received += b"".join(guest.port.read(0, 1) for _ in range(waiting))
        os.close(writer)
        deadline = time.monotonic() + PATIENCE
        while len(received) + guest.port.waiting < len(sent):
            assert time.monotonic() < deadline
            with loop._lock:
                received += b"".join(guest.port.read(0, 1) for _ in range(guest.port.waiting))
    assert received + guest.got == sent
    os.close(reader)


def test_what_epoll_does_not_take_is_not_read(tmp_path: Path, loop: Loop) -> None:
    (tmp_path / "file").write_bytes(b"text")
    for path in (tmp_path / "file", Path(os.devnull)):
        with path.open("rb") as file, Guest().console(file.fileno(), loop):
            pass


def test_a_reader_that_takes_nothing_costs_a_second_once() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    output = Output(writer)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            break
    began = time.monotonic()
    for _ in range(1000):
        output.write(b"lost")
    assert 0.5 < time.monotonic() - began < PATIENCE
    while len(os.read(reader, 1 << 20)) == 1 << 20:
        pass
    output.write(b"seen")
    assert os.read(reader, 4096).endswith(b"seen")
    os.close(reader)
    output.write(b"nobody is there")
    os.close(writer)
    output.write(b"nor are we")
