"""`vhostctl run`: a command with tap and vhost descriptors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NoReturn

import click

from vhostctl.broker import SOCKET
from vhostctl.cli import options
from vhostctl.control.netsetup import LinkSettings
from vhostctl.jobs import run as job


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--tap", metavar="NAME", help="Tap; made if it is missing.")
@options.node
@options.queues
@options.link
@click.option(
    "--broker",
    is_flag=False,
    flag_value=SOCKET,
    metavar="[SOCKET]",
    help=f"Have a broker open it all; its socket is {SOCKET} unless named.",
)
@click.option("--user", metavar="USER", help="Run COMMAND as this user, without privileges.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    tap: str | None,
    device: str,
    queues: int,
    settings: LinkSettings,
    broker: str | None,
    user: str | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with open tap queues and vhost-net devices.

    {tapfds} and {vhostfds} in COMMAND become descriptor numbers joined by colons; the
    environment has them as TAPFDS and VHOSTFDS. The devices have no owner yet.

    With --broker nobody has to be root: `vhostctl broker` opens tap and devices if its policy
    allows it, and chooses a name if --tap is left out.

    \b
    Example:
      vhostctl run --tap tap0 --user nobody -- qemu-system-x86_64 ... \\
        -netdev tap,id=n,fds={tapfds},vhost=on,vhostfds={vhostfds} \\
        -device virtio-net-pci,netdev=n
    """
    if broker is not None:
        _run_by_broker(broker, tap, device, queues, settings, user, command)
    if tap is None:
        raise click.UsageError("Missing option '--tap': only a broker chooses a name.")
    job.run(command, tap=tap, device=device, queues=queues, settings=settings, user=user)


def _run_by_broker(
    broker: str,
    tap: str | None,
    device: str,
    queues: int,
    settings: LinkSettings,
    user: str | None,
    command: tuple[str, ...],
) -> NoReturn:
    if settings.addresses or settings.mtu is not None:
        raise click.UsageError("--addr and --mtu: a broker does not set them.")
    # Inside: the others do not pay for the import, and every one of them starts a program.
    from vhostctl.broker.client import request

    identity = job.identify(user)
    with ExitStack() as stack:
        opened, devices = request(
            broker, tap=tap, queues=queues, bridge=settings.bridge, device=device
        )
        for thing in (opened, *devices):
            stack.enter_context(thing)
        job.become(command, opened, devices, identity)
