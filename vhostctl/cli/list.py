"""`vhostctl list`: the devices of a service, a line each."""

from __future__ import annotations

from pathlib import Path

import click

from vhostctl.cli import asking, options, render
from vhostctl.service.client import ServiceClient

_HEADER = ("name", "state", "link", "tap", "device", "guest")


@click.command()
@options.as_json
@asking.socket_only
def list(  # noqa: A001 -- the command's name
    as_json: bool,
    socket: Path,
) -> None:
    """List the devices of the service. Exit status 3 if no service runs.

    \b
    Example: vhostctl list
    """
    with ServiceClient(socket) as client:
        devices = client.execute("query-devices")
    rows = [
        (
            each["name"],
            each["state"],
            "up" if each["link"] else "down",
            each["spec"]["tap"],
            each["spec"]["device"],
            each["spec"]["guest"],
        )
        for each in devices
    ]
    if as_json:
        keyed = [dict(zip(_HEADER, row, strict=True)) for row in rows]
        render.json_document("list/1", {"devices": keyed})
    elif rows:
        render.table(rows, header=_HEADER)
