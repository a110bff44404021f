"""Numbered datagrams both ways between the host's sockets and endpoints behind the rings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from socket import socket
from typing import Protocol, TypeVar

from vhostctl.errors import CheckFailed
from vhostctl.guest.driver import QueuePair
from vhostctl.guest.endpoint import Endpoint, Peer
from vhostctl.guest.streams import Stream
from vhostctl.host.closing import Closing
from vhostctl.host.links import LinkCounters, LinkState
from vhostctl.jobs.hosttraffic import PATIENCE, WINDOW, HostSockets, StreamReceiver, Tally
from vhostctl.jobs.running import Running

T = TypeVar("T")

HOST = {4: "192.0.2.1", 6: "2001:db8::1"}
GUEST = {4: "192.0.2.2", 6: "2001:db8::2"}
GUEST_MAC = bytes.fromhex("020000000002")
ADDRESSES = (f"{HOST[4]}/24", f"{HOST[6]}/64")
MTU = 1500
PING_SIZES = [0, 1, 56, 1000, MTU - 48]
_TO_GUEST, _TO_HOST, _FROM_GUEST = 7000, 7100, 7200  # UDP ports, plus the pair's number
_TRIES_A_PAIR = 100
_ENDLESS = 1 << 62

Progress = Callable[[float], None]


class TapSide(Protocol):
    """Where the tap is; `jobs.wire.Wire` is one."""

    def in_namespace(self, function: Callable[[], T], /) -> T:
        """Return function(), called there."""

    def counters(self) -> LinkCounters:
        """Return the tap's counters."""

    def link_state(self) -> LinkState:
        """Return what the tap is."""


class Traffic(Closing):
    """An endpoint on every pair, and the host's sockets that talk to them.

    `to_guest` and `to_host` tally the datagrams of every `exchange()`. Not synchronised.
    """

    def __init__(self, side: TapSide, pairs: Sequence[QueuePair]) -> None:
        """Open the sockets; the tap has `ADDRESSES` and is up, the pairs are started."""
        self._side = side
        self._pairs = pairs
        self._stack = ExitStack()
        self._sockets = HostSockets(side.in_namespace)
        self._stream = Stream.for_mtu(MTU)
        self.to_guest = Tally()
        self.to_host = Tally()
        self.pings = 0
        try:
            self.endpoints = [
                self._stack.enter_context(Endpoint(pair, GUEST_MAC, GUEST[4], GUEST[6]))
                for pair in pairs
            ]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close sockets and endpoints."""
        self._stack.close()

    def running(self) -> ExitStack:
        """Return a context in which the endpoints run."""
        stack = ExitStack()
        try:
            for index, endpoint in enumerate(self.endpoints):
                stack.enter_context(Running(endpoint, f"vhostctl-guest-{index}"))
        except BaseException:
            stack.close()
            raise
        return stack

    def ping(self) -> int:
        """Resolve and ping the guest over IPv4 and IPv6; return how many answers came."""
        with self.running():
            self.pings = sum(
                self._sockets.ping(version, GUEST[version], PING_SIZES) for version in GUEST
            )
        return self.pings

    def exchange(
        self,
        frames: int,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> int:
        """Send up to `frames` datagrams each way, a window on each pair in turn.

        Ends early when `stop` is set, and when datagrams cease to come. `progress` is called
        with the number that went both ways since its last call. Returns how many were sent
        each way.
        """
        senders = self._steer()
        mac = bytes.fromhex(self._side.link_state().mac.replace(":", ""))
        for index, endpoint in enumerate(self.endpoints):
            endpoint.expect(self._stream, _TO_GUEST)
            endpoint.generate(
                self._stream, Peer(mac, _TO_HOST + index, HOST[4], HOST[6]), _FROM_GUEST + index
            )
        with ExitStack() as stack:
            lanes = [
                _Lane(self._stream, endpoint, flows, self._receiver(stack, index))
                for index, (endpoint, flows) in enumerate(zip(self.endpoints, senders, strict=True))
            ]
            with self.running():
                sent = self._run(lanes, frames, progress or (lambda _: None), stop)
        for endpoint in self.endpoints:
            counters = endpoint.counters()
            self.to_guest.frames += counters.received
            self.to_guest.changed += counters.changed
            self.to_host.sent += counters.sent
        return sent

    def in_background(self, progress: Progress | None = None) -> Running:
        """Return a context in which another thread exchanges datagrams."""
        return Running(_Exchange(self, progress), "vhostctl-traffic")

    def _run(
        self,
        lanes: list[_Lane],
        frames: int,
        progress: Progress,
        stop: threading.Event | None,
    ) -> int:
        sent = turn = 0
        while sent < frames and not (stop and stop.is_set()):
            count = min(WINDOW, frames - sent)
            flowing = lanes[turn % len(lanes)].window(count, self.to_guest)
            progress(2 * count)
            sent += count
            turn += 1
            if not flowing:
                break
        return sent

    def _receiver(self, stack: ExitStack, index: int) -> StreamReceiver:
        sockets = {
            version: stack.enter_context(
                self._sockets.receiver(version, HOST[version], _TO_HOST + index)
            )
            for version in HOST
        }
        return StreamReceiver(self._stream, sockets, self.to_host)

    def _steer(self) -> list[dict[int, socket]]:
        """Return for every pair sockets whose datagrams the tap puts into that pair's ring.

        A tap picks the queue by a hash of the flow that only it knows, so ports are tried
        until the echo has shown a flow of each family for every pair.
        """
        found: list[dict[int, socket]] = [{} for _ in self.endpoints]
        with self.running():
            for version in GUEST:
                for _ in range(_TRIES_A_PAIR * len(found)):
                    if all(version in flows for flows in found):
                        break
                    self._try_flow(version, found)
        if not all(len(flows) == len(GUEST) for flows in found):
            raise CheckFailed("the tap leaves a queue pair without any flow")
        return found

    def _try_flow(self, version: int, found: list[dict[int, socket]]) -> None:
        candidate = self._stack.enter_context(
            self._sockets.sender(version, GUEST[version], _TO_GUEST)
        )
        before = [endpoint.counters().echo for endpoint in self.endpoints]
        candidate.send(b"which queue?")
        try:
            candidate.recv(64)
        except BlockingIOError:
            raise CheckFailed(f"no UDP echo over IPv{version} within {PATIENCE} s") from None
        for index, endpoint in enumerate(self.endpoints):
            if endpoint.counters().echo > before[index] and version not in found[index]:
                found[index][version] = candidate
                return
        candidate.close()

    def problems(self) -> list[str]:
        """Settle the accounts: what is wrong, a line each; late frames have time to come."""
        with self.running():
            found: dict[str, int] = {}
            for name, tally in (("to the guest", self.to_guest), ("to the host", self.to_host)):
                found[f"datagrams lost {name}"] = tally.lost
                found[f"datagrams changed {name}"] = tally.changed
            found["datagrams more one way"] = abs(self.to_guest.sent - self.to_host.sent)
            counters = [endpoint.counters() for endpoint in self.endpoints]
            found["datagrams repeated"] = sum(c.repeated for c in counters)
            found["checksums wrong"] = sum(c.bad_checksum for c in counters)
            stats = [pair.stats() for pair in self._pairs]
            found["driver errors"] = sum(s.rx_errors + s.tx_errors for s in stats)
            link = self._side.counters()
            found["frames that the tap dropped"] = link.tx_dropped + link.rx_dropped
            found["frames between driver and tap unaccounted for"] = self._difference()
        return [f"{count} {what}" for what, count in found.items() if count]

    def _difference(self) -> int:
        """Return how many frames tap and driver disagree about, once they had time to agree."""
        deadline = time.monotonic() + PATIENCE
        while True:
            link = self._side.counters()
            stats = [pair.stats() for pair in self._pairs]
            out = abs(sum(s.tx_frames for s in stats) - link.rx_packets)
            into = abs(sum(s.rx_frames for s in stats) - link.tx_packets)
            if not out + into or time.monotonic() > deadline:
                return out + into
            time.sleep(0.01)


class _Exchange:
    """An exchange as a loop that can be stopped."""

    def __init__(self, traffic: Traffic, progress: Progress | None) -> None:
        self._traffic = traffic
        self._progress = progress
        self._stop = threading.Event()

    def run(self) -> None:
        """Exchange."""
        self._traffic.exchange(_ENDLESS, self._progress, self._stop)

    def stop(self) -> None:
        """End it early."""
        self._stop.set()


class _Lane:
    """The stream of one pair, both ways, and how far it is."""

    def __init__(
        self,
        stream: Stream,
        endpoint: Endpoint,
        senders: dict[int, socket],
        receiver: StreamReceiver,
    ) -> None:
        self._stream = stream
        self._endpoint = endpoint
        self._senders = senders
        self._receiver = receiver
        self._position = 0

    def window(self, count: int, tally: Tally) -> bool:
        """Exchange `count` datagrams each way; False if they stopped coming."""
        start, end = self._position, self._position + count
        self._endpoint.goal = end
        for k in range(start, end):
            payload = self._stream.payload(k)
            self._senders[self._stream.version(k)].send(payload)
            tally.sent += 1
            tally.bytes += len(payload)
        self._position = end
        flowing = self._receiver.receive(end)
        return self._endpoint.wait_received(end, PATIENCE) and flowing
