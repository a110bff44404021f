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
from vhostctl.jobs.hosttraffic import PATIENCE, Tally
from vhostctl.jobs.migrant import Migrant, Possessions
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.traffic import Progress, Traffic
from vhostctl.jobs.wire import Wire

_ENDLESS = 1 << 62


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

    def wait(self, count: float) -> None:
        """Wait until so many more have gone."""
        with self._changed:
            until = self._done + count
            while self._done < until:
                before = self._done
                if not self._changed.wait(2 * PATIENCE) and self._done == before:
                    raise CheckFailed(f"traffic stopped after {self._done:.0f} datagrams")


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
    config = replace(config, device=devices[0])
    hops: list[Hop] = []
    with ExitStack() as stack:
        wire = stack.enter_context(Wire(wire_config(config)))
        traffic = stack.enter_context(Traffic(wire, wire.driver.pairs))
        traffic.ping()
        meter = _Meter(progress)
        migrants = stack.enter_context(ExitStack())  # they serve until the traffic has ended
        with traffic.in_background(_ENDLESS, meter.add):
            meter.wait(2 * frames)
            source: Migrant | None = None
            for before, device in itertools.pairwise(devices):
                source, hop = _hop(migrants, wire, source, before, device)
                hops.append(hop)
                meter.wait(2 * frames)
        kept = sum(hop.undelivered for hop in hops)
        problems = traffic.problems() + [f"{kept} frames kept by a device"] * bool(kept)
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
    started = target.start(bases)
    if source is not None:
        source.close()
    down = (started - stopped) / 1e6
    return target, Hop(before, device, down, bases, snapshot.undelivered)


def raise_for(report: MigrateReport) -> None:
    """Raise CheckFailed if `report` has a problem."""
    if report.problems:
        raise CheckFailed("; ".join(report.problems))
