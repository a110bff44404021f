"""A server of QEMU's Machine Protocol: greeting, commands and replies, events.

The protocol is that of QEMU's docs/interop/qmp-spec; docs/service.md has what differs.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Any

import msgspec

from vhostctl.errors import StateError, VhostctlError
from vhostctl.host.listening import notify
from vhostctl.service.basics import CAPABILITIES, basic_commands, this_version
from vhostctl.service.connection import Connection
from vhostctl.service.framing import MalformedError
from vhostctl.service.schema import Command, CommandNotFound, DeviceNotFound

MOST_CLIENTS = 64

_PATIENCE = 5.0
_RETRY = 0.1

log = logging.getLogger("vhostctl.service")


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command as it comes; `id` is whatever the client knows it by."""

    execute: str
    arguments: dict[str, Any] = {}
    id: Any = None


class QmpServer:
    """Serves clients on listening AF_UNIX stream sockets, which stay the caller's.

    Commands of all clients run one at a time, in one thread of their own; events go to every
    client that has negotiated. A client that breaks the protocol loses its connection.
    """

    def __init__(self, sockets: Sequence[socket.socket], *, patience: float = _PATIENCE) -> None:
        """Plan it; `patience` is how many seconds a message may take to arrive whole."""
        self._sockets = sockets
        self._patience = patience
        self._greeting = msgspec.json.encode(
            {"QMP": {"version": this_version(), "capabilities": []}}
        )
        self._clients: dict[Connection, asyncio.Task[None]] = {}
        self._own: dict[str, Command[Any]] = {}
        self._others: dict[str, Command[Any]] = {}
        self._executor: Executor
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._reason = "host-signal"
        self._over = False

    def emit(self, event: str, data: Mapping[str, object]) -> None:
        """Tell every client; from any thread. Outside of `serve()` there is nobody to tell."""
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        timestamp = {"seconds": seconds, "microseconds": microseconds}
        message = msgspec.json.encode({"event": event, "data": data, "timestamp": timestamp})
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it was closed in this moment
                loop.call_soon_threadsafe(self._broadcast, message)

    def _broadcast(self, message: bytes) -> None:
        for client in self._clients:
            if client.negotiated:
                client.send(message)

    async def serve(
        self, commands: Iterable[Command[Any]], finish: Callable[[], object] = lambda: None
    ) -> None:
        """Serve `commands` until `quit`, SIGTERM or SIGINT; in the main thread.

        At the end `finish` runs as commands do, behind the last of them, while clients still
        hear of events. Raises what it raises.
        """
        others = list(commands)
        self._loop = asyncio.get_running_loop()
        if self._over:
            self._ended.set()
        self._own = {each.name: each for each in basic_commands(others, self._quit)}
        self._others = {each.name: each for each in others}
        with ThreadPoolExecutor(1, "vhostctl-commands") as self._executor, self._signals():
            accepting = [self._loop.create_task(self._accept(each)) for each in self._sockets]
            try:
                notify("READY=1")
                await self._ended.wait()
                notify("STOPPING=1")
            finally:
                self._ended.set()
                guest = self._reason.startswith("guest-")
                self.emit("SHUTDOWN", {"guest": guest, "reason": self._reason})
                await _cancel(accepting)
                try:
                    await self._loop.run_in_executor(self._executor, finish)
                finally:
                    await _cancel(self._clients.values())
                    self._loop = None

    def end(self, reason: str) -> None:
        """End `serve()`, from any thread; nothing if it has ended.

        Clients hear of the `reason`, one of QEMU's ShutdownCause ("guest-shutdown"...).
        """
        self._reason = reason
        self._over = True  # first: `serve()` looks at it when there is a loop
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it was closed in this moment
                loop.call_soon_threadsafe(self._ended.set)

    def _quit(self) -> None:
        self._reason = "host-qmp-quit"
        asyncio.get_running_loop().call_soon(self._ended.set)  # after the reply

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """End the service by a signal; a second one changes nothing."""
        # Not by the loop's own handlers: they leave the system's behind, and a signal that comes
        # ahead of the earlier ones' return would end the process.
        loop = asyncio.get_running_loop()
        numbers = {signal.SIGTERM, signal.SIGINT}
        seen, noted = socket.socketpair()
        with seen, noted:
            for end in (seen, noted):
                end.setblocking(False)

            def look() -> None:
                if numbers & set(seen.recv(64)):
                    self._ended.set()

            loop.add_reader(seen, look)
            wakeup = signal.set_wakeup_fd(noted.fileno(), warn_on_full_buffer=False)
            before = {number: signal.signal(number, lambda *_: None) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(wakeup)
                loop.remove_reader(seen)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                connected, _ = await loop.sock_accept(listening)
                client = await Connection.of(connected, self._patience)
            except OSError as error:  # no descriptor is free, or the client went at once
                log.warning("a client could not be accepted: %s", error)
                await asyncio.sleep(_RETRY)
                continue
            task = loop.create_task(self._talk(client))
            self._clients[client] = task
            task.add_done_callback(partial(self._forget, client))

    def _forget(self, client: Connection, task: asyncio.Task[None]) -> None:
        del self._clients[client]
        client.abort()
        if not task.cancelled() and (error := task.exception()):
            log.error("%s: %s", client, error, exc_info=error)

    async def _talk(self, client: Connection) -> None:
        try:
            if len(self._clients) > MOST_CLIENTS:
                raise MalformedError(f"more than {MOST_CLIENTS} clients")
            client.send(self._greeting)
            async with aclosing(client.messages()) as messages:
                async for message in messages:
                    client.send(await self._reply(client, message))
                    await client.drain()
        except MalformedError as error:
            log.warning("%s: %s: dropped", client, error)
            client.send(msgspec.json.encode(_error("GenericError", str(error))))
        except OSError as error:
            log.info("%s: %s", client, error)
        finally:
            await client.close()

    async def _reply(self, client: Connection, message: bytes) -> bytes:
        """Return what is to be sent for `message`. Raises MalformedError if it is not JSON."""
        try:
            data = msgspec.json.decode(message)
        except ValueError as error:
            raise MalformedError(f"JSON parse error: {error}") from error
        identity = {"id": data["id"]} if "id" in data else {}
        try:
            result = await self._execute(client, msgspec.convert(data, _Request))
            return msgspec.json.encode({"return": result} | identity)
        except CommandNotFound as error:
            reply = _error("CommandNotFound", str(error))
        except DeviceNotFound as error:
            reply = _error("DeviceNotFound", str(error))
        except (VhostctlError, OSError, msgspec.ValidationError) as error:
            reply = _error("GenericError", str(error))
        except Exception as error:  # one command's fault ends neither service nor client
            log.exception("%s: %s", client, data)
            reply = _error("GenericError", f"internal error: {type(error).__name__}: {error}")
        return msgspec.json.encode(reply | identity)

    async def _execute(self, client: Connection, request: _Request) -> object:
        name = request.execute
        if client.negotiated == (name == CAPABILITIES):
            raise CommandNotFound(
                "capabilities negotiation is complete already"
                if client.negotiated
                else f"expecting capabilities negotiation with {CAPABILITIES!r}"
            )
        if own := self._own.get(name):
            result = own.call(request.arguments)
            client.negotiated = True
            return result
        command = self._others.get(name)
        if command is None:
            raise CommandNotFound(f"there is no command {name!r}", hint="see query-commands")
        if self._ended.is_set():
            raise StateError(f"{name}: the service is ending")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, command.call, request.arguments)


def _error(kind: str, description: str) -> dict[str, object]:
    return {"error": {"class": kind, "desc": " ".join(description.split())}}


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
