"""Which check comes first: the number, the caller, the pointer, the ring."""

from __future__ import annotations

import ctypes

from vhostctl.abi import vhost
from vhostctl.abi.ioctl import Request
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import (
    BAD,
    MISSING_RING,
    OF_OWNER,
    OF_RINGS,
    OF_WORKERS,
    Edge,
    ask,
    elsewhere,
    owned,
    unknown,
)
from vhostctl.conformance.target import Target

# Nobody's number, a terminal's, requests of vhost-vdpa, and known numbers encoded otherwise.
STRANGE = (0xAF77, 0x5401, 0x8004AF70, 0x4010AF75, 0x8008AF81, 0xAF00, 0x4008AF01, 0)


def _words(first: int) -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 16)(first)


@case("An unknown request without an owner is EPERM, with any pointer.")
def unknown_unowned(target: Target) -> None:
    device = target.open()
    for number in STRANGE:
        target.check(f"{number:#x}", ask(target, device, unknown(number), _words(0)), "EPERM")
    target.check("bad pointer", ask(target, device, unknown(0xAF77), BAD), "EPERM")


@case("An unknown request of another process than the owner is EPERM.")
def unknown_elsewhere(target: Target) -> None:
    device = owned(target)
    found = elsewhere(lambda: ask(target, device, unknown(0xAF77), _words(0)))
    target.check("0xaf77", found, "EPERM")


@case("An unknown request with a bad pointer is EFAULT.")
def unknown_pointer(target: Target) -> None:
    device = owned(target)
    for number in STRANGE:
        target.check(f"{number:#x}", ask(target, device, unknown(number), BAD), "EFAULT")
    target.check("null", ask(target, device, unknown(0xAF77), 0), "EFAULT")


@case("An unknown request whose argument begins with no ring's index is ENOBUFS.")
def unknown_ring(target: Target) -> None:
    device = owned(target)
    for number in STRANGE:
        found = ask(target, device, unknown(number), _words(MISSING_RING))
        target.check(f"{number:#x}", found, "ENOBUFS")
    target.check("2^32-1", ask(target, device, unknown(0xAF77), _words(2**32 - 1)), "ENOBUFS")


@case("An unknown request whose argument begins with a ring's index is ENOTTY.")
def unknown_number(target: Target) -> None:
    device = owned(target)
    for number in STRANGE:
        for ring in (0, 1):
            found = ask(target, device, unknown(number), _words(ring))
            target.check(f"{number:#x} {ring}", found, "ENOTTY")


@case("Of the argument of an unknown request only the first four bytes are read.")
def unknown_reads_index(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    target.check("ring 1", ask(target, device, unknown(0x4028AF77), edge.words(1)), "ENOTTY")
    target.check("ring 2", ask(target, device, unknown(0x4028AF77), edge.words(2)), "ENOBUFS")


@case("The requests about workers are unknown to this device.")
def worker_requests(target: Target) -> None:
    unowned, device = target.open(), owned(target)
    for request in OF_WORKERS:
        name = request.name
        target.check(f"{name}, no owner", ask(target, unowned, request, _words(0)), "EPERM")
        target.check(f"{name}, bad pointer", ask(target, device, request, BAD), "EFAULT")
        for ring, want in ((0, "ENOTTY"), (1, "ENOTTY"), (2, "ENOBUFS")):
            target.check(f"{name}, {ring}", ask(target, device, request, _words(ring)), want)


@case("The newer requests are answered, or unknown like any other.")
def newer_requests(target: Target) -> None:
    flags = target.flags
    for request, answered in (
        (vhost.VHOST_GET_FEATURES_ARRAY, flags.features_array),
        (vhost.VHOST_SET_FEATURES_ARRAY, flags.features_array),
        (vhost.VHOST_GET_FORK_FROM_OWNER, flags.fork_from_owner),
        (vhost.VHOST_SET_FORK_FROM_OWNER, flags.fork_from_owner),
    ):
        device = target.open()
        found = ask(target, device, request, _words(0))
        target.check(request.name, found, "" if answered else "EPERM")


@case("A request's number counts with its size and direction.")
def whole_number(target: Target) -> None:
    device = owned(target)
    for request in (vhost.VHOST_SET_VRING_NUM, vhost.VHOST_GET_FEATURES, vhost.VHOST_SET_OWNER):
        other = unknown(request.number ^ 1 << 16)
        target.check(request.name, ask(target, device, other, _words(0)), "ENOTTY")


def _without_owner(request: Request) -> None:
    @case(f"{request.name} without an owner is EPERM before its argument is read.")
    def rule(target: Target) -> None:
        target.check("bad pointer", ask(target, target.open(), request, BAD), "EPERM")


def _other_process(request: Request) -> None:
    @case(f"{request.name} of another process than the owner is EPERM before its argument is read.")
    def rule(target: Target) -> None:
        device = owned(target)
        found = elsewhere(lambda: ask(target, device, request, BAD))
        target.check("bad pointer", found, "EPERM")


def _bad_pointer(request: Request) -> None:
    @case(f"{request.name} with a bad pointer is EFAULT.")
    def rule(target: Target) -> None:
        device = owned(target)
        target.check("2^60", ask(target, device, request, BAD), "EFAULT")
        target.check("null", ask(target, device, request, 0), "EFAULT")


def _missing_ring(request: Request) -> None:
    @case(f"{request.name} of a ring that is not there is ENOBUFS before the rest is read.")
    def rule(target: Target) -> None:
        device, edge = owned(target), target.keep(Edge())
        for index in (2, 3, 2**31, 2**32 - 1):
            target.check(
                f"ring {index}", ask(target, device, request, edge.words(index)), "ENOBUFS"
            )


for _request in OF_OWNER:
    _without_owner(_request)
    _other_process(_request)
    _bad_pointer(_request)
for _request in OF_RINGS:
    _missing_ring(_request)
