"""What we may do: make taps, load steering programs; and whether the engine is whole."""

from __future__ import annotations

from collections.abc import Iterator

from vhostctl.doctor.findings import Finding, note, warning
from vhostctl.doctor.system import CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN, System

_UNPRIVILEGED = "/proc/sys/kernel/unprivileged_bpf_disabled"
_NOHZ = "/sys/devices/system/cpu/nohz_full"

NET_ADMIN = warning(
    "VHOST-TUN-CAPABILITY",
    "No CAP_NET_ADMIN: no tap can be made, only one attached to that this user owns.",
    "run as root, or have root make the tap: ip tuntap add dev tap0 mode tap user NAME vnet_hdr",
)
USER_NAMESPACE = note(
    "VHOST-TUN-USERNS",
    "This is a user namespace: capabilities count for network namespaces made in it only, and "
    "sysctls, modules and nodes are out of reach.",
    "make a network namespace too (unshare -Urn), or run outside",
)
BPF = note(
    "VHOST-BPF-DENIED",
    "No steering programs: pairs are switched off without sending their flows elsewhere first.",
    "run with CAP_BPF, or sysctl -w kernel.unprivileged_bpf_disabled=0",
)
NOHZ = note(
    "VHOST-BPF-NOHZ",
    "There are nohz_full CPUs, where membarrier(2) cannot wait for frames on their way: pairs "
    "are switched off without.",
    "boot without nohz_full",
)
ENGINE = warning(
    "VHOST-ENGINE-BROKEN",
    "The vhost-net of this process does not work.",
    "install vhostctl anew, with a C compiler",
)
FAULTS = (NET_ADMIN, USER_NAMESPACE, BPF, NOHZ, ENGINE)


def check_capabilities(system: System) -> Iterator[Finding]:
    """Look at the effective capabilities, and where they count."""
    held = f"/proc/self/status: CapEff {system.status['CapEff'][0]}"
    if not system.has(CAP_NET_ADMIN):
        user = system.name_of("/etc/passwd", system.uid)
        remedy = f"sudo ip tuntap add dev tap0 mode tap user {user} vnet_hdr"
        yield NET_ADMIN.found(held, remedy if system.uid else "")
    if system.in_user_namespace:
        said = " ".join(system.text("/proc/self/uid_map").split())
        yield USER_NAMESPACE.found(f"/proc/self/uid_map: {said}")


def check_steering(system: System) -> Iterator[Finding]:
    """Look at what switching pairs off without a loss needs."""
    mode = system.number(_UNPRIVILEGED)
    if mode and not (system.has(CAP_BPF) or system.has(CAP_SYS_ADMIN)):
        remedy = "" if mode == 2 else "run with CAP_BPF; the sysctl is locked at 1 until a reboot"
        yield BPF.found(f"{_UNPRIVILEGED}: {mode}, no CAP_BPF", remedy)
    cpus = system.text(_NOHZ).strip()
    if cpus[:1].isdigit():  # it is empty, or "(null)", without
        yield NOHZ.found(f"{_NOHZ}: {cpus}")


def check_engine(system: System) -> Iterator[Finding]:
    """Open the engine."""
    if system.engine is not None:
        yield ENGINE.found(str(system.engine))
