"""Network links of the calling thread's namespace, over netlink."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vhostctl.errors import kernel_error
from vhostctl.host.closing import Closing

_IFA_F_NODAD = 0x02  # linux/if_addr.h: usable at once, without duplicate detection


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a link is now; `kind` is ``tun``, ``bridge``... or an empty string."""

    index: int
    kind: str
    mtu: int
    mac: str
    up: bool
    master: int
    multi_queue: bool
    vnet_hdr: bool


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """A link's counters, as the host sees them: `rx` came out of the tap's guest."""

    rx_packets: int
    rx_dropped: int
    tx_packets: int
    tx_dropped: int


def _find(name: str) -> int | None:
    # Not if_nametoindex(): for a missing link that makes the kernel run modprobe.
    return next((index for index, link in socket.if_nameindex() if link == name), None)


def exists(name: str) -> bool:
    """Return whether the calling thread's namespace has a link called `name`."""
    # A line a link: the answer of netlink has everything about each, and grows slow with them.
    lines = Path("/proc/thread-self/net/dev").read_text(encoding="utf-8").splitlines()
    return name in {line.partition(":")[0].strip() for line in lines[2:]}


class Links(Closing):
    """A netlink socket in the namespace of the thread that opens it; a context manager.

    Every method raises KernelError, which names the link.
    """

    def __init__(self) -> None:
        # Importing it takes seconds under emulation: only those who touch links pay for it.
        import pyroute2
        from pyroute2.netlink.exceptions import NetlinkError

        self._connect: Callable[[], Any] = pyroute2.IPRoute
        self._error: type[Exception] = NetlinkError
        self._route: Any = None

    def open(self) -> None:
        """Open the socket, in the calling thread's namespace."""
        self._route = self._connect()

    def _ask(
        self, what: str, name: str, function: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        try:
            return function(*args, **kw)
        except self._error as error:
            number = int(getattr(error, "code", 0))
            hint = "run with CAP_NET_ADMIN" if number in (errno.EPERM, errno.EACCES) else ""
            raise kernel_error(number, what, name, hint) from error

    def _index(self, name: str) -> int:
        index = _find(name)
        if index is None:
            raise kernel_error(errno.ENODEV, "look up link", name, "no such link here")
        return index

    def state(self, name: str) -> LinkState:
        """Return what the link `name` is now."""
        link = self._ask("query", name, self._route.get_links, self._index(name))[0]
        info = link.get_attr("IFLA_LINKINFO")
        data = info.get_attr("IFLA_INFO_DATA") if info else None
        tun = dict(data["attrs"]) if data else {}
        return LinkState(
            index=link["index"],
            kind=(info.get_attr("IFLA_INFO_KIND") if info else "") or "",
            mtu=link.get_attr("IFLA_MTU"),
            mac=link.get_attr("IFLA_ADDRESS") or "",
            up=bool(link["flags"] & 1),
            master=link.get_attr("IFLA_MASTER") or 0,
            multi_queue=bool(tun.get("IFLA_TUN_MULTI_QUEUE")),
            vnet_hdr=bool(tun.get("IFLA_TUN_VNET_HDR")),
        )

    def counters(self, name: str) -> LinkCounters:
        """Return the counters of `name`."""
        link = self._ask("query", name, self._route.get_links, self._index(name))[0]
        stats = link.get_attr("IFLA_STATS64")
        return LinkCounters(**{field: stats[field] for field in LinkCounters.__slots__})

    def change(self, name: str, **settings: Any) -> None:
        """Set `state` ("up", "down"), `mtu` or `master` (index, 0: none)."""
        self._ask(
            f"set {', '.join(settings)}",
            name,
            self._route.link,
            "set",
            index=self._index(name),
            **settings,
        )

    def addresses(self, name: str) -> list[str]:
        """Return the addresses of `name`, each such as 192.0.2.1/24."""
        found = self._ask("query", name, self._route.get_addr, index=self._index(name))
        # Of a point-to-point address IFA_ADDRESS is the other end's.
        return [
            f"{address.get_attr('IFA_LOCAL') or address.get_attr('IFA_ADDRESS')}"
            f"/{address['prefixlen']}"
            for address in found
        ]

    def _address(self, action: str, name: str, cidr: str) -> None:
        interface = ipaddress.ip_interface(cidr)
        flags = {"flags": _IFA_F_NODAD} if interface.version == 6 else {}
        self._ask(
            f"{action} address {cidr}",
            name,
            self._route.addr,
            action,
            index=self._index(name),
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
            **flags,
        )

    def add_address(self, name: str, cidr: str) -> None:
        """Give the link `name` an address such as 192.0.2.1/24."""
        self._address("add", name, cidr)

    def remove_address(self, name: str, cidr: str) -> None:
        """Take the address away again."""
        self._address("del", name, cidr)

    def close(self) -> None:
        """Close the netlink socket; a second call does nothing."""
        if self._route is not None:
            self._route.close()
            self._route = None

    def __enter__(self) -> Self:
        self.open()
        return self
