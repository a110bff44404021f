"""A session with our driver at its other end: what every job starts from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

from vhostctl.abi import virtio
from vhostctl.control.features import mask
from vhostctl.control.netsetup import LinkSettings, link_steps, mtu_step
from vhostctl.control.plan import Observer, Plan, Step
from vhostctl.control.rings import place_rings
from vhostctl.control.session import Session
from vhostctl.control.states import State
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import InvalidArgument
from vhostctl.guest.driver import NetDriver
from vhostctl.host.closing import Closing
from vhostctl.host.links import LinkCounters, Links, LinkState
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.jobs.running import Running

T = TypeVar("T")

ETHERNET_HEADER = 14
# Unmerged buffers behind indirect tables take the most memory.
_LARGEST = mask(virtio.VIRTIO_F_VERSION_1, virtio.VIRTIO_RING_F_INDIRECT_DESC)


@dataclass(frozen=True, slots=True)
class WireConfig:
    """What to wire, and how: `buffer_size` bytes in each of the driver's buffers.

    `isolated` puts the tap into a fresh namespace that ends with this process. `tap_mtu` is
    what the tap has where `link` leaves the MTU as it is.
    """

    session: SessionConfig
    link: LinkSettings = field(default_factory=LinkSettings)
    buffer_size: int = 2048
    isolated: bool = True
    tap_mtu: int = 1500

    @property
    def mtu(self) -> int:
        """Bytes of IP in the longest frame."""
        return self.link.mtu or self.tap_mtu

    def memory_size(self) -> int:
        """Return the bytes of guest memory that rings and buffers need."""
        rings = 2 * self.session.queues
        _, end = place_rings(0, rings, self.session.queue_size)
        arena = NetDriver.arena_size(
            [self.session.queue_size] * rings,
            _LARGEST,
            self.buffer_size,
            self.mtu + ETHERNET_HEADER,
        )
        return (end + arena + 0xFFFFF) & -0x100000


class Wire(Closing):
    """A tap, vhost-net and our driver; it runs inside a with block.

    `driver` is the guest's side, `mtu` the tap's. `bring_up` is the seconds from nothing to
    running.
    """

    def __init__(self, config: WireConfig, observe: Observer | None = None) -> None:
        """Plan it; nothing is opened yet. Raises InvalidArgument.

        `observe` is called before each step.
        """
        self._observe = observe
        self.config = replace(
            config, session=replace(config.session, memory_size=config.memory_size())
        )
        self.bring_up = 0.0
        self.mtu = config.mtu
        self.driver: NetDriver
        self.namespace: NetNamespace | None = None
        self._mtu_changed = False
        self._stack = ExitStack()
        self._links = Links()
        self.session = Session(self.config.session, open_tap=self._open_tap, observe=observe)
        pairs = f"{config.session.queues} pairs" if config.session.queues > 1 else "1 pair"
        isolate = Step("unshare", "network namespace", "", self._isolate)
        self._isolate_plan = Plan([isolate] if config.isolated else [])
        self._link_plan = Plan(link_steps(self._links, config.session.tap, config.link))
        self._driver_plan = Plan([Step("lay out driver", pairs, "", self._drive)])
        self._kick_plan = Plan([Step("post receive buffers", pairs, "and kick", self._kick)])

    def plan(self) -> Iterator[Step]:
        """Yield every step from nothing to running, in the order in which they are taken."""
        prepare, start = self.session.plan
        yield from self._isolate_plan.steps
        yield from prepare
        yield from self._link_plan.steps
        yield from self._driver_plan.steps
        yield from start
        yield from self._kick_plan.steps

    def _isolate(self) -> None:
        self.namespace = self._stack.enter_context(NetNamespace())

    def in_namespace(self, function: Callable[[], T]) -> T:
        """Return function(), called where the tap is."""
        return self.namespace.run(function) if self.namespace else function()

    def counters(self) -> LinkCounters:
        """Return the tap's counters on the host."""
        return self.in_namespace(lambda: self._links.counters(self.config.session.tap))

    def link_state(self) -> LinkState:
        """Return what the tap is on the host."""
        return self.in_namespace(lambda: self._links.state(self.config.session.tap))

    def set_mtu(self, mtu: int) -> None:
        """Change the tap's MTU while frames flow; it is put back at the end.

        Raises InvalidArgument beyond the MTU that the driver's buffers are for, KernelError.
        """
        if mtu > self.config.mtu:
            raise InvalidArgument(
                f"MTU {mtu}", hint=f"the guest's buffers are for {self.config.mtu}; start with more"
            )
        plan = Plan([mtu_step(self._links, self.config.session.tap, mtu)])
        self.in_namespace(lambda: plan.run(self._observe))
        self.mtu = mtu
        if not self._mtu_changed:  # the first plan knows the MTU that was there before
            self._mtu_changed = True
            self._stack.callback(self.in_namespace, plan.undo)

    def _open_tap(self) -> Tap:
        session = self.config.session
        return self.in_namespace(lambda: Tap.open(session.tap, session.queues))

    def _drive(self) -> None:
        session = self.session
        self.driver = self._stack.enter_context(
            NetDriver(
                session,
                session.pairs,
                session.features,
                session.arena,
                buffer_size=self.config.buffer_size,
                max_frame=self.config.mtu + ETHERNET_HEADER,
            )
        )

    def _kick(self) -> None:
        for pair in self.driver.pairs:
            pair.start()

    def __enter__(self) -> Self:
        started = time.perf_counter()
        observe = self._observe
        try:
            self._isolate_plan.run(observe)
            self._stack.enter_context(self.session)
            if self.session.iotlb is not None:
                self._stack.enter_context(Running(self.session.iotlb, "vhostctl-iotlb"))
            self._stack.callback(self.in_namespace, self._links.close)
            self.in_namespace(self._links.open)
            self._stack.callback(self.in_namespace, self._link_plan.undo)
            self.in_namespace(lambda: self._link_plan.run(observe))
            self._driver_plan.run(observe)
            self._stack.callback(self._stop)
            self.session.start()
            self._kick_plan.run(observe)
        except BaseException:
            self._stack.close()
            raise
        self.bring_up = time.perf_counter() - started
        return self

    def _stop(self) -> None:
        if self.session.state is State.RUNNING:
            self.session.stop()

    def close(self) -> None:
        """Stop the rings, close the driver, put the tap back, close everything."""
        self._stack.close()
