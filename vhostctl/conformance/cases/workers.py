"""Which kind of task serves a device: the owner chooses (from Linux 6.17, and 6.12.48)."""

from __future__ import annotations

import ctypes
import os
import resource

from vhostctl.abi import vhost
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import BAD, ask, elsewhere, owned
from vhostctl.conformance.target import Target
from vhostctl.host.vhost import VhostNet
from vhostctl.host.worker import workers

NEEDS = ("fork_from_owner",)
GET, SET = vhost.VHOST_GET_FORK_FROM_OWNER, vhost.VHOST_SET_FORK_FROM_OWNER
_NOBODYS_UID = 54321  # root may exceed the limit, and nobody else has processes
KTHREAD, TASK = vhost.VHOST_FORK_OWNER_KTHREAD, vhost.VHOST_FORK_OWNER_TASK


def _set(target: Target, device: VhostNet, mode: int) -> str:
    return ask(target, device, SET, ctypes.c_uint8(mode))


def _get(device: VhostNet) -> int:
    mode = ctypes.c_uint8(0xAA)
    device.request(GET, mode)
    return mode.value


@case("The mode that is set before there is an owner is the one that is read.", needs=NEEDS)
def set_and_get(target: Target) -> None:
    device = target.open()
    for mode in (KTHREAD, TASK, KTHREAD):
        target.check(f"set {len(target.observed)}", _set(target, device, mode), "")
        target.check(f"get {len(target.observed)}", _get(device), mode)


@case("The mode survives SET_OWNER, and RESET_OWNER brings the first one back.", needs=NEEDS)
def reset(target: Target) -> None:
    device = target.open()
    first = _get(device)
    other = KTHREAD if first == TASK else TASK
    _set(target, device, other)
    device.set_owner()
    target.check("owned", _get(device) == other, True)
    device.reset_owner()
    target.check("reset", _get(device) == first, True)


@case("Any mode but 0 and 1 is EINVAL and changes nothing.", needs=NEEDS)
def wrong_mode(target: Target) -> None:
    device = target.open()
    first = _get(device)
    for mode in (2, 128, 255):
        target.check(f"mode {mode}", _set(target, device, mode), "EINVAL")
    target.check("unchanged", _get(device) == first, True)


@case("While there is an owner the mode cannot be set: EBUSY, before it is read.", needs=NEEDS)
def owned_busy(target: Target) -> None:
    device = owned(target)
    for name, argument in (("mode", ctypes.c_uint8(KTHREAD)), ("wrong", ctypes.c_uint8(2))):
        target.check(name, ask(target, device, SET, argument), "EBUSY")
    target.check("pointer", ask(target, device, SET, BAD), "EBUSY")
    target.check("other process", elsewhere(lambda: _set(target, device, KTHREAD)), "EBUSY")


@case("A bad pointer is EFAULT.", needs=NEEDS)
def pointer(target: Target) -> None:
    device = target.open()
    for request in (GET, SET):
        target.check(request.name, ask(target, device, request, BAD), "EFAULT")


@case("The mode is read by anybody, whether there is an owner or not.", needs=NEEDS)
def anybody(target: Target) -> None:
    device = target.open()
    first = _get(device)
    device.set_owner()
    target.check("owner", _get(device) == first, True)
    target.check("other process", elsewhere(lambda: _get(device)) == first, True)


@case("Without an owner another process may set the mode.", needs=(*NEEDS, "node"))
def set_elsewhere(target: Target) -> None:
    device = target.open()
    other = KTHREAD if _get(device) == TASK else TASK
    target.check("answer", elsewhere(lambda: _set(target, device, other)), "")
    target.check("mode", _get(device) == other, True)


@case("The mode decides whether the worker is a thread of the owner.", needs=(*NEEDS, "node"))
def kind(target: Target) -> None:
    device = target.open()
    for mode, want in ((KTHREAD, "kthread"), (TASK, "task")):
        _set(target, device, mode)
        before = workers()
        device.set_owner()
        target.check(want, [worker.kind for worker in workers() - before], [want])
        device.reset_owner()


@case("A worker that is a thread counts against RLIMIT_NPROC: ENOMEM; a kernel thread does not.",
      needs=(*NEEDS, "node"))  # fmt: skip
def process_limit(target: Target) -> None:
    device = target.open()

    def limited(mode: int) -> str:
        _set(target, device, mode)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        os.setuid(_NOBODYS_UID)
        answer = ask(target, device, vhost.VHOST_SET_OWNER)
        device.close()
        return answer

    target.check("thread", elsewhere(lambda: limited(TASK)), "ENOMEM")
    target.check("kernel thread", elsewhere(lambda: limited(KTHREAD)), "")
