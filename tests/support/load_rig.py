"""Pairs on a multi-queue tap of their own, with a guest on each that answers at full speed."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import pyroute2

from vhostctl.abi import virtio
from vhostctl.control.rings import place_rings
from vhostctl.control.session import Session
from vhostctl.control.wiring import DRIVER_BITS, SessionConfig
from vhostctl.guest.config import QueueStats
from vhostctl.guest.driver import NetDriver, QueueConfig, QueuePair
from vhostctl.guest.endpoint import Endpoint
from vhostctl.host.closing import Closing
from vhostctl.host.links import LinkCounters, Links
from vhostctl.host.memory import MappedRegion
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.jobs.running import Running

# A tap that may leave checksums to the guest takes bursts of UDP.
FEATURES = DRIVER_BITS | 1 << virtio.VIRTIO_NET_F_GUEST_CSUM
HOST, GUEST = "192.0.2.1", "192.0.2.2"
MAC = bytes.fromhex("020000000002")
BUFFER = 512  # bytes: long frames take several
FRAME = 1514
_PERMANENT = 0x80  # NUD_PERMANENT of linux/neighbour.h


def load_config(device: str, queues: int, queue_size: int = 256) -> SessionConfig:
    """Return what a rig wires."""
    return SessionConfig(
        "tap0",
        device,
        queues=queues,
        queue_size=queue_size,
        memory_size=16 << 20,
        driver=FEATURES,
    )


@dataclass(frozen=True)
class UdpCounters:
    """The host's UDP datagrams that no socket got."""

    errors: int
    """All of them, those that a socket had no room for and those with a wrong checksum."""
    checksums: int


class Station(Closing):
    """The guest on one pair: an echo, running or paused."""

    def __init__(self, pair: QueuePair) -> None:
        self.pair = pair
        self.endpoint = Endpoint(pair, MAC, GUEST)
        self._running = ExitStack()

    def run(self) -> None:
        """Post buffers and answer from now on."""
        self.pair.start()
        self._running.enter_context(Running(self.endpoint, f"guest {self.pair.index}"))

    def pause(self) -> None:
        """Touch the rings no more."""
        self._running.close()

    def answered(self) -> bool:
        """Return whether all that the device delivered is answered, and the answers are sent."""
        stats, counters = self.pair.stats(), self.endpoint.counters()
        return (
            stats.rx_frames == counters.echo
            and stats.tx_completed == stats.tx_frames == counters.echo + counters.sent
        )

    def close(self) -> None:
        """Answer no more."""
        self._running.close()
        self.endpoint.close()

    def __enter__(self) -> Self:
        self.run()
        return self


class Rig(Closing):
    """The pairs of `config` on the tap tap0 of a namespace, running; a context manager.

    Nothing but what a test sends goes to the guest: there is no IPv6 and no ARP.
    """

    def __init__(self, namespace: NetNamespace, config: SessionConfig) -> None:
        self.namespace = namespace
        self._links = Links()
        self._stack = ExitStack()
        try:
            self._make(config)
        except BaseException:
            self._stack.close()
            raise

    def _make(self, config: SessionConfig) -> None:
        enter = self._stack.enter_context
        open_tap = partial(self.namespace.run, partial(Tap.open, "tap0", config.queues))
        self.session = enter(Session(config, open_tap=open_tap))
        assert self.session.tap is not None
        self.tap = self.session.tap
        self.namespace.run(self._set_up_link)
        self._stack.callback(self.namespace.run, self._links.close)
        self.namespace.run(self._links.open)
        self.driver = enter(
            NetDriver(
                self.session,
                self.session.pairs,
                self.session.features,
                self.session.arena,
                buffer_size=BUFFER,
                max_frame=FRAME,
            )
        )
        self.session.start()

    def _set_up_link(self) -> None:
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        with pyroute2.IPRoute() as route:
            index = socket.if_nametoindex("tap0")
            route.link("set", index=index, state="up")
            route.addr("add", index=index, address=HOST, prefixlen=24)
            route.neigh("add", dst=GUEST, lladdr=MAC.hex(":"), ifindex=index, state=_PERMANENT)

    def guest(self, *pairs: int) -> ExitStack:
        """Return a running echo on `pairs`, all if there are none named."""
        stack = ExitStack()
        try:
            for pair in pairs or range(len(self.driver.pairs)):
                stack.enter_context(Station(self.driver.pairs[pair]))
        except BaseException:
            stack.close()
            raise
        return stack

    def mac(self) -> bytes:
        """Return the host's end of the link."""
        state = self.namespace.run(lambda: self._links.state("tap0"))
        return bytes.fromhex(state.mac.replace(":", ""))

    def counters(self) -> LinkCounters:
        """Return the tap's counters."""
        return self.namespace.run(lambda: self._links.counters("tap0"))

    def dropped(self) -> int:
        """Return the frames that the tap had no room for."""
        return self.counters().tx_dropped

    def udp(self) -> UdpCounters:
        """Return what the host's UDP counts."""
        lines = self.namespace.run(Path("/proc/thread-self/net/snmp").read_text).splitlines()
        names, values = (line.split() for line in lines if line.startswith("Udp:"))
        counted = dict(zip(names, values, strict=True))
        return UdpCounters(int(counted["InErrors"]), int(counted["InCsumErrors"]))

    def drive(self, pair: int, region: MappedRegion, bases: list[int]) -> NetDriver:
        """Start the rings of `pair`, which stopped at `bases`, in `region`, buffers and all.

        Returns the pair's new driver.
        """
        session = self.session
        places, end = place_rings(region.gpa, 2, session.config.queue_size)
        queues = [
            QueueConfig(place.size, place.desc, place.avail, place.used, old.kick, old.call, base)
            for place, old, base in zip(places, session.pairs[pair], bases, strict=True)
        ]
        driver = NetDriver(
            session,
            [(queues[0], queues[1])],
            session.features,
            (end, region.gpa + region.size - end),
            buffer_size=BUFFER,
            max_frame=FRAME,
        )
        for ring, (place, base) in enumerate(zip(places, bases, strict=True)):
            session.start_ring(2 * pair + ring, base, place)
        return driver

    def close(self) -> None:
        """Stop and take all of it down."""
        self._stack.close()


def total(stats: list[QueueStats], name: str) -> int:
    """Return the sum of one counter."""
    return sum(int(getattr(each, name)) for each in stats)
