"""`vhostctl broker`: descriptors for those who may not open them."""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from pathlib import Path

import click

from vhostctl.broker import SOCKET
from vhostctl.broker.policy import Policy
from vhostctl.broker.server import Broker, listener


@click.command()
@click.option(
    "--policy",
    "policy_file",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Who may have what (TOML).",
)
@click.option(
    "--socket",
    "path",
    default=SOCKET,
    show_default=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Socket to listen on, unless systemd hands one over.",
)
def broker(policy_file: Path, path: Path) -> None:
    """Open taps and vhost-net devices for callers that may not, until SIGINT or SIGTERM.

    Nothing is allowed that no rule of the policy names; every request is logged on stderr.

    \b
    Example: vhostctl broker --policy broker.toml, which says
      [[allow]]
      groups = ["vm-users"]
      taps = ["vm-*"]
      bridges = ["br0"]
      max_queues = 4

    \b
    Then, as a user in that group:
      vhostctl run --broker --tap vm-1 --bridge br0 -- qemu-system-x86_64 ...
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    policy = Policy.load(policy_file)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ctrl-C: the way to end this
    with suppress(KeyboardInterrupt), listener(path) as sock, Broker(sock, policy) as running:
        click.echo(f"listening on {sock.getsockname()}, {len(policy.rules)} rules", err=True)
        running.serve()
