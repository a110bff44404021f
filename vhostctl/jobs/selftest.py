"""Wire a tap to vhost-net in a fresh namespace and prove it with the host's own traffic."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from socket import socket

from vhostctl.abi import virtio
from vhostctl.control.netsetup import LinkSettings
from vhostctl.control.plan import Step
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import CheckFailed, InvalidArgument
from vhostctl.guest.endpoint import Endpoint, Peer
from vhostctl.guest.streams import Stream
from vhostctl.host.module import kernel_release
from vhostctl.jobs.hosttraffic import PATIENCE, WINDOW, HostSockets, StreamReceiver, Tally
from vhostctl.jobs.running import Running
from vhostctl.jobs.wire import Wire, WireConfig

HOST = {4: "192.0.2.1", 6: "2001:db8::1"}
GUEST = {4: "192.0.2.2", 6: "2001:db8::2"}
GUEST_MAC = bytes.fromhex("020000000002")
_MTU = 1500
_TO_GUEST, _TO_HOST, _FROM_GUEST = 7000, 7100, 7200  # UDP ports, plus the pair's number
_PING_SIZES = [0, 1, 56, 1000, _MTU - 48]
_BUFFER_SIZE = 512  # long frames take several buffers, so that chains and merging are at work
_TRIES_A_PAIR = 100

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class SelftestReport:
    """What a selftest saw. Frames and bytes of the streams are UDP datagrams and payload.

    `problems` is empty if every frame was accounted for.
    """

    device: str
    kernel: str
    queues: int
    queue_size: int
    features: list[str]
    header_size: int
    bring_up_seconds: float
    traffic_seconds: float
    to_guest: Tally
    to_host: Tally
    pings: int
    arp: int
    neighbour: int
    kicks: int
    calls: int
    problems: list[str] = field(default_factory=list)


def wire_config(session: SessionConfig) -> WireConfig:
    """Return the wiring that the selftest makes for `session`."""
    addresses = (f"{HOST[4]}/24", f"{HOST[6]}/64")
    return WireConfig(session, LinkSettings(addresses, mtu=_MTU), buffer_size=_BUFFER_SIZE)


def plan(session: SessionConfig) -> list[Step]:
    """Return the steps of bring-up, untaken."""
    return list(Wire(wire_config(session)).plan())


def selftest(
    session: SessionConfig, frames: int, progress: Progress | None = None
) -> SelftestReport:
    """Run the whole test: `frames` datagrams each way, spread over the queue pairs.

    `progress` is called with the number of datagrams that went both ways since the last
    call. Raises KernelError and the like if bring-up fails; what traffic shows is in the
    report.
    """
    if frames < 1:
        raise InvalidArgument(f"{frames} frames", hint="send at least one")
    with Wire(wire_config(session)) as wire, ExitStack() as stack:
        traffic = _Traffic(wire, stack)
        started = time.perf_counter()
        pings = traffic.ping()
        traffic.exchange(frames, progress or (lambda _: None))
        seconds = time.perf_counter() - started
        return traffic.report(frames, pings, seconds)


def raise_for(report: SelftestReport) -> None:
    """Raise CheckFailed if `report` has a problem."""
    if report.problems:
        raise CheckFailed("; ".join(report.problems))


class _Traffic:
    """Endpoints on every pair, and the host's sockets that talk to them."""

    def __init__(self, wire: Wire, stack: ExitStack) -> None:
        self._wire = wire
        self._stack = stack
        self._sockets = HostSockets(wire.in_namespace)
        self._stream = Stream.for_mtu(_MTU)
        self.to_guest = Tally()
        self.to_host = Tally()
        self._endpoints = [
            stack.enter_context(Endpoint(pair, GUEST_MAC, GUEST[4], GUEST[6]))
            for pair in wire.driver.pairs
        ]

    def _running(self) -> ExitStack:
        stack = ExitStack()
        try:
            for index, endpoint in enumerate(self._endpoints):
                stack.enter_context(Running(endpoint, f"vhostctl-guest-{index}"))
        except BaseException:
            stack.close()
            raise
        return stack

    def ping(self) -> int:
        """Resolve and ping the guest over IPv4 and IPv6; return how many answers came."""
        with self._running():
            return sum(
                self._sockets.ping(version, GUEST[version], _PING_SIZES) for version in GUEST
            )

    def exchange(self, frames: int, progress: Progress) -> None:
        """Send `frames` datagrams each way over all pairs, one pair after the other."""
        pairs = len(self._endpoints)
        senders = self._steer()
        mac = bytes.fromhex(self._wire.link_state().mac.replace(":", ""))
        for index, endpoint in enumerate(self._endpoints):
            endpoint.expect(self._stream, _TO_GUEST)
            endpoint.generate(
                self._stream, Peer(mac, _TO_HOST + index, HOST[4], HOST[6]), _FROM_GUEST + index
            )
        with self._running():
            for index in range(pairs):
                share = frames // pairs + (index < frames % pairs)
                if not self._exchange_pair(index, share, senders[index], progress):
                    break

    def _steer(self) -> list[dict[int, socket]]:
        """Return for every pair sockets whose datagrams the tap puts into that pair's ring.

        A tap picks the queue by a hash of the flow that only it knows, so ports are tried
        until the echo has shown a flow of each family for every pair.
        """
        found: list[dict[int, socket]] = [{} for _ in self._endpoints]
        with self._running():
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
        before = [endpoint.counters().echo for endpoint in self._endpoints]
        candidate.send(b"which queue?")
        try:
            candidate.recv(64)
        except BlockingIOError:
            raise CheckFailed(f"no UDP echo over IPv{version} within {PATIENCE} s") from None
        for index, endpoint in enumerate(self._endpoints):
            if endpoint.counters().echo > before[index] and version not in found[index]:
                found[index][version] = candidate
                return
        candidate.close()

    def _exchange_pair(
        self, index: int, count: int, senders: dict[int, socket], progress: Progress
    ) -> bool:
        """Exchange `count` datagrams each way; False if they stopped coming."""
        endpoint, stream = self._endpoints[index], self._stream
        flowing = True
        with ExitStack() as stack:
            sockets = {
                version: stack.enter_context(
                    self._sockets.receiver(version, HOST[version], _TO_HOST + index)
                )
                for version in HOST
            }
            receiver = StreamReceiver(stream, sockets, self.to_host)
            for start in range(0, count, WINDOW):
                end = min(count, start + WINDOW)
                endpoint.goal = end
                for k in range(start, end):
                    payload = stream.payload(k)
                    senders[stream.version(k)].send(payload)
                    self.to_guest.sent += 1
                    self.to_guest.bytes += len(payload)
                flowing = receiver.receive(end) and endpoint.wait_received(end, PATIENCE)
                progress(2 * (end - start))
                if not flowing:
                    break
        counters = endpoint.counters()
        self.to_guest.frames += counters.received
        self.to_guest.changed += counters.changed
        self.to_host.sent += counters.sent
        return flowing

    def report(self, frames: int, pings: int, seconds: float) -> SelftestReport:
        """Settle the accounts and say what was seen; the endpoints run on for late frames."""
        wire, session = self._wire, self._wire.session
        with self._running():
            problems = self._problems(frames, pings)
        counters = [endpoint.counters() for endpoint in self._endpoints]
        stats = [pair.stats() for pair in wire.driver.pairs]
        return SelftestReport(
            device=session.config.device,
            kernel=kernel_release(),
            queues=session.config.queues,
            queue_size=session.config.queue_size,
            features=virtio.feature_names(session.features),
            header_size=session.negotiated.header_size,
            bring_up_seconds=wire.bring_up,
            traffic_seconds=seconds,
            to_guest=self.to_guest,
            to_host=self.to_host,
            pings=pings,
            arp=sum(c.arp for c in counters),
            neighbour=sum(c.neighbour for c in counters),
            kicks=sum(s.rx_kicks + s.tx_kicks for s in stats),
            calls=sum(s.rx_calls + s.tx_calls for s in stats),
            problems=problems,
        )

    def _problems(self, frames: int, pings: int) -> list[str]:
        wire = self._wire
        found: dict[str, int] = {"pings unanswered": 2 * len(_PING_SIZES) - pings}
        for name, tally in (("to the guest", self.to_guest), ("to the host", self.to_host)):
            found[f"datagrams lost {name}"] = tally.lost
            found[f"datagrams changed {name}"] = tally.changed
            found[f"datagrams not sent {name}"] = frames - tally.sent
        counters = [endpoint.counters() for endpoint in self._endpoints]
        found["datagrams repeated"] = sum(c.repeated for c in counters)
        found["checksums wrong"] = sum(c.bad_checksum for c in counters)
        found["ring errors"] = sum(wire.session.ring_errors())
        stats = [pair.stats() for pair in wire.driver.pairs]
        found["driver errors"] = sum(s.rx_errors + s.tx_errors for s in stats)
        link = wire.counters()
        found["frames that the tap dropped"] = link.tx_dropped + link.rx_dropped
        found["frames between driver and tap unaccounted for"] = self._difference()
        return [f"{count} {what}" for what, count in found.items() if count]

    def _difference(self) -> int:
        """Return how many frames tap and driver disagree about, once they had time to agree."""
        deadline = time.monotonic() + PATIENCE
        while True:
            link = self._wire.counters()
            stats = [pair.stats() for pair in self._wire.driver.pairs]
            out = abs(sum(s.tx_frames for s in stats) - link.rx_packets)
            into = abs(sum(s.rx_frames for s in stats) - link.tx_packets)
            if not out + into or time.monotonic() > deadline:
                return out + into
            time.sleep(0.01)
