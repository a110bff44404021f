"""Translating mode on a real device: misses answered, mappings withdrawn under load."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.translated import FEATURES, GPAS, IOVA, PAGE, Traffic, Translated
from tests.system.conftest import until
from vhostctl.control.memtable import MemoryTable
from vhostctl.errors import KernelError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.vhost import RX, TX
from vhostctl.jobs.hosttraffic import WINDOW
from vhostctl.jobs.running import Running

pytestmark = pytest.mark.usefixtures("nothing_left")

TURNS = 300
NOTHING = [0] * 7
FRAME = bytes.fromhex("ffffffffffff020000000002 88b5") + bytes(46)
RINGS = {RX: "receive", TX: "transmit"}


def more(traffic: Traffic, running: Running, windows: int = 2) -> None:
    """Wait until that many windows more have been exchanged."""
    goal = traffic.windows + windows

    def reached() -> bool:
        running.check()
        return traffic.windows >= goal

    until(reached, f"window {goal}", 60)


@pytest.mark.parametrize("mapped", [0, PAGE])
def test_all_traffic_is_translated(device: str, mapped: int) -> None:
    with Translated(device, mapped=mapped) as rig, Traffic(rig) as traffic:
        for _ in range(30):
            traffic.exchange()
        assert traffic.problems() == NOTHING
        seen = rig.iotlb.counters()
        assert seen.misses == seen.answered > 0
        assert (seen.unanswered, seen.refused, rig.iotlb.missing()) == (0, 0, [])
        assert rig.ring_errors() == 0
        if mapped:  # the rings alone have ten pages
            assert seen.misses > 10


def test_a_ring_does_not_start_unprimed_and_starts_after_its_miss(device: str) -> None:
    with Translated(device) as rig:
        rig.device.set_backend(TX, None)
        page = rig.rings[TX].used & -PAGE
        rig.iotlb.unmap(page, PAGE)
        with pytest.raises(KernelError, match="Bad address"):
            rig.device.set_backend(TX, rig.tap.queues[0].fileno())
        until(lambda: [m.iova for m in rig.iotlb.missing()] == [page], "miss of the used ring")
        rig.map(page)
        rig.device.set_backend(TX, rig.tap.queues[0].fileno())
        with Traffic(rig) as traffic:
            traffic.exchange()


def withdraw(rig: Translated, turn: int, start: int, size: int) -> None:
    """Unmap and map at once; on odd turns map only after the miss came."""
    before = rig.iotlb.counters()
    rig.iotlb.unmap(start, size)
    if turn % 2:
        until(lambda: rig.iotlb.counters().unanswered > before.unanswered, "a miss in vain")
    rig.map(start, size)
    until(lambda: rig.iotlb.counters().misses > before.misses, "a miss")


def turns(seconds: float) -> Iterator[int]:
    """Count to TURNS, and on until the time is over."""
    deadline = time.monotonic() + seconds
    for turn in itertools.count():
        if turn >= TURNS and time.monotonic() > deadline:
            return
        yield turn


def test_pages_are_withdrawn_under_load(device: str, seconds: float) -> None:
    rng = random.Random(1)  # noqa: S311 -- no secret
    with Translated(device, mapped=PAGE) as rig, Traffic(rig) as traffic:
        rings = [at & -PAGE for ring in rig.rings for at in (ring.desc, ring.avail, ring.used)]
        with Running(traffic, "traffic") as running:
            for turn in turns(seconds):
                running.check()
                withdraw(rig, turn, rng.choice(rings), PAGE)
                page = rng.choice(rig.pages())
                rig.iotlb.unmap(page, PAGE)
                rig.map(page)
            more(traffic, running)
        assert traffic.problems() == NOTHING
        seen = rig.iotlb.counters()
        assert seen.invalidated == 2 * (turn + 1)
        assert seen.misses == seen.answered + seen.unanswered > TURNS
        assert (seen.refused, rig.ring_errors()) == (0, 0)


def test_everything_is_withdrawn_under_load(device: str) -> None:
    with Translated(device) as rig, Traffic(rig) as traffic:
        with Running(traffic, "traffic") as running:
            for turn in range(TURNS):
                running.check()
                withdraw(rig, turn, IOVA, 2 * rig.half)
            more(traffic, running)
        assert traffic.problems() == NOTHING
        assert rig.ring_errors() == 0


@pytest.mark.parametrize("ring", RINGS, ids=RINGS.get)
@pytest.mark.parametrize("part", ["desc", "avail", "used", "buffers"])
def test_traffic_resumes_once_a_withdrawn_page_is_back(device: str, ring: int, part: str) -> None:
    with Translated(device) as rig, Traffic(rig) as traffic:
        if part == "buffers":
            start, size = rig.buffers(ring)
        else:
            start, size = rig.rings[ring].parts()[part][0] & -PAGE, PAGE
        with Running(traffic, "traffic") as running:
            more(traffic, running)
            rig.iotlb.unmap(start, size)
            until(lambda: bool(rig.iotlb.missing()), "a miss")
            assert all(start <= miss.iova < start + size for miss in rig.iotlb.missing())
            rig.map(start, size)
            more(traffic, running)
        assert traffic.problems() == NOTHING
        assert rig.iotlb.counters().unanswered > 0
        assert (rig.iotlb.missing(), rig.ring_errors()) == ([], 0)


def anonymous() -> int:
    """Return the bytes of this process's own memory that are there."""
    line = next(
        text for text in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in text
    )
    return int(line.split()[1]) << 10


def test_more_mappings_than_the_iotlb_holds(device: str) -> None:
    entries = 2048  # vhost's max_iotlb_entries
    size = 1024
    with (
        Translated(device, size=size, buffer_size=8192, mapped=PAGE) as rig,
        Traffic(rig) as traffic,
    ):
        held: list[int] = []
        for turn in range(4):
            asked = rig.iotlb.counters().misses
            for _ in range(size // WINDOW):  # every receive buffer once
                traffic.exchange()
            if turn:
                assert rig.iotlb.counters().misses - asked >= entries
                held.append(anonymous())
        assert traffic.problems() == NOTHING
        seen = rig.iotlb.counters()
        assert (seen.answered, seen.unanswered, rig.ring_errors()) == (seen.misses, 0, 0)
        # What is touched for the first time may come late; what is kept for a miss comes each turn.
        assert min(after - before for before, after in itertools.pairwise(held)) < 64 << 10, held


def test_a_loop_of_ones_own_handles_the_misses(device: str) -> None:
    with (
        Translated(device, mapped=PAGE, serve=False) as rig,
        EventFd.create() as stop,
    ):
        handled: list[int] = []

        def loop() -> None:
            poll = select.poll()
            for fd in (stop.fileno(), rig.device.fileno()):
                poll.register(fd, select.POLLIN)
            while stop.fileno() not in [fd for fd, _ in poll.poll()]:
                handled.append(rig.iotlb.handle())

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            with Traffic(rig) as traffic:
                for _ in range(10):
                    traffic.exchange()
                assert traffic.problems() == NOTHING
        finally:
            stop.signal()
            thread.join()
        assert sum(handled) == rig.iotlb.counters().answered > 0
        assert rig.iotlb.handle() == 0


def test_an_iotlb_that_features_empty_is_filled_again(device: str) -> None:
    with Translated(device) as rig, Traffic(rig) as traffic:
        with Running(traffic, "traffic") as running:
            for _ in range(TURNS):
                rig.device.set_features(FEATURES)
            more(traffic, running)
        assert traffic.problems() == NOTHING
        assert rig.iotlb.counters().unanswered == 0


def test_memory_that_goes_and_comes_back(device: str) -> None:
    with Translated(device) as rig, Traffic(rig) as traffic:
        whole = rig.table()
        for region in whole.regions:
            rest = MemoryTable(r for r in whole.regions if r is not region)
            with Running(traffic, "traffic") as running:
                more(traffic, running)
                rig.iotlb.commit(whole, rest)
                until(lambda: bool(rig.iotlb.missing()), "a miss")
                rig.iotlb.commit(rest, whole)
                more(traffic, running)
        assert traffic.problems() == NOTHING
        assert (rig.iotlb.counters().invalidated, rig.iotlb.missing()) == (2, [])


@pytest.mark.parametrize("ring", RINGS, ids=RINGS.get)
def test_a_ring_whose_miss_was_dropped_needs_a_kick(device: str, ring: int) -> None:
    """vhost drops the misses of both rings when one is stopped, so no update wakes the other."""
    with Translated(device) as rig, Traffic(rig) as traffic:
        traffic.exchange()
        with Running(traffic, "traffic") as running:
            # Without buffers, not without a ring: vhost has asked not to be kicked by then.
            rig.iotlb.unmap(*rig.buffers(ring))
            until(lambda: bool(rig.iotlb.missing()), "a miss")
            rig.device.set_backend(1 - ring, None)
            rig.attach(1 - ring)
            rig.device.set_log_fd(None)  # the worker has run whatever it was told to
            stands = rig.device.get_vring_base(ring)
            rig.map(*rig.buffers(ring))
            rig.device.set_log_fd(None)
            assert rig.device.get_vring_base(ring) == stands
            rig.events[ring][0].signal()
            more(traffic, running)
        assert traffic.problems() == NOTHING


def test_a_withdrawal_between_miss_and_update_stalls_nothing(device: str) -> None:
    with Translated(device, serve=False) as rig:

        def handled(what: Callable[[], object]) -> Callable[[], bool]:
            return lambda: rig.iotlb.handle() >= 0 and bool(what())

        start, size = rig.buffers(TX)
        rig.iotlb.unmap(start, size)
        rig.driver.pairs[0].send([FRAME] * 64)  # one may fit into a page of another ring
        until(handled(rig.iotlb.missing), "a miss that was read")
        page = rig.iotlb.missing()[0].iova
        rig.iotlb.mappings.map(page, PAGE, GPAS[0])
        rig.iotlb.unmap(page, PAGE)
        rig.map(start, size)
        until(handled(lambda: rig.device.get_vring_base(TX) == 64), "all taken, without a kick")


def test_an_interrupt_in_the_middle_leaves_nothing(device: str) -> None:
    def endless() -> None:
        with Translated(device, mapped=PAGE) as rig, Traffic(rig) as traffic:
            timer.start()
            while True:
                traffic.exchange()
                rig.iotlb.unmap(IOVA, 2 * rig.half)
                rig.map_all(PAGE)

    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        endless()
    timer.join()


def test_closing_in_the_middle_leaves_nothing(device: str) -> None:
    for _ in range(5):
        rig = Translated(device, mapped=PAGE)
        rig.driver.pairs[0].send([FRAME])
        rig.close()
