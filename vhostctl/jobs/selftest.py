"""Wire a tap to vhost-net in a fresh namespace and prove it with the host's own traffic."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vhostctl.abi import virtio
from vhostctl.control.netsetup import LinkSettings
from vhostctl.control.plan import Step
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import CheckFailed, InvalidArgument
from vhostctl.host.module import kernel_release
from vhostctl.jobs.hosttraffic import Tally
from vhostctl.jobs.traffic import ADDRESSES, MTU, PING_SIZES, Progress, Traffic
from vhostctl.jobs.wire import Wire, WireConfig

_BUFFER_SIZE = 512  # long frames take several buffers, so that chains and merging are at work


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
    return WireConfig(session, LinkSettings(ADDRESSES, mtu=MTU), buffer_size=_BUFFER_SIZE)


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
    with Wire(wire_config(session)) as wire, Traffic(wire, wire.driver.pairs) as traffic:
        started = time.perf_counter()
        traffic.ping()
        traffic.exchange(frames, progress)
        return _report(wire, traffic, frames, time.perf_counter() - started)


def raise_for(report: SelftestReport) -> None:
    """Raise CheckFailed if `report` has a problem."""
    if report.problems:
        raise CheckFailed("; ".join(report.problems))


def _report(wire: Wire, traffic: Traffic, frames: int, seconds: float) -> SelftestReport:
    """Settle the accounts and say what was seen."""
    session = wire.session
    found = {
        "pings unanswered": 2 * len(PING_SIZES) - traffic.pings,
        "datagrams not sent to the guest": frames - traffic.to_guest.sent,
        "datagrams not sent to the host": frames - traffic.to_host.sent,
        "ring errors": sum(session.ring_errors()),
    }
    problems = traffic.problems() + [f"{count} {what}" for what, count in found.items() if count]
    counters = [endpoint.counters() for endpoint in traffic.endpoints]
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
        to_guest=traffic.to_guest,
        to_host=traffic.to_host,
        pings=traffic.pings,
        arp=sum(c.arp for c in counters),
        neighbour=sum(c.neighbour for c in counters),
        kicks=sum(s.rx_kicks + s.tx_kicks for s in stats),
        calls=sum(s.rx_calls + s.tx_calls for s in stats),
        problems=problems,
    )
