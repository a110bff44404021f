"""What the drivers of two joined hosts may have negotiated, and datagrams between the hosts."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Sequence
from itertools import product

from tests.support.guest_device import VERSION_1
from tests.support.guest_offload import (
    CSUM,
    GUEST_CSUM,
    GUEST_ECN,
    GUEST_TSO4,
    GUEST_TSO6,
    GUEST_USO4,
    GUEST_USO6,
    HOST_ECN,
    HOST_TSO4,
    HOST_TSO6,
    HOST_USO,
)
from tests.support.netns_tcp import PATTERN, UDP_SEGMENT, Family, Host
from vhostctl.control.features import negotiate, tap_features

# What a driver may be handed, and what it may hand on; TUNSETOFFLOAD has USO as one.
INTO = (GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_USO4 | GUEST_USO6)
OUT_OF = (CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_USO)
ALL = sum(INTO) + sum(OUT_OF)
GSO = sum(INTO[1:])
SAMPLE = 19
"""As many show each pair of two bits' values, see tests/unit/test_gso_sample.py."""
_LETTERS = "ctseu"
_TAP = tap_features(0x7F)
_TRIED = 200

Sides = tuple[int, int]
"""The features of the first host's driver and of the second's."""


def name(sides: Sides) -> str:
    """Say which bits there are, checksum, TSO4, TSO6...: capitals are those out of the guest."""
    bits = dict(zip(_LETTERS + _LETTERS.upper(), INTO + OUT_OF, strict=True))
    names = ("".join(letter for letter, kind in bits.items() if side & kind) for side in sides)
    return "-".join(one or "none" for one in names)


def outcomes(kinds: Sequence[int]) -> list[int]:
    """Return all that negotiation makes of the subsets of `kinds`."""
    found = set()
    for chosen in product((0, ~0), repeat=len(kinds)):
        driver = sum(kind & on for kind, on in zip(kinds, chosen, strict=True))
        result = negotiate(driver=driver | VERSION_1, device=VERSION_1, tap=_TAP)
        found.add(result.features & ~VERSION_1)
    return sorted(found)


def _lanes() -> list[tuple[int, int]]:
    """Return what one side may be handed, with what the other must be able to hand on then."""
    return [
        (into, out_of)
        for into in outcomes(INTO)
        for out_of in outcomes(OUT_OF)
        if all(out_of & to for of, to in zip(INTO[1:], OUT_OF[1:], strict=True) if into & of)
    ]


class Pairs:
    """Pairs of two bits' values, whichever side has the bits."""

    def __init__(self) -> None:
        # For each value of a bit, those of all bits that it can be seen with.
        self.values = [0] * (4 * len(INTO + OUT_OF))

    def add(self, sides: Sides) -> None:
        """Have what there is in `sides`."""
        chosen, mask = _values(sides)
        for value in chosen:
            self.values[value] |= mask

    def remove(self, sides: Sides) -> None:
        """Have it no more."""
        chosen, mask = _values(sides)
        for value in chosen:
            self.values[value] &= ~mask

    def common(self, sides: Sides) -> int:
        """Return how many there are in `sides`."""
        chosen, mask = _values(sides)
        return sum((self.values[value] & mask).bit_count() for value in chosen)


def _values(sides: Sides) -> tuple[list[int], int]:
    bits = [bool(side & kind) for side in sides for kind in INTO + OUT_OF]
    chosen = [2 * at + bit for at, bit in enumerate(bits)]
    return chosen, sum(1 << value for value in chosen)


def everything() -> list[Sides]:
    """Return all that two hosts may have negotiated whose drivers can be joined."""
    lanes = _lanes()
    return [
        (into | back_out, back_into | out_of)
        for (into, out_of), (back_into, back_out) in product(lanes, lanes)
    ]


def sample(count: int = SAMPLE, seed: int = 1) -> list[Sides]:
    """Return `count` of them that show each pair of two bits' values early, if it can be."""
    rng = random.Random(seed)  # noqa: S311 -- chance that can be repeated
    candidates = everything()
    chosen, left = [(0, 0)], Pairs()
    while len(chosen) < count:
        if not any(left.values):  # all were seen: once more
            for sides in candidates:
                left.add(sides)
        best = max(rng.sample(candidates, _TRIED), key=left.common)
        left.remove(best)
        chosen.append(best)
    return chosen


def each_side(seed: int = 1) -> list[Sides]:
    """Return some in which a side has each of its outcomes, and each way has all that it can."""
    rng = random.Random(seed)  # noqa: S311 -- chance that can be repeated
    partners: dict[int, list[int]] = {}
    for first, second in everything():
        partners.setdefault(first, []).append(second)
    used: Counter[object] = Counter()
    chosen = []
    # First those that have the least to choose from.
    for first, seconds in sorted(partners.items(), key=lambda entry: len(entry[1])):
        rng.shuffle(seconds)
        second = min(seconds, key=lambda second: sum(used[lane] for lane in lanes(first, second)))
        used.update(lanes(first, second))
        chosen.append((first, second))
    return chosen


def lanes(first: int, second: int) -> tuple[tuple[str, int, int], tuple[str, int, int]]:
    """Return which way, what is handed over, and what can be handed on there."""
    into, out_of = sum(INTO), sum(OUT_OF)
    return ("forth", first & into, second & out_of), ("back", second & into, first & out_of)


def tried(count: int) -> list[Sides]:
    """Return `count` of the sample and, if those are more, of `each_side()`."""
    return [*sample(), *(each_side() if count > SAMPLE else ())][:count]


def datagrams(source: Host, target: Host, family: Family, *, segments: bool) -> None:
    """Send datagrams one way; `segments`: many with one call, for the device to cut."""
    with (
        source.socket(family, socket.SOCK_DGRAM) as out,
        target.socket(family, socket.SOCK_DGRAM) as into,
    ):
        out.connect(into.getsockname())
        if segments:
            out.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
            parts = [PATTERN[at : at + 1000] for at in range(40)]
            out.send(b"".join(parts))
        else:
            parts = [PATTERN[size : 2 * size] for size in range(1, source.mtu - 48, 37)]
            for part in parts:
                out.send(part)
        assert [into.recv(65536) for _ in parts] == parts
