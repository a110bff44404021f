"""`vhostctl run`: a command with tap and vhost descriptors."""

from __future__ import annotations

import click

from vhostctl.cli import options
from vhostctl.control.netsetup import LinkSettings
from vhostctl.jobs.run import run as become


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--tap", required=True, metavar="NAME", help="Tap; made if it is missing.")
@options.node
@options.queues
@options.link
@click.option("--user", metavar="USER", help="Run COMMAND as this user, without privileges.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    tap: str,
    device: str,
    queues: int,
    settings: LinkSettings,
    user: str | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with open tap queues and vhost-net devices.

    {tapfds} and {vhostfds} in COMMAND become descriptor numbers joined by colons; the
    environment has them as TAPFDS and VHOSTFDS. The devices have no owner yet.

    \b
    Example:
      vhostctl run --tap tap0 --user nobody -- qemu-system-x86_64 ... \\
        -netdev tap,id=n,fds={tapfds},vhost=on,vhostfds={vhostfds} \\
        -device virtio-net-pci,netdev=n
    """
    become(command, tap=tap, device=device, queues=queues, settings=settings, user=user)
