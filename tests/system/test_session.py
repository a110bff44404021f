"""A session on the real device: order, failure at every step, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.system.conftest import Possessions, until
from vhostctl.control.pair import VhostPair
from vhostctl.control.plan import Plan, Step
from vhostctl.control.session import Session
from vhostctl.control.states import CALLS, State, path
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.links import exists
from vhostctl.host.memory import GuestMemory
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.wire import Wire


@pytest.fixture
def config(device: str) -> SessionConfig:
    return SessionConfig("tap0", device, queues=2, queue_size=64, memory_size=4 << 20)


@pytest.fixture
def fresh(namespace: NetNamespace, config: SessionConfig) -> Iterator[Session]:
    """A session that is new."""
    open_tap = lambda: namespace.run(lambda: Tap.open("tap0", 2))  # noqa: E731
    session = Session(config, open_tap=open_tap)
    yield session
    session.close()


@pytest.fixture
def session(fresh: Session) -> Session:
    """A session that is mapped."""
    fresh.prepare()
    return fresh


@pytest.mark.usefixtures("nothing_left")
def test_stop_returns_the_bases_that_start_was_given(session: Session) -> None:
    session.start()
    assert session.stop() == [0, 0, 0, 0]
    session.start([0, 7, 65535, 1])
    assert session.state is State.RUNNING
    assert session.stop() == [0, 7, 65535, 1]
    assert session.ring_errors() == [0, 0, 0, 0]


# How a session gets into each state, and the arguments of what may be called there.
WAYS: dict[State, tuple[str, ...]] = {
    State.NEW: (),
    State.OPENED: ("open",),
    State.OWNED: ("open", "own"),
    State.NEGOTIATED: ("open", "own", "negotiate"),
    State.MAPPED: ("open", "own", "negotiate", "map"),
    State.RINGS_SET: ("prepare", "set_rings"),
    State.RUNNING: ("prepare", "start"),
    State.STOPPED: ("prepare", "start", "stop"),
    State.CLOSED: ("prepare", "start", "close"),
}
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "catch_up": (None,),
    "set_link": (False,),
    "enable_pair": (0,),
    "disable_pair": (0,),
    "replace_tap": (None,),
    "stop_ring": (0,),
    "start_ring": (0,),
    "mask": (0,),
    "unmask": (0,),
    "set_busyloop": (10,),
}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("state", [*WAYS, State.FAILED], ids=lambda state: state.value)
def test_a_wrong_order_is_refused(fresh: Session, state: State) -> None:
    for call in WAYS.get(state, WAYS[State.RUNNING]):
        getattr(fresh, call)()
    if state is State.FAILED:
        fresh.state = state
    assert fresh.state is state
    for call, rule in CALLS.items():
        if state in rule.needs:
            continue
        with pytest.raises(StateError) as refusal:
            getattr(fresh, call)(*ARGUMENTS.get(call, ()))
        way = path(state, call)
        if way:
            assert f"call {', '.join(f'{name}()' for name in way)} first" in str(refusal.value)
        assert fresh.state is state


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("state", WAYS, ids=lambda state: state.value)
def test_each_call_leads_where_the_table_says(fresh: Session, state: State) -> None:
    for call in WAYS[state]:
        getattr(fresh, call)()
        assert fresh.state is CALLS[call].leads_to
    fresh.close()
    fresh.close()
    assert fresh.state is State.CLOSED


@pytest.mark.usefixtures("nothing_left")
def test_a_call_that_failed_can_come_again(fresh: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    owned: list[VhostNet] = []
    own = VhostNet.set_owner

    def set_owner(device: VhostNet) -> None:
        owned.append(device)
        if len(owned) == 2:
            raise OSError("injected")
        own(device)

    monkeypatch.setattr(VhostNet, "set_owner", set_owner)
    fresh.open()
    with pytest.raises(OSError, match="injected"):
        fresh.own()
    assert fresh.state.value == "opened"
    fresh.own()
    fresh.negotiate()
    fresh.map()
    fresh.start()
    assert fresh.state is State.RUNNING


@pytest.mark.usefixtures("nothing_left")
def test_what_cannot_be_taken_back_fails_the_session(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.start()
    attach = VhostPair.attach
    monkeypatch.setattr(VhostPair, "attach", refuse)
    detach = VhostPair.detach
    gone: list[int] = []

    def third_refuses(pair: VhostPair, ring: int) -> None:
        gone.append(ring)
        if len(gone) == 3:
            raise OSError("injected")
        detach(pair, ring)

    monkeypatch.setattr(VhostPair, "detach", third_refuses)
    with pytest.raises(OSError, match="injected"):
        session.set_link(False)
    assert session.state is State.FAILED
    with pytest.raises(StateError, match=r"close\(\) is all that is left"):
        session.stop()
    monkeypatch.setattr(VhostPair, "attach", attach)
    monkeypatch.setattr(VhostPair, "detach", detach)


def refuse(*_: object) -> None:
    raise OSError("refused")


@pytest.mark.usefixtures("nothing_left")
def test_what_is_handed_in_is_left_open(namespace: NetNamespace, device: str) -> None:
    with (
        GuestMemory.anonymous(4 << 20) as memory,
        namespace.run(lambda: Tap.open("tap1")) as tap,
        VhostNet.at(device) as vhost,
        ExitStack() as stack,
    ):
        names = ("kick", "call", "error")
        events = [
            {name: stack.enter_context(EventFd.create(name)) for name in names} for _ in range(2)
        ]
        config = SessionConfig(tap="tap1")
        with Session(config, memory=memory, tap=tap, vhost=[vhost], events=events) as session:
            session.start()
            assert session.queues[1].call == events[1]["call"].fileno()
        assert not tap.queues[0].closed
        assert not any(event.closed for ring in events for event in ring.values())
        assert vhost.get_vring_base(0) == 0
        assert memory.hva(memory.regions[0].gpa, 1)


def test_each_pair_needs_a_device_of_its_own(config: SessionConfig) -> None:
    with (
        VhostNet.at(config.device) as vhost,
        pytest.raises(InvalidArgument, match="2 queue pairs and 1 vhost"),
    ):
        Session(config, vhost=[vhost])


@pytest.mark.parametrize("interrupted", [False, True], ids=["error", "interrupt"])
def test_failure_before_every_step_leaves_nothing(
    namespace: NetNamespace, config: SessionConfig, interrupted: bool
) -> None:
    before = Possessions.now()
    for failing in range(sum(map(len, Session(config).plan))):
        seen: list[Step] = []

        def observe(step: Step, seen: list[Step] = seen, failing: int = failing) -> None:
            if len(seen) == failing:
                raise KeyboardInterrupt if interrupted else OSError("injected")
            seen.append(step)

        session = Session(
            config, open_tap=lambda: namespace.run(lambda: Tap.open("tap0", 2)), observe=observe
        )
        with pytest.raises((OSError, KeyboardInterrupt)), session:
            session.start()
        assert len(seen) == failing
        assert not namespace.run(lambda: exists("tap0")), f"tap left after {seen[-1:]}"
        until(lambda: Possessions.now() == before, f"as before, after {seen[-1:]}")


def test_the_plan_is_what_happens(config: SessionConfig) -> None:
    seen: list[str] = []
    with Wire(wire_config(config), lambda step: seen.append(str(step))) as wire:
        assert seen == [str(step) for step in wire.plan()]


def test_failure_after_every_step_leaves_nothing(
    config: SessionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    total = len(list(Wire(wire_config(config)).plan()))
    for failing in range(1, total + 1):
        done.clear()
        with pytest.raises(OSError, match="injected"), Wire(wire_config(config)):
            pass
        assert len(done) == failing
        until(lambda: Possessions.now() == before, f"as before, after {done[-1]}")


def test_a_kernel_that_refuses_a_step_leaves_nothing(namespace: NetNamespace, device: str) -> None:
    before = Possessions.now()
    with namespace.run(lambda: Tap.open("tap0")):  # noqa: SIM117 -- the second must fail
        with (
            pytest.raises(OSError, match=r"TUNSETIFF on tap0 queue 0: .*EBUSY"),
            Session(
                SessionConfig(tap="tap0", device=device),
                open_tap=lambda: namespace.run(lambda: Tap.open("tap0")),
            ),
        ):
            pass
    until(lambda: Possessions.now() == before, "as before")
