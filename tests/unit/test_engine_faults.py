"""Faults: those on guest memory that is gone are the ring's, all others their owner's."""

from __future__ import annotations

import ctypes
import errno
import mmap
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhostctl.engine
from vhostctl.abi import vhost
from vhostctl.engine.device import Engine

MAP_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
PAGE = mmap.PAGESIZE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture
def pages() -> Iterator[int]:
    """Two pages, the second of which cannot be touched."""
    address = libc.mmap(None, 2 * PAGE, 3, MAP_PRIVATE_ANONYMOUS, -1, 0)
    assert libc.mprotect(address + PAGE, PAGE, 0) == 0
    yield address
    libc.munmap(address, 2 * PAGE)


def refusal(engine: Engine, address: int) -> int:
    try:
        engine.ioctl(vhost.VHOST_GET_FEATURES, address)
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("short", range(1, 9))
def test_a_write_over_the_end_is_refused(pages: int, short: int) -> None:
    with Engine("engine") as engine:
        assert refusal(engine, pages + PAGE - 8) == 0
        assert refusal(engine, pages + PAGE - 8 + short) == errno.EFAULT


def test_memory_that_can_only_be_read(pages: int) -> None:
    libc.mprotect(pages, PAGE, mmap.PROT_READ)
    with Engine("engine") as engine:
        assert refusal(engine, pages) == errno.EFAULT


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    with Engine("engine") as engine, open(f"{tmp_path}/memory", "w+b") as file:
        file.truncate(PAGE)
        with mmap.mmap(file.fileno(), PAGE) as memory:
            anchor = ctypes.c_char.from_buffer(memory)
            address = ctypes.addressof(anchor)
            del anchor
            assert refusal(engine, address) == 0
            file.truncate(0)
            assert refusal(engine, address) == errno.EFAULT


# The child runs on the engine that this process has, wherever that was built.
PRELUDE = f"""
import ctypes, faulthandler, os, signal, sys
import vhostctl.engine
vhostctl.engine.__path__[:] = {list(vhostctl.engine.__path__)}
from vhostctl.abi import vhost
from vhostctl.engine.device import Engine
def survives(engine):
    try:
        engine.ioctl(vhost.VHOST_GET_FEATURES, 8)
    except OSError:
        return True
"""


def crash(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    program = PRELUDE + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_fault_elsewhere_ends_the_process() -> None:
    done = crash(
        """
        with Engine("engine") as engine:
            assert survives(engine)
            ctypes.string_at(8)
        """
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr


@pytest.mark.parametrize("when", ["before", "after"])
def test_faulthandler_still_reports(when: str) -> None:
    """Whoever came first, Python's report is printed and the process ends by the signal."""
    done = crash(
        f"""
        if {when == "before"}:
            faulthandler.enable()
        with Engine("engine") as engine:
            if {when == "after"}:
                faulthandler.enable()
            else:
                assert survives(engine)
            ctypes.string_at(8)
        """
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_the_next_engine_installs_the_handler_anew() -> None:
    done = crash(
        """
        with Engine("engine") as engine:
            faulthandler.enable()
            with Engine("another") as another:
                assert survives(engine) and survives(another)
                ctypes.string_at(8)
        """
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1


def test_a_signal_that_was_sent_is_no_fault() -> None:
    done = crash(
        """
        signal.signal(signal.SIGSEGV, signal.SIG_IGN)
        with Engine("engine") as engine:
            os.kill(os.getpid(), signal.SIGSEGV)
            assert survives(engine)
        """
    )
    assert done.returncode == 0, done.stderr
    done = crash(
        """
        with Engine("engine") as engine:
            os.kill(os.getpid(), signal.SIGSEGV)
        """
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr


def test_a_handler_of_python_runs() -> None:
    done = crash(
        """
        seen = []
        signal.signal(signal.SIGBUS, lambda *_: seen.append(1))
        with Engine("engine") as engine:
            os.kill(os.getpid(), signal.SIGBUS)
            assert seen == [1]
        """
    )
    assert done.returncode == 0, done.stderr
