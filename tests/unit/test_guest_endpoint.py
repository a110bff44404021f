"""The end station: what it answers, and what it makes of a checked stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import guest_packets as net
from tests.support.guest_device import DEADLINE, EVENT_IDX, MRG_RXBUF, VERSION_1, Bench, bench
from tests.unit.test_guest_pump import running
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.guest.endpoint import Endpoint, Peer
from vhostctl.guest.streams import Stream, default_pattern

PATTERN = default_pattern()
NEEDS_CSUM, DATA_VALID = 1, 2
PEER = Peer(net.HOST_MAC, 9000, net.HOST4, net.HOST6)


@contextmanager
def station(
    features: int = VERSION_1 | MRG_RXBUF | EVENT_IDX, size: int = 64, *, echo: bool = True
) -> Iterator[tuple[Bench, Endpoint]]:
    """An endpoint whose device and driver are ready; it does not run yet."""
    with (
        bench(features, size, buffer_size=1024) as b,
        Endpoint(b.pair, net.MAC, net.IPV4, net.IPV6, echo=echo) as endpoint,
    ):
        b.pair.start()
        yield b, endpoint


@contextmanager
def host(**options: bool) -> Iterator[tuple[Bench, Endpoint]]:
    """A running endpoint."""
    with station(**options) as (b, endpoint), running(endpoint, endpoint.run):
        yield b, endpoint


def ask(b: Bench, frame: bytes, *, flags: int = 0) -> bytes:
    b.device.feed([frame], flags=flags)
    return b.device.expect(1)[0]


def ignores(b: Bench, frame: bytes, *, flags: int = 0) -> None:
    """Check that `frame` brings no answer: the next answer is that to a later ping."""
    b.device.feed([frame], flags=flags)
    assert net.parse(ask(b, net.echo_request(4, b"marker"))).body.endswith(b"marker")


def test_arp() -> None:
    with host() as (b, endpoint):
        request = net.ethernet(net.ARP, net.arp(1, net.HOST4, net.IPV4), to=b"\xff" * 6)
        reply = ask(b, request + bytes(18))
        assert reply[:14] == net.HOST_MAC + net.MAC + b"\x08\x06"
        assert reply[14:22] == bytes.fromhex("0001080006040002")
        assert reply[22:] == net.MAC + net.address(net.IPV4) + net.HOST_MAC + net.address(net.HOST4)
        ignores(b, net.ethernet(net.ARP, net.arp(1, net.HOST4, "192.0.2.77"), to=b"\xff" * 6))
        ignores(b, net.ethernet(net.ARP, net.arp(2, net.HOST4, net.IPV4)))
        ignores(b, request[:41])
        assert endpoint.counters().arp == 1
        assert endpoint.counters().ignored == 3


MULTICAST6 = "ff02::1:ffef:cafe"


@pytest.mark.parametrize("to", [net.IPV6, MULTICAST6])
def test_neighbour_solicitation(to: str) -> None:
    with host() as (b, endpoint):
        answer = net.parse(ask(b, net.solicitation(to=to)))
        assert (answer.to, answer.source) == (net.HOST_MAC, net.MAC)
        assert (answer.source_ip, answer.to_ip, answer.hops) == (net.IPV6, net.HOST6, 255)
        assert answer.body[:2] == bytes([136, 0])
        assert answer.body[4:8] == bytes.fromhex("60000000")
        assert answer.body[8:] == net.address(net.IPV6) + bytes([2, 1]) + net.MAC
        assert endpoint.counters().neighbour == 1


def test_duplicate_address_detection_is_answered_to_all_nodes() -> None:
    with host() as (b, _):
        answer = net.parse(ask(b, net.solicitation(source="::", to=MULTICAST6)))
        assert (answer.to, answer.to_ip) == (bytes.fromhex("333300000001"), "ff02::1")
        assert answer.body[4:8] == bytes.fromhex("20000000")


def test_solicitations_that_are_not_for_us_or_come_from_afar() -> None:
    with host() as (b, endpoint):
        ignores(b, net.solicitation(to=MULTICAST6, target="2001:db8::1:beef:cafe"))
        ignores(b, net.solicitation(to=MULTICAST6, hops=64))
        damaged = bytearray(net.solicitation(to=MULTICAST6))
        damaged[-1] ^= 1
        ignores(b, bytes(damaged))
        counters = endpoint.counters()
        assert (counters.neighbour, counters.ignored, counters.bad_checksum) == (0, 2, 1)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 56, 57, 1400, 1452])
def test_ping(version: int, size: int) -> None:
    with host() as (b, endpoint):
        request = net.echo_request(version, PATTERN[:size])
        answer = net.parse(ask(b, request + bytes(max(0, 60 - len(request)))))
        assert (answer.to, answer.source, answer.hops) == (net.HOST_MAC, net.MAC, 64)
        assert answer.to_ip == (net.HOST4 if version == 4 else net.HOST6)
        assert answer.body[0] == (0 if version == 4 else 129)
        assert answer.body[4:] == bytes.fromhex("12340007") + PATTERN[:size]
        ignores(b, request[:-1] + bytes([request[-1] ^ 255]))
        assert endpoint.counters().bad_checksum == 1


def test_packets_that_are_not_for_us() -> None:
    with host() as (b, endpoint):
        good = net.ipv4(net.UDP, net.udp(4, b"hello")[34:])
        for frame in (
            net.ethernet(net.IP4, good, to=net.HOST_MAC),
            net.ethernet(net.IP4, net.ipv4(net.UDP, good[20:], to="192.0.2.3")),
            net.ethernet(net.IP4, net.ipv4(net.UDP, good[20:], fragment=0x2000)),
            net.ethernet(net.IP4, net.ipv4(net.UDP, good[20:], fragment=0x0001)),
            net.ethernet(net.IP4, net.ipv4(6, good[20:])),
            net.ethernet(net.IP4, good[:-1]),
            net.ethernet(net.IP4, good[:10] + b"\0\0" + good[12:]),
            net.ethernet(net.IP4, b"\x44" + good[1:]),
            net.ethernet(net.IP6, net.ipv6(0, bytes(8))),
            net.udp(6, b"hello")[:-1],
            net.ethernet(net.IP6, b""),
            net.ethernet(0x8100, b"\0\1\x08\0" + good),
            b"short",
        ):
            ignores(b, frame)
        assert endpoint.counters().ignored == 13
        assert endpoint.counters().echo == 0


@pytest.mark.parametrize("version", [4, 6])
def test_udp_echo(version: int) -> None:
    with host() as (b, endpoint):
        for size in (0, 1, 2, 17, 1000, 1452):
            answer = net.parse(ask(b, net.udp(version, PATTERN[:size], source=4000, to=7)))
            assert answer.body[:4] == (7).to_bytes(2, "big") + (4000).to_bytes(2, "big")
            assert answer.body[8:] == PATTERN[:size]
        assert endpoint.counters().echo == 6


def test_udp_checksums() -> None:
    with host() as (b, endpoint):
        ask(b, net.udp(4, b"hello", csum=False))
        ignores(b, net.udp(6, b"hello", csum=False))
        for version in (4, 6):
            damaged = net.udp(version, b"hello")[:-1] + b"0"
            ignores(b, damaged)
            for flags in (NEEDS_CSUM, DATA_VALID):
                assert net.parse(ask(b, damaged, flags=flags)).body[8:] == b"hell0"
        assert endpoint.counters().bad_checksum == 3


def test_ip_options_are_skipped() -> None:
    with host() as (b, _):
        body = net.udp(4, b"hello")[34:]
        packet = net.ipv4(net.UDP, body, options=b"\x01\x01\x01\x00")
        answer = ask(b, net.ethernet(net.IP4, packet))
        assert answer[14] == 0x46
        assert answer.endswith(b"hello")


def test_without_echo_udp_is_ignored() -> None:
    with host(echo=False) as (b, endpoint):
        ignores(b, net.udp(4, b"hello"))
        assert endpoint.counters().ignored == 1


@pytest.mark.parametrize("size", [2, 8])
def test_answers_wait_for_room_and_none_is_lost(size: int) -> None:
    with (
        bench(VERSION_1 | EVENT_IDX, size, buffer_size=2048, base=65500) as b,
        Endpoint(b.pair, net.MAC, net.IPV4) as endpoint,
    ):
        b.pair.start()
        payloads = [PATTERN[i : i + 1 + i * 7 % 1400] for i in range(300)]
        with running(endpoint, endpoint.run):
            for first in range(0, 300, 2 * size):
                some = payloads[first : first + 2 * size]
                b.device.feed(net.udp(4, payload) for payload in some)
                assert [net.parse(f).body[8:] for f in b.device.expect(len(some))] == some
        assert endpoint.counters().ignored == 0


STREAM = Stream(max4=20, max6=13, number=3)


def datagram(k: int, stream: Stream = STREAM) -> bytes:
    return net.udp(stream.version(k), stream.payload(k), to=9000)


def changed(k: int) -> bytes:
    payload = STREAM.payload(k)
    return net.udp(STREAM.version(k), payload[:-1] + bytes([payload[-1] ^ 0x55]), to=9000)


@pytest.mark.parametrize(
    "stream",
    [STREAM, Stream(20, 0), Stream(0, 13, number=99), Stream(787, 797), Stream(1, 1398)],
    ids=lambda stream: f"{stream.max4}-{stream.max6}",
)
def test_the_generated_stream_is_the_one_that_the_rule_says(stream: Stream) -> None:
    with station() as (b, endpoint):
        endpoint.generate(stream, PEER, source_port=9001)
        with running(endpoint, endpoint.run):
            for goal, count in ((10, 10), (10, 0), (800, 790)):
                endpoint.goal = goal
                for k, frame in enumerate(b.device.expect(count), goal - count):
                    packet = net.parse(frame)
                    assert packet.version == stream.version(k)
                    assert packet.body[8:] == stream.payload(k)
                    assert packet.body[:4] == bytes.fromhex("23292328")
                    assert (packet.to, packet.source) == (net.HOST_MAC, net.MAC)
            assert endpoint.counters().sent == endpoint.goal == 800


def test_a_lap_has_every_size_once_and_fills_the_mtu() -> None:
    stream = Stream.for_mtu(1500)
    with station(size=256) as (b, endpoint):
        endpoint.generate(stream, PEER, 9001)
        with running(endpoint, endpoint.run):
            endpoint.goal = 2 * 1472
            frames = b.device.expect(2 * 1472)
    for k, frame in enumerate(frames):
        assert net.parse(frame).body[8:] == stream.payload(k)
    assert max(map(len, frames[0::2])) == max(map(len, frames[1::2])) == 1514
    assert sorted(stream.size(k) for k in range(0, 2 * 1472, 2)) == list(range(1, 1473))
    assert sorted(stream.size(k) for k in range(1, 2 * 1452, 2)) == list(range(1, 1453))


def test_a_few_datagrams_are_short_and_long_ones_of_both_families() -> None:
    stream = Stream.for_mtu(1500)
    for version in (4, 6):
        sizes = [stream.size(k) for k in range(20) if stream.version(k) == version]
        assert len(sizes) == 10
        assert min(sizes) < 300
        assert max(sizes) > 1100


@pytest.mark.parametrize("greatest", [1, 786, 787, 797, 2 * 787, 83 * 787, 82 * 797])
def test_no_size_is_left_out_whatever_the_greatest_is(greatest: int) -> None:
    stream = Stream(max4=0, max6=greatest, number=5)
    assert {stream.size(k) for k in range(greatest)} == set(range(1, greatest + 1))


def test_an_unbroken_stream_is_received_whole() -> None:
    with station() as (b, endpoint):
        endpoint.expect(STREAM, 9000)
        with running(endpoint, endpoint.run):
            assert not endpoint.wait_received(1, 0.001)
            b.device.feed(datagram(k) for k in range(500))
            assert endpoint.wait_received(500, DEADLINE)
        counters = endpoint.counters()
        assert (counters.received, counters.position) == (500, 500)
        assert (counters.changed, counters.lost, counters.repeated) == (0, 0, 0)
        assert counters.ignored == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["good", "good", "lose", "change", "repeat"]), max_size=60))
def test_lost_changed_and_repeated_datagrams_are_counted_exactly(fates: list[str]) -> None:
    frames: list[bytes] = []
    good = 0
    for k, fate in enumerate(fates):
        if fate == "change":
            frames.append(changed(k))
        elif fate != "lose":
            frames.append(datagram(k))
            good += 1
        if fate == "repeat":
            frames.append(datagram(k))
    # What is lost at the end of a family cannot be missed.
    frames += [datagram(len(fates)), datagram(len(fates) + 1)]
    with station() as (b, endpoint):
        endpoint.expect(STREAM, 9000)
        with running(endpoint, endpoint.run):
            b.device.feed(frames)
            assert endpoint.wait_received(good + 2 + fates.count("change"), DEADLINE)
            counters = endpoint.counters()
        assert counters.changed == fates.count("change")
        assert counters.lost == fates.count("lose")
        assert counters.repeated == fates.count("repeat")
        assert counters.position == len(fates) + 2


def test_a_gap_wider_than_the_window_is_one_change_after_another() -> None:
    with station() as (b, endpoint):
        endpoint.expect(Stream.for_mtu(1500), 9000)
        stream = Stream.for_mtu(1500)
        with running(endpoint, endpoint.run):
            b.device.feed([datagram(2 * 64, stream), datagram(2 * (65 + 65), stream)])
            assert endpoint.wait_received(2, DEADLINE)
        assert (endpoint.counters().lost, endpoint.counters().changed) == (64, 1)


def test_the_families_need_not_keep_step() -> None:
    """They are flows of their own: one may wait for its neighbour entry while the other runs."""
    with station() as (b, endpoint):
        endpoint.expect(STREAM, 9000)
        with running(endpoint, endpoint.run):
            b.device.feed(datagram(k) for k in (*range(0, 200, 2), *range(1, 200, 2)))
            assert endpoint.wait_received(200, DEADLINE)
        counters = endpoint.counters()
        assert (counters.lost, counters.changed, counters.repeated) == (0, 0, 0)


def test_a_datagram_of_another_stream_is_a_changed_one() -> None:
    with station() as (b, endpoint):
        endpoint.expect(STREAM, 9000)
        with running(endpoint, endpoint.run):
            b.device.feed([datagram(0, Stream(20, 13, number=4)), datagram(1)])
            assert endpoint.wait_received(2, DEADLINE)
        assert endpoint.counters().changed == 1


def test_two_endpoints_over_a_lossy_wire() -> None:
    """One sends, the other checks; the wire between them drops every seventh frame."""
    stream = Stream.for_mtu(600)
    with station() as (left, sender), station() as (right, checker):
        sender.generate(stream, Peer(net.MAC, 9000, net.IPV4, net.IPV6), 9001)
        checker.expect(stream, 9000)
        with running(sender, sender.run), running(checker, checker.run):
            for goal in range(100, 1101, 100):
                sender.goal = goal
                frames = enumerate(left.device.expect(100), goal - 100)
                right.device.feed(frame for k, frame in frames if k % 7 != 6)
            assert checker.wait_received(1100 - 157, DEADLINE)
        counters = checker.counters()
        # The last one that was dropped, 1098, has no later one of its family.
        assert (counters.lost, counters.changed, counters.position) == (156, 0, 1099)
        assert sender.counters().sent == 1100


def test_streams_are_set_between_runs() -> None:
    with station() as (_, endpoint):
        with pytest.raises(StateError, match="generate"):
            endpoint.goal = 1
        with running(endpoint, endpoint.run):
            for _ in itertools.count():
                try:
                    endpoint.expect(STREAM, 9000)
                except StateError:
                    break
            with pytest.raises(StateError):
                endpoint.generate(STREAM, PEER, 9001)


def test_what_cannot_be_sent_is_refused() -> None:
    with station() as (b, endpoint):
        with pytest.raises(InvalidArgument, match="smaller stream"):
            endpoint.generate(Stream.for_mtu(9000), PEER, 9001)
        with pytest.raises(InvalidArgument, match="both ends"):
            endpoint.generate(STREAM, Peer(net.HOST_MAC, 9000, ipv4=net.HOST4), 9001)
        for port in (0, 65536):
            with pytest.raises(InvalidArgument):
                endpoint.expect(STREAM, port)
        for mac, ipv4 in ((b"12345", None), (net.MAC, "192.0.2.256")):
            with pytest.raises(InvalidArgument):
                Endpoint(b.pair, mac, ipv4)


@pytest.mark.parametrize(
    ("max4", "max6", "number", "pattern"),
    [(0, 0, 0, b""), (-1, 5, 0, b""), (65508, 0, 0, b""), (5, 5, -1, b""), (5, 5, 0, bytes(65524))],
)
def test_streams_that_cannot_be(max4: int, max6: int, number: int, pattern: bytes) -> None:
    with pytest.raises(InvalidArgument):
        Stream(max4, max6, number, pattern)


@given(
    st.integers(0, (1 << 64) - 1),
    *[st.integers(0, 3000) | st.sampled_from([0, 787, 797, 1574])] * 2,
    st.integers(0, (1 << 32) - 1),
)
def test_the_rule_is_what_the_text_says(k: int, max4: int, max6: int, number: int) -> None:
    if not max4 and not max6:
        return
    stream = Stream(max4, max6, number)
    n, version = divmod(k, 2) if max4 and max6 else (k, 0 if max4 else 1)
    greatest = (max4, max6)[version]
    size = 1 + (n * (787 if greatest % 787 else 797) + number) % greatest
    start = (k * 7919 + number) % 65521
    assert (stream.version(k), stream.size(k)) == ((4, 6)[version], size)
    assert stream.payload(k) == PATTERN[start : start + size]
