"""A tap's queues, as the kernel's tun driver has them."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.system.conftest import until
from vhostctl.abi import tun
from vhostctl.errors import KernelError
from vhostctl.host.links import Links, exists
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap, TapQueue

pytestmark = pytest.mark.usefixtures("nothing_left")

SYS_BPF, BPF_PROG_LOAD, BPF_PROG_TYPE_SOCKET_FILTER = 321, 5, 1  # of x86-64; linux/bpf.h
FRAME = bytes.fromhex("020000000001 020000000002 88b5") + bytes(46)


@pytest.fixture
def tap(namespace: NetNamespace) -> Iterator[Tap]:
    with namespace.run(lambda: Tap.open("tap0", 2)) as opened:
        yield opened


def load_steering(queue: int) -> int:
    """Load a program that always answers `queue`; return its descriptor."""
    code = struct.pack("<BBhi", 0xB7, 0, 0, queue) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    program, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attributes = ctypes.create_string_buffer(
        struct.pack(
            "<IIQQ",
            BPF_PROG_TYPE_SOCKET_FILTER,
            len(code) // 8,
            ctypes.addressof(program),
            ctypes.addressof(licence),
        ),
        128,
    )
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(SYS_BPF, BPF_PROG_LOAD, attributes, len(attributes))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def up(namespace: NetNamespace) -> socket.socket:
    """Set tap0 up; return a socket that sends frames to it."""

    def prepare() -> socket.socket:
        with Links() as links:
            links.change("tap0", state="up")
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sender.bind(("tap0", 0))
        return sender

    return namespace.run(prepare)


def received(queue: TapQueue) -> int:
    """Take everything from `queue`; return how many were ours."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            count += queue.read(2048).endswith(FRAME)
    return count


def test_a_program_chooses_the_queue(namespace: NetNamespace, tap: Tap) -> None:
    with up(namespace) as sender:
        for chosen in (1, 0):
            program = load_steering(chosen)
            tap.queues[1].set_steering(program)
            os.close(program)  # the tap keeps it
            for _ in range(8):
                sender.send(FRAME)
            assert received(tap.queues[chosen]) == 8
            assert received(tap.queues[1 - chosen]) == 0
        tap.queues[0].set_steering(None)
        for _ in range(8):
            sender.send(FRAME)
        assert sum(map(received, tap.queues)) == 8
    with pytest.raises(KernelError, match="TUNSETSTEERINGEBPF on tap0 queue 0"):
        tap.queues[0].set_steering(tap.queues[0].fileno())


def test_a_disabled_queue_carries_nothing(namespace: NetNamespace, tap: Tap) -> None:
    first, second = tap.queues
    program = load_steering(1)
    first.set_steering(program)
    os.close(program)
    with up(namespace) as sender:
        sender.send(FRAME)
        second.disable()
        assert second.flags() & tun.IFF_DETACH_QUEUE
        assert not first.flags() & tun.IFF_DETACH_QUEUE
        sender.send(FRAME)
        assert received(first) == 1
        with pytest.raises(KernelError, match="TUNSETQUEUE on tap0 queue 1"):
            second.disable()
        second.enable()
        assert not second.flags() & tun.IFF_DETACH_QUEUE
        assert received(second) == 0
        sender.send(FRAME)
        assert received(second) == 1
        with pytest.raises(KernelError, match="TUNSETQUEUE on tap0 queue 1"):
            second.enable()


def test_a_single_queue_cannot_be_disabled(namespace: NetNamespace) -> None:
    with (
        namespace.run(lambda: Tap.open("tap0")) as tap,
        pytest.raises(KernelError, match="TUNSETQUEUE"),
    ):
        tap.queues[0].disable()


def test_a_persistent_tap_stays(namespace: NetNamespace, tap: Tap) -> None:
    tap.queues[0].set_persist(True)
    assert tap.queues[1].flags() & tun.IFF_PERSIST
    tap.close()
    assert namespace.run(lambda: exists("tap0"))
    with namespace.run(lambda: Tap.open("tap0", 2)) as again:
        assert not again.created
        again.queues[0].set_persist(False)
        assert not again.queues[0].flags() & tun.IFF_PERSIST
    until(lambda: not namespace.run(lambda: exists("tap0")), "no tap0")


def test_header_fields_are_little_endian_or_native(tap: Tap) -> None:
    for little in (True, False):
        tap.queues[0].set_vnet_le(little)
        assert tap.queues[1]._get(tun.TUNGETVNETLE) == little
