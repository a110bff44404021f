"""Two queue pairs joined by a loop in C: packets pass with what their senders left undone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from vhostctl.abi import virtio
from vhostctl.errors import InvalidArgument
from vhostctl.guest.driver import QueuePair, native, own
from vhostctl.guest.pump import Loop

__all__ = ["LaneStats", "Patch", "PatchStats"]

ffi, lib = native.ffi, native.lib

# What one side may be handed (virtio 1.2, 5.1.3) and what the other must take then. CSUM has
# no place here: a checksum that the other side would not complete is completed by the loop.
_NEEDS = {
    virtio.VIRTIO_NET_F_GUEST_TSO4: virtio.VIRTIO_NET_F_HOST_TSO4,
    virtio.VIRTIO_NET_F_GUEST_TSO6: virtio.VIRTIO_NET_F_HOST_TSO6,
    virtio.VIRTIO_NET_F_GUEST_ECN: virtio.VIRTIO_NET_F_HOST_ECN,
    virtio.VIRTIO_NET_F_GUEST_UFO: virtio.VIRTIO_NET_F_HOST_UFO,
    virtio.VIRTIO_NET_F_GUEST_USO4: virtio.VIRTIO_NET_F_HOST_USO,
    virtio.VIRTIO_NET_F_GUEST_USO6: virtio.VIRTIO_NET_F_HOST_USO,
}


@dataclass(frozen=True, slots=True)
class LaneStats:
    """Counters of one direction since the patch was made; bytes are those of frames.

    Of the `frames` sent on, `gso` are still to be cut into segments and `completed` got their
    checksum here; `greatest` is the longest, in bytes. Dropped were `malformed` frames, whose
    header cannot be true, and `refused` ones, to be cut for a side that does not do it. Frames
    that are empty or too long never get so far: they are the receiving queue's `rx_errors`.
    """

    frames: int
    bytes: int
    gso: int
    completed: int
    greatest: int
    malformed: int
    refused: int


@dataclass(frozen=True, slots=True)
class PatchStats:
    """Counters of both directions, as from the first pair to the second and back."""

    forth: LaneStats
    back: LaneStats


class Patch(Loop):
    """Sends on one queue pair what the other receives, both ways, behind the same header.

    GSO packets and partial checksums pass as they are. A frame that finds no room waits in
    the queue that it came from. The pairs may be those of two drivers or of one.
    """

    def __init__(self, first: QueuePair, second: QueuePair) -> None:
        """Join two pairs; nothing moves before `run()`.

        Raises InvalidArgument unless each takes what the other is handed: every GSO type
        (its bits are named) and frames of any length. StateError: a queue is being driven.
        """
        for source, target, way in (
            (first, second, "from the first pair to the second"),
            (second, first, "from the second pair to the first"),
        ):
            _check(source, target, way)
        self._queues = (first.rx, first.tx, second.rx, second.tx)
        with ExitStack() as stack:
            rx0, tx0, rx1, tx1 = (stack.enter_context(queue.claim()) for queue in self._queues)
            super().__init__(f"patch of pairs {first.index} and {second.index}")
            made = lib.patch_create(rx0, tx0, rx1, tx1, self._stop.fileno())
            self._patch = own(made, lib.patch_destroy, "patch")

    def run(self) -> None:
        """Move frames both ways until stopped. Raises RingError, KernelError, StateError."""
        with ExitStack() as stack:
            for queue in self._queues:
                stack.enter_context(queue.claim())
            self._repeat(lambda: lib.patch_run(self._patch), *self._queues)

    def stats(self) -> PatchStats:
        """Return the counters. From any thread."""
        return PatchStats(self._lane(0), self._lane(1))

    def _lane(self, start: int) -> LaneStats:
        stats = ffi.new("struct patch_stats *")
        lib.patch_read_stats(self._patch, start, stats)
        return LaneStats(*(getattr(stats, name) for name in LaneStats.__slots__))


def _check(source: QueuePair, target: QueuePair, way: str) -> None:
    handed = [bit for bit in _NEEDS if source.features >> bit & 1]
    needed = {_NEEDS[bit] for bit in handed} | ({virtio.VIRTIO_NET_F_CSUM} if handed else set())
    missing = sorted(bit for bit in needed if not target.features >> bit & 1)
    if missing:
        raise InvalidArgument(
            f"{way}: {_names(handed)} without {_names(missing)}",
            hint="acknowledge on one side what the other is handed",
        )
    if source.rx.limit > target.tx.limit:
        raise InvalidArgument(
            f"{way}: frames of up to {source.rx.limit} bytes, {target.tx.limit} are taken",
            hint="make both drivers with the same max_frame",
        )


def _names(bits: list[int]) -> str:
    return ", ".join(virtio.FEATURE_NAMES[bit] for bit in bits)
