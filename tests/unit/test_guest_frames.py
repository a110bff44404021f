"""Every frame arrives once, unchanged and in order, whatever the rings look like."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.guest_device import (
    ANY_LAYOUT,
    EVENT_IDX,
    INDIRECT,
    MRG_RXBUF,
    VERSION_1,
    Bench,
    Memory,
    bench,
    layout,
)
from vhostctl.errors import ClosedError, InvalidArgument, StateError
from vhostctl.guest.driver import NetDriver
from vhostctl.guest.streams import default_pattern

PATTERN = default_pattern()


@dataclass(frozen=True)
class Setup:
    features: int
    size: int
    buffer_size: int
    max_frame: int
    base: int


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    features = sum(draw(st.sets(st.sampled_from([MRG_RXBUF, ANY_LAYOUT, INDIRECT, EVENT_IDX]))))
    features |= draw(st.sampled_from([0, VERSION_1]))
    split = not features & (VERSION_1 | ANY_LAYOUT)
    size = 1 << draw(st.integers(1 if split else 0, 8))
    max_frame = draw(st.integers(14, 2000) | st.integers(14, 65536))
    segments = draw(st.integers(1, min(size - split, 40)))
    needed = -(-(12 + max_frame + 4) // segments)
    return Setup(
        features=features,
        size=size,
        buffer_size=max(128, -(-needed // 64) * 64),
        max_frame=max_frame,
        base=draw(st.sampled_from([0, 65500, 65535]) | st.integers(0, 65535)),
    )


class Traffic:
    """Frames that differ from each other, of sizes that a seed decides."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.made = 0

    def make(self, length: int) -> bytes:
        self.made += 1
        start = self.made * 131 % 65521
        return PATTERN[start : start + 1 + length % self.longest]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["send", "transmit", "deliver", "receive"]),
        st.lists(st.integers(0, 1 << 20), min_size=1, max_size=80),
        st.integers(1, 80),
    ),
    max_size=25,
)


def check_traffic(b: Bench, setup: Setup, operations: list[tuple[str, list[int], int]]) -> None:
    traffic = Traffic(setup.max_frame)
    sent: deque[bytes] = deque()
    delivered: deque[bytes] = deque()
    b.pair.start()
    for name, lengths, batch in operations:
        if name == "send":
            frames = [traffic.make(length) for length in lengths]
            sent.extend(frames[: b.pair.send(frames)])
        elif name == "transmit":
            for frame in b.device.transmitted(len(lengths), batch=batch):
                assert frame == sent.popleft()
        elif name == "deliver":
            frames = [traffic.make(length) for length in lengths]
            for frame in frames:
                if not b.device.deliver(frame):
                    break
                delivered.append(frame)
        else:
            for frame in b.pair.receive(batch):
                assert frame == delivered.popleft()
    assert b.device.transmitted() == list(sent)
    assert b.pair.receive(1 << 16) == list(delivered)
    stats = b.pair.stats()
    assert stats.tx_in_flight == 0
    assert stats.tx_completed == stats.tx_frames
    assert stats.rx_errors == stats.tx_errors == 0
    # All buffers are back, so the ring takes a frame of the greatest length again.
    longest = traffic.make(setup.max_frame - 1)
    assert b.pair.send([longest]) == 1
    assert b.device.transmitted() == [longest]
    assert b.device.deliver(longest)
    assert b.pair.receive() == [longest]


@settings(max_examples=400, deadline=None)
@given(setups(), OPERATIONS)
def test_every_frame_arrives_once_unchanged_and_in_order(
    setup: Setup, operations: list[tuple[str, list[int], int]]
) -> None:
    with bench(
        setup.features,
        setup.size,
        buffer_size=setup.buffer_size,
        max_frame=setup.max_frame,
        base=setup.base,
    ) as b:
        check_traffic(b, setup, operations)


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | INDIRECT, VERSION_1 | EVENT_IDX])
def test_rings_survive_their_indices_passing_65535_often(features: int) -> None:
    with bench(features | MRG_RXBUF, 64, buffer_size=128, base=65500) as b:
        b.pair.start()
        for lap in range(1100):
            frames = [PATTERN[lap + i : lap + i + 60] for i in range(64)]
            assert b.pair.send(frames) == 64
            assert b.device.transmitted() == frames
            assert all(b.device.deliver(frame) for frame in frames)
            assert b.pair.receive() == frames
        assert b.pair.stats().tx_completed == 64 * 1100


def test_a_device_may_use_transmit_chains_in_any_order() -> None:
    with bench(VERSION_1 | INDIRECT, 8, buffer_size=256) as b:
        for lap in range(20):
            frames = [PATTERN[lap : lap + 1500], PATTERN[lap : lap + 70], PATTERN[:300]]
            assert b.pair.send(frames) == 3
            chains = [chain for _ in frames if (chain := b.device.tx.pop())]
            assert [b.device.take(chain) for chain in chains] == frames
            order = [(lap + i) % 3 for i in range(3)]
            b.device.tx.push([(chains[i].head, 0) for i in order])


def test_a_frame_of_one_segment_needs_no_table() -> None:
    with bench(VERSION_1 | INDIRECT, 4, buffer_size=128, max_frame=200) as b:
        b.pair.send([PATTERN[:116], PATTERN[:117]])
        chains = [b.device.tx.pop(), b.device.tx.pop()]
        assert [(c.indirect, len(c.readable)) for c in chains if c] == [(False, 1), (True, 2)]


def test_direct_chains_share_the_ring_and_indirect_ones_take_a_slot_each() -> None:
    frames = [PATTERN[:1500]] * 9
    for features, fit in ((VERSION_1, 4), (VERSION_1 | INDIRECT, 8)):
        with bench(features, 8, buffer_size=768) as b:
            assert b.pair.send(frames) == fit


def test_send_takes_back_what_the_device_used() -> None:
    with bench(size=4) as b:
        assert b.pair.send([b"x" * 60] * 5) == 4
        assert b.pair.send([b"x" * 60]) == 0
        assert b.pair.stats().tx_in_flight == 4
        b.device.transmitted(3)
        assert b.pair.stats().tx_completed == 3
        assert b.pair.send([b"x" * 60] * 5) == 3


def test_vlan_tagged_frames_of_full_size_pass() -> None:
    with bench() as b:
        b.pair.start()
        assert b.device.deliver(PATTERN[:1518])
        assert b.pair.receive() == [PATTERN[:1518]]
        assert b.pair.send([PATTERN[:1518]]) == 1


def test_frames_that_are_empty_or_too_long_are_dropped_and_counted() -> None:
    with bench() as b:
        b.pair.start()
        for frame in (b"", PATTERN[:1519], b"good"):
            assert b.device.deliver(frame)
        assert b.pair.receive() == [b"good"]
        assert b.pair.stats().rx_errors == 2
        assert b.pair.stats().rx_frames == 1


def test_send_refuses_before_it_queues_anything() -> None:
    with bench() as b:
        for bad in (b"", bytes(1519)):
            with pytest.raises(InvalidArgument):
                b.pair.send([b"x" * 60, bad])
        assert b.pair.stats().tx_frames == 0
        assert b.pair.send([]) == 0
        assert b.pair.send([bytearray(60), memoryview(bytes(60))]) == 2


def test_the_rings_go_on_after_the_device_stopped_and_started() -> None:
    with bench(VERSION_1 | MRG_RXBUF | EVENT_IDX, 4, buffer_size=2048) as b:
        b.pair.start()
        b.pair.send([b"a" * 60, b"b" * 60])
        assert b.device.transmitted(1) == [b"a" * 60]
        b.device.rx.kicks(), b.device.tx.kicks()
        again = type(b.device)(
            b.memory,
            replace(b.device.rx.place, base=b.device.rx.last_avail),
            replace(b.device.tx.place, base=b.device.tx.last_avail),
            VERSION_1 | MRG_RXBUF | EVENT_IDX,
        )
        b.pair.start()
        assert (again.rx.kicks(), again.tx.kicks()) == (1, 1)
        assert again.transmitted() == [b"b" * 60]
        assert b.pair.send([b"c" * 60] * 5) == 4
        assert again.transmitted() == [b"c" * 60] * 4


def test_start_posts_every_buffer_once() -> None:
    with bench(size=16) as b:
        b.pair.start()
        b.pair.start()
        assert b.pair.stats().rx_posted == 16
        assert b.device.rx.pending() == 16


@pytest.mark.parametrize(
    ("size", "options", "says"),
    [
        (3, {}, "power of two"),
        (65536, {}, "power of two"),
        (4, {"buffer_size": 128}, "in 12"),
        (2, {"features": 0, "buffer_size": 768}, "in 3"),
        (4, {"features": VERSION_1 | MRG_RXBUF, "buffer_size": 128}, "in 12"),
        (256, {"buffer_size": 100}, "buffer size"),
        (256, {"max_frame": 70000}, "frame size"),
        (256, {"features": 1 << 34}, "RING_PACKED"),
        (256, {"features": 1 << 35}, "IN_ORDER"),
        (256, {"features": 1 << 57}, "HASH_REPORT"),
        (256, {"features": 1 << 65}, "TUNNEL"),
    ],
)
def test_rings_that_cannot_work_are_refused(size: int, options: dict[str, int], says: str) -> None:
    choice = {"features": VERSION_1, "buffer_size": 2048, "max_frame": 1514} | options
    with pytest.raises(InvalidArgument, match=says):
        NetDriver.arena_size([size, size], *choice.values())


def test_the_arena_and_the_rings_are_checked() -> None:
    places, free = layout([16, 16], [0, 0])
    memory = Memory(1 << 20)
    pair = (places[0], places[1])
    size = NetDriver.arena_size([16, 16], VERSION_1, 2048, 1514)
    NetDriver(memory, [pair], VERSION_1, (free + 1, size)).close()
    with pytest.raises(InvalidArgument, match="short"):
        NetDriver(memory, [pair], VERSION_1, (free + 1, size - 64))
    for wrong in (
        replace(places[0], desc=places[0].desc + 8),
        replace(places[0], avail=places[0].avail + 1),
        replace(places[0], used=places[0].used + 2),
        replace(places[0], base=65536),
    ):
        with pytest.raises(InvalidArgument):
            NetDriver(memory, [(wrong, places[1])], VERSION_1, (free, size))


def test_use_after_close() -> None:
    with bench() as b:
        b.driver.close()
        b.driver.close()
        for use in (b.pair.start, b.pair.receive, b.pair.stats, b.pair.wait):
            with pytest.raises(ClosedError):
                use()
        with pytest.raises(ClosedError):
            b.pair.send([b"x" * 60])


def test_a_queue_has_one_driver_at_a_time() -> None:
    with bench() as b:
        with b.pair.tx.claim():
            with pytest.raises(StateError, match="tx queue of pair 0"):
                b.pair.send([b"x" * 60])
            with pytest.raises(StateError):
                b.driver.close()
            b.pair.receive()
        assert b.pair.send([b"x" * 60]) == 1
