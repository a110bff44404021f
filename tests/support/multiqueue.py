"""Four pairs of a multi-queue tap, and what the kernel says of its queues."""

from __future__ import annotations

import socket
from typing import Any

import pyroute2

from tests.support import load_rig
from tests.support.load_flows import Flows
from vhostctl.host.netns import NetNamespace
from vhostctl.host.vhost import RX

__all__ = ["PAIRS", "Flows", "Rig"]

PAIRS = 4


class Rig(load_rig.Rig):
    """`PAIRS` pairs of a device, running."""

    def __init__(self, namespace: NetNamespace, device: str) -> None:
        super().__init__(namespace, load_rig.load_config(device, PAIRS))

    def _link(self) -> Any:
        with pyroute2.IPRoute() as route:
            return route.get_links(socket.if_nametoindex("tap0"))[0]

    def tap_queues(self) -> tuple[int, int]:
        """Return how many queues of the tap are enabled and disabled, as the kernel says."""
        data = self.namespace.run(self._link).get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_DATA")
        return (
            int(data.get_attr("IFLA_TUN_NUM_QUEUES")),
            int(data.get_attr("IFLA_TUN_NUM_DISABLED_QUEUES") or 0),
        )

    def udp_errors(self) -> int:
        """Return the datagrams that the host's sockets had no room for."""
        return self.udp().errors

    def base(self, pair: int) -> int:
        """Return how far the device is in the receive ring of `pair`."""
        return self.session.devices[pair].base(RX)
