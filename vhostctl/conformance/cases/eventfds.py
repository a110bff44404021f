"""The descriptors of a ring, and the log's: what they may be, and how long they are held."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial

from vhostctl.abi import vhost
from vhostctl.abi.ioctl import Request
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import (
    BAD,
    NO_FD,
    Edge,
    ask,
    eventfd_id,
    file_of,
    owned,
    running,
)
from vhostctl.conformance.rig import Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.host.eventfd import EventFd
from vhostctl.host.vhost import RX, TX, VhostNet

SET_LOG_FD, SET_LOG_BASE = vhost.VHOST_SET_LOG_FD, vhost.VHOST_SET_LOG_BASE
OF_RING = {
    "KICK": vhost.VHOST_SET_VRING_KICK,
    "CALL": vhost.VHOST_SET_VRING_CALL,
    "ERR": vhost.VHOST_SET_VRING_ERR,
}
ROUNDS = 40
SLACK = 15  # eventfds that others on the machine may make meanwhile
TRIES = 5  # they may make more now and then, and a leak is there each time


def _binders() -> dict[str, Callable[[VhostNet, int], None]]:
    """Return what binds a descriptor to each place that takes an eventfd."""
    return {
        "KICK": lambda device, fd: device.set_vring_kick(TX, fd),
        "CALL": lambda device, fd: device.set_vring_call(TX, fd),
        "ERR": lambda device, fd: device.set_vring_err(TX, fd),
        "LOG": lambda device, fd: device.set_log_fd(fd),
    }


def _refused(target: Target, device: VhostNet, place: str, fd: int) -> str:
    return target.refused(lambda: _binders()[place](device, fd))


def _rules(place: str) -> None:
    @case(f"{place}: an eventfd is bound, bound again, and unbound by -1, as often as one likes.")
    def bind(target: Target) -> None:
        device, event = owned(target), target.keep(EventFd.create())
        found = [
            _refused(target, device, place, fd)
            for fd in (-1, event.fileno(), event.fileno(), -1, -1, event.fileno())
        ]
        target.check("answers", found, [""] * 6)

    @case(f"{place}: a number that is no descriptor is EBADF; of those below 0 only -1 is none.")
    def no_descriptor(target: Target) -> None:
        device = owned(target)
        for fd in (NO_FD, -2, -(2**31), 2**31 - 1):
            target.check(f"{fd}", _refused(target, device, place, fd), "EBADF")

    @case(f"{place}: a descriptor that is no eventfd is EINVAL.")
    def no_eventfd(target: Target) -> None:
        device = owned(target)
        reader, writer = os.pipe()
        others = {"pipe": writer, "null": os.open(os.devnull, os.O_RDWR)}
        with tempfile.TemporaryFile() as file:
            others["file"] = file.fileno()
            for name, fd in others.items():
                target.check(name, _refused(target, device, place, fd), "EINVAL")
        for fd in (reader, writer, others["null"]):
            os.close(fd)

    @case(f"{place}: the device's own descriptor is EINVAL.", needs=("node",))
    def own_descriptor(target: Target) -> None:
        device = owned(target)
        target.check("own", _refused(target, device, place, device.fileno()), "EINVAL")

    @case(f"{place}: a refused descriptor leaves the device usable, and the next is taken.")
    def after_refusal(target: Target) -> None:
        device, event = owned(target), target.keep(EventFd.create())
        _refused(target, device, place, NO_FD)
        target.check("answer", _refused(target, device, place, event.fileno()), "")

    @case(f"{place}: an eventfd may be replaced by another while the ring runs.")
    def live(target: Target) -> None:
        rig, event = running(target), target.keep(EventFd.create())
        found = [_refused(target, rig.device, place, fd) for fd in (event.fileno(), -1)]
        target.check("answers", found, ["", ""])

    @case(f"{place}: replaced {ROUNDS} times, eventfds are let go.")
    def replaced(target: Target) -> None:
        device = owned(target)

        def bind() -> None:
            for _ in range(ROUNDS):
                with EventFd.create() as event:
                    _binders()[place](device, event.fileno())
            _binders()[place](device, -1)

        target.check("let go", _are_let_go(bind), True)

    @case(f"{place}: RESET_OWNER and close() let the eventfd go.")
    def let_go(target: Target) -> None:
        def bind() -> None:
            for _ in range(ROUNDS // 2):
                with owned(target) as device:
                    with EventFd.create() as event:
                        _binders()[place](device, event.fileno())
                    device.reset_owner()
                    device.set_owner()
                    with EventFd.create() as event:
                        _binders()[place](device, event.fileno())

        target.check("let go", _are_let_go(bind), True)


def _are_let_go(bind: Callable[[], None]) -> bool:
    """Return whether the eventfds that `bind()` makes and binds are not there after it."""
    for _ in range(TRIES):
        before = eventfd_id()
        bind()
        if eventfd_id() - before < SLACK:
            return True
    return False


for _place in ("KICK", "CALL", "ERR", "LOG"):
    _rules(_place)


def _short(name: str, request: Request) -> None:
    @case(f"{name}: an argument without the descriptor is EFAULT, also while the ring runs.")
    def rule(target: Target) -> None:
        device, edge = owned(target), target.keep(Edge())
        target.check("stopped", ask(target, device, request, edge.words(RX)), "EFAULT")
        target.check(
            "running", ask(target, running(target).device, request, edge.words(RX)), "EFAULT"
        )


for _name, _request in OF_RING.items():
    _short(_name, _request)


@case("One eventfd serves in every place of both rings at once.")
def shared(target: Target) -> None:
    device, event = owned(target), target.keep(EventFd.create())
    for name, request in OF_RING.items():
        for queue in (RX, TX):
            found = ask(target, device, request, file_of(queue, event.fileno()))
            target.check(f"{name} {queue}", found, "")
    target.check("LOG", _refused(target, device, "LOG", event.fileno()), "")


@case("Eventfds stay bound when the descriptors that named them are closed.")
def held(target: Target) -> None:
    rig = Rig(target)
    kick, call = os.dup(rig.tx.kick.fileno()), os.dup(rig.tx.call.fileno())
    rig.device.set_vring_kick(TX, kick)
    rig.device.set_vring_call(TX, call)
    os.close(kick)
    os.close(call)
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])
    target.check("called", rig.tx.calls(), 1)


@case("SET_LOG_BASE takes any address while no ring runs.")
def log_base_stopped(target: Target) -> None:
    device = owned(target)
    for base in (0, 1, BAD, 2**64 - 1):
        target.check(f"{base:#x}", target.refused(partial(device.set_log_base, base)), "")


@case("SET_LOG_BASE takes any address while rings run without logging.")
def log_base_unused(target: Target) -> None:
    rig = running(target)
    target.check("2^60", target.refused(lambda: rig.device.set_log_base(BAD)), "")
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])


@case("SET_LOG_BASE while a logging ring runs is EFAULT if the log is no memory.")
def log_base_live(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    log = rig.memory.hva(rig.alloc(4096), 4096)
    rig.device.set_log_base(log)
    rig.device.set_features(rig.setup.features | 1 << vhost.VHOST_F_LOG_ALL)
    rig.start()
    target.check("2^60", target.refused(lambda: rig.device.set_log_base(BAD)), "EFAULT")
    target.check("as before", target.refused(lambda: rig.device.set_log_base(log)), "")


@case("A refused SET_LOG_BASE holds for the rings that were stopped.")
def log_base_partial(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rig.device.set_log_base(rig.memory.hva(rig.alloc(4096), 4096))
    rig.device.set_features(rig.setup.features | 1 << vhost.VHOST_F_LOG_ALL)
    rig.tx.start()
    target.check("2^60", target.refused(lambda: rig.device.set_log_base(BAD)), "EFAULT")
    target.check("start RX", target.refused(rig.rx.start), "EFAULT")
    target.check("TX again", target.refused(rig.tx.start), "")


@case("A ring that logs does not start without a log that covers memory: EFAULT.")
def log_start(target: Target) -> None:
    rig = Rig(target, Setup(start=False))
    rig.device.set_log_base(BAD)
    rig.device.set_features(rig.setup.features | 1 << vhost.VHOST_F_LOG_ALL)
    target.check("bad", target.refused(rig.tx.start), "EFAULT")
    rig.device.set_log_base(rig.memory.hva(rig.alloc(4096), 4096))
    target.check("good", target.refused(rig.tx.start), "")
