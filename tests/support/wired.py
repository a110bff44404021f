"""A tap in a namespace of its own, and our driver at the rings of a network device's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan
from vhostctl.control.rings import RingPlacement, VirtQueue
from vhostctl.guest.driver import NetDriver
from vhostctl.host.closing import Closing
from vhostctl.host.links import LinkCounters, Links, LinkState
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.jobs.traffic import ADDRESSES, Traffic
from vhostctl.vmm.net import NetDevice

T = TypeVar("T")

NOTHING_LOST = [0, 0, 0, 0]


class Wired(Closing):
    """A tap of `queues` queues, with addresses, in a namespace that sends to it.

    What a test puts on `stack` is closed with it.
    """

    driver: NetDriver

    def __init__(self, queues: int) -> None:
        self._links = Links()
        with ExitStack() as stack:
            self.namespace = stack.enter_context(NetNamespace())
            self.tap = stack.enter_context(self.in_namespace(lambda: Tap.open("tap0", queues)))
            stack.callback(self.in_namespace, self._links.close)
            self.in_namespace(self._links.open)
            plan = Plan(link_steps(self._links, "tap0", LinkSettings(addresses=ADDRESSES)))
            self.in_namespace(plan.run)
            self.stack = stack.pop_all()

    def drive(
        self,
        space: AddressSpace,
        net: NetDevice,
        rings: Sequence[RingPlacement],
        features: int,
        arena: tuple[int, int],
    ) -> None:
        """Have our driver work on `rings`, its buffers in `arena` (address, length)."""
        events = zip(net.kicks, net.calls, net.errors, strict=False)
        queues = [
            VirtQueue(ring, {"kick": kick, "call": call, "error": error})
            for ring, (kick, call, error) in zip(rings, events, strict=False)
            if kick is not None
        ]
        pairs = list(zip(queues[::2], queues[1::2], strict=True))
        self.driver = self.stack.enter_context(
            NetDriver(space, pairs, features, arena, max_frame=1514)
        )
        for pair in self.driver.pairs:
            pair.start()

    def exchange(self, pairs: int = 1, count: int = 128) -> list[int]:
        """Send `count` datagrams each way over the first `pairs` pairs.

        Returns how many were lost and how many came changed, to the guest and to the host.
        """
        with Traffic(self, self.driver.pairs[:pairs]) as traffic:
            traffic.ping()
            traffic.exchange(count)
            ways = (traffic.to_guest, traffic.to_host)
            return [count for way in ways for count in (way.lost, way.changed)]

    def in_namespace(self, function: Callable[[], T]) -> T:
        return self.namespace.run(function)

    def counters(self) -> LinkCounters:
        return self.in_namespace(lambda: self._links.counters("tap0"))

    def link_state(self) -> LinkState:
        return self.in_namespace(lambda: self._links.state("tap0"))

    def close(self) -> None:
        self.stack.close()
