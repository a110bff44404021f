"""Two hosts joined by our driver over two vhost devices: packets of 60 kB pass whole.

VHOSTCTL_TEST_GSO_MIB is how much the long transfer sends each way, in MiB, VHOSTCTL_TEST_GSO_SETS
how many sets of offloads are tried: with 244 each side has each of its 225 at least once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.support.gso import ALL, GSO, SAMPLE, datagrams, name, tried
from tests.support.guest_device import EVENT_IDX, INDIRECT, MRG_RXBUF, VERSION_1
from tests.support.guest_offload import CSUM, GUEST_CSUM
from tests.support.netns_tcp import FAMILIES, Family, Host, attached, tcp
from vhostctl.guest.driver import QueuePair
from vhostctl.guest.patch import LaneStats, Patch
from vhostctl.host.vhost import ENGINE
from vhostctl.jobs.running import Running

pytestmark = pytest.mark.usefixtures("nothing_left")

SMALL = 1 << 20
TRIES = 10
SETS = tried(int(os.environ.get("VHOSTCTL_TEST_GSO_SETS", SAMPLE)))


@dataclass(frozen=True)
class Joined:
    """Two hosts, the driver's queues on the tap of each, and a running patch between them."""

    hosts: tuple[Host, Host]
    pairs: tuple[QueuePair, QueuePair]
    patch: Patch

    @property
    def lanes(self) -> tuple[LaneStats, LaneStats]:
        stats = self.patch.stats()
        return stats.forth, stats.back


@contextmanager
def joined(
    device: str, first: int = ALL, second: int = ALL, *, mtu: int = 1500, **layout: int
) -> Iterator[Joined]:
    """Join two hosts whose drivers understand `first` and `second`; nothing is amiss at the end.

    `layout` is what `attached` takes.
    """
    with ExitStack() as stack:
        one, two = hosts = tuple(stack.enter_context(Host(number, mtu)) for number in (1, 2))
        pairs = (
            stack.enter_context(attached(device, one, first, **layout)),
            stack.enter_context(attached(device, two, second, **layout)),
        )
        made = Joined((one, two), pairs, stack.enter_context(Patch(*pairs)))
        for host in hosts:
            host.up()
        # Not before: what reaches a link that is down is dropped there.
        stack.enter_context(Running(made.patch, "patch"))
        yield made
        assert [host.faults() for host in hosts] == [{}, {}]
        for pair, lane in zip(pairs, made.lanes, strict=True):
            stats = pair.stats()
            assert (stats.rx_errors, stats.tx_errors) == (0, 0)
            assert (lane.malformed, lane.refused) == (0, 0)


def tcp_in_long_packets(link: Joined, family: Family, size: int) -> None:
    """Send `size` bytes each way, again if TCP took shorter packets: it goes by how fast it is."""
    for _ in range(TRIES):
        tcp(*link.hosts, family, size)
        if min(lane.greatest for lane in link.lanes) > 60000:
            return
    pytest.fail(f"no packet of 60 kB one way or the other in {TRIES} tries: {link.lanes}")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("mtu", [1500, 9000])
def test_tcp_passes_in_packets_of_60_kb_both_ways(device: str, mtu: int, family: Family) -> None:
    default = 64 if device == ENGINE else 16
    size = int(os.environ.get("VHOSTCTL_TEST_GSO_MIB", default)) << 20
    with joined(device, mtu=mtu) as link:
        tcp_in_long_packets(link, family, size)
        for lane in link.lanes:
            print(lane)
            assert lane.bytes > size
            # Nearly all of it went in long packets: acknowledgements are what is left.
            assert lane.gso * 20000 < lane.bytes
            assert lane.completed == 0


@pytest.mark.parametrize("buffer_size", [4096, 65600])
@pytest.mark.parametrize(
    "rings",
    [
        pytest.param(VERSION_1 | MRG_RXBUF | EVENT_IDX, id="mergeable"),
        pytest.param(VERSION_1 | INDIRECT | EVENT_IDX, id="indirect"),
        pytest.param(VERSION_1 | EVENT_IDX, id="chains"),
        pytest.param(VERSION_1 | MRG_RXBUF | INDIRECT, id="no event index"),
    ],
)
def test_packets_pass_whatever_the_rings_are(device: str, rings: int, buffer_size: int) -> None:
    with joined(device, rings=rings, buffer_size=buffer_size) as link:
        tcp_in_long_packets(link, FAMILIES[0], 8 * SMALL)


@pytest.mark.parametrize(("first", "second"), SETS, ids=map(name, SETS))
def test_everything_arrives_whole_whatever_was_negotiated(
    device: str, first: int, second: int
) -> None:
    with joined(device, first, second) as link:
        # Less than was understood, where the kernel does not know USO.
        agreed = [queues.features for queues in link.pairs]
        ways = list(zip(link.hosts, reversed(link.hosts), agreed, strict=True))
        for family in FAMILIES:
            tcp(*link.hosts, family, SMALL)
            for source, target, features in ways:
                datagrams(source, target, family, segments=False)
                if features & GUEST_CSUM:
                    datagrams(source, target, family, segments=True)
        for lane, handed, taken in zip(link.lanes, agreed, reversed(agreed), strict=True):
            assert bool(lane.gso) == bool(handed & GSO)
            assert bool(lane.completed) == bool(handed & GUEST_CSUM and not taken & CSUM)
