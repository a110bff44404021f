"""Queue pairs that are switched off and on while others run: what a guest's MQ command needs.

A tap spreads flows over its enabled queues by their hash. TUNSETQUEUE, which takes a queue
out, throws away what is queued there and counts nothing. So before a pair is switched off
every flow is sent to a queue that stays, and the pair's own queue runs dry.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host.steering import Steering, grace_period
from vhostctl.host.vhost import RX, TX

_LOOK = 0.001  # seconds between two looks at a queue
_LONGEST = 1 << 17  # bytes; more than a GSO frame with every header

# Steering is a thing of privilege and of the kernel's configuration; without it pairs still go
# off and on.
_UNSTEERABLE = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL)


class Device(Protocol):
    """The vhost device of a pair."""

    def settle(self, queue: int, timeout: float) -> int:
        """Let a ring read no more; return the frames that are left of what it had read."""
        ...


class Ring(Protocol):
    """A ring of a pair."""

    @property
    def kick(self) -> int:
        """Descriptor of the eventfd that the driver signals."""


class Pair(Protocol):
    """A receive and a transmit ring and what serves them: `control.pair.VhostPair`, or like it.

    Attaching a ring to the backend that it has already changes nothing.
    """

    @property
    def vhost(self) -> Device:
        """The device."""

    @property
    def queues(self) -> Sequence[Ring]:
        """The rings, receive and transmit."""

    def attach(self, ring: int, fd: int) -> None:
        """Start `ring` on a tap's descriptor, where it stopped."""
        ...

    def detach(self, ring: int) -> None:
        """Stop `ring`."""
        ...


class Queue(Protocol):
    """A queue of the tap: `host.tap.TapQueue`, or like it."""

    def fileno(self) -> int:
        """Return its descriptor."""
        ...

    def read(self, size: int) -> bytes:
        """Read one frame."""
        ...

    def enable(self) -> None:
        """TUNSETQUEUE, IFF_ATTACH_QUEUE."""
        ...

    def disable(self) -> None:
        """TUNSETQUEUE, IFF_DETACH_QUEUE."""
        ...

    def set_steering(self, program_fd: int | None) -> None:
        """TUNSETSTEERINGEBPF; None removes the program."""
        ...


@dataclass(frozen=True, slots=True)
class Disabled:
    """How a pair was switched off.

    `dropped` frames were left in the tap's queue, for want of receive buffers. Unless
    `steered`, frames that came to that queue in the last moment may be lost uncounted.
    """

    steered: bool
    dropped: int


class QueuePairs:
    """The pairs of a running multi-queue tap, each enabled or not.

    `pairs[n]` runs on `queues[n]`; those are all the queues that the tap has, in the order in
    which they were attached. Not synchronised: one thread at a time.
    """

    def __init__(
        self, pairs: Sequence[Pair], queues: Sequence[Queue], order: list[int] | None = None
    ) -> None:
        """Raise InvalidArgument unless there is a queue for each pair.

        `order` is the enabled pair at each of the tap's queue indices, if not all are
        enabled; it is kept up to date.
        """
        if len(pairs) != len(queues):
            raise InvalidArgument(f"{len(pairs)} queue pairs on {len(queues)} queues of a tap")
        self._pairs = pairs
        self._queues = queues
        # The pair at each of the tap's queue indices: the last takes the place of one that goes.
        self._order = list(range(len(pairs))) if order is None else order

    @property
    def enabled(self) -> list[bool]:
        """Whether each pair takes part."""
        return [pair in self._order for pair in range(len(self._pairs))]

    def enable(self, pair: int) -> None:
        """Let `pair` take part again; its rings go on where they stopped.

        Does nothing if it is enabled. What fails leaves it disabled. Raises InvalidArgument
        and KernelError.
        """
        if self._check(pair):
            return
        queue = self._queues[pair]
        with ExitStack() as undo:
            queue.enable()
            undo.callback(queue.disable)
            for ring in (RX, TX):
                undo.callback(self._pairs[pair].detach, ring)
                self._pairs[pair].attach(ring, queue.fileno())
            self._order.append(pair)
            undo.callback(self._order.remove, pair)
            undo.pop_all()
        for virtqueue in self._pairs[pair].queues:
            os.eventfd_write(virtqueue.kick, 1)

    def disable(self, pair: int, timeout: float = 1.0) -> Disabled:
        """Let `pair` take part no longer: its flows move to the others, then its rings stop.

        Waits at most `timeout` seconds until the guest has what is queued, and drops the rest.
        Frames that an engine has read ahead wait for `enable`, as those do that the guest
        makes available to transmit. The tap is left without a steering program, whatever it
        had. Does nothing if `pair` is disabled. What fails leaves it enabled. Raises
        InvalidArgument, also for the last one that is enabled, and KernelError.
        """
        if not self._check(pair):
            return Disabled(steered=True, dropped=0)
        if len(self._order) == 1:
            raise InvalidArgument(
                f"queue pair {pair} is the last that is enabled", hint="enable another one first"
            )
        with ExitStack() as after, ExitStack() as undo:
            steered = self._steer_away(pair, after)
            undo.callback(self._attach, pair)
            dropped = self._drain(pair, timeout)
            self._pairs[pair].detach(TX)
            self._queues[pair].disable()
            compact(self._order, pair)
            undo.pop_all()
        return Disabled(steered, dropped)

    def _check(self, pair: int) -> bool:
        if not 0 <= pair < len(self._pairs):
            raise InvalidArgument(f"queue pair {pair}", hint=f"there are {len(self._pairs)}")
        return pair in self._order

    def _attach(self, pair: int) -> None:
        for ring in (RX, TX):
            self._pairs[pair].attach(ring, self._queues[pair].fileno())

    def _steer_away(self, pair: int, after: ExitStack) -> bool:
        """Send every flow to a queue that stays, until `after`; False if that cannot be."""
        others = [index for index, other in enumerate(self._order) if other != pair]
        # The first: the last of all moves, and who was about to use it would find it gone.
        target = others[0]
        tap = self._queues[self._order[target]]
        try:
            with Steering.to_queue(target) as program:
                after.callback(tap.set_steering, None)
                tap.set_steering(program.fileno())
            grace_period()
        except KernelError as error:
            if error.errno not in _UNSTEERABLE:
                raise
            return False
        return True

    def _drain(self, pair: int, timeout: float) -> int:
        """Stop the receive ring with its tap queue empty; return the frames dropped for that.

        What a kernel's device has taken out of the queue and not delivered is no longer seen
        there, and comes back when the ring stops. Then the ring gets another go.
        """
        rings, queue = self._pairs[pair], self._queues[pair]
        deadline = time.monotonic() + timeout
        while True:
            while _readable(queue) and time.monotonic() < deadline:
                time.sleep(_LOOK)
            rings.vhost.settle(RX, max(0.0, deadline - time.monotonic()))
            rings.detach(RX)
            if not _readable(queue) or time.monotonic() >= deadline:
                return _empty(queue, timeout)
            rings.attach(RX, queue.fileno())
            time.sleep(_LOOK)


def compact(order: list[int], pair: int) -> None:
    """Take `pair` out of `order` as the tap does: the last takes its place."""
    index = order.index(pair)
    order[index] = order[-1]
    order.pop()


def _readable(queue: Queue) -> bool:
    poll = select.poll()
    poll.register(queue.fileno(), select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def _empty(queue: Queue, timeout: float) -> int:
    """Read away what there is, for `timeout` seconds if it does not end; return the frames."""
    frames = 0
    deadline = time.monotonic() + timeout
    while _readable(queue) and time.monotonic() < deadline:
        queue.read(_LONGEST)
        frames += 1
    return frames
