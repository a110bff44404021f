"""The tap of a wiring: which pair each queue serves, and what the queues had before."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from vhostctl.abi.tun import IFF_DETACH_QUEUE
from vhostctl.control.features import NegotiationResult, tap_features
from vhostctl.control.multiqueue import compact
from vhostctl.errors import InvalidArgument, KernelError, StateError
from vhostctl.host.tap import Tap, TapQueue


@dataclass(frozen=True, slots=True)
class TapSettings:
    """What a queue of a tap has, as far as it can be asked: not its offloads."""

    header_size: int
    sndbuf: int

    @classmethod
    def of(cls, queue: TapQueue) -> Self:
        """Ask `queue`. Raises KernelError."""
        return cls(queue.vnet_hdr_size(), queue.sndbuf())

    def apply(self, queue: TapQueue) -> None:
        """Give it to `queue`, unless the tap was deleted meanwhile. Raises KernelError."""
        try:
            queue.set_vnet_hdr_size(self.header_size)
            queue.set_sndbuf(self.sndbuf)
        except KernelError as error:
            if error.errno != errno.EBADFD:
                raise


class TapSide:
    """The tap that a wiring was handed or opens; the first `pairs` of its queues take part.

    `order` is the enabled pair at each of the tap's queue indices. `offer` is what the tap
    offers, None until it was asked.
    """

    def __init__(self, tap: Tap | None, pairs: int, sndbuf: int, open_tap: Callable[[], Tap]):
        self.tap = tap
        self.order = list(range(pairs))
        self.offer: int | None = None
        self.handed_on = False
        """Whether another session has the tap now, which is to stay as it is."""
        self.sndbuf = sndbuf
        self._open = open_tap
        self._opened: Tap | None = None
        self._before: dict[int, TapSettings] = {}

    def open(self) -> None:
        """Open the tap's queues."""
        self.tap = self._opened = self._open()

    def close(self) -> None:
        """Undo `open`; a tap that took its place is its owner's."""
        if self._opened is not None:
            self._opened.close()
            self.tap = self._opened = None

    def arrange(self) -> None:
        """Disable the queues of pairs that are not in `order`.

        Raises InvalidArgument if the queue of one that is does not take part.
        """
        queues = self._tap().queues
        order = [n for n, queue in enumerate(queues) if not queue.flags() & IFF_DETACH_QUEUE]
        for pair in self.order:
            if pair not in order:
                raise InvalidArgument(
                    f"{queues[pair].label} is disabled", hint="enable it, or disable its pair"
                )
        if set(order) == set(self.order):
            return  # the tap's own order is the one that was handed in
        for pair in set(order) - set(self.order):
            queues[pair].disable()
            compact(order, pair)
        self.order[:] = order

    def follow(self, order: Sequence[int]) -> None:
        """Take the order of another session's; a tap that was opened here gets into it."""
        if self._opened is None:
            self.order[:] = order
        elif set(order) != set(self.order):
            self.order[:] = order
            self.arrange()

    def _tap(self) -> Tap:
        if self.tap is None:
            raise StateError("there is no tap yet")
        return self.tap

    def queue(self, pair: int) -> TapQueue:
        """Return the tap's queue that serves `pair`."""
        return self._tap().queues[pair]

    def features(self) -> int:
        """Return the feature bits that the tap offers; it tells only by trying."""
        if self.offer is None:
            self.offer = tap_features(self.queue(0).offloads())
        return self.offer

    def adapt(self, queue: TapQueue, result: NegotiationResult) -> None:
        """Make a queue agree with what was negotiated."""
        queue.set_vnet_hdr_size(result.header_size)
        queue.set_vnet_le(result.endian == "little")
        queue.set_offload(result.offload)
        queue.set_sndbuf(self.sndbuf)

    def configure(self, pair: int, result: NegotiationResult) -> None:
        """`adapt` the queue of `pair`."""
        self._before.setdefault(pair, TapSettings.of(self.queue(pair)))
        self.adapt(self.queue(pair), result)

    def restore(self, pair: int) -> None:
        """Undo `configure`: a tap that outlives us has its header size back."""
        before = self._before.pop(pair, None)
        if before is not None and self.tap is not None and not self.handed_on:
            before.apply(self.tap.queues[pair])

    @property
    def before(self) -> list[TapSettings]:
        """What each queue had before it was configured."""
        return [self._before[pair] for pair in sorted(self._before)]

    @before.setter
    def before(self, settings: Sequence[TapSettings]) -> None:
        self._before = dict(enumerate(settings))

    def exchange(
        self, tap: Tap, before: dict[int, TapSettings], order: Sequence[int]
    ) -> Callable[[], None]:
        """Have `tap`, which had `before`, from now on; return what lets go of the other one."""
        old, opened, had = self._tap(), self._opened, self._before
        self.tap, self._opened, self._before = tap, None, before
        self.order[:] = order

        def let_go() -> None:
            # Last first: it is one setting of the tap, and the first queue saw the original.
            for pair in sorted(had, reverse=True):
                had[pair].apply(old.queues[pair])
            if opened is not None:
                opened.close()

        return let_go
