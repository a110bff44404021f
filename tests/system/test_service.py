"""The service: devices that are kept, changed, taken down, and what SIGKILL leaves of it."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import ADDRESS, Place, ended
from tests.support.service_kills import Killer
from tests.system.conftest import until
from tests.system.test_up import Kept, make_bridge, persistent_tap, send_raw
from tests.system.test_up import state as tap_state
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.errors import VhostctlError
from vhostctl.host.netns import NetNamespace
from vhostctl.jobs.hosttraffic import HostSockets
from vhostctl.service.client import CommandFailed, ServiceClient


@pytest.fixture
def place(namespace: NetNamespace, tmp_path: Path, device: str) -> Place:
    (tmp_path / "state").mkdir()
    return Place(namespace, tmp_path / "state", device)


def net_toml(place: Place) -> Path:
    file = place.state.parent / "net.toml"
    one = f'[[device]]\nname = "{{}}"\ntap = "{{}}"\ndevice = "{place.device}"\n'
    text = one.format("demo", "tap0") + f'addresses = ["{ADDRESS}"]\n'
    file.write_text(text + one.format("two", "tap1") + 'queues = 2\nguest = "sink"\n')
    return file


def document(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def test_up_status_and_down_twice_each(place: Place) -> None:
    file = net_toml(place)
    assert "no service listens" in place.run("status", status=ExitCode.MISSING)
    assert place.run("up", "-f", file) == "demo: added\ntwo: added\n"
    assert place.run("up", "-f", file) == "nothing to change\n"
    assert document(place.run("up", "-f", file, "--json")) == {
        "schema": "vhostctl.up/1",
        "changes": [],
    }
    assert HostSockets(place.namespace.run).ping(4, "192.0.2.2", [0, 1400]) == 2
    for _ in range(2):
        found = document(place.run("status", "--json"))["devices"]
        assert [each["state"] for each in found] == ["running"] * 2
        assert found[1]["enabled"] == [0, 1]
        table = place.run("list")
        assert "tap0" in table
        assert "tap1" in table
    assert "no device 'nope'" in place.run("status", "nope", status=ExitCode.FAILED)
    assert place.run("down", "demo") == "demo: removed\n"
    assert place.run("down", "demo") == "nothing to change\n"
    assert place.run("up", "-f", file) == "demo: added\n"
    assert place.run("down", "-f", file) == "two: removed\ndemo: removed\n"
    assert place.run("down", "-f", file) == "nothing to change\n"
    assert place.run("down", "-f", file, "--quit") == "service: ended\n"
    place.run("down", "-f", file, status=ExitCode.MISSING)
    until(lambda: place.files() == set(), "the service ends")
    assert place.links() == {"lo"}


def test_up_with_detach_asks_the_service_that_runs(place: Place) -> None:
    args = ("up", "demo", "--detach", "--tap", "tap0", "--device", place.device)
    with place.service() as process:
        assert place.run(*args) == "demo: added\n"
        assert place.run(*args) == "nothing to change\n"
        said = place.run(*args, "--queues", "2", status=ExitCode.FAILED)
        assert "device 'demo' is there already, but not with this queues" in said
        with ServiceClient(place.socket) as client:
            client.execute("device-stop", name="demo")
        assert place.links() == {"lo"}
        assert place.run(*args) == "demo: started\n"
        ended(process)
    assert (place.files(), place.links()) == (set(), {"lo"})


def test_a_service_brings_up_a_file(place: Place) -> None:
    file = net_toml(place)
    with place.service("-f", file) as process:
        assert place.run("up", "-f", file) == "nothing to change\n"
        ended(process)
    file.write_text(file.read_text().replace("queues = 2", "queues = -2"))
    line = file.read_text().splitlines().index("queues = -2") + 1
    said = place.run("service", "-f", file, status=ExitCode.USAGE)
    assert f"{file}:{line}: device[1].queues: Expected `int` >= 1" in said
    assert said == place.run("up", "-f", file, status=ExitCode.USAGE)
    assert place.files() == set()


def test_one_service_has_a_directory(place: Place) -> None:
    with place.service() as process:
        said = place.run("service", status=ExitCode.FAILED)
        assert f"the service with PID {process.pid} has it" in said
        assert place.run("down") == "nothing to change\n"
        ended(process)


def test_everything_about_a_device_changes(place: Place) -> None:
    host = HostSockets(place.namespace.run)
    with place.service() as process, place.client(process) as client:
        place.add(client, "demo", "tap0", queues=2, addresses=[ADDRESS])

        def ask(command: str, **arguments: object) -> Any:
            return client.execute(command, name="demo", **arguments)

        def answers() -> bool:
            return host.ping(4, "192.0.2.2", [0, 1400]) == 2

        assert answers()
        assert ask("set-link", up=False) == {"changed": True}
        assert ask("set-link", up=False) == {"changed": False}
        ask("set-link", up=True)
        assert answers()
        ask("set-pairs", pairs=1)
        status = ask("query-device")
        assert status["enabled"] == [0]
        assert [ring["running"] for ring in status["rings"]] == [True, True, False, False]
        assert answers()
        ask("set-pairs", pairs=2)
        assert ask("set-mtu", mtu=1450) == {"changed": True}
        assert ask("set-mtu", mtu=1450) == {"changed": False}
        assert tap_state(place.namespace, "tap0").mtu == ask("query-device")["mtu"] == 1450
        assert answers()
        with pytest.raises(CommandFailed, match="the guest's buffers are for 1500"):
            ask("set-mtu", mtu=1501)
        gpa = ask("memory-add", region="dimm", size=4 << 20)["gpa"]
        ask("log-start")
        assert answers()
        assert ask("log-sync")["ranges"]
        assert ask("query-device")["logging"]
        ask("log-stop")
        memory = {each["name"]: each for each in ask("query-device")["memory"]}
        assert memory["dimm"] == {"name": "dimm", "gpa": gpa, "size": 4 << 20}
        ask("memory-del", region="dimm")
        ask("busyloop-set", microseconds=50)
        for link in (True, False, True):
            ask("set-link", up=link)
            assert len(ask("suspend")["rings"]) == 4
            with pytest.raises(CommandFailed, match="is suspended; resume it first"):
                ask("device-start")
            ask("resume")
            status = ask("query-device")
            assert (status["state"], status["link"]) == ("running", link)
            assert not link or answers()
        assert ask("device-stop") == {"changed": True}
        assert place.links() == {"lo"}
        assert ask("device-start") == {"changed": True}
        assert answers()
        assert ask("device-del") == {"changed": True}
        assert ask("device-del") == {"changed": False}
        assert place.files() == {"service.json", "qmp.sock"}
        ended(process)


def test_a_refused_device_leaves_nothing(place: Place) -> None:
    persistent_tap(place.namespace, "kept")
    before = Kept.of(place.namespace, "kept")
    with place.service() as process, place.client(process) as client:
        for wrong in ({"bridge": "nope"}, {"require": ["guest_rsc4_not"]}, {"queues": 2}):
            with pytest.raises(VhostctlError):
                place.add(client, "demo", "kept", mtu=1400, **wrong)
            assert client.execute("query-devices") == []
            assert place.files() == {"service.json", "qmp.sock"}
            assert Kept.of(place.namespace, "kept") == before
        ended(process)


def test_a_guest_that_ends_is_told_and_started_anew(place: Place) -> None:
    with place.service() as process, place.client(process) as client:
        place.add(client, "demo", "tap0", guest="pcap:/dev/full", addresses=[ADDRESS])

        def status() -> Any:
            return client.execute("query-device", name="demo")

        send_raw(place.namespace, "tap0", [b"\xff" * 6 + bytes(54)])
        until(lambda: status()["state"] == "failed", "the guest's end")
        assert "No space left" in status()["guest-error"]
        with pytest.raises(CommandFailed, match="stop and start it first"):
            client.execute("suspend", name="demo")
        assert client.execute("device-start", name="demo") == {"changed": True}
        with pytest.raises(CommandFailed, match="No space left"):
            client.execute("device-del", name="demo")
        assert client.execute("query-devices") == []
        ended(process)
    assert (place.files(), place.links()) == (set(), {"lo"})


def test_a_service_whose_clients_vanish_lives_on(place: Place) -> None:
    host = HostSockets(place.namespace.run)
    greeting = b'{"execute": "qmp_capabilities"}\n'
    orders = (
        b"",
        b'{"execute": "qmp',
        greeting,
        greeting + b'{"execute": "device-add", "arguments": {"name": "x", "tap": "tap9"}}\n',
        greeting + b'{"execute": "query-devices"}\n' * 500,
    )
    with place.service() as process, place.client(process) as client:
        place.add(client, "demo", "tap0", addresses=[ADDRESS])
        for _ in range(4):
            for order in orders:
                with socket.socket(socket.AF_UNIX) as vanishing:
                    vanishing.connect(str(place.socket))
                    vanishing.sendall(order)
        assert "demo" in {each["name"] for each in client.execute("query-devices")}
        assert host.ping(4, "192.0.2.2", [0]) == 1
        ended(process)
    assert place.links() == {"lo"}


def stray_workers() -> set[str]:
    """Return the kernel's threads that serve a vhost device."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name.startswith("vhost-") and rest.split()[1] == "2":
                found.add(name)
    return found


def test_a_kill_at_any_moment_leaves_nothing(place: Place) -> None:
    """VHOSTCTL_TEST_KILLS says how many.

    The seed fixes phase, step, and what share of its duration passes until the kill. Durations
    are measured before, so how far a service has come then depends on the machine.
    """
    make_bridge(place.namespace)
    persistent_tap(place.namespace, "kept")
    before = Kept.of(place.namespace, "kept")
    workers = stray_workers()
    killer = Killer(place, seed=5)
    for number in range(int(os.environ.get("VHOSTCTL_TEST_KILLS", "25"))):
        what = f"kill {number}, {killer.kill()}"
        left = place.socket.exists()
        with place.service() as process, place.client(process) as client:
            assert client.execute("query-devices") == [], what
            assert place.links() == {"lo", "br0", "kept"}, what
            assert Kept.of(place.namespace, "kept") == before, what
            assert place.files() == {"service.json", "qmp.sock"}, what
            said = ended(process)
            assert "not as before" not in said, what
            assert not left or "left by a service that was killed" in said, what
        assert place.files() == set(), what
    until(lambda: stray_workers() == workers, "no worker is left")
