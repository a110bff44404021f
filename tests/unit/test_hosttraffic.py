"""The host's check of a stream: what is lost and what is changed is counted once."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from vhostctl.guest.streams import Stream
from vhostctl.jobs.hosttraffic import StreamReceiver, Tally

COUNT = 60
Pair = dict[int, tuple[socket.socket, socket.socket]]


@pytest.fixture
def families() -> Iterator[Pair]:
    pairs = {
        version: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        for version in (4, 6)
    }
    yield pairs
    for ends in pairs.values():
        for end in ends:
            end.close()


@pytest.mark.parametrize(
    ("lost", "changed"),
    [([], []), ([10], []), ([11, 13], []), ([10, 11, 12, 13], []), ([], [7]), ([10], [20, 31])],
)
def test_each_datagram_has_one_outcome(families: Pair, lost: list[int], changed: list[int]) -> None:
    stream, tally = Stream.for_mtu(1500), Tally(sent=COUNT)
    receiver = StreamReceiver(stream, {v: ends[1] for v, ends in families.items()}, tally)
    for k in range(COUNT):
        payload = stream.payload(k)
        if k in changed:
            payload = payload[:-1] + bytes([payload[-1] ^ 0xFF])
        if k not in lost:
            families[stream.version(k)][0].send(payload)
    assert receiver.receive(COUNT)
    assert (tally.lost, tally.changed) == (len(lost), len(changed))
    assert tally.frames == COUNT - len(lost)


def test_the_end_of_a_stream_is_noticed(families: Pair) -> None:
    stream, tally = Stream.for_mtu(1500), Tally(sent=2)
    receiver = StreamReceiver(stream, {v: ends[1] for v, ends in families.items()}, tally)
    families[stream.version(0)][0].send(stream.payload(0))
    assert not receiver.receive(2)
    assert tally.lost == 1
