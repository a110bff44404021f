"""Everything that can be changed of a running session, changed over and over under load.

Numbered datagrams fill every pair both ways all the while: each one arrives once and unchanged,
or is counted by who dropped it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.load import Load
from tests.support.precopy import Precopy, SessionLog, completed
from tests.system.conftest import until
from vhostctl.host.memory import MappedRegion
from vhostctl.host.netns import NetNamespace
from vhostctl.host.vhost import DEFAULT_PATH, ENGINE
from vhostctl.jobs.migrant import Migrant, Possessions

pytestmark = pytest.mark.usefixtures("nothing_left")

MIRROR = "/dev/vhost-net-mirror"
FAR = 0x100_0000_0000  # where memory is added: far above the rings'
APART = 1 << 30  # bytes of guest address between two regions
BATCH = 64  # frames that a kernel's device takes out of the tap's queue at once
LEAST = 3  # changes, however slow the machine is
PAUSE = 0.02  # seconds between two changes


class Turns:
    """Counts changes until the time is over; frames pass on every pair before each."""

    def __init__(self, load: Load, seconds: float) -> None:
        self.load = load
        self.count = 0
        self.stopped = 0
        """How often a receive ring was stopped, which may lose a batch: see `Balance`."""
        self._seconds = seconds

    def __iter__(self) -> Iterator[int]:
        deadline = time.monotonic() + self._seconds
        for turn in itertools.count():
            if turn >= LEAST and time.monotonic() > deadline:
                return
            self.load.flow()
            time.sleep(PAUSE)
            self.count = turn + 1
            yield turn


Loaded = Callable[..., AbstractContextManager[Turns]]


@pytest.fixture
def loaded(namespace: NetNamespace, device: str, seconds: float) -> Loaded:
    @contextmanager
    def load(queues: int = 2, queue_size: int = 256) -> Iterator[Turns]:
        with Load(namespace, device, queues, queue_size) as load:
            turns = Turns(load, seconds)
            yield turns
            load.flow()
            balance = load.balance()
            print(f"{turns.count} turns; {balance}")
            assert not (problems := load.problems(balance)), "; ".join(problems)
            # The engine keeps what it has read, for the same tap's return.
            kernels = device != ENGINE or Path(DEFAULT_PATH).exists()
            assert 0 <= balance.lost_in_tap <= kernels * turns.stopped * BATCH
            assert turns.count >= LEAST

    return load


def test_memory_comes_and_goes(loaded: Loaded) -> None:
    """The last pair has its rings and buffers in what was added, and moves on before it goes."""
    with ExitStack() as mapped, loaded() as turns:  # the last region is in use until the end
        load, before = turns.load, None
        for turn in turns:
            gpa, size = FAR + turn % 2 * APART, (turn % 7 + 1) << 20
            region = mapped.enter_context(MappedRegion.memfd(gpa, size, f"dimm{turn}"))
            load.session.memory.add(region)
            load.move(1, region)
            turns.stopped += 1
            if before is not None:
                load.session.memory.remove(before)
                before.close()
            before = region


def test_calls_are_masked_and_unmasked(loaded: Loaded) -> None:
    with loaded() as turns:
        session = turns.load.session
        for turn in turns:
            queue = turn % len(session.queues)
            session.mask(queue)
            time.sleep(PAUSE / 4)
            session.unmask(queue)


def test_the_link_goes_down_and_up(loaded: Loaded) -> None:
    with loaded() as turns:
        rig, session = turns.load.rig, turns.load.session
        for _ in turns:
            session.set_link(False)
            turns.stopped += len(session.devices)
            dropped = rig.dropped()
            until(lambda: rig.dropped() > dropped, "frames are dropped")  # noqa: B023
            session.set_link(True)


def test_single_rings_stop_and_start(loaded: Loaded) -> None:
    with loaded() as turns:
        session = turns.load.session
        for turn in turns:
            queue = turn % len(session.queues)
            base = session.stop_ring(queue)
            turns.stopped += queue % 2 == 0
            session.start_ring(queue, base)


def test_the_worker_polls_longer_and_shorter(loaded: Loaded) -> None:
    with loaded() as turns:
        for turn in turns:
            turns.load.session.set_busyloop(turn % 3 * 50)


def test_the_whole_session_stops_and_starts(loaded: Loaded) -> None:
    with loaded() as turns:
        session = turns.load.session
        for turn in turns:
            bases = session.stop()
            turns.stopped += len(session.devices)
            session.start(bases if turn % 2 else None)
            session.kick()


def test_a_copy_of_memory_is_completed_from_the_log(loaded: Loaded) -> None:
    with loaded(queues=1, queue_size=1024) as turns:
        load = turns.load
        load.session.start_log()
        copy = Precopy(load.session.memory.table, SessionLog(load.session))
        copied = [copy.round() for _ in turns]
        load.flow()
        pages, wrong = completed(load, copy)
        turns.stopped += 1
    assert wrong == []
    assert sum(copied) > 0 < pages
    print(f"{len(copied)} rounds, {sum(copied)} pages, {pages} in the end")


def test_migration_from_device_to_device(loaded: Loaded, device: str) -> None:
    mirror = MIRROR if Path(MIRROR).exists() else ENGINE
    kernel = DEFAULT_PATH if Path(DEFAULT_PATH).exists() else device
    way = itertools.cycle([mirror, ENGINE, kernel])
    with ExitStack() as migrants, loaded() as turns:  # the last one serves until the end
        load, before = turns.load, None
        for _, target in zip(turns, way, strict=False):
            before = hop(load, migrants, before, target)
            turns.stopped += len(load.session.devices)
        assert load.undelivered == 0


def hop(load: Load, stack: ExitStack, source: Migrant | None, target: str) -> Migrant:
    """Move the rings from `source`, None for this process's session, to a process of `target`."""
    session = load.session
    # All that takes long comes before the rings stop.
    migrant = Migrant(session.snapshot(), target, Possessions.of(session))
    stack.enter_context(migrant)
    if source is None:
        stopped, snapshot = time.monotonic_ns(), session.suspend()
    else:
        stopped, snapshot = source.suspend()
    started = migrant.start(snapshot)
    if source is not None:
        source.close()
    load.undelivered += snapshot.undelivered
    print(f"to {target}: down for {(started - stopped) / 1e6:.1f} ms")
    return migrant
