"""Taps as the broker sees them: whose they are, and whether somebody has them open.

The broker keeps no list of its own. A tap that it makes carries the user's number in its
alias, which only CAP_NET_ADMIN can change, and which goes with the tap.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from vhostctl.abi import tun
from vhostctl.broker.peer import Peer
from vhostctl.broker.protocol import Refused
from vhostctl.errors import kernel_error
from vhostctl.host.ioctl import call
from vhostctl.host.links import Links
from vhostctl.host.tap import Tap

_CLAIM = "vhostctl broker: uid "


def claim(uid: int) -> str:
    """Return the alias of a tap that was made for user `uid`."""
    return f"{_CLAIM}{uid}"


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What the broker has to know of a link; `master` is an index, 0 for none.

    `owner` and `group` are a tap's TUNSETOWNER and TUNSETGROUP; `attached` is how many queues
    of a multi-queue tap somebody holds. A single queue that is held refuses another holder.
    """

    alias: str
    master: int
    owner: int | None
    group: int | None
    attached: int


class LinkTable(Links):
    """A netlink socket that lists links with what the broker has to know of them."""

    def all(self) -> dict[str, LinkInfo]:
        """Return every link of the namespace, by name."""
        links = self._ask("query", "links", self._route.get_links)
        return {link.get_attr("IFLA_IFNAME"): _info(link) for link in links}


def _info(link: Any) -> LinkInfo:
    info = link.get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    tap = dict(data["attrs"]) if data and info.get_attr("IFLA_INFO_KIND") == "tun" else {}
    return LinkInfo(
        alias=link.get_attr("IFLA_IFALIAS") or "",
        master=link.get_attr("IFLA_MASTER") or 0,
        owner=tap.get("IFLA_TUN_OWNER"),
        group=tap.get("IFLA_TUN_GROUP"),
        attached=tap.get("IFLA_TUN_NUM_QUEUES", 0) + tap.get("IFLA_TUN_NUM_DISABLED_QUEUES", 0),
    )


def check_theirs(peer: Peer, name: str, info: LinkInfo) -> None:
    """Raise Refused if the tap `name`, which exists, is another's; KernelError if it is in use.

    What the kernel asks of one who has no CAP_NET_ADMIN (tun_not_capable() of
    drivers/net/tun.c) is asked here, because the broker has it.
    """
    if info.alias.startswith(_CLAIM):
        theirs = info.alias == claim(peer.uid)
    else:
        theirs = info.owner in (None, peer.uid) and (info.group is None or info.group in peer.gids)
    if not theirs:
        raise Refused(f"tap {name} is another user's", hint="ask for another name")
    if info.attached:
        raise kernel_error(errno.EBUSY, "attach", name, "somebody has the tap open")


def check_alone(links: LinkTable, tap: Tap) -> None:
    """Raise KernelError (EAGAIN) if somebody else has a queue of `tap`.

    They may have attached before it had an owner, or since it was looked at.
    """
    if links.all()[tap.name].attached > len(tap.queues):
        raise kernel_error(
            errno.EAGAIN, "attach", tap.name, "somebody else attached to it meanwhile: ask again"
        )


def take(links: Links, tap: Tap, peer: Peer) -> None:
    """Note that `tap`, which was made just now, is `peer`'s, and let nobody else attach to it.

    A tap without TUNSETOWNER has queues for everybody who can open /dev/net/tun.
    """
    call(tap.queues[0], tun.TUNSETOWNER, os.geteuid())
    links.change(tap.name, ifalias=claim(peer.uid))
