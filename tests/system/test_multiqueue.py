"""Queue pairs off and on under load: every frame arrives once or is counted."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator

import pytest

from tests.support.multiqueue import PAIRS, Flows, Rig
from tests.system.conftest import until
from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.host.netns import NetNamespace
from vhostctl.host.steering import Steering

pytestmark = pytest.mark.usefixtures("nothing_left")

ROUNDS = 3
PAUSE = 0.1
PATIENCE = 60  # seconds for a guest that is there, on an emulated machine too


@pytest.fixture
def rig(namespace: NetNamespace, device: str) -> Iterator[Rig]:
    with Rig(namespace, device) as rig:
        yield rig


def received(rig: Rig) -> list[int]:
    return [pair.stats().rx_frames for pair in rig.driver.pairs]


def account(rig: Rig, flows: Flows, dropped: int) -> None:
    """Every datagram came back once, unchanged, or was counted by who dropped it."""
    lost = flows.wait_settled(rig.dropped() + dropped)
    counted = rig.dropped() + dropped + rig.udp_errors()
    assert lost == counted, f"{lost} of {flows.sent} are missing, {counted} counted as dropped"
    assert flows.repeated() == 0
    assert flows.changed == 0


@pytest.mark.usefixtures("descriptors")  # every turn has flows of its own
def test_each_pair_off_and_on_under_load(rig: Rig, seconds: float) -> None:
    dropped = 0
    deadline = time.monotonic() + seconds
    with rig.guest(), Flows(rig) as flows:
        flows.start()
        for turn in itertools.count():
            if turn >= ROUNDS * PAIRS and time.monotonic() > deadline:
                break
            pair = (turn * 3 + turn // PAIRS) % PAIRS
            time.sleep(PAUSE)
            done = rig.session.disable_pair(pair, PATIENCE)
            assert done.steered
            dropped += done.dropped
            assert list(rig.session.enabled) == [other != pair for other in range(PAIRS)]
            base, others = rig.base(pair), sum(received(rig))
            flows.renew()
            until(lambda: sum(received(rig)) > others, "the others have the flows")  # noqa: B023
            time.sleep(PAUSE)
            assert rig.base(pair) == base
            rig.session.enable_pair(pair)
            flows.renew()
        flows.stop()
        account(rig, flows, dropped)
    print(f"{flows.sent} sent, {len(flows.echoed)} came back, {turn} turns, {dropped} dropped")
    assert dropped == 0, "the guest had buffers for everything"
    assert all(count > 0 for count in received(rig))


def test_down_to_one_pair_and_up_again(rig: Rig) -> None:
    """The tap's indices move with each queue that goes; pairs keep to theirs."""
    with rig.guest(), Flows(rig) as flows:
        flows.start()
        for off in ((0, 1, 2), (3, 1, 2), (1, 3, 0)):
            (last,) = set(range(PAIRS)) - set(off)
            for pair in off:
                assert rig.session.disable_pair(pair, PATIENCE).dropped == 0
            assert list(rig.session.enabled) == [pair == last for pair in range(PAIRS)]
            assert rig.tap_queues() == (1, PAIRS - 1)
            with pytest.raises(InvalidArgument, match=f"pair {last} is the last"):
                rig.session.disable_pair(last)
            before = received(rig)
            flows.renew()
            until(lambda: received(rig)[last] > before[last], "all flows to it")  # noqa: B023
            for pair in reversed(off):
                rig.session.enable_pair(pair)
            flows.renew()
            time.sleep(PAUSE)
        flows.stop()
        account(rig, flows, 0)


def test_mq_command_ignored(rig: Rig) -> None:
    """Dragonball answers the guest's MQ command with OK and changes nothing."""
    with rig.guest(), Flows(rig) as flows:
        assert rig.tap_queues() == (PAIRS, 0)
        rig.session.disable_pair(2)
        assert rig.tap_queues() == (PAIRS - 1, 1)
        base = rig.base(2)
        for _ in range(4):
            flows.burst()
            flows.renew()
        account(rig, flows, 0)
        assert rig.base(2) == base
        rig.session.enable_pair(2)
        assert rig.tap_queues() == (PAIRS, 0)
        for _ in range(4):
            flows.burst()
            flows.renew()
        account(rig, flows, 0)
        assert rig.base(2) != base


def test_again_changes_nothing(rig: Rig) -> None:
    rig.session.enable_pair(1)
    rig.session.disable_pair(1)
    rig.session.disable_pair(1)
    assert rig.tap_queues() == (PAIRS - 1, 1)
    for pair in (-1, PAIRS):
        with pytest.raises(InvalidArgument, match=f"queue pair {pair}"):
            rig.session.disable_pair(pair)


def test_a_guest_without_buffers_bounds_the_wait(rig: Rig) -> None:
    """What it has no buffers for is dropped and counted, or comes when it is on again."""
    with rig.guest(0, 1, 3), Flows(rig) as flows:
        with Steering.to_queue(2) as program:
            rig.tap.queues[0].set_steering(program.fileno())
        flows.burst()
        begin = time.monotonic()
        done = rig.session.disable_pair(2, timeout=0.3)
        assert time.monotonic() - begin < PATIENCE
        assert done.dropped > 0
        assert not flows.echoed
        flows.burst()
        flows.wait_settled(flows.sent // 2)
        rig.session.enable_pair(2)
        with rig.guest(2):
            account(rig, flows, done.dropped)


def test_without_bpf_it_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> Steering:
        raise kernel_error(errno.EPERM, "BPF_PROG_LOAD", "a steering program")

    monkeypatch.setattr(Steering, "to_queue", refuse)
    with rig.guest(), Flows(rig) as flows:
        flows.start()
        time.sleep(PAUSE)
        assert not rig.session.disable_pair(0).steered
        rig.session.enable_pair(0)
        flows.stop()
        flows.burst()
        flows.wait_settled(0, seconds=1)
        assert rig.tap_queues() == (PAIRS, 0)
        assert len(set(flows.echoed)) == len(flows.echoed) > 0
