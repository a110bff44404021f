"""The array form of the feature requests: any number of 64-bit words (from Linux 6.17)."""

from __future__ import annotations

import ctypes
import struct

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.features import in_iotlb_mode
from vhostctl.conformance.cases.support import BAD, Edge, ask, elsewhere, owned
from vhostctl.conformance.target import Target
from vhostctl.host.vhost import VhostNet

NEEDS = ("features_array",)
GET, SET = vhost.VHOST_GET_FEATURES_ARRAY, vhost.VHOST_SET_FEATURES_ARRAY
PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM
TUNNELS = (
    1 << virtio.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO | 1 << virtio.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO
) >> 64
UNTOUCHED = 2**64 - 1


def _get(target: Target, device: VhostNet, count: int, room: int = 6) -> list[object]:
    """Ask for `count` words; return the refusal, and the words of an array that was all ones."""
    words = (ctypes.c_uint64 * (1 + room))(count, *[UNTOUCHED] * room)
    return [ask(target, device, GET, words), *words[1:]]


def _table(*words: int) -> bytes:
    return struct.pack(f"={len(words)}Q", *words)


def _set(target: Target, device: VhostNet, *words: int) -> str:
    return ask(target, device, SET, (ctypes.c_uint64 * (1 + len(words)))(len(words), *words))


@case("The first word is what GET_FEATURES says; the second has tunnel offloads at most.",
      needs=NEEDS)  # fmt: skip
def words(target: Target) -> None:
    device = target.open()
    answer, first, second, *_ = _get(target, device, 2)
    target.check("answer", answer, "")
    target.check("first", first == device.get_features(), True)
    target.check("second", isinstance(second, int) and second & ~TUNNELS, 0)


@case("GET fills as many words as were asked for, those it does not know with zeroes.",
      needs=NEEDS)  # fmt: skip
def get_counts(target: Target) -> None:
    device = target.open()
    _, first, second, *_ = _get(target, device, 2)
    known = [first, second, 0, 0, 0]
    for count in (0, 1, 2, 3, 5):
        found = _get(target, device, count)
        want = ["", *known[:count], *[UNTOUCHED] * (6 - count)]
        target.check(f"{count} words", found == want, True)


@case("GET leaves the count as it was.", needs=NEEDS)
def get_count_stays(target: Target) -> None:
    device = target.open()
    table = (ctypes.c_uint64 * 8)(5)
    device.request(GET, table)
    target.check("count", table[0], 5)


@case("GET of an absurd count fills the words it knows and is EFAULT.", needs=NEEDS)
def get_absurd(target: Target) -> None:
    device, edge = target.open(), target.keep(Edge())
    address = edge.before(_table(1 << 40, UNTOUCHED, UNTOUCHED))
    target.check("answer", ask(target, device, GET, address), "EFAULT")
    _, first, second, *_ = _get(target, device, 2)
    found = ctypes.string_at(address + 8, 16)
    target.check("words", found == struct.pack("=2Q", first, second), True)


@case("A count that cannot be read is EFAULT.", needs=NEEDS)
def bad_count(target: Target) -> None:
    device = target.open()
    for request in (GET, SET):
        target.check(request.name, ask(target, device, request, BAD), "EFAULT")


@case("Words that cannot be reached are EFAULT.", needs=NEEDS)
def bad_words(target: Target) -> None:
    device, edge = target.open(), target.keep(Edge())
    for request in (GET, SET):
        for count, present in ((1, 0), (2, 1), (3, 2)):
            address = edge.before(_table(count, *[0] * present))
            found = ask(target, device, request, address)
            target.check(f"{request.name} {present} of {count}", found, "EFAULT")


@case("SET with no words at all clears every feature.", needs=NEEDS)
def set_nothing(target: Target) -> None:
    device, edge = owned(target), target.keep(Edge())
    device.set_features(PLATFORM)
    target.check("answer", ask(target, device, SET, edge.before(bytes(8))), "")
    target.check("IOTLB mode", in_iotlb_mode(target, device), False)


@case("SET takes the bits that GET offers, as SET_FEATURES does.", needs=NEEDS)
def set_offered(target: Target) -> None:
    device = owned(target)
    target.check("platform", _set(target, device, PLATFORM), "")
    target.check("IOTLB mode", in_iotlb_mode(target, device), True)
    _, first, second, *_ = _get(target, device, 2)
    target.check("all", _set(target, device, *(int(str(w)) for w in (first, second))), "")
    target.check("none", _set(target, device, 0, 0, 0, 0), "")
    target.check("IOTLB mode after none", in_iotlb_mode(target, device), False)


@case("SET with a bit that is not offered is EOPNOTSUPP and changes nothing.", needs=NEEDS)
def set_unknown(target: Target) -> None:
    device = owned(target)
    target.check("word 0", _set(target, device, PLATFORM | 1), "EOPNOTSUPP")
    target.check("word 1", _set(target, device, PLATFORM, 1), "EOPNOTSUPP")
    target.check("word 2", _set(target, device, PLATFORM, 0, 1), "EOPNOTSUPP")
    target.check("word 5", _set(target, device, PLATFORM, 0, 0, 0, 0, 1 << 63), "EOPNOTSUPP")
    target.check("IOTLB mode", in_iotlb_mode(target, device), False)


@case("SET reads the words beyond the known ones before it judges the known ones.", needs=NEEDS)
def set_order(target: Target) -> None:
    device, edge = target.open(), target.keep(Edge())
    address = edge.before(_table(3, 1, 1))
    target.check("bad bits, no third word", ask(target, device, SET, address), "EFAULT")


@case("SET stops at the first word that is not zero beyond the known ones.", needs=NEEDS)
def set_scan(target: Target) -> None:
    device, edge = target.open(), target.keep(Edge())
    address = edge.before(_table(4, 0, 0, 1))
    target.check("third set, no fourth", ask(target, device, SET, address), "EOPNOTSUPP")


@case("Both need no owner, and work for another process than the owner.", needs=NEEDS)
def anybody(target: Target) -> None:
    device = target.open()
    target.check("no owner", [_get(target, device, 1)[0], _set(target, device, 0)], ["", ""])
    device.set_owner()
    found = elsewhere(lambda: [_get(target, device, 1)[0], _set(target, device, 0)])
    target.check("other process", found, ["", ""])
