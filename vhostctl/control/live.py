"""What can be asked of a session whose rings run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from vhostctl.control import changes, ringstatus
from vhostctl.control.dirtylog import DirtyPages
from vhostctl.control.multiqueue import Disabled, QueuePairs
from vhostctl.control.plan import Observer, Plan
from vhostctl.control.rings import RingPlacement
from vhostctl.control.ringstatus import RingStatus
from vhostctl.control.states import CALLS, State, check
from vhostctl.control.wiring import Wiring
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.closing import Closing
from vhostctl.host.tap import Tap

T = TypeVar("T")


class LiveSession(Closing):
    """The calls of a session that change it while it runs; `control.session.Session` has the rest.

    Each raises StateError out of order, and leaves the session as it was if it fails; where
    that cannot be, the session is FAILED.
    """

    def __init__(self, wiring: Wiring, observe: Observer | None) -> None:
        self.state = State.NEW
        self._wiring = wiring
        self._observe = observe

    def _run(self, call: str, plan: Plan) -> None:
        """Take the steps of `call`, if it may come now; it leads to its state."""
        check(self.state, call)
        try:
            plan.run(self._observe)
        except BaseException:
            if plan.broken:
                self.state = State.FAILED
            raise
        self.state = CALLS[call].leads_to or self.state

    @property
    def link(self) -> bool:
        """Whether the backends are attached while the session runs."""
        return self._wiring.link

    def ring_errors(self) -> list[int]:
        """Return how often each ring was found malformed since the last call."""
        check(self.state, "ring_errors")
        return [queue.error.drain() for queue in self._wiring.queues]

    def ring_status(self) -> list[RingStatus]:
        """Return where every ring lies and stands, in virtqueue order. Raises KernelError."""
        check(self.state, "ring_status")
        return ringstatus.look(self._wiring)

    def set_link(self, up: bool) -> None:
        """Take the link down (no backend: frames wait where they are), or up again."""
        check(self.state, "set_link")
        if up != self.link:
            steps = changes.link_up_steps if up else changes.link_down_steps
            self._run("set_link", Plan(steps(self._wiring)))

    def enable_pair(self, pair: int) -> None:
        """Let a pair take part again, where its rings stopped. Raises as `disable_pair()`."""
        pairs = self._queue_pairs("enable_pair")
        self._switch(lambda: pairs.enable(pair))

    def disable_pair(self, pair: int, timeout: float = 1.0) -> Disabled:
        """Let a pair take part no longer: its flows go to the others, then its rings stop.

        What the guest has no buffers for within `timeout` seconds is dropped and counted in
        what is returned. Raises InvalidArgument (no such pair, the last one), KernelError, and
        StateError while the link is down.
        """
        pairs = self._queue_pairs("disable_pair")
        return self._switch(lambda: pairs.disable(pair, timeout))

    def _switch(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except BaseException:
            if any(
                p.attached(r) != self._wiring.wanted(p, r) for p, r in changes.rings(self._wiring)
            ):
                self.state = State.FAILED
            raise

    def _queue_pairs(self, call: str) -> QueuePairs:
        check(self.state, call)
        tap = self._wiring.side.tap
        if tap is None or not self.link:
            raise StateError(f"{call}(): the link is down", hint="call set_link(True) first")
        return QueuePairs(self._wiring.pairs, tap.queues, self._wiring.side.order)

    def replace_tap(self, tap: Tap) -> None:
        """Move every ring to the queues of `tap`, which stays the caller's.

        The tap before is closed if this session opened it. Raises InvalidArgument (number
        of queues) and KernelError.
        """
        check(self.state, "replace_tap")
        with contextlib.ExitStack() as later:
            steps = changes.replace_tap_steps(self._wiring, tap, later.callback)
            self._run("replace_tap", Plan(steps))

    def stop_ring(self, queue: int) -> int:
        """Stop the virtqueue `queue` alone and return its base (VIRTIO_F_RING_RESET)."""
        check(self.state, "stop_ring")
        self._run("stop_ring", Plan(changes.stop_ring_steps(self._wiring, queue)))
        pair, ring = changes.find(self._wiring, queue)
        return pair.base(ring)

    def start_ring(self, queue: int, base: int = 0, place: RingPlacement | None = None) -> None:
        """Start a virtqueue that was stopped alone, at `place` if it is to lie elsewhere."""
        check(self.state, "start_ring")
        self._run("start_ring", Plan(changes.start_ring_steps(self._wiring, queue, base, place)))

    def mask(self, queue: int) -> None:
        """Keep the calls of the virtqueue `queue` from the guest."""
        check(self.state, "mask")
        pair, ring = changes.find(self._wiring, queue)
        pair.calls[ring].mask()

    def unmask(self, queue: int) -> None:
        """Let the calls through again; what came meanwhile arrives as one."""
        check(self.state, "unmask")
        pair, ring = changes.find(self._wiring, queue)
        pair.calls[ring].unmask()

    def kick(self) -> None:
        """Signal every ring's kick: what its driver rang while nobody listened is looked at."""
        check(self.state, "kick")
        for queue in self._wiring.queues:
            queue.events["kick"].signal()

    @property
    def busyloop(self) -> int:
        """How long every worker polls before it sleeps, in microseconds."""
        return self._wiring.busyloop

    @property
    def logging(self) -> bool:
        """Whether it is logged which pages the devices write."""
        return self._wiring.log.started

    def set_busyloop(self, microseconds: int) -> None:
        """Let every worker poll for so long before it sleeps; 0: not at all."""
        check(self.state, "set_busyloop")
        self._run("set_busyloop", Plan(changes.busyloop_steps(self._wiring, microseconds)))
        self._wiring.busyloop = microseconds

    def start_log(self) -> None:
        """Log from now on which pages the devices write (VHOST_F_LOG_ALL)."""
        check(self.state, "start_log")
        if not self._wiring.log_offered:
            raise InvalidArgument(
                f"{self._wiring.config.device} offers no VHOST_F_LOG_ALL",
                hint="it cannot log what it writes",
            )
        self._wiring.log.start()

    def sync_log(self) -> DirtyPages:
        """Return the pages written since the last call, or since `start_log()`."""
        check(self.state, "sync_log")
        return self._wiring.log.sync()

    def stop_log(self) -> DirtyPages:
        """Log no longer; return the pages written since the last `sync_log()`."""
        check(self.state, "stop_log")
        return self._wiring.log.stop()
