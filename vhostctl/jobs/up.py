"""A wiring that is kept alive, and how much goes through it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

from vhostctl.guest.pump import Forwarder
from vhostctl.host.closing import Closing
from vhostctl.host.links import Links, exists
from vhostctl.jobs.guests import GuestIdentity, GuestSpec, make_guests
from vhostctl.jobs.running import Running
from vhostctl.jobs.wire import Wire, WireConfig


@dataclass(frozen=True, slots=True)
class Traffic:
    """Frames and bytes so far, as the guest sees them, and the time in seconds."""

    seconds: float
    rx_frames: int
    rx_bytes: int
    tx_frames: int
    tx_bytes: int
    errors: int


class Up(Closing):
    """A tap wired to vhost-net with a guest behind it, from entry to exit of a with block.

    Only what was made here is removed at the end: a tap that was there stays.
    """

    def __init__(self, config: WireConfig, guest: GuestSpec, identity: GuestIdentity) -> None:
        """Plan it; nothing is opened yet. Raises InvalidArgument."""
        if exists(config.session.tap):
            with Links() as links:
                config = replace(config, tap_mtu=links.state(config.session.tap).mtu)
        self._wire = Wire(config)
        self._guest = guest
        self._identity = identity
        self._stack = ExitStack()
        self._running: list[Running] = []
        self._forwarders: list[Forwarder] = []
        self._ring_errors = [0] * 2 * config.session.queues

    def __enter__(self) -> Self:
        try:
            self._stack.enter_context(self._wire)
            loops = make_guests(self._guest, self._identity, self._wire.driver.pairs, self._stack)
            self._forwarders = [loop for loop in loops if isinstance(loop, Forwarder)]
            for index, loop in enumerate(loops):
                running = Running(loop, f"vhostctl-guest-{index}")
                self._running.append(self._stack.enter_context(running))
        except BaseException:
            self._stack.close()
            raise
        return self

    def check(self) -> None:
        """Raise what ended a guest's loop."""
        for running in self._running:
            running.check()

    def ring_errors(self) -> list[int]:
        """Return how often each ring was found malformed so far, in virtqueue order."""
        for queue, count in enumerate(self._wire.session.ring_errors()):
            self._ring_errors[queue] += count
        return list(self._ring_errors)

    def traffic(self) -> Traffic:
        """Return the counters of all pairs."""
        stats = [pair.stats() for pair in self._wire.driver.pairs]
        return Traffic(
            seconds=time.monotonic(),
            rx_frames=sum(s.rx_frames for s in stats),
            rx_bytes=sum(s.rx_bytes for s in stats),
            tx_frames=sum(s.tx_frames for s in stats),
            tx_bytes=sum(s.tx_bytes for s in stats),
            errors=sum(self.ring_errors())
            + sum(s.rx_errors + s.tx_errors for s in stats)
            + sum(forwarder.stats().dropped for forwarder in self._forwarders),
        )

    def close(self) -> None:
        """Stop the guest and take the wiring down."""
        self._stack.close()
