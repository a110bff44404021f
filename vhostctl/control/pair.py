"""One queue pair and its vhost device: what it was told, so that it can be told again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vhostctl.abi.vhost import VHOST_F_LOG_ALL
from vhostctl.control.notifiers import CallNotifier
from vhostctl.control.rings import VirtQueue
from vhostctl.errors import KernelError, VhostctlError
from vhostctl.host.vhost import RX, TX, VhostNet

_BUSYLOOP_UNIT = 1024  # ns
RINGS = {RX: "receive", TX: "transmit"}

Locate = Callable[[int, int, str], int]
"""(gpa, bytes, what is there) to the address that SET_VRING_ADDR wants of it."""

Prime = Callable[[VhostNet, int, int], None]
"""(device, iova, bytes) before a ring starts: `Iotlb.prime`."""


class VhostPair:
    """The receive and the transmit ring of one pair, on a device of their own.

    `queues` are the two rings, `calls` their calls, `features` what VHOST_SET_FEATURES was
    told last, without VHOST_F_LOG_ALL, which is there while `logging`. `prime` is called for
    the used ring of a translating device before it starts. Every method raises KernelError.
    Not synchronised: one thread at a time.
    """

    def __init__(
        self,
        index: int,
        vhost: VhostNet,
        queues: Sequence[VirtQueue],
        locate: Locate,
        prime: Prime | None = None,
    ) -> None:
        self.index = index
        self.vhost = vhost
        self.queues = tuple(queues)
        self.calls: list[CallNotifier] = []
        try:
            for ring, queue in enumerate(self.queues):
                call = CallNotifier(vhost, ring, queue.events["call"], self.name_of(ring))
                self.calls.append(call)
        except BaseException:
            self.forget()
            raise
        self.stopped: set[int] = set()
        """Rings that were stopped alone: they get no backend, whatever else starts."""
        self.features = 0
        self.logging = False
        self._locate = locate
        self._prime = prime
        self._backends: dict[int, int] = {}

    def name_of(self, ring: int) -> str:
        """Return what errors call `ring`: virtqueues are counted over all pairs."""
        return f"queue {2 * self.index + ring}"

    def set_owner(self) -> None:
        """VHOST_SET_OWNER."""
        self.vhost.set_owner()

    def set_features(self, features: int) -> None:
        """VHOST_SET_FEATURES: the device's part of what the driver acknowledged."""
        self.vhost.set_features(features | self.logging << VHOST_F_LOG_ALL)
        self.features = features

    def set_num(self, ring: int) -> None:
        """VHOST_SET_VRING_NUM."""
        self.vhost.set_vring_num(ring, self.queues[ring].size)

    def set_base(self, ring: int, base: int) -> None:
        """VHOST_SET_VRING_BASE."""
        self.vhost.set_vring_base(ring, base)
        self.queues[ring].base = base

    def set_addresses(self, ring: int) -> None:
        """VHOST_SET_VRING_ADDR from the placement; also InvalidArgument."""
        queue = self.queues[ring]
        parts = {
            name: self._locate(gpa, length, f"{self.name_of(ring)} {name}")
            for name, (gpa, length) in queue.placement.parts().items()
        }
        self.vhost.set_vring_addr(ring, **parts, log_gpa=queue.used if self.logging else None)

    def set_kick(self, ring: int) -> None:
        """VHOST_SET_VRING_KICK."""
        self.vhost.set_vring_kick(ring, self.queues[ring].kick)

    def set_call(self, ring: int) -> None:
        """VHOST_SET_VRING_CALL: the guest's eventfd, or ours while it is masked."""
        self.calls[ring].bind()

    def set_err(self, ring: int) -> None:
        """VHOST_SET_VRING_ERR."""
        self.vhost.set_vring_err(ring, self.queues[ring].error.fileno())

    def set_busyloop(self, ring: int, microseconds: int) -> None:
        """VHOST_SET_VRING_BUSYLOOP_TIMEOUT: how long the worker polls before it sleeps."""
        self.vhost.set_vring_busyloop_timeout(ring, microseconds * 1000 // _BUSYLOOP_UNIT)

    def attached(self, ring: int) -> bool:
        """Return whether the ring has a backend, and so is worked on."""
        return ring in self._backends

    def attach(self, ring: int, fd: int) -> None:
        """VHOST_NET_SET_BACKEND: start the ring, or move it to another backend.

        Does nothing for a ring that was stopped alone.
        """
        if ring in self.stopped:
            return
        if self._prime is not None:  # without its used ring no ring starts
            self._prime(self.vhost, *self.queues[ring].placement.parts()["used"])
        before = self._backends.get(ring)
        self._backends[ring] = fd  # first: an interrupt may come behind the request
        try:
            self.vhost.set_backend(ring, fd)
        except KernelError:
            del self._backends[ring]
            if before is not None:  # the kernel keeps it when it refuses another
                self._backends[ring] = before
            raise

    def detach(self, ring: int) -> None:
        """VHOST_NET_SET_BACKEND with -1, if the ring has a backend."""
        if ring in self._backends:
            self.vhost.set_backend(ring, None)
            del self._backends[ring]
            if self._prime is not None and self._backends:
                # The misses of both rings went; the other may rest on one, deaf but to a kick.
                self.queues[1 - ring].events["kick"].signal()

    def base(self, ring: int) -> int:
        """VHOST_GET_VRING_BASE: the avail index that the device would read next."""
        return self.vhost.get_vring_base(ring)

    def set_logging(self, enabled: bool) -> None:
        """Switch the log of data (LOG_ALL) and of used rings; what fails leaves it as it was."""
        before, self.logging = self.logging, enabled
        try:
            self._tell()
        except VhostctlError:
            self.logging = before
            self._tell()
            raise

    def _tell(self) -> None:
        self.set_features(self.features)
        for ring in RINGS:
            self.set_addresses(ring)

    def log_end(self) -> int:
        """Return the first gpa behind the used rings, which the device writes by itself.

        0 while addresses are translated: then it finds theirs in the memory table.
        """
        ends = [sum(queue.placement.parts()["used"]) for queue in self.queues]
        return 0 if self._prime else max(ends)

    def close(self) -> None:
        """Close the device, then what is ours of the calls; a second call does nothing."""
        self.vhost.close()
        self.forget()

    def forget(self) -> None:
        """Close what is ours beside a device that was handed in."""
        for call in self.calls:
            call.close()
