"""Pairs on and off without a kernel: the order of things, the tap's indices, every failure."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from vhostctl.control import multiqueue
from vhostctl.control.multiqueue import Disabled, QueuePairs
from vhostctl.errors import InvalidArgument, KernelError, kernel_error
from vhostctl.host.handle import Handle
from vhostctl.host.vhost import RX, TX


class World:
    """A tap of three queues, its pairs, and a count of what is asked of them."""

    def __init__(self, stack: ExitStack) -> None:
        self.asked: list[str] = []
        self.failing: str | None = None
        self.order = [0, 1, 2]  # the pair at each index of the tap
        self.steering: int | None = None
        self.queues = [FakeQueue(self, n, stack) for n in range(3)]
        self.pairs = [FakePair(self, n, stack) for n in range(3)]
        for pair, queue in zip(self.pairs, self.queues, strict=True):
            pair.backends = {RX: queue.fileno(), TX: queue.fileno()}

    def ask(self, what: str) -> None:
        self.asked.append(what)
        if what == self.failing:
            raise kernel_error(errno.EIO, what, "the world")

    def state(self) -> object:
        return self.order[:], self.steering, [dict(pair.backends) for pair in self.pairs]

    def load(self, index: int) -> Handle:
        self.ask(f"load {index}")
        self.target = index
        return Handle(os.open("/dev/null", os.O_RDONLY), f"to {index}")


class FakeQueue:
    def __init__(self, world: World, number: int, stack: ExitStack) -> None:
        self.world, self.number = world, number
        self.ours, self.theirs = (
            stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        )

    def fileno(self) -> int:
        return self.ours.fileno()

    def read(self, size: int) -> bytes:
        return self.ours.recv(size, socket.MSG_DONTWAIT)

    def enable(self) -> None:
        self.world.ask("enable")
        assert self.number not in self.world.order
        self.world.order.append(self.number)

    def disable(self) -> None:
        self.world.ask("disable")
        order = self.world.order
        index = order.index(self.number)
        order[index] = order[-1]
        order.pop()

    def set_steering(self, program_fd: int | None) -> None:
        self.world.ask("steer" if program_fd is not None else "unsteer")
        self.world.steering = None if program_fd is None else self.world.target


class FakePair:
    def __init__(self, world: World, number: int, stack: ExitStack) -> None:
        self.world, self.number = world, number
        self.backends: dict[int, int] = {}
        self.vhost = self
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        for kick in self.kicks:
            stack.callback(os.close, kick)
        self.queues = [SimpleNamespace(kick=kick) for kick in self.kicks]
        self.on_attach: Callable[[], object] = lambda: None
        self.on_detach: Callable[[], object] = lambda: None

    def settle(self, queue: int, timeout: float) -> int:
        assert (queue, timeout >= 0) == (RX, True)
        self.world.ask("settle")
        return 0

    def attach(self, ring: int, fd: int) -> None:
        self.world.ask(f"attach {ring}")
        self.backends[ring] = fd
        self.on_attach()

    def detach(self, ring: int) -> None:
        self.world.ask(f"detach {ring}")
        self.backends.pop(ring, None)
        if ring == RX:
            self.on_detach()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(stack)
        monkeypatch.setattr(multiqueue, "Steering", SimpleNamespace(to_queue=world.load))
        monkeypatch.setattr(multiqueue, "grace_period", lambda: world.ask("grace"))
        yield world


@pytest.fixture
def switch(world: World) -> QueuePairs:
    return QueuePairs(world.pairs, world.queues)


def test_the_order_of_things(world: World, switch: QueuePairs) -> None:
    assert switch.disable(1) == Disabled(steered=True, dropped=0)
    off = ["load 0", "steer", "grace", "settle", "detach 0", "detach 1", "disable", "unsteer"]
    assert world.asked == off
    assert switch.enabled == [True, False, True]
    world.asked.clear()
    switch.enable(1)
    assert world.asked == ["enable", "attach 0", "attach 1"]
    assert switch.enabled == [True] * 3
    assert [os.eventfd_read(kick) for kick in world.pairs[1].kicks] == [1, 1]


def test_indices_follow_the_tap(world: World, switch: QueuePairs) -> None:
    """Whatever went and came before, flows go to a queue that stays and keeps its index."""
    for first, second in itertools.permutations(range(3), 2):
        for pair in (first, second):
            switch.disable(pair)
            staying = [other for other in range(3) if switch.enabled[other]]
            assert sorted(world.order) == staying
        with pytest.raises(InvalidArgument, match="the last that is enabled"):
            switch.disable(world.order[0])
        switch.enable(first)
        switch.enable(second)
        assert switch.enabled == [True] * 3


def test_the_target_stays(world: World, switch: QueuePairs) -> None:
    for pair in (2, 0, 1, 0, 2):
        order = world.order[:]
        switch.disable(pair)
        assert order[world.target] != pair
        assert world.order[world.target] == order[world.target]
        switch.enable(pair)


@pytest.mark.parametrize(
    "failing", ["load 0", "steer", "grace", "settle", "detach 0", "detach 1", "disable"]
)
def test_a_failure_leaves_the_pair_enabled(world: World, switch: QueuePairs, failing: str) -> None:
    before = world.state()
    world.failing = failing
    with pytest.raises(KernelError, match=failing):
        switch.disable(1)
    assert world.state() == before
    assert switch.enabled == [True] * 3
    world.failing = None
    switch.disable(1)


@pytest.mark.parametrize("failing", ["enable", "attach 0", "attach 1"])
def test_a_failure_leaves_the_pair_disabled(world: World, switch: QueuePairs, failing: str) -> None:
    switch.disable(1)
    before = world.state()
    world.failing = failing
    with pytest.raises(KernelError, match=failing):
        switch.enable(1)
    assert world.state() == before
    assert switch.enabled == [True, False, True]
    world.failing = None
    switch.enable(1)


def test_what_comes_back_from_the_device_gets_another_go(world: World, switch: QueuePairs) -> None:
    queue, pair = world.queues[1], world.pairs[1]
    held = [b"taken out of the queue"]
    pair.on_detach = lambda: held and queue.theirs.send(held[0])
    pair.on_attach = lambda: held.remove(queue.ours.recv(100))
    assert switch.disable(1).dropped == 0
    assert world.asked.count("detach 0") == 2
    assert world.asked.count("attach 0") == 1


def test_what_the_guest_does_not_take_is_counted(world: World, switch: QueuePairs) -> None:
    for number in range(5):
        world.queues[2].theirs.send(b"%d" % number)
    assert switch.disable(2, timeout=0.05) == Disabled(steered=True, dropped=5)
    assert switch.disable(2) == Disabled(steered=True, dropped=0)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_without_steering_it_goes_on_and_says_so(
    world: World, switch: QueuePairs, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_: int) -> Handle:
        raise kernel_error(number, "BPF_PROG_LOAD", "a steering program")

    monkeypatch.setattr(multiqueue, "Steering", SimpleNamespace(to_queue=refuse))
    assert switch.disable(0) == Disabled(steered=False, dropped=0)
    assert world.order == [2, 1]


def test_each_pair_has_a_queue(world: World) -> None:
    with pytest.raises(InvalidArgument, match="3 queue pairs on 2 queues"):
        QueuePairs(world.pairs, world.queues[:2])
