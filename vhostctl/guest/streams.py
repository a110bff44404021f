"""The rule by which both ends of a checked stream know each datagram.

The rule is stated, and worked for the driver's end, in ``guest/src/stream.h``; this is the
same rule for the other end.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Self

from vhostctl.errors import InvalidArgument
from vhostctl.guest.driver import native

STEP = native.lib.STREAM_STEP
STARTS = native.lib.STREAM_STARTS

_PATTERN_SIZE = 1 << 17
_OVERHEAD4 = 20 + 8  # IPv4 and UDP headers
_OVERHEAD6 = 40 + 8


@functools.cache
def default_pattern() -> bytes:
    """Return 128 KiB without a period, the same in every process."""
    return hashlib.shake_256(b"vhostctl checked stream").digest(_PATTERN_SIZE)


@dataclass(frozen=True, slots=True)
class Stream:
    """What every datagram of a stream looks like.

    Datagram k, with r = k mod (max4 + max6), is an IPv4 one of r + 1 bytes if r < max4, else
    an IPv6 one of r - max4 + 1 bytes: laps of all sizes of either family take turns. Its
    payload is the slice of `pattern` that starts at (k * 7919 + number) mod 65521.

    `max4` and `max6` are the greatest payloads in bytes, 0 for a family that is left out.
    `pattern` has at least 65520 bytes more than the greater one.
    """

    max4: int
    max6: int
    number: int = 0
    pattern: bytes = b""

    def __post_init__(self) -> None:
        if not self.pattern:
            object.__setattr__(self, "pattern", default_pattern())
        greatest = max(self.max4, self.max6)
        if min(self.max4, self.max6) < 0 or not 0 < greatest <= 0xFFFF - _OVERHEAD4:
            raise InvalidArgument(
                f"stream payloads up to {self.max4} (IPv4) and {self.max6} (IPv6) bytes",
                hint="use 0..65507, at least one of them above 0",
            )
        if not 0 <= self.number < 1 << 32:
            raise InvalidArgument(f"stream number {self.number}", hint="use 0..2^32-1")
        if len(self.pattern) < STARTS - 1 + greatest:
            raise InvalidArgument(
                f"a pattern of {len(self.pattern)} bytes", hint=f"use {STARTS - 1 + greatest}"
            )

    @classmethod
    def for_mtu(cls, mtu: int, *, ipv4: bool = True, ipv6: bool = True, number: int = 0) -> Self:
        """Return the stream whose largest datagrams fill packets of `mtu` bytes."""
        return cls(
            max4=mtu - _OVERHEAD4 if ipv4 else 0,
            max6=mtu - _OVERHEAD6 if ipv6 else 0,
            number=number,
        )

    def version(self, k: int) -> int:
        """Return 4 or 6: the IP version of datagram `k`."""
        return 4 if k % (self.max4 + self.max6) < self.max4 else 6

    def size(self, k: int) -> int:
        """Return the payload of datagram `k` in bytes."""
        r = k % (self.max4 + self.max6)
        return (r if r < self.max4 else r - self.max4) + 1

    def payload(self, k: int) -> bytes:
        """Return the payload of datagram `k`."""
        start = (k * STEP + self.number) % STARTS
        return self.pattern[start : start + self.size(k)]
