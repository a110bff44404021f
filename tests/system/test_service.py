"""The service: devices that are kept, changed, taken down, and what SIGKILL leaves of it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import until
from tests.system.test_up import Kept, make_bridge, persistent_tap, send_raw
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.errors import EnvironmentMissing, VhostctlError
from vhostctl.host.netns import NetNamespace
from vhostctl.jobs.hosttraffic import HostSockets
from vhostctl.service.client import CommandFailed, ServiceClient

VHOSTCTL = [sys.executable, "-m", "vhostctl"]
READY = 60.0  # seconds, for an emulated machine
ADDRESS = "192.0.2.1/24"


@dataclass
class Place:
    """Where a service is to run: a namespace and a state directory."""

    namespace: NetNamespace
    state: Path
    device: str

    @property
    def socket(self) -> Path:
        return self.state / "qmp.sock"

    def spawn(self, *args: str | Path) -> subprocess.Popen[str]:
        return self.namespace.run(
            lambda: subprocess.Popen(
                [*VHOSTCTL, *map(str, args), "--state", str(self.state)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def run(self, *args: str | Path, status: ExitCode = ExitCode.OK) -> str:
        """Run a command to its end; return its stdout, or stderr if it failed."""
        out, error = (process := self.spawn(*args)).communicate(timeout=2 * READY)
        assert process.returncode == status, (out, error)
        return error if status else out

    @contextmanager
    def service(self, *args: str | Path) -> Iterator[subprocess.Popen[str]]:
        process = self.spawn("service", *args)
        try:
            self.client(process).close()
            yield process
        finally:
            process.kill()
            process.communicate(timeout=READY)

    def client(self, process: subprocess.Popen[str]) -> ServiceClient:
        """Return a connection to a service that is coming up."""
        deadline = time.monotonic() + READY
        while True:
            try:
                return ServiceClient(self.socket)
            except EnvironmentMissing:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.005)

    def add(self, client: ServiceClient, name: str, tap: str, **more: object) -> bool:
        changed: bool = client.execute(
            "device-add", name=name, tap=tap, device=self.device, **more
        )["changed"]
        return changed

    def links(self) -> set[str]:
        return self.namespace.run(lambda: {name for _, name in socket.if_nameindex()})

    def files(self) -> set[str]:
        return {file.name for file in self.state.iterdir()}


@pytest.fixture
def place(namespace: NetNamespace, tmp_path: Path, device: str) -> Place:
    (tmp_path / "state").mkdir()
    return Place(namespace, tmp_path / "state", device)


def ended(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=READY)
    assert process.returncode == ExitCode.OK, error
    assert "Traceback" not in error
    return error


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
    assert place.run("down", "-f", file, "--quit") == (
        "two: removed\ndemo: removed\nservice: ended\n"
    )
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
        assert ask("query-device")["enabled"] == [0]
        assert answers()
        ask("set-pairs", pairs=2)
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


@contextmanager
def victim(place: Place) -> Iterator[subprocess.Popen[str]]:
    process = place.spawn("service")
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=READY)


def life(place: Place, process: subprocess.Popen[str]) -> Iterator[Callable[[], object]]:
    """Yield what happens in a service's life, one after the other."""
    with place.client(process) as client:

        def ask(command: str, name: str, **arguments: object) -> Callable[[], object]:
            return lambda: client.execute(command, name=name, **arguments)

        settings: dict[str, object] = {"addresses": [ADDRESS], "mtu": 1400, "bridge": "br0"}
        yield lambda: place.add(client, "kept", "kept", **settings)
        yield lambda: place.add(client, "made", "made", queues=2)
        yield ask("set-link", "kept", up=False)
        yield ask("set-pairs", "made", pairs=1)
        yield ask("memory-add", "made", region="dimm", size=1 << 21)
        yield ask("log-start", "made")
        yield ask("suspend", "kept")
        yield ask("resume", "kept")
        yield ask("device-stop", "kept")
        yield ask("device-start", "kept")
        yield ask("device-del", "made")
        yield ask("device-del", "kept")


def killed_in(place: Place, step: int, seconds: float) -> None:
    """Have a service do everything there is, and kill it so long after it was told `step`."""
    with victim(place) as process:
        killer = threading.Timer(seconds, process.kill)
        with suppress(VhostctlError):  # it is gone, and that is the point
            for number, event in enumerate(life(place, process)):
                if number == step:
                    killer.start()
                event()
        process.wait(READY)
        killer.join()


def killed_while_it_starts(place: Place, seconds: float) -> None:
    with victim(place) as process, suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def durations(place: Place) -> tuple[float, list[float]]:
    """Return how long a service takes to start, and how long for each step of its life."""
    started = time.monotonic()
    with victim(place) as process:
        place.client(process).close()
        ready = time.monotonic() - started
        steps = []
        for event in life(place, process):
            before = time.monotonic()
            event()
            steps.append(time.monotonic() - before)
        ended(process)
    return ready, steps


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
    """VHOSTCTL_TEST_KILLS says how many; the moments are the same in each run."""
    kills = int(os.environ.get("VHOSTCTL_TEST_KILLS", "25"))
    moments = random.Random(5)  # noqa: S311 -- nobody is to be surprised
    make_bridge(place.namespace)
    persistent_tap(place.namespace, "kept")
    before = Kept.of(place.namespace, "kept")
    workers = stray_workers()
    ready, steps = durations(place)
    for number in range(kills):
        step = moments.randrange(len(steps))
        killed_in(place, step, moments.uniform(0, steps[step]))
        twice = number % 4 == 0
        if twice:  # the next one too, while it starts and cleans up
            killed_while_it_starts(place, moments.uniform(0.3 * ready, ready))
        with place.service() as process, place.client(process) as client:
            what = f"kill {number} in step {step}"
            assert client.execute("query-devices") == [], what
            assert place.links() == {"lo", "br0", "kept"}, what
            assert Kept.of(place.namespace, "kept") == before, what
            assert place.files() == {"service.json", "qmp.sock"}, what
            said = ended(process)
            assert twice or "left by a service that was killed" in said, what
        assert place.files() == set(), what
    until(lambda: stray_workers() == workers, "no worker is left")
