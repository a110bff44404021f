"""Kernel versions that are known to be bad, as data with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vhostctl.doctor.findings import Fault, note, warning
from vhostctl.doctor.system import System

Version = tuple[int, int, int]
ZEROCOPY = "/sys/module/vhost_net/parameters/experimental_zcopytx"


def _version(text: str) -> Version:
    major, minor, *patch = (int(word) for word in text.split("."))
    return major, minor, patch[0] if patch else 0


@dataclass(frozen=True, slots=True)
class Range:
    """Versions of one stable series: from `first` up to, but without, `fixed`.

    Without `fixed` it is up to and with `last`, the newest that was looked at.
    """

    first: str
    fixed: str = ""
    last: str = ""

    def holds(self, version: Version) -> bool:
        """Return whether `version` is one of them."""
        if version < _version(self.first):
            return False
        return version < _version(self.fixed) if self.fixed else version <= _version(self.last)

    def __str__(self) -> str:
        return f"fixed in {self.fixed}" if self.fixed else f"not fixed up to {self.last}"


@dataclass(frozen=True, slots=True)
class Bad:
    """A fault of some versions; `zerocopy` if only experimental_zcopytx brings it about."""

    fault: Fault
    ranges: tuple[Range, ...]
    zerocopy: bool = False
    remedy: str = ""


_UPGRADE = "upgrade the kernel"

KNOWN_BAD = (
    Bad(
        warning(
            "VHOST-KERNEL-CVE-2026-74356",
            "A bad avail index, or too few mergeable buffers for a frame, can make the worker "
            "spin at 100 % CPU (seen on 6.12.95).",
            _UPGRADE,
        ),
        (Range("6.1", fixed="6.1.192"), Range("6.12", fixed="6.12.100")),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-PAGE-LEAK",
            "tun leaks the page of each bad frame in a batch, which a guest can send at will "
            "(CVE-2026-46320, 46321, 46322).",
            _UPGRADE,
        ),
        (Range("6.12", fixed="6.12.94"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-BUSYLOOP-SLEEP",
            "Busy polling may sleep where it must not: leave the busy-loop timeout at 0.",
            _UPGRADE,
        ),
        (Range("6.1", fixed="6.1.176"), Range("6.12", fixed="6.12.94")),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-TASK-REFCOUNT",
            "The worker's task may be freed while the device still wakes it.",
            _UPGRADE,
        ),
        (Range("6.12", fixed="6.12.57"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-WORKER-KILLED",
            "Killing the owner while the device is flushed can hang it for ever.",
            _UPGRADE,
        ),
        (Range("6.9", fixed="6.9.9"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-FORK-NUMBER",
            "VHOST_SET_FORK_FROM_OWNER has the number 0x83, which later kernels gave to another "
            "request: the worker's kind cannot be chosen.",
            _UPGRADE,
        ),
        (Range("6.12.43", fixed="6.12.48"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-STALE-METADATA",
            "With an IOTLB, rings keep their old addresses after SET_VRING_NUM or SET_VRING_ADDR.",
            _UPGRADE,
        ),
        (Range("6.1", fixed="6.1.187"), Range("6.12", fixed="6.12.105")),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-TRANSLATE-RANGE",
            "A buffer that spans two regions may be translated past the end of the second.",
            _UPGRADE,
        ),
        (Range("6.1", fixed="6.1.7"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-PENDING-MISSES",
            "IOTLB misses stay pending after the rings stopped.",
            _UPGRADE,
        ),
        (Range("6.1", fixed="6.1.11"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-HUGE-ENTRY",
            "A memory region or IOTLB entry that covers everything hangs the kernel.",
            _UPGRADE,
        ),
        (Range("5.16", fixed="5.16.18"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-BATCH-OVERFLOW",
            "A failed batch of frames leaves a counter behind, and the next one overflows.",
            _UPGRADE,
        ),
        (Range("5.14", fixed="5.14.9"),),
    ),
    Bad(
        warning(
            "VHOST-KERNEL-ZEROCOPY",
            "Zero copy is on, and its bookkeeping has known faults.",
            "options vhost_net experimental_zcopytx=0",
        ),
        (Range("6.1", fixed="6.1.180"), Range("6.12", fixed="6.12.100")),
        zerocopy=True,
        remedy="modprobe -r vhost_net && modprobe vhost_net experimental_zcopytx=0",
    ),
    Bad(
        note(
            "VHOST-KERNEL-CVE-2026-97988",
            "A device whose owner turns ACCESS_PLATFORM on and off while rings run uses their "
            "old addresses: hand devices only to whom you trust.",
            _UPGRADE,
        ),
        (Range("6.1", last="6.1.192"), Range("6.12", last="6.12.107")),
    ),
    Bad(
        note(
            "VHOST-KERNEL-CVE-2026-99281",
            "Any user may attach to a persistent tap that has neither owner nor group.",
            "give each tap an owner: ip tuntap add dev NAME mode tap user USER vnet_hdr",
        ),
        (
            Range("6.1", last="6.1.192"),
            Range("6.12", last="6.12.107"),
            Range("7.2", last="7.2.13"),
        ),
        remedy="ip tuntap add dev NAME mode tap user USER vnet_hdr  # an owner for each tap",
    ),
)
"""From the stable releases' change logs, and from what 6.1.192, 6.12.95, 6.12.107, 6.12.117 and
7.2.13 were seen to do. A series that no range names was not looked at."""


def stable_version(system: System) -> Version | None:
    """Return the stable version of the running kernel, None if its name does not tell.

    Debian's release is not the version (6.1.0-56-amd64 is 6.1.192), which stands in
    /proc/version; Ubuntu's is in /proc/version_signature. Kernels of the Red Hat family and
    others that stay at x.y.0 carry fixes that no number shows.
    """
    signature = system.text("/proc/version_signature").split()
    marks = (
        re.search(r"\bDebian (\d+\.\d+\.\d+)", system.text("/proc/version")),
        re.match(r"(\d+\.\d+\.\d+)$", signature[-1]) if signature else None,
        re.match(r"(\d+\.\d+\.[1-9]\d*)(?!.*\.el\d)", system.release),
        re.match(r"(\d+\.\d+(?:\.0)?)$", system.release),
    )
    found = next((mark for mark in marks if mark), None)
    return _version(found[1]) if found else None
