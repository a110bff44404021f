"""`vhostctl up`: a wiring in the foreground."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import click

from vhostctl.cli import options, render
from vhostctl.control.features import Policy
from vhostctl.control.netsetup import LinkSettings
from vhostctl.control.wiring import SessionConfig
from vhostctl.jobs.guests import GuestIdentity, GuestSpec
from vhostctl.jobs.up import Traffic, Up
from vhostctl.jobs.wire import WireConfig

_REFRESH = 1.0


@click.command()
@click.argument("name")
@click.option("--tap", required=True, metavar="TAP", help="Tap; made if it is missing.")
@options.device_or_engine
@options.queues
@options.queue_size
@options.features
@options.link
@click.option("--mac", metavar="MAC", help="The guest's MAC address; made from NAME without it.")
@click.option(
    "--guest",
    default="echo",
    show_default=True,
    metavar="GUEST",
    help="echo, sink, pcap:FILE or forward:IFACE.",
)
def up(
    name: str,
    tap: str,
    device: str,
    queues: int,
    queue_size: int,
    policy: Policy,
    settings: LinkSettings,
    mac: str | None,
    guest: str,
) -> None:
    """Wire a tap to vhost-net and keep it until SIGINT or SIGTERM.

    Behind it is a small guest in this process: echo answers ARP, neighbour solicitations
    and pings for the address after the first --addr of a family, and sends UDP back; sink
    drops what comes; pcap:FILE records it; forward:IFACE moves frames to and from a link.

    A tap that exists is used as it is and stays; what was made here is removed at the end.

    \b
    Example: vhostctl up demo --tap tap0 --addr 192.0.2.1/24    (then: ping 192.0.2.2)
    """
    spec = GuestSpec.parse(guest)
    identity = GuestIdentity.choose(name, mac, settings.addresses if spec.kind == "echo" else ())
    session = SessionConfig(
        tap=tap,
        device=device,
        queues=queues,
        queue_size=queue_size,
        policy=policy,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ctrl-C: the way to end this
    with Up(WireConfig(session, settings, isolated=False), spec, identity) as running:
        where = ", ".join(filter(None, (identity.ipv4, identity.ipv6)))
        at = f" at {where}" if where and spec.kind == "echo" else ""
        with suppress(KeyboardInterrupt), _line() as show:
            click.echo(f"{name}: {tap} is up, guest {guest}{at}")
            before = running.traffic()
            while True:
                time.sleep(_REFRESH)
                now = running.traffic()
                show(f"{name}: {_rates(before, now)}")
                before = now
        # What is undone now must not be left half-way by the next ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        total = running.traffic()
    click.echo(
        f"{name}: down; guest received {total.rx_frames} frames, {total.rx_bytes} bytes, "
        f"sent {total.tx_frames} frames, {total.tx_bytes} bytes, {total.errors} errors"
    )


@contextmanager
def _line() -> Iterator[Callable[[str], None]]:
    """Show a line that is written over, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(text)


def _rates(before: Traffic, now: Traffic) -> str:
    seconds = now.seconds - before.seconds
    rates = (
        ("in", now.rx_frames - before.rx_frames, now.rx_bytes - before.rx_bytes),
        ("out", now.tx_frames - before.tx_frames, now.tx_bytes - before.tx_bytes),
    )
    text = ", ".join(
        f"{name} {render.rate(frames / seconds, 'frames')} {render.rate(size / seconds, 'B')}"
        for name, frames, size in rates
    )
    return f"{text}, {now.errors} errors" if now.errors else text
