"""The patch between two queue pairs: every packet passes whole, with what is left to do to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import guest_packets as net
from tests.support.guest_device import (
    ANY_LAYOUT,
    DEADLINE,
    EVENT_IDX,
    INDIRECT,
    MRG_RXBUF,
    VERSION_1,
    Ring,
)
from tests.support.guest_offload import (
    CSUM,
    DATA_VALID,
    ECN,
    GUEST,
    GUEST_CSUM,
    HOST,
    HOST_TSO4,
    LONGEST,
    NEEDS_CSUM,
    TCPV4,
    TCPV6,
    UDP,
    UDP_L4,
    Header,
    OffloadDevice,
    Side,
    side,
)
from tests.unit.test_guest_forward import partial, summing_to_zero
from tests.unit.test_guest_pump import FRAME, PATTERN, running
from vhostctl.guest.patch import LaneStats, Patch

MODES = [
    VERSION_1 | MRG_RXBUF | INDIRECT | EVENT_IDX,
    VERSION_1 | MRG_RXBUF,
    VERSION_1 | INDIRECT,
    VERSION_1 | EVENT_IDX,
    MRG_RXBUF | EVENT_IDX,
    ANY_LAYOUT,
    0,
]
PARTIAL = Header(NEEDS_CSUM, csum_start=34, csum_offset=6)
PACKETS = [
    Header(NEEDS_CSUM, kind, hdr_len, size, start, offset)
    for kind, hdr_len, size, start, offset in (
        (TCPV4, 66, 1448, 34, 16),
        (TCPV4 | ECN, 54, 1, 34, 16),
        (TCPV6, 86, 1428, 54, 16),
        (TCPV6 | ECN, 86, 65535, 54, 16),
        (UDP, 42, 1480, 34, 6),
        (UDP_L4, 42, 1472, 34, 6),
        (TCPV4, 0, 536, 0, 0),
    )
]


@contextmanager
def patched(
    first: int = MODES[0] | GUEST | HOST,
    second: int = MODES[0] | GUEST | HOST,
    size: int = 64,
    **settings: int,
) -> Iterator[tuple[Side, Side, Patch]]:
    """Two sides of equal shape and a running patch between them."""
    with (
        side(first, size, **settings) as a,
        side(second, size, **settings) as b,
        Patch(a.bench.pair, b.bench.pair) as patch,
        running(patch, patch.run) as run,
    ):
        yield a, b, patch
        if run.done():
            run.result()


def cross(
    source: OffloadDevice, target: OffloadDevice, header: Header, frame: bytes
) -> tuple[Header, bytes]:
    """Send a packet across the patch; returns what the target got."""
    source.outgoing = header
    source.feed([frame])
    (got,) = target.expect(1)
    return target.headers.pop(), got


@pytest.mark.parametrize("second", MODES, ids=lambda bits: f"to-{bits:x}")
@pytest.mark.parametrize("first", MODES, ids=lambda bits: f"{bits:x}")
def test_packets_pass_whole_with_their_headers_both_ways(first: int, second: int) -> None:
    lengths = [100, 4084, 4085, 8192, LONGEST - 1, LONGEST]
    with patched(first | GUEST | HOST, second | GUEST | HOST) as (a, b, patch):
        for number, header in enumerate([Header(), PARTIAL, *PACKETS]):
            frame = PATTERN[number : number + lengths[number % len(lengths)]]
            assert cross(a.device, b.device, header, frame) == (header, frame)
            assert cross(b.device, a.device, header, frame) == (header, frame)
        stats = patch.stats()
        assert stats.forth == stats.back
        assert stats.forth.frames == 2 + len(PACKETS)
        assert stats.forth.gso == len(PACKETS)
        assert stats.forth.greatest == LONGEST
        assert stats.forth.completed == stats.forth.malformed == stats.forth.refused == 0


@settings(max_examples=40, deadline=None)
@given(
    first=st.sampled_from(MODES),
    second=st.sampled_from(MODES),
    buffers=st.tuples(st.sampled_from([256, 1536, 16384]), st.sampled_from([320, 2048, 65600])),
    packets=st.lists(
        st.tuples(st.booleans(), st.integers(0, len(PACKETS) - 1), st.integers(100, 9000)),
        min_size=1,
        max_size=150,
    ),
)
def test_packets_stay_in_order_however_they_are_cut(
    first: int, second: int, buffers: tuple[int, int], packets: list[tuple[bool, int, int]]
) -> None:
    with (
        side(first | GUEST | HOST, 64, buffer_size=buffers[0], max_frame=9000) as a,
        side(second | GUEST | HOST, 64, buffer_size=buffers[1], max_frame=9000) as b,
        Patch(a.bench.pair, b.bench.pair) as patch,
        running(patch, patch.run),
    ):
        ways = {True: (a.device, b.device), False: (b.device, a.device)}
        sent: dict[bool, list[tuple[Header, bytes]]] = {True: [], False: []}
        got: dict[bool, list[bytes]] = {True: [], False: []}
        for number, (way, kind, length) in enumerate(packets):
            source, target = ways[way]
            source.outgoing, frame = PACKETS[kind], PATTERN[number * 7 :][:length]
            while not source.deliver(frame):
                got[way] += target.transmitted(3)
            sent[way].append((PACKETS[kind], frame))
        for way, (_, target) in ways.items():
            got[way] += target.expect(len(sent[way]) - len(got[way]))
            assert list(zip(target.headers, got[way], strict=True)) == sent[way]


@pytest.mark.parametrize(
    "header",
    [
        Header(DATA_VALID),
        Header(DATA_VALID, csum_start=34, csum_offset=6),
        Header(0, 0, 77, 1448, 34, 16),
        Header(0x54),
    ],
)
def test_what_a_header_says_to_the_receiver_only_is_not_sent(header: Header) -> None:
    with patched() as (a, b, _):
        assert cross(a.device, b.device, header, FRAME) == (Header(), FRAME)


@pytest.mark.parametrize(
    "more", [{"hdr_len": 9999, "gso_size": 9}, {"flags": 0xFF}], ids=["sizes", "flags"]
)
def test_only_what_a_driver_may_say_of_a_checksum_is_sent(more: dict[str, int]) -> None:
    with patched() as (a, b, _):
        assert cross(a.device, b.device, replace(PARTIAL, **more), FRAME) == (PARTIAL, FRAME)


@pytest.mark.parametrize("features", [MODES[0], MODES[1], MODES[3]], ids=hex)
def test_frames_wait_where_the_other_side_has_no_room(features: int) -> None:
    header, frames = PACKETS[0], [PATTERN[i : i + 60000] for i in range(100)]
    with patched(features | GUEST | HOST, features | GUEST | HOST) as (a, b, patch):
        a.device.outgoing = header
        delivered = stuck = 0
        deadline = time.monotonic() + DEADLINE
        while stuck < 100:
            assert time.monotonic() < deadline
            if delivered < len(frames) and a.device.deliver(frames[delivered]):
                delivered, stuck = delivered + 1, 0
            else:
                time.sleep(0.001)
                stuck += 1
        assert delivered < len(frames)
        waiting = patch.stats().forth.frames
        assert waiting < delivered
        got = b.device.transmitted(1)
        while len(got) < len(frames):
            if delivered < len(frames) and a.device.deliver(frames[delivered]):
                delivered += 1
            got += b.device.transmitted(1)
            assert time.monotonic() < deadline
        assert got == frames
        assert b.device.headers == [header] * len(frames)
        stats = patch.stats().forth
        assert (stats.frames, stats.malformed, stats.refused) == (len(frames), 0, 0)


def test_a_full_side_does_not_hold_up_the_other_way() -> None:
    with patched(size=64) as (a, b, patch):
        a.device.outgoing = PACKETS[0]
        for _ in range(20):
            a.device.deliver(PATTERN[:60000])
        assert cross(b.device, a.device, PARTIAL, FRAME) == (PARTIAL, FRAME)
        assert patch.stats().back.frames == 1


def asks(ring: Ring, after: int) -> bool:
    """Whether the driver wants an interrupt once `after` more entries are used."""
    if ring.event_idx:
        return ring.used_event == (ring.used_idx + after - 1) & 0xFFFF
    return not ring.avail_flags & 1


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("event", [EVENT_IDX, 0], ids=["event", "flags"])
def test_a_patch_sleeps_when_idle_and_when_it_waits_for_room(event: int) -> None:
    """It asks a full side for an interrupt, and the other one for none."""
    features = VERSION_1 | event | GUEST | HOST
    with patched(features, features, 32) as (a, b, patch):
        receive, transmit = a.device.rx, b.device.tx
        until(lambda: asks(receive, 1))
        a.device.outgoing = PACKETS[0]
        a.device.feed([PATTERN[:60000]] * 2)
        until(lambda: patch.stats().forth.frames == 2 and asks(transmit, 2))
        assert not asks(receive, 1)
        assert receive.calls
        for ring in (transmit, receive):
            before = time.process_time()
            time.sleep(0.2)
            assert time.process_time() - before < 0.1
            calls = transmit.calls
            b.device.transmitted()
            assert transmit.calls == calls + (ring is transmit)
            until(lambda: asks(receive, 1))


def ends(header: Header, length: int) -> Header:
    """The header with its checksum just beyond a frame of `length`."""
    return replace(header, csum_start=length - 1, csum_offset=0)


TCP = PACKETS[0]
MALFORMED = {
    "checksum beyond the frame": ends(PARTIAL, len(FRAME)),
    "checksum far beyond": replace(PARTIAL, csum_start=0xFFFF, csum_offset=0xFFFF),
    "offset beyond": replace(PARTIAL, csum_start=0, csum_offset=len(FRAME) - 1),
    "gso without segments": replace(TCP, hdr_len=54, gso_size=0),
    "gso without a checksum": replace(TCP, hdr_len=54, flags=0),
    "gso with a checksum that is there": replace(TCP, hdr_len=54, flags=DATA_VALID),
    "headers longer than the frame": replace(TCP, hdr_len=len(FRAME) + 1),
    "checksum of gso beyond": ends(replace(TCP, hdr_len=54), len(FRAME)),
    "no type of gso": replace(TCP, hdr_len=54, gso_type=2),
    "no type, ecn": replace(TCP, hdr_len=54, gso_type=ECN),
    "a type of 6 bits": replace(TCP, hdr_len=54, gso_type=0x21),
    "a type of 7 bits": replace(TCP, hdr_len=54, gso_type=0x7F),
}


@pytest.mark.parametrize("wrong", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_frame_whose_header_cannot_be_true_is_dropped_and_counted(wrong: Header) -> None:
    with patched() as (a, b, patch):
        a.device.outgoing = wrong
        a.device.feed([FRAME] * 3)
        good = replace(TCP, hdr_len=len(FRAME))
        assert cross(a.device, b.device, good, FRAME) == (good, FRAME)
        assert patch.stats().forth == LaneStats(1, 60, 1, 0, 60, malformed=3, refused=0)
        assert patch.stats().back == LaneStats(0, 0, 0, 0, 0, 0, 0)


def test_a_checksum_may_end_with_the_frame() -> None:
    header = replace(PARTIAL, csum_start=len(FRAME) - 2, csum_offset=0)
    with patched() as (a, b, _):
        assert cross(a.device, b.device, header, FRAME) == (header, FRAME)


@pytest.mark.parametrize("header", PACKETS[:-1], ids=lambda header: f"type-{header.gso_type:#x}")
def test_what_was_never_negotiated_is_refused_and_counted(header: Header) -> None:
    """A device that breaks its word must not make us break ours."""
    with patched(MODES[0], MODES[0] | CSUM | HOST_TSO4) as (a, b, patch):
        allowed = header.gso_type == TCPV4
        a.device.outgoing = header
        a.device.feed([PATTERN[:9000]])
        assert len(b.device.expect(allowed)) == allowed
        assert cross(a.device, b.device, PARTIAL, FRAME) == (PARTIAL, FRAME)
        stats = patch.stats().forth
        assert (stats.gso, stats.refused, stats.malformed) == (allowed, not allowed, 0)


@pytest.mark.parametrize("features", [MODES[0], MODES[2], 0], ids=hex)
@pytest.mark.parametrize("version", [4, 6])
def test_a_checksum_that_the_other_side_would_not_complete_is_completed(
    version: int, features: int
) -> None:
    payloads = [PATTERN[:size] for size in (0, 1, 2, 3, 18, 999, 1000, 1452, 4090, 8960, 60001)]
    payloads += [bytes(9), b"\xff" * 64, summing_to_zero(version)]
    with patched(features | GUEST_CSUM, features, buffer_size=1088) as (a, b, patch):
        for data in payloads:
            packet = partial(version, data)
            start = int.from_bytes(packet[6:8], "little")
            header = Header(NEEDS_CSUM, csum_start=start, csum_offset=6)
            assert bytes(header) == packet[:10]
            whole = net.udp(version, data)
            assert cross(a.device, b.device, header, packet[10:]) == (Header(), whole)
        assert patch.stats().forth.completed == len(payloads)
        assert cross(a.device, b.device, Header(), FRAME) == (Header(), FRAME)
        assert patch.stats().forth.completed == len(payloads)
