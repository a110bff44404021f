"""A device that breaks the protocol gets an error, never the driver's memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.guest_device import BASE, EVENT_IDX, INDIRECT, MRG_RXBUF, VERSION_1, Bench, bench
from vhostctl.guest.driver import RingError, native

lib = native.lib
FRAME = b"x" * 60
MRG = VERSION_1 | MRG_RXBUF


def outside_the_ring(b: Bench) -> None:
    b.device.rx.push([(256, 20)])


def far_outside_the_ring(b: Bench) -> None:
    b.device.rx.push([(0xFFFFFFFF, 20)])


def twice(b: Bench) -> None:
    assert b.device.deliver(FRAME)
    head = b.memory.u16(b.device.rx.place.used + 4)
    b.device.rx.push([(head, 20)])


def too_long(b: Bench) -> None:
    b.device.rx.push([(0, 2049)])


def too_short(b: Bench) -> None:
    b.device.rx.push([(0, 11)])


def more_than_available(b: Bench) -> None:
    b.memory.set_u16(b.device.rx.place.used + 2, 257)


def backwards(b: Bench) -> None:
    b.memory.set_u16(b.device.rx.place.used + 2, -1)


def no_buffers(b: Bench) -> None:
    b.device.deliver(FRAME, buffers=0)


def absurdly_many_buffers(b: Bench) -> None:
    b.device.deliver(FRAME, buffers=65535)


def one_buffer_too_many(b: Bench) -> None:
    b.device.deliver(b"x" * 5000, buffers=4)


def a_hole_before_the_last_buffer(b: Bench) -> None:
    chain = b.device.rx.pop()
    other = b.device.rx.pop()
    assert chain
    assert other
    b.memory.write(chain.writable[0][0], bytes(10) + b"\2\0")
    b.device.rx.push([(chain.head, 2047), (other.head, 1)])


@pytest.mark.parametrize("extra", [0, EVENT_IDX])
@pytest.mark.parametrize(
    ("misbehave", "fault"),
    [
        (outside_the_ring, lib.RING_FAULT_USED_ID),
        (far_outside_the_ring, lib.RING_FAULT_USED_ID),
        (twice, lib.RING_FAULT_USED_IDLE),
        (too_long, lib.RING_FAULT_USED_LENGTH),
        (too_short, lib.RING_FAULT_SHORT_FRAME),
        (more_than_available, lib.RING_FAULT_USED_INDEX),
        (backwards, lib.RING_FAULT_USED_INDEX),
        (no_buffers, lib.RING_FAULT_NUM_BUFFERS),
        (absurdly_many_buffers, lib.RING_FAULT_NUM_BUFFERS),
        (one_buffer_too_many, lib.RING_FAULT_NUM_BUFFERS),
        (a_hole_before_the_last_buffer, lib.RING_FAULT_PARTIAL_BUFFER),
    ],
)
def test_a_bad_receive_device_breaks_the_queue(
    misbehave: Callable[[Bench], None], fault: int, extra: int
) -> None:
    with bench(MRG | extra, max_frame=8000) as b:
        b.pair.start()
        misbehave(b)
        before = b.pair.receive() if misbehave is twice else []
        assert before == ([FRAME] if misbehave is twice else [])
        for use in (b.pair.receive, b.pair.receive, b.pair.start, b.pair.wait):
            with pytest.raises(RingError, match="rx queue of pair 0") as caught:
                use()
            assert caught.value.fault == fault
        assert b.pair.stats().rx_errors == 1
        # The other direction goes on.
        assert b.pair.send([FRAME]) == 1
        assert b.device.transmitted() == [FRAME]


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([(77, 0)], lib.RING_FAULT_USED_IDLE),
        ([(0, 0), (0, 0)], lib.RING_FAULT_USED_IDLE),
        ([(1 << 31, 0)], lib.RING_FAULT_USED_ID),
        ([(0, 1)], lib.RING_FAULT_USED_LENGTH),
        ([(0, 0)] * 3, lib.RING_FAULT_USED_INDEX),
    ],
)
def test_a_bad_transmit_device_breaks_the_queue(entries: list[tuple[int, int]], fault: int) -> None:
    with bench() as b:
        b.pair.start()
        b.pair.send([FRAME] * 2)
        b.device.tx.push(entries)
        for _ in range(2):
            with pytest.raises(RingError, match="tx queue of pair 0") as caught:
                b.pair.send([FRAME])
            assert caught.value.fault == fault
        assert b.pair.stats().tx_errors == 1
        assert b.device.deliver(FRAME)
        assert b.pair.receive() == [FRAME]


def test_a_chain_that_is_no_head_is_not_accepted() -> None:
    with bench(size=8, buffer_size=768) as b:
        b.pair.send([b"x" * 1500])
        b.device.tx.push([(1, 0)])
        with pytest.raises(RingError) as caught:
            b.pair.send([FRAME])
        assert caught.value.fault == lib.RING_FAULT_USED_IDLE


@settings(max_examples=300, deadline=None)
@given(
    features=st.sampled_from([0, VERSION_1, MRG, MRG | INDIRECT, VERSION_1 | INDIRECT]),
    entries=st.lists(
        st.tuples(
            st.integers(0, 20) | st.integers(0, 0xFFFFFFFF),
            st.integers(0, 4200) | st.integers(0, 0xFFFFFFFF),
        ),
        max_size=20,
    ),
    noise=st.binary(min_size=1, max_size=64),
    index=st.none() | st.integers(0, 65535),
)
def test_no_used_ring_and_no_header_harms_the_driver(
    features: int, entries: list[tuple[int, int]], noise: bytes, index: int | None
) -> None:
    with bench(features, 16, buffer_size=512) as b:
        b.pair.start()
        b.pair.send([b"x" * 1500] * 16)
        buffers = b.device.tx.place.used + 6 + 8 * 16
        length = BASE + b.memory.size - buffers
        b.memory.write(buffers, (noise * length)[:length])
        for ring in (b.device.rx, b.device.tx):
            ring.push(entries)
            if index is not None:
                b.memory.set_u16(ring.place.used + 2, index)
        with suppress(RingError):
            assert sum(map(len, b.pair.receive())) <= 16 * 2048
        with suppress(RingError):
            assert b.pair.send([b"x" * 1500] * 16) <= 16
        assert b.pair.stats().tx_in_flight <= 16
