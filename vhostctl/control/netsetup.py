"""The host's side of a tap: addresses, MTU, bridge, up; all of it with an undo."""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from vhostctl.control.plan import Step
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host.links import Links


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What to make of a link; None or empty leaves it as it is."""

    addresses: tuple[str, ...] = ()
    mtu: int | None = None
    bridge: str | None = None

    def __post_init__(self) -> None:
        """Raise InvalidArgument for an address or MTU that cannot be."""
        for cidr in self.addresses:
            try:
                ipaddress.ip_interface(cidr)
            except ValueError as error:
                raise InvalidArgument(f"address {cidr!r}", hint="write 192.0.2.1/24") from error
        if self.mtu is not None and not 68 <= self.mtu <= 65521:
            raise InvalidArgument(f"MTU {self.mtu}", hint="a tap takes 68 to 65521 bytes")


def link_steps(links: Links, name: str, settings: LinkSettings) -> Iterator[Step]:
    """Yield the steps that apply `settings` to the link `name` and bring it up."""
    if settings.mtu is not None:
        yield mtu_step(links, name, settings.mtu)
    if settings.bridge is not None:
        yield _change(links, name, "master", settings.bridge, "bridge")
    # Before the addresses: going down, which is undone after them, takes IPv6 ones along.
    yield _change(links, name, "state", "up", "state")
    for cidr in settings.addresses:
        added: list[str] = []
        yield Step(
            "add address",
            name,
            cidr,
            partial(_add_address, links, name, cidr, added),
            partial(_remove_address, links, name, added),
        )


def mtu_step(links: Links, name: str, mtu: int) -> Step:
    """Return the step that gives the link `name` another MTU, and nothing else."""
    return _change(links, name, "mtu", mtu, "MTU")


def _change(links: Links, name: str, field: str, value: str | int, label: str) -> Step:
    before: list[str | int] = []

    def do() -> None:
        state = links.state(name)
        old: dict[str, str | int] = {
            "mtu": state.mtu,
            "master": state.master,
            "state": "up" if state.up else "down",
        }
        before.append(old[field])
        new = links.state(str(value)).index if field == "master" else value
        links.change(name, **{field: new})

    def undo() -> None:
        if before:
            with _unless_gone():
                links.change(name, **{field: before.pop()})

    return Step(f"set {label}", name, str(value), do, undo)


def _add_address(links: Links, name: str, cidr: str, added: list[str]) -> None:
    try:
        links.add_address(name, cidr)
    except FileExistsError:
        return  # the link has it already, so it is not ours to remove
    added.append(cidr)


def _remove_address(links: Links, name: str, added: list[str]) -> None:
    while added:
        with _unless_gone():
            links.remove_address(name, added.pop())


@contextmanager
def _unless_gone() -> Iterator[None]:
    """Take what somebody else removed meanwhile, the link or its address, for taken back."""
    try:
        yield
    except KernelError as error:
        if error.errno not in (errno.ENODEV, errno.EADDRNOTAVAIL):
            raise


def parse_mac(text: str) -> bytes:
    """Return the six bytes of a unicast MAC address such as 02:00:00:00:00:01.

    Raises InvalidArgument.
    """
    try:
        mac = bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise InvalidArgument(f"MAC address {text!r}", hint="write a unicast 02:00:00:00:00:01")
    return mac
