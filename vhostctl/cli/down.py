"""`vhostctl down`: devices of a service are taken down."""

from __future__ import annotations

from pathlib import Path

import click

from vhostctl.cli import asking, options
from vhostctl.errors import InvalidArgument
from vhostctl.service.client import ServiceClient


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@asking.net_file
@click.option("--quit", "end", is_flag=True, help="End the service too.")
@options.as_json
@asking.socket_only
def down(
    names: tuple[str, ...],
    file: Path | None,
    end: bool,
    as_json: bool,
    socket: Path,
) -> None:
    """Take down devices of the service: those named, those of a file, or all.

    A device that is not there is down already. Exit status 3 if no service runs.

    \b
    Example: vhostctl down demo
             vhostctl down -f net.toml --quit
    """
    if names and file:
        raise InvalidArgument("names and a file", hint="give one or the other")
    if file:
        names = tuple(spec.name for spec in reversed(asking.read_devices(file)))
    with (
        ServiceClient(socket) as client,
        asking.Changes.shown("down/1", as_json=as_json) as changes,
    ):
        if not names and not file:
            names = tuple(each["name"] for each in client.execute("query-devices"))
        for name in names:
            if client.execute("device-del", name=name)["changed"]:
                changes.add(name, "removed")
        if end:
            client.execute("quit")
            client.wait_for_end()
            changes.add("service", "ended")
