"""An end station on a queue pair: answers, echoes, and sends and checks datagram streams."""

from __future__ import annotations

import ipaddress
import math
import select
import time
from dataclasses import dataclass

from vhostctl.errors import InvalidArgument, StateError
from vhostctl.guest.driver import QueuePair, native, own
from vhostctl.guest.pump import Loop
from vhostctl.guest.streams import Stream
from vhostctl.host.eventfd import EventFd

ffi, lib = native.ffi, native.lib


@dataclass(frozen=True, slots=True)
class EndpointCounters:
    """What an endpoint did.

    `arp`, `neighbour`, `ping` and `echo` are answers sent and `sent` datagrams of the stream
    that it generates. Of the stream that it checks, `position` is how many datagrams are
    settled, `received` those that came, `changed` those of them that were no datagram of the
    stream, `lost` those that a later one of their family passed over, `repeated` those that
    came once more or too late. Frames with a wrong checksum or of no interest come last.
    """

    arp: int
    neighbour: int
    ping: int
    echo: int
    sent: int
    received: int
    changed: int
    lost: int
    repeated: int
    position: int
    bad_checksum: int
    ignored: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a generated stream goes: 6 bytes of MAC, addresses, and the UDP port."""

    mac: bytes
    port: int
    ipv4: str | None = None
    ipv6: str | None = None


class Endpoint(Loop):
    """A small IPv4 and IPv6 host with the address `mac` (6 bytes).

    Answers ARP, neighbour solicitations and echo requests for its addresses. With `echo`,
    UDP that belongs to no checked stream goes back to where it came from.

    Synchronisation: `run()` holds the pair; `goal`, `wait_received()`, `counters()` and
    `stop()` are for any thread, `expect()` and `generate()` for the time between runs.
    """

    def __init__(
        self,
        pair: QueuePair,
        mac: bytes,
        ipv4: str | None = None,
        ipv6: str | None = None,
        *,
        echo: bool = True,
    ) -> None:
        config = ffi.new("struct endpoint_config *")
        config.mac = _mac(mac)
        config.has_ipv4, config.has_ipv6 = ipv4 is not None, ipv6 is not None
        config.ipv4, config.ipv6 = _address4(ipv4), _address6(ipv6)
        config.echo = echo
        with pair.rx.claim() as rx, pair.tx.claim() as tx:
            super().__init__(f"endpoint of pair {pair.index}")
            self._wake = EventFd.create(f"wake of pair {pair.index}")
            self._done = EventFd.create(f"mark of pair {pair.index}")
            config.rx, config.tx = rx, tx
            config.stop, config.wake = self._stop.fileno(), self._wake.fileno()
            config.done = self._done.fileno()
            self._endpoint = own(lib.endpoint_create(config), lib.endpoint_destroy, "endpoint")
        self._pair = pair
        self._config = config
        self._goal = 0
        # C points into the patterns of both streams.
        self._expected: Stream | None = None
        self._generated: Stream | None = None

    def run(self) -> None:
        """Be the host until stopped. Raises RingError, KernelError, StateError."""
        pair = self._pair
        with pair.rx.claim(), pair.tx.claim():
            self._repeat(lambda: lib.endpoint_run(self._endpoint), pair.rx, pair.tx)

    def expect(self, stream: Stream, port: int) -> None:
        """Check datagrams to UDP `port` against `stream`, from its first one on.

        Counting starts again at 0. Raises StateError during a run.
        """
        with self._pair.rx.claim():
            lib.endpoint_expect(self._endpoint, _rule(stream), _port(port))
            self._expected = stream

    def generate(self, stream: Stream, peer: Peer, source_port: int) -> None:
        """Send `stream` to `peer`, from its first datagram on and as far as `goal` allows.

        The goal starts again at 0. Raises InvalidArgument if an address is missing or a
        datagram would be too long, StateError during a run.
        """
        for name, most, mine, theirs in (
            ("ipv4", stream.max4, self._config.has_ipv4, peer.ipv4),
            ("ipv6", stream.max6, self._config.has_ipv6, peer.ipv6),
        ):
            header = 42 if name == "ipv4" else 62
            if most and (not mine or theirs is None):
                raise InvalidArgument(f"a stream with {name} needs {name} addresses at both ends")
            if most and header + most > self._pair.tx.limit:
                raise InvalidArgument(
                    f"{name} payload of {most} bytes in frames of {self._pair.tx.limit}",
                    hint="use a smaller stream, or a greater max_frame of the driver",
                )
        flow = ffi.new("struct inet_flow *")
        flow.source_mac, flow.target_mac = self._config.mac, _mac(peer.mac)
        flow.source4, flow.target4 = self._config.ipv4, _address4(peer.ipv4)
        flow.source6, flow.target6 = self._config.ipv6, _address6(peer.ipv6)
        flow.source_port = _port(source_port).to_bytes(2, "big")
        flow.target_port = _port(peer.port).to_bytes(2, "big")
        with self._pair.tx.claim():
            lib.endpoint_generate(self._endpoint, _rule(stream), flow)
            self._goal, self._generated = 0, stream

    @property
    def goal(self) -> int:
        """How many datagrams of the generated stream may have been sent by now."""
        return self._goal

    @goal.setter
    def goal(self, count: int) -> None:
        if self._generated is None:
            raise StateError("the endpoint generates no stream", hint="call generate() first")
        self._goal = count
        lib.endpoint_set_goal(self._endpoint, count)
        self._wake.signal()

    def wait_received(self, count: int, timeout: float | None = None) -> bool:
        """Sleep until the checked stream's `received` is at least `count`; seconds.

        Returns False when the time is over. For one waiting thread at a time.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._done.fileno(), select.POLLIN)
        lib.endpoint_set_mark(self._endpoint, count)
        while self.counters().received < count:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(None if math.isinf(left) else math.ceil(left * 1000))
            self._done.drain()
        return True

    def counters(self) -> EndpointCounters:
        """Return the counters. From any thread."""
        counters = ffi.new("struct endpoint_counters *")
        lib.endpoint_read_counters(self._endpoint, counters)
        return EndpointCounters(*(getattr(counters, name) for name in EndpointCounters.__slots__))

    def close(self) -> None:
        """Close what the endpoint owns; a second call does nothing. Not during a run."""
        super().close()
        self._wake.close()
        self._done.close()


def _rule(stream: Stream) -> native.CData:
    rule = ffi.new("struct stream_rule *")
    rule.pattern = ffi.from_buffer("uint8_t[]", stream.pattern)
    rule.max4, rule.max6, rule.stream = stream.max4, stream.max6, stream.number
    return rule


def _mac(mac: bytes) -> bytes:
    if len(mac) != 6:
        raise InvalidArgument(f"a MAC address of {len(mac)} bytes", hint="give 6")
    return bytes(mac)


def _address4(address: str | None) -> bytes:
    return bytes(4) if address is None else _packed(ipaddress.IPv4Address, address)


def _address6(address: str | None) -> bytes:
    return bytes(16) if address is None else _packed(ipaddress.IPv6Address, address)


def _packed(family: type[ipaddress.IPv4Address | ipaddress.IPv6Address], address: str) -> bytes:
    try:
        return family(address).packed
    except ValueError as error:
        raise InvalidArgument(f"address {address!r}: {error}") from error


def _port(port: int) -> int:
    if not 1 <= port <= 0xFFFF:
        raise InvalidArgument(f"UDP port {port}", hint="use 1..65535")
    return port
