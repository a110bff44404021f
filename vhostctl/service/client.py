"""A client of a service: one command after the other, events left aside."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from vhostctl.errors import EnvironmentMissing, VhostctlError, kernel_error
from vhostctl.host.closing import Closing

_GREETING = 60.0  # seconds; a service that starts with a net.toml wires its devices first


class CommandFailed(VhostctlError):
    """The service refused a command; `kind` is the error's class in QMP."""

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(description)
        self.kind = kind


class ServiceClient(Closing):
    """A connection to the service that listens at a path; a context manager."""

    def __init__(self, path: Path) -> None:
        """Connect. Raises EnvironmentMissing if nobody listens there, and KernelError."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = self._socket.makefile("rb")
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        try:
            self._socket.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise EnvironmentMissing(
                f"no service listens at {self._path}", hint="start one: vhostctl service"
            ) from error
        except OSError as error:
            denied = isinstance(error, PermissionError)
            hint = "ask as the service's user" if denied else "check the path"
            raise kernel_error(error.errno or 0, "connect", str(self._path), hint) from error
        self._socket.settimeout(_GREETING)
        greeting = self._read()
        if greeting is None:
            raise EnvironmentMissing(f"the service at {self._path} is ending", hint="try again")
        if "QMP" not in greeting:
            raise VhostctlError(f"{self._path}: who listens there does not speak QMP")
        self.execute("qmp_capabilities")
        self._socket.settimeout(None)

    def execute(self, command: str, **arguments: object) -> Any:
        """Return what `command` returns; `_` in names of arguments stands for `-`.

        Raises CommandFailed, and VhostctlError if the connection ends.
        """
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": given})
        try:
            self._socket.sendall(message.encode() + b"\n")
        except OSError as error:
            raise self._lost(error) from error
        while True:
            reply = self._read()
            if reply is None:
                raise self._lost("it closed the connection")
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise CommandFailed(reply["error"]["class"], reply["error"]["desc"])

    def wait_for_end(self) -> None:
        """Wait until the service closes the connection."""
        while self._read() is not None:
            pass

    def _read(self) -> dict[str, Any] | None:
        """Return the next message; None at the end."""
        try:
            line = self._lines.readline()
            message = json.loads(line) if line else None
        except ConnectionResetError:
            return None
        except (OSError, ValueError) as error:
            raise self._lost(error) from error
        if message is not None and not isinstance(message, dict):
            raise self._lost(f"it said {message!r}")
        return message

    def _lost(self, why: object) -> VhostctlError:
        return VhostctlError(f"{self._path}: the service is lost: {why}", hint="see its log")

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        self._lines.close()
        self._socket.close()
