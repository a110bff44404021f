"""The kernel: how it was built, and what is known to be wrong with its version."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import suppress

from vhostctl.doctor import kernels, modules
from vhostctl.doctor.findings import Finding, error, note
from vhostctl.doctor.system import System

_REBUILD = "boot a kernel that has it"
VHOST_NET = error("VHOST-CONFIG-VHOST-NET", "The kernel was built without vhost-net.", _REBUILD)
TUN = error("VHOST-CONFIG-TUN", "The kernel was built without taps.", _REBUILD)
EVENTFD = error(
    "VHOST-CONFIG-EVENTFD", "The kernel was built without eventfds: no kick, no call.", _REBUILD
)
NET_NS = note(
    "VHOST-CONFIG-NET-NS",
    "The kernel was built without network namespaces: selftest, migrate, bench and conformance "
    "need one.",
    _REBUILD,
)
BPF_SYSCALL = note(
    "VHOST-CONFIG-BPF-SYSCALL",
    "The kernel was built without bpf(2): pairs are switched off without steering flows away.",
    _REBUILD,
)
MEMBARRIER = note(
    "VHOST-CONFIG-MEMBARRIER",
    "The kernel was built without membarrier(2): pairs are switched off without waiting for "
    "frames on their way.",
    _REBUILD,
)
_OPTIONS = {
    "CONFIG_VHOST_NET": VHOST_NET,
    "CONFIG_TUN": TUN,
    "CONFIG_EVENTFD": EVENTFD,
    "CONFIG_NET_NS": NET_NS,
    "CONFIG_BPF_SYSCALL": BPF_SYSCALL,
    "CONFIG_MEMBARRIER": MEMBARRIER,
}
# A driver that is there was built after all, outside of the tree perhaps.
_DRIVERS = {"CONFIG_VHOST_NET": "vhost_net", "CONFIG_TUN": "tun"}

FAULTS = (*_OPTIONS.values(), *(bad.fault for bad in kernels.KNOWN_BAD))


def check_configuration(system: System) -> Iterator[Finding]:
    """Look up what we need in the kernel's configuration, if it can be read."""
    file, text = _configuration(system)
    lines = set(text.splitlines())
    for option, fault in _OPTIONS.items():
        if not text or {f"{option}=y", f"{option}=m"} & lines:
            continue
        if option in _DRIVERS and modules.has_driver(system, _DRIVERS[option]):
            continue
        yield fault.found(f"{file}: {option} is not set", f"boot a kernel with {option}")


def check_version(system: System) -> Iterator[Finding]:
    """Compare the kernel's version with those that are known to be bad."""
    version = kernels.stable_version(system)
    if version is None or not system.in_tree:
        return
    for bad in kernels.KNOWN_BAD:
        if bad.zerocopy and system.text(kernels.ZEROCOPY) in ("", "0"):
            continue
        for span in bad.ranges:
            if span.holds(version):
                yield bad.fault.found(
                    f"Linux {'.'.join(map(str, version))}, {span}", bad.remedy or _upgrade(system)
                )


def _upgrade(system: System) -> str:
    if "debian" in system.distribution:
        return "apt install --only-upgrade 'linux-image-*' && reboot"
    if system.distribution & {"fedora", "rhel"}:
        return "dnf upgrade kernel && reboot"
    return ""


def _configuration(system: System) -> tuple[str, str]:
    """Return the file with the kernel's configuration and what it holds, or two empty strings."""
    packed = "/proc/config.gz"
    with suppress(OSError, EOFError, zlib.error):
        data = gzip.decompress(system.path(packed).read_bytes())
        return packed, data.decode(errors="replace")
    folder = system.modules
    for name in (f"/boot/config-{system.release}", f"{folder}/config", f"{folder}/build/.config"):
        if text := system.text(name):
            return name, text
    return "", ""
