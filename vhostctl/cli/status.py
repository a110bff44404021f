"""`vhostctl status`: everything about the devices of a service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vhostctl.cli import asking, options, render
from vhostctl.service.client import ServiceClient


@click.command()
@click.argument("name", required=False)
@options.as_json
@asking.socket_only
def status(
    name: str | None,
    as_json: bool,
    socket: Path,
) -> None:
    """Show what the devices of the service are, or one of them.

    Exit status 3 if no service runs, 1 if it has no device called NAME.

    \b
    Example: vhostctl status demo --json
    """
    with ServiceClient(socket) as client:
        devices = (
            [client.execute("query-device", name=name)] if name else client.execute("query-devices")
        )
    if as_json:
        render.json_document("status/1", {"devices": devices})
        return
    for device in devices:
        render.table(_rows(device), title=device["name"])


def _rows(device: dict[str, Any]) -> list[tuple[str, str]]:
    spec, traffic = device["spec"], device["traffic"]
    tap = f"{spec['tap']}, {'made here' if device['created'] else 'was there'}"
    guest = [spec["guest"], device["mac"], device["ipv4"], device["ipv6"]]
    memory = (f"{each['name']} {each['gpa']:#x}+{each['size']:#x}" for each in device["memory"])
    wired = device["state"] != "stopped"
    rows = [
        ("state", device["state"]),
        ("link", "up" if device["link"] else "down"),
        ("tap", tap if wired else spec["tap"]),
        ("device", spec["device"]),
        ("guest", ", ".join(filter(None, guest))),
        ("pairs", f"{len(device['enabled'])} of {spec['queues']} x {spec['queue-size']}"),
        ("features", ", ".join(device["features"])),
        ("memory", ", ".join(memory)),
        ("dirty log", "on" if device["logging"] else "off"),
        ("received", f"{traffic['rx-frames']} frames, {traffic['rx-bytes']} bytes"),
        ("sent", f"{traffic['tx-frames']} frames, {traffic['tx-bytes']} bytes"),
        ("errors", str(traffic["errors"])),
        ("failed", device["guest-error"] or ""),
    ]
    return [row for row in rows if row[1]]
