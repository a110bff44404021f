"""Translating mode: who answers when vhost asks where an I/O virtual address leads.

With VIRTIO_F_ACCESS_PLATFORM acknowledged every address of a ring and of a descriptor is an
I/O virtual one (iova). What vhost's IOTLB does not hold it asks for with a message on its
descriptor (linux/vhost_types.h, struct vhost_iotlb_msg), and the ring rests until the
answer. `IovaMap` is the vIOMMU's table, `Iotlb` answers from it.
"""

from __future__ import annotations

import errno
import select
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from vhostctl.abi.vhost import (
    VHOST_ACCESS_RW,
    VHOST_IOTLB_INVALIDATE,
    VHOST_IOTLB_MSG,
    VHOST_IOTLB_UPDATE,
    vhost_msg,
)
from vhostctl.control.iovamap import ADDRESSES, PAGE, IovaMap, Mapping
from vhostctl.errors import InvalidArgument, KernelError
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.host.vhost import IotlbMessage, Region

_BATCH = 1024
_REMEMBERED = 256


class TranslatingDevice(Protocol):
    """What is used of a VhostNet. Its descriptor does not block, as VhostNet opens it."""

    def fileno(self) -> int:
        """Return its descriptor, readable while a message waits."""

    def read_message(self) -> IotlbMessage:
        """Read the next message; KernelError (EAGAIN) if none waits."""

    def write_message(self, message: IotlbMessage) -> None:
        """Write an update or invalidation; KernelError (EFAULT) if it is not taken."""


class Memory(Protocol):
    """Guest memory, whoever maps it: a MemoryTable, an AddressSpace, GuestMemory."""

    @property
    def regions(self) -> Sequence[Region]:
        """Its regions, none over another."""


@dataclass(frozen=True, slots=True)
class Miss:
    """What a device asked for and did not get: `device` is its place among the devices.

    `iova` is the page; `perm` what was to be done there, VHOST_ACCESS_*.
    """

    device: int
    iova: int
    perm: int


@dataclass(slots=True)
class IotlbCounters:
    """What was asked and told, in messages.

    `misses` were read: `answered` at once, `unanswered` for want of a mapping that allows it
    and has memory, `refused` because the device does not translate any more. `updates` and
    `invalidated` were written; one update may answer many misses, and one that comes with a
    new mapping counts nowhere else.
    """

    misses: int = 0
    answered: int = 0
    unanswered: int = 0
    refused: int = 0
    updates: int = 0
    invalidated: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """A mapping as far as one region of memory is behind it."""

    iova: int
    size: int
    hva: int
    perm: int


@dataclass(slots=True)
class _Client:
    device: TranslatingDevice
    # (page, permission) that was asked for in vain, the oldest first.
    missing: dict[tuple[int, int], None] = field(default_factory=dict)


class Iotlb(Closing):
    """Answers the misses of `devices` from a table of mappings and the memory behind it.

    Poll the devices' descriptors and call `handle()`, or give `run()` a thread. While they
    run, change the table through this object, so that they are told. A miss
    without an answer leaves its ring as vhost left it, resting, until a mapping comes.
    A MemoryListener: register it with the AddressSpace, so that it follows.

    Any thread may call. The devices stay the caller's; close this before them.
    """

    def __init__(
        self, devices: Sequence[TranslatingDevice], mappings: IovaMap, memory: Memory | None = None
    ) -> None:
        """`memory` may come later, through `commit()`. Raises KernelError (EMFILE)."""
        self.mappings = mappings
        self._clients = [_Client(device) for device in devices]
        self._regions = _sorted(memory.regions if memory else ())
        self._counters = IotlbCounters()
        # Held from the look-up of a translation until the device has been told of it. Who
        # withdraws takes the mapping out first and invalidates then, under this lock: a
        # look-up that still found it has told the device before the invalidation, which
        # takes it back, and a later look-up finds nothing.
        self._lock = threading.Lock()
        self._stop = EventFd.create("stop of the IOTLB")

    def run(self) -> None:
        """Answer misses until stopped; for a thread of its own. Raises as `handle()` does."""
        poll = select.poll()
        poll.register(self._stop.fileno(), select.POLLIN)
        by_fd = {client.device.fileno(): index for index, client in enumerate(self._clients)}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        try:
            while self._stop.fileno() not in (ready := [fd for fd, _ in poll.poll()]):
                self._serve(by_fd[fd] for fd in ready)
        finally:
            self._stop.drain()

    def stop(self) -> None:
        """End the run that is going on, or the next one. From any thread."""
        self._stop.signal()

    def handle(self) -> int:
        """Answer the misses that wait now; return how many. Does not wait for one.

        It takes at most 1024 of a device, whose descriptor stays readable then, so that a
        guest that misses for ever does not hold the caller. Raises KernelError, ClosedError.
        """
        return self._serve(range(len(self._clients)))

    def map(self, iova: int, size: int, gpa: int, perm: int = VHOST_ACCESS_RW) -> None:
        """`IovaMap.map()`, and answer the misses that waited for it."""
        self.mappings.map(iova, size, gpa, perm)
        with self._lock:
            self._answer_missing(iova, iova + size)

    def unmap(self, iova: int, size: int) -> list[Mapping]:
        """`IovaMap.unmap()`; no device uses what is returned any more, nor what it led to."""
        withdrawn = self.mappings.unmap(iova, size)
        if withdrawn:
            with self._lock:
                self._invalidate(iova, size)
        return withdrawn

    def prime(self, device: TranslatingDevice, iova: int, size: int) -> None:
        """Tell one of the devices of [iova, iova + size) before it asks.

        The used ring needs it before VHOST_NET_SET_BACKEND, which fails with EFAULT instead
        of waiting for an answer. Raises InvalidArgument where there is no mapping or no
        memory, KernelError (EFAULT) if the device does not translate.
        """
        with self._lock:
            at = iova
            while at < iova + size:
                piece = self._piece(at)
                if piece is None:
                    raise InvalidArgument(
                        f"iova {at:#x} has no mapping or no memory", hint="map it before"
                    )
                self._update(device, piece)
                at = piece.iova + piece.size

    def commit(self, before: Memory, after: Memory) -> None:
        """Guest memory changed: take back what led into memory that went or moved.

        Misses that waited for memory are answered. Raises KernelError; memory is then the
        one before.
        """
        with self._lock:
            present, self._regions = self._regions, _sorted(after.regions)
            try:
                if not _keeps(_sorted(before.regions), self._regions):
                    # All of it: memory changes seldom, vhost asks again for what it needs, and
                    # it is right also for a mapping that is about to be withdrawn elsewhere.
                    self._invalidate(0, 0)
                self._answer_missing(0, ADDRESSES)
            except BaseException:
                self._regions = present
                raise

    def missing(self) -> list[Miss]:
        """Return what was asked for in vain and has no answer yet.

        At most 256 pages a device, the latest: a ring waits for one address at a time.
        """
        with self._lock:
            return [
                Miss(index, iova, perm)
                for index, client in enumerate(self._clients)
                for iova, perm in client.missing
            ]

    def counters(self) -> IotlbCounters:
        """Return the counters since this object was made."""
        with self._lock:
            return replace(self._counters)

    def close(self) -> None:
        """Close what this owns; a second call does nothing. Not during a run."""
        self._stop.close()

    def _serve(self, indices: Iterable[int]) -> int:
        count = 0
        for index in indices:
            client = self._clients[index]
            asked = _read(client.device)
            with self._lock:
                self._answer(client, asked)
            count += len(asked)
        return count

    def _answer(self, client: _Client, asked: list[tuple[int, int]]) -> None:
        """Answer misses that have been read: only of such does an update wake the ring."""
        counters = self._counters
        counters.misses += len(asked)
        taken: dict[_Piece, bool] = {}  # what the device was told, and whether it took it
        for iova, perm in asked:
            piece = self._piece(iova, perm)
            if piece is None:
                counters.unanswered += 1
                _remember(client, iova, perm)
                continue
            if piece not in taken:
                taken[piece] = self._update_if_translating(client.device, piece)
            if taken[piece]:
                counters.answered += 1
            else:
                counters.refused += 1

    def _answer_missing(self, start: int, end: int) -> None:
        for client in self._clients:
            for iova, perm in [miss for miss in client.missing if start <= miss[0] < end]:
                piece = self._piece(iova, perm)
                if piece is not None:
                    del client.missing[iova, perm]
                    self._update_if_translating(client.device, piece)

    def _piece(self, iova: int, perm: int = 0) -> _Piece | None:
        """Return what leads from `iova` to memory and allows `perm`, as far as it goes."""
        mapping = self.mappings.translate(iova)
        # An entry with less than was asked for would break the ring: vhost does not ask twice.
        if mapping is None or perm & ~mapping.perm:
            return None
        gpa = mapping.gpa + iova - mapping.iova
        place = bisect_right(self._regions, gpa, key=lambda r: r.gpa) - 1
        if place < 0 or gpa >= self._regions[place].gpa + self._regions[place].size:
            return None
        region = self._regions[place]
        shift = mapping.iova - mapping.gpa
        part = mapping.cut(region.gpa + shift, region.gpa + region.size + shift)
        return _Piece(part.iova, part.size, region.hva + part.gpa - region.gpa, part.perm)

    def _update_if_translating(self, device: TranslatingDevice, piece: _Piece) -> bool:
        try:
            self._update(device, piece)
        except KernelError as error:
            if error.errno != errno.EFAULT:
                raise
            return False  # ACCESS_PLATFORM was given up since: nobody waits
        return True

    def _update(self, device: TranslatingDevice, piece: _Piece) -> None:
        message = _message(VHOST_IOTLB_UPDATE, piece.iova, piece.size)
        message.iotlb.uaddr = piece.hva
        message.iotlb.perm = piece.perm
        device.write_message(message)
        self._counters.updates += 1

    def _invalidate(self, iova: int, size: int) -> None:
        """Empty [iova, iova + size) on every device; of size 0 at 0, everything."""
        refusal: KernelError | None = None
        for client in self._clients:
            try:
                client.device.write_message(_message(VHOST_IOTLB_INVALIDATE, iova, size))
                self._counters.invalidated += 1
            except KernelError as error:
                if error.errno != errno.EFAULT:  # which says that it holds no translations
                    refusal = refusal or error
        if refusal is not None:
            raise refusal


def _message(kind: int, iova: int, size: int) -> vhost_msg:
    # Version 1: it is taken whether or not version 2 was acknowledged.
    message = vhost_msg(type=VHOST_IOTLB_MSG)
    message.iotlb.iova, message.iotlb.size, message.iotlb.type = iova, size, kind
    return message


def _read(device: TranslatingDevice) -> list[tuple[int, int]]:
    """Return (iova, perm) of the misses that wait, at most _BATCH."""
    asked: list[tuple[int, int]] = []
    try:
        while len(asked) < _BATCH:
            miss = device.read_message().iotlb
            asked.append((miss.iova, miss.perm))
    except BlockingIOError:
        pass
    return asked


def _remember(client: _Client, iova: int, perm: int) -> None:
    miss = (iova & -PAGE, perm)
    client.missing.pop(miss, None)  # it becomes the latest
    if len(client.missing) == _REMEMBERED:
        del client.missing[next(iter(client.missing))]
    client.missing[miss] = None


def _sorted(regions: Sequence[Region]) -> list[Region]:
    return sorted(regions, key=lambda region: region.gpa)


def _keeps(before: list[Region], after: list[Region]) -> bool:
    """Return whether all memory of `before` is where it was."""
    return all(
        any(
            new.gpa <= old.gpa
            and old.gpa + old.size <= new.gpa + new.size
            and new.hva - new.gpa == old.hva - old.gpa
            for new in after
        )
        for old in before
    )
