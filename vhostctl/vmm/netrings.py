"""What a session is handed for the queue pairs that a driver set up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from vhostctl.abi.tun import IFF_DETACH_QUEUE
from vhostctl.control.rings import RingPlacement
from vhostctl.errors import InvalidArgument
from vhostctl.host.eventfd import EventFd
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet
from vhostctl.vmm.virtio import Ring


class Handed(TypedDict):
    """What a session is handed besides memory and rings."""

    tap: Tap
    vhost: Sequence[VhostNet]
    events: Sequence[dict[str, EventFd]]


def handed(
    tap: Tap, vhost: Sequence[VhostNet], events: Sequence[tuple[EventFd, EventFd, EventFd]]
) -> Handed:
    """Return what a session of a pair for each of `vhost` is handed; other queues are disabled.

    `events` are kick, call and error of each ring, perhaps of more. Raises KernelError.
    """
    pairs = len(vhost)
    for queue in tap.queues[pairs:]:  # what the tap put there would wait for ever
        if not queue.flags() & IFF_DETACH_QUEUE:
            queue.disable()
    return {
        "tap": Tap(tap.name, tap.queues[:pairs], created=False),
        "vhost": vhost,
        "events": [
            {"kick": kick, "call": call, "error": error}
            for kick, call, error in events[: 2 * pairs]
        ],
    }


def pairs_set_up(rings: Sequence[Ring]) -> int:
    """Return of how many pairs a driver set up the rings: it need not have all (5.1.5)."""
    pairs = 1
    while 2 * pairs < len(rings) and all(rings[2 * pairs :][:2]):
        pairs += 1
    return pairs


def placed(rings: Sequence[Ring], queue: int) -> RingPlacement:
    """Return where ring `queue` is. Raises InvalidArgument if it is not enabled."""
    found = rings[queue]
    if found is None:
        raise InvalidArgument(f"queue {queue} is not enabled", hint="the driver forgot it")
    return found
