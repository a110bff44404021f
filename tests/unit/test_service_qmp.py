"""The service's protocol: what clients may expect, and what bad ones cost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.qmp import Client, FakeDevices, serve
from vhostctl.errors import kernel_error
from vhostctl.host.listening import listening
from vhostctl.service.connection import MOST_QUEUED
from vhostctl.service.events import EVENTS
from vhostctl.service.framing import MOST_BYTES, MOST_NESTED
from vhostctl.service.qmp import MOST_CLIENTS, QmpServer
from vhostctl.service.spec import DeviceSpec

DOCUMENT = Path(__file__).parents[2] / "docs" / "service.md"
SPEC: dict[str, Any] = {"name": "n0", "tap": "tap0", "device": "engine"}
MEMORY: dict[str, Any] = {"region": "d", "size": 4096}


def error(kind: str, reply: dict[str, Any]) -> str:
    """The description of an error of that class."""
    assert reply["error"]["class"] == kind, reply
    return str(reply["error"]["desc"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


def test_greeting_negotiation_and_the_commands_about_the_protocol(path: Path) -> None:
    async def talk(path: Path, _: FakeDevices) -> None:
        async with Client(path) as client:
            greeting = await client.reply()
            assert greeting["QMP"]["capabilities"] == []
            assert set(greeting["QMP"]["version"]["qemu"]) == {"major", "minor", "micro"}
            early = error("CommandNotFound", await client.ask("query-version"))
            assert "qmp_capabilities" in early
            assert "'oob'" in error(
                "GenericError", await client.ask("qmp_capabilities", enable=["oob"])
            )
            assert await client.ask("qmp_capabilities") == {"return": {}}
            error("CommandNotFound", await client.ask("qmp_capabilities"))
            version = await client.ask("query-version")
            assert version["return"] == greeting["QMP"]["version"]
            listed = (await client.ask("query-commands"))["return"]
            names = [each["name"] for each in listed]
            assert {"quit", "device-add", "suspend", "query-schema"} <= set(names)
            schema = (await client.ask("query-schema"))["return"]
            assert [each["name"] for each in schema["commands"]] == names
            assert {each["name"] for each in schema["events"]} == set(EVENTS)
            document = DOCUMENT.read_text(encoding="utf-8")
            assert not [each for each in [*names, *EVENTS] if f"`{each}`" not in document]
            for reference in re.findall(r'"#/definitions/(\w+)"', json.dumps(schema)):
                assert reference in schema["definitions"]

    serve(path, talk)


@pytest.mark.parametrize("identity", [7, "a", None, 1.5, [1, {"b": []}], {"a": 1 << 70}])
def test_a_reply_has_the_id_of_its_command(path: Path, identity: object) -> None:
    async def talk(path: Path, _: FakeDevices) -> None:
        async with Client(path) as client:
            await client.negotiated()
            for execute in ("query-devices", "no-such-command"):
                client.write(json.dumps({"execute": execute, "id": identity}).encode())
                assert (await client.reply())["id"] == identity
            client.write(b'{"execute": "query-devices"}')
            assert "id" not in await client.reply()

    serve(path, talk)


def test_each_command_reaches_the_devices_and_returns_what_it_says(path: Path) -> None:
    spec = msgspec.convert(SPEC, DeviceSpec)
    expected: list[tuple[str, dict[str, Any], tuple[object, ...], Any]] = [
        ("device-add", SPEC | {"start": False}, ("add", spec, False), {"changed": True}),
        ("device-add", SPEC, ("add", spec, True), {"changed": False}),
        ("device-start", {}, ("start", "n0"), {"changed": True}),
        ("device-stop", {}, ("stop", "n0"), {"changed": False}),
        ("set-link", {"up": False}, ("set_link", "n0", False), {"changed": True}),
        ("set-pairs", {"pairs": 2}, ("set_pairs", "n0", 2), {"dropped": 3}),
        ("set-mtu", {"mtu": 1400}, ("set_mtu", "n0", 1400), {"changed": True}),
        ("memory-add", MEMORY, ("add_memory", "n0", "d", 4096, None), {"gpa": 1 << 40}),
        ("memory-add", MEMORY | {"gpa": 0}, ("add_memory", "n0", "d", 4096, 0), {"gpa": 0}),
        ("memory-del", {"region": "d"}, ("remove_memory", "n0", "d"), {}),
        ("log-start", {}, ("start_log", "n0"), {}),
        (
            "log-sync",
            {},
            ("sync_log", "n0"),
            {"ranges": [{"gpa": 0, "size": 4096}, {"gpa": 1 << 33, "size": 8192}]},
        ),
        ("log-stop", {}, ("stop_log", "n0"), {"ranges": []}),
        ("busyloop-set", {"microseconds": 50}, ("set_busyloop", "n0", 50), {}),
        ("suspend", {}, ("suspend", "n0"), {"version": 1}),
        ("resume", {}, ("resume", "n0"), {}),
        ("device-del", {}, ("remove", "n0"), {"changed": True}),
        ("device-del", {}, ("remove", "n0"), {"changed": False}),
    ]

    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as client:
            await client.negotiated()
            for name, arguments, call, result in expected:
                assert await client.ask(name, **{"name": "n0"} | arguments) == {"return": result}
                assert devices.calls[-1] == call
                if name == "resume":
                    (status,) = (await client.ask("query-devices"))["return"]
                    assert (await client.ask("query-device", name="n0"))["return"] == status
                    assert status["spec"]["tap"] == "tap0"
            every = {each["name"] for each in (await client.ask("query-commands"))["return"]}
            asked = {name for name, *_ in expected} | {"query-devices", "query-device"}
            assert {name for name in every - asked if name != "qmp_capabilities"} == {
                "query-version",
                "query-commands",
                "query-schema",
                "quit",
            }

    devices = serve(path, talk)
    assert devices.calls[-1] == ("close",)
    assert len(devices.threads) == 1
    assert threading.current_thread().name not in devices.threads


@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        ("set-pairs", {"name": "n0", "pairs": "2"}, "argument 'pairs': Expected `int`"),
        ("set-pairs", {"name": "n0", "pairs": 0}, "argument 'pairs'"),
        ("set-pairs", {"name": "n0", "pairs": 1 << 80}, "argument 'pairs'"),
        ("set-pairs", {"name": "n0"}, "required field `pairs`"),
        ("set-mtu", {"name": "n0", "mtu": 67}, "argument 'mtu'"),
        ("set-link", {"name": "n0", "up": 1}, "argument 'up'"),
        ("set-link", {"name": "n0", "up": True, "down": 1}, "unknown field `down`"),
        ("log-start", {"device": "n0"}, "unknown field `device`"),
        ("query-devices", {"name": "n0"}, "unknown field `name`"),
        ("device-add", SPEC | {"queue-size": "many"}, "argument 'queue-size'"),
        ("device-add", SPEC | {"addresses": [1]}, "argument 'addresses[0]'"),
        ("device-add", SPEC | {"guest": "nobody"}, "guest"),
        ("memory-add", {"name": "n0", "region": "d", "size": 4096, "gpa": -1}, "'gpa'"),
    ],
)
def test_wrong_arguments_are_named(
    path: Path, command: str, arguments: dict[str, object], named: str
) -> None:
    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as client:
            reply = await (await client.negotiated()).ask(command, **arguments)
            description = error("GenericError", reply)
            assert description.startswith(f"{command}: ")
            assert named in description
            assert not devices.calls

    serve(path, talk)


def test_errors_have_their_class_and_one_line(path: Path) -> None:
    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as client:
            await client.negotiated()
            assert "'ghost'" in error("DeviceNotFound", await client.ask("resume", name="ghost"))
            assert "'fly'" in error("CommandNotFound", await client.ask("fly"))
            await client.ask("device-add", **SPEC)
            devices.trouble = kernel_error(1, "VHOST_SET_OWNER", "/dev/vhost-net", "be root")
            refused = error("GenericError", await client.ask("resume", name="n0"))
            assert refused.startswith("VHOST_SET_OWNER on /dev/vhost-net: ")
            devices.trouble = RuntimeError("two\nlines")
            internal = error("GenericError", await client.ask("resume", name="n0"))
            assert internal == "internal error: RuntimeError: two lines"
            devices.trouble = None
            assert await client.ask("resume", name="n0") == {"return": {}}

    serve(path, talk)


@pytest.mark.parametrize(
    "message",
    [
        {"exec": "query-version"},
        {"execute": 5},
        {"execute": "query-version", "arguments": []},
        {"execute": "query-version", "extra": 1},
        {},
    ],
)
def test_what_is_json_and_no_command_is_refused_alone(path: Path, message: object) -> None:
    async def talk(path: Path, _: FakeDevices) -> None:
        async with Client(path) as client:
            await client.negotiated()
            client.write(json.dumps(message).encode())
            error("GenericError", await client.reply())
            assert "return" in await client.ask("query-version")

    serve(path, talk)


def nested(depth: int) -> bytes:
    return b'{"execute": "query-version", "id": ' + b"[" * depth + b"]" * depth + b"}"


BAD = {
    "no JSON": b"hello\n",
    "array": b"[]",
    "unfinished value": b'{"execute": }',
    "wrong bracket": b'{"execute": "quit"]',
    "not a number": b'{"id": NaN}',
    "no UTF-8": b'{"id": "\xff"}',
    "half a message": b'{"execute": "quit", ',
    "half a string": b'{"execute": "qu\\',
    "1 MiB": b'{"execute": "' + b"x" * (1 << 20) + b'"}',
    "just too long": b'{"execute": "' + b"x" * (MOST_BYTES - 14) + b'"}',
    "nested": nested(MOST_NESTED),
    "nested for ever": b'{"id": ' + b"[" * 60000,
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
@pytest.mark.parametrize("negotiated", [False, True])
def test_a_bad_message_costs_its_sender_the_connection(
    path: Path, data: bytes, negotiated: bool
) -> None:
    async def talk(path: Path, _: FakeDevices) -> None:
        async with Client(path) as good, Client(path) as bad:
            await good.negotiated()
            await (bad.negotiated() if negotiated else bad.reply())
            bad.write(data + b"\n" if data.endswith(b"}") else data)
            assert await good.ask("device-add", **SPEC) == {"return": {"changed": True}}
            with suppress(ConnectionError, EOFError) if len(data) > MOST_BYTES else nullcontext():
                error("GenericError", await bad.reply())  # may be lost to who goes on writing
            await bad.over()
            assert await good.ask("device-del", name="n0") == {"return": {"changed": True}}
            assert [event["event"] for event in good.events] == ["DEVICE_ADDED"]

    serve(path, talk)


def test_what_is_just_within_bounds_is_served(path: Path) -> None:
    async def talk(path: Path, _: FakeDevices) -> None:
        async with Client(path) as client:
            await client.negotiated()
            client.write(nested(MOST_NESTED - 1))
            assert "return" in await client.reply()
            client.write(b'{"execute": "' + b"x" * (MOST_BYTES - 15) + b'"}')
            error("CommandNotFound", await client.reply())
            for byte in b'{"execute": "query-version"}{"execute":"query-commands"}\n':
                client.write(bytes([byte]))
                await asyncio.sleep(0)
            assert "package" in (await client.reply())["return"]
            assert isinstance((await client.reply())["return"], list)

    serve(path, talk, patience=10)


def test_commands_before_a_bad_message_are_answered(path: Path) -> None:
    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as client:
            await client.negotiated()
            client.write(b'{"execute":"device-del","arguments":{"name":"a"},"id":1}{"execute":]}')
            assert (await client.reply())["id"] == 1
            error("GenericError", await client.reply())
            assert await client.line() is None
            assert devices.calls == [("remove", "a")]

    serve(path, talk)


def test_who_does_not_read_is_dropped_and_the_others_hear_all(path: Path) -> None:
    count = 5 * MOST_QUEUED // 1000

    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as good, Client(path) as silent:
            await good.negotiated()
            await silent.negotiated()
            silent.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for number in range(count):
                devices.emit("GUEST_FAILED", {"device": str(number), "error": "x" * 1000})
                heard = await good.event("GUEST_FAILED")
                assert heard["device"] == str(number)
            silent.writer.transport.resume_reading()  # type: ignore[attr-defined]
            heard_by_it = 0
            while await silent.line() is not None:
                heard_by_it += 1
            assert heard_by_it < count

    serve(path, talk)


def test_events_go_to_whoever_has_negotiated(path: Path) -> None:
    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as one, Client(path) as two, Client(path) as shy:
            await one.negotiated()
            await two.negotiated()
            await shy.reply()
            thread = threading.Thread(target=devices.emit, args=("DEVICE_ADDED", {"device": "n"}))
            thread.start()
            thread.join()
            for client in (one, two):
                message = await client.line()
                assert message is not None
                assert (message["event"], message["data"]) == ("DEVICE_ADDED", {"device": "n"})
                assert message["timestamp"].keys() == {"seconds", "microseconds"}
                assert 0 <= message["timestamp"]["microseconds"] < 1_000_000
            assert await shy.ask("qmp_capabilities") == {"return": {}}
            assert not shy.events

    serve(path, talk)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, None])
def test_the_end_is_announced_and_the_devices_go(path: Path, how: signal.Signals | None) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as client, Client(path) as shy:
            await client.negotiated()
            if how is None:
                assert await client.ask("quit") == {"return": {}}
                reason = "host-qmp-quit"
            else:
                os.kill(os.getpid(), how)
                os.kill(os.getpid(), how)
                reason = "host-signal"
            assert await client.event("SHUTDOWN") == {"guest": False, "reason": reason}
            assert await client.line() is None
            assert "QMP" in await shy.reply()
            assert await shy.line() is None
        while ("close",) not in devices.calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)

    assert serve(path, talk).calls == [("close",)]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not path.exists()


@pytest.mark.parametrize("reason", ["guest-shutdown", "host-ui"])
def test_another_thread_ends_it_with_a_reason(path: Path, reason: str) -> None:
    async def scenario() -> None:
        with listening(path) as sockets:
            server = QmpServer(sockets)
            async with asyncio.TaskGroup() as group:
                group.create_task(server.serve([]))
                async with Client(path) as client:
                    await client.negotiated()
                    thread = threading.Thread(target=server.end, args=(reason,))
                    thread.start()
                    told = {"guest": reason == "guest-shutdown", "reason": reason}
                    assert await client.event("SHUTDOWN") == told
                    thread.join()

    asyncio.run(scenario())


def test_an_end_ahead_of_the_service_is_its_loops_business(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_the_loop(event: asyncio.Event) -> None:
        asyncio.get_running_loop()
        ended(event)

    ended = asyncio.Event.set
    monkeypatch.setattr(asyncio.Event, "set", in_the_loop)
    with listening(path) as sockets:
        server = QmpServer(sockets)
        server.end("guest-reset")
        asyncio.run(asyncio.wait_for(server.serve([]), 30))
        server.end("guest-reset")


def test_the_end_waits_for_the_command_that_runs_and_takes_no_more(path: Path) -> None:
    async def talk(path: Path, devices: FakeDevices) -> None:
        async with Client(path) as busy, Client(path) as late:
            await busy.negotiated()
            await late.negotiated()
            devices.may_go_on.clear()
            asking = asyncio.create_task(busy.ask("device-add", **SPEC))
            while not devices.calls:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await late.event("SHUTDOWN")
            assert "ending" in error("GenericError", await late.ask("device-del", name="n0"))
            devices.may_go_on.set()
            assert await asking == {"return": {"changed": True}}
            assert [event["event"] for event in busy.events] == ["SHUTDOWN", "DEVICE_ADDED"]
            assert await busy.line() is None

    assert [call[0] for call in serve(path, talk).calls] == ["add", "close"]


def test_there_is_a_bound_on_clients(path: Path) -> None:
    async def talk(path: Path, _: FakeDevices) -> None:
        async with asyncio.TaskGroup() as group:
            clients = [Client(path) for _ in range(MOST_CLIENTS)]
            for client in clients:
                group.create_task(client.__aenter__())
        for client in clients:
            await client.reply()
        async with Client(path) as late:
            assert "clients" in error("GenericError", await late.reply())
            assert await late.line() is None
        for client in clients:
            await client.__aexit__()
        async with Client(path) as later:
            while "QMP" not in await later.reply():
                pass

    serve(path, talk)


def test_a_client_that_vanishes_in_its_command_is_no_matter(path: Path) -> None:
    async def talk(path: Path, devices: FakeDevices) -> None:
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as rude:
                rude.connect(str(path))
                rude.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-schema"}' * 50)
        async with Client(path) as good:
            assert "return" in await (await good.negotiated()).ask("device-add", **SPEC)
        assert devices.specs

    serve(path, talk)
