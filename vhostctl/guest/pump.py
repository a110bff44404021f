"""Loops over a queue pair that run in C, without the interpreter's lock, until stopped.

Each has a blocking `run()` that is meant for a thread of its own, and a `stop()` for any
other. A stop before `run()` is not lost: that run then ends at once.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from vhostctl.abi import virtio
from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.guest.driver import NetQueue, QueuePair, check, native, own
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd

ffi, lib = native.ffi, native.lib

_FOREVER = (1 << 64) - 1


class Loop(Closing):
    """A C loop that an eventfd stops; a context manager. Close it after its last run."""

    def __init__(self, label: str) -> None:
        self._stop = EventFd.create(f"stop of {label}")

    def stop(self) -> None:
        """End the run that is going on, or the next one. From any thread."""
        self._stop.signal()

    def close(self) -> None:
        """Close what the loop owns; a second call does nothing. Not during a run."""
        self._stop.close()

    def _repeat(self, step: Callable[[], int], *queues: NetQueue) -> None:
        result = -errno.EINTR
        try:
            while result == -errno.EINTR:
                result = step()  # and between two steps Python runs its signal handlers
        finally:
            self._stop.drain()
        check(result, *queues)


class Sink(Loop):
    """Receives frames and drops them uncopied."""

    def __init__(self, pair: QueuePair) -> None:
        super().__init__(f"sink of pair {pair.index}")
        self._rx = pair.rx

    def run(self, count: int | None = None) -> int:
        """Run until stopped or until `count` frames came; return how many did.

        Raises RingError, KernelError, StateError.
        """
        with self._rx.claim() as rx:
            before: int = self._rx.stats().frames
            until = _FOREVER if count is None else before + count
            self._repeat(lambda: lib.pump_sink(rx, self._stop.fileno(), until), self._rx)
            return int(self._rx.stats().frames) - before


class Transmitter(Loop):
    """Sends one frame over and over, as fast as the device takes it.

    The frame is copied into its buffer each time, as a driver with payloads to send would
    do. `frame` is a whole Ethernet frame.
    """

    def __init__(self, pair: QueuePair, frame: bytes) -> None:
        if not 1 <= len(frame) <= pair.tx.limit:
            raise InvalidArgument(f"frame of {len(frame)} bytes", hint=f"use 1..{pair.tx.limit}")
        super().__init__(f"transmitter of pair {pair.index}")
        self._tx = pair.tx
        self._frame = ffi.from_buffer("uint8_t[]", bytes(frame))

    def run(self, count: int | None = None) -> int:
        """Run until stopped or until the device has used `count` frames; return how many went.

        Raises RingError, KernelError, StateError.
        """
        with self._tx.claim() as tx:
            before: int = self._tx.stats().frames
            until = _FOREVER if count is None else before + count
            self._repeat(
                lambda: lib.pump_transmit(
                    tx, self._stop.fileno(), self._frame, len(self._frame), until
                ),
                self._tx,
            )
            return int(self._tx.stats().frames) - before


@dataclass(frozen=True, slots=True)
class ForwardStats:
    """Frames to and from the file, and those that it or the queue could not take."""

    to_file: int
    from_file: int
    dropped: int


class Forwarder(Loop):
    """Moves frames between a queue pair and an AF_PACKET socket or a tap.

    `fd` stays the caller's. A tap is opened with IFF_NO_PI and non-blocking. Frames that the
    file does not take at once are dropped, as a switch would; frames from the file wait there
    while the ring is full.

    `vnet_hdr` says that every frame on `fd` stands behind a `struct virtio_net_hdr` of 10
    bytes (linux/virtio_net.h): a packet socket with PACKET_VNET_HDR, a tap with IFF_VNET_HDR.
    Only with it can a checksum that the sender left to the device be told and completed, and
    a packet longer than its link's MTU be told from a frame; such packets are dropped.

    Raises InvalidArgument for a pair that may be handed such packets, or frames without a
    checksum (GUEST_CSUM and the bits that need it): a header of the queue's is not passed on.
    """

    def __init__(self, pair: QueuePair, fd: int, *, vnet_hdr: bool = False) -> None:
        try:
            socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
            blocking = os.get_blocking(fd)
        except OSError as error:
            raise kernel_error(error.errno or 0, "fstat", f"descriptor {fd}") from error
        if blocking and not socket:
            raise InvalidArgument(f"descriptor {fd} is blocking", hint="set O_NONBLOCK on it")
        if pair.features >> virtio.VIRTIO_NET_F_GUEST_CSUM & 1:
            raise InvalidArgument(
                f"a forwarder of pair {pair.index} with VIRTIO_NET_F_GUEST_CSUM",
                hint="leave it and the GUEST_ bits that need it out of the acknowledged features",
            )
        with pair.rx.claim() as rx, pair.tx.claim() as tx:
            super().__init__(f"forwarder of pair {pair.index}")
            made = lib.forward_create(rx, tx, self._stop.fileno(), fd, socket, vnet_hdr)
            self._forward = own(made, lib.forward_destroy, "forwarder")
        self._pair = pair

    def run(self) -> None:
        """Forward both ways until stopped. Raises RingError, KernelError, StateError."""
        with self._pair.rx.claim(), self._pair.tx.claim():
            self._repeat(lambda: lib.forward_run(self._forward), self._pair.rx, self._pair.tx)

    def stats(self) -> ForwardStats:
        """Return the counters since this object was made. From any thread."""
        stats = ffi.new("struct forward_stats *")
        lib.forward_read_stats(self._forward, stats)
        return ForwardStats(stats.to_file, stats.from_file, stats.dropped)
