"""What is changed of a wiring while its rings run, as steps that can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from vhostctl.control.multiqueue import compact
from vhostctl.control.pair import RINGS, VhostPair
from vhostctl.control.plan import Step
from vhostctl.control.rings import RingPlacement
from vhostctl.control.wiring import TapSettings, Wiring
from vhostctl.errors import InvalidArgument
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import RX


def rings_on(wiring: Wiring) -> Iterator[tuple[VhostPair, int]]:
    """Yield the rings of the pairs that are enabled."""
    for pair in wiring.pairs:
        if wiring.enabled(pair.index):
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

    Each gets `patience` seconds. If this fails or is interrupted, they read on.
    """
    left = 0
    with ExitStack() as read_on:
        for pair, ring in rings_on(wiring):
            if ring == RX and pair.attached(ring):
                read_on.callback(pair.attach, ring, wiring.tap_queue(pair.index).fileno())
                left += pair.vhost.settle(ring, patience)
        read_on.pop_all()
    return left


def link_down_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what detaches every backend: frames wait where they are."""
    for pair, ring in rings_on(wiring):
        if pair.attached(ring):
            yield _detach(wiring, pair, ring)


def link_up_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what attaches every backend where each ring stands and has the rings looked at."""
    for pair, ring in rings_on(wiring):
        yield from _attach(wiring, pair, ring, pair.base(ring))


def replace_tap_steps(wiring: Wiring, tap: Tap) -> Iterator[Step]:
    """Yield what moves every ring to the queues of `tap`; frames in the old one stay there.

    Raises InvalidArgument unless there is a queue for each pair.
    """
    if len(tap.queues) != len(wiring.pairs):
        raise InvalidArgument(
            f"tap {tap.name} has {len(tap.queues)} queues for {len(wiring.pairs)} pairs",
            hint="each pair needs its own",
        )
    before: dict[int, TapSettings] = {}
    order = list(range(len(wiring.pairs)))
    for index, queue in enumerate(tap.queues):

        def adapt(index: int = index) -> None:
            before[index] = TapSettings.of(tap.queues[index])
            wiring.adapt(tap.queues[index])

        def restore(index: int = index) -> None:
            if index in before:
                before.pop(index).apply(tap.queues[index])

        yield Step("TUNSETVNETHDRSZ, TUNSETOFFLOAD", queue.label, "", adapt, restore)
        if not wiring.enabled(index):
            compact(order, index)
            yield Step("TUNSETQUEUE", queue.label, "detach", queue.disable, queue.enable)
    for pair, ring in rings_on(wiring):
        if pair.attached(ring):
            new, old = tap.queues[pair.index].fileno(), wiring.tap_queue(pair.index).fileno()
            attach, back = partial(pair.attach, ring, new), partial(pair.attach, ring, old)
            target = pair.name_of(ring)
            yield Step("VHOST_NET_SET_BACKEND", target, tap.name, attach, back)
    yield Step(
        "forget tap", wiring.config.tap, "", partial(wiring.exchange_tap, tap, before, order)
    )


def stop_ring_steps(wiring: Wiring, queue: int) -> Iterator[Step]:
    """Yield what detaches one ring. Raises InvalidArgument."""
    pair, ring = find(wiring, queue)
    if pair.attached(ring):
        yield _detach(wiring, pair, ring)


def start_ring_steps(
    wiring: Wiring, queue: int, base: int, placement: RingPlacement | None
) -> Iterator[Step]:
    """Yield what starts a ring that was stopped, perhaps at another place.

    Raises InvalidArgument: there is no such ring, or it runs.
    """
    pair, ring = find(wiring, queue)
    target = pair.name_of(ring)
    if pair.attached(ring):
        raise InvalidArgument(f"{target} is running", hint=f"stop_ring({queue}) first")
    if placement is not None:
        move = partial(wiring.move_ring, queue, placement)
        back = partial(wiring.move_ring, queue, pair.queues[ring].placement)
        yield Step("place", target, "", move, back)
    yield Step("VHOST_SET_VRING_NUM", target, "", partial(pair.set_num, ring))
    yield Step("VHOST_SET_VRING_ADDR", target, "", partial(pair.set_addresses, ring))
    yield from _attach(wiring, pair, ring, base)


def _detach(wiring: Wiring, pair: VhostPair, ring: int) -> Step:
    back = partial(pair.attach, ring, wiring.tap_queue(pair.index).fileno())
    do = partial(pair.detach, ring)
    return Step("VHOST_NET_SET_BACKEND", pair.name_of(ring), "-1", do, back)


def _attach(wiring: Wiring, pair: VhostPair, ring: int, base: int) -> Iterator[Step]:
    target = pair.name_of(ring)
    attach = partial(pair.attach, ring, wiring.tap_queue(pair.index).fileno())
    yield Step("VHOST_SET_VRING_BASE", target, str(base), partial(pair.set_base, ring, base))
    yield Step(
        "VHOST_NET_SET_BACKEND", target, wiring.config.tap, attach, partial(pair.detach, ring)
    )
    # The driver may have rung while nobody listened.
    yield Step("kick", target, "", pair.queues[ring].events["kick"].signal)
