"""`vhostctl service`: devices that outlive whoever made them, behind a QMP socket."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import click

from vhostctl.cli import asking


@click.command()
@asking.net_file
@asking.state_option
@asking.socket_option
def service(file: Path | None, state: Path | None, socket: Path | None) -> None:
    """Keep devices, and do what clients ask for over QMP, until SIGINT, SIGTERM or quit.

    One service at a time has a state directory. What one that was killed left behind is put
    in order first. systemd may hand over directory (RUNTIME_DIRECTORY) and socket (LISTEN_FDS).

    \b
    Example: vhostctl service -f net.toml
             qmp-shell /run/vhostctl/qmp.sock
    """
    # Imported here: those who only ask need neither netlink nor asyncio.
    from vhostctl.host.listening import listening
    from vhostctl.service.commands import device_commands
    from vhostctl.service.manager import Manager
    from vhostctl.service.qmp import QmpServer
    from vhostctl.service.state import StateDirectory, default_socket, default_state

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    state = state or default_state()
    socket = socket or default_socket(state)
    specs = asking.read_devices(file) if file else []
    with StateDirectory(state) as directory:
        for line in directory.recover():
            click.echo(f"left by a service that was killed: {line}", err=True)
        directory.announce(socket)
        with listening(socket) as sockets:
            server = QmpServer(sockets)
            with Manager(directory, server.emit) as manager:
                for spec in specs:
                    manager.add(spec)
                asyncio.run(server.serve(device_commands(manager), manager.close))
