"""What the commands that ask a service have in common."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar, cast

import click
import msgspec

from vhostctl import config
from vhostctl.cli import render
from vhostctl.errors import EnvironmentMissing, VhostctlError
from vhostctl.service.client import ServiceClient
from vhostctl.service.spec import DeviceSpec, NetConfig
from vhostctl.service.state import DEFAULT_STATE, default_socket

Function = TypeVar("Function", bound=Callable[..., Any])

_START = 60.0  # seconds
_LOOK = 0.05

net_file = click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="NET.TOML",
    help="File with a [[device]] for each device.",
)


state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="VHOSTCTL_STATE",
    metavar="DIR",
    help="State directory of the service; /run/vhostctl without it.",
)
socket_option = click.option(
    "--socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Socket of the service; qmp.sock in the state directory without it.",
)


def place(function: Function) -> Function:
    """Add where a service is, handed on as `state` and `socket`."""

    @functools.wraps(function)
    def with_place(*args: Any, state: Path | None, socket: Path | None, **kwargs: Any) -> Any:
        state = state or DEFAULT_STATE
        return function(*args, state=state, socket=socket or default_socket(state), **kwargs)

    return cast(Function, state_option(socket_option(with_place)))


def socket_only(function: Function) -> Function:
    """Add where a service is, and hand on `socket` alone."""

    @functools.wraps(function)
    def without_state(*args: Any, state: Path, **kwargs: Any) -> Any:  # noqa: ARG001
        return function(*args, **kwargs)

    return place(cast(Function, without_state))


def read_devices(file: Path) -> list[DeviceSpec]:
    """Return the devices of a net.toml. Raises InvalidArgument (file, line, key), KernelError."""
    return [absolute(spec) for spec in config.load(file, NetConfig).device]


def absolute(spec: DeviceSpec) -> DeviceSpec:
    """Return `spec` with its capture file's whole path: a service runs somewhere else."""
    kind, colon, target = spec.guest.partition(":")
    if kind != "pcap":
        return spec
    return msgspec.structs.replace(spec, guest=f"{kind}{colon}{Path(target).absolute()}")


def service_at(socket: Path, state: Path) -> ServiceClient:
    """Return a connection to the service, which is started in the background if there is none."""
    try:
        return ServiceClient(socket)
    except EnvironmentMissing:
        pass
    command = [sys.executable, "-m", "vhostctl", "service"]
    command += ["--state", str(state.absolute()), "--socket", str(socket.absolute())]
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            cwd="/",
        )
        return _when_ready(socket, process, errors)


def _when_ready(socket: Path, process: subprocess.Popen[bytes], errors: IO[str]) -> ServiceClient:
    deadline = time.monotonic() + _START
    while True:
        ended = process.poll()
        try:
            return ServiceClient(socket)  # perhaps one that somebody else started meanwhile
        except EnvironmentMissing:
            if ended is None and time.monotonic() < deadline:
                time.sleep(_LOOK)
                continue
        errors.seek(0)
        said = errors.read().strip().removeprefix("Error: ") or f"exit status {ended}"
        raise VhostctlError(f"no service could be started: {said}")


class Changes:
    """What was changed, said as it happens or as one document."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._made: list[dict[str, str]] = []

    def add(self, device: str, change: str) -> None:
        """Note that `device` was added, started or removed."""
        self._made.append({"device": device, "change": change})
        if not self._as_json:
            click.echo(f"{device}: {change}")

    @classmethod
    @contextmanager
    def shown(cls, schema: str, *, as_json: bool) -> Iterator[Changes]:
        """Yield an empty list; at the end say what has not been said, whatever comes."""
        changes = cls(as_json=as_json)
        try:
            yield changes
        except BaseException:
            if as_json:
                render.json_document(schema, {"changes": changes._made})
            raise
        if as_json:
            render.json_document(schema, {"changes": changes._made})
        elif not changes._made:
            click.echo("nothing to change")


def bring_up(client: ServiceClient, specs: Sequence[DeviceSpec], changes: Changes) -> None:
    """Have every one of `specs` in the service, and running. Raises CommandFailed."""
    for spec in specs:
        if client.execute("device-add", **msgspec.to_builtins(spec))["changed"]:
            changes.add(spec.name, "added")
        elif client.execute("device-start", name=spec.name)["changed"]:
            changes.add(spec.name, "started")
