"""What is changed of a wiring while its rings run, as steps that can be taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from vhostctl.control.multiqueue import compact
from vhostctl.control.pair import RINGS, VhostPair
from vhostctl.control.plan import Step
from vhostctl.control.rings import RingPlacement
from vhostctl.control.tapside import TapSettings
from vhostctl.control.wiring import Wiring
from vhostctl.errors import InvalidArgument
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import RX


def rings(wiring: Wiring) -> Iterator[tuple[VhostPair, int]]:
    """Yield every ring of every pair."""
    for pair in wiring.pairs:
        for ring in RINGS:
            yield pair, ring


def find(wiring: Wiring, queue: int) -> tuple[VhostPair, int]:
    """Return pair and ring of the virtqueue `queue`. Raises InvalidArgument."""
    if not 0 <= queue < 2 * len(wiring.pairs):
        raise InvalidArgument(f"queue {queue}", hint=f"there are {2 * len(wiring.pairs)}")
    pair, ring = divmod(queue, 2)
    return wiring.pairs[pair], ring


def settle(wiring: Wiring, patience: float) -> int:
    """Have devices that read ahead deliver that; return the frames that are left of it.

    They have `patience` seconds, all together; rings without a backend deliver nothing. If
    this fails or is interrupted, the others read on.
    """
    deadline, left = time.monotonic() + patience, 0
    with ExitStack() as read_on:
        for pair in wiring.pairs:
            wait = 0.0
            if pair.attached(RX):
                fd = wiring.side.queue(pair.index).fileno()
                read_on.callback(pair.attach, RX, fd)
                wait = max(0.0, deadline - time.monotonic())
            left += pair.vhost.settle(RX, wait)
        read_on.pop_all()
    return left


def link_down_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what detaches every backend: frames wait where they are."""
    yield _link(wiring, up=False)
    for pair, ring in rings(wiring):
        if pair.attached(ring):
            yield _detach(wiring, pair, ring)


def link_up_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what attaches a backend to every ring that wants one, and has it looked at."""
    yield _link(wiring, up=True)
    for pair, ring in rings(wiring):
        if wiring.enabled(pair.index) and ring not in pair.stopped:
            yield from _attach(wiring, pair, ring)


def _link(wiring: Wiring, *, up: bool) -> Step:
    def do() -> None:
        wiring.link = up

    def undo() -> None:
        wiring.link = not up

    return Step("link", "up" if up else "down", "", do, undo)


def replace_tap_steps(
    wiring: Wiring, tap: Tap, done: Callable[[Callable[[], None]], object]
) -> Iterator[Step]:
    """Yield what moves every ring to the queues of `tap`; frames in the old one stay there.

    `done` gets what lets go of the old one, to be called when all is over. Raises
    InvalidArgument unless there is a queue for each pair, and if it is the same tap.
    """
    if len(tap.queues) != len(wiring.pairs):
        raise InvalidArgument(
            f"tap {tap.name} has {len(tap.queues)} queues for {len(wiring.pairs)} pairs",
            hint="each pair needs its own",
        )
    if tap is wiring.side.tap:
        raise InvalidArgument(f"tap {tap.name} cannot take its own place", hint="open another")
    before: dict[int, TapSettings] = {}
    order = list(range(len(wiring.pairs)))
    for index, queue in enumerate(tap.queues):

        def adapt(index: int = index) -> None:
            before[index] = TapSettings.of(tap.queues[index])
            wiring.side.adapt(tap.queues[index], wiring.negotiated)

        def restore(index: int = index) -> None:
            if index in before:
                before.pop(index).apply(tap.queues[index])

        yield Step("TUNSETVNETHDRSZ, TUNSETOFFLOAD", queue.label, "", adapt, restore)
        if not wiring.enabled(index):
            compact(order, index)
            yield Step("TUNSETQUEUE", queue.label, "detach", queue.disable, queue.enable)
    for pair, ring in rings(wiring):
        if pair.attached(ring):
            new, old = tap.queues[pair.index].fileno(), wiring.side.queue(pair.index).fileno()
            attach, back = partial(pair.attach, ring, new), partial(pair.attach, ring, old)
            yield Step("VHOST_NET_SET_BACKEND", pair.name_of(ring), tap.name, attach, back)
    # The last one, which changes no device and nothing of either tap.
    yield Step("exchange", tap.name, "", lambda: done(wiring.side.exchange(tap, before, order)))


def stop_ring_steps(wiring: Wiring, queue: int) -> Iterator[Step]:
    """Yield what detaches one ring. Raises InvalidArgument."""
    pair, ring = find(wiring, queue)
    if pair.attached(ring):
        yield _detach(wiring, pair, ring)
    stop, back = partial(pair.stopped.add, ring), partial(pair.stopped.discard, ring)
    yield Step("stopped", pair.name_of(ring), "", stop, None if ring in pair.stopped else back)


def start_ring_steps(
    wiring: Wiring, queue: int, base: int, placement: RingPlacement | None
) -> Iterator[Step]:
    """Yield what starts a ring that was stopped, perhaps at another place.

    Its backend comes with the link or its pair, if they are off. Raises InvalidArgument:
    there is no such ring, or it was not stopped.
    """
    pair, ring = find(wiring, queue)
    target = pair.name_of(ring)
    if ring not in pair.stopped:
        raise InvalidArgument(f"{target} is running", hint=f"stop_ring({queue}) first")
    if placement is not None:
        move = partial(wiring.move_ring, queue, placement)
        back = partial(wiring.move_ring, queue, pair.queues[ring].placement)
        yield Step("place", target, "", move, back)
    yield Step("VHOST_SET_VRING_NUM", target, "", partial(pair.set_num, ring))
    yield Step("VHOST_SET_VRING_BASE", target, str(base), partial(pair.set_base, ring, base))
    yield Step("VHOST_SET_VRING_ADDR", target, "", partial(pair.set_addresses, ring))
    start, stop = partial(pair.stopped.discard, ring), partial(pair.stopped.add, ring)
    yield Step("started", target, "", start, stop)
    if wiring.link and wiring.enabled(pair.index):
        yield from _attach(wiring, pair, ring)


def busyloop_steps(wiring: Wiring, microseconds: int) -> Iterator[Step]:
    """Yield what has every worker poll for so long."""
    before = wiring.busyloop
    for pair, ring in rings(wiring):
        do = partial(pair.set_busyloop, ring, microseconds)
        undo = partial(pair.set_busyloop, ring, before)
        target = pair.name_of(ring)
        yield Step("VHOST_SET_VRING_BUSYLOOP_TIMEOUT", target, f"{microseconds} us", do, undo)


def _detach(wiring: Wiring, pair: VhostPair, ring: int) -> Step:
    back = partial(pair.attach, ring, wiring.side.queue(pair.index).fileno())
    do = partial(pair.detach, ring)
    return Step("VHOST_NET_SET_BACKEND", pair.name_of(ring), "-1", do, back)


def _attach(wiring: Wiring, pair: VhostPair, ring: int) -> Iterator[Step]:
    target = pair.name_of(ring)
    attach = partial(pair.attach, ring, wiring.side.queue(pair.index).fileno())
    detach = partial(pair.detach, ring)
    yield Step("VHOST_NET_SET_BACKEND", target, wiring.config.tap, attach, detach)
    # The driver may have rung while nobody listened.
    yield Step("kick", target, "", pair.queues[ring].events["kick"].signal)
