"""Run inside a VM by test_doctor.py: faults of the whole machine, made, found and repaired.

`python -m tests.vm.doctor_faults all MIRROR.ko` makes each in turn and prints a JSON object: by
code, what was seen and whether it was gone after its remedy. `... look CODE...` prints which of
these codes this boot has; `... apparmor` what a profile that denies the node gives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support.doctor_box import as_nobody, in_child, look, shell
from vhostctl.doctor.examine import FAULTS
from vhostctl.doctor.findings import Finding
from vhostctl.host.module import kernel_release

Step = Callable[[], object]
MODULES = Path("/lib/modules") / kernel_release()
CONF = Path("/etc/modprobe.d/doctor-test.conf")
CONFIG = Path("/boot") / f"config-{kernel_release()}"
NODE = Path("/dev/vhost-net")
TUN_NODE = Path("/dev/net/tun")
MIRROR_NODE = Path("/dev/vhost-net-mirror")


class Trials:
    """Faults tried so far: evidence, and whether the finding was gone afterwards."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, object]] = {}

    def __call__(
        self,
        code: str,
        fault: Step,
        cure: Callable[[str], object] = shell,
        look_now: Callable[[], dict[str, Finding]] = look,
    ) -> None:
        """Make a fault, look, apply the remedy, look again."""
        fault()
        finding = look_now().get(code)
        if finding is not None:
            cure(finding.remedy)
        evidence = finding.evidence if finding else None
        self.seen[code] = {"evidence": evidence, "gone": code not in look_now()}


def without_vhost() -> None:
    shell("modprobe -r vhost_net")


def load(_remedy: str = "") -> None:
    shell("modprobe vhost_net")


def forbid(line: str) -> Step:
    def write() -> None:
        without_vhost()
        CONF.write_text(f"{line}\n")

    return write


def then_load(remedy: str) -> None:
    shell(remedy)
    load()


def vhost(trials: Trials) -> None:
    """Faults of the module and its node."""
    trials("VHOST-NODE-MISSING", without_vhost)
    trials("VHOST-MODULE-NOT-LOADED", without_vhost)
    trials("VHOST-NODE-DRIVER", stale_node, stale_node_gone)
    for code, line in (
        ("VHOST-MODULE-BLACKLISTED", "blacklist vhost_net"),
        ("VHOST-MODULE-INSTALL-FALSE", "install vhost_net /bin/false"),
    ):
        trials(code, forbid(line), then_load)
    file = next(MODULES.rglob("vhost_net.ko*"))
    hidden = file.with_name("hidden")

    def hide() -> None:
        without_vhost()
        file.rename(hidden)

    def unhide(_remedy: str) -> None:
        hidden.rename(file)
        load()

    trials("VHOST-MODULE-ABSENT", hide, unhide)

    def upgraded() -> None:
        without_vhost()
        shell("mount -t tmpfs none /lib/modules && mkdir /lib/modules/9.9.9")

    def downgraded(_remedy: str) -> None:
        shell("umount /lib/modules")
        load()

    trials("VHOST-MODULE-DIRECTORY", upgraded, downgraded)
    limit = "modprobe -r vhost_net && modprobe vhost max_mem_regions=8 && modprobe vhost_net"
    trials("VHOST-LIMIT-REGIONS", lambda: shell(limit))


def stale_node() -> None:
    """Leave a node without a driver, and keep modprobe from loading it when it is opened."""
    without_vhost()
    CONF.write_text("blacklist vhost_net\n")
    with suppress(FileExistsError):
        os.mknod(NODE, 0o020600, os.makedev(10, 238))


def stale_node_gone(_remedy: str) -> None:
    CONF.unlink()
    NODE.unlink()
    load()


def tun(trials: Trials) -> None:
    """Faults of the module and the node of taps, and a kernel that was built without either."""

    def without_tun() -> None:
        shell("modprobe -r vhost_net tap tun")

    def stale() -> None:
        without_tun()
        CONF.write_text("blacklist tun\n")
        if not TUN_NODE.exists():
            TUN_NODE.parent.mkdir(exist_ok=True)
            os.mknod(TUN_NODE, 0o020600, os.makedev(10, 200))

    def fresh(_remedy: str) -> None:
        CONF.unlink()
        TUN_NODE.unlink()
        load()

    def absent() -> None:
        without_tun()
        CONFIG.write_text("# CONFIG_TUN is not set\n")

    def present(_remedy: str) -> None:
        CONFIG.unlink()
        load()

    trials("VHOST-TUN-DRIVER", stale, fresh)
    trials("VHOST-CONFIG-TUN", absent, present)
    trials("VHOST-CONFIG-VHOST-NET", absent, present)


def machine(trials: Trials) -> None:
    """Faults of the kernel's settings."""
    trials("VHOST-LIMIT-MAPS", lambda: shell("sysctl -qw vm.max_map_count=2000"))
    trials("VHOST-LIMIT-HUGEPAGES", lambda: shell("sysctl -qw vm.nr_hugepages=0"))
    for option in ("EVENTFD", "NET_NS", "BPF_SYSCALL", "MEMBARRIER"):

        def configure(option: str = option) -> None:
            CONFIG.write_text(f"# CONFIG_{option} is not set\n")

        code = f"VHOST-CONFIG-{option.replace('_', '-')}"
        trials(code, configure, lambda _: CONFIG.unlink())

    def as_others_see_it() -> dict[str, Finding]:
        found = as_nobody(lambda: {code: one.evidence for code, one in look().items()})
        return {code: FAULTS[code].found(evidence) for code, evidence in found.items()}

    def allow(_remedy: str) -> None:
        shell("sysctl -w kernel.unprivileged_bpf_disabled=0")

    trials("VHOST-BPF-DENIED", lambda: None, allow, as_others_see_it)


def mirror(trials: Trials, module: str) -> None:
    """Faults of the module of our own."""
    load_it = ["vhostctl", "kmod", "load", module]
    trials("VHOST-MIRROR-LOADED", lambda: subprocess.run(load_it, check=True))

    def no_node() -> None:
        subprocess.run(load_it, check=True)
        MIRROR_NODE.unlink()

    trials("VHOST-MIRROR-NODE", no_node, lambda _: shell("vhostctl kmod unload"))


def run_all(module: str) -> dict[str, dict[str, object]]:
    """Make every fault; modules_disabled comes last, for only a boot undoes it."""
    trials = Trials()
    vhost(trials)
    tun(trials)
    machine(trials)
    mirror(trials, module)
    without_vhost()
    Path("/proc/sys/kernel/modules_disabled").write_text("1")
    code = "VHOST-MODULE-DISABLED"
    trials.seen[code] = {"evidence": look()[code].evidence, "gone": None}
    return trials.seen


PROFILE = f"""
profile doctor-test flags=(attach_disconnected) {{
  file,
  capability,
  deny {NODE} w,
}}
"""


def apparmor() -> list[str | None]:
    """Return what is found of the node in a profile that denies it, and outside of it."""
    subprocess.run(["apparmor_parser", "-r"], input=PROFILE, text=True, check=True)

    def found() -> str | None:
        finding = look().get("VHOST-NODE-LSM")
        return finding.evidence if finding else None

    def confined() -> str | None:
        Path("/proc/self/attr/current").write_text("changeprofile doctor-test")
        return found()

    return [in_child(confined), found()]


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "all":
        print(json.dumps(run_all(words[0])))
    elif what == "apparmor":
        print(json.dumps(apparmor()))
    else:
        print(json.dumps(sorted(set(words) & set(look()))))
