"""The dirty log against devices that refuse at any request, and its pages against a model."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostctl.control.dirtylog import DirtyLog, DirtyPages
from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.errors import ClosedError, InvalidArgument, KernelError, StateError, kernel_error
from vhostctl.host.eventfd import EventFd

PAGE = 4096
GPA = 0x10_0000


def table(size: int, gpa: int = GPA) -> MemoryTable:
    return MemoryTable([GuestRegion(gpa, size, 0x7000_0000)])


class Device:
    """A pair and its vhost in one: notes requests, sets bits where it was told to."""

    def __init__(self, name: str, requests: list[tuple[str, str, object]]) -> None:
        self.name = name
        self.requests = requests
        self.vhost = self
        self.base = 0
        self.event: int | None = None
        self.logging = False
        self.end = 0
        self.fails: set[int] = set()  # counted over all devices
        self.closed = False

    def _note(self, request: str, argument: object) -> None:
        self.requests.append((self.name, request, argument))
        if self.closed:
            raise ClosedError(f"{self.name} is closed")

    def _may_fail(self) -> None:
        if len(self.requests) - 1 in self.fails:
            raise kernel_error(errno.EFAULT, self.requests[-1][1], self.name)

    def set_log_base(self, hva: int) -> None:
        self._note("base", hva)
        self.base = hva  # also where it fails: one ring may have taken it
        self._may_fail()

    def set_log_fd(self, eventfd: int | None) -> None:
        self._note("fd", eventfd)
        self._may_fail()
        self.event = eventfd

    def set_logging(self, enabled: bool) -> None:
        self._note("logging", enabled)
        self._may_fail()
        self.logging = enabled

    def log_end(self) -> int:
        return self.end

    def write(self, gpa: int) -> None:
        """Log a write to the page at `gpa`, as a worker does."""
        if self.logging:
            assert self.base
            byte = ctypes.c_uint8.from_address(self.base + gpa // (8 * PAGE))
            byte.value |= 1 << gpa // PAGE % 8


class Machine:
    """Two devices, their log, and every request in its order."""

    def __init__(self, size: int = 64 * PAGE) -> None:
        self.requests: list[tuple[str, str, object]] = []
        self.devices = [Device(name, self.requests) for name in "ab"]
        self.event = EventFd.create()
        self.log = DirtyLog(self.devices, table(size), self.event)

    def names(self) -> list[str]:
        return [f"{device} {request}" for device, request, _ in self.requests]

    def fail_at(self, *requests: int) -> None:
        for device in self.devices:
            device.fails = set(requests)

    def close(self) -> None:
        self.fail_at()
        self.log.close()
        self.event.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def test_the_log_has_its_base_before_anybody_logs(machine: Machine) -> None:
    machine.log.start()
    names = ["a base", "a fd", "b base", "b fd", "a logging", "b logging"]
    assert machine.names() == names
    assert machine.devices[0].base == machine.devices[1].base
    assert {device.event for device in machine.devices} == {machine.event.fileno()}


def test_nobody_logs_any_more_when_the_base_goes(machine: Machine) -> None:
    machine.log.start()
    machine.requests.clear()
    machine.log.stop()
    assert machine.names() == ["b logging", "a logging", "b base", "b fd", "a base", "a fd"]
    for device in machine.devices:
        assert (device.logging, device.base, device.event) == (False, 0, None)
    assert not machine.log.started


def test_a_page_is_reported_once_and_by_whoever_wrote_it(machine: Machine) -> None:
    machine.log.start()
    assert not machine.log.sync()
    machine.devices[0].write(GPA)
    machine.devices[1].write(GPA + 5 * PAGE)
    assert list(machine.log.sync()) == [(GPA, PAGE), (GPA + 5 * PAGE, PAGE)]
    assert not machine.log.sync()
    assert not machine.log.sync()
    machine.devices[0].write(GPA + PAGE)
    assert list(machine.log.stop()) == [(GPA + PAGE, PAGE)]
    machine.log.start()
    assert not machine.log.stop()


def test_a_sync_moves_every_device_before_it_reads(machine: Machine) -> None:
    machine.log.start()
    first = machine.devices[0].base
    machine.requests.clear()
    machine.log.sync()
    assert machine.names() == ["a base", "b base"]
    assert machine.devices[0].base == machine.devices[1].base != first


@pytest.mark.parametrize("failing", range(6))
def test_a_start_that_fails_leaves_all_as_it_was(machine: Machine, failing: int) -> None:
    machine.fail_at(failing)
    with pytest.raises(KernelError):
        machine.log.start()
    for device in machine.devices:
        assert (device.logging, device.base, device.event) == (False, 0, None)
    assert not machine.log.started
    machine.log.start()
    assert machine.log.started


def test_a_start_on_a_device_that_refuses_it_all_names_the_first_refusal(machine: Machine) -> None:
    machine.devices[1].closed = True
    with pytest.raises(ClosedError, match="b is closed"):
        machine.log.start()
    assert machine.devices[0].base == 0
    assert not machine.log.started


def test_what_fails_while_undoing_is_a_note(machine: Machine) -> None:
    machine.fail_at(5, 6)  # to switch b on, and then off
    with pytest.raises(KernelError) as caught:
        machine.log.start()
    assert "while undoing" in caught.value.__notes__[0]
    assert [device.base for device in machine.devices] == [0, 0]
    assert not machine.log.started


@pytest.mark.parametrize("failing", range(2))
def test_a_sync_that_fails_loses_nothing(machine: Machine, failing: int) -> None:
    machine.log.start()
    for page, device in enumerate(machine.devices):
        device.write(GPA + page * PAGE)
    machine.fail_at(len(machine.requests) + failing)
    with pytest.raises(KernelError):
        machine.log.sync()
    for page, device in enumerate(machine.devices):
        device.write(GPA + (4 + page) * PAGE)
    found = machine.log.sync() | machine.log.sync()
    assert list(found) == [(GPA, 2 * PAGE), (GPA + 4 * PAGE, 2 * PAGE)]


@pytest.mark.parametrize("failing", range(6))
def test_a_stop_that_fails_tells_the_others_and_can_be_tried_again(
    machine: Machine, failing: int
) -> None:
    machine.log.start()
    machine.devices[0].write(GPA)
    machine.devices[1].write(GPA + PAGE)
    start = len(machine.requests)
    machine.fail_at(start + failing)
    with pytest.raises(KernelError):
        machine.log.stop()
    assert len(machine.requests) - start >= 5  # an eventfd waits for the base of its device
    assert machine.log.started
    assert list(machine.log.stop()) == [(GPA, 2 * PAGE)]
    assert [device.logging for device in machine.devices] == [False, False]


def test_a_device_that_is_closed_does_not_keep_the_log(machine: Machine) -> None:
    machine.log.start()
    machine.devices[0].write(GPA)
    machine.devices[0].closed = True
    assert list(machine.log.stop()) == [(GPA, PAGE)]


def test_the_log_covers_the_table_and_the_rings(machine: Machine) -> None:
    machine.devices[1].end = 1000 * PAGE  # above the table
    machine.log.start()
    machine.devices[1].write(999 * PAGE)
    assert list(machine.log.stop()) == [(999 * PAGE, PAGE)]


def test_the_log_grows_before_the_table_and_keeps_what_it_has(machine: Machine) -> None:
    machine.log.start()
    machine.devices[0].write(GPA)
    small = machine.devices[0].base
    larger = table(1 << 30)
    machine.log.commit(table(64 * PAGE), larger)
    assert machine.devices[0].base == machine.devices[1].base != small
    machine.devices[0].write(larger.end - PAGE)
    assert list(machine.log.sync()) == [(GPA, PAGE), (larger.end - PAGE, PAGE)]
    machine.requests.clear()
    machine.log.commit(larger, table(PAGE))  # smaller: nothing to do before the devices know
    machine.log.commit(table(PAGE), larger)
    assert machine.requests == []


@pytest.mark.parametrize("failing", range(2))
def test_a_growth_that_is_refused_loses_nothing(machine: Machine, failing: int) -> None:
    machine.log.start()
    for page, device in enumerate(machine.devices):
        device.write(GPA + page * PAGE)
    machine.fail_at(len(machine.requests) + failing)
    with pytest.raises(KernelError):
        machine.log.commit(table(64 * PAGE), table(1 << 30))
    for page, device in enumerate(machine.devices):
        device.write(GPA + (4 + page) * PAGE)
    found = machine.log.sync() | machine.log.stop()
    assert list(found) == [(GPA, 2 * PAGE), (GPA + 4 * PAGE, 2 * PAGE)]


def test_between_runs_only_the_table_is_kept(machine: Machine) -> None:
    machine.log.commit(table(64 * PAGE), table(1 << 30))
    assert machine.requests == []
    machine.log.start()
    machine.devices[0].write(GPA + (1 << 30) - PAGE)
    assert machine.log.stop().count == 1


def test_a_wrong_order_is_refused(machine: Machine) -> None:
    for call in (machine.log.sync, machine.log.stop):
        with pytest.raises(StateError, match="not started; call start"):
            call()
    machine.log.start()
    with pytest.raises(StateError, match="stop it first"):
        machine.log.start()
    machine.log.close()
    machine.log.close()
    assert not machine.log.started


def test_a_log_that_cannot_be_mapped_is_refused() -> None:
    huge = MemoryTable([GuestRegion((1 << 62) - PAGE, PAGE, 0x7000_0000)])
    log = DirtyLog([], huge)
    with pytest.raises(KernelError, match="bytes of dirty log"):
        log.start()
    assert not log.started


def test_rings_that_are_not_placed_yet_are_not_logged(machine: Machine) -> None:
    def refuse(enabled: bool) -> None:  # noqa: ARG001
        raise InvalidArgument("queue 0 used is outside every memory region")

    machine.devices[0].set_logging = refuse  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match="outside"):
        machine.log.start()
    assert not machine.log.started
    assert [device.base for device in machine.devices] == [0, 0]


def model(pages: set[int]) -> list[tuple[int, int]]:
    """Page by page."""
    ranges: list[tuple[int, int]] = []
    for page in sorted(pages):
        if ranges and sum(ranges[-1]) == page:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + 1
        else:
            ranges.append((page, 1))
    return [(first * PAGE, count * PAGE) for first, count in ranges]


RUNS = st.tuples(st.integers(0, 70_000), st.one_of(st.integers(0, 30), st.integers(0, 40_000)))
SETS = st.lists(RUNS, max_size=8).map(
    lambda runs: {page for first, count in runs for page in range(first, first + count)}
)


def dirty(pages: set[int]) -> DirtyPages:
    bits = bytearray(max(pages, default=0) // 8 + 1)
    for page in pages:
        bits[page // 8] |= 1 << page % 8
    return DirtyPages(int.from_bytes(bits, "little"))


@settings(max_examples=100, deadline=None)
@given(SETS, SETS)
def test_pages_are_the_ranges_of_a_model(one: set[int], other: set[int]) -> None:
    assert list(dirty(one)) == model(one)
    assert dirty(one).count == len(one)
    assert bool(dirty(one)) is bool(one)
    assert dirty(one) | dirty(other) == dirty(one | other)
    assert (dirty(one) == dirty(other)) is (one == other)


@settings(max_examples=100, deadline=None)
@given(SETS, RUNS)
def test_pages_within_a_region(pages: set[int], region: tuple[int, int]) -> None:
    first, count = region
    found = dirty(pages).within(SimpleNamespace(gpa=first * PAGE, size=count * PAGE))
    assert found == dirty(pages & set(range(first, first + count)))


def test_equal_sets_are_one_in_a_set() -> None:
    assert {DirtyPages(5), DirtyPages(5)} == {DirtyPages(5)}
    assert repr(DirtyPages(5)) == "<DirtyPages 2>"
