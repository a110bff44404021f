"""`vhostctl up`: a wiring in the foreground, or kept by the service."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vhostctl.abi import virtio
from vhostctl.cli import asking, options, render
from vhostctl.cli.interrupts import taken
from vhostctl.control.features import Policy
from vhostctl.control.netsetup import LinkSettings
from vhostctl.jobs.up import Traffic, Up
from vhostctl.service.spec import DeviceSpec

_REFRESH = 1.0


@click.command()
@click.argument("name", required=False)
@click.option("--tap", metavar="TAP", help="Tap; made if it is missing.")
@options.maybe_device
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
@click.option("--detach", is_flag=True, help="Let the service keep it; start one if none runs.")
@asking.net_file
@options.as_json
@asking.place
@click.pass_context
def up(
    context: click.Context,
    /,
    name: str | None,
    detach: bool,
    file: Path | None,
    as_json: bool,
    state: Path,
    socket: Path,
    **described: Any,
) -> None:
    """Wire a tap to vhost-net and keep it until SIGINT or SIGTERM.

    Behind it is a small guest in this process: echo answers ARP, neighbour solicitations
    and pings for the address after the first --addr of a family, and sends UDP back; sink
    drops what comes; pcap:FILE records it; forward:IFACE moves frames to and from a link.

    A tap that exists is used as it is and stays; what was made here is removed at the end.

    With --detach the service keeps it, and so it does with every device of a file: what is
    there already stays as it is.

    \b
    Example: vhostctl up demo --tap tap0 --addr 192.0.2.1/24    (then: ping 192.0.2.2)
             vhostctl up -f net.toml
    """
    if file is not None:
        _refuse_others(context)
        specs = asking.read_devices(file)
    elif name is None or described["tap"] is None:
        raise click.UsageError("NAME and --tap are missing, or -f.")
    else:
        specs = [_spec(name, **described)]
    if file is None and not detach:
        if as_json:
            raise click.UsageError("--json goes with --detach or -f.")
        _keep(specs[0])
        return
    with (
        asking.service_at(socket, state) as client,
        asking.Changes.shown("up/1", as_json=as_json) as changes,
    ):
        asking.bring_up(client, specs, changes)


def _refuse_others(context: click.Context) -> None:
    """Raise UsageError for what describes a device beside a file that does."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in ("file", "detach", "as_json", "state", "socket"):
            raise click.UsageError(f"-f says it all: leave {parameter.opts[0]} out.")


def _spec(
    name: str,
    *,
    tap: str,
    device: str | None,
    queues: int,
    queue_size: int,
    policy: Policy,
    settings: LinkSettings,
    mac: str | None,
    guest: str,
) -> DeviceSpec:
    spec = DeviceSpec(
        name=name,
        tap=tap,
        device=options.or_engine(device),
        queues=queues,
        queue_size=queue_size,
        guest=guest,
        addresses=settings.addresses,
        mtu=settings.mtu,
        bridge=settings.bridge,
        mac=mac,
        require=tuple(virtio.feature_names(policy.required)),
        refuse=tuple(virtio.feature_names(policy.refused)),
    )
    return asking.absolute(spec)


def _keep(spec: DeviceSpec) -> None:
    """Keep a device until SIGINT or SIGTERM."""
    guest, identity = spec.guest_spec(), spec.identity()
    name, tap = spec.name, spec.tap
    with taken() as interrupts, Up(spec.wire(), guest, identity) as running:
        interrupts.check()
        where = ", ".join(filter(None, (identity.ipv4, identity.ipv6)))
        at = f" at {where}" if where and guest.kind == "echo" else ""
        with _line() as show:
            click.echo(f"{name}: {tap} is up, guest {spec.guest}{at}")
            before = running.traffic()
            while not interrupts.event.wait(_REFRESH):
                running.check()
                now = running.traffic()
                show(f"{name}: {_rates(before, now)}")
                before = now
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
