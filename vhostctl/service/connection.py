"""One client of the control socket: what it sends, cut into messages, and what waits for it."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import suppress

from vhostctl.service.framing import Framer, MalformedError

MOST_QUEUED = 1 << 20

_CHUNK = 64 << 10
_LINGER = 1.0
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid (unix(7))

log = logging.getLogger("vhostctl.service")


class Connection:
    """A connected client, for the event loop's thread; `negotiated`: whether it gets events."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: float
    ) -> None:
        self.negotiated = False
        self._reader = reader
        self._writer = writer
        self._patience = patience
        credentials = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size
        )
        pid, uid, _ = _UCRED.unpack(credentials)
        self._name = f"client (pid {pid}, uid {uid})"

    @classmethod
    async def of(cls, connected: socket.socket, patience: float) -> Connection:
        """Return the connection of a socket, and own it; for `patience` see `messages()`."""
        return cls(*await asyncio.open_unix_connection(sock=connected, limit=_CHUNK), patience)

    def __str__(self) -> str:
        return self._name

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """Yield messages until the client ends.

        Raises MalformedError, also for one that is not whole `patience` seconds after its
        beginning, and OSError.
        """
        framer = Framer()
        deadline: float | None = None
        while data := await self._read(deadline):
            framer.feed(data)
            whole = False
            while (message := framer.next()) is not None:
                whole = True
                yield message
            if not framer.partial:
                deadline = None
            elif whole or deadline is None:
                deadline = asyncio.get_running_loop().time() + self._patience

    async def _read(self, deadline: float | None) -> bytes:
        try:
            async with asyncio.timeout_at(deadline):
                return await self._reader.read(_CHUNK)
        except TimeoutError:
            raise MalformedError(f"half a message after {self._patience:g} s") from None

    def send(self, message: bytes) -> None:
        """Queue a message; a client that has left more than MOST_QUEUED bytes unread is dropped."""
        transport = self._writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > MOST_QUEUED:
            log.warning("%s does not read what it is sent: dropped", self)
            transport.abort()
        else:
            self._writer.write(message + b"\n")

    async def drain(self) -> None:
        """Wait until most of what is queued was read. Raises OSError if the client is gone."""
        await self._writer.drain()

    async def close(self) -> None:
        """Close; the client has a moment to read what is queued."""
        self._writer.close()
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(_LINGER):
                await self._writer.wait_closed()

    def abort(self) -> None:
        """Close at once, if it is not closed."""
        self._writer.transport.abort()
