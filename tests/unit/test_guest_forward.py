"""The forwarder: frames between a queue pair and a file, with and without a header of their own."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import guest_packets as net
from tests.support.guest_device import DEADLINE, Bench, bench
from tests.unit.test_guest_pump import FRAME, MODES, PATTERN, frames, running
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.guest.driver import native
from vhostctl.guest.pump import Forwarder

NEEDS_CSUM, DATA_VALID = 1, 2


class PlainForwarder(Forwarder):
    """Takes the file for a tap: read and writev, no socket calls."""

    def __init__(self, b: Bench, fd: int, *, vnet_hdr: bool) -> None:
        super().__init__(b.pair, fd)
        with b.pair.rx.claim() as rx, b.pair.tx.claim() as tx:
            lib = native.lib
            self._forward = native.ffi.gc(
                lib.forward_create(rx, tx, self._stop.fileno(), fd, False, vnet_hdr),
                lib.forward_destroy,
            )


@contextmanager
def forwarding(
    b: Bench, *, plain: bool = False, vnet_hdr: bool = False
) -> Iterator[tuple[Forwarder, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        ours.settimeout(DEADLINE)
        with (
            PlainForwarder(b, theirs.fileno(), vnet_hdr=vnet_hdr)
            if plain
            else Forwarder(b.pair, theirs.fileno(), vnet_hdr=vnet_hdr) as loop
        ):
            yield loop, ours


@pytest.mark.parametrize("vnet_hdr", [False, True], ids=["bare", "vnet"])
@pytest.mark.parametrize("plain", [False, True], ids=["socket", "file"])
@pytest.mark.parametrize("features", MODES)
def test_forwarder_moves_frames_both_ways_in_order(
    features: int, plain: bool, vnet_hdr: bool
) -> None:
    sent = frames(400)
    header = bytes(10 if vnet_hdr else 0)
    outside = [header + frame for frame in sent]
    with (
        bench(features, 32, buffer_size=256) as b,
        forwarding(b, plain=plain, vnet_hdr=vnet_hdr) as (loop, far),
    ):
        b.pair.start()
        with running(loop, loop.run):
            for start in range(0, 400, 20):
                b.device.feed(sent[start : start + 20])
                assert [far.recv(4096) for _ in range(20)] == outside[start : start + 20]
            writer = threading.Thread(target=lambda: [far.send(frame) for frame in outside])
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


def behind(
    frame: bytes, *, flags: int = 0, gso_type: int = 0, start: int = 0, offset: int = 0
) -> bytes:
    """`frame` as a packet socket hands it over."""
    return struct.pack("=BBHHHH", flags, gso_type, 0, 0, start, offset) + frame


def partial(version: int, data: bytes) -> bytes:
    """A UDP frame whose sender left the checksum to the device."""
    frame = net.udp(version, data)
    at = 14 + (20 if version == 4 else 40)
    ends = (net.HOST4, net.IPV4) if version == 4 else (net.HOST6, net.IPV6)
    left = net.checksum(net.pseudo(*ends, net.UDP, len(frame) - at)) ^ 0xFFFF
    frame = frame[: at + 6] + left.to_bytes(2, "big") + frame[at + 8 :]
    return behind(frame, flags=NEEDS_CSUM, start=at, offset=6)


def summing_to_zero(version: int) -> bytes:
    """Data of a UDP datagram whose checksum comes out as 0."""
    at = 14 + (20 if version == 4 else 40)
    frame = net.udp(version, b"seed\0\0")
    return b"seed" + frame[at + 6 : at + 8]


@contextmanager
def switched() -> Iterator[tuple[Bench, Forwarder, socket.socket]]:
    """A running forwarder to a socket with headers."""
    with bench(size=64) as b, forwarding(b, vnet_hdr=True) as (loop, far):
        b.pair.start()
        with running(loop, loop.run):
            yield b, loop, far


@pytest.mark.parametrize("version", [4, 6])
def test_a_checksum_left_to_the_device_is_completed(version: int) -> None:
    payloads = [PATTERN[:size] for size in (0, 1, 2, 3, 18, 999, 1000, 1452)]
    payloads += [bytes(9), b"\xff" * 64, summing_to_zero(version)]
    with switched() as (b, loop, far):
        for data in payloads:
            far.send(partial(version, data))
        assert b.device.expect(len(payloads)) == [net.udp(version, data) for data in payloads]
        assert loop.stats().dropped == 0
    assert net.udp(version, payloads[-1])[-len(payloads[-1]) - 2 :].startswith(b"\xff\xff")


def test_a_checksum_that_is_there_is_left_alone() -> None:
    with switched() as (b, _, far):
        far.send(behind(FRAME, flags=DATA_VALID, start=14, offset=6))
        assert b.device.expect(1) == [FRAME]


def test_checksum_offsets_are_held_against_the_length() -> None:
    size = len(FRAME)
    bad = [(0, size - 1), (size - 1, 0), (size, 0), (size - 2, 1), (0, 0xFFFF), (0xFFFF, 0xFFFF)]
    with switched() as (b, loop, far):
        for start, offset in bad:
            far.send(behind(FRAME, flags=NEEDS_CSUM, start=start, offset=offset))
        far.send(behind(FRAME, flags=NEEDS_CSUM, start=size - 2, offset=0))
        last = bytes(byte ^ 0xFF for byte in FRAME[-2:])
        assert b.device.expect(1) == [FRAME[:-2] + last]
        assert loop.stats().dropped == len(bad)


def test_packets_still_to_be_cut_into_frames_are_dropped() -> None:
    kinds = [1, 3, 4, 5, 0x81]
    with switched() as (b, loop, far):
        for gso_type in kinds:
            far.send(behind(FRAME, gso_type=gso_type))
        far.send(behind(bytes(60000), flags=NEEDS_CSUM, gso_type=1, start=34, offset=16))
        far.send(behind(FRAME))
        assert b.device.expect(1) == [FRAME]
        assert loop.stats().dropped == len(kinds) + 1


def test_the_header_is_no_part_of_the_frames_length() -> None:
    with switched() as (b, loop, far):
        for length in (0, 1519):
            far.send(behind(bytes(length)))
        far.send(bytes(9))
        far.send(behind(bytes(1518)))
        assert b.device.expect(1) == [bytes(1518)]
        assert loop.stats().dropped == 3
