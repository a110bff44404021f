"""A session whose pairs all carry numbered datagrams both ways, as fast as both ends take them."""

from __future__ import annotations

import select
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from tests.support.load_flows import FLOWS, Flows, Lane
from tests.support.load_rig import Rig, Station, load_config, total
from tests.system.conftest import until
from vhostctl.guest.config import QueueStats
from vhostctl.guest.driver import NetDriver
from vhostctl.guest.endpoint import EndpointCounters
from vhostctl.host.closing import Closing
from vhostctl.host.memory import MappedRegion
from vhostctl.host.netns import NetNamespace
from vhostctl.host.vhost import RX, TX

PATIENCE = 120  # seconds, against hanging only


@dataclass(frozen=True)
class Balance:
    """What each part counted. `missing` are frames that left one and never came to the next.

    `lost_in_tap` is by difference: a kernel's device whose ring stops gives back what it took out
    of the tap's queue, and where that is full the tap frees it and counts nothing.
    """

    sent: int
    echoed: int
    own: int
    tap_dropped: int
    udp_dropped: int
    lost_in_tap: int
    missing: dict[str, int]

    def __str__(self) -> str:
        return (
            f"{self.sent} to the guest, {self.echoed} came back, {self.own} of the guest's own; "
            f"dropped: {self.tap_dropped} by the tap, {self.udp_dropped} by UDP, "
            f"{self.lost_in_tap} by the tap uncounted"
        )


class Load(Closing):
    """Pairs under load, in a with block.

    The host sends bursts to the guest, which sends them back, and the guest sends on every pair
    a stream of its own. The former may overflow any queue, and whoever drops one counts it; of
    the latter none may be lost.
    """

    def __init__(
        self, namespace: NetNamespace, device: str, queues: int = 2, queue_size: int = 256
    ) -> None:
        self._stack = ExitStack()
        self._retired: list[tuple[QueueStats, EndpointCounters]] = []
        self.undelivered = 0
        """Frames that a device kept when another took its place."""
        try:
            self.rig = self._stack.enter_context(
                Rig(namespace, load_config(device, queues, queue_size))
            )
            self.session = self.rig.session
            self._drivers: list[NetDriver] = []
            self._stack.callback(self._close_guest)
            self.stations = [Station(pair) for pair in self.rig.driver.pairs]
            self.lanes = tuple(Lane(self.rig, pair) for pair in range(queues))
            self.flows = Flows(self.rig, FLOWS * queues, self.lanes)
        except BaseException:
            self._stack.close()
            raise

    def _close_guest(self) -> None:
        for station in self.stations:
            station.close()
        for driver in self._drivers:
            driver.close()

    def __enter__(self) -> Self:
        try:
            for lane, station in zip(self.lanes, self.stations, strict=True):
                lane.begin(station.endpoint)
                station.run()
            self._stack.enter_context(self.flows)
            self.flows.start()
            self.flow()
        except BaseException:
            self._stack.close()
            raise
        return self

    def close(self) -> None:
        """Take all of it down."""
        self._stack.close()

    def _progress(self) -> list[int]:
        received = [station.pair.stats().rx_frames for station in self.stations]
        return received + [lane.came for lane in self.lanes]

    def flow(self) -> None:
        """Wait until more has come, on every pair, both ways."""
        before = self._progress()
        until(
            lambda: all(now > was for now, was in zip(self._progress(), before, strict=True)),
            "frames on every pair, both ways",
        )

    def pause(self) -> None:
        """Have the guest touch its memory no more."""
        for station in self.stations:
            station.pause()

    def resume(self) -> None:
        """Have the guest go on."""
        for station in self.stations:
            station.run()

    def move(self, pair: int, region: MappedRegion) -> None:
        """Let `pair` go on with rings and buffers in `region`, which the session has already.

        It is what a guest does that resets both rings: nothing is left in the old ones.
        """
        lane, station = self.lanes[pair], self.stations[pair]
        lane.end()
        bases = [self.session.stop_ring(2 * pair + RX)]
        size = self.session.config.queue_size
        until(
            lambda: station.pair.stats().rx_posted == size and station.answered(),
            "the rings to be moved are empty",
        )
        bases.append(self.session.stop_ring(2 * pair + TX))
        sent = station.endpoint.counters().sent
        until(lambda: lane.position + lane.changed >= sent, "the guest's own datagrams came")
        self._retired.append((station.pair.stats(), station.endpoint.counters()))
        station.close()
        driver = self.rig.drive(pair, region, bases)
        self._drivers.append(driver)
        self.stations[pair] = Station(driver.pairs[0])
        lane.begin(self.stations[pair].endpoint)
        self.stations[pair].run()

    def balance(self) -> Balance:
        """Send no more and settle the accounts, once nothing is under way."""
        self.flows.stop()
        for lane in self.lanes:
            lane.end()
        last, deadline = self._balance(), time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(0.05)
            now = self._balance()
            if now == last and not any(now.missing.values()) and not self._waiting():
                break
            last = now
        return last

    def _waiting(self) -> bool:
        """Return whether frames wait in the tap."""
        poll = select.poll()
        for queue in self.rig.tap.queues:
            poll.register(queue.fileno(), select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))

    def _balance(self) -> Balance:
        now = [(station.pair.stats(), station.endpoint.counters()) for station in self.stations]
        stats = [stats for stats, _ in self._retired + now]
        counters = [counters for _, counters in self._retired + now]
        tap, udp = self.rig.counters(), self.rig.udp()
        own = sum(lane.came for lane in self.lanes)
        echoed, sent = len(self.flows.echoed), self.flows.sent
        missing = {
            "between tap and guest": tap.tx_packets
            - total(stats, "rx_frames")
            - total(stats, "rx_errors")
            - self.undelivered,
            "in the guest": total(stats, "rx_frames") - sum(c.echo for c in counters),
            "between guest and tap": total(stats, "tx_frames") - tap.rx_packets - tap.rx_dropped,
            "between tap and sockets": tap.rx_packets - echoed - own - udp.errors,
            "of the guest's own": sum(c.sent for c in counters) - own,
        }
        return Balance(
            sent=sent,
            echoed=echoed,
            own=own,
            tap_dropped=tap.tx_dropped + tap.rx_dropped,
            udp_dropped=udp.errors,
            lost_in_tap=sent - tap.tx_packets - tap.tx_dropped,
            missing=missing,
        )

    def problems(self, balance: Balance) -> list[str]:
        """Return what is wrong, a line each."""
        found = {f"frames missing {where}": n for where, n in balance.missing.items()}
        pairs = [station.pair.stats() for station in self.stations]
        stats = [stats for stats, _ in self._retired] + pairs
        found["echoes changed"] = self.flows.changed
        found["datagrams of the guest's own changed, or out of order"] = sum(
            lane.changed for lane in self.lanes
        )
        found["datagrams twice"] = self.flows.repeated()
        found["checksums wrong"] = self.rig.udp().checksums
        found["driver errors"] = total(stats, "rx_errors") + total(stats, "tx_errors")
        found["ring errors"] = sum(self.session.ring_errors())
        return [f"{count} {what}" for what, count in found.items() if count]
