"""The devices of a service by name, on wirings that are made up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import msgspec
import pytest

from vhostctl.control.ringstatus import RingStatus
from vhostctl.control.states import State
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.jobs.up import Traffic
from vhostctl.service import device, manager
from vhostctl.service.manager import Manager
from vhostctl.service.schema import DeviceNotFound
from vhostctl.service.spec import DeviceSpec
from vhostctl.service.state import Journal, StateDirectory

DEMO = DeviceSpec(name="demo", tap="tap0", queues=2)


class FakeSession(SimpleNamespace):
    """As much of a Session as a device asks for."""

    def set_link(self, up: bool) -> None:
        self.link = up

    def ring_status(self) -> list[RingStatus]:
        return []

    def sync_log(self) -> list[tuple[int, int]]:
        return [(4096, 8192)]


class FakeSnapshot(msgspec.Struct):
    """As much of a Snapshot."""

    link: bool


@dataclass
class FakeWired:
    """A wiring that wires nothing; `made` has all of them."""

    spec: DeviceSpec
    made: list[FakeWired]
    fails: list[Exception] = field(default_factory=list)
    snapshot: FakeSnapshot | None = None
    error: Exception | None = None
    errors: list[int] = field(default_factory=lambda: [0] * 4)
    closed: bool = False
    mtu: int = 1500

    def __post_init__(self) -> None:
        self.made.append(self)
        self.session = FakeSession(
            state=State.RUNNING,
            link=True,
            enabled=(True, True),
            features=1 << 32,
            tap=SimpleNamespace(created=True),
            memory=SimpleNamespace(regions=()),
            logging=False,
            busyloop=0,
        )

    def __enter__(self) -> Self:
        if self.fails:
            raise self.fails.pop()
        return self

    def guest_error(self) -> Exception | None:
        return self.error

    def ring_errors(self) -> list[int]:
        return list(self.errors)

    def traffic(self) -> Traffic:
        return Traffic(0.0, 1, 2, 3, 4, 5)

    def set_pairs(self, pairs: int) -> int:
        self.session.enabled = tuple(pair < pairs for pair in range(2))
        return 7

    def set_mtu(self, mtu: int) -> None:
        self.mtu = mtu

    def add_memory(self, _name: str, _size: int, gpa: int | None) -> int:
        return gpa or 4096

    def remove_memory(self, _name: str) -> None:
        pass

    def suspend(self) -> FakeSnapshot:
        self.snapshot = FakeSnapshot(self.session.link)
        return self.snapshot

    def resume(self) -> None:
        self.snapshot = None

    def close(self) -> None:
        self.closed = True


@dataclass
class Service:
    manager: Manager
    directory: Path
    events: list[tuple[str, dict[str, object]]]
    wired: list[FakeWired]
    failures: list[Exception]

    def told(self) -> list[tuple[str, dict[str, object]]]:
        events = list(self.events)
        self.events.clear()
        return events

    def journal(self) -> list[str]:
        return sorted(json.loads(f.read_bytes())["device"] for f in self.directory.iterdir())


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    wired: list[FakeWired] = []
    failures: list[Exception] = []
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(device, "Wired", lambda spec: FakeWired(spec, wired, failures))
    monkeypatch.setattr(Journal, "of", lambda spec: Journal(spec.name, spec.tap))
    monkeypatch.setattr(manager, "_WATCH", 0.01)
    with (
        StateDirectory(tmp_path) as directory,
        Manager(directory, lambda event, data: events.append((event, data))) as made,
    ):
        yield Service(made, tmp_path, events, wired, failures)
    assert all(each.closed for each in wired)
    assert list(tmp_path.iterdir()) == []


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def states(service: Service) -> list[str]:
    return [status.state for status in service.manager.query()]


def test_adding_twice_changes_nothing(service: Service) -> None:
    assert service.manager.add(DEMO)
    assert service.told() == [
        ("DEVICE_ADDED", {"device": "demo"}),
        ("DEVICE_STATE", {"device": "demo", "state": "running"}),
    ]
    assert not service.manager.add(DEMO)
    assert service.told() == []
    assert len(service.wired) == 1
    assert service.journal() == ["demo"]


def test_a_name_and_a_tap_have_one_device(service: Service) -> None:
    service.manager.add(DEMO)
    with pytest.raises(InvalidArgument, match="but not with this queues, queue-size; take it"):
        service.manager.add(DeviceSpec(name="demo", tap="tap0", queue_size=128))
    with pytest.raises(InvalidArgument, match="tap tap0 belongs to device 'demo'"):
        service.manager.add(DeviceSpec(name="other", tap="tap0"))
    assert states(service) == ["running"]


def test_a_device_that_cannot_start_is_not_there(service: Service) -> None:
    service.failures.append(OSError("no"))
    with pytest.raises(OSError, match="no"):
        service.manager.add(DEMO)
    service.wired[0].closed = True  # it was never open
    assert (service.told(), service.manager.query(), service.journal()) == ([], [], [])


def test_start_and_stop(service: Service) -> None:
    service.manager.add(DEMO, start=False)
    assert (states(service), service.journal()) == (["stopped"], [])
    assert not service.manager.stop("demo")
    assert service.manager.start("demo")
    assert not service.manager.start("demo")
    assert (states(service), service.journal()) == (["running"], ["demo"])
    assert service.manager.stop("demo")
    assert not service.manager.stop("demo")
    assert (states(service), service.journal()) == (["stopped"], [])
    assert [data.get("state") for _, data in service.told()] == [None, "running", "stopped"]


def test_remove(service: Service) -> None:
    assert not service.manager.remove("demo")
    service.manager.add(DEMO)
    service.told()
    assert service.manager.remove("demo")
    assert [event for event, _ in service.told()] == ["DEVICE_STATE", "DEVICE_DELETED"]
    assert (service.manager.query(), service.journal()) == ([], [])


def test_changes_are_told_if_they_are_some(service: Service) -> None:
    service.manager.add(DEMO)
    service.told()
    assert service.manager.set_link("demo", up=False)
    assert not service.manager.set_link("demo", up=False)
    assert service.told() == [("LINK_CHANGED", {"device": "demo", "up": False})]
    assert service.manager.set_pairs("demo", 1) == 7
    service.manager.set_pairs("demo", 1)
    assert service.told() == [("PAIRS_CHANGED", {"device": "demo", "pairs": 1})]
    assert service.manager.add_memory("demo", "dimm", 4096, None) == 4096
    service.manager.remove_memory("demo", "dimm")
    assert service.told() == [("MEMORY_CHANGED", {"device": "demo", "region": "dimm"})] * 2
    assert service.manager.sync_log("demo") == [(4096, 8192)]


def test_an_mtu_is_written_down_before_it_is_set(service: Service) -> None:
    service.manager.add(DEMO)
    assert service.manager.set_mtu("demo", 1400)
    assert not service.manager.set_mtu("demo", 1400)
    assert service.manager.set_mtu("demo", 1300)
    (file,) = service.directory.iterdir()
    journal = json.loads(file.read_bytes())
    assert (journal["mtu"], journal["old_mtu"]) == (1300, 1400)
    assert service.manager.query()[0].mtu == 1300


def test_suspend_and_resume(service: Service) -> None:
    service.manager.add(DEMO)
    assert service.manager.suspend("demo") == {"link": True}
    assert states(service) == ["suspended"]
    for refused in (service.manager.suspend, service.manager.start):
        with pytest.raises(StateError, match="device 'demo' is suspended; resume it first"):
            refused("demo")
    with pytest.raises(StateError, match="set-link: device 'demo' is suspended"):
        service.manager.set_link("demo", up=False)
    service.manager.add_memory("demo", "dimm", 4096, None)
    service.manager.resume("demo")
    assert states(service) == ["running"]
    with pytest.raises(StateError, match="device 'demo' is running; suspend it first"):
        service.manager.resume("demo")
    told = [data["state"] for event, data in service.told() if event == "DEVICE_STATE"]
    assert told == ["running", "suspended", "running"]


def test_an_unknown_device_is_named_with_the_known(service: Service) -> None:
    service.manager.add(DEMO)
    with pytest.raises(DeviceNotFound, match="no device 'nope'; there is: demo"):
        service.manager.query("nope")


def test_what_goes_wrong_by_itself_is_told(service: Service) -> None:
    service.manager.add(DEMO)
    service.told()
    service.wired[0].errors = [0, 0, 2, 0]
    until(lambda: bool(service.events), "a ring error")
    assert service.told() == [("RING_ERROR", {"device": "demo", "queue": 2, "count": 2})]
    service.wired[0].error = OSError("the link is gone")
    until(lambda: len(service.events) == 2, "the guest's end")
    assert service.told() == [
        ("DEVICE_STATE", {"device": "demo", "state": "failed"}),
        ("GUEST_FAILED", {"device": "demo", "error": "the link is gone"}),
    ]
    (status,) = service.manager.query()
    assert (status.state, status.guest_error) == ("failed", "the link is gone")
    with pytest.raises(StateError, match="failed; stop and start it first"):
        service.manager.suspend("demo")
    assert service.manager.start("demo")
    assert states(service) == ["running"]
    assert service.wired[0].closed


def test_status_is_json(service: Service) -> None:
    service.manager.add(DEMO)
    service.manager.add(DeviceSpec(name="idle", tap="tap1"), start=False)
    running, idle = json.loads(msgspec.json.encode(service.manager.query()))
    assert running["traffic"]["rx-bytes"] == 2
    assert running["features"] == ["VIRTIO_F_VERSION_1"]
    assert (running["enabled"], running["created"]) == ([0, 1], True)
    assert (idle["state"], idle["features"], idle["link"]) == ("stopped", [], False)
    assert idle["spec"]["queue-size"] == 256
