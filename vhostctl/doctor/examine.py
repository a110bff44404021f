"""All checks in order, what can be done all the same, and the repairs that are safe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from vhostctl.doctor import (
    checks_kernel,
    checks_limits,
    checks_module,
    checks_node,
    checks_privilege,
)
from vhostctl.doctor.findings import Fault, Finding, Severity
from vhostctl.doctor.system import CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_MODULE, System
from vhostctl.errors import InvalidArgument, VhostctlError
from vhostctl.host.tap import TUN_PATH
from vhostctl.host.vhost import DEFAULT_PATH

Check = Callable[[System], Iterator[Finding]]

# The nodes first: opening one loads its module, if nothing forbids that.
CHECKS: tuple[Check, ...] = (
    checks_node.check_vhost,
    checks_module.check_module,
    checks_module.check_signatures,
    checks_module.check_mirror,
    checks_kernel.check_configuration,
    checks_kernel.check_version,
    checks_node.check_tun,
    checks_privilege.check_capabilities,
    checks_limits.check_limits,
    checks_limits.check_memory,
    checks_node.check_kvm,
    checks_privilege.check_steering,
    checks_privilege.check_engine,
)

FAULTS: dict[str, Fault] = {
    fault.code: fault
    for subject in (checks_node, checks_module, checks_kernel, checks_limits, checks_privilege)
    for fault in subject.FAULTS
}
"""Every fault by its code."""


@dataclass(frozen=True, slots=True)
class Means:
    """Something that vhostctl can do, whether it works here, and the command that shows it."""

    name: str
    works: bool
    command: str


@dataclass(frozen=True, slots=True)
class Report:
    """What `examine` found; `means` is what can and cannot be done now."""

    device: str
    kernel: str
    findings: tuple[Finding, ...]
    means: tuple[Means, ...]

    @property
    def errors(self) -> list[Finding]:
        """The findings with which vhost-net cannot be used."""
        return [one for one in self.findings if one.fault.severity is Severity.ERROR]


@dataclass(frozen=True, slots=True)
class Repair:
    """A command that was run, and why it failed, or an empty string."""

    command: str
    failure: str


def examine(system: System, codes: Collection[str] = ()) -> Report:
    """Run every check; with `codes` only their findings are kept.

    Errors come first, then warnings, then notes. Raises InvalidArgument for an unknown code.
    """
    if unknown := sorted(set(codes) - set(FAULTS)):
        raise InvalidArgument(f"no finding {', '.join(unknown)}", hint="docs/doctor.md has them")
    found = [
        one for check in CHECKS for one in check(system) if not codes or one.fault.code in codes
    ]
    found.sort(key=lambda one: list(Severity).index(one.fault.severity))
    return Report(system.device, system.release, tuple(found), tuple(_means(system)))


def _means(system: System) -> Iterator[Means]:
    tun = not system.open_error(TUN_PATH)
    taps = tun and system.has(CAP_NET_ADMIN)
    namespaces = taps and system.has(CAP_SYS_ADMIN)
    node = system.owning is None
    device = f" --device {system.device}" if system.device != DEFAULT_PATH else ""
    yield Means("own the device", node, f"vhostctl probe{device}")
    yield Means("wire a tap to it", node and taps, f"vhostctl up x{device} --tap tap0")
    yield Means("prove it with traffic", node and namespaces, f"vhostctl selftest{device}")
    engine = system.engine is None
    yield Means(
        "the engine, with traffic", engine and namespaces, "vhostctl selftest --device engine"
    )
    yield Means("the engine", engine, "vhostctl probe --device engine")
    qemu = system.program("qemu-system-x86_64")
    yield Means("a real kernel in a VM", qemu, "vhostctl lab run -k 6.1 -- vhostctl selftest")


def repair(
    report: Report, system: System, run: Callable[[Sequence[str]], object]
) -> tuple[Repair, ...]:
    """Run what is safe: loading modules that nobody forbade. `run` raises VhostctlError.

    Without CAP_SYS_MODULE nothing is run, and that is the failure of each.
    """
    done = []
    for command in dict.fromkeys(one.fix for one in report.findings if one.fix):
        failure = ""
        if not system.has(CAP_SYS_MODULE):
            failure = "it needs CAP_SYS_MODULE: run as root"
        else:
            try:
                run(command)
            except VhostctlError as refused:
                failure = str(refused)
        done.append(Repair(" ".join(command), failure))
    return tuple(done)
