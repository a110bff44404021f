"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from vhostctl.abi import virtio
from vhostctl.control.features import Policy
from vhostctl.control.netsetup import LinkSettings
from vhostctl.host.vhost import DEFAULT_PATH, ENGINE

Function = TypeVar("Function", bound=Callable[..., Any])


def or_engine(device: str | None) -> str:
    """Return `device`, or without one what is there: the kernel's vhost-net or the engine."""
    if device is not None or Path(DEFAULT_PATH).exists():
        return device or DEFAULT_PATH
    click.echo(f"There is no {DEFAULT_PATH}: the embedded engine takes its part.", err=True)
    return ENGINE


device = click.option(
    "--device",
    default=DEFAULT_PATH,
    show_default=True,
    metavar="DEVICE",
    help="vhost-net node, or engine for the one in this process.",
)
maybe_device = click.option(
    "--device",
    metavar="DEVICE",
    help=f"vhost-net node, or engine; without it {DEFAULT_PATH}, or the engine if there is none.",
)
"""For `or_engine()` to complete."""


def device_or_engine(function: Function) -> Function:
    """Add --device; without it the device is what is there."""

    @functools.wraps(function)
    def with_device(*args: Any, device: str | None, **kwargs: Any) -> Any:
        return function(*args, device=or_engine(device), **kwargs)

    return maybe_device(cast(Function, with_device))


node = click.option(
    "--device", default=DEFAULT_PATH, show_default=True, metavar="PATH", help="vhost-net node."
)
queues = click.option(
    "--queues", default=1, show_default=True, metavar="N", help="Queue pairs, each with its device."
)
queue_size = click.option(
    "--queue-size", default=256, show_default=True, metavar="N", help="Descriptors in each ring."
)
busyloop = click.option(
    "--busyloop",
    default=0,
    show_default=True,
    metavar="US",
    help="Microseconds that the worker polls before it sleeps.",
)
worker = click.option(
    "--worker",
    type=click.Choice(["task", "kthread"]),
    help="Kind of worker, where the kernel offers the choice.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")


def link(function: Function) -> Function:
    """Add what makes the host's side of a tap, handed on as `settings`."""

    @functools.wraps(function)
    def with_settings(
        *args: Any,
        addr: tuple[str, ...],
        bridge: str | None,
        mtu: int | None,
        **kwargs: Any,
    ) -> Any:
        settings = LinkSettings(addresses=addr, mtu=mtu, bridge=bridge)
        return function(*args, settings=settings, **kwargs)

    for option in (
        click.option("--mtu", type=int, metavar="BYTES", help="MTU of the tap."),
        click.option("--bridge", metavar="BRIDGE", help="Bridge that the tap joins."),
        click.option("--addr", multiple=True, metavar="CIDR", help="Address for the tap."),
    ):
        with_settings = option(with_settings)
    return cast(Function, with_settings)


def features(function: Function) -> Function:
    """Add the three feature switches, handed on as `policy`.

    Without one of them its bit is taken if it is offered.
    """

    @functools.wraps(function)
    def with_policy(
        *args: Any,
        mrg_rxbuf: bool | None,
        event_idx: bool | None,
        indirect: bool | None,
        **kwargs: Any,
    ) -> Any:
        choices = [
            (virtio.VIRTIO_NET_F_MRG_RXBUF, mrg_rxbuf),
            (virtio.VIRTIO_RING_F_EVENT_IDX, event_idx),
            (virtio.VIRTIO_RING_F_INDIRECT_DESC, indirect),
        ]
        return function(*args, policy=Policy.of(choices), **kwargs)

    for name, text in (
        ("indirect", "Indirect descriptors."),
        ("event-idx", "Event index: fewer kicks and calls."),
        ("mrg-rxbuf", "Mergeable receive buffers."),
    ):
        with_policy = click.option(f"--{name}/--no-{name}", default=None, help=text)(with_policy)
    return cast(Function, with_policy)
