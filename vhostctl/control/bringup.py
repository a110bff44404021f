"""The order of things: what QEMU does for a vhost-net device, as lists of steps.

One function for each call of a session; they are made before anything is opened, so that
they can be printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from vhostctl.control.pair import RINGS
from vhostctl.control.plan import Step
from vhostctl.control.wiring import Wiring


def open_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what opens and places everything.

    Memory comes before the device, so that the device is closed before memory is
    unmapped: its worker reads memory until then.
    """
    config = wiring.config
    if wiring.handed.memory is None:
        size = f"{config.memory_size >> 20} MiB"
        yield Step("map guest memory", "", size, wiring.map_memory, wiring.unmap_memory)
    rings = f"{2 * config.queues} rings of {config.queue_size}"
    yield Step("place rings", "", rings, wiring.place, wiring.unplace)
    if wiring.handed.tap is None:
        queues = f"{config.queues} queue{'s' * (config.queues > 1)}, vnet_hdr"
        yield Step("TUNSETIFF", config.tap, queues, wiring.side.open, wiring.side.close)
    yield Step("arrange queues", config.tap, "", wiring.side.arrange)
    if not wiring.handed.vhost:
        for pair in range(config.queues):
            opens, closes = partial(wiring.open_vhost, pair), partial(wiring.close_vhost, pair)
            yield Step("open", config.device, f"pair {pair}", opens, closes)
    if config.translating:
        yield Step("answer IOTLB misses", "", "", wiring.translate, wiring.end_translation)


def own_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what makes this process the owner, whose memory the workers use."""
    worker = wiring.config.worker
    for pair in range(wiring.config.queues):
        name = f"pair {pair}"
        if worker is not None:
            choose = partial(wiring.choose_worker, pair)
            yield Step("VHOST_SET_FORK_FROM_OWNER", name, worker, choose)
        yield Step("VHOST_SET_OWNER", name, "", partial(wiring.own, pair))


def negotiate_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what settles the features and tells tap and devices."""
    yield Step("VHOST_GET_FEATURES", "pair 0", "negotiate", wiring.negotiate)
    for pair in range(wiring.config.queues):
        name = f"pair {pair}"
        if wiring.config.translating:
            told = partial(wiring.set_backend_features, pair)
            yield Step("VHOST_SET_BACKEND_FEATURES", name, "IOTLB messages", told)
        yield Step(
            "TUNSETVNETHDRSZ, TUNSETVNETLE, TUNSETOFFLOAD, TUNSETSNDBUF",
            f"{wiring.config.tap} queue {pair}",
            "as negotiated",
            partial(_configure_tap, wiring, pair),
            partial(wiring.side.restore, pair),
        )
        features = partial(_features, wiring, pair)
        yield Step("VHOST_SET_FEATURES", name, "as negotiated", features)


def map_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what tells the devices of guest memory."""
    yield Step("follow memory", "", "log", wiring.follow_memory, wiring.forget_memory)
    for pair in range(wiring.config.queues):
        tell = partial(wiring.set_mem_table, pair)
        yield Step("VHOST_SET_MEM_TABLE", f"pair {pair}", "", tell)


def ring_steps(wiring: Wiring, bases: Sequence[int]) -> Iterator[Step]:
    """Yield what sets every ring; `bases` holds the avail index of each, pair by pair."""
    for pair in range(wiring.config.queues):
        for ring, kind in RINGS.items():
            target = f"pair {pair} {kind}"
            size, base = wiring.config.queue_size, bases[2 * pair + ring]
            for name, detail, action in (
                ("NUM", str(size), _num),
                ("BASE", str(base), partial(_base, base)),
                ("ADDR", "", _addresses),
                ("KICK", "eventfd", _kick),
                ("CALL", "eventfd", _call),
                ("ERR", "eventfd", _err),
            ):
                do = partial(action, wiring, pair, ring)
                yield Step(f"VHOST_SET_VRING_{name}", target, detail, do)
            if wiring.busyloop:
                wait = wiring.busyloop
                do = partial(_busyloop, wait, wiring, pair, ring)
                yield Step("VHOST_SET_VRING_BUSYLOOP_TIMEOUT", target, f"{wait} us", do)


def start_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what attaches the tap to every ring: from then on the workers touch the rings."""
    for pair in range(wiring.config.queues):
        for ring, kind in RINGS.items():
            target = f"pair {pair} {kind}"
            yield Step(
                "VHOST_NET_SET_BACKEND",
                target,
                f"{wiring.config.tap} queue {pair}",
                partial(_attach, wiring, pair, ring),
                partial(_detach, wiring, pair, ring),
            )


def _configure_tap(wiring: Wiring, pair: int) -> None:
    wiring.side.configure(pair, wiring.negotiated)


def _features(wiring: Wiring, pair: int) -> None:
    wiring.pairs[pair].set_features(wiring.negotiated.device_features)


def _num(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].set_num(ring)


def _base(base: int, wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].set_base(ring, base)


def _addresses(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].set_addresses(ring)


def _kick(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].set_kick(ring)


def _call(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].set_call(ring)


def _err(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].set_err(ring)


def _busyloop(timeout: int, wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].set_busyloop(ring, timeout)


def _attach(wiring: Wiring, pair: int, ring: int) -> None:
    if wiring.wanted(wiring.pairs[pair], ring):
        wiring.pairs[pair].attach(ring, wiring.side.queue(pair).fileno())


def _detach(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.pairs[pair].detach(ring)
