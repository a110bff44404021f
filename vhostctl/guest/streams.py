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
STRIDE = native.lib.STREAM_STRIDE
OTHER_STRIDE = native.lib.STREAM_OTHER_STRIDE

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

    With both families, datagram k is an IPv4 one where k is even and an IPv6 one where it is
    odd, and n = k // 2; with one family only, n = k. With max being the greatest payload of
    its family, it carries 1 + (n * stride + number) mod max bytes: the slice of `pattern` that
    starts at (k * 7919 + number) mod 65521. The stride is 787, or 797 where max is a multiple
    of 787, so that `max` datagrams of a family in a row have every size once.

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
        if self.max4 and self.max6:
            return 6 if k % 2 else 4
        return 4 if self.max4 else 6

    def size(self, k: int) -> int:
        """Return the payload of datagram `k` in bytes."""
        greatest = self.max4 if self.version(k) == 4 else self.max6
        stride = STRIDE if greatest % STRIDE else OTHER_STRIDE
        n = k // 2 if self.max4 and self.max6 else k
        return 1 + (n * stride + self.number) % greatest

    def payload(self, k: int) -> bytes:
        """Return the payload of datagram `k`."""
        start = (k * STEP + self.number) % STARTS
        return self.pattern[start : start + self.size(k)]
