"""Move a running wiring from device to device, each in a process of its own, under traffic."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import CheckFailed, InvalidArgument
from vhostctl.jobs.hosttraffic import Tally
from vhostctl.jobs.migrant import Migrant, Possessions
from vhostctl.jobs.running import Running
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.traffic import Progress, Traffic
from vhostctl.jobs.wire import Wire

_LOOK = 0.5  # seconds between two looks at traffic that stands still


@dataclass(frozen=True, slots=True)
class Hop:
    """One move: from the moment the rings were told to stop to the moment they ran again.

    `bases` is where they stood, `undelivered` how many frames the old device kept.
    """

    source: str
    target: str
    down_ms: float
    bases: tuple[int, ...]
    undelivered: int


@dataclass(frozen=True, slots=True)
class MigrateReport:
    """What came of the moves; `problems` is empty if every frame was accounted for."""

    queues: int
    features: tuple[str, ...]
    hops: tuple[Hop, ...]
    to_guest: Tally
    to_host: Tally
    problems: list[str] = field(default_factory=list)


class _Meter:
    """How far the traffic is, for a thread that waits for it."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._changed = threading.Condition()
        self._done = 0.0

    def add(self, count: float) -> None:
        with self._changed:
            self._done += count
            self._changed.notify_all()
        if self._progress is not None:
            self._progress(count)

    def wait(self, count: float, running: Running) -> bool:
        """Wait until so many more have gone; False if the traffic has ended before."""
        with self._changed:
            until = self._done + count
            while self._done < until:
                if not self._changed.wait(_LOOK) and not running.alive:
                    return False
        return True


def migrate(
    config: SessionConfig, devices: Sequence[str], frames: int, progress: Progress | None = None
) -> MigrateReport:
    """Wire a tap on the first of `devices`, move to each of the others, and come to the last.

    The guest stays in this process, and so does the first session; every other device is
    served by a process of its own. `frames` datagrams go each way before the first move and
    after each; they do not pause for one. Raises as the selftest does, and CheckFailed for
    what another process has to say; what traffic shows is in the report.
    """
    if len(devices) < 2:
        raise InvalidArgument("a move needs two devices", hint="name them in their order")
    if frames < 1:
        raise InvalidArgument(f"{frames} frames", hint="send at least one")
    config = replace(config, device=devices[0])
    hops: list[Hop] = []
    with ExitStack() as stack:
        wire = stack.enter_context(Wire(wire_config(config)))
        traffic = stack.enter_context(Traffic(wire, wire.driver.pairs))
        traffic.ping()
        meter = _Meter(progress)
        migrants = stack.enter_context(ExitStack())  # they serve until the traffic has ended
        with traffic.in_background(meter.add) as running:
            flowing = meter.wait(2 * frames, running)
            source: Migrant | None = None
            for before, device in itertools.pairwise(devices):
                if not flowing:
                    break
                source, hop = _hop(migrants, wire, source, before, device)
                hops.append(hop)
                flowing = meter.wait(2 * frames, running)
        found = {
            "frames kept by a device": sum(hop.undelivered for hop in hops),
            "ring errors": sum(wire.session.ring_errors()),
            "moves not made": len(devices) - 1 - len(hops),
        }
        problems = traffic.problems() + [f"{n} {what}" for what, n in found.items() if n]
        return MigrateReport(
            queues=config.queues,
            features=wire.session.snapshot().features,
            hops=tuple(hops),
            to_guest=traffic.to_guest,
            to_host=traffic.to_host,
            problems=problems,
        )


def _hop(
    stack: ExitStack, wire: Wire, source: Migrant | None, before: str, device: str
) -> tuple[Migrant, Hop]:
    """Move the rings from `source`, None for this process's session, to `device`."""
    possessions = Possessions.of(wire.session)
    # All that takes long comes before the rings stop.
    target = stack.enter_context(Migrant(wire.session.snapshot(), device, possessions))
    if source is None:
        stopped, snapshot = time.monotonic_ns(), wire.session.suspend()
    else:
        stopped, snapshot = source.suspend()
    bases = tuple(ring.base for ring in snapshot.rings)
    started = target.start(snapshot)
    if source is not None:
        source.close()
    down = (started - stopped) / 1e6
    return target, Hop(before, device, down, bases, snapshot.undelivered)


def raise_for(report: MigrateReport) -> None:
    """Raise CheckFailed if `report` has a problem."""
    if report.problems:
        raise CheckFailed("; ".join(report.problems))
