"""Everything that can be changed of a running session, changed over and over under load.

Numbered, checksummed datagrams go both ways all the while, as fast as both ends take them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.precopy import Precopy
from tests.system.test_dirty_log import Layout
from vhostctl.control.session import Session
from vhostctl.control.wiring import SessionConfig
from vhostctl.host.memory import MappedRegion
from vhostctl.host.vhost import DEFAULT_PATH, ENGINE
from vhostctl.jobs.migrate import migrate
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.traffic import Traffic
from vhostctl.jobs.wire import Wire

pytestmark = pytest.mark.usefixtures("nothing_left")

MIRROR = "/dev/vhost-net-mirror"
FAR = 0x100_0000_0000  # where memory is added: far above the rings'
LEAST = 3  # changes, however slow the machine is
PAUSE = 0.02  # seconds between two changes, for some datagrams to pass


class Load:
    """A wiring with traffic that another thread keeps up."""

    def __init__(self, wire: Wire, traffic: Traffic, seconds: float) -> None:
        self.wire = wire
        self.session: Session = wire.session
        self.traffic = traffic
        self.turn = 0
        self._seconds = seconds

    def turns(self) -> Iterator[int]:
        """Count until the time is over, with a pause for traffic before each turn."""
        deadline = time.monotonic() + self._seconds
        for turn in itertools.count():
            if turn > LEAST and time.monotonic() > deadline:
                return
            time.sleep(PAUSE)
            self.turn = turn
            yield turn


Loaded = Callable[..., AbstractContextManager[Load]]


@pytest.fixture
def loaded(device: str, seconds: float) -> Loaded:
    @contextmanager
    def load(queues: int = 1, queue_size: int = 256) -> Iterator[Load]:
        config = wire_config(SessionConfig(device=device, queues=queues, queue_size=queue_size))
        with Wire(config) as wire, Traffic(wire, wire.driver.pairs) as traffic:
            made = Load(wire, traffic, seconds)
            with traffic.in_background():
                yield made
            assert made.turn >= LEAST
            assert traffic.problems() == []
            assert wire.session.ring_errors() == [0] * 2 * queues
            assert traffic.to_guest.sent == traffic.to_host.sent > 0
            print(f"{traffic.to_guest.sent} datagrams each way, {made.turn} turns")

    return load


def test_memory_comes_and_goes(loaded: Loaded) -> None:
    with loaded(queues=2) as load, ExitStack() as mapped:
        for turn in load.turns():
            size = (turn % 7 + 1) << 20
            region = mapped.enter_context(MappedRegion.anonymous(FAR, size, f"dimm{turn}"))
            load.session.memory.add(region)
            time.sleep(PAUSE)
            load.session.memory.remove(region)
            region.close()


def test_calls_are_masked_and_unmasked(loaded: Loaded) -> None:
    with loaded(queues=2) as load:
        for turn in load.turns():
            queue = turn % len(load.session.queues)
            load.session.mask(queue)
            time.sleep(PAUSE / 4)
            load.session.unmask(queue)


def test_the_link_goes_down_and_up(loaded: Loaded) -> None:
    with loaded(queues=2) as load:
        for _ in load.turns():
            load.session.set_link(False)
            time.sleep(PAUSE / 4)
            load.session.set_link(True)


def test_single_rings_stop_and_start(loaded: Loaded) -> None:
    with loaded(queues=2) as load:
        for turn in load.turns():
            queue = turn % len(load.session.queues)
            base = load.session.stop_ring(queue)
            load.session.start_ring(queue, base)


def test_the_worker_polls_longer_and_shorter(loaded: Loaded) -> None:
    with loaded() as load:
        for turn in load.turns():
            load.session.set_busyloop(turn % 3 * 50)


def test_the_whole_session_stops_and_starts(loaded: Loaded) -> None:
    with loaded(queues=2) as load:
        for turn in load.turns():
            bases = load.session.stop()
            load.session.start(bases if turn % 2 else None)
            load.session.kick()


def test_a_copy_of_memory_is_completed_from_the_log(loaded: Loaded) -> None:
    with loaded(queue_size=1024) as load:
        session = load.session
        pages = Layout.of(load.wire).device_pages()
        session.start_log()
        copy = Precopy(session.memory.table, _SessionLog(session))
        copied = [copy.round() for _ in load.turns()]
        bases = session.stop()
        copied.append(copy.finish())
        wrong = copy.differences(pages)
        session.start(bases)
        session.kick()
    assert wrong == []
    assert sum(copied) > 0
    print(f"{len(copied)} rounds, {sum(copied)} pages")


class _SessionLog:
    """The log of a session, as a copy uses it."""

    def __init__(self, session: Session) -> None:
        self.sync = session.sync_log
        self.stop = session.stop_log


def test_migration_from_device_to_device(device: str, seconds: float) -> None:
    mirror = MIRROR if Path(MIRROR).exists() else ENGINE
    kernel = DEFAULT_PATH if Path(DEFAULT_PATH).exists() else device
    way = [kernel, mirror, ENGINE, kernel]
    deadline = time.monotonic() + seconds
    while True:
        report = migrate(SessionConfig(queues=2), way, 500)
        assert report.problems == []
        assert report.to_guest.sent == report.to_host.sent >= 2000
        print(report.hops)
        if time.monotonic() > deadline:
            break
