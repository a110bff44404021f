"""QEMU's own clients drive the service: a device's whole life, its events, and bad company."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu.qmp import ExecuteError, QMPClient

from tests.support.processes import listens
from tests.system.conftest import until
from vhostctl.cli.exitcodes import ExitCode
from vhostctl.control.snapshot import Snapshot
from vhostctl.host.links import exists
from vhostctl.host.netns import NetNamespace
from vhostctl.jobs.hosttraffic import HostSockets
from vhostctl.service.events import EVENTS
from vhostctl.service.framing import MOST_BYTES
from vhostctl.service.spec import DeviceStatus

DIMM = 16 << 20


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[QMPClient]:
    """qemu.qmp's client; whether the service ends before it is no matter."""
    client = QMPClient()
    await client.connect(str(path))
    try:
        yield client
    finally:
        with suppress(EOFError, OSError):
            await client.disconnect()


@contextmanager
def service(
    namespace: NetNamespace, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A service in the namespace, and its socket."""
    path = folder / "qmp.sock"
    command = [sys.executable, "-m", "vhostctl", "service"]
    command += ["--socket", str(path), "--state", str(folder / "state")]
    process = namespace.run(lambda: subprocess.Popen(command))
    try:
        until(lambda: process.poll() is not None or listens(path), "the service listens", 120)
        assert process.poll() is None
        yield process, path
    finally:
        process.kill()
        process.wait(60)


class Driver:
    """What a test does through qemu.qmp's client to the device `n0`, of one tap."""

    def __init__(self, client: QMPClient, namespace: NetNamespace) -> None:
        self.client = client
        self._host = HostSockets(namespace.run)

    async def do(self, command: str, **arguments: object) -> Any:
        async with asyncio.timeout(60):
            return await self.client.execute(command, {"name": "n0"} | arguments)

    async def status(self) -> DeviceStatus:
        return msgspec.convert(await self.do("query-device"), DeviceStatus)

    async def pings(self) -> bool:
        return await asyncio.to_thread(self._host.ping, 4, "192.0.2.2", [0, 1400]) == 2

    async def add(self, device: str) -> None:
        spec = {"tap": "tap0", "device": device, "queues": 2, "addresses": ["192.0.2.1/24"]}
        assert await self.do("device-add", **spec, start=False) == {"changed": True}
        assert await self.do("device-add", **spec, start=False) == {"changed": False}
        assert (await self.status()).state == "stopped"
        assert await self.do("device-start") == {"changed": True}
        assert await self.do("device-start") == {"changed": False}
        status = await self.status()
        assert (status.state, status.link, status.enabled) == ("running", True, (0, 1))
        assert await self.pings()

    async def change(self) -> None:
        assert await self.do("set-link", up=False) == {"changed": True}
        assert not (await self.status()).link
        assert await self.do("set-link", up=True) == {"changed": True}
        assert await self.do("set-link", up=True) == {"changed": False}
        for pairs in (1, 2):
            assert "dropped" in await self.do("set-pairs", pairs=pairs)
            assert (await self.status()).enabled == tuple(range(pairs))
            assert await self.pings()
        place = (await self.do("memory-add", region="dimm0", size=DIMM))["gpa"]
        assert ("dimm0", place, DIMM) in [
            (each.name, each.gpa, each.size) for each in (await self.status()).memory
        ]
        assert await self.pings()
        assert await self.do("memory-del", region="dimm0") == {}
        assert await self.do("busyloop-set", microseconds=50) == {}

    async def move(self) -> None:
        assert await self.do("log-start") == {}
        assert await self.pings()
        written = (await self.do("log-sync"))["ranges"]
        assert written
        assert not [each for each in written if each["gpa"] % 4096 or each["size"] % 4096]
        await self.do("log-stop")
        assert not (await self.status()).logging
        snapshot = Snapshot.from_json(json.dumps(await self.do("suspend")))
        assert len(snapshot.rings) == 4
        assert (await self.status()).state == "suspended"
        assert await self.do("resume") == {}
        assert await self.pings()

    async def remove(self) -> None:
        assert await self.do("device-stop") == {"changed": True}
        assert await self.do("device-stop") == {"changed": False}
        assert await self.do("device-del") == {"changed": True}
        assert await self.do("device-del") == {"changed": False}
        with pytest.raises(ExecuteError) as caught:
            await self.do("query-device")
        assert caught.value.error_class == "DeviceNotFound"


HEARD = [
    ("DEVICE_ADDED", None),  # stopped, as each one begins
    ("DEVICE_STATE", "running"),
    ("LINK_CHANGED", False),
    ("LINK_CHANGED", True),
    ("PAIRS_CHANGED", 1),
    ("PAIRS_CHANGED", 2),
    ("MEMORY_CHANGED", "dimm0"),
    ("MEMORY_CHANGED", "dimm0"),
    ("DEVICE_STATE", "suspended"),
    ("DEVICE_STATE", "running"),
    ("DEVICE_STATE", "stopped"),
    ("DEVICE_DELETED", None),
]


def heard(client: QMPClient) -> list[tuple[str, Any]]:
    """The events so far, each with what it says besides the device; each is as described."""
    found = []
    for event in client.events.clear():
        name, data = str(event["event"]), event["data"]
        msgspec.convert(data, EVENTS[name])
        assert isinstance(data, dict)
        assert data.pop("device") == "n0"
        found.append((name, next(iter(data.values()), None)))
    return found


def test_qemus_client_drives_a_device(namespace: NetNamespace, tmp_path: Path, device: str) -> None:
    async def whole_life(path: Path) -> None:
        async with connected(path) as client, connected(path) as bystander:
            driver = Driver(client, namespace)
            await driver.add(device)
            await driver.change()
            await driver.move()
            await driver.remove()
            await bystander.execute("query-version")  # behind all events
            assert heard(client) == HEARD
            assert heard(bystander) == HEARD
            assert await client.execute("quit") == {}
            async with asyncio.timeout(60):
                assert (await client.events.get())["event"] == "SHUTDOWN"

    with service(namespace, tmp_path) as (process, path):
        asyncio.run(whole_life(path))
        assert process.wait(60) == ExitCode.OK
        assert not path.exists()
    assert not namespace.run(lambda: exists("tap0"))


SCRIPT = """\
device-add name=n0 tap=tap0 device={device} queues=2
query-devices

set-link name=n0 up=false
set-link name=n0 up=true
set-pairs name=n0 pairs=1
memory-add name=n0 region=dimm0 size=16777216
log-start name=n0
log-stop name=n0
suspend name=n0
resume name=n0
set-pairs name=n0 pairs=three
device-del name=n0
no-such-command
"""


def test_qmp_shell_drives_a_device(namespace: NetNamespace, tmp_path: Path, device: str) -> None:
    with service(namespace, tmp_path) as (process, path):
        shell = subprocess.run(
            [sys.executable, "-m", "qemu.qmp.qmp_shell", str(path)],
            input=SCRIPT.format(device=device),
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == ExitCode.OK
    lines = shell.stdout.replace("(QEMU) ", "").splitlines()
    replies = [json.loads(line) for line in lines if line.startswith(('{"return"', '{"error"'))]
    returned = [reply.get("return", reply.get("error", {}).get("class")) for reply in replies]
    changed = {"changed": True}
    assert returned[0] == changed
    assert [each["name"] for each in returned[1]] == ["n0"]
    assert returned[2:4] == [changed, changed]
    assert returned[4].keys() == {"dropped"}
    assert returned[5].keys() == {"gpa"}
    assert returned[6] == {}
    assert returned[7].keys() == {"ranges"}
    assert msgspec.convert(returned[8], Snapshot).order == (0,)
    assert returned[9:] == [{}, "GenericError", changed, "CommandNotFound"]
    assert "argument 'pairs'" in replies[10]["error"]["desc"]
    assert "'event': 'DEVICE_ADDED'" in shell.stdout


BAD = {
    "malformed": b'{"execute": "device-del", "arguments": {"name": "n0"}]\n',
    "oversized": b'{"execute": "' + b"x" * (1 << 20) + b'"}\n',
    "half-sent": b'{"execute": "device-del", "arguments": {"name": "n0"',
}


def costs(path: Path, data: bytes) -> None:
    """Send what no client may; return when it cost the connection."""
    with socket.socket(socket.AF_UNIX) as bad:
        bad.settimeout(60)
        bad.connect(str(path))
        try:
            bad.sendall(data)
            said = bad.makefile("rb").read()
        except (BrokenPipeError, ConnectionResetError):
            assert len(data) > MOST_BYTES  # it was still sending
            return
        assert b'"GenericError"' in said


def test_bad_clients_cost_a_good_one_nothing(
    namespace: NetNamespace, tmp_path: Path, device: str
) -> None:
    async def beside_them(path: Path) -> None:
        async with connected(path) as client:
            driver = Driver(client, namespace)
            async with asyncio.TaskGroup() as group:
                for data in BAD.values():
                    for _ in range(3):
                        group.create_task(asyncio.to_thread(costs, path, data))
                await driver.add(device)
                await driver.change()
            await driver.move()
            await driver.remove()
            assert heard(client) == HEARD

    with service(namespace, tmp_path) as (process, path):
        asyncio.run(beside_them(path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == ExitCode.OK
