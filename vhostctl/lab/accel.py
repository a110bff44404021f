"""Whether a VM runs on KVM or on QEMU's emulator.

A /dev/kvm that opens is no proof: on some nested hosts a stock kernel spins for ever under it. So
the first boot on a host is tried on it within a bound, and the verdict is remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
from enum import Enum
from pathlib import Path

from vhostctl.errors import EnvironmentMissing, InvalidArgument
from vhostctl.lab import cache

TRIAL_SECONDS = 15.0
"""A guest under KVM says that it is up within 2 s; one that takes this long never will."""

_DEVICE = Path("/dev/kvm")


class Accel(Enum):
    """What executes the guest's instructions; TRIAL is KVM until the guest fails to come up."""

    KVM = "kvm"
    TCG = "tcg"
    TRIAL = "trial"


def choose(requested: str | None, *, icount: bool) -> Accel:
    """Return what to boot on for ``auto``, ``kvm`` or ``tcg``; None asks $VHOSTCTL_ACCEL.

    Counting instructions is the emulator's. Raises InvalidArgument for another name, and for kvm
    with `icount`; EnvironmentMissing for kvm where it cannot be opened.
    """
    name = requested or os.environ.get("VHOSTCTL_ACCEL") or "auto"
    if name not in ("auto", "kvm", "tcg"):
        raise InvalidArgument(f"no accelerator {name!r}", hint="auto, kvm or tcg")
    if icount and name == "kvm":
        raise InvalidArgument("KVM cannot count instructions", hint="drop icount, or ask for tcg")
    if icount or name == "tcg":
        return Accel.TCG
    refusal = _refusal()
    if name == "kvm":
        if refusal:
            raise EnvironmentMissing(f"{_DEVICE}: {refusal}", hint="--accel tcg works anywhere")
        return Accel.KVM
    if refusal:
        return Accel.TCG
    return {True: Accel.KVM, False: Accel.TCG, None: Accel.TRIAL}[_verdicts().get(host())]


def remember(works: bool) -> None:
    """Keep the verdict on this host's KVM for the next boots."""
    text = json.dumps(_verdicts() | {host(): works}, indent=2)
    with cache.scratch() as directory:
        (directory / "kvm.json").write_text(text, encoding="utf-8")
        (directory / "kvm.json").replace(_memory())


def host() -> str:
    """Return what a verdict holds for: this host's kernel and processor model."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.uname().release} on {models[0] if models else os.uname().machine}"


def _memory() -> Path:
    return cache.directory() / "kvm.json"


def _verdicts() -> dict[str, bool]:
    """Return the verdicts; a file that is missing or damaged holds none."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(_memory().read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if isinstance(value, bool)}
    return {}


def _refusal() -> str:
    """Return why /dev/kvm cannot be opened, or an empty string."""
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""
