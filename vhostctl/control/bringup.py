"""The order of things: what QEMU does for a vhost-net device, as a list of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from vhostctl.control.plan import Step
from vhostctl.control.wiring import Wiring
from vhostctl.errors import KernelError
from vhostctl.host.vhost import RX, TX

RINGS = {RX: "receive", TX: "transmit"}


def prepare_steps(wiring: Wiring) -> Iterator[Step]:
    """Yield what leads from nothing to a device that knows its memory and features.

    Memory comes before the device, so that the device is closed before memory is
    unmapped: its worker reads memory until then.
    """
    config = wiring.config
    if wiring.memory is None:
        size = f"{config.memory_size >> 20} MiB"
        yield Step("map guest memory", "", size, wiring.map_memory, wiring.unmap_memory)
    rings = f"{2 * config.queues} rings of {config.queue_size}"
    yield Step("place rings", "", rings, wiring.place, wiring.unplace)
    if wiring.tap is None:
        queues = f"{config.queues} queue{'s' * (config.queues > 1)}, vnet_hdr"
        yield Step("TUNSETIFF", config.tap, queues, wiring.attach_tap, wiring.detach_tap)
    ours = not wiring.vhost
    for pair in range(config.queues):
        name = f"pair {pair}"
        if ours:
            yield Step(
                "open", config.device, name, wiring.open_vhost, partial(wiring.close_vhost, pair)
            )
        yield Step("VHOST_SET_OWNER", name, "", partial(_set_owner, wiring, pair))
    yield Step("VHOST_GET_FEATURES", "pair 0", "negotiate", wiring.negotiate)
    for pair in range(config.queues):
        name = f"pair {pair}"
        yield Step(
            "TUNSETVNETHDRSZ, TUNSETOFFLOAD, TUNSETSNDBUF",
            f"{config.tap} queue {pair}",
            "as negotiated",
            partial(wiring.configure_tap, pair),
            partial(wiring.restore_tap, pair),
        )
        yield Step("VHOST_SET_FEATURES", name, "as negotiated", partial(_features, wiring, pair))
        yield Step("VHOST_SET_MEM_TABLE", name, "", partial(_mem_table, wiring, pair))


def start_steps(wiring: Wiring, bases: Sequence[int]) -> Iterator[Step]:
    """Yield what starts every ring; `bases` holds the avail index of each, pair by pair.

    The backends come last: from then on the worker touches the rings.
    """
    for pair in range(wiring.config.queues):
        for ring, kind in RINGS.items():
            yield from _ring_steps(wiring, pair, ring, bases[2 * pair + ring], kind)
    for pair in range(wiring.config.queues):
        for ring, kind in RINGS.items():
            yield Step(
                "VHOST_NET_SET_BACKEND",
                f"pair {pair} {kind}",
                f"{wiring.config.tap} queue {pair}",
                partial(_attach, wiring, pair, ring),
                partial(_detach, wiring, pair, ring),
            )


def _ring_steps(wiring: Wiring, pair: int, ring: int, base: int, kind: str) -> Iterator[Step]:
    target = f"pair {pair} {kind}"
    size = wiring.config.queue_size
    yield Step("VHOST_SET_VRING_NUM", target, str(size), partial(_num, wiring, pair, ring))
    yield Step("VHOST_SET_VRING_BASE", target, str(base), partial(_base, wiring, pair, ring, base))
    yield Step("VHOST_SET_VRING_ADDR", target, "", partial(wiring.set_ring_address, pair, ring))
    for name, request in (("kick", "KICK"), ("call", "CALL"), ("error", "ERR")):
        step = partial(_event, wiring, pair, ring, name)
        yield Step(f"VHOST_SET_VRING_{request}", target, "eventfd", step)


def _set_owner(wiring: Wiring, pair: int) -> None:
    wiring.vhost[pair].set_owner()


def _features(wiring: Wiring, pair: int) -> None:
    wiring.vhost[pair].set_features(wiring.negotiated.device_features)


def _mem_table(wiring: Wiring, pair: int) -> None:
    wiring.vhost[pair].set_mem_table(wiring.table.regions)


def _num(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.vhost[pair].set_vring_num(ring, wiring.config.queue_size)


def _base(wiring: Wiring, pair: int, ring: int, base: int) -> None:
    wiring.vhost[pair].set_vring_base(ring, base)


def _event(wiring: Wiring, pair: int, ring: int, name: str) -> None:
    device, event = wiring.vhost[pair], wiring.queues[2 * pair + ring].events[name]
    bind = {
        "kick": device.set_vring_kick,
        "call": device.set_vring_call,
        "error": device.set_vring_err,
    }
    bind[name](ring, event.fileno())


def _attach(wiring: Wiring, pair: int, ring: int) -> None:
    wiring.attached.add((pair, ring))
    try:
        wiring.vhost[pair].set_backend(ring, wiring.tap_queue(pair).fileno())
    except KernelError:
        wiring.attached.discard((pair, ring))
        raise


def _detach(wiring: Wiring, pair: int, ring: int) -> None:
    if (pair, ring) in wiring.attached:
        wiring.attached.discard((pair, ring))
        wiring.vhost[pair].set_backend(ring, None)
