"""Which queue pairs can be patched, and how a patch begins and ends."""

from __future__ import annotations

import socket

import pytest

from tests.support.guest_device import VERSION_1
from tests.support.guest_offload import (
    CSUM,
    GUEST,
    GUEST_CSUM,
    GUEST_ECN,
    GUEST_TSO4,
    GUEST_TSO6,
    GUEST_UFO,
    GUEST_USO4,
    GUEST_USO6,
    HOST,
    HOST_ECN,
    HOST_TSO4,
    HOST_TSO6,
    HOST_UFO,
    HOST_USO,
    Header,
    names,
    side,
)
from tests.unit.test_guest_patch import MODES, TCP, cross, patched
from tests.unit.test_guest_pump import FRAME, PATTERN, running
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.guest.driver import RingError
from vhostctl.guest.patch import Patch
from vhostctl.guest.pump import Forwarder

REFUSED = [
    (GUEST_CSUM | GUEST_TSO4, CSUM, GUEST_TSO4, HOST_TSO4),
    (GUEST_CSUM | GUEST_TSO4, HOST_TSO4, GUEST_TSO4, CSUM),
    (GUEST_CSUM | GUEST_TSO6, CSUM | HOST_TSO4, GUEST_TSO6, HOST_TSO6),
    (
        GUEST_CSUM | GUEST_TSO4 | GUEST_ECN,
        CSUM | HOST_TSO4 | HOST_TSO6,
        GUEST_TSO4 | GUEST_ECN,
        HOST_ECN,
    ),
    (GUEST_CSUM | GUEST_UFO, CSUM | HOST_TSO4, GUEST_UFO, HOST_UFO),
    (
        GUEST_CSUM | GUEST_USO4 | GUEST_USO6,
        CSUM | HOST_TSO4,
        GUEST_USO4 | GUEST_USO6,
        HOST_USO,
    ),
    (GUEST, 0, GUEST & ~GUEST_CSUM, HOST),
]


@pytest.mark.parametrize("swapped", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize(("handed", "taken", "named", "missing"), REFUSED)
def test_a_side_that_does_not_take_what_the_other_is_handed_is_refused(
    handed: int, taken: int, named: int, missing: int, swapped: bool
) -> None:
    with side(VERSION_1 | handed) as a, side(VERSION_1 | taken) as b:
        pairs = (b.bench.pair, a.bench.pair) if swapped else (a.bench.pair, b.bench.pair)
        with pytest.raises(InvalidArgument) as refused:
            Patch(*pairs)
    way = "from the second pair to the first" if swapped else "from the first pair to the second"
    assert str(refused.value).startswith(
        f"{way}: {', '.join(names(named))} without {', '.join(names(missing))}"
    )


def test_a_side_that_takes_shorter_frames_is_refused() -> None:
    with (
        side(VERSION_1) as a,
        side(VERSION_1, max_frame=1514) as b,
        pytest.raises(InvalidArgument, match="frames of up to 65553 bytes, 1518 are taken"),
    ):
        Patch(a.bench.pair, b.bench.pair)


def test_a_queue_that_is_driven_cannot_be_patched() -> None:
    with patched() as (a, b, patch):
        with pytest.raises(StateError, match="driven by another thread"):
            Patch(b.bench.pair, a.bench.pair)
        with pytest.raises(StateError, match="driven by another thread"):
            patch.run()
        assert cross(a.device, b.device, TCP, PATTERN[:60000]) == (TCP, PATTERN[:60000])


def test_a_forwarder_is_not_for_a_pair_that_may_get_frames_without_checksum() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        ours,
        theirs,
        side(VERSION_1 | GUEST_CSUM) as a,
        pytest.raises(InvalidArgument, match="pair 0 with VIRTIO_NET_F_GUEST_CSUM"),
    ):
        Forwarder(a.bench.pair, ours.fileno(), vnet_hdr=True)


def test_a_stop_before_a_run_is_not_lost() -> None:
    with (
        side(VERSION_1) as a,
        side(VERSION_1) as b,
        Patch(a.bench.pair, b.bench.pair) as patch,
    ):
        patch.stop()
        patch.run()


def test_a_patch_runs_again_after_a_stop() -> None:
    with (
        side(MODES[0]) as a,
        side(MODES[0]) as b,
        Patch(a.bench.pair, b.bench.pair) as patch,
    ):
        for _ in range(3):
            with running(patch, patch.run):
                assert cross(a.device, b.device, Header(), FRAME) == (Header(), FRAME)
        assert patch.stats().forth.frames == 3


def test_a_broken_queue_ends_the_patch_and_what_came_before_is_sent() -> None:
    with (
        side(MODES[0]) as a,
        side(MODES[0]) as b,
        Patch(a.bench.pair, b.bench.pair) as patch,
    ):
        assert a.device.deliver(FRAME)
        assert a.device.deliver(FRAME, buffers=3)
        with pytest.raises(RingError, match="rx queue of pair 0 is broken: num_buffers"):
            patch.run()
        assert b.device.transmitted() == [FRAME]


@pytest.mark.parametrize("bit", ["VIRTIO_NET_F_GUEST_HDRLEN", "VIRTIO_NET_F_RSC_EXT"])
def test_bits_that_promise_more_of_a_header_are_refused(bit: str) -> None:
    number = {"VIRTIO_NET_F_GUEST_HDRLEN": 59, "VIRTIO_NET_F_RSC_EXT": 61}[bit]
    with (
        pytest.raises(InvalidArgument, match=f"{bit} is not driven here"),
        side(VERSION_1 | 1 << number),
    ):
        pass
