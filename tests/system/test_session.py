"""A session on the real device: order, failure at every step, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.conftest import Possessions, until
from vhostctl.control.plan import Plan, Step
from vhostctl.control.session import Session, State
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.links import exists
from vhostctl.host.memory import GuestMemory
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.wire import Wire

CONFIG = SessionConfig(tap="tap0", queues=2, queue_size=64, memory_size=4 << 20)


@pytest.fixture
def session(namespace: NetNamespace) -> Iterator[Session]:
    with Session(CONFIG, open_tap=lambda: namespace.run(lambda: Tap.open("tap0", 2))) as session:
        yield session


@pytest.mark.usefixtures("nothing_left")
def test_stop_returns_the_bases_that_start_was_given(session: Session) -> None:
    session.start()
    assert session.stop() == [0, 0, 0, 0]
    session.start([0, 7, 65535, 1])
    assert session.state is State.RUNNING
    assert session.stop() == [0, 7, 65535, 1]
    assert session.ring_errors() == [0, 0, 0, 0]


@pytest.mark.usefixtures("nothing_left")
def test_a_wrong_order_is_refused(session: Session) -> None:
    with pytest.raises(StateError, match="the session is prepared; it must be running"):
        session.stop()
    with pytest.raises(StateError, match="the session is prepared; it must be new"):
        session.prepare()
    session.start()
    with pytest.raises(StateError, match="the session is running; it must be prepared"):
        session.start()
    session.close()
    session.close()
    with pytest.raises(StateError, match="the session is closed"):
        session.start()


@pytest.mark.usefixtures("nothing_left")
def test_what_is_handed_in_is_left_open(namespace: NetNamespace) -> None:
    with (
        GuestMemory.anonymous(4 << 20) as memory,
        namespace.run(lambda: Tap.open("tap1")) as tap,
        VhostNet.open() as device,
    ):
        config = SessionConfig(tap="tap1")
        with Session(config, memory=memory, tap=tap, vhost=[device]) as session:
            session.start()
        assert not tap.queues[0].closed
        assert device.get_vring_base(0) == 0
        assert memory.hva(memory.regions[0].gpa, 1)


def test_each_pair_needs_a_device_of_its_own() -> None:
    with (
        VhostNet.open() as device,
        pytest.raises(InvalidArgument, match="2 queue pairs and 1 vhost"),
    ):
        Session(CONFIG, vhost=[device])


def step_count() -> int:
    return sum(map(len, Session(CONFIG).plan))


@pytest.mark.parametrize("interrupted", [False, True], ids=["error", "interrupt"])
def test_failure_before_every_step_leaves_nothing(
    namespace: NetNamespace, interrupted: bool
) -> None:
    before = Possessions.now()
    for failing in range(step_count()):
        seen: list[Step] = []

        def observe(step: Step, seen: list[Step] = seen, failing: int = failing) -> None:
            if len(seen) == failing:
                raise KeyboardInterrupt if interrupted else OSError("injected")
            seen.append(step)

        session = Session(
            CONFIG, open_tap=lambda: namespace.run(lambda: Tap.open("tap0", 2)), observe=observe
        )
        with pytest.raises((OSError, KeyboardInterrupt)), session:
            session.start()
        assert len(seen) == failing
        assert not namespace.run(lambda: exists("tap0")), f"tap left after {seen[-1:]}"
        until(lambda: Possessions.now() == before, f"as before, after {seen[-1:]}")


def test_the_plan_is_what_happens() -> None:
    seen: list[str] = []
    with Wire(wire_config(CONFIG), lambda step: seen.append(str(step))) as wire:
        assert seen == [str(step) for step in wire.plan()]


def test_failure_after_every_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a selftest's bring-up, each step done and then failed."""
    before = Possessions.now()
    done: list[Step] = []
    failing = 0

    def run(plan: Plan, _observe: object = None) -> None:
        try:
            for step in plan.steps:
                plan._done.append(step)
                step.do()
                done.append(step)
                if len(done) == failing:
                    raise OSError("injected")
        except BaseException as error:
            plan._undo_after(error)
            raise

    monkeypatch.setattr(Plan, "run", run)
    total = len(list(Wire(wire_config(CONFIG)).plan()))
    for failing in range(1, total + 1):
        done.clear()
        with pytest.raises(OSError, match="injected"), Wire(wire_config(CONFIG)):
            pass
        assert len(done) == failing
        until(lambda: Possessions.now() == before, f"as before, after {done[-1]}")


def test_a_kernel_that_refuses_a_step_leaves_nothing(namespace: NetNamespace) -> None:
    before = Possessions.now()
    with namespace.run(lambda: Tap.open("tap0")):  # noqa: SIM117 -- the second must fail
        with (
            pytest.raises(OSError, match=r"TUNSETIFF on tap0 queue 0: .*EBUSY"),
            Session(
                SessionConfig(tap="tap0"),
                open_tap=lambda: namespace.run(lambda: Tap.open("tap0")),
            ),
        ):
            pass
    until(lambda: Possessions.now() == before, "as before")
