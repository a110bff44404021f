"""A QMP service without devices for the tests of the protocol, and a client that knows nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from vhostctl.errors import InvalidArgument
from vhostctl.host.listening import listening
from vhostctl.service.commands import device_commands
from vhostctl.service.qmp import QmpServer
from vhostctl.service.schema import DeviceNotFound
from vhostctl.service.spec import DeviceSpec, DeviceStatus, TrafficStatus

Emit = Callable[[str, dict[str, object]], None]


def status_of(spec: DeviceSpec, state: Any = "running") -> DeviceStatus:
    return DeviceStatus(
        name=spec.name,
        state=state,
        link=True,
        created=True,
        mac="02:00:00:00:00:01",
        ipv4=None,
        ipv6=None,
        mtu=1500,
        features=(),
        enabled=(0,),
        memory=(),
        logging=False,
        busyloop=0,
        rings=(),
        ring_errors=(0, 0),
        guest_error=None,
        traffic=TrafficStatus(0, 0, 0, 0, 0),
        spec=spec,
    )


class FakeDevices:
    """Remembers what it was asked, in `calls`; `threads` are those that asked."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.specs: dict[str, DeviceSpec] = {}
        self.calls: list[tuple[object, ...]] = []
        self.threads: set[str] = set()
        self.trouble: Exception | None = None
        self.may_go_on = threading.Event()  # cleared: what is called waits
        self.may_go_on.set()

    def _called(self, *call: object, known: bool = True) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.append(call)
        self.may_go_on.wait(30)
        if self.trouble is not None:
            raise self.trouble
        if known and call[1] not in self.specs:
            raise DeviceNotFound(f"no device {call[1]!r}")

    def add(self, spec: DeviceSpec, start: bool = True) -> bool:
        self._called("add", spec, start, known=False)
        if known := self.specs.get(spec.name):
            if known != spec:
                raise InvalidArgument(f"device {spec.name!r} is another")
            return False
        self.specs[spec.name] = spec
        self.emit("DEVICE_ADDED", {"device": spec.name})
        return True

    def remove(self, name: str) -> bool:
        self._called("remove", name, known=False)
        return self.specs.pop(name, None) is not None

    def start(self, name: str) -> bool:
        self._called("start", name)
        return True

    def stop(self, name: str) -> bool:
        self._called("stop", name)
        return False

    def set_link(self, name: str, up: bool) -> bool:
        self._called("set_link", name, up)
        return True

    def set_pairs(self, name: str, pairs: int) -> int:
        self._called("set_pairs", name, pairs)
        return 3

    def set_mtu(self, name: str, mtu: int) -> bool:
        self._called("set_mtu", name, mtu)
        return True

    def add_memory(self, name: str, region: str, size: int, gpa: int | None) -> int:
        self._called("add_memory", name, region, size, gpa)
        return 1 << 40 if gpa is None else gpa

    def remove_memory(self, name: str, region: str) -> None:
        self._called("remove_memory", name, region)

    def start_log(self, name: str) -> None:
        self._called("start_log", name)

    def sync_log(self, name: str) -> list[tuple[int, int]]:
        self._called("sync_log", name)
        return [(0, 4096), (1 << 33, 8192)]

    def stop_log(self, name: str) -> list[tuple[int, int]]:
        self._called("stop_log", name)
        return []

    def set_busyloop(self, name: str, microseconds: int) -> None:
        self._called("set_busyloop", name, microseconds)

    def suspend(self, name: str) -> dict[str, object]:
        self._called("suspend", name)
        return {"version": 1}

    def resume(self, name: str) -> None:
        self._called("resume", name)

    def query(self, name: str | None = None) -> list[DeviceStatus]:
        if name is not None:
            self._called("query", name)
        return [status_of(spec) for spec in self.specs.values() if name in (None, spec.name)]

    def close(self) -> None:
        self._called("close", known=False)


class Client:
    """Speaks JSON lines, waits at most so long for each, and keeps events apart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.events: list[dict[str, Any]] = []

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_unix_connection(self._path, limit=1 << 22)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        await asyncio.wait([asyncio.ensure_future(self.writer.wait_closed())], timeout=5)

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def line(self, seconds: float = 20) -> dict[str, Any] | None:
        """The next message, None at the end."""
        async with asyncio.timeout(seconds):
            try:
                data = await self.reader.readline()
            except ConnectionError:
                return None
        return dict(json.loads(data)) if data else None

    async def reply(self) -> dict[str, Any]:
        """The next message that is no event."""
        while (message := await self.line()) is not None:
            if "event" not in message:
                return message
            self.events.append(message)
        raise EOFError

    async def over(self) -> None:
        """Wait for the end; only events may come before it."""
        with suppress(EOFError):
            unexpected = await self.reply()
            raise AssertionError(unexpected)

    async def event(self, name: str) -> Any:
        """The data of the next event of that name."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name:
                    return event["data"]
            message = await self.line()
            assert message is not None
            assert "event" in message
            self.events.append(message)

    async def ask(self, execute: str, **arguments: object) -> dict[str, Any]:
        """The reply to a command."""
        self.write(json.dumps({"execute": execute, "arguments": arguments}).encode())
        return await self.reply()

    async def negotiated(self) -> Self:
        assert "QMP" in await self.reply()
        assert await self.ask("qmp_capabilities") == {"return": {}}
        return self


Talk = Callable[[Path, FakeDevices], Awaitable[None]]


def serve(path: Path, talk: Talk, *, patience: float = 0.2) -> FakeDevices:
    """Run `talk` beside a service at `path`, which must end within a minute."""
    with listening(path) as sockets:
        server = QmpServer(sockets, patience=patience)
        devices = FakeDevices(server.emit)

        async def both() -> None:
            async with asyncio.timeout(60):
                serving = asyncio.create_task(server.serve(device_commands(devices), devices.close))
                await talk(path, devices)
                if not serving.done():
                    async with Client(path) as client:
                        assert await (await client.negotiated()).ask("quit") == {"return": {}}
                await serving

        asyncio.run(both())
    return devices
